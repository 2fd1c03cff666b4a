"""A dashboard over a made-up run, served on loopback, and pages that look at it."""

import shutil
import socket
import threading
import time
from contextlib import contextmanager

import uvicorn
from prometheus_client import CollectorRegistry
from synthetic import BEGAN, EPOCH_S, FakeReader, economy, fill, hotkeys

from hivetrain.dashboard.app import create_app
from hivetrain.metrics import DashboardMetrics
from hivetrain.monitor.collector import Collector
from hivetrain.monitor.feed import Feed
from hivetrain.monitor.history import History

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def wait_until(condition, timeout_s, what):
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)
    return value


class Clock:
    """Time that a test moves."""

    def __init__(self, now):
        self.now = now

    def __call__(self):
        return self.now


class Scene:
    """A made-up run with its collector; ``step`` reads it once, as if some seconds had passed."""

    def __init__(self, path, peers=3, epoch=20, epochs=0, validators=2, extra_miners=0):
        self.clock = Clock(BEGAN + EPOCH_S * epoch)
        miners = hotkeys(peers + extra_miners)
        self.validators = hotkeys(validators)
        self.reader = FakeReader(self.clock, peers, epoch, miners[:peers])
        self.history = History(path, "synthetic")
        self.history.open()
        if epochs:
            fill(path, epochs, peers)
        self.feed = Feed()
        self.chain, self.reader.boards = economy(miners, self.validators)
        self.registry = CollectorRegistry()
        self.metrics = DashboardMetrics(self.registry)
        self.collector = Collector(
            self.reader, self.history, self.feed, (self.chain, "made-up"), clock=self.clock, metrics=self.metrics
        )
        self.collector._stopped.set()  # nothing repeats, and nothing waits: the test steps
        self.closing = threading.Event()

    def step(self, seconds=2.0, epochs=0):
        self.clock.now += seconds
        self.reader.epoch += epochs
        self.collector.read_chain()
        self.collector.step()

    def close(self):
        self.closing.set()
        self.collector.stop()
        self.history.close()


@contextmanager
def served(scene):
    """The scene's dashboard on a free port; gives its URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    app = create_app(scene.feed, scene.history, scene.closing, scene.metrics)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, log_level="warning", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    wait_until(lambda: server.started, 10, "the server listens")
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        scene.closing.set()
        server.should_exit = True
        thread.join(10)
        listener.close()


@contextmanager
def opened(browser, url, **options):
    """A page and what it complained of."""
    context = browser.new_context(**options)
    page = context.new_page()
    complaints = []

    def hear(said):
        # Canvas2D's advice is about the tests' own reading of pixels.
        if said.type in ("error", "warning") and not said.text.startswith("Canvas2D"):
            complaints.append(said.text)

    page.on("console", hear)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", lambda asked: complaints.append(asked.url) if "ABORTED" not in asked.failure else None)
    page.goto(url)
    try:
        yield page, complaints
    finally:
        context.close()
