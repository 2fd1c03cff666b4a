"""One clear line for each way in which a configuration can be wrong.

Surprising fact: the parser knows what is wrong but often not where ("Option 'moniter' is not accepted"), so the place
is found again by walking the files and flags that were given.
"""

import difflib
import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

ROOTS = {
    "trainer": "lightning.pytorch.Trainer",
    "model": "hivetrain.model.CausalLM",
    "data": "hivetrain.data.RefinedWebDataModule",
    "stop": "hivetrain.callbacks.StopAtSwarmEpoch",
    "checkpoint": "hivetrain.callbacks.SwarmCheckpoint",
    "sample": "hivetrain.callbacks.GenerationSample",
    "report": "hivetrain.callbacks.MinerReport",
    "progress": "hivetrain.callbacks.SwarmProgress",
    "contribute": "hivetrain.callbacks.ContributionPublisher",
    "status": "hivetrain.callbacks.SwarmStatus",
    "metrics": "hivetrain.callbacks.SwarmMetrics",
    "energy": "hivetrain.callbacks.EnergyUse",
    "seed_everything": "",
    "ckpt_path": "",
    "config": "",
}
BESIDE_CLASS_PATH = frozenset({"class_path", "init_args", "dict_kwargs"})
SHORT_NAMES = (
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.pytorch.strategies",
    "hivetrain.callbacks",
    "hivetrain.strategies",
    "hivetrain.data",
    "hivetrain.model",
)


@dataclass(frozen=True)
class Place:
    """Where a key stands: its dotted path, the file or flag, and what its neighbours may be called."""

    path: str
    source: str
    owner: str
    allowed: frozenset[str]

    @property
    def name(self) -> str:
        """The key itself."""
        return self.path.rpartition(".")[2]


def describe(message: str, arguments: Sequence[str]) -> str:
    """Rewrite the parser's message as one line that names the key, its place and the nearest valid key.

    Args:
        message: What jsonargparse reported.
        arguments: The command line, without the command.
    """
    unknown = _unknown_key(message)
    if unknown is not None:
        return _describe_unknown(unknown, arguments)
    wrong = _innermost(message)
    if wrong is None:
        return " ".join(message.split())
    outer, key, problem = wrong
    if key == "config":
        return problem.strip()
    name = key.rpartition(".")[2]
    places = [place for place in _places(arguments) if place.name == name and place.path.startswith(outer)]
    where = f"{places[0].source}{places[0].path}" if places else f"{outer}.{key}" if outer != key else key
    return f"{where}: {_type_problem(problem)}"


def _innermost(message: str) -> tuple[str, str, str] | None:
    """The outermost key that the message names, the innermost, and what is said of that one."""
    lines = message.splitlines()
    keys = [
        (index, found[1]) for index, line in enumerate(lines) if (found := re.search(r'Parser key "([^"]+)":', line))
    ]
    if not keys:
        return None
    start, key = keys[-1]
    indent = len(lines[start]) - len(lines[start].lstrip())
    block = [lines[start].partition('":')[2]]
    for line in lines[start + 1 :]:
        if len(line) - len(line.lstrip()) <= indent:
            break
        block.append(line)
    return keys[0][1], key, "\n".join(block)


def _unknown_key(message: str) -> str | None:
    for pattern in (
        r"Option '([^']+)' is not accepted",
        r"does not accept option '([^']+)'",
        r"unrecognized arguments: -*([^\s=]+)",
    ):
        found = re.search(pattern, message)
        if found:
            return found[1]
    return None


def _describe_unknown(unknown: str, arguments: Sequence[str]) -> str:
    everywhere = list(_places(arguments))
    places = [place for place in everywhere if place.name in unknown.split(".") or place.path == unknown]
    if unknown == "class_path":  # the parser blames it for a stray key beside it
        places = [place for place in everywhere if place.allowed == BESIDE_CLASS_PATH]
    strange = [place for place in places if place.allowed and place.name not in place.allowed]
    place = next(iter(strange or places), None)
    if place is None:
        return f"unknown option {unknown!r}{_nearest(unknown, frozenset(ROOTS))}"
    owner = f" of {place.owner}" if place.owner else ""
    return f"{place.source}{place.path} is not an option{owner}{_nearest(place.name, place.allowed)}"


def _nearest(name: str, allowed: frozenset[str]) -> str:
    near = difflib.get_close_matches(name, allowed, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _type_problem(problem: str) -> str:
    """The first reason given, with Python's type syntax taken off."""
    value = re.search(r"(?:Given value|Got value): (.*)", problem, re.DOTALL)
    reasons = re.findall(r"^\s*- (.+)$", problem, re.MULTILINE)
    given = f", got {' '.join(value[1].split())[:200]!r}" if value else ""
    if reasons and not reasons[0].startswith("Expected a <class"):
        first = re.search(r"^\s*- (.+?)(?=^\s*- |^\s*Given value|\Z)", problem, re.MULTILINE | re.DOTALL)
        return " ".join((first[1] if first else reasons[0]).split())
    if reasons:
        types = [found for reason in reasons for found in re.findall(r"Expected a <class '(?:\w+\.)*(\w+)'>", reason)]
        names = ["null" if name == "NoneType" else name for name in types]
        return f"expected {' or '.join(names)}{given}"
    single = re.search(r"Expected an? <class '(?:\w+\.)*(\w+)'>", problem)
    return f"expected {single[1]}{given}" if single else " ".join(problem.split())


def _places(arguments: Sequence[str]) -> Iterator[Place]:
    """Every key of the command line and of the files it names."""
    files, flags = _read(arguments)
    merged: dict[str, Any] = {}
    for document in files.values():
        merged.update(document)
    for flag in flags:
        yield _flag_place(flag, merged)
    for source, document in files.items():
        yield from _walk(document, "", f"{source}: ", "", frozenset(ROOTS))


def _read(arguments: Sequence[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    files: dict[str, dict[str, Any]] = {}
    flags: list[str] = []
    for index, argument in enumerate(arguments):
        flag, _, value = argument.partition("=")
        if flag in ("-c", "--config"):
            path = Path(value or "".join(arguments[index + 1 : index + 2]))
            document = yaml.safe_load(path.read_text()) if path.is_file() else None
            if isinstance(document, dict):
                files[str(path)] = document
        elif flag.startswith("--"):
            flags.append(flag[2:])
    return files, flags


def _walk(node: Any, path: str, source: str, owner: str, allowed: frozenset[str]) -> Iterator[Place]:
    if isinstance(node, list):
        for index, item in enumerate(node):
            yield from _walk(item, f"{path}[{index}]", source, "", frozenset())
    if not isinstance(node, dict):
        return
    if "class_path" in node:
        owner = str(node["class_path"])
        for key, value in node.items():
            if key == "init_args":
                yield from _walk(value, f"{path}.init_args", source, owner, _options(owner))
            else:
                yield Place(f"{path}.{key}", source, f"an entry with class_path {owner}", BESIDE_CLASS_PATH)
        return
    for key, value in node.items():
        below = f"{path}.{key}" if path else str(key)
        yield Place(below, source, owner, allowed)
        child = ROOTS.get(below, "")
        yield from _walk(value, below, source, child, _options(child))


def _flag_place(flag: str, merged: dict[str, Any]) -> Place:
    """Place of a flag such as ``--trainer.strategy.run_id``; its class may stand in a file."""
    *parents, name = [part for part in flag.split(".") if part != "init_args"]
    if not parents or parents[0] not in ROOTS:
        return Place(parents[0] if parents else name, "--", "", frozenset(ROOTS))
    owner = ROOTS.get(parents[0], "") if len(parents) == 1 else ""
    node: Any = merged
    for part in parents:
        node = node.get("init_args", node).get(part) if isinstance(node, dict) else None
    if isinstance(node, dict) and "class_path" in node:
        owner = str(node["class_path"])
    return Place(flag, "--", owner, _options(owner) if owner else frozenset())


def _options(class_path: str) -> frozenset[str]:
    """The constructor arguments of a class, inherited ones included; empty if there is no such class."""
    module_name, _, name = class_path.rpartition(".")
    for module in (module_name,) if module_name else SHORT_NAMES:
        try:
            found = getattr(import_module(module), name, None) if name else None
        except ImportError:
            continue
        if isinstance(found, type):
            inherited = [vars(base).get("__init__") for base in found.__mro__ if base is not object]
            signatures = [inspect.signature(init) for init in inherited if init is not None]
            return frozenset(name for signature in signatures for name in signature.parameters) - {"self"}
    return frozenset()
