"""Whose hotkey is whose: the peer and the hotkey must name each other, whatever others say."""

import pytest
import torch
from hivemind.utils import get_dht_time
from synthetic import peer_id
from test_dashboard_collector import rows

from hivetrain.contribution.leaves import WorkLog
from hivetrain.contribution.record import Position, hotkey_subkey, seal, work_key
from hivetrain.contribution.rules import AuditRules
from hivetrain.keys import Hotkey
from hivetrain.monitor.reader import RunReader, parse_work
from hivetrain.swarm import start_dht


def sealed(hotkey, expires, **changes):
    log = WorkLog()
    log.add(Position(0, 2, 1, 3), 1000, 8, 3.5, torch.ones(256))
    fields = {"run_id": "run", "peer_id": "12D3KooWPeer", "swarm_epoch": 7, "params_digest": "0" * 64, "block": 9}
    work = log.contribution(
        **fields | {"hotkey": hotkey.address, "rules": AuditRules(), "precision": "32-true"} | changes
    )
    return seal(work, hotkey, expires)


@pytest.fixture
def dht():
    running = start_dht([])
    yield running
    running.shutdown()


def test_what_the_hotkeys_asked_for_have_signed_is_read(dht):
    expires, names = get_dht_time() + 60, [Hotkey.throwaway() for _ in range(3)]
    for hotkey in names:
        record, subkey = sealed(hotkey, expires), hotkey_subkey(hotkey.address)
        assert dht.store(work_key("run", 7), record, expires, subkey=subkey, return_future=True).result(10)
    reader = RunReader(dht, "run")
    reader.open()
    found = reader.peers_of({hotkey.address for hotkey in names[:2]}, 7)
    assert found == {hotkey.address: "12D3KooWPeer" for hotkey in names[:2]}
    assert reader.peers_of({names[0].address}, 8) == {}
    reader.close()


@pytest.mark.parametrize("change", [{"run_id": "other"}, {"swarm_epoch": 6}])
def test_work_of_another_run_or_epoch_says_nothing(change):
    hotkey = Hotkey.throwaway()
    subkey = hotkey_subkey(hotkey.address)
    assert parse_work({subkey: (sealed(hotkey, 1e9), 1e9)}, "run", 7) == {hotkey.address: "12D3KooWPeer"}
    assert parse_work({subkey: (sealed(hotkey, 1e9, **change), 1e9)}, "run", 7) == {}


def test_work_in_another_hotkeys_place_says_nothing():
    hotkey, other = Hotkey.throwaway(), Hotkey.throwaway()
    assert parse_work({hotkey_subkey(other.address): (sealed(hotkey, 1e9), 1e9)}, "run", 7) == {}


def test_a_hotkey_is_proven_where_peer_and_hotkey_name_each_other(scene):
    scene.step()
    assert [row["hotkey_proven"] for row in rows(scene).values()] == [True, False, True]


def test_a_hotkey_cannot_attach_itself_to_another_peer(scene):
    own, theirs = scene.reader.hotkey_of[0], scene.reader.hotkey_of[1]
    scene.reader.signed = {theirs: peer_id(0), Hotkey.throwaway().address: peer_id(2)}
    scene.reader.peers[2] = {"hotkey": None}
    scene.step()
    found = rows(scene)
    assert (found[peer_id(0)]["hotkey"], found[peer_id(0)]["hotkey_proven"], found[peer_id(0)]["uid"]) == (own, True, 0)
    assert (found[peer_id(2)]["hotkey"], found[peer_id(2)]["hotkey_proven"]) == (None, False)
    assert found[peer_id(2)]["why"] == "It names no hotkey in a status record, so its pay is not shown."


@pytest.mark.parametrize("tells", [True, False])
def test_a_peer_that_claims_anothers_hotkey_gets_none_of_its_figures(scene, tells):
    own = scene.reader.hotkey_of[0]
    scene.reader.peers[1] = {"hotkey": own}
    scene.reader.peers[0] = {} if tells else {"hotkey": None}
    scene.step()
    victim, thief = rows(scene)[peer_id(0)], rows(scene)[peer_id(1)]
    assert victim["hotkey_proven"] == tells
    assert (thief["hotkey_proven"], thief["uid"], thief["incentive"]) == (False, None, None)
    assert thief["why"] == "Its hotkey has signed for another peer."


def test_only_hotkeys_that_somebody_names_are_remembered(scene):
    scene.step()
    assert set(scene.collector._signed) == {scene.reader.hotkey_of[0], scene.reader.hotkey_of[2]}
    scene.reader.peers[2] = {"hotkey": None}
    scene.step(2, epochs=1)
    assert set(scene.collector._signed) == {scene.reader.hotkey_of[0]}
