"""A made-up run, and a headless Chromium."""

import pytest
from scenes import CHROMIUM, Scene


@pytest.fixture
def scene(tmp_path):
    made = Scene(tmp_path / "history.sqlite3")
    yield made
    made.close()


@pytest.fixture(scope="module")  # its event loop must not run on in the tests of others
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no chromium on this machine")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()
