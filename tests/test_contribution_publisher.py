"""A miner that commits to its work: a swarm of one, a ledger in a file, a wallet of its own."""

import copy
import json
import logging
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from toy_data import CountingData

from hivetrain.averaging.report import Outcome, RoundReport
from hivetrain.averaging.watch import RoundWatcher
from hivetrain.callbacks import ContributionPublisher, StopAtSwarmEpoch
from hivetrain.callbacks.audited_work import AuditedWork
from hivetrain.callbacks.beacon_clock import BeaconClock
from hivetrain.callbacks.replayable import check_dropout
from hivetrain.callbacks.work_counts import WorkCounts
from hivetrain.chain.base import Deadline, Rules
from hivetrain.chain.ledger import Ledger
from hivetrain.chain.local import LocalChain
from hivetrain.chain.remote import RemoteChain
from hivetrain.contribution import merkle
from hivetrain.contribution.audit import Verdict, audit
from hivetrain.contribution.beacon import draw
from hivetrain.contribution.leaves import WorkLog
from hivetrain.contribution.record import (
    Position,
    commitment,
    hotkey_subkey,
    open_contribution,
    open_reveal,
    reveal_key,
    work_key,
)
from hivetrain.contribution.replay import Replayer
from hivetrain.contribution.rules import AuditRules
from hivetrain.contribution.sketch import Sketcher, sketch_seed, sketch_vector
from hivetrain.data import RefinedWebDataModule
from hivetrain.data.reader import SlotReader
from hivetrain.errors import UserError
from hivetrain.fit_cli import HiveCLI
from hivetrain.keys import Hotkey, Wallet
from hivetrain.model import CausalLM
from hivetrain.strategies import HivemindStrategy

T = 10.0
ALWAYS = AuditRules(probability=1.0, leaves=2, beacon_lag=2, reveal_blocks=20)
pytestmark = pytest.mark.timeout(120)


def soon(seconds: float = T) -> Deadline:
    return Deadline(seconds, time.monotonic)


def wait_until(condition, what: str, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.01)


@pytest.fixture
def subnet(tmp_path):
    """A ledger whose blocks come by hand, with one registered miner (uid 1) and a wallet for it."""
    path = tmp_path / "ledger.db"
    Ledger.create(path, Rules(block_time_s=0.0))
    operator = Ledger(path)
    wallet = Wallet("miner", "hot", str(tmp_path / "wallets"))
    wallet.create_hotkey()
    operator.register(Hotkey.throwaway().address, soon())
    operator.register(wallet.address(), soon())
    yield SimpleNamespace(
        path=str(path), operator=operator, wallet=wallet, advance=lambda n: operator.advance(n, soon())
    )
    operator.close()


def publisher_of(subnet, rules: AuditRules = ALWAYS, chain: str | None = None, **arguments) -> ContributionPublisher:
    wallet = subnet.wallet
    return ContributionPublisher(chain or subnet.path, wallet.name, wallet.hotkey, wallet.path, rules, **arguments)


def small_model(**arguments) -> CausalLM:
    torch.manual_seed(0)
    config = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 16}
    return CausalLM(config=config, vocab_size=4096, learning_rate=1e-2, warmup_epochs=2, **arguments)


def small_data(**arguments) -> RefinedWebDataModule:
    return RefinedWebDataModule(**({"block_size": 16, "batch_size": 4, "n_slots": 4, "val_blocks": 4} | arguments))


def make_trainer(*callbacks: Callback, epochs: int = 3, **arguments) -> Trainer:
    strategy = arguments.pop("strategy", None) or HivemindStrategy(target_batch_size=8, initial_peers="", run_id="paid")
    defaults = {"accelerator": "cpu", "max_epochs": -1, "num_sanity_val_steps": 0, "logger": False}
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(
        strategy=strategy, callbacks=[*callbacks, StopAtSwarmEpoch(epochs)], limit_val_batches=0,
        **(defaults | quiet | arguments),
    )  # fmt: skip


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


class Blocks(Callback):
    """Makes a block after each microbatch, and those that the last beacon needs at the end."""

    def __init__(self, subnet) -> None:
        self.advance = subnet.advance

    def on_train_batch_end(self, *_) -> None:
        self.advance(1)

    def on_train_end(self, *_) -> None:
        self.advance(3)


class Witness(Callback):
    """Reads the DHT as a validator would: records when a round is about to begin, reveals at the end."""

    def __init__(self) -> None:
        self.records, self.params, self.reveals, self.order = {}, {}, {}, []

    def setup(self, trainer, pl_module, stage) -> None:
        witness, strategy = self, trainer.strategy

        class Watch(RoundWatcher):
            def on_commit(self, swarm_epoch, params_digest, samples):
                witness.records[swarm_epoch] = strategy.collect(work_key(strategy.run_id, swarm_epoch), T)
                witness.params[swarm_epoch] = copy.deepcopy(pl_module.state_dict())
                return b""

        strategy.watchers.append(Watch())

    def on_train_end(self, trainer, pl_module) -> None:
        strategy = trainer.strategy
        names = {param: name for name, param in pl_module.named_parameters()}
        self.order = [names[param] for param in strategy.trainable_params]
        self.reveals = {epoch: strategy.collect(reveal_key(strategy.run_id, epoch), T) for epoch in self.records}


def test_a_miner_commits_before_each_exchange_and_its_leaves_are_what_anybody_computes_again(subnet) -> None:
    publisher, witness, data, model = publisher_of(subnet), Witness(), small_data(), small_model()
    trainer = make_trainer(Blocks(subnet), publisher, witness)
    trainer.fit(model, data)
    assert data.slot == publisher.uid == 1
    subkey = hotkey_subkey(subnet.wallet.address())
    reader = SlotReader.of(data)
    previous = None
    for epoch, report in enumerate(trainer.strategy.rounds):
        assert report.outcome is Outcome.ALONE
        sealed, _ = witness.records[epoch][subkey]
        record = open_contribution(sealed)
        assert report.members[0].commitment == commitment(sealed)
        assert (record.run_id, record.swarm_epoch, record.hotkey) == ("paid", epoch, subnet.wallet.address())
        assert (record.microbatches, record.batch_size, record.samples, record.span) == (2, 4, 8, 8)
        assert (record.precision, record.rules) == ("32-true", ALWAYS.fingerprint)
        assert record.peer_id == report.members[0].peer_id
        assert previous is None or record.first > previous.last
        previous = record

        reveal = open_reveal(witness.reveals[epoch][subkey][0])
        assert reveal.commitment == commitment(sealed)
        seed = sketch_seed("paid", epoch, record.params_digest)
        total = torch.zeros(256)
        again = small_model()
        again.load_state_dict(witness.params[epoch])
        for revealed in reveal.leaves:
            at = (record.first.data_pass, record.first.window, record.first.place, record.first.block)
            batch, _ = reader.batch(1, at, revealed.leaf.offset, 4)
            again.zero_grad()
            loss = again.loss(batch)
            loss.backward()
            grads = [dict(again.named_parameters())[name].grad for name in witness.order]
            sketch = Sketcher(seed, [grad.numel() for grad in grads]).sketch(grads)
            total += 4 * sketch
            assert revealed.leaf.loss == pytest.approx(loss.item(), rel=1e-6)
            assert error(sketch_vector(revealed.leaf.sketch), sketch) < 1e-5
        assert error(sketch_vector(record.total), total) < 1e-5

        own = dict(again.named_parameters())
        replayer = Replayer(again, [own[name] for name in witness.order], reader)
        drawn = [revealed.index for revealed in reveal.leaves]
        assert audit(record, reveal, drawn, seed, 1, replayer).verdict is Verdict.PASSED
    counts = publisher.counts
    assert counts.contributions_published == counts.audits_drawn == counts.reveals_published == 3
    assert counts.samples_committed == trainer.strategy.samples_contributed == 24
    assert counts.publish_failures == counts.commits_unpaid == counts.reveals_missed == 0


def test_a_miner_that_is_not_drawn_reveals_nothing(subnet) -> None:
    never = AuditRules(probability=0.0, beacon_lag=1)
    publisher, witness = publisher_of(subnet, never), Witness()
    make_trainer(Blocks(subnet), publisher, witness).fit(small_model(), small_data())
    assert publisher.counts.contributions_published == 3
    assert publisher.counts.audits_drawn == publisher.counts.reveals_missed == 0
    assert not any(witness.reveals.values())


@pytest.mark.parametrize(("lag", "is_warned"), [(8, False), (2, True)])
def test_a_miner_says_that_an_exchange_may_outlast_the_way_to_the_beacon(tmp_path, caplog, lag, is_warned) -> None:
    path = tmp_path / "ledger.db"
    Ledger.create(path, Rules(block_time_s=0.5))
    wallet = Wallet("miner", "hot", str(tmp_path / "wallets"))
    wallet.create_hotkey()
    operator = Ledger(path)
    operator.register(wallet.address(), soon())
    operator.close()
    publisher = ContributionPublisher(
        str(path), "miner", "hot", wallet.path, AuditRules(probability=0.0, beacon_lag=lag)
    )
    strategy = HivemindStrategy(
        target_batch_size=8, initial_peers="", run_id="paid", matchmaking_time=0.5, averaging_timeout=2.0
    )
    make_trainer(publisher, strategy=strategy, epochs=1).fit(small_model(), small_data())
    assert ("raise rules.beacon_lag" in caplog.text) == is_warned


def test_the_counts_reach_the_loggers(subnet) -> None:
    logged = []

    class Sink(CSVLogger):
        def log_metrics(self, metrics, step=None):
            logged.append({name: value for name, value in metrics.items() if name.startswith("chain/")})

    sink = Sink(str(subnet.wallet.directory))
    make_trainer(Blocks(subnet), publisher_of(subnet), logger=sink).fit(small_model(), small_data())
    totals = [entry["chain/samples_committed"] for entry in logged if entry]
    assert totals[:3] == [8, 16, 24]
    assert logged[-1]["chain/reveals_published"] == 3


def test_a_microbatch_without_a_finite_gradient_is_left_out_of_record_and_pay(subnet) -> None:
    class Poisoned(CausalLM):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if batch_idx == 1 else loss

    torch.manual_seed(0)
    config = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 16}
    publisher, witness = publisher_of(subnet), Witness()
    make_trainer(Blocks(subnet), publisher, witness, epochs=2).fit(
        Poisoned(config=config, vocab_size=4096), small_data()
    )
    subkey = hotkey_subkey(subnet.wallet.address())
    first = open_contribution(witness.records[0][subkey][0])
    assert (first.samples, first.span) == (8, 12)
    offsets = [revealed.leaf.offset for revealed in open_reveal(witness.reveals[0][subkey][0]).leaves]
    assert offsets == [0, 8]
    assert publisher.counts.samples_committed == 16


# What is refused


@pytest.mark.parametrize(
    ("model", "data", "arguments", "message"),
    [
        ({"dropout": 0.1}, {}, {}, r"dropout to 0 \(lm\..*drop.* = 0\.1 and \d+ more\)"),
        ({}, {"slot": 3}, {}, "data.slot is 3, but the hotkey's uid is 1"),
        ({}, {"n_slots": 1}, {}, "uid 1 has no data: there are 1 slots"),
        ({}, {}, {"precision": "64-true"}, "no tolerance for precision '64-true'"),
        ({}, {}, {"strategy": "auto"}, "needs a strategy that trains in a swarm, got SingleDeviceStrategy"),
        (
            {},
            {},
            {"strategy": HivemindStrategy(initial_peers="", overlap=True)},
            "set overlap to false",
        ),
        (
            {},
            {},
            {"strategy": HivemindStrategy(initial_peers="", batch_size=5)},
            "batch_size is 5, but a microbatch has 4",
        ),
    ],
)
def test_what_cannot_be_audited_is_refused_before_the_network(subnet, model, data, arguments, message) -> None:
    trainer = make_trainer(publisher_of(subnet), **arguments)
    with pytest.raises(UserError, match=message):
        trainer.fit(small_model(**model), small_data(**data))
    assert not any(thread.name == "beacon-clock" for thread in threading.enumerate())


def test_data_without_public_addresses_are_refused(subnet) -> None:
    with pytest.raises(UserError, match="such as RefinedWebDataModule; got CountingData"):
        make_trainer(publisher_of(subnet)).fit(small_model(), CountingData())


@pytest.mark.parametrize(
    "module",
    [
        torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.25)),
        torch.nn.LSTM(2, 2, num_layers=2, dropout=0.25),
        torch.nn.TransformerEncoderLayer(4, 2, dropout=0.25),
    ],
)
def test_dropout_is_found_wherever_it_hides(module) -> None:
    with pytest.raises(UserError, match=r"= 0\.25"):
        check_dropout(module)
    for part in module.modules():
        for name in {"p", "dropout"} & vars(part).keys():
            setattr(part, name, 0.0)
    check_dropout(module)


def test_an_unregistered_hotkey_is_told_how_to_register(subnet) -> None:
    stranger = Wallet("stranger", "hot", subnet.wallet.path)
    stranger.create_hotkey()
    publisher = ContributionPublisher(subnet.path, "stranger", "hot", subnet.wallet.path)
    with pytest.raises(UserError, match=f"not registered.*hivetrain chain register --chain {subnet.path} --wallet str"):
        make_trainer(publisher).fit(small_model(), small_data())


def test_a_chain_that_does_not_answer_at_the_start_is_an_error_in_time(subnet) -> None:
    publisher = publisher_of(subnet, chain="http://127.0.0.1:1", chain_timeout_s=2.0)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"contribute\.chain: unreachable"):
        make_trainer(publisher).fit(small_model(), small_data())
    assert time.monotonic() - started < 10


# Keys


def test_no_key_reaches_a_checkpoint_a_log_or_a_repr(subnet, caplog) -> None:
    key = subnet.wallet.load().keypair
    publisher = publisher_of(subnet)
    path = subnet.wallet.directory / "last.ckpt"

    class Save(Callback):
        def on_train_end(self, trainer, pl_module):
            trainer.save_checkpoint(path)
            self.shown = repr(vars(publisher)) + repr(publisher.state_dict()) + repr(vars(publisher._work))

    save = Save()
    with caplog.at_level(logging.DEBUG, logger="hivetrain"):
        make_trainer(Blocks(subnet), publisher, save, epochs=1).fit(small_model(), small_data())
    secret = subnet.wallet.hotkey_file.read_text()
    words = json.loads(secret)
    assert key.ss58_address in caplog.text
    for name in ("secretPhrase", "secretSeed", "privateKey"):
        hidden = words[name].removeprefix("0x")
        assert len(hidden) > 20
        assert hidden not in caplog.text
        assert hidden not in save.shown
        assert hidden.encode() not in path.read_bytes()
        if name != "secretPhrase":
            assert bytes.fromhex(hidden) not in path.read_bytes()


# The chain goes away


@contextmanager
def serving(path):
    """``hivetrain ledger --serve`` in a process of its own; yields the process and its URL."""
    program = [sys.executable, "-m", "hivetrain.cli", "ledger", "--serve", str(path), "--port", "0"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process, re.search(r"http://[\d.:]+", process.stdout.readline())[0]
        finally:
            process.kill()


class Outage(Callback):
    """Stops the chain's server at swarm epoch 2 and lets it go on at swarm epoch 4."""

    def __init__(self, process, publisher) -> None:
        self.process, self.publisher = process, publisher

    def on_train_batch_start(self, trainer, *_) -> None:
        clock, epoch = self.publisher._clock, trainer.strategy.swarm_epoch
        if epoch == 2 and clock.block is not None:
            self.process.send_signal(signal.SIGSTOP)
            wait_until(lambda: clock.block is None, "the outage is noticed")
        if epoch == 4 and clock.block is None:
            self.process.send_signal(signal.SIGCONT)
            wait_until(lambda: clock.block is not None, "the chain is back")


def test_training_goes_on_unpaid_while_the_chain_is_away_and_is_paid_again_after(tmp_path) -> None:
    path = tmp_path / "ledger.db"
    Ledger.create(path, Rules(block_time_s=1.0))
    wallet = Wallet("miner", "hot", str(tmp_path / "wallets"))
    wallet.create_hotkey()
    with LocalChain(path, wallet) as chain:
        chain.register(T)
    subnet = SimpleNamespace(wallet=wallet, path=str(path))
    with serving(path) as (process, url):
        publisher = publisher_of(subnet, chain=url)
        trainer = make_trainer(Outage(process, publisher), publisher, epochs=6)
        trainer.fit(small_model(), small_data())
    committed = [bool(report.members[0].commitment) for report in trainer.strategy.rounds]
    assert committed == [True, True, False, False, True, True]
    counts = publisher.counts
    assert (counts.contributions_published, counts.commits_late, counts.commits_unpaid) == (4, 2, 2)
    assert counts.chain_outages == 1
    assert counts.samples_committed == 32
    assert counts.audits_drawn == counts.reveals_published == 4


# The beacon clock


def sample_log(microbatches: int = 3) -> WorkLog:
    log = WorkLog()
    for number in range(microbatches):
        log.add(Position(0, 0, 0, 4 * number), 4 * number, 4, 2.0, torch.full((256,), 1.0 + number))
    return log


def sample_record(subnet, block: int, log: WorkLog | None = None):
    return (log or sample_log()).contribution(
        run_id="paid", hotkey=subnet.wallet.address(), peer_id="peer", swarm_epoch=5, params_digest="0" * 64,
        rules=ALWAYS, block=block, precision="32-true",
    )  # fmt: skip


@pytest.fixture
def clock(subnet):
    clock = BeaconClock(LocalChain(subnet.path, subnet.wallet), ALWAYS, 0.0, WorkCounts())
    clock.counts = clock._counts
    clock.start(subnet.advance(1))
    yield clock
    clock.stop()


def test_leaves_are_asked_for_when_the_beacon_exists_and_not_before(subnet, clock) -> None:
    asked, record = [], sample_record(subnet, clock.block)
    clock.expect(record, lambda drawn: asked.append(drawn) or True)
    block = subnet.advance(ALWAYS.beacon_lag - 1)
    wait_until(lambda: clock.block == block, "the block before the beacon is seen")
    assert not asked
    beacon = subnet.advance(1)
    wait_until(lambda: clock.is_settled, "the beacon is seen")
    known = subnet.operator.block_hash(beacon, soon())
    assert asked == [draw(known, "paid", 5, record.hotkey, 3, ALWAYS)]
    assert clock.counts.audits_drawn == clock.counts.reveals_published == 1


def test_a_reveal_that_the_dht_does_not_take_is_tried_again_until_it_is_too_late(subnet, clock) -> None:
    tries = []
    clock.expect(sample_record(subnet, clock.block), lambda drawn: bool(tries.append(drawn)))
    subnet.advance(ALWAYS.beacon_lag)
    wait_until(lambda: len(tries) >= 2, "two tries")
    assert not clock.is_settled
    subnet.advance(ALWAYS.reveal_blocks + 1)
    wait_until(lambda: clock.is_settled, "it is given up")
    assert (clock.counts.audits_drawn, clock.counts.reveals_published, clock.counts.reveals_missed) == (1, 0, 1)


def test_a_chain_that_answers_nonsense_for_a_hash_ends_no_clock(subnet) -> None:
    class Nonsense(LocalChain):
        def block_hash(self, block, timeout_s):
            return "0xnonsense"

    counts = WorkCounts()
    clock = BeaconClock(Nonsense(subnet.path, subnet.wallet), ALWAYS, 0.0, counts)
    clock.start(subnet.advance(1))
    clock.expect(sample_record(subnet, clock.block), lambda drawn: True)
    subnet.advance(ALWAYS.beacon_lag + ALWAYS.reveal_blocks + 1)
    wait_until(lambda: clock.is_settled, "it is given up")
    block = subnet.advance(1)
    wait_until(lambda: clock.block == block, "the clock goes on")
    clock.stop()
    assert (counts.audits_drawn, counts.reveals_missed) == (0, 1)


def test_a_clock_that_waits_for_a_block_or_for_a_dead_server_stops_within_two_seconds(tmp_path) -> None:
    path = tmp_path / "slow.db"
    Ledger.create(path, Rules(block_time_s=1000.0))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        for chain in (LocalChain(path, Hotkey.throwaway()), RemoteChain(url, Hotkey.throwaway())):
            clock = BeaconClock(chain, ALWAYS, 1000.0, WorkCounts())
            clock.start(1)
            clock.wait_settled(0.3, lambda: False)
            started = time.monotonic()
            clock.stop()
            assert time.monotonic() - started < 2
            assert not clock._thread.is_alive()


def test_an_interrupted_fit_leaves_no_thread_and_waits_for_no_beacon(subnet) -> None:
    class Interrupt(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.strategy.swarm_epoch == 1:
                self.at = time.monotonic()
                raise RuntimeError("somebody stumbled")

        def on_exception(self, *_):
            self.took_s = time.monotonic() - self.at

    interrupt, publisher = Interrupt(), publisher_of(subnet)
    trainer = make_trainer(publisher, interrupt)
    with pytest.raises(RuntimeError, match="stumbled"):
        trainer.fit(small_model(), small_data())
    assert interrupt.took_s < 2
    assert not publisher._clock._thread.is_alive()
    assert not trainer.strategy.watchers


# A round that is tried again


class Dht:
    """Takes the place of a strategy: keeps what is published."""

    run_id, peer_id, swarm_epoch, held_digest = "paid", "peer", 5, "0" * 64

    def __init__(self) -> None:
        self.stored, self.takes = [], True

    def publish(self, key, subkey, value, expires, timeout_s) -> bool:
        if self.takes:
            self.stored.append((key, subkey, value, expires))
        return self.takes


@pytest.fixture
def work(subnet, clock):
    dht = Dht()
    work = AuditedWork(dht, None, subnet.wallet.load(), ALWAYS, "32-true", clock, clock.counts, 1.0, 60.0)
    work.log, work._at = sample_log(), (5, dht.held_digest)
    return work


def test_each_attempt_in_a_new_block_has_a_new_record(subnet, clock, work) -> None:
    first = work.on_commit(5, "0" * 64, 12)
    assert work.on_commit(5, "0" * 64, 12) == first
    assert len(work.strategy.stored) == 1
    block = subnet.advance(1)
    wait_until(lambda: clock.block == block, "the block")
    second = work.on_commit(5, "0" * 64, 12)
    work.log.add(Position(0, 0, 0, 12), 12, 4, 2.0, torch.ones(256))
    third = work.on_commit(5, "0" * 64, 16)
    records = [entry for entry in work.strategy.stored if entry[0] == work_key("paid", 5)]
    assert [commitment(value) for _, _, value, _ in records] == [first, second, third]
    assert open_contribution(records[1][2]).block == block
    expirations = [expires for *_, expires in records]
    assert expirations == sorted(set(expirations))


def test_a_committed_record_is_revealed_as_it_was_though_the_work_went_on(subnet, clock, work) -> None:
    bound = work.on_commit(5, "0" * 64, 12)
    record = open_contribution(work.strategy.stored[0][2])
    work.on_dropped()
    assert (work.log.samples, clock.counts.contributions_dropped) == (0, 1)
    subnet.advance(ALWAYS.beacon_lag)
    wait_until(lambda: clock.is_settled, "the reveal")
    key, _, sealed, _ = work.strategy.stored[1]
    assert key == reveal_key("paid", 5)
    reveal = open_reveal(sealed)
    assert reveal.commitment == bound
    for found in reveal.leaves:
        assert merkle.verify(record.root, 3, found.index, found.leaf.hash, found.path)


def test_what_cannot_be_committed_to_goes_on_unpaid_and_is_counted(subnet, clock, work) -> None:
    assert work.on_commit(5, "0" * 64, 20) == b""  # other samples than were recorded, as after a resume
    assert work.on_commit(6, "0" * 64, 12) == b""
    work.strategy.takes = False
    assert work.on_commit(5, "0" * 64, 12) == b""
    assert (clock.counts.commits_unpaid, clock.counts.publish_failures) == (3, 1)
    work.on_update(RoundReport(5, Outcome.ALONE, samples=12, local_samples=12))
    assert clock.counts.samples_committed == clock.counts.contributions_published == 0
    assert clock.is_settled


# The command line


@pytest.mark.parametrize(
    ("chosen", "kind"),
    [
        ([], None),
        (["--contribute.class_path=hivetrain.demo.cheats.CheatingPublisher", "--contribute.kind=lazy"], "lazy"),
    ],
)
def test_a_publisher_is_chosen_on_the_command_line(chosen, kind, monkeypatch) -> None:
    monkeypatch.setattr(HiveCLI, "_run_subcommand", lambda self, subcommand: None)
    config = Path(__file__).parent.parent / "hivetrain" / "demo" / "miner.yaml"
    options = ["--contribute.chain=ledger.db", "--contribute.wallet=me", "--contribute.rules.probability=0.5"]
    cli = HiveCLI("fit", ["-c", str(config), *chosen, *options])
    (publisher,) = [found for found in cli.trainer.callbacks if isinstance(found, ContributionPublisher)]
    assert getattr(publisher, "kind", None) == kind
    assert (publisher.chain, publisher.wallet.name, publisher.rules.probability) == ("ledger.db", "me", 0.5)
