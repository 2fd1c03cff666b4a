"""The reader and the collector on a real DHT and a real ledger."""

import msgpack
import pytest
from hivemind.dht.crypto import RSASignatureValidator
from hivemind.utils import get_dht_time
from hivemind.utils.crypto import RSAPrivateKey
from scenes import wait_until
from synthetic import SETTINGS, hotkeys, progress, status

from hivetrain.chain.base import Rules
from hivetrain.chain.ledger import Ledger
from hivetrain.chain.local import LocalChain
from hivetrain.contribution.record import hotkey_subkey
from hivetrain.contribution.scoreboard import MinerScore, Scoreboard, scores_key, seal_scoreboard
from hivetrain.keys import Hotkey
from hivetrain.monitor.collector import Collector
from hivetrain.monitor.feed import Feed
from hivetrain.monitor.history import History
from hivetrain.monitor.reader import RunReader
from hivetrain.monitor.status import status_key
from hivetrain.swarm import start_dht, visible_maddrs


@pytest.fixture(scope="module")
def nodes():
    """A peer's node with its key, and a dashboard's."""
    validator = RSASignatureValidator(RSAPrivateKey())
    peer = start_dht([], record_validators=(validator,))
    watcher = start_dht(visible_maddrs(peer), client_mode=True)
    yield peer, validator.local_public_key, watcher
    watcher.shutdown()
    peer.shutdown()


@pytest.fixture
def reader(nodes, request):
    made = RunReader(nodes[2], request.node.name)
    made.open()
    yield made
    made.close()


def store(dht, key, value, subkey=None, lifetime_s=60.0):
    return dht.store(key, value, get_dht_time() + lifetime_s, subkey=subkey, return_future=True).result(10)


def test_a_peer_is_seen_by_its_run_id_alone(nodes, reader):
    peer, owner, _ = nodes
    run_id = reader.run_id
    assert store(peer, f"{run_id}_progress", progress(1, 7).to_bytes(), owner)
    assert store(peer, f"{run_id}_progress", progress(2, 9).to_bytes(), b"anybody's")
    assert store(peer, status_key(run_id), status(1, 7, 1).to_bytes(), owner)
    assert store(peer, f"{run_id}_settings_{SETTINGS.fingerprint.hex()}", SETTINGS.to_bytes(), owner)
    assert store(peer, f"{run_id}_settings_{SETTINGS.fingerprint.hex()}", b"of somebody else", b"anybody's")
    found = reader.read()
    assert [sighting.progress for sighting in found.alive.values()] == [progress(1, 7)]
    assert found.statuses == {owner: status(1, 7, 1)}
    assert found.refused == 1
    assert reader.settings(SETTINGS.fingerprint) == SETTINGS
    assert store(peer, f"{run_id}_progress", b"", owner, lifetime_s=61)
    assert reader.read().left == {owner}


def test_a_run_that_nobody_knows_is_empty(reader):
    found = reader.read()
    assert (found.alive, found.statuses, found.refused) == ({}, {}, 0)
    assert reader.settings(b"x" * 16) is None
    assert reader.scoreboards(lambda _: True) == {}
    assert reader.peers_of(hotkeys(1), 0) == {}


def test_validators_pages_are_put_together_and_others_are_not_looked_at(nodes, reader, monkeypatch):
    monkeypatch.setattr("hivetrain.monitor.reader.MAX_RECORDS", 1)  # whatever others write does not count
    peer, run_id = nodes[0], reader.run_id
    validator, stranger = Hotkey.throwaway(), Hotkey.throwaway()
    miners = tuple(MinerScore(h, 8, (("passed", 3),), 8.0, 1 / 256, "r" * 100) for h in hotkeys(256))
    for hotkey in (stranger, validator):
        board = Scoreboard(run_id, hotkey.address, 980, miners)
        expires = get_dht_time() + 60
        for key, sealed in seal_scoreboard(board, hotkey, expires):
            assert peer.store(key, sealed, expires, subkey=hotkey_subkey(hotkey.address), return_future=True).result(10)
    forged = msgpack.packb(["scores", scores_key(run_id, 0), validator.address, 1.0, b"", b""])
    assert not store(peer, scores_key(run_id, 0), forged, hotkey_subkey(validator.address), 90)
    found = reader.scoreboards(lambda address: address == validator.address)
    assert set(found) == {validator.address}
    assert {line.hotkey for line in found[validator.address].miners} == {line.hotkey for line in miners}


def test_the_collector_follows_a_real_dht_and_ledger_and_stops(nodes, reader, tmp_path):
    peer, owner, _ = nodes
    run_id = reader.run_id
    miner, validator = Hotkey.throwaway(), Hotkey.throwaway()
    path = tmp_path / "ledger.sqlite3"
    Ledger.create(path, Rules(tempo=10, block_time_s=1.0))
    for hotkey in (miner, validator):
        with LocalChain(path, hotkey) as chain:
            chain.register(10)
    store(peer, f"{run_id}_progress", progress(1, 7).to_bytes(), owner)
    store(peer, status_key(run_id), status(1, 7, 1, miner.address).to_bytes(), owner)
    history, feed = History(tmp_path / "h.sqlite3", run_id), Feed()
    history.open()
    collector = Collector(reader, history, feed, (LocalChain(path, validator), "ledger"), interval_s=0.2)
    collector.start()

    def seen():
        rows = {row["hotkey"]: row for row in feed.whole()["miners"]}
        return rows if miner.address in rows and rows[miner.address]["uid"] is not None else None

    rows = wait_until(seen, 20, "the miner with its uid")
    assert rows[miner.address]["peer_id"] == progress(1, 7).peer_id
    chain_part = feed.whole()["parts"]["chain"]
    assert (chain_part["tempo"], chain_part["neurons"], chain_part["error"]) == (10, 2, "")
    block = chain_part["block"]
    wait_until(lambda: feed.whole()["parts"]["chain"]["block"] > block, 10, "the next block")
    collector.stop()
    assert [member.peer_id for member in history.members()] == [progress(1, 7).peer_id]
    history.close()
