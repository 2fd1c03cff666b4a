"""``hivetrain chain``: look at a subnet and join it, whichever chain it lives on."""

import argparse
import getpass
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hivetrain.chain.base import Chain, Snapshot

HELP = "status of the incentive chain: neurons, weights, axons; register a hotkey"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    status = actions.add_parser("status", help="block, rules and all neurons")
    register = actions.add_parser("register", help="take a uid for the wallet's hotkey; may cost money on Bittensor")
    weights = actions.add_parser("weights", help="who gave whom which share")
    axons = actions.add_parser("axons", help="who serves where; --publish tells where this hotkey serves")
    for action in (status, register, weights, axons):
        action.add_argument(
            "--chain",
            required=True,
            metavar="ADDRESS",
            help="a ledger file, http://HOST:PORT[#SERVER_HOTKEY], or bittensor:NETWORK/NETUID",
        )
        action.add_argument("--wallet", help="name of the wallet; reading works without one")
        action.add_argument("--hotkey", default="default", help="name of the hotkey (default: %(default)s)")
        action.add_argument("--wallet-path", default="~/.bittensor/wallets", help="all wallets (default: %(default)s)")
        action.add_argument("--timeout", type=float, default=60.0, help="seconds (default: %(default)s)")
        action.add_argument("--json", action="store_true", help="print JSON instead of tables")
    register.add_argument("--max-cost", type=float, metavar="TAO", help="the most it may cost on Bittensor")
    register.add_argument("--yes", action="store_true", help="do not ask before spending up to --max-cost")
    axons.add_argument("--publish", metavar="IP:PORT", help="publish this endpoint for the wallet's hotkey")


def run(args: argparse.Namespace) -> int:
    from hivetrain.chain.base import LedgerError
    from hivetrain.errors import UserError

    try:
        with _open(args) as chain:
            return _ACTIONS[args.action](args, chain)
    except LedgerError as error:
        raise UserError(str(error)) from error


def _open(args: argparse.Namespace) -> "Chain":
    from hivetrain.chain.address import open_chain
    from hivetrain.errors import UserError
    from hivetrain.keys import Wallet

    writes = args.action == "register" or getattr(args, "publish", None)
    if writes and args.wallet is None:
        raise UserError("this needs a key: pass --wallet NAME, or make one with hivetrain keys new")
    wallet = None if args.wallet is None else Wallet(args.wallet, args.hotkey, args.wallet_path)
    options: dict[str, Any] = {}
    if args.action == "register" and args.chain.startswith("bittensor:"):
        options = {"registration_limit_tao": args.max_cost, "confirm": (lambda _: True) if args.yes else _ask}
        if wallet and args.max_cost is not None and wallet.coldkey_is_locked() and sys.stdin.isatty():
            options["coldkey_password"] = getpass.getpass(f"Password of {wallet.coldkey_file}: ")
    return open_chain(args.chain, wallet, **options)


def _status(args: argparse.Namespace, chain: "Chain") -> int:
    from hivetrain.chain import wire

    view = chain.snapshot(args.timeout)
    if args.json:
        _print_json(wire.snapshot_to_dict(view))
        return 0
    rules = view.rules
    seal = "sealed" if rules.commit_reveal else "plain"
    print(f"block {view.block}  next epoch {view.next_epoch}  tempo {rules.tempo}  {rules.consensus}, weights {seal}")
    columns = ("uid", "hotkey", "stake", "role", "updated", "incentive", "dividends", "emission", "axon")
    rows = [
        (
            str(neuron.uid),
            neuron.hotkey,
            f"{neuron.stake:,.2f}",
            ("validator" if neuron.permit else "miner") if neuron.active else "silent",
            f"{view.block - neuron.last_update} ago",
            f"{neuron.incentive:.4f}",
            f"{neuron.dividends:.4f}",
            f"{neuron.emission:.4f}",
            neuron.axon or "",
        )
        for neuron in view.neurons
    ]
    _print_table(columns, rows)
    return 0


def _register(args: argparse.Namespace, chain: "Chain") -> int:
    return _print_receipt(args, chain.register(args.timeout))


def _weights(args: argparse.Namespace, chain: "Chain") -> int:
    found = chain.weights(args.timeout)
    if args.json:
        _print_json(found)
        return 0
    rows = [
        (validator, miner, f"{share:.4f}")
        for validator, row in found.items()
        for miner, share in sorted(row.items(), key=lambda item: -item[1])
    ]
    _print_table(("validator", "miner", "share"), rows)
    return 0


def _axons(args: argparse.Namespace, chain: "Chain") -> int:
    from hivetrain.errors import UserError

    if args.publish:
        ip, _, port = args.publish.rpartition(":")
        if not port.isdigit():
            raise UserError(f"{args.publish!r} is no IP:PORT")
        return _print_receipt(args, chain.publish(ip.strip("[]"), int(port), args.timeout))
    view: Snapshot = chain.snapshot(args.timeout)
    served = [neuron for neuron in view.neurons if neuron.axon]
    if args.json:
        _print_json({neuron.hotkey: neuron.axon for neuron in served})
        return 0
    _print_table(("uid", "hotkey", "axon"), [(str(item.uid), item.hotkey, item.axon or "") for item in served])
    return 0


_ACTIONS = {"status": _status, "register": _register, "weights": _weights, "axons": _axons}


def _ask(cost_tao: float) -> bool:
    try:
        return input(f"Registration costs {cost_tao:g} TAO now. Pay it? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _print_receipt(args: argparse.Namespace, receipt: Any) -> int:
    """Print what became of a write; status 3 says that nobody knows."""
    from hivetrain.chain import wire

    if args.json:
        _print_json(wire.receipt_to_dict(receipt))
    else:
        where = "" if receipt.block is None else f" in block {receipt.block}"
        print(f"{receipt.outcome}{where}{': ' if receipt.detail else ''}{receipt.detail}")
    return 3 if receipt.outcome == "unknown" else 0


def _print_json(value: Any) -> None:
    import json

    print(json.dumps(value, indent=2))


def _print_table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """A table; on a terminal too narrow for it addresses are shortened, figures never are."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from hivetrain.keys import is_address

    console = Console()
    if not console.is_terminal:
        console = Console(width=240)
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    if sum(widths) + len(widths) > console.width:
        rows = [tuple(f"{cell[:6]}…{cell[-4:]}" if is_address(cell) else cell for cell in row) for row in rows]
    table = Table(box=None, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, no_wrap=column != "axon", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
