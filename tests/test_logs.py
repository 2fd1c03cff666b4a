"""Logs: one line for each event, in either format, whoever speaks; and never a secret."""

import io
import json
import logging
import os
import subprocess
import sys
import threading
import warnings

import pytest

from hivetrain import logs
from hivetrain.errors import UserError

SEED = "0x" + "5e" * 32


@pytest.fixture(autouse=True)
def _restored():
    root, own = logging.getLogger(), logging.getLogger("hivetrain")
    before = (root.handlers[:], root.level, own.level, warnings.showwarning, sys.excepthook, threading.excepthook)
    yield
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    own.setLevel(before[2])
    warnings.showwarning, sys.excepthook, threading.excepthook = before[3:]


def log_to(form, level="info"):
    stream = io.StringIO()
    logs.setup(level, form, stream)
    return stream


def events(stream):
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def run(program, *arguments):
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )


def test_a_text_line_has_time_level_logger_and_message():
    stream = log_to("text")
    logging.getLogger("hivetrain.swarm").info("joined %d peers", 3)
    (line,) = stream.getvalue().splitlines()
    day, moment, level, name, *message = line.split(" ")
    assert len(day) == 10
    assert len(moment) == 8
    assert (level, name, " ".join(message)) == ("INFO", "hivetrain.swarm:", "joined 3 peers")


def test_a_json_event_has_the_same_and_the_process():
    stream = log_to("json")
    logging.getLogger("hivetrain.swarm").warning("lost %s", "a peer")
    (event,) = events(stream)
    assert event.pop("time").endswith("+00:00")
    assert event == {"level": "warning", "logger": "hivetrain.swarm", "message": "lost a peer", "pid": os.getpid()}


@pytest.mark.parametrize("form", logs.FORMATS)
def test_a_message_cannot_forge_another_line_or_reach_the_terminal(form):
    stream = log_to(form)
    logging.getLogger("hivetrain").warning(
        "peer says %s", "x\n2026-01-01 00:00:00 INFO root: all is well\x1b[2J\u2028\u202e"
    )
    assert len(stream.getvalue().splitlines()) == 1
    assert "\x1b" not in stream.getvalue()
    assert stream.getvalue().isascii()


def test_a_long_message_is_cut():
    stream = log_to("text")
    logging.getLogger("hivetrain").warning("%s", "a" * 10**6)
    assert len(stream.getvalue()) < logs.MAX_CHARS + 200


def test_an_exception_is_one_json_event_with_its_traceback():
    stream = log_to("json")
    try:
        raise ValueError("a\nb")
    except ValueError:
        logging.getLogger("hivetrain").exception("failed")
    (event,) = events(stream)
    assert event["message"] == "failed"
    assert event["exception"]["type"] == "ValueError"
    assert event["exception"]["message"] == "a\nb"
    assert "test_logs.py" in event["exception"]["traceback"]


@pytest.mark.parametrize(
    ("level", "own", "libraries"),
    [
        ("debug", {"debug", "info", "warning", "error"}, {"info", "warning", "error"}),
        ("info", {"info", "warning", "error"}, {"warning", "error"}),
        ("warning", {"warning", "error"}, {"warning", "error"}),
        ("error", {"error"}, {"error"}),
    ],
)
def test_levels(level, own, libraries):
    stream = log_to("json", level)
    for name in ("hivetrain.swarm", "httpx"):
        for severity in logs.LEVELS:
            getattr(logging.getLogger(name), severity)("x")
    heard = [(event["logger"], event["level"]) for event in events(stream)]
    assert {severity for name, severity in heard if name == "hivetrain.swarm"} == own
    assert {severity for name, severity in heard if name == "httpx"} == libraries


def test_setting_up_twice_writes_once():
    log_to("text")
    stream = log_to("json")
    logging.getLogger("hivetrain").info("once")
    assert len(events(stream)) == 1


def test_warnings_are_events():
    stream = log_to("json")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = logs._log_warning
        warnings.warn("two\nlines", UserWarning, stacklevel=1)
    (event,) = events(stream)
    assert event["logger"] == "py.warnings"
    assert event["message"].startswith("UserWarning: two\nlines (")


@pytest.mark.parametrize("form", logs.FORMATS)
@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ('{"secretSeed": "%s", "ss58Address": "5F"}', SEED),
        ("secret_phrase=%s", "'bottom drive obey lake curtain smoke'"),
        ("bad file: {'secretPhrase': '%s'}", "bottom drive obey lake"),
        ("password: %s", "hunter22"),
        ("privateKey=%s,", SEED),
        ("api_key = %s", "abcdef0123"),
        ("Authorization: Bearer %s", "abc.def"),
        ("GET https://me:%s@ledger.example/x", "pa55"),
    ],
)
def test_what_looks_like_a_secret_is_struck_out(form, text, secret):
    stream = log_to(form)
    logging.getLogger("hivetrain").info(text, secret)
    try:
        raise RuntimeError(text % secret)
    except RuntimeError:
        logging.getLogger("hivetrain").exception("failed")
    assert secret not in stream.getvalue()
    assert "***" in stream.getvalue()


def test_digests_and_addresses_are_left_as_they_are():
    stream = log_to("text")
    line = f"params {SEED}, http://127.0.0.1:80/return_dht_address, 5 tokens/s: /ip4/1.2.3.4/tcp/1/p2p/Qm"
    logging.getLogger("hivetrain").info("%s", line)
    assert line in stream.getvalue()


def test_a_hotkey_never_reaches_a_log(tmp_path):
    from hivetrain.keys import Hotkey, Wallet

    stream = log_to("json", "debug")
    seed = bytes(range(32))
    wallet = Wallet("w", "h", str(tmp_path))
    wallet.hotkey_file.parent.mkdir(parents=True)
    wallet.hotkey_file.write_text(f'{{"secretSeed": "0x{seed.hex()}", broken')
    logging.getLogger("hivetrain").info("%s %r", Hotkey.from_seed(seed), Hotkey.from_seed(seed))
    try:
        wallet.load()
    except UserError:
        logging.getLogger("hivetrain").exception("failed")
    assert len(events(stream)) == 2
    assert seed.hex() not in stream.getvalue().lower()


RAISE = """
import sys, threading
from hivetrain import logs
logs.setup("info", sys.argv[1])
def fail():
    raise RuntimeError("lost\\nall")
thread = threading.Thread(target=fail)
thread.start()
thread.join()
fail()
"""


def test_uncaught_exceptions_are_one_json_event_each():
    ended = run(RAISE, "json")
    assert ended.returncode == 1
    heard = [json.loads(line) for line in ended.stderr.splitlines()]
    assert [(event["level"], event["exception"]["type"]) for event in heard] == [("critical", "RuntimeError")] * 2


def test_uncaught_exceptions_keep_their_traceback_in_text():
    ended = run(RAISE, "text")
    assert ended.returncode == 1
    assert ended.stderr.count("Traceback (most recent call last):") == 2
    assert [line for line in ended.stderr.splitlines() if not line.startswith(" ")] == [
        line for line in ended.stderr.splitlines() if " CRITICAL hivetrain.logs: " in line
    ]


LIBRARIES = """
import sys, logging
from hivetrain import logs
if sys.argv[1] == "before":
    logs.setup("info", "json")
import hivemind, transformers, datasets, lightning.pytorch
if sys.argv[1] == "after":
    logs.setup("info", "json")
for name in ("hivemind.dht.node", "transformers.modeling_utils", "datasets.load", "lightning.pytorch.trainer"):
    logging.getLogger(name).info("noise")
    logging.getLogger(name).warning("warned")
    logging.getLogger(name).error("erred")
hivemind.utils.get_logger("hivemind.p2p").error("from its own function")
"""


@pytest.mark.parametrize("moment", ["before", "after"])
def test_libraries_speak_through_our_handler_and_only_from_warnings_up(moment):
    ended = run(LIBRARIES, moment)
    assert ended.returncode == 0, ended.stderr
    heard = [json.loads(line) for line in ended.stderr.splitlines()]
    assert [(event["logger"].partition(".")[0], event["level"]) for event in heard] == [
        (name, level)
        for name in ("hivemind", "transformers", "datasets", "lightning")
        for level in ("warning", "error")
    ] + [("hivemind", "error")]


def test_the_options_are_taken_out_of_any_programs_arguments(capsys):
    others = ["-c", "a.yaml", "--trainer.max_epochs", "-1", "--trainer.logger=false", "sub", "--", "--x"]
    assert (
        logs.setup_from([*others[:3], "--log_format", "json", *others[3:5], "--log-level=error", *others[5:]]) == others
    )
    logging.getLogger("hivetrain").error("a")
    logging.getLogger("hivetrain").warning("b")
    assert json.loads(capsys.readouterr().err)["message"] == "a"
    assert logs.setup_from(["--log-levels", "x"]) == ["--log-levels", "x"]
    logging.getLogger("hivetrain").info("c")
    assert capsys.readouterr().err.endswith(" INFO hivetrain: c\n")


@pytest.mark.parametrize("wrong", [["--log-format", "xml"], ["--log-level=loud"], ["--log-level"]])
def test_a_wrong_option_says_what_there_is(wrong):
    with pytest.raises(UserError, match=r"--log-(format|level).*(choose from|expected one argument)"):
        logs.setup_from(wrong)


def test_a_users_mistake_is_an_event_where_events_are_json(capsys):
    stream = log_to("json")
    logs.tell_user("hivetrain fit", UserError("no peers"))
    (event,) = events(stream)
    assert (event["level"], event["message"]) == ("error", "hivetrain fit: no peers")
    log_to("text")
    logs.tell_user("hivetrain fit", UserError("no peers"))
    assert capsys.readouterr().err == "hivetrain fit: error: no peers\n"


def test_a_users_mistake_that_quotes_a_peer_cannot_reach_the_terminal(capsys):
    log_to("text")
    logs.tell_user("hivetrain fit", UserError("model is \x1b[2J\nhivetrain: all is well\u202e there"))
    assert capsys.readouterr().err == (
        "hivetrain fit: error: model is \\x1b[2J\\nhivetrain: all is well\\u202e there\n"
    )


def test_text_for_a_line_is_cut_after_it_was_escaped():
    assert logs.one_line("d\u00e9j\u00e0 vu", 40) == "d\u00e9j\u00e0 vu"
    assert len(logs.one_line("\x1b" * 1000, 40)) < 50
    assert logs.one_line("\ud800").isascii()  # which could not be printed at all
