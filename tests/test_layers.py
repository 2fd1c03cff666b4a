"""Imports point down only: the layers of the package, read off the syntax trees of all its modules."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = {
    3: ("cli", "fit_cli", "config_errors", "commands", "demo", "dashboard", "doctor"),
    2: ("strategies", "callbacks", "validator", "bootstrap", "monitor"),
    1: ("swarm", "averaging", "scoring", "chain", "contribution.audit", "metrics", "sqlite_file", "validator.watch"),
    0: (
        "chain.base",
        "chain.yuma",
        "contribution",
        "keys",
        "model",
        "data",
        "errors",
        "ending",
        "logs",
        "loggers",
        "serving",
    ),
}
# Third-party packages that only these parts may import.
RESERVED = {
    "hivemind": ("swarm", "averaging", "strategies", "bootstrap"),
    "bittensor": ("chain.bittensor",),
}


def package_files() -> list[Path]:
    files = [
        *(ROOT / "hivetrain").rglob("*.py"),
        *(ROOT / "miners").rglob("*.py"),
        *(ROOT / "validators").rglob("*.py"),
    ]
    return sorted(path for path in files if path != ROOT / "hivetrain" / "__init__.py")


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(source: str) -> set[str]:
    """Every module that the source imports, at any depth; ``from a import b`` counts as ``a.b``."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.update(f"{node.module}.{name.name}" for name in node.names)
    return found


def layer_of(module: str) -> int | None:
    """Layer of a module of the project; None for others. The longest name in the table decides."""
    if module.partition(".")[0] in ("miners", "validators"):
        return 3
    if module.partition(".")[0] != "hivetrain" or module == "hivetrain":
        return None
    name = module.removeprefix("hivetrain.")
    matches = [
        (len(part), layer)
        for layer, parts in LAYERS.items()
        for part in parts
        if name == part or name.startswith((f"{part}.", f"{part}_"))
    ]
    assert matches, f"{module} is in no layer: add its part to LAYERS"
    return max(matches)[1]


def part_is(module: str, part: str) -> bool:
    return module == f"hivetrain.{part}" or module.startswith((f"hivetrain.{part}.", f"hivetrain.{part}_"))


def offences(module: str, source: str) -> list[str]:
    found = []
    for imported in sorted(imports_of(source)):
        other = layer_of(imported)
        if other is not None and other > layer_of(module):
            found.append(f"{module} (layer {layer_of(module)}) imports {imported} (layer {other})")
        for package, parts in RESERVED.items():
            if imported.partition(".")[0] == package and not any(part_is(module, part) for part in parts):
                found.append(f"{module} imports {package}, which only {', '.join(parts)} may")
        for one, another in (("chain", "swarm"), ("swarm", "chain")):
            if part_is(module, one) and part_is(imported, another):
                found.append(f"{module} imports {imported}: chain and swarm never import each other")
    return found


@pytest.mark.parametrize("path", package_files(), ids=module_of)
def test_imports_point_down_only(path: Path) -> None:
    assert offences(module_of(path), path.read_text()) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("hivetrain.model", "from hivetrain.strategies import HivemindStrategy"),
        ("hivetrain.model", "def late():\n    import hivetrain.swarm"),
        ("hivetrain.callbacks.report", "import hivetrain.cli"),
        ("hivetrain.chain.base", "from hivetrain.chain import local"),
        ("hivetrain.chain.local", "from hivetrain.swarm import start_dht"),
        ("hivetrain.swarm", "from hivetrain.chain.base import Chain"),
        ("hivetrain.callbacks.progress", "import hivemind"),
        ("hivetrain.validator", "from bittensor import Subtensor"),
    ],
)
def test_an_upward_or_foreign_import_is_found(module: str, source: str) -> None:
    assert len(offences(module, source)) == 1


def test_a_downward_import_is_allowed() -> None:
    assert offences("hivetrain.validator", "from hivetrain.chain.base import Chain\nimport torch") == []
    assert offences("hivetrain.strategies.hivemind", "import hivemind\nfrom hivetrain.swarm import start_dht") == []
