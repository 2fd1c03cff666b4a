"""A whole economy in one process: a ledger whose blocks come by hand, a real small model, miners that compute.

Only the network is missing: what miners publish lies in a dict, and validators are told of each update.
"""

import time
from pathlib import Path

import torch

from hivetrain.averaging.report import Member
from hivetrain.averaging.state import params_digest
from hivetrain.averaging.updates import Followed, Update
from hivetrain.chain.base import Deadline, Rules
from hivetrain.chain.ledger import Ledger
from hivetrain.chain.local import LocalChain
from hivetrain.contribution.beacon import beacon_block, draw
from hivetrain.contribution.leaves import WorkLog
from hivetrain.contribution.record import Position, commitment, hotkey_subkey, reveal_key, seal, work_key
from hivetrain.contribution.replay import Replayed, Replayer
from hivetrain.contribution.rules import AuditRules
from hivetrain.contribution.sketch import Sketcher, sketch_seed
from hivetrain.data import RefinedWebDataModule, SlotReader
from hivetrain.keys import Hotkey
from hivetrain.model import CausalLM
from hivetrain.validator.auditor import Auditor
from hivetrain.validator.config import ScoringOptions
from hivetrain.validator.intake import Admission
from hivetrain.validator.run import SwarmFault
from hivetrain.validator.schema import Database
from hivetrain.validator.state import State
from hivetrain.validator.validator import Validator

RUN, BATCH, TEMPO = "run", 4, 12
AUDITS = AuditRules(probability=0.85, leaves=1, beacon_lag=2, reveal_blocks=4)
START = (0, 0, 0, 0)
FAR = 4e9  # an expiration
T = 10.0


def soon():
    return Deadline(T, time.monotonic)


class World:
    """Chain, model, data and DHT that everybody shares."""

    def __init__(self, directory: Path, **rules):
        self.directory = directory
        self.path = directory / "ledger.db"
        Ledger.create(self.path, Rules(**{"tempo": TEMPO, "rate_limit": 2, "block_time_s": 0.0} | rules))
        self.operator = Ledger(self.path)
        self.rules = AUDITS
        data = RefinedWebDataModule(block_size=16, batch_size=BATCH, n_slots=8)
        self.reader = SlotReader.of(data)
        torch.manual_seed(0)
        config = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 16}
        self.model = CausalLM(config=config, vocab_size=4096)
        groups = self.model.configure_optimizers()["optimizer"].param_groups
        self.trainable = [param for group in groups for param in group["params"]]
        self.replayer = Replayer(self.model, self.trainable, self.reader)
        self.dht, self.followed, self.params, self.gradients, self.replays = {}, [], {}, {}, {}
        self.miners = []
        self.epoch = -1
        self._move(None)

    def close(self):
        self.operator.close()

    @property
    def block(self):
        return self.operator.snapshot(soon()).block

    def advance(self, blocks=1):
        """Makes blocks; after each the miners reveal what it draws."""
        for _ in range(blocks):
            self.operator.advance(1, soon())
            for miner in self.miners:
                miner.reveal_drawn()

    def advance_to(self, block):
        self.advance(max(0, block - self.block))

    def join(self, name, stake=0.0):
        hotkey = Hotkey.from_seed(name.encode().ljust(32, b"."))
        self.operator.set_stake(hotkey.address, stake, soon())
        self.operator.register(hotkey.address, soon())
        return hotkey

    def chain(self, hotkey):
        return LocalChain(self.path, hotkey)

    def work(self, slot, offset):
        """Loss, sketch and gradient of a microbatch on the current params."""
        key = self.epoch, slot, offset
        if key not in self.gradients:
            batch, place = self.reader.batch(slot, START, offset, BATCH)
            loss, grads = self.replayer.gradients(batch, "32-true")
            flat = torch.cat([grad.flatten() for grad in grads])
            sketch = self.sketcher.sketch_flat(flat)
            self.gradients[key] = loss, sketch, flat
            self.replays[self.epoch, slot, place] = Replayed(loss, sketch, place, "32-true")
        return self.gradients[key]

    def finish_epoch(self, *miners, average=None, followed=True, cap=10**6):
        """The miners' gradients make an update, and a new epoch begins."""
        total = sum(miner.samples for miner in miners)
        members = tuple(Member(m.peer_id, m.samples, float(min(m.samples, cap)), m.commitment) for m in miners)
        if average is None:
            average = sum(BATCH * flat for miner in miners for flat in miner.sent) / total
        update = Update(self.epoch, members, average) if followed else None
        self.followed.append(Followed(self.epoch, self.digest, update))
        self._move(average)
        for miner in self.miners:
            miner.begin()

    def _move(self, average):
        if average is not None:
            parts = average.split([param.numel() for param in self.trainable])
            with torch.no_grad():
                for param, part in zip(self.trainable, parts, strict=True):
                    param -= 0.1 * part.view_as(param)
        self.epoch += 1
        self.digest = params_digest(self.model)
        params = {name: param.detach().clone() for name, param in self.model.named_parameters()}
        self.params[self.epoch] = self.digest, params
        self.replayer.load(params)
        self.sketcher = Sketcher(sketch_seed(RUN, self.epoch, self.digest), [p.numel() for p in self.trainable])


class Miner:
    """Computes microbatches of its slot, commits to them, and reveals what is drawn, unless told otherwise."""

    def __init__(self, world, name, lie=None, reveals=True):
        self.world, self.hotkey, self.lie, self.reveals = world, world.join(name), lie, reveals
        self.slot = next(n.uid for n in world.operator.snapshot(soon()).neurons if n.hotkey == self.hotkey.address)
        self.peer_id = f"peer-{name}"
        self.offset, self.expected, self.withheld = 0, [], []
        self.begin()
        world.miners.append(self)

    @property
    def address(self):
        return self.hotkey.address

    def begin(self):
        self.log, self.sent, self.commitment = WorkLog(), [], b""

    @property
    def samples(self):
        return self.log.samples

    def mine(self, microbatches=2):
        for _ in range(microbatches):
            loss, sketch, flat = self.world.work(self.slot, self.offset)
            if self.lie is not None:
                loss, sketch, flat = self.lie(loss, sketch, flat)
            place = Position(*self.world.reader.position_at(self.slot, START, self.offset))
            self.log.add(place, self.offset, BATCH, loss, sketch)
            self.sent.append(flat)
            self.offset += BATCH

    def record(self, **changes):
        world = self.world
        facts = {
            "run_id": RUN,
            "hotkey": self.address,
            "peer_id": self.peer_id,
            "swarm_epoch": world.epoch,
            "params_digest": world.digest,
            "rules": world.rules,
            "block": world.block,
            "precision": "32-true",
        }
        return self.log.contribution(**facts | changes)

    def publish(self, record=None):
        record = record or self.record()
        sealed = seal(record, self.hotkey, FAR)
        self.commitment = commitment(sealed)
        self.put(work_key(RUN, record.swarm_epoch), sealed)
        self.expected.append((record, self.commitment, self.log.copy()))
        return record

    def put(self, key, sealed):
        self.world.dht.setdefault(key, {})[hotkey_subkey(self.address)] = sealed, FAR

    def contribute(self, microbatches=2):
        self.mine(microbatches)
        return self.publish()

    def reveal_drawn(self):
        world, block = self.world, self.world.block
        for expected in list(self.expected):
            record, bound, log = expected
            if beacon_block(record, world.rules) > block:
                continue
            self.expected.remove(expected)
            drawn = drawn_of(world, record)
            if drawn and self.reveals:
                self.reveal(record, bound, log)
            elif drawn:
                self.withheld.append((record, bound, log))

    def reveal(self, record, bound, log):
        drawn = drawn_of(self.world, record)
        reveal = log.reveal(bound, drawn, run_id=RUN, hotkey=self.address, swarm_epoch=record.swarm_epoch)
        self.put(reveal_key(RUN, record.swarm_epoch), seal(reveal, self.hotkey, FAR))


def drawn_of(world, record):
    beacon = world.operator.block_hash(beacon_block(record, world.rules), soon())
    return draw(beacon, RUN, record.swarm_epoch, record.hotkey, record.microbatches, world.rules)


class FollowedWorld:
    """The world as a follower has it; a new one reports the last epochs again, without their averages."""

    def __init__(self, world, keep=12):
        self.world, self.keep = world, keep
        self.down, self.num_peers = False, 3
        self.reported, self.recalled = len(world.followed), world.followed[-keep:]
        self.epoch, self.digest, self.caught_up = 0, "", False

    def advance(self):
        if self.down:
            self.num_peers, self.caught_up = 0, False
            raise SwarmFault("nobody is there")
        self.num_peers = 3
        followed = [
            Followed(f.epoch, f.params_digest, f.update and Update(f.epoch, f.update.members)) for f in self.recalled
        ]
        followed += self.world.followed[self.reported :]
        self.reported, self.recalled = len(self.world.followed), []
        self.epoch, self.digest, self.caught_up = self.world.epoch, self.world.digest, True
        return followed

    def params(self, epoch):
        return self.world.params[epoch] if self.epoch - epoch < self.keep else None

    def collect(self, key, wanted):
        if self.down:
            raise SwarmFault("no answer")
        return {subkey: record for subkey, record in self.world.dht.get(key, {}).items() if subkey in wanted}

    def close(self):
        pass


class RememberedReplays:
    """What the world has computed already; each validator would find the same, bit by bit."""

    def __init__(self, world):
        self.world, self.reader, self.precision, self.loads = world, world.reader, "32-true", 0

    def load(self, state):
        self.loads += 1

    def replay(self, seed, slot, contribution, offset):
        first = tuple(getattr(contribution.first, name) for name in ("data_pass", "window", "place", "block"))
        place = self.reader.position_at(slot, first, offset)
        return self.world.replays[contribution.swarm_epoch, slot, place]


OPTIONS = ScoringOptions(submit_margin=2)


class Station:
    """One validator with its files; ``restart`` leaves the old one where it is, as kill -9 does."""

    def __init__(self, world, name, options=OPTIONS, replays=True):
        self.world, self.options, self.replays = world, options, replays
        self.hotkey = world.join(name, stake=1000.0)
        self.path = world.directory / f"{name}.db"
        self.kept = []
        self.restart()

    def restart(self):
        world = self.world
        self.chain = world.chain(self.hotkey)
        self.run = FollowedWorld(world)
        self.state = State(Database(self.path))
        self.state.open(run_id=RUN, hotkey=self.hotkey.address)
        self.auditor = Auditor(RUN, world.model, world.trainable, world.reader)
        if self.replays:
            self.auditor._replayer = RememberedReplays(world)
        admission = Admission(RUN, world.rules, 8, most_samples=1000, most_rows=16)
        self.validator = Validator(self.chain, self.run, self.state, admission, self.auditor, self.options, T)
        self.kept.append((self.state, self.chain))

    def close(self):
        for state, chain in self.kept:
            state.close()
            chain.close()

    def round(self):
        return self.validator.run_once()

    def verdicts(self, miner):
        """Epoch -> verdict of a miner's records."""
        query = "SELECT swarm_epoch, verdict FROM records WHERE hotkey = ? ORDER BY swarm_epoch"
        return dict(map(tuple, self.state.database.rows(query, miner.address)))

    def reasons(self, miner):
        query = "SELECT reason FROM records WHERE hotkey = ? ORDER BY swarm_epoch"
        return [row[0] for row in self.state.database.rows(query, miner.address)]

    def tempos(self):
        """Exactly what was kept of each tempo's scores and weights."""
        return [tuple(row) for row in self.state.database.rows("SELECT block, scores, averages, weights FROM tempos")]

    def on_chain(self):
        return self.chain.weights(T).get(self.hotkey.address, {})


def epoch_of(world, *miners, stations=(), blocks=1):
    """One honest swarm epoch: work, commit, look, exchange, a block, look."""
    for miner in miners:
        miner.contribute()
    for station in stations:
        station.round()
    world.finish_epoch(*miners)
    world.advance(blocks)
    for station in stations:
        station.round()
