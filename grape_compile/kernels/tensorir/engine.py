"""TVM as this project sees it: the one file that imports it, because its names move between releases.

Importing this file where TVM is absent, or of a release that would crash, raises `EngineError`.
"""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from grape_compile.errors import EngineError

#: The two releases that work together: with any later ffi, MetaSchedule's mutators crash the process.
VERSION: Final = "0.27.0.post1"
FFI_VERSION: Final = "0.1.14.post0"
INSTALL: Final = f'pip install "apache-tvm=={VERSION}" "apache-tvm-ffi=={FFI_VERSION}"'


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_installation() -> None:
    """Raise EngineError unless the releases of TVM and of its ffi are installed that work together.

    This reads what is installed and imports nothing: a wrong pair would crash instead of raising.
    """
    engine, ffi, other = (_installed(name) for name in ("apache-tvm", "apache-tvm-ffi", "tvm"))
    asked = "TVM"
    if other is not None:
        raise EngineError(
            asked,
            f"the package `tvm` {other}, which is not Apache TVM and lies in its folder",
            f"pip uninstall tvm && {INSTALL}",
        )
    if engine is None:
        raise EngineError(asked, "no package apache-tvm", INSTALL)
    if (engine, ffi) != (VERSION, FFI_VERSION):
        raise EngineError(asked, f"apache-tvm {engine} with apache-tvm-ffi {ffi or '(none)'}", INSTALL)


check_installation()

import tvm  # noqa: E402 - only after the check
import tvm_ffi  # noqa: E402
from tvm import IRModule, relax, rpc, s_tir, tirx  # noqa: E402
from tvm.runtime import Module as Library  # noqa: E402
from tvm.runtime import load_module  # noqa: E402
from tvm.runtime import tensor as device_tensor  # noqa: E402
from tvm.script.ir_builder import IRBuilder  # noqa: E402
from tvm.support import ndk, tar  # noqa: E402
from tvm.support.popen_pool import PopenWorker  # noqa: E402
from tvm.target import Target  # noqa: E402
from tvm.target import codegen as _codegen  # noqa: E402
from tvm.target.tag import list_tags  # noqa: E402
from tvm.tirx import PrimFunc  # noqa: E402
from tvm.tirx.script.builder import ir as T  # noqa: E402

cpu: Final = tvm.cpu

__all__ = [
    "FFI_VERSION",
    "INSTALL",
    "VERSION",
    "IRModule",
    "Library",
    "PopenWorker",
    "PrimFunc",
    "T",
    "Target",
    "as_intrinsic",
    "check_installation",
    "compile_module",
    "cpu",
    "cuda_source",
    "device_tensor",
    "is_gpu",
    "load_module",
    "module_of",
    "ndk",
    "relax",
    "rpc",
    "s_tir",
    "shared_memory",
    "tar",
    "targets",
    "tirx",
    "to_target",
    "tvm",
    "vector_lanes",
    "vector_registers",
    "versions",
    "without_program",
    "workspace",
    "writing",
]


def versions() -> dict[str, str]:
    """Return what a record or an artifact was made with."""
    return {"tvm": VERSION, "tvm-ffi": FFI_VERSION}


def targets() -> tuple[str, ...]:
    """Return the tags that name a target."""
    return tuple(sorted(str(tag) for tag in list_tags()))


def to_target(target: str | Mapping[str, Any] | Target) -> Target:
    """Return a target of a tag, a kind or a dict; "llvm" is the CPU at hand with all of its features.

    Raises EngineError for a name that TVM does not have, and for a GPU without an architecture.
    """
    if isinstance(target, Target):
        return target
    if target == "llvm":
        target = _host()
    if isinstance(target, Mapping):
        return _constructed(dict(target), str(dict(target)))
    if target in ("cuda", "rocm"):
        raise EngineError(
            f"the target {target!r}",
            "no architecture, for which TVM takes one of many years ago",
            'a tag such as "nvidia/nvidia-h100", or {"kind": "cuda", "arch": "sm_90a"}',
        )
    if target not in targets() and target not in ("c", "opencl", "vulkan", "metal", "webgpu"):
        near = difflib.get_close_matches(target, targets(), n=4, cutoff=0.4)
        works = [repr(tag) for tag in near] or ['"llvm"', '"nvidia/nvidia-h100"', "a dict with its kind"]
        raise EngineError(f"the target {target!r}", "no tag of that name", ", ".join(works))
    return _constructed(target, repr(target))


def _host() -> dict[str, Any]:
    """Return the CPU at hand without the vector instructions that its name has and a virtual machine hides."""
    name = str(_codegen.llvm_get_system_cpu())
    flags = _flags()
    implied = [str(each) for each in _codegen.llvm_get_cpu_features(Target({"kind": "llvm", "mcpu": name}))]
    vector = [each for each in implied if each.startswith(("avx", "fma", "f16c"))]
    hidden = [f"-{each}" for each in sorted(vector) if flags and each not in flags]
    return {"kind": "llvm", "mcpu": name} | ({"mattr": hidden} if hidden else {})


def _flags() -> frozenset[str]:
    """Return the features that Linux says an x86 CPU has, spelled as LLVM spells them; none elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore").splitlines()
    except OSError:
        return frozenset()
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return frozenset(flag.replace("_", "") for flag in flags)


def _constructed(target: Any, asked: str) -> Target:
    try:
        return Target(target)
    except (ValueError, TypeError, RuntimeError) as failure:
        reason = str(failure).strip().splitlines()[-1]
        works = 'a tag such as "nvidia/nvidia-h100", or a dict such as {"kind": "llvm", "mcpu": "znver4"}'
        raise EngineError(f"the target {asked}", reason, works) from failure


def is_gpu(target: Target) -> bool:
    """Whether a target runs kernels in blocks of threads."""
    return "gpu" in [str(key) for key in target.keys]


def vector_lanes(target: Target) -> int:
    """Return how many float32 numbers a vector of a CPU holds."""
    return max(int(_codegen.llvm_get_vector_width(target)) // 32, 4) if target.kind.name == "llvm" else 16


def vector_registers(target: Target) -> int:
    """Return how many vector registers a CPU has: 16 on x86 without AVX-512, else 32."""
    if target.kind.name != "llvm":
        return 32
    features = {str(each) for each in _codegen.llvm_get_cpu_features(target)}
    return 16 if "sse" in features and "avx512f" not in features else 32


def shared_memory(target: Target) -> int:
    """Return how many bytes a block of threads of a GPU may share (CUDA C++ Programming Guide, table of limits)."""
    return {"sm_80": 163, "sm_90": 227, "sm_90a": 227}.get(str(target.attrs.get("arch")), 48) * 1024


@contextmanager
def writing(name: str) -> Iterator[list[PrimFunc]]:
    """Open a function of TensorIR to write into; the list holds the finished function afterwards."""
    finished: list[PrimFunc] = []
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(name)
        # Nothing is left to schedule: MetaSchedule and the rules of Relax leave such functions alone.
        T.func_attr({"global_symbol": name, "tirx.noalias": True, "tirx.is_scheduled": True})
        yield finished
    finished.append(builder.get())


def workspace(name: str, shape: Sequence[Any], dtype: str) -> Any:
    """Return a buffer in the memory of the device, of any size, that lives as long as a call."""
    buffer = T.alloc_buffer(list(shape), dtype, scope="global")
    IRBuilder.name(name, buffer)
    return buffer


def module_of(functions: Mapping[str, PrimFunc]) -> IRModule:
    """Return a module of functions by name."""
    return IRModule(dict(functions))


def without_program(function: PrimFunc, name: str) -> PrimFunc:
    """Return a function of the same arguments, whose one block, called `name`, has no program yet.

    The block says what it reads and writes, and calls what is nowhere, so that it cannot be run by mistake.
    """
    root = s_tir.SBlockRealize([], True, s_tir.SBlock([], [], [], "root", _call_of_nothing(function, name)))
    attributes = {"global_symbol": name, "s_tir": True, "tirx.noalias": True}
    return PrimFunc(function.params, root, attrs=tvm.ir.make_node("ir.DictAttrs", **attributes))


def as_intrinsic(function: PrimFunc, name: str) -> str:
    """Make a function of known sizes an intrinsic that a schedule may put in the place of a block `without_program`.

    Returns the name of the intrinsic, which is the same for the same text.
    """
    known = f"grape.{name}.{tvm_ffi.structural_hash(function) % 2**64:016x}"
    others = tvm.ir.load_json(tvm.ir.save_json(function))
    attributes = tvm.ir.make_node("ir.DictAttrs", s_tir=True)
    asked = PrimFunc(others.params, _call_of_nothing(others, name), attrs=attributes)
    made = PrimFunc(function.params, _whole_block(function.params, name, function.body), attrs=attributes)
    s_tir.TensorIntrin.register(known, asked, made, override=True)
    return known


def _call_of_nothing(function: PrimFunc, name: str) -> Any:
    *given, result = function.params
    called = tirx.call_extern(result.dtype, f"{name}: no design was chosen", *(each.data for each in given))
    stored = tirx.BufferStore(result, called, [0] * len(result.shape))
    return _whole_block(function.params, name, stored)


def _whole_block(arguments: Sequence[Any], name: str, body: Any) -> Any:
    """Return a block that reads all of its arguments but the last, which it writes."""
    *given, result = (
        tirx.BufferRegion(each, [tvm.ir.Range(0, size) for size in each.shape]) for each in arguments
    )
    return s_tir.SBlockRealize([], True, s_tir.SBlock([], given, [result], name, body))


def compile_module(module: IRModule, target: Target) -> Library:
    """Return a module compiled for a target.

    Raises EngineError where TVM has no code generator for it, or the machine no compiler.
    """
    try:
        return tvm.compile(module, target=target)
    except Exception as failure:
        raise _missing(target, failure) from failure


def cuda_source(library: Any) -> str:
    """Return the CUDA source inside of a compiled module, "" where there is none."""
    module = getattr(library, "mod", library)
    return "\n".join(str(each.inspect_source()) for each in module.imports if each.kind == "cuda")


def _missing(target: Target, failure: Exception) -> EngineError:
    """Say what a failed compilation lacks."""
    reason = str(failure).strip().splitlines()[-1] if str(failure).strip() else type(failure).__name__
    asked = f"code for {target.kind.name}"
    if target.kind.name == "cuda" and shutil.which("nvcc") is None:
        return EngineError(asked, f"no nvcc ({reason})", "apt install nvidia-cuda-toolkit")
    return EngineError(asked, reason, "a target whose compiler is at hand")
