"""The logs of every program: one line for each event on stderr, as text or as JSON.

Surprising fact: hivemind, Lightning and transformers give themselves handlers when they are imported, which may be long
after :func:`setup`; so it takes those handlers away at that moment, and what these libraries say comes out like the
rest, from warnings up.
"""

import argparse
import json
import logging
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal, TextIO

import wrapt

from hivetrain.errors import UserError

Level = Literal["debug", "info", "warning", "error"]
Format = Literal["text", "json"]

LEVELS: tuple[Level, ...] = ("debug", "info", "warning", "error")
FORMATS: tuple[Format, ...] = ("text", "json")
MAX_CHARS = 8192

# Packages that install a handler of their own when they are imported.
_WITH_HANDLERS = ("hivemind", "lightning", "lightning.fabric", "lightning.pytorch", "transformers", "datasets")
_NAMES = {
    logging.DEBUG: "DEBUG",
    logging.INFO: "INFO",
    logging.WARNING: "WARNING",  # hivemind gives this level another name
    logging.ERROR: "ERROR",
    logging.CRITICAL: "CRITICAL",
}
# What would end a line, or speak to the terminal that shows it: peers choose parts of what is logged.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_CREDENTIALS = re.compile(r"(://)[^/\s@]+@")
_SECRETS = re.compile(
    r"""((?:secret[_-]?(?:seed|phrase|key)|private[_-]?key|mnemonic|passw(?:or)?d|passphrase|api[_-]?key|authorization)
    ["']?\s*[:=]\s*)("[^"]*"|'[^']*'|Bearer\s+\S+|[^\s,;}]+)""",
    re.IGNORECASE | re.VERBOSE,
)

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--log-level`` and ``--log-format``, the same for every program."""
    options = parser.add_argument_group("logs")
    options.add_argument(
        "--log-level", "--log_level", choices=LEVELS, default="info", help="what goes to stderr (default: %(default)s)"
    )
    options.add_argument(
        "--log-format", "--log_format", choices=FORMATS, default="text", help="of its lines (default: %(default)s)"
    )


def setup_from(arguments: Sequence[str]) -> list[str]:
    """Set up what the two options among a program's arguments ask for, and return the other arguments.

    Raises:
        UserError: an option has a value that it cannot have.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    add_arguments(parser)
    setup()  # what is wrong with the options is said in words
    try:
        options, others = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error
    setup(options.log_level, options.log_format)
    return others


def setup(level: Level = "info", form: Format = "text", stream: TextIO | None = None) -> None:
    """Send all logs, warnings and uncaught exceptions to stderr; a second call replaces the first.

    Args:
        level: least level of our own events. Libraries are heard from warnings up, with ``debug`` from ``info`` up.
        form: ``text`` for people, ``json`` for programs that collect logs.
        stream: where to write; None is whatever ``sys.stderr`` is at the time, which a live display may replace.
    """
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _Lines)]:
        root.removeHandler(handler)
    handler = _Lines(stream)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    root.addHandler(handler)
    own = logging.getLevelNamesMapping()[level.upper()]
    root.setLevel(logging.INFO if level == "debug" else max(own, logging.WARNING))
    logging.getLogger("hivetrain").setLevel(own)
    for package in _WITH_HANDLERS:
        wrapt.register_post_import_hook(_take_handlers, package)
    warnings.showwarning = _log_warning  # type: ignore[assignment]  # its last arguments are of no use here
    sys.excepthook = _log_uncaught
    threading.excepthook = lambda args: _log_uncaught(args.exc_type, args.exc_value, args.exc_traceback)


def tell_user(program: str, error: Exception) -> None:
    """Show the one line that ends a program: an event where events are JSON, else plain words."""
    if any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers):
        logger.error("%s: %s", program, error)
    else:
        print(f"{program}: error: {one_line(str(error))}", file=sys.stderr)


def one_line(text: str, max_chars: int = MAX_CHARS) -> str:
    """The text as it may be shown on a terminal: control characters escaped, its middle left out where it is long."""
    shown = _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), _without_secrets(text))
    return _cut(shown, max_chars)


class TextFormatter(logging.Formatter):
    """``2026-01-31 23:59:59 INFO hivetrain.swarm: joined``; a traceback follows on lines of its own, indented."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created).strftime("%Y-%m-%d %H:%M:%S")
        lines = [f"{moment} {_level(record)} {record.name}: {one_line(record.getMessage())}"]
        if record.exc_info and record.exc_info[0] is not None:
            lines += [f"    {one_line(line)}" for line in _traceback(record).splitlines()]
        return "\n".join(lines)


class JsonFormatter(logging.Formatter):
    """One object: ``time`` (UTC), ``level``, ``logger``, ``message``, ``pid``, and ``exception`` where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        event: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": _level(record).lower(),
            "logger": record.name,
            "message": _without_secrets(record.getMessage()),
            "pid": record.process,
        }
        if record.exc_info and record.exc_info[0] is not None:
            event["exception"] = {
                "type": record.exc_info[0].__name__,
                "message": _without_secrets(str(record.exc_info[1])),
                "traceback": _without_secrets(_traceback(record)),
            }
        return json.dumps(event)


class _Lines(logging.StreamHandler):
    """Writes each event at once, so that those of forked processes do not mix."""

    def __init__(self, stream: TextIO | None) -> None:
        super().__init__(stream)
        self._follow = stream is None

    def emit(self, record: logging.LogRecord) -> None:
        if self._follow:
            self.stream = sys.stderr
        super().emit(record)


def _take_handlers(package: Any) -> None:
    """Let a library's events come to our handler, at our level."""
    log = logging.getLogger(package.__name__)
    log.handlers = []
    log.propagate = True
    log.setLevel(logging.NOTSET)


def _log_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
    logging.getLogger("py.warnings").warning("%s: %s (%s:%d)", category.__name__, message, filename, lineno)


def _log_uncaught(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt | SystemExit):
        return
    info = (kind, error if error is not None else kind(), trace)
    logger.critical("the program or one of its threads ended by %s: %s", kind.__name__, error, exc_info=info)


def _level(record: logging.LogRecord) -> str:
    return _NAMES.get(record.levelno, record.levelname)


def _traceback(record: logging.LogRecord) -> str:
    assert record.exc_info is not None
    return "".join(traceback.format_exception(*record.exc_info))


def _without_secrets(text: str) -> str:
    """The text with what looks like a secret struck out, and not longer than a log line should be."""
    return _SECRETS.sub(r"\1***", _CREDENTIALS.sub(r"\1***@", _cut(text, MAX_CHARS)))


def _cut(text: str, max_chars: int) -> str:
    return text if len(text) <= max_chars else f"{text[: max_chars // 2]} [...] {text[-max_chars // 2 :]}"
