import pytest
from scenes import Scene
from synthetic import EpochNote, owner, peer_id, progress, round_note, status

from hivetrain.chain.base import Code, LedgerError
from hivetrain.contribution.scoreboard import MinerScore, Scoreboard
from hivetrain.errors import UserError
from hivetrain.monitor.aggregate import epoch_line
from hivetrain.monitor.feed import Feed
from hivetrain.monitor.history import History, Tick


def rows(scene):
    return {row["key"]: row for row in scene.feed.whole()["miners"]}


def parts(scene):
    return scene.feed.whole()["parts"]


def events(scene):
    return [(event.kind, event.peer_id) for event in reversed(scene.history.last_events(100))]


def test_the_picture_is_what_the_peers_and_the_chain_say(scene):
    scene.step()
    swarm, chain = parts(scene)["swarm"], parts(scene)["chain"]
    assert (swarm["epoch"], swarm["peers"], swarm["in_step"]) == (20, 3, 3)
    assert (swarm["target"], swarm["num_params"], swarm["samples"]) == (1024, 124_000_000, 0 + 1 + 2)
    assert swarm["tokens_per_s"] == 3 * 1000 + 0 + 1 + 2
    assert (swarm["data_pass"], swarm["window"], swarm["n_windows"]) == (0, 2, 4000)
    assert (chain["block"], chain["next_epoch"], chain["tempo"], chain["validators"]) == (1000, 1080, 360, 2)
    first = rows(scene)[peer_id(0)]
    assert (first["samples"], first["verified"], first["weight"], first["incentive"]) == (160, 640, 1 / 3, 1 / 3)
    assert first["verdicts"] == {"passed": 3, "not drawn": 9}
    assert first["why"] == "passed: 3. not drawn: 9."
    assert first["energy_j"] is None


def test_who_leaves_in_order_has_left_and_who_falls_silent_is_lost(scene):
    scene.step()
    del scene.reader.peers[0]
    scene.reader.left.add(0)
    del scene.reader.peers[1]
    scene.step(2)
    assert rows(scene)[peer_id(0)]["presence"] == "left"
    assert rows(scene)[peer_id(1)]["presence"] == "live"  # one reading without it says nothing
    scene.step(9)
    lost = rows(scene)[peer_id(1)]
    assert lost["presence"] == "lost"
    assert lost["last_seen"] == pytest.approx(scene.clock.now - 11)
    assert events(scene)[3:] == [("left", peer_id(0)), ("lost", peer_id(1))]
    scene.reader.peers[1] = {}
    scene.step()
    assert events(scene)[-1] == ("returned", peer_id(1))


def test_a_newcomer_joins_and_those_found_at_the_start_were_present(scene):
    scene.step()
    scene.reader.peers[7] = {}
    scene.step()
    assert events(scene) == [*(("present", peer_id(n)) for n in range(3)), ("joined", peer_id(7))]


def test_hostile_records_are_counted_and_change_nothing(scene):
    scene.step()
    before = rows(scene)
    expires = scene.clock.now + 5
    scene.reader.extra_progress = {
        owner(50): (b"\xc1garbage", expires),
        owner(51): (b"x" * 10_000, expires),
        b"unprotected": (progress(51, 20).to_bytes(), expires),  # anybody could have written this
        owner(52): (progress(52, 20).to_bytes(), scene.clock.now + 10**6),  # would live for ever
        owner(53): (progress(0, 10**9).to_bytes(), expires),  # says that it is peer 0
        owner(54): (progress(54, 20, peer_id="").to_bytes(), expires),
    }
    scene.reader.extra_statuses = {owner(55): (b"\xff" * 100, expires), owner(56): (b"x" * 5000, expires)}
    scene.step(0.5)
    assert rows(scene) == before
    assert parts(scene)["run"]["refused"] == 8
    assert parts(scene)["swarm"]["epoch"] == 20


def test_a_lie_about_loss_or_epoch_moves_the_line_no_further_than_the_honest_differ(scene):
    absurd = (EpochNote(19, 1e12, 2**50), EpochNote(2**50, 0.0, 1), EpochNote(25, 0.0, 1))
    scene.reader.peers[2] = {"epochs": absurd, "heldout_epoch": 2**40, "tokens_per_s": 1e15}
    scene.step()
    lines = {line.epoch: line for line in scene.history.last_epochs(100)}
    assert max(lines) == 20
    honest = [status(n, 20, 3).epochs[-1].loss for n in (0, 1)]
    assert min(honest) <= lines[19].loss <= max(honest)


def test_a_peer_with_other_settings_is_shown_and_does_not_count(scene):
    scene.reader.extra_progress = {
        owner(60): (progress(60, 900, fingerprint=b"o" * 16).to_bytes(), scene.clock.now + 8)
    }
    scene.step()
    assert (parts(scene)["swarm"]["peers"], parts(scene)["swarm"]["strangers"]) == (3, 1)
    assert parts(scene)["swarm"]["epoch"] == 20
    assert rows(scene)[peer_id(60)]["why"].startswith("Its settings are not the run's")


def test_a_flood_of_peers_is_one_event_and_bounded(scene):
    scene.step()
    for number in range(100, 300):
        scene.reader.peers[number] = {}
    scene.step()
    assert scene.history.last_events(1)[0].text == "200 peers at once"


def test_while_the_dht_is_silent_nobody_is_called_lost(scene):
    scene.step()
    scene.reader.fault = "the DHT does not answer"
    scene.step(60)
    assert {row["presence"] for row in rows(scene).values()} == {"live"}
    assert parts(scene)["run"]["error"] == "the DHT does not answer"
    scene.reader.fault = None
    scene.step()
    assert parts(scene)["run"]["error"] == ""


def test_a_node_that_knows_nobody_does_not_call_the_run_empty(scene):
    scene.step()
    scene.collector._peers_known = lambda: 0
    scene.reader.peers.clear()
    scene.step(60)
    assert "knows no other node" in parts(scene)["run"]["error"]
    assert {row["presence"] for row in rows(scene).values()} == {"live"}


def test_a_chain_that_fails_leaves_its_last_word_with_the_reason(scene, monkeypatch):
    scene.step()

    def fail(timeout_s):
        raise LedgerError(Code.UNREACHABLE, "nobody there")

    monkeypatch.setattr(scene.chain, "snapshot", fail)
    scene.step()
    assert parts(scene)["chain"]["block"] == 1000
    assert "nobody there" in parts(scene)["chain"]["error"]


def test_scores_of_somebody_without_a_permit_are_not_shown(scene):
    miner = scene.reader.hotkey_of[0]
    scene.reader.boards = {miner: Scoreboard("synthetic", miner, 9, (MinerScore(miner, 10**9, (), 1e9, 1.0),))}
    scene.step()
    assert rows(scene)[peer_id(0)]["verified"] is None
    assert rows(scene)[peer_id(0)]["why"] == "No validator has published scores of it yet."


def test_the_reason_of_a_validator_that_objects_is_shown(scene):
    miner, validator = scene.reader.hotkey_of[0], scene.validators[0]
    line = MinerScore(miner, 0, (("failed", 1), ("passed", 3)), 0.0, 0.0, "Leaf 3 is not the gradient of its data.")
    scene.reader.boards[validator] = Scoreboard("synthetic", validator, 990, (line,))
    scene.step()
    why = rows(scene)[peer_id(0)]["why"]
    assert why == "1 of 2 validators object. failed: 1. passed: 3. Leaf 3 is not the gradient of its data."


def test_a_registered_miner_that_is_not_in_the_swarm_has_a_row(tmp_path):
    scene = Scene(tmp_path / "h.sqlite3", peers=1, extra_miners=1)
    scene.step()
    assert sorted(row["presence"] for row in rows(scene).values()) == ["live", "named by no peer"]
    scene.close()


def test_history_and_known_peers_survive_a_restart(tmp_path):
    path = tmp_path / "h.sqlite3"
    before = Scene(path)
    before.step()
    before.step(2, epochs=3)
    lines, first_seen = before.history.last_epochs(100), rows(before)[peer_id(0)]["first_seen"]
    before.close()
    assert len(lines) == 12

    after = Scene(path, epoch=24)
    assert after.history.last_epochs(100) == lines
    after.collector._roster = type(after.collector._roster)(after.history.members())
    del after.reader.peers[1]
    after.step()
    after.step(15)
    assert events(after)[-1] == ("lost", peer_id(1))
    assert ("joined", peer_id(0)) not in events(after)
    assert rows(after)[peer_id(0)]["first_seen"] == first_seen
    after.close()


def test_a_history_is_of_one_run_and_one_dashboard(tmp_path):
    path = tmp_path / "h.sqlite3"
    first = History(path, "one")
    first.open()
    first.close()
    with pytest.raises(UserError, match="is of run_id one, not two: pass another --db"):
        History(path, "two").open()
    again = History(path, "one")
    again.open()
    again.close()
    (tmp_path / "text").write_text("this is no database, and long enough to be seen as one " * 20)
    with pytest.raises(UserError, match="pass another --db"):
        History(tmp_path / "text", "one").open()


def test_downsampling_keeps_means_and_extremes(tmp_path):
    from synthetic import fill, loss_of

    path = tmp_path / "h.sqlite3"
    history = History(path, "synthetic")
    history.open()
    fill(path, 10_000, 500)
    series = history.epoch_series(800)
    assert series["width"] == [13]
    assert len(series["epoch"]) == 770
    assert series["epoch"][-1] == 9999
    assert series["loss"][0] == pytest.approx(sum(map(loss_of, range(13))) / 13)
    assert series["loss_high"][0] == pytest.approx(max(map(loss_of, range(13))) + 0.1)
    ticks = history.tick_series(800)
    assert 700 <= len(ticks["at"]) <= 800
    assert ticks["at"] == sorted(ticks["at"])
    assert set(map(len, ticks.values())) == {len(ticks["at"])}
    history.close()


def test_old_moments_are_thinned_out_but_joins_and_losses_stay():
    history = History(":memory:", "run")
    history.open()
    for index in range(100):
        history.add_tick(Tick(1000.0 + index, 3, 1.0, joined=int(index == 7)))
    history.prune_ticks(1100.0, 50.0)
    assert history.tick_series(1000)["at"] == [1007.0, 1049.0, 1099.0]
    history.close()


def test_an_epochs_line_is_the_median_and_counts_who_diverged():
    notes = [EpochNote(5, loss, 8) for loss in (2.0, 3.0, 4.0, 1e9, float("nan"))] + [EpochNote(5, None, 0)]
    rounds = [round_note(5, 4), round_note(5, 4), round_note(5, 4, "no_group", "nobody came")]
    line = epoch_line(5, 1.0, notes, rounds, [2.5, float("inf"), 3.5])
    assert (line.loss, line.reporters, line.diverged, line.samples) == (3.5, 5, 1, 40)
    assert (line.outcome, line.group_size, line.failed, line.reason) == ("averaged", 4, 1, "nobody came")
    assert line.heldout_loss == 3.0


def test_an_epoch_whose_every_attempt_failed_says_so():
    line = epoch_line(5, 1.0, [], [round_note(5, 4, "incomplete", "peer x fell silent")], [])
    assert (line.outcome, line.failed, line.loss) == ("incomplete", 1, None)


def test_a_feed_tells_only_what_changed_and_sends_the_forgetful_back():
    feed = Feed()
    feed.publish({"a": 1, "b": 1}, [{"key": "x", "n": 1}, {"key": "y", "n": 1}], {"events": [{"n": 1}]})
    first = feed.version
    feed.publish({"a": 1, "b": 2}, [{"key": "x", "n": 2}], {})
    change = feed.since(first)
    assert change["parts"] == {"b": 2}
    assert change["miners"] == [{"key": "x", "n": 2}]
    assert change["gone"] == ["y"]
    assert change["lists"] == {}
    version = feed.version
    feed.publish({"a": 1, "b": 2}, [{"key": "x", "n": 2}], {})
    assert feed.version == version  # nothing new
    for number in range(600):
        feed.publish({}, [{"key": "x", "n": 2}], {"events": [{"n": number}]})
    assert feed.since(first) is None
    assert feed.since(feed.version + 1) is None
