import subprocess
import sys
from importlib import metadata

import pytest

pytest.importorskip("tvm")

from grape_compile.errors import EngineError
from grape_compile.kernels.tensorir import engine


def pretend(monkeypatch: pytest.MonkeyPatch, **installed: str) -> None:
    def version(name: str) -> str:
        key = name.replace("-", "_")
        if key not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[key]

    monkeypatch.setattr(metadata, "version", version)


@pytest.mark.parametrize(
    ("installed", "found"),
    [
        ({}, "no package apache-tvm"),
        ({"tvm": "1.0"}, "`tvm` 1.0, which is not Apache TVM"),
        ({"apache_tvm": "0.27.0.post1", "apache_tvm_ffi": "0.1.15.post2"}, "apache-tvm-ffi 0.1.15.post2"),
        ({"apache_tvm": "0.26.0", "apache_tvm_ffi": "0.1.14.post0"}, "apache-tvm 0.26.0"),
    ],
)
def test_a_wrong_installation_names_the_right_one(
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], found: str
) -> None:
    pretend(monkeypatch, **installed)
    with pytest.raises(EngineError) as raised:
        engine.check_installation()
    assert found in raised.value.found
    assert 'pip install "apache-tvm==0.27.0.post1" "apache-tvm-ffi==0.1.14.post0"' in raised.value.works


def test_the_check_comes_before_anything_can_crash() -> None:
    """In a process where nothing is installed by that name, the engine raises and has not imported TVM."""
    code = (
        "import sys, importlib.metadata as m\n"
        "def version(name): raise m.PackageNotFoundError(name)\n"
        "m.version = version\n"
        "try:\n    import grape_compile.kernels.tensorir.engine\n"
        "except ImportError as error:\n    print(type(error).__name__, 'tvm' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["EngineError", "False"]


@pytest.mark.parametrize(
    "tag", ["nvidia/nvidia-a100", "nvidia/nvidia-h100", "nvidia/geforce-rtx-4090", "raspberry-pi/4b-aarch64"]
)
def test_tags_are_targets(tag: str) -> None:
    assert engine.is_gpu(engine.to_target(tag)) == tag.startswith("nvidia")


def test_the_host_is_itself() -> None:
    target = engine.to_target("llvm")
    assert target.kind.name == "llvm"
    assert str(target.attrs["mcpu"]) != "generic"
    assert engine.to_target({"kind": "llvm", "mcpu": "skylake-avx512"}).attrs["mcpu"] == "skylake-avx512"


@pytest.mark.parametrize(
    ("target", "works"),
    [
        ("nvidia/h100", "nvidia/nvidia-h100"),
        ("raspberry-pi/4", "raspberry-pi/4b-aarch64"),
        ("cuda", "nvidia/nvidia-h100"),
        ({"kind": "sundial"}, "a dict such as"),
    ],
)
def test_an_unknown_target_names_those_near(target: str | dict[str, str], works: str) -> None:
    with pytest.raises(EngineError) as raised:
        engine.to_target(target)
    assert works in raised.value.works
