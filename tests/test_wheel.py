"""The wheel: what an installed hivetrain has of the tree's files."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


def test_a_wheel_holds_every_file_of_the_package(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(ROOT / "hivetrain", source / "hivetrain", ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    files = {str(path.relative_to(source)) for path in (source / "hivetrain").rglob("*") if path.is_file()}
    subprocess.run([sys.executable, "-c", BUILD, str(out)], cwd=source, check=True, capture_output=True, timeout=120)
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        assert files - set(packed.namelist()) == set()
    assert "hivetrain/demo/validator.yaml" in files
