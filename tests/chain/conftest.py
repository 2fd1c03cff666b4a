"""The same subnet behind each implementation, with an operator who owns its ledger."""

import itertools
import time

import pytest

from hivetrain.chain.base import Deadline, Rules
from hivetrain.chain.ledger import Ledger
from hivetrain.chain.local import LocalChain
from hivetrain.keys import Hotkey, Wallet

T = 10.0


def soon(seconds=T):
    return Deadline(seconds, time.monotonic)


class Subnet:
    """A ledger whose blocks come by hand, and chains of one implementation that look at it."""

    def __init__(self, tmp_path, rules):
        self.path = tmp_path / "ledger.db"
        self.tmp_path = tmp_path
        Ledger.create(self.path, rules)
        self.operator = Ledger(self.path)
        self.chains = []
        self._numbers = itertools.count()

    def open(self, wallet=None):
        chain = self._make(wallet or self.wallet())
        self.chains.append(chain)
        return chain

    def wallet(self):
        wallet = Wallet(f"cold{next(self._numbers)}", "hot", str(self.tmp_path / "wallets"))
        wallet.create_hotkey()
        wallet.create_coldkey(None)
        return wallet

    def join(self, stake=0.0):
        """A registered newcomer."""
        chain = self.open()
        self.operator.set_stake(chain.hotkey, stake, soon())
        chain.register(T)
        return chain

    def advance(self, blocks):
        return self.operator.advance(blocks, soon())

    def to_epoch(self, count=1):
        for _ in range(count):
            view = self.operator.snapshot(soon())
            self.advance(view.next_epoch - view.block)

    def close(self):
        for chain in self.chains:
            chain.close()
        self.operator.close()


class LocalSubnet(Subnet):
    def _make(self, wallet):
        return LocalChain(self.path, wallet)

    def break_down(self):
        self.path.rename(self.path.with_name("moved.db"))

    def speak_otherwise(self):
        for file in self.tmp_path.glob("ledger.db*"):
            file.unlink()
        self.path.write_bytes(b"no ledger " * 1000)


class RemoteSubnet(Subnet):
    def __init__(self, tmp_path, rules):
        from hivetrain.chain.server import LedgerServer

        super().__init__(tmp_path, rules)
        self.served = Ledger(self.path)
        self.server = LedgerServer(self.served, Hotkey.throwaway())
        self.server.__enter__()
        self.url = self.server.url

    def _make(self, wallet):
        from hivetrain.chain.remote import RemoteChain

        return RemoteChain(self.url, wallet)

    def break_down(self):
        self.url = "http://127.0.0.1:1"

    def speak_otherwise(self):
        self.url = self.server.url + "/elsewhere"

    def close(self):
        super().close()
        self.server.__exit__()
        self.served.close()


class BittensorSubnet(Subnet):
    def __init__(self, tmp_path, rules):
        from fake_substrate import Faults

        super().__init__(tmp_path, rules)
        self.faults = Faults()

    def _make(self, wallet, **options):
        from fake_substrate import NETUID, FakeSubstrate

        from hivetrain.chain.bittensor import BittensorChain

        options = {"registration_limit_tao": 1.0, "confirm": lambda cost: True, "poll_s": 0.02} | options
        return BittensorChain(
            "local", NETUID, wallet, substrate=lambda: FakeSubstrate(self.path, self.faults), **options
        )

    def break_down(self):
        import bittensor

        self.faults.order("connect", bittensor.RpcConnectionError("nobody there"))
        self.faults.order("read", bittensor.RpcConnectionError("websocket closed"))

    def speak_otherwise(self):
        from bittensor._transport.errors import StorageFunctionNotFound

        self.faults.order("read", StorageFunctionNotFound("Storage function SubtensorModule.Tempo not found"))


KINDS = {"local": LocalSubnet, "remote": RemoteSubnet, "bittensor": BittensorSubnet}
RULES = {"tempo": 10, "rate_limit": 4, "block_time_s": 0.0, "immunity_period": 20, "min_non_immune": 1}


@pytest.fixture(params=list(KINDS))
def subnet(request, tmp_path):
    if request.param == "bittensor":
        pytest.importorskip("bittensor")
    made = KINDS[request.param](tmp_path, Rules(**RULES))
    yield made
    made.close()


@pytest.fixture
def bittensor_subnet(tmp_path):
    pytest.importorskip("bittensor")
    made = BittensorSubnet(tmp_path, Rules(**RULES))
    yield made
    made.close()


@pytest.fixture
def local_subnet(tmp_path):
    made = LocalSubnet(tmp_path, Rules(**RULES))
    yield made
    made.close()


@pytest.fixture
def remote_subnet(tmp_path):
    made = RemoteSubnet(tmp_path, Rules(**RULES))
    yield made
    made.close()
