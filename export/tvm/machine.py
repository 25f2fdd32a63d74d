"""The virtual machine that runs a compiled model, and its files. Nothing in here needs torch."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from grape_compile.errors import EngineError, GrapeError, first_line
from grape_compile.kernels.tensorir.engine import INSTALL, Target, load_module, relax, tvm, versions

#: Where the compiled function reads tensors from without a copy: what the code of a CPU is made for.
ALIGNED: Final = 64
_LINKERS: Final = ("g++", "c++", "clang++", "clang")
_INSTRUCTIONS: Final = (
    "sse",
    "ssse",
    "avx",
    "fma",
    "f16c",
    "bmi",
    "amx",
    "neon",
    "sve",
    "dotprod",
    "fullfp16",
)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep back what TVM's C++ prints on stderr on its way; what fails is raised all the same."""
    with contextlib.ExitStack() as undo:
        sys.stderr.flush()
        kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        undo.callback(os.close, kept)
        undo.callback(os.dup2, kept, 2)
        os.dup2(nowhere, 2)
        os.close(nowhere)
        yield


#: Arrays of the arguments in, arrays of the results out.
Runner = Callable[[Sequence[np.ndarray[Any, Any]]], list[np.ndarray[Any, Any]]]


def runner(code: Any, target: Mapping[str, Any], device: str, weights: Sequence[Any]) -> Runner:
    """Return what runs a compiled module on a device of this machine; GrapeError where it is made for another."""
    obstacle = runs_here(Target(dict(target)))
    if obstacle:
        raise GrapeError("run a library", obstacle, "the machine that the target names")
    place = tvm.device(device)
    with quiet():
        main = relax.VirtualMachine(code, place)["main"]
    held = [weight.copyto(place) if device != "cpu" else weight for weight in weights]

    def run(arrays: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        try:
            results = main(*(_tensor(array, place) for array in arrays), held)
        except Exception as failure:
            raise GrapeError("run a library", first_line(failure), "sizes that belong together") from failure
        # An importer of TVM makes no tuple of one result.
        results = [results] if isinstance(results, tvm.runtime.Tensor) else results
        return [result.numpy() if device != "cpu" else np.from_dlpack(result) for result in results]

    return run


def _tensor(array: np.ndarray[Any, Any], place: Any) -> Any:
    plain = np.ascontiguousarray(array)
    if place.type == "cpu" and plain.flags.writeable and plain.ctypes.data % ALIGNED == 0 and plain.size:
        return tvm.runtime.from_dlpack(plain)
    return tvm.runtime.tensor(plain, place)


def runs_here(target: Target) -> str:
    """Return "" where code for a target runs on this machine, else a sentence that says why not."""
    kind = str(target.kind.name)
    if kind != "llvm":
        return "" if tvm.device(kind).exist else f"there is no {kind} device here"
    codegen = tvm.target.codegen
    host = tvm.target.Target({"kind": "llvm", "mcpu": str(codegen.llvm_get_system_cpu())})
    triple, own = (_architecture(each) for each in (target, host))
    if triple != own:
        return f"the target is {triple}, this machine is {own}"
    lacking = sorted(_instructions(target) - _instructions(_host()))
    return f"this machine has no {', '.join(lacking[:4])}" if lacking else ""


def _instructions(target: Target) -> set[str]:
    """Return the sets of instructions that code for a target may use, without what LLVM calls features besides."""
    found = tvm.target.codegen.llvm_get_cpu_features(target)
    return {name for name in map(str, found) if name.startswith(_INSTRUCTIONS)}


def _host() -> Target:
    from grape_compile.kernels.tensorir.engine import to_target

    return to_target("llvm")


def _architecture(target: Target) -> str:
    triple = str(target.attrs.get("mtriple", "")) or str(tvm.target.codegen.llvm_get_system_triple())
    return triple.split("-")[0]


def source_of(code: Any) -> str:
    """Return the source of a device's kernels in a compiled module, or the assembly of a CPU's."""
    modules = _modules(getattr(code, "mod", code))
    for kind, form in (("cuda", ""), ("llvm", "s")):
        found = [str(each.inspect_source(form)) for each in modules if each.kind == kind]
        if found:
            return "\n".join(found)
    return ""


def _modules(module: Any) -> list[Any]:
    return [module, *(inner for each in module.imports for inner in _modules(each))]


def write_library(code: Any, path: Path, target: Mapping[str, Any]) -> None:
    """Link a compiled module, or put its object files in a .tar; EngineError where nothing links it."""
    asked = f"write {path.name}"
    if not hasattr(code, "jit"):
        raise GrapeError(asked, "a library that was loaded", "copies of its three files")
    if path.suffix == ".so":
        built = Target(dict(target))
        cpu = built.host if built.kind.name != "llvm" else built
        if cpu is not None and _architecture(cpu) != _architecture(_host()):
            raise EngineError(
                asked,
                f"objects for {_architecture(cpu)}, which the linker of this machine does not take",
                "a path that ends in .tar, and on that machine: tar xf model.tar && g++ -shared *.o -o model.so",
            )
        if not any(map(shutil.which, _LINKERS)):
            raise EngineError(
                asked, f"none of {', '.join(_LINKERS)}", "apt install g++, or a path that ends in .tar"
            )
    try:
        with quiet():
            code.export_library(str(path))
    except Exception as failure:
        raise EngineError(
            asked, first_line(failure), "a linker that works, or a path that ends in .tar"
        ) from failure


def open_library(path: Path, asked: str) -> Any:
    """Return the module in a library; GrapeError for a file that is none."""
    try:
        with quiet():
            return load_module(str(path))
    except Exception as failure:
        raise GrapeError(
            asked, first_line(failure), "a library that Artifact.save wrote on such a machine"
        ) from failure


def write_weights(weights: Mapping[str, Any], path: Path) -> None:
    """Write tensors by name, in TVM's own form."""
    tvm.runtime.save_param_dict_to_file(dict(weights), str(path))


def read_weights(path: Path, names: Sequence[str], asked: str) -> dict[str, Any]:
    """Return the tensors of these names in this order; GrapeError for a file that does not hold them."""
    try:
        found = tvm.runtime.load_param_dict_from_file(str(path))
        return {name: found[name] for name in names}
    except Exception as failure:
        raise GrapeError(
            asked, f"{path.name}: {first_line(failure)}", "the whole file that Artifact.save wrote"
        ) from failure


def check_versions(made: Mapping[str, str], asked: str) -> None:
    """Raise EngineError where a library was made by another release of TVM than the one that is here."""
    other = {name: made.get(name) for name, version in versions().items() if made.get(name) != version}
    if other:
        told = ", ".join(f"{name} {version}" for name, version in other.items())
        raise EngineError(asked, f"made with {told}", f"the release it was made with; this one is {INSTALL}")
