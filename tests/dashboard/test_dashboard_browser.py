"""The page in headless Chromium: what it shows is what the API says, for everybody who may look at it."""

import json
from pathlib import Path

import pytest
import requests
from scenes import opened, served, wait_until
from synthetic import peer_id, progress, round_note

pytestmark = pytest.mark.browser

AXE = Path(__file__).parent / "assets" / "axe.min.js"
IS_DRAWN = """([selector, wanted]) => {
  const canvas = document.querySelector(selector);
  const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  for (let i = 0; i < data.length; i += 4) {
    if (data[i + 3] > 200 && wanted.every((part, at) => Math.abs(data[i + at] - part) < 12)) return true;
  }
  return false;
}"""


@pytest.fixture
def url(scene):
    for _ in range(12):
        scene.step(10, epochs=1)
    with served(scene) as running:
        yield running


def loaded(page):
    page.wait_for_selector("#connection[data-state=live]")
    page.wait_for_selector("#plot-exchange canvas")


def value(page, card):
    return json.loads(page.get_attribute(f"#card-{card} .value", "data-value"))


def is_drawn(page, chart, variable):
    """Whether a chart has pixels of this color of the theme, but for antialiasing."""
    text = page.evaluate("name => getComputedStyle(document.documentElement).getPropertyValue(name)", variable).strip()
    return page.evaluate(IS_DRAWN, [f"#plot-{chart} canvas", [int(text[at : at + 2], 16) for at in (1, 3, 5)]])


def cells(page, table, key):
    return page.eval_on_selector_all(
        f"#{table} tr[data-key='{key}'] > *", "cells => cells.map(cell => cell.textContent)"
    )


def test_the_page_shows_what_the_api_says(browser, url):
    with opened(browser, url) as (page, complaints):
        loaded(page)
        said = requests.get(f"{url}/api/state", timeout=10).json()
        swarm, chain = said["parts"]["swarm"], said["parts"]["chain"]
        for card, expected in {
            "epoch": swarm["epoch"], "peers": swarm["peers"], "tokens-per-s": swarm["tokens_per_s"],
            "batch": swarm["samples"], "tokens": swarm["tokens"], "pass": swarm["data_pass"],
            "model": swarm["num_params"], "block": chain["block"], "tempo": chain["tempo"],
            "neurons": chain["neurons"],
            "loss": [line["loss"] for line in said["lists"]["epochs"] if line["loss"] is not None][-1],
            "heldout": said["lists"]["epochs"][-1]["heldout_loss"],
        }.items():  # fmt: skip
            assert value(page, card) == expected, card
        for row in said["miners"]:
            shown = cells(page, "miners-table", row["key"])
            assert shown[1] == "live"
            assert shown[3:6] == [str(row["uid"]), str(row["epoch"]), f"{row['loss']:.4f}"]
            assert shown[7:11] == [str(row["samples"]), "640", "3 passed, 9 not drawn", "33.3 %"]
            assert shown[12:15] == ["now", "NVIDIA H100", "not available"]
            assert shown[15] == row["why"]
        line = said["lists"]["epochs"][-2]
        assert cells(page, "exchanges-table", line["epoch"])[:8] == [
            str(line["epoch"]), "averaged", "3 of 3", "100.0 %", "0.80 s", "2.50 s", "10MB", "10MB",
        ]  # fmt: skip
        assert page.locator("#validators-table tbody tr").count() == 2
        assert page.locator("#matrix-table tbody td").all_inner_texts() == ["33.3 %"] * 6
        assert page.locator("#events-table tbody tr").count() == 3
        assert complaints == []


def test_the_charts_are_drawn_with_the_figures_of_the_api(browser, url):
    with opened(browser, url) as (page, complaints):
        loaded(page)
        for chart, variable in (("loss", "--c1"), ("tokens", "--c3"), ("peers", "--c1"), ("exchange", "--c2")):
            assert is_drawn(page, chart, variable), chart
        series = requests.get(f"{url}/api/series", timeout=10).json()["epochs"]
        page.click("#figures figure:first-child summary")
        rows = page.locator("#figures figure:first-child .scroll tbody tr")
        shown = rows.nth(1).locator("th, td").all_inner_texts()
        assert shown[:3] == [str(series["epoch"][-2]), f"{series['loss'][-2]:.4f}", f"{series['heldout_loss'][-2]:.4f}"]
        assert f"training loss {series['loss'][-2]:.4f}" in page.get_attribute("#plot-loss", "aria-label")
        assert not is_drawn(page, "tokens", "--c2")  # the check can fail
        assert complaints == []


def test_what_changes_appears_without_reloading_and_is_announced(browser, url, scene):
    with opened(browser, url) as (page, complaints):
        loaded(page)
        scene.step(2, epochs=1)
        page.wait_for_function("epoch => document.querySelector('#card-epoch .value').textContent === epoch", arg="33")
        del scene.reader.peers[1]
        scene.step(15)
        page.wait_for_selector(f"#miners-table tr.bad[data-key='{peer_id(1)}']")
        assert cells(page, "miners-table", peer_id(1))[1] == "lost"
        page.wait_for_function("() => document.getElementById('announcer').textContent.includes('was lost')")
        assert page.inner_text("#events-table tbody tr:first-child td:nth-child(2)") == "lost"
        assert is_drawn(page, "peers", "--c2")
        assert complaints == []


def test_a_lost_connection_is_shown_and_mended(browser, scene):
    scene.step()
    with served(scene) as url, opened(browser, url) as (page, _):
        loaded(page)
        scene.closing.set()
        page.wait_for_selector("#connection[data-state=lost]")
        scene.closing.clear()
        scene.step(2, epochs=5)
        page.wait_for_selector("#connection[data-state=live]", timeout=15_000)
        page.wait_for_function("() => document.querySelector('#card-epoch .value').textContent === '25'")


def test_errors_of_the_run_and_the_chain_are_shown_as_alerts(browser, url, scene, monkeypatch):
    with opened(browser, url) as (page, _):
        loaded(page)
        scene.reader.fault = "the DHT does not answer"
        scene.step()
        page.wait_for_selector("#alerts p")
        assert "the DHT does not answer" in page.inner_text("#alerts")
        scene.reader.fault = None
        scene.step()
        page.wait_for_selector("#alerts p", state="detached")
        monkeypatch.setattr("hivetrain.monitor.roster.MAX_MEMBERS", 3)
        scene.reader.peers[9] = {}
        scene.step()
        page.wait_for_selector("#alerts p")
        assert page.inner_text("#alerts") == "Live peers that are not shown for want of room: 1."


def test_text_from_hostile_peers_stays_text(browser, scene):
    markup = "<img src=x onerror=alert(1)>"
    scene.reader.peers[0] = {"device": markup, "rounds": (round_note(19, 3, "no_group", f"</td>{markup}"),)}
    scene.reader.peers[1] = {"rounds": ()}
    scene.reader.peers[2] = {"rounds": ()}
    hostile = progress(9, 20, peer_id="<script>alert(2)</script>").to_bytes()
    scene.reader.extra_progress = {b"[owner:ssh-rsa 9]": (hostile, scene.clock.now + 60)}
    scene.step()
    with served(scene) as url, opened(browser, url) as (page, complaints):
        loaded(page)
        assert cells(page, "miners-table", peer_id(0))[13] == markup
        assert cells(page, "exchanges-table", 19)[11] == f"</td>{markup}"
        assert page.locator("#miners-table th[scope=row]", has_text="<scri").count() == 1
        assert page.locator("main img, main script").count() == 0
        assert complaints == []


def test_the_theme_follows_the_system_and_the_choice_is_kept(browser, url):
    ground = "() => getComputedStyle(document.body).backgroundColor"
    with opened(browser, url, color_scheme="dark") as (page, complaints):
        loaded(page)
        assert page.evaluate(ground) == "rgb(19, 22, 27)"
        assert is_drawn(page, "loss", "--c1")
        page.click("#theme")
        assert page.evaluate(ground) == "rgb(255, 255, 255)"
        page.reload()
        loaded(page)
        assert page.evaluate(ground) == "rgb(255, 255, 255)"
        assert page.inner_text("#theme") == "Dark theme"
        assert complaints == []


@pytest.mark.parametrize("width", [320, 360, 768])
def test_a_narrow_screen_needs_no_horizontal_scrolling(browser, url, width):
    with opened(browser, url, viewport={"width": width, "height": 700}) as (page, complaints):
        loaded(page)
        assert page.evaluate("document.documentElement.scrollWidth") == width
        inside = "charts => charts.every(chart => chart.getBoundingClientRect().right <= innerWidth)"
        assert page.eval_on_selector_all(".plot canvas", inside)
        assert complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_to_object_to(browser, url, scene, scheme):
    with opened(browser, url, color_scheme=scheme) as (page, _):
        loaded(page)
        del scene.reader.peers[1]
        scene.step(15)
        page.wait_for_selector("tr.bad")
        page.evaluate("() => document.querySelectorAll('details').forEach(each => { each.open = true; })")
        page.evaluate(AXE.read_text())
        found = page.evaluate("() => axe.run()")
        assert len(found["passes"]) > 20
        assert [(rule["id"], [node["html"][:120] for node in rule["nodes"]]) for rule in found["violations"]] == []


def test_all_can_be_done_with_the_keyboard(browser, url):
    with opened(browser, url) as (page, _):
        loaded(page)
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "main"
        page.focus("#miners-table th:nth-child(4) button")
        page.keyboard.press("Enter")
        assert page.get_attribute("#miners-table th:nth-child(4)", "aria-sort") == "descending"
        order = page.eval_on_selector_all("#miners-table tbody tr", "rows => rows.map(row => row.cells[3].textContent)")
        assert order == ["2", "1", "0"]
        style = "() => getComputedStyle(document.activeElement).outlineStyle"
        assert page.evaluate(style) == "solid"
        page.focus("#miners-filter")
        page.keyboard.type(peer_id(2)[-4:])
        wait_until(lambda: page.locator("#miners-table tbody tr").count() == 1, 5, "the filter works")


def test_the_page_asks_nobody_else(browser, url):
    asked = []
    context = browser.new_context()
    page = context.new_page()
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    loaded(page)
    context.close()
    assert asked
    assert {address for address in asked if not address.startswith(f"{url}/")} == set()
