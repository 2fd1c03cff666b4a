"""Which chain a program means: one line of text for all three implementations.

Surprising fact: reading needs a key on a served ledger, where every request is signed, but any key will do. Without a
wallet a throw-away key reads.
"""

from typing import Any

from hivetrain.chain.base import Chain
from hivetrain.errors import UserError
from hivetrain.keys import Hotkey, Wallet, is_address

FORMS = "a ledger file, http://HOST:PORT[#SERVER_HOTKEY], or bittensor:NETWORK/NETUID"


def open_chain(address: str, hotkey: Hotkey | Wallet | None = None, **bittensor_options: Any) -> Chain:
    """The chain an address names.

    Args:
        address: a ledger file, ``http(s)://host:port`` with the server's hotkey after ``#`` if it is known, or
            ``bittensor:network/netuid``.
        hotkey: who acts; None makes a throw-away key, which can only read.
        bittensor_options: further arguments of ``BittensorChain``; the other two have none to give.

    Raises:
        UserError: the address makes no sense, or the SDK that it needs is not installed.
    """
    who = hotkey if hotkey is not None else Hotkey.throwaway()
    if address.startswith(("http://", "https://")):
        from hivetrain.chain.remote import RemoteChain

        url, _, server = address.partition("#")
        if server and not is_address(server):
            raise UserError(f"{server!r} after the # is no hotkey address")
        return RemoteChain(url, who, server or None)
    if address.startswith("bittensor:"):
        network, slash, netuid = address.removeprefix("bittensor:").rpartition("/")
        if not slash or not network or not (netuid.isascii() and netuid.isdigit()):
            raise UserError(f"{address!r} is no chain: use bittensor:NETWORK/NETUID, such as bittensor:test/42")
        return _bittensor(network, int(netuid), who, bittensor_options)
    if "://" in address or not address:
        raise UserError(f"{address!r} is no chain: use {FORMS}")
    from hivetrain.chain.local import LocalChain

    return LocalChain(address, who)


def _bittensor(network: str, netuid: int, who: Hotkey | Wallet, options: dict[str, Any]) -> Chain:
    try:
        from hivetrain.chain.bittensor import BittensorChain
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install 'hivetrain[chain]'") from error
    try:
        return BittensorChain(network, netuid, who, **options)
    except ValueError as error:
        raise UserError(str(error)) from error
