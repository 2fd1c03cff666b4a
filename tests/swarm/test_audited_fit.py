"""Two miners in processes of their own, one of them perhaps dishonest, as a validator would see them."""

import time
from types import SimpleNamespace

import pytest
import torch
from audited_miner import EPOCHS, RULES, main, small_data, small_model
from peers import FORKSERVER

from hivetrain.chain.base import Deadline, Rules
from hivetrain.chain.ledger import Ledger
from hivetrain.contribution.audit import Verdict, audit
from hivetrain.contribution.beacon import beacon_block, draw
from hivetrain.contribution.record import commitment, hotkey_subkey, open_contribution, open_reveal
from hivetrain.contribution.replay import Replayer
from hivetrain.contribution.sketch import sketch_seed
from hivetrain.data.reader import SlotReader
from hivetrain.keys import Wallet

OTHERS = ("lazy", "stale", "copied", "over-claim")


def soon() -> Deadline:
    return Deadline(10, time.monotonic)


def run_two(directory, bootstrap, kind, transport):
    """Runs an honest miner and another one; returns what each wrote down, their hotkeys and the ledger."""
    Ledger.create(directory / "ledger.db", Rules(block_time_s=0.5))
    ledger, hotkeys = Ledger(directory / "ledger.db"), {}
    for name in ("honest", "other"):
        hotkeys[name] = Wallet(name, "hot", str(directory / "wallets")).create_hotkey().address
        ledger.register(hotkeys[name], soon())
    run_id = f"audited-{kind}-{transport}"
    processes = [
        FORKSERVER.Process(target=main, args=(str(directory), name, of, bootstrap, run_id, transport))
        for name, of in (("honest", None), ("other", kind))
    ]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(100)
        logs = "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in directory.glob("*.log"))
        assert [process.exitcode for process in processes] == [0, 0], logs
    finally:
        for process in processes:
            process.kill()
            process.join()
    # Written by the test's own miners; an empty commitment is nothing that weights_only could load.
    found = {name: torch.load(directory / f"{name}.pt", weights_only=False) for name in hotkeys}
    assert all(miner["ways"] == {transport} for miner in found.values()), logs
    return SimpleNamespace(ledger=ledger, hotkeys=hotkeys, run_id=run_id, logs=logs, **found)


def judge(result, name):
    """Verdicts on a miner's records by epoch, as the honest miner's view of the DHT allows."""
    view, hotkey = result.honest, result.hotkeys[name]
    subkey, slot, verdicts = hotkey_subkey(hotkey), {"honest": 0, "other": 1}[name], {}
    data, model = small_data(), small_model()
    reader = SlotReader.of(data)
    for epoch, records in view["records"].items():
        if subkey not in records:
            continue
        sealed = records[subkey][0]
        record = open_contribution(sealed)
        model.load_state_dict(view["params"][epoch])
        own = dict(model.named_parameters())
        replayer = Replayer(model, [own[param] for param in view["order"]], reader)
        beacon = result.ledger.block_hash(beacon_block(record, RULES), soon())
        drawn = draw(beacon, result.run_id, epoch, hotkey, record.microbatches, RULES)
        revealed = view["reveals"][epoch].get(subkey)
        reveal = open_reveal(revealed[0]) if revealed else None
        seed = sketch_seed(result.run_id, epoch, view["digests"][epoch])
        verdicts[epoch] = audit(record, reveal, drawn, seed, slot, replayer).verdict
        members = [bound for _, _, bound in view["members"].get(epoch, [])]
        assert commitment(sealed) in members, (name, epoch, result.logs)
    return verdicts


@pytest.mark.timeout(200)
def test_two_honest_miners_commit_before_every_exchange_and_pass_every_audit(tmp_path, bootstrap, transport):
    result = run_two(tmp_path, bootstrap, None, transport)
    for name in ("honest", "other"):
        own = getattr(result, name)
        assert own["uid"] == {"honest": 0, "other": 1}[name]
        assert own["counts"]["chain/reveals_published"] == own["counts"]["chain/audits_drawn"] >= EPOCHS
        assert own["counts"]["chain/commits_unpaid"] == 0
        subkey = hotkey_subkey(result.hotkeys[name])
        offered = 0
        for epoch, members in own["members"].items():
            assert subkey in own["seen"][epoch], result.logs  # before the exchange began
            record = open_contribution(own["records"][epoch][subkey][0])
            assert (record.peer_id, record.samples) in [member[:2] for member in members]
            offered += record.samples
        assert own["counts"]["chain/samples_committed"] == offered
        assert set(judge(result, name).values()) == {Verdict.PASSED}, result.logs
    assert result.honest["members"] == result.other["members"]


@pytest.mark.timeout(200)
@pytest.mark.parametrize("kind", ["free-rider", *(pytest.param(k, marks=pytest.mark.slow) for k in OTHERS)])
def test_a_miner_that_cheats_is_in_every_round_and_is_caught(tmp_path, bootstrap, kind, transport):
    result = run_two(tmp_path, bootstrap, kind, transport)
    assert set(judge(result, "honest").values()) == {Verdict.PASSED}, result.logs
    verdicts = judge(result, "other")
    assert len(verdicts) >= EPOCHS - 1, result.logs
    # Epoch 0 may be honest: nothing is stale yet, and a free rider computes one microbatch.
    later = [verdict for epoch, verdict in verdicts.items() if epoch > 0]
    caught = {"copied": {Verdict.FAILED, Verdict.MISSING}, "over-claim": {Verdict.FAILED, Verdict.PASSED}}
    assert set(later) <= caught.get(kind, {Verdict.FAILED}), (verdicts, result.logs)
    assert later.count(Verdict.PASSED) < len(later)  # a tenth of an over-claimer's leaves are honest
