"""The rooms stay apart: import rules that bite, one name per module, nothing loaded unasked."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BACKENDS = ("triton", "onnx", "onnxscript", "onnxruntime", "tvm", "transformers", "typer", "rich")


def python(program: str) -> str:
    """What a fresh interpreter prints; the repository is importable in it whether or not it is installed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_no_backend() -> None:
    program = f"""
import sys, torch
before = set(sys.modules)
import grape_compile
from grape_compile import *
print(sorted({{name.partition(".")[0] for name in set(sys.modules) - before}} & set({BACKENDS!r})))
"""
    assert python(program) == "[]"


@pytest.mark.parametrize("module", ["grape_compile.encoding", "grape_compile.errors"])
def test_the_ground_floor_works_without_torch(module: str) -> None:
    program = f"""
import sys, types
sys.modules["torch"] = None
package = sys.modules["grape_compile"] = types.ModuleType("grape_compile")
package.__path__ = [{str(ROOT / "grape_compile")!r}]
import {module}
print(sys.modules["{module}"].__name__)
"""
    assert python(program) == module


def test_no_module_under_two_names() -> None:
    program = """
import importlib.util, os, pkgutil, sys
import grape_compile
for module in pkgutil.walk_packages(grape_compile.__path__, "grape_compile."):
    if ".bodies." not in module.name or importlib.util.find_spec("triton"):
        importlib.import_module(module.name)
assert "grape_compile.passes.site" in sys.modules
names = {}
for name, module in list(sys.modules.items()):
    if file := getattr(module, "__file__", None):
        names.setdefault(os.path.realpath(file), set()).add(module.__spec__.name if module.__spec__ else name)
root = os.path.dirname(os.path.dirname(os.path.realpath(grape_compile.__file__)))
twice = {
    file: found
    for file, found in names.items()
    if len(found) > 1 and file.startswith(root) and "site-packages" not in file
}
print(twice, {"passes", "export"} & set(sys.modules))
"""
    assert python(program) == "{} set()"


def test_this_test_run_loads_each_module_once() -> None:
    bare = [name for name in sys.modules if name.partition(".")[0] in {"passes", "export"}]
    assert not bare


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    environment = os.environ | {"PYTHONPATH": str(root)}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's sources, links included, where a test may plant something."""
    root = tmp_path_factory.mktemp("rooms")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copy(ROOT / "pyproject.toml", root)
    for folder in ("grape_compile", "passes", "export"):
        shutil.copytree(ROOT / folder, root / folder, symlinks=True, ignore=ignored)
    return root


def test_the_import_rules_hold(copy: Path) -> None:
    done = lint(copy)
    assert done.returncode == 0, done.stdout
    assert "passes" in done.stdout


@pytest.mark.parametrize(
    ("file", "line", "rule"),
    [
        ("grape_compile/encoding/__init__.py", "import torch", "ground floor"),
        ("grape_compile/errors.py", "import torch", "ground floor"),
        ("grape_compile/encoding/__init__.py", "import grape_compile.operators", "rooms"),
        ("grape_compile/operators/__init__.py", "import grape_compile.passes", "rooms"),
        ("grape_compile/operators/__init__.py", "import triton", "no backend"),
        ("grape_compile/operators/providers.py", "import grape_compile.kernels.turning", "rooms"),
        ("passes/lower.py", "import grape_compile.kernels", "rooms"),
        ("grape_compile/kernels/launch.py", "import grape_compile.tuning", "rooms"),
        ("grape_compile/records/log.py", "import torch", "ground floor"),
        ("passes/site.py", "import grape_compile.export", "rooms"),
        ("passes/site.py", "import grape_compile.reporting", "rooms"),
        ("passes/site.py", "import transformers", "no backend"),
        ("passes/site.py", "from grape_compile import inspect", "facade"),
        ("export/__init__.py", "from grape_compile import rewrite", "facade"),
        ("grape_compile/reporting.py", "import pytest", "tests"),
    ],
)
def test_a_planted_import_is_found(copy: Path, file: str, line: str, rule: str) -> None:
    planted = copy / file
    text = planted.read_text(encoding="utf-8")
    planted.write_text(f"{text}\n\ndef planted() -> None:\n    {line}\n", encoding="utf-8")
    try:
        done = lint(copy)
    finally:
        planted.write_text(text, encoding="utf-8")
    assert done.returncode == 1
    assert re.search(rf"{rule}.* BROKEN", done.stdout)


def test_a_room_that_no_rule_knows_is_found(copy: Path) -> None:
    room = copy / "grape_compile" / "attic.py"
    room.touch()
    try:
        done = lint(copy)
    finally:
        room.unlink()
    assert done.returncode == 1
    assert "attic" in done.stdout
