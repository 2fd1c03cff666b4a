import copy
import itertools
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from hivetrain.averaging.codecs import CODECS
from hivetrain.contribution import merkle
from hivetrain.contribution.audit import SUM_TOLERANCES, TOLERANCES, Verdict, audit, check_sum, relative_error
from hivetrain.contribution.leaves import WorkLog
from hivetrain.contribution.record import Position
from hivetrain.contribution.replay import REPLAYED_IN, PrecisionError, Replayer
from hivetrain.contribution.rules import AuditRules
from hivetrain.contribution.sketch import SKETCH_SIZE, Sketcher, sketch_bytes, sketch_seed
from hivetrain.data import RefinedWebDataModule, SlotReader
from hivetrain.data.errors import DataError, UnitError
from hivetrain.keys import Hotkey
from hivetrain.model import CausalLM

RUN, DIGEST, SLOT, BATCH_SIZE = "run", "ab" * 32, 1, 8
SEED = sketch_seed(RUN, 0, DIGEST)
HOTKEY = Hotkey.from_seed(b"m" * 32).address
HEAD = {"run_id": RUN, "hotkey": HOTKEY, "swarm_epoch": 0}


class Miner:
    """Computes microbatches of a slot as training does, and may lie about them."""

    def __init__(self, model, precision="32-true", lie=None, slot=SLOT):
        self.data = data_module()
        self.reader = SlotReader.of(self.data)
        self.params = optimizer_params(model)
        self.replayer = Replayer(model, self.params, self.reader)
        self.sketcher = Sketcher(SEED, [param.numel() for param in self.params])
        self.precision, self.lie, self.slot, self.log = precision, lie, slot, WorkLog()

    def gradient(self, batch):
        loss, gradients = self.replayer.gradients(batch, self.precision)
        return loss, self.sketcher.sketch(gradients)

    def mine(self, microbatches=3, begin=(0, 0, 0, 0), skip=(), slot=None):
        """The record of so many microbatches; those in ``skip`` are left out of it."""
        self.log.reset()
        for number in range(microbatches):
            offset = BATCH_SIZE * number
            if number not in skip:
                batch, place = self.reader.batch(self.slot if slot is None else slot, begin, offset, BATCH_SIZE)
                loss, sketch = (self.lie or Miner.gradient)(self, batch)
                at = Position(*self.reader.position_at(self.slot, begin, offset))
                self.log.add(at, offset, BATCH_SIZE, loss, sketch)
        return self.record()

    def record(self):
        facts = {"peer_id": "12D3Koo", "params_digest": DIGEST, "rules": AuditRules(), "block": 7}
        return self.log.contribution(**HEAD, **facts, precision=self.precision)

    def reveal(self, *indices):
        return self.log.reveal(b"c" * 32, indices, **HEAD)


def data_module(**options):
    return RefinedWebDataModule(**{"block_size": 32, "batch_size": BATCH_SIZE, "slot": SLOT, "n_slots": 20, **options})


def small_model():
    torch.manual_seed(0)
    config = {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 32}
    return CausalLM(config=config, vocab_size=4096, learning_rate=1e-3, warmup_epochs=1)


def optimizer_params(model):
    return [param for group in model.configure_optimizers()["optimizer"].param_groups for param in group["params"]]


def update(model, batch):
    """One step of training."""
    optimizer = model.configure_optimizers()["optimizer"]
    model.loss(batch).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.fixture(scope="module")
def model():
    model = small_model()
    for batch in itertools.islice(data_module(slot=9).train_dataloader(), 5):
        update(model, batch)
    return model


def judge(miner, contribution, *indices, model, **options):
    replayer = Replayer(model, miner.params, miner.reader, **options)
    return audit(contribution, miner.reveal(*indices), indices, SEED, SLOT, replayer)


@pytest.mark.parametrize("isolate_documents", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_replay_is_bit_by_bit_the_gradient_of_a_training_step(precision, isolate_documents):
    model = small_model()
    data = data_module(isolate_documents=isolate_documents)
    trained_on, found = [], []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            trained_on.append({name: param.detach().clone() for name, param in module.named_parameters()})

        def on_after_backward(self, trainer, module):
            params = [param for group in trainer.optimizers[0].param_groups for param in group["params"]]
            found.append([param.grad.clone() for param in params])

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            found.append(outputs["loss"].item())

    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    Trainer(accelerator="cpu", precision=precision, max_steps=2, callbacks=Watch(), **quiet).fit(model, data)
    (_, state), (gradients, loss) = trained_on, found[2:]
    reader = SlotReader.of(data)
    replayer = Replayer(model, optimizer_params(model), reader)
    replayer.load(state)
    replayed_loss, replayed = replayer.gradients(reader.batch(SLOT, (0, 0, 0, 0), BATCH_SIZE, BATCH_SIZE)[0], precision)
    assert replayed_loss == loss
    assert all(map(torch.equal, replayed, gradients))


def test_a_replay_disturbs_neither_the_model_nor_its_gradients_nor_the_random_state(model):
    model = copy.deepcopy(model)
    state = copy.deepcopy(model.state_dict())
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    miner = Miner(model)
    random_state = torch.get_rng_state()
    with torch.no_grad():
        miner.mine()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(bool((param.grad == 1).all()) for param in model.parameters())


def test_a_replay_of_a_few_sequences_at_a_time_gives_the_same_gradient(model):
    miner = Miner(model)
    assert judge(miner, miner.mine(), 0, 2, model=model, rows=3).leaves[1].sketch_error < 1e-5


class SmallMemory(CausalLM):
    """Stands for a GPU in which so many sequences fit."""

    fits = 8

    def training_step(self, batch, batch_idx):
        if len(batch["input_ids"]) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().training_step(batch, batch_idx)


def test_a_replay_that_does_not_fit_into_memory_is_made_in_smaller_pieces(model, caplog):
    miner = Miner(model)
    contribution, small = miner.mine(2), copy.deepcopy(model)
    small.__class__, small.fits = SmallMemory, 2
    miner.params = optimizer_params(small)
    replayer = Replayer(small, miner.params, miner.reader, rows=16)
    for _ in range(2):
        found = audit(contribution, miner.reveal(0), (0,), SEED, SLOT, replayer)
        assert found.verdict is Verdict.PASSED, found.reason
    assert [record.args for record in caplog.records] == [(8, 4), (4, 2)]  # the second replay begins with what fits
    small.fits = 0
    for rows in (16, None):  # not in pieces: the loss may be no mean over sequences
        with pytest.raises(torch.OutOfMemoryError):
            judge(miner, contribution, 0, model=small, rows=rows)


def test_params_are_loaded_by_name_and_all_of_them(model):
    state = {name: param.detach() + 1 for name, param in model.named_parameters()}
    replayer = Miner(model).replayer
    name = next(iter(state))
    with pytest.raises(ValueError, match="missing"):
        replayer.load({key: value for key, value in state.items() if key != name})
    with pytest.raises(ValueError, match="none of the model's tensors"):
        replayer.load({**state, "other": torch.zeros(1)})
    with pytest.raises(ValueError, match="none of the model's tensors"):
        replayer.load({**state, name: torch.zeros(1)})
    batch, _ = replayer.reader.batch(SLOT, (0, 0, 0, 0), 0, 2)
    before, _ = replayer.gradients(batch, "32-true")
    replayer.load(state)
    other = copy.deepcopy(model)
    other.load_state_dict(state, strict=False)
    assert replayer.gradients(batch, "32-true")[0] == pytest.approx(other.loss(batch).item()) != pytest.approx(before)


def test_only_precisions_that_are_measured_can_replay(model):
    assert TOLERANCES.keys() == REPLAYED_IN.keys()
    replayer = Replayer(model, [], None)
    assert [replayer.precision_for(miner) for miner in TOLERANCES] == ["32-true", "32-true", "bf16-mixed"]
    with pytest.raises(PrecisionError, match="16-true"):
        replayer.precision_for("16-true")
    with pytest.raises(PrecisionError, match="bf16-mixed"):
        Replayer(model, [], None, precision="16-true")


@pytest.mark.parametrize("replay", [None, "32-true", "bf16-mixed"])
@pytest.mark.parametrize("miner", ["32-true", "bf16-mixed"])
def test_honest_work_passes_in_every_pair_of_precisions(model, miner, replay):
    miner = Miner(model, miner)
    found = judge(miner, miner.mine(), 0, 2, model=model, precision=replay)
    assert found.verdict is Verdict.PASSED, found.reason
    assert [leaf.index for leaf in found.leaves] == [0, 2]
    assert found.leaves[1].place == miner.reader.position_at(SLOT, (0, 0, 0, 0), 2 * BATCH_SIZE)


def test_only_a_replay_in_the_miner_s_own_precision_may_accuse(model, monkeypatch):
    miner = Miner(model, "32-true")
    contribution = miner.mine(2)
    asked = []
    gradients = Replayer.gradients

    def far_off_in_bf16(self, batch, precision):
        asked.append(precision)
        loss, found = gradients(self, batch, precision)
        return loss, [1.1 * gradient if precision == "bf16-mixed" else gradient for gradient in found]

    monkeypatch.setattr(Replayer, "gradients", far_off_in_bf16)
    found = judge(miner, contribution, 1, model=model, precision="bf16-mixed")
    assert found.verdict is Verdict.PASSED
    assert found.leaves[0].precision == "32-true"
    assert asked == ["bf16-mixed", "32-true"]
    contribution = replace(contribution, precision="bf16-mixed")
    assert judge(miner, contribution, 1, model=model, precision="bf16-mixed").verdict is Verdict.FAILED


def test_honest_work_with_microbatches_left_out_passes_wherever_it_begins(model):
    miner = Miner(model)
    length = next(block for block in itertools.count(1) if miner.reader.position_at(SLOT, (0, 0, 0, 0), block)[3] == 0)
    contribution = miner.mine(6, begin=(0, 0, 0, length - 12), skip=(0, 2, 3))
    assert contribution.span == 5 * BATCH_SIZE
    assert contribution.first.window == 0
    assert contribution.last.window == 1
    found = judge(miner, contribution, 0, 1, 2, model=model)
    assert found.verdict is Verdict.PASSED, found.reason
    assert [leaf.offset for leaf in found.leaves] == [0, 3 * BATCH_SIZE, 4 * BATCH_SIZE]


def rows(batch, *numbers):
    return {"input_ids": batch["input_ids"][list(numbers)]}


def one_swapped(miner, batch):
    other, _ = miner.reader.batch(SLOT + 1, (0, 0, 0, 0), 0, 1)
    return miner.gradient({"input_ids": torch.cat([batch["input_ids"][:-1], other["input_ids"]])})


def stale(miner, batch):
    other = Miner(small_model())
    return other.gradient(batch)


def changed(change):
    def lie(miner, batch):
        loss, sketch = miner.gradient(batch)
        return change(loss, sketch)

    return lie


LIES = {
    "a random sketch": changed(lambda loss, s: (loss, torch.randn(SKETCH_SIZE) * s.norm() / SKETCH_SIZE**0.5)),
    "no sketch": changed(lambda loss, sketch: (loss, torch.zeros(SKETCH_SIZE))),
    "a sequence repeated instead of eight": lambda miner, batch: miner.gradient(rows(batch, 0)),
    "half of the sequences": lambda miner, batch: miner.gradient(rows(batch, 0, 1, 2, 3)),
    "seven of eight sequences": lambda miner, batch: miner.gradient(rows(batch, 0, 1, 2, 3, 4, 5, 6)),
    "one of eight sequences swapped": one_swapped,
    "old params": stale,
    "a gradient 100 times as long": changed(lambda loss, sketch: (loss, 100 * sketch)),
    "the opposite gradient": changed(lambda loss, sketch: (loss, -sketch)),
    "a prettier loss": changed(lambda loss, sketch: (0.9 * loss, sketch)),
}


@pytest.mark.parametrize("replay", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_dishonest_work_fails(model, lie, precision, replay):
    torch.manual_seed(1)
    miner = Miner(model, precision, lie)
    found = judge(miner, miner.mine(2), 1, model=model, precision=replay)
    assert found.verdict is Verdict.FAILED
    assert "Leaf 1 is not the gradient of its data" in found.reason
    assert not found.leaves[0].passed


def test_work_on_the_data_of_another_slot_fails(model):
    miner = Miner(model)
    found = judge(miner, miner.mine(2, slot=SLOT + 1), 0, model=model)
    assert found.verdict is Verdict.FAILED
    assert found.leaves[0].sketch_error > 0.1


def test_one_dishonest_leaf_among_honest_ones_is_enough(model):
    lies = iter((Miner.gradient, LIES["half of the sequences"]))
    miner = Miner(model, lie=lambda miner, batch: next(lies)(miner, batch))
    contribution = miner.mine(2)
    found = judge(miner, contribution, 0, 1, model=model)
    assert found.verdict is Verdict.FAILED
    assert [leaf.passed for leaf in found.leaves] == [True, False]


def test_a_missing_or_wrong_reveal_counts_against_the_miner(model):
    miner = Miner(model)
    contribution = miner.mine(4)
    replayer = miner.replayer

    def verdict(reveal, *drawn):
        found = audit(contribution, reveal, drawn, SEED, SLOT, replayer)
        assert not found.leaves
        return found.verdict, found.reason

    assert verdict(None)[0] is Verdict.NOT_DRAWN
    assert verdict(miner.reveal(1, 2))[0] is Verdict.NOT_DRAWN
    assert verdict(None, 1, 2) == (Verdict.MISSING, "Leaves 1, 2 drawn, and no reveal in time.")
    assert verdict(miner.reveal(1, 3), 1, 2) == (Verdict.FAILED, "Leaves 1, 2 drawn, leaves 1, 3 revealed.")
    assert verdict(miner.reveal(1), 1, 2)[0] is Verdict.FAILED
    assert verdict(miner.reveal(1, 2, 3), 1, 2)[0] is Verdict.FAILED
    honest = miner.reveal(1, 2)
    assert verdict(replace(honest, swarm_epoch=1), 1, 2) == (
        Verdict.FAILED,
        "The reveal is of another contribution.",
    )
    swapped = replace(honest.leaves[0], leaf=honest.leaves[1].leaf)
    expected = (Verdict.FAILED, "Leaf 1 is not the one it committed to.")
    assert verdict(replace(honest, leaves=(swapped, honest.leaves[1])), 1, 2) == expected
    cut = replace(honest.leaves[0], path=honest.leaves[0].path[:1])
    assert verdict(replace(honest, leaves=(cut, honest.leaves[1])), 1, 2) == expected


def test_a_total_that_is_not_the_sum_of_its_leaves_fails_where_all_are_shown(model):
    miner = Miner(model)
    honest = miner.mine(3)
    for factor, verdict in ((100, Verdict.FAILED), (-1, Verdict.FAILED), (1.001, Verdict.FAILED), (1, Verdict.PASSED)):
        forged = replace(honest, total=sketch_bytes(factor * miner.log.total))
        found = judge(miner, forged, 0, 1, 2, model=model)
        assert found.verdict is verdict, found.reason
        assert ("total is not the sum of its leaves" in found.reason) == (not found.leaves) == (factor != 1)
    assert judge(miner, replace(honest, total=sketch_bytes(100 * miner.log.total)), 0, 1, model=model).leaves


@pytest.mark.parametrize("scale", [1e36, 1.0, 1e-20, 1e-39, 0.0])
def test_no_total_that_is_summed_in_fp32_counts_against_a_miner(model, scale):
    """Not even where leaves cancel out or fp32 runs out of digits, in whatever order they are summed."""
    miner = Miner(model)
    torch.manual_seed(0)
    sketches = [(scale * torch.randn(SKETCH_SIZE, dtype=torch.float64)).float() for _ in range(3)]
    for sketch in (*sketches, *(-sketch for sketch in sketches), torch.full((SKETCH_SIZE,), scale / 1e7)):
        offset = BATCH_SIZE * miner.log.microbatches
        miner.log.add(Position(0, 0, 0, offset), offset, BATCH_SIZE, 1.0, sketch)
    weighted = torch.stack([BATCH_SIZE * leaf.vector for leaf in miner.log.leaves])
    flushed = torch.where(weighted.sum(0).abs() < torch.finfo(torch.float32).tiny, 0.0, weighted.sum(0))
    for total in (miner.log.total, weighted.flip(0).sum(0), flushed):
        record = replace(miner.record(), total=sketch_bytes(total), last=Position(0, 0, 0, 49))
        found = judge(miner, record, *range(miner.log.microbatches), model=model)
        assert "Its last microbatch begins at" in found.reason  # what is looked at next


@pytest.mark.parametrize("offsets", [(0, 0, 24), (0, 7, 24), (0, 24, 24), (0, 8, 32), (1, 8, 24)])
def test_a_block_cannot_count_twice(model, offsets):
    miner = Miner(model)
    honest = miner.mine(4, skip=(2,))
    assert [leaf.offset for leaf in miner.log.leaves] == [0, 8, 24]
    miner.log._leaves = [replace(leaf, offset=at) for leaf, at in zip(miner.log.leaves, offsets, strict=True)]
    contribution = replace(honest, root=merkle.root([leaf.hash for leaf in miner.log.leaves]))
    found = judge(miner, contribution, 0, 1, 2, model=model)
    assert found.verdict is Verdict.FAILED
    assert "cannot begin" in found.reason
    assert not found.leaves


def test_blocks_must_be_where_the_slot_s_stream_has_them(model):
    miner = Miner(model)
    contribution = miner.mine(3)
    length = next(block for block in itertools.count(1) if miner.reader.position_at(SLOT, (0, 0, 0, 0), block)[3] == 0)

    def reason(**changes):
        found = judge(miner, replace(contribution, **changes), 1, model=model)
        assert found.verdict is Verdict.FAILED
        return found.reason

    assert "begins at (0, 0, 0, 16)" in reason(last=Position(0, 0, 0, 17))
    assert "begins at (0, 0, 0, 17)" in reason(first=Position(0, 0, 0, 1))
    assert "data that do not exist" in reason(first=Position(0, 10**6, 0, 0), last=Position(0, 10**6, 0, 16))
    assert "data that do not exist" in reason(first=Position(0, 0, 0, length), last=Position(0, 1, 0, 16))
    assert "data that do not exist" in reason(first=Position(2**52, 0, 0, 0), last=Position(2**52, 0, 0, 16))


def test_what_is_not_the_miner_s_fault_is_no_failure(model, monkeypatch):
    miner = Miner(model)
    contribution, reveal = miner.mine(2), miner.reveal(1)
    with pytest.raises(ValueError, match="of another run"):
        audit(contribution, reveal, (1,), sketch_seed(RUN, 0, "cd" * 32), SLOT, miner.replayer)
    with pytest.raises(DataError, match="slot 5000"):
        audit(contribution, reveal, (1,), SEED, 5000, miner.replayer)

    def unreadable(unit):
        raise UnitError("gone", unit=unit, file="a.parquet", row_group=0)

    reader = SlotReader.of(miner.data)
    monkeypatch.setattr(miner.data.corpus, "read_unit", unreadable)
    with pytest.raises(UnitError):
        audit(contribution, reveal, (1,), SEED, SLOT, Replayer(model, miner.params, reader))


def test_a_validator_whose_own_replay_is_not_finite_does_not_judge(model):
    miner = Miner(model)
    contribution = miner.mine(2)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        next(broken.parameters()).fill_(float("inf"))
    replayer = Replayer(broken, optimizer_params(broken), miner.reader)
    found = audit(contribution, miner.reveal(1), (1,), SEED, SLOT, replayer)
    assert found.verdict is Verdict.UNJUDGED


def test_a_precision_without_a_tolerance_is_not_accepted(model):
    miner = Miner(model)
    contribution = replace(miner.mine(2), precision="8-true")
    assert judge(miner, contribution, 1, model=model).verdict is Verdict.INVALID


def test_errors_are_relative_to_the_replay_and_never_nan():
    zero, one, nan = torch.zeros(4), torch.ones(4), torch.full((4,), float("nan"))
    assert relative_error(1.5 * one, one) == pytest.approx(0.5)
    assert relative_error(zero, zero) == 0
    assert relative_error(one, zero) == float("inf")
    assert relative_error(zero, one) == 1
    assert relative_error(nan, one) == relative_error(one, nan) == float("inf")
    assert relative_error(torch.full((4,), 3e38), one) > 1e38


@pytest.mark.parametrize("compression", SUM_TOLERANCES)
def test_the_members_totals_add_up_to_the_averaged_gradient_unless_one_sends_something_else(model, compression):
    codec = CODECS[compression]
    miners = [Miner(model, slot=slot) for slot in (1, 2, 3)]
    weights = (16.0, 40.0, 8.0)
    gradients, members = [], []
    for miner, weight, count in zip(miners, weights, (2, 5, 4), strict=True):
        members.append((weight, miner.mine(count)))
        batches = [miner.reader.batch(miner.slot, (0, 0, 0, 0), 8 * i, 8)[0] for i in range(count)]
        flats = [
            torch.cat([g.flatten() for g in miner.replayer.gradients(batch, miner.precision)[1]]) for batch in batches
        ]
        gradients.append(torch.stack(flats).mean(0))

    def error(gradients):
        def sent(vector):
            return codec.decode(codec.encode(vector), vector.numel())

        parts = [weight * sent(gradient) for weight, gradient in zip(weights, gradients, strict=True)]
        average = sent(torch.stack(parts).sum(0) / sum(weights))
        return check_sum(miners[0].sketcher.sketch_flat(average), members)

    assert error(gradients) <= SUM_TOLERANCES[compression] / 2
    assert error([*gradients[:2], -gradients[2]]) > 2 * SUM_TOLERANCES[compression]
    forged = replace(members[2][1], total=sketch_bytes(torch.randn(SKETCH_SIZE)))
    members[2] = (8.0, forged)
    assert error(gradients) > SUM_TOLERANCES[compression]


def honest_errors(precision, audits):
    """Verdicts and errors of honest audits while a model learns; miner and auditor with 1 or 2 threads each."""
    model = small_model()
    batches = iter(data_module(slot=9).train_dataloader())
    replayers = {}
    found = []
    miner = Miner(model, precision)
    for replay in (None, "32-true", "bf16-mixed"):
        replayers[replay] = Replayer(model, miner.params, miner.reader, precision=replay)
    ways = itertools.cycle(itertools.product((1, 2), (1, 2), replayers.values()))
    try:
        for number in range(audits):
            miner_threads, auditor_threads, replayer = next(ways)
            state = {name: param.detach() for name, param in model.named_parameters()}
            miner.replayer.load(state)
            replayer.load(state)
            torch.set_num_threads(miner_threads)
            contribution = miner.mine(2, begin=miner.reader.position_at(SLOT, (0, 0, 0, 0), 16 * number))
            torch.set_num_threads(auditor_threads)
            found.append(audit(contribution, miner.reveal(0, 1), (0, 1), SEED, SLOT, replayer))
            if number % 4 == 3:
                update(model, next(batches))
    finally:
        torch.set_num_threads(1)
    return found


def assert_all_pass(precision, audits):
    found = honest_errors(precision, audits)
    assert len(found) == audits
    assert [result.reason for result in found if result.verdict is not Verdict.PASSED] == []
    leaves = [leaf for result in found for leaf in result.leaves]
    assert {leaf.precision for leaf in leaves} == {"32-true", "bf16-mixed"}
    alike = [leaf.sketch_error / leaf.tolerance.sketch for leaf in leaves if leaf.precision == precision]
    assert max(alike) < 0.2


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_forty_honest_audits_accuse_nobody(precision):
    assert_all_pass(precision, 40)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_thousand_honest_audits_accuse_nobody(precision):
    assert_all_pass(precision, 1000)
