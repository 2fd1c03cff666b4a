"""Every command line that README and docs/ quote is one that its program takes; README's defaults are the real ones."""

import inspect
import re
import shlex
from pathlib import Path

import pytest
import yaml

from hivetrain.cli import LIGHTNING_COMMANDS, _parser, main
from hivetrain.data import RefinedWebDataModule
from hivetrain.model import CausalLM
from hivetrain.strategies import HivemindStrategy

ROOT = Path(__file__).parent.parent
PROGRAMS = {"python miners/miner.py": "hivetrain fit", "python validators/validator.py": "hivetrain score"}
COMMANDS = _parser()._subparsers._group_actions[0].choices


def command_lines():
    """Command and arguments, and whether that is all of the line: in running text it may be a part."""
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = re.sub(r" *\\\n *", " ", page.read_text())
        blocks = re.findall(r"^ {4,}(?:Exec\w+=\+?\S*/)?((?:hivetrain|python) .*)", text, re.MULTILINE)
        whole = [part for line in blocks for part in line.split(" && ")]
        whole += [f"hivetrain demo {arguments}" for arguments in re.findall(r'make demo ARGS="(.*?)"', text)]
        for line in dict.fromkeys([*whole, *re.findall(r"`((?:hivetrain|python) [^`]+)`", text)]):
            called = line
            for program, name in PROGRAMS.items():
                called = called.replace(program, name)
            program, command, *arguments = [word for word in shlex.split(called, comments=True) if word != "..."]
            if program == "hivetrain" and (line in whole or command in COMMANDS) or command.startswith("benchmarks/"):
                yield pytest.param(command, arguments, line in whole, id=f"{page.name}: {line}")


def options_of(parser):
    """Of an argparse parser and of those of its own commands."""
    for action in parser._actions:
        yield from action.option_strings
        for nested in (action.choices or {}).values() if hasattr(action, "add_parser") else ():
            yield from options_of(nested)


@pytest.mark.parametrize(("command", "arguments", "whole"), command_lines())
def test_a_quoted_command_line_is_understood(command, arguments, whole, monkeypatch):
    monkeypatch.chdir(ROOT)
    options = {option for word in arguments for option in re.findall(r"^\[?(--?[\w.-]+)", word)}
    if command.startswith("benchmarks/"):
        assert all(f'"{option}"' in (ROOT / command).read_text() for option in options)
    elif command in (*LIGHTNING_COMMANDS, "score"):
        ours = [f"configs/{Path(word).name}" if word.endswith(".yaml") else word for word in arguments]
        try:
            status = main([command, *ours, "--print_config"])
        except SystemExit as end:
            status = end.code
        assert not status
    elif whole:
        _parser().parse_args([command, *arguments])
    else:
        assert options <= set(options_of(COMMANDS[command]))


def documented_defaults():
    """(key, default) of README's table, where the default is a number or in code."""
    for keys, default in re.findall(
        r"^\| (`[a-z].*?) \|.*\| (.*?) \|$", (ROOT / "README.md").read_text(), re.MULTILINE
    ):
        first, *others = re.findall("`(.*?)`", keys)
        names = [first, *(f"{first.rpartition('.')[0]}.{other.rpartition('.')[2]}" for other in others)]
        values = default.split(", ")
        if all(re.fullmatch(r"`.*`|[\d.e-]+", value) for value in values):
            yield from zip(names, (yaml.safe_load(value.strip("`")) for value in values), strict=True)


def test_the_defaults_in_the_readme_are_those_of_the_program():
    classes = {"trainer.strategy": HivemindStrategy, "model": CausalLM, "data": RefinedWebDataModule}
    documented = dict(documented_defaults())
    assert len(documented) >= 12
    for key, value in documented.items():
        place, _, name = key.rpartition(".")
        default = inspect.signature(classes[place]).parameters[name].default
        assert (float(value) if isinstance(default, float) else value) == default, key


def test_the_readmes_tree_has_every_file_of_averaging():
    tree = (ROOT / "README.md").read_text().partition("      averaging/ ")[2].partition("      contribution/ ")[0]
    assert {path.stem for path in (ROOT / "hivetrain" / "averaging").glob("[a-z]*.py")} <= set(re.findall(r"\w+", tree))
