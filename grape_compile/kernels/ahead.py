"""What a kernel costs, read from its machine code: compiled for a GPU that need not be there.

Registers and stack are those that `cuobjdump` reports, instructions those that `nvdisasm` lists; both come with Triton.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from grape_compile.errors import GrapeError
from grape_compile.kernels.launch import Launch

#: Pointers that torch allocates, and integers of this divisor, are promised to the compiler: it reads 128 bits at once.
ALIGNMENT: Final = 16

#: The opcode of a matrix product: mma.sync, wgmma, tcgen05.
_MATRIX: Final = re.compile(r"(HMMA|HGMMA|UTC\w*MMA)$")
_KINDS: Final[Mapping[str, re.Pattern[str]]] = {
    "matrix": _MATRIX,
    "shuffle": re.compile(r"SHFL$"),
    "special": re.compile(r"MUFU$"),
    "barrier": re.compile(r"(BAR|SYNCS)$"),
    "local": re.compile(r"(LDL|STL)$"),
    "atomic": re.compile(r"(ATOM|ATOMG|RED|REDG)$"),
}
_TYPES: Final[Mapping[torch.dtype, str]] = {
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint64: "u64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}
_INSTRUCTION: Final = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:\{\s*)?(@!?\w+\s+)?([A-Z][\w.]*)(.*?);")
_LABEL: Final = re.compile(r"^\s*(\.L\w+):")


@dataclass(frozen=True)
class Usage:
    """What one kernel needs on one GPU.

    `registers` per thread; `stack` bytes per thread, which is where registers spill to; `shared` bytes per block;
    `tensor_memory` columns (Blackwell); `matrix` the opcode of its matrix products, or "". `instructions` counts the
    whole kernel and `loops` each loop, the longest first, with the opcodes that cost most by kind. `loads` and `stores`
    count accesses to global memory by their width in bits.
    """

    registers: int
    stack: int
    shared: int
    tensor_memory: int
    matrix: str
    instructions: int
    kinds: Mapping[str, int]
    loops: tuple[Mapping[str, int], ...]
    loads: Mapping[str, int]
    stores: Mapping[str, int]


def usage(launch: Launch, capability: int) -> Usage:
    """Compile a launch for compute capability 80, 90 or 100 and return what it needs.

    Its tensors may be on the `meta` device: only dtype and alignment count, as they do for the compiler at run time.
    Raises GrapeError where the kernels were loaded for the interpreter.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile
    from triton.runtime.jit import JITFunction

    if not isinstance(launch.function, JITFunction):
        raise GrapeError(
            "compile a kernel ahead of time",
            f"{launch.function} was loaded for the interpreter",
            "a process without TRITON_INTERPRET",
        )
    types, constants, hints = signature(launch)
    source = ASTSource(launch.function, types, constexprs=constants, attrs=hints)
    built = compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launch.options))
    return read(built.asm["cubin"], int(built.metadata.shared), getattr(built.metadata, "tmem_size", 0) or 0)


def signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], Any]]:
    """Return types, constants and hints of the arguments, as Triton finds them for a launch at run time."""
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    hints: dict[tuple[int, ...], Any] = {}
    for at, parameter in enumerate(launch.function.params):
        value = launch.arguments.get(parameter.name, parameter.default)
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            types[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        types[parameter.name] = _type(value)
        if _is_aligned(value) and not parameter.do_not_specialize:
            hints[at,] = [["tt.divisibility", ALIGNMENT]]
    return types, constants, hints


def _type(value: object) -> str:
    if isinstance(value, Tensor):
        return "*" + _TYPES[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64" if value < 2**63 else "u64"
    if isinstance(value, float):
        return "fp32"
    raise TypeError(f"a kernel takes no {type(value).__name__}")


def _is_aligned(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.storage_offset() * value.element_size() % ALIGNMENT == 0
    return type(value) is int and value % ALIGNMENT == 0


def read(cubin: bytes, shared: int, tensor_memory: int) -> Usage:
    """Return what the machine code of one kernel needs."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        resources = _run(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
        code = list(_instructions(_run(knobs.nvidia.nvdisasm.path, "-c", file.name)))
    registers, stack = (int(_found(rf"{name}:(\d+)", resources)) for name in ("REG", "STACK"))
    opcodes = [opcode for _, opcode, _ in code]
    found = {base for opcode in opcodes if _MATRIX.match(base := opcode.partition(".")[0])}
    return Usage(
        registers,
        stack,
        shared,
        tensor_memory,
        "/".join(sorted(found)),
        len(code),
        _kinds(opcodes),
        tuple(sorted(_loops(code), key=lambda loop: -loop["instructions"])),
        _widths(opcodes, ("LDG", "LDGSTS")),
        _widths(opcodes, ("STG",)),
    )


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise GrapeError(
            "read the resources of a kernel", f"no {pattern} in {text!r}", "cuobjdump of CUDA 12 or 13"
        )
    return match[1]


def _instructions(listing: str) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """Yield the labels before each instruction, its opcode and its operands."""
    labels: list[str] = []
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            labels.append(label[1])
        elif instruction := _INSTRUCTION.match(line):
            yield tuple(labels), instruction[2], instruction[3]
            labels.clear()


def _loops(code: list[tuple[tuple[str, ...], str, str]]) -> Iterator[dict[str, int]]:
    """Yield the instructions between each branch backwards and its target; the trap at the end is no loop."""
    place: dict[str, int] = {}
    for at, (labels, opcode, operands) in enumerate(code):
        place.update(dict.fromkeys(labels, at))
        target = re.search(r"\(\s*(\.L\w+)\s*\)", operands) if opcode.startswith("BRA") else None
        if target is not None and place.get(target[1], at) < at:
            body = [each for _, each, _ in code[place[target[1]] : at + 1]]
            yield {"instructions": len(body), **_kinds(body)}


def _kinds(opcodes: list[str]) -> dict[str, int]:
    """Count the opcodes of each kind; kinds that do not occur are left out."""
    counted: Counter[str] = Counter()
    for opcode in opcodes:
        base = opcode.partition(".")[0]
        counted.update(kind for kind, pattern in _KINDS.items() if pattern.match(base))
    return dict(counted)


def _widths(opcodes: list[str], bases: tuple[str, ...]) -> dict[str, int]:
    """Count global accesses by width: `.128`, `.64`, 32 bits where nothing is said, `.U16`, `.S8` and their kin."""
    counted: Counter[str] = Counter()
    for opcode in opcodes:
        base, *parts = opcode.split(".")
        if base in bases:
            widths = [
                part.lstrip("US") for part in parts if part.lstrip("US") in ("8", "16", "64", "128", "256")
            ]
            counted[widths[0] if widths else "32"] += 1
    return dict(sorted(counted.items()))
