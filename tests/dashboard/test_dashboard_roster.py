"""Floods of made-up peers: bounded, and without hiding those who come after them."""

import pytest
from scenes import Scene
from synthetic import owner, peer_id, progress
from test_dashboard_collector import parts, rows

from hivetrain.monitor import roster
from hivetrain.monitor.history import History
from hivetrain.monitor.reader import Reading, Sighting
from hivetrain.monitor.roster import MAX_MEMBERS, Presence, Roster


def reading(at, numbers, ttl_s=10.0):
    return Reading(at, {owner(n): Sighting(progress(n, 20), at + ttl_s) for n in numbers})


def here(peers):
    return {member.peer_id for member in peers.live}


def test_peers_that_come_after_a_flood_are_seen_as_soon_as_it_is_gone():
    peers = Roster()
    peers.update(reading(0, [1, 2]))
    peers.update(reading(5, [1, *range(1000, 1000 + 2 * MAX_MEMBERS)]))
    assert (len(peers.members), peers.left_out) == (MAX_MEMBERS, MAX_MEMBERS + 2)
    peers.update(reading(12, [1, 7]))
    assert peers.left_out == 1  # all are live
    peers.update(reading(16, [1, 7, 8]))
    assert peers.left_out == 1  # one was gone, and made room; now the flood is gone
    assert peer_id(2) not in {member.peer_id for member in peers.members}
    peers.update(reading(18, [1, 7, 8]))
    assert here(peers) == {peer_id(1), peer_id(7), peer_id(8)}
    assert (len(peers.members), peers.left_out) == (MAX_MEMBERS, 0)


def test_nobody_makes_room_who_is_live_or_comes_back(monkeypatch):
    monkeypatch.setattr(roster, "MAX_MEMBERS", 4)
    peers = Roster()
    peers.update(reading(0, [1, 2, 3]))
    peers.update(reading(20, [3, 4]))
    assert {m.peer_id for m in peers.members if m.presence is Presence.LOST} == {peer_id(1), peer_id(2)}
    events = peers.update(reading(22, [1, 3, 4, 5]))
    assert [(event.kind, event.peer_id) for event in events] == [("returned", peer_id(1)), ("joined", peer_id(5))]
    assert {m.peer_id for m in peers.members} == here(peers) == {peer_id(n) for n in (1, 3, 4, 5)}
    peers.update(reading(24, [6, 7]))
    assert here(peers) == {peer_id(n) for n in (1, 3, 4, 5)}
    assert peers.left_out == 2


def test_a_flood_that_a_restart_remembers_makes_room_too(tmp_path):
    before = Roster()
    before.update(reading(0, range(1000, 1000 + MAX_MEMBERS)))
    history = History(tmp_path / "h.sqlite3", "run")
    history.open()
    history.keep_members(before.members)
    after = Roster(history.members())
    history.close()
    after.update(reading(100, [1]))
    assert after.left_out == 1  # whoever was live has some seconds to show up
    after.update(reading(111, [1]))
    after.update(reading(113, [1]))
    assert here(after) == {peer_id(1)}
    assert len(after.members) == MAX_MEMBERS


@pytest.fixture
def crowded(tmp_path, monkeypatch):
    monkeypatch.setattr(roster, "MAX_MEMBERS", 3)
    scene = Scene(tmp_path / "h.sqlite3", peers=5)
    yield scene
    scene.close()


def test_the_page_is_told_how_many_are_not_shown(crowded):
    crowded.step()
    assert (parts(crowded)["run"]["left_out"], parts(crowded)["run"]["refused"]) == (2, 0)
    assert sum(row["presence"] == "live" for row in rows(crowded).values()) == 3
