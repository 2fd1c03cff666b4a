"""A history that cannot be written: the present is shown all the same, and the past is written later."""

from scenes import Scene
from synthetic import peer_id
from test_dashboard_collector import events, parts, rows


def test_a_full_disk_is_said_hides_nothing_and_loses_no_event(scene):
    scene.step()
    file = scene.history._file
    file.write(f"PRAGMA max_page_count = {file.one('PRAGMA page_count')[0]}")
    written, since = [], []
    for numbers in (range(100, 145), range(145, 190)):
        scene.reader.peers |= {number: {} for number in numbers}
        scene.step(2, epochs=1)
        written.append(events(scene))
        since.append(parts(scene)["run"]["error_since"])
    del scene.reader.peers[0]
    scene.reader.left.add(0)
    scene.step(12)
    assert parts(scene)["run"]["error"] == "the history cannot be written: database or disk is full"
    assert since[1] == parts(scene)["run"]["error_since"] <= scene.clock.now - 12
    assert (parts(scene)["swarm"]["epoch"], parts(scene)["swarm"]["peers"]) == (22, 92)
    assert rows(scene)[peer_id(0)]["presence"] == "left"
    shown = scene.feed.since(0)["lists"]
    assert [event["kind"] for event in shown["events"]] == ["present"] * 3 + ["joined"] * 90 + ["left"]
    assert [(tick["joined"], tick["gone"]) for tick in shown["ticks"]] == [(0, 0), (45, 0), (45, 0), (0, 1)]
    assert events(scene) == written[1]
    assert len(written[1]) < 3 + 90

    file.write("PRAGMA max_page_count = 1000000")
    scene.step()
    scene.step()
    assert parts(scene)["run"]["error"] == ""
    joined = [("joined", peer_id(number)) for number in range(100, 190)]
    assert events(scene) == [*(("present", peer_id(n)) for n in range(3)), *joined, ("left", peer_id(0))]
    series = scene.history.tick_series(100)
    assert (sum(series["joined"]), sum(series["gone"])) == (90, 1)
    assert {line.epoch: line.reporters for line in scene.history.last_epochs(2)} == {21: 92, 22: 0}  # that one runs
    assert len(scene.history.members()) == 93


def test_what_could_not_be_written_is_written_at_the_end(tmp_path, caplog):
    scene = Scene(tmp_path / "h.sqlite3")
    scene.history._file.write("PRAGMA query_only = 1")
    scene.step()
    scene.collector.stop()
    assert "the history cannot be written: attempt to write a readonly database" in caplog.messages
    scene.history._file.write("PRAGMA query_only = 0")
    scene.collector.stop()
    assert events(scene) == [("present", peer_id(n)) for n in range(3)]
    scene.close()
