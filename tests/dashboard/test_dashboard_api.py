import json

import pytest
import requests
from scenes import served, wait_until
from synthetic import peer_id

from hivetrain.dashboard.app import MAX_STREAMS


class Stream:
    """Server-sent events, one after another."""

    def __init__(self, url, since):
        self.answer = requests.get(f"{url}/api/stream", params={"since": since}, stream=True, timeout=10)
        self.lines = self.answer.iter_lines(decode_unicode=True)

    def next(self):
        found = {}
        for line in self.lines:
            if not line and "event" in found:
                return found["event"], json.loads(found["data"])
            name, _, value = line.partition(": ")
            found[name] = value
        return "end", None


@pytest.fixture
def url(scene):
    scene.step()
    with served(scene) as running:
        yield running


def state(url):
    answer = requests.get(f"{url}/api/state", timeout=10)
    assert answer.status_code == 200
    return answer.json()


def test_the_state_is_the_whole_picture_with_the_latest_epochs_and_events(url, scene):
    found = state(url)
    assert found["parts"] == scene.feed.whole()["parts"]
    assert {row["key"] for row in found["miners"]} == {peer_id(n) for n in range(3)}
    assert [line["epoch"] for line in found["lists"]["epochs"]] == list(range(12, 21))
    assert [event["kind"] for event in found["lists"]["events"]] == ["present"] * 3


def test_the_stream_tells_what_changes_and_nothing_twice(url, scene):
    found = state(url)
    stream = Stream(url, f"{found['feed']}-{found['version']}")
    scene.step(2, epochs=1)
    kind, change = stream.next()
    assert kind == "update"
    assert change["parts"]["swarm"]["epoch"] == 21
    assert [line["epoch"] for line in change["lists"]["epochs"]] == [20, 21]
    del scene.reader.peers[0]
    scene.reader.left.add(0)
    scene.step(2)
    kind, change = stream.next()
    assert [(event["kind"], event["peer_id"]) for event in change["lists"]["events"]] == [("left", peer_id(0))]
    assert {row["key"]: row["presence"] for row in change["miners"]}[peer_id(0)] == "left"
    assert "epochs" not in change["lists"]


def test_a_reader_that_lost_its_connection_goes_on_where_it_was(url, scene):
    found = state(url)
    for _ in range(3):
        scene.step(2, epochs=1)
    kind, change = Stream(url, f"{found['feed']}-{found['version']}").next()
    assert kind == "update"
    assert [line["epoch"] for line in change["lists"]["epochs"]][-1] == 23
    assert change["version"] == scene.feed.version


@pytest.mark.parametrize("since", ["", "another-3", "-1", "%s-999999", "%s-x", "%s-" + "9" * 40])
def test_a_version_of_another_time_begins_anew(url, scene, since):
    assert Stream(url, since.replace("%s", scene.feed.name)).next() == ("reset", {})


def test_the_series_are_downsampled_and_their_size_is_bounded(url):
    found = requests.get(f"{url}/api/series", params={"points": 10}, timeout=10).json()
    assert found["epochs"]["epoch"][-1] == 20
    for points in ("9", "4001", "x"):
        assert requests.get(f"{url}/api/series", params={"points": points}, timeout=10).status_code == 422


@pytest.mark.parametrize("path", ["/", "/api/state", "/static/app.js", "/nothing", "/static/uplot/LICENSE"])
def test_every_answer_forbids_foreign_content(url, path):
    answer = requests.get(url + path, timeout=10)
    assert answer.headers["content-security-policy"].startswith("default-src 'self'; ")
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_nothing_outside_the_static_files_is_served(url):
    for path in ("/static/../app.py", "/static/%2e%2e/app.py", "/static//etc/passwd", "/docs", "/openapi.json"):
        assert requests.get(url + path, timeout=10).status_code == 404


def test_nothing_can_be_written(url):
    for path in ("/", "/api/state", "/api/stream"):
        assert requests.post(url + path, timeout=10).status_code == 405


def test_health_says_whether_the_run_can_be_read(url, scene):
    assert requests.get(f"{url}/health", timeout=10).json()["status"] == "ok"
    scene.reader.fault = "the DHT does not answer"
    scene.step()
    answer = requests.get(f"{url}/health", timeout=10)
    assert (answer.status_code, answer.json()["reason"]) == (503, "the DHT does not answer")


def test_streams_are_bounded_and_end_with_the_program(url, scene):
    since = f"{scene.feed.name}-{scene.feed.version}"
    streams = [Stream(url, since) for _ in range(MAX_STREAMS)]
    assert requests.get(f"{url}/api/stream", timeout=10).status_code == 503
    streams.pop().answer.close()
    wait_until(
        lambda: requests.get(f"{url}/api/stream", timeout=10, stream=True).status_code == 200, 10, "a place is free"
    )
    scene.closing.set()
    assert streams[0].next() == ("end", None)


def test_what_it_does_is_counted_for_prometheus(url, scene):
    state(url)
    scene.reader.fault = "silence"
    scene.step()
    value = scene.registry.get_sample_value
    assert value("hivetrain_dashboard_swarm_epoch") == 20
    assert value("hivetrain_dashboard_peers") == 3
    assert value("hivetrain_dashboard_history_bytes") > 4096
    assert value("hivetrain_dashboard_read_failures_total", {"source": "dht"}) == 1
    assert value("hivetrain_dashboard_read_seconds_count", {"source": "chain"}) == 2
    counted = {"route": "/api/state", "status": "2xx"}
    assert value("hivetrain_dashboard_request_seconds_count", counted) == 1
