"""A made-up run of any size, through the same records that real peers publish."""

import math
import random
import sqlite3

from hivetrain.averaging.progress import Progress
from hivetrain.averaging.settings import RunSettings
from hivetrain.chain.base import Neuron, Rules, Snapshot
from hivetrain.contribution.scoreboard import MinerScore, Scoreboard
from hivetrain.keys import Hotkey
from hivetrain.monitor.aggregate import EpochLine
from hivetrain.monitor.reader import parse_reading
from hivetrain.monitor.status import EpochNote, RoundNote, Status

SETTINGS = RunSettings("model", 124_000_000, 1024, "fp16", "AdamW")
BEGAN = 1_750_000_000.0
EPOCH_S = 20.0


def loss_of(epoch):
    return 3.0 + 7.0 * math.exp(-epoch / 1500) + 0.05 * math.sin(epoch / 7)


def owner(number):
    """The DHT subkey of a peer."""
    return b"[owner:ssh-rsa %d]" % number


def peer_id(number):
    return f"12D3KooWSynthetic{number:08d}"


def round_note(epoch, peers, outcome="averaged", reason=""):
    done = outcome == "averaged"
    return RoundNote(epoch, epoch, outcome, peers, peers, float(done), 1024 * done, 0.8, 2.5, 10**7, 10**7, reason)


def status(number, epoch, peers, hotkey=None, **changes):
    notes = tuple(EpochNote(e, loss_of(e) + 0.01 * (number % 7), 8) for e in range(max(0, epoch - 8), epoch))
    rounds = tuple(round_note(e, peers) for e in range(max(0, epoch - 8), epoch))
    values = {
        "at": BEGAN + EPOCH_S * epoch,
        "swarm_epoch": epoch,
        "loss": loss_of(epoch),
        "heldout_loss": loss_of(epoch) + 0.2,
        "heldout_epoch": epoch,
        "samples": 8 * epoch,
        "tokens": 8 * 512 * epoch,
        "tokens_per_s": 1000.0 + number,
        "device": "NVIDIA H100",
        "hotkey": hotkey,
        "data_pass": 0,
        "window": epoch // 10,
        "n_windows": 4000,
        "epochs": notes,
        "rounds": rounds,
    }
    return Status(**(values | changes))


def progress(number, epoch, **changes):
    values = {"peer_id": peer_id(number), "fingerprint": SETTINGS.fingerprint, "epoch": epoch, "samples": number % 9}
    return Progress(**(values | {"samples_per_s": 3.0, "digest": b"d" * 16} | changes))


class FakeReader:
    """What ``RunReader`` would read of a swarm that lives in this object."""

    run_id = "synthetic"

    def __init__(self, clock, peers=3, epoch=0, hotkeys=()):
        self.clock, self.epoch, self.size = clock, epoch, peers
        self.peers = {number: {} for number in range(peers)}
        self.hotkey_of = dict(enumerate(hotkeys))
        self.left, self.extra_progress, self.extra_statuses, self.signed = set(), {}, {}, {}
        self.boards, self.fault, self.ttl_s = {}, None, 10.0

    def read(self):
        if self.fault:
            raise TimeoutError(self.fault)
        expires = self.clock() + self.ttl_s
        found = {owner(n): (progress(n, self.epoch).to_bytes(), expires) for n in self.peers}
        found |= {owner(n): (b"", expires) for n in self.left}
        statuses = {}
        for n, changes in self.peers.items():
            said = status(n, self.epoch, self.size, **({"hotkey": self.hotkey_of.get(n)} | changes))
            statuses[owner(n)] = (said.to_bytes(), expires)
        return parse_reading(found | self.extra_progress, statuses | self.extra_statuses, self.clock())

    def settings(self, fingerprint):
        return SETTINGS if fingerprint == SETTINGS.fingerprint else None

    def scoreboards(self, is_validator):
        return {hotkey: board for hotkey, board in self.boards.items() if is_validator(hotkey)}

    def peers_of(self, hotkeys, epoch):
        signed = {hotkey: peer_id(n) for n, hotkey in self.hotkey_of.items() if n % 2 == 0} | self.signed
        return {hotkey: peer for hotkey, peer in signed.items() if hotkey in hotkeys}


class FakeChain:
    """A chain in this object."""

    def __init__(self, view, weights):
        self.view, self.rows, self.closed = view, weights, False

    def snapshot(self, timeout_s):
        return self.view

    def weights(self, timeout_s):
        return self.rows

    def close(self):
        self.closed = True


def hotkeys(number):
    return [Hotkey.throwaway().address for _ in range(number)]


def economy(miners, validators, block=1000):
    """A chain and the validators' boards for these hotkeys."""
    share = 1 / max(1, len(miners))
    neurons = [Neuron(i, h, 0.0, True, False, 900, 0, share, 0.0, share) for i, h in enumerate(miners)]
    neurons += [
        Neuron(len(miners) + i, h, 1000.0 - i, True, True, 990, 0, 0.0, 0.5, 0.5) for i, h in enumerate(validators)
    ]
    view = Snapshot(block, "0x" + "0" * 64, 1080, Rules(tempo=360), tuple(neurons))
    lines = tuple(MinerScore(h, 640, (("passed", 3), ("not drawn", 9)), 640.0, share) for h in miners)
    boards = {h: Scoreboard("synthetic", h, 980, lines) for h in validators}
    return FakeChain(view, {v: dict.fromkeys(miners, share) for v in validators}), boards


def fill(path, epochs, peers):
    """Writes a long past straight into a history file that ``History`` has made."""
    names = list(EpochLine.__dataclass_fields__)
    chance = random.Random(0)
    with sqlite3.connect(path) as db:
        rows = []
        for epoch in range(epochs):
            loss = loss_of(epoch)
            line = EpochLine(
                epoch, BEGAN + EPOCH_S * epoch, loss, loss - 0.1, loss + 0.1, loss + 0.2 if epoch % 10 == 0 else None,
                peers, 0, 8 * peers, "averaged", peers, peers, 1.0, 0.5, 2 + chance.random(), 10**7, 10**7, 1024, 0, "",
            )  # fmt: skip
            rows.append([getattr(line, name) for name in names])
        db.executemany(f"INSERT INTO epochs ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})", rows)
        ticks = []
        for index in range(2 * epochs):
            here = peers - (index // 97) % 4
            gone = int(index % 97 == 0 and index > 0)
            ticks.append((BEGAN + 10.0 * index, here, here * chance.uniform(950.0, 1050.0), 0, gone))
        db.executemany("INSERT INTO ticks VALUES (?, ?, ?, ?, ?)", ticks)
    db.close()
