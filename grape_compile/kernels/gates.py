"""Limits that kernels keep on GPUs nobody needs to have: their default configurations, compiled and compared.

`python -m grape_compile.kernels.gates` prints what every gate needs as JSON; the tests compare it with the table they
keep, `tests/kernels/gates.json`, which the same command writes with `--output`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from grape_compile.kernels.launch import Launch

#: Compute capabilities: A100, H100 and H200, B200.
CAPABILITIES: Final = (80, 90, 100)

#: Bytes of shared memory that one block may have (CUDA programming guide, technical specifications).
SHARED_LIMIT: Final[Mapping[int, int]] = {80: 166912, 90: 232448, 100: 232448}

#: Modules that define `GATES`, a tuple of `KernelGate`.
MODULES: Final[tuple[str, ...]] = (
    "grape_compile.kernels.attention_gates",
    "grape_compile.kernels.path_gates",
    "grape_compile.kernels.decoding_gates",
    "grape_compile.kernels.turning_gates",
)

#: Columns of tensor memory of one multiprocessor; a kernel that wants more compiles to a trap.
TENSOR_MEMORY: Final = 512


@dataclass(frozen=True)
class KernelGate:
    """One launch at its default configuration for a compute capability; tensors on the `meta` device.

    `registers` is a limit of its own for compute capability 9.0 (eight more, the least that is handed out, for others,
    whose compilers keep more addresses at hand), `wide` asks for loads and stores of 128 bits.
    `matrix` says that the kernel multiplies matrices, `timed` that its configuration for compute capability 9.0 was the
    fastest on a GPU: the one promise it need not keep is that nothing spills.
    """

    name: str
    build: Callable[[int], Launch]
    registers: int = 255
    wide: bool = False
    matrix: bool = False
    timed: bool = False


def gates() -> Iterator[KernelGate]:
    """Yield the gates of all modules."""
    for module in MODULES:
        yield from import_module(module).GATES


def measured(
    names: Sequence[str] = (), capabilities: Sequence[int] = CAPABILITIES
) -> dict[str, dict[str, dict[str, Any]]]:
    """Compile the gates of these names (none: all): gate -> capability -> usage."""
    from grape_compile.kernels.ahead import usage

    chosen = [gate for gate in gates() if not names or gate.name in names]
    return {gate.name: {str(at): asdict(usage(gate.build(at), at)) for at in capabilities} for gate in chosen}


def breaches(gate: KernelGate, found: Mapping[str, Any], capability: int) -> list[str]:
    """Return what a usage breaks of the promises that hold without a table, as sentences."""
    told = []
    if (found["stack"] or found["kinds"].get("local")) and not (gate.timed and capability == 90):
        told.append(f"spills {found['stack']} bytes")
    if found["kinds"].get("atomic"):
        told.append("has atomics: its results would depend on the order of blocks")
    limit = gate.registers if capability == 90 else gate.registers + 8
    if found["registers"] > limit:
        told.append(f"{found['registers']} registers, more than {limit}")
    if found["shared"] > SHARED_LIMIT[capability]:
        told.append(f"{found['shared']} bytes of shared memory, more than {SHARED_LIMIT[capability]}")
    if found["tensor_memory"] > TENSOR_MEMORY:
        told.append(f"{found['tensor_memory']} columns of tensor memory, more than {TENSOR_MEMORY}")
    if gate.matrix != bool(found["matrix"]):
        told.append(f"matrix instruction {found['matrix'] or 'missing'}")
    if gate.wide:
        told += [f"no {name} of 128 bits" for name in ("loads", "stores") if not found[name].get("128", 0)]
    return told


def regressions(found: Mapping[str, Any], kept: Mapping[str, Any]) -> list[str]:
    """Return where a usage is worse than the one that was kept, as sentences: more of anything but wide accesses."""
    told = [
        f"{name} {kept[name]} -> {found[name]}"
        for name in ("registers", "stack", "shared", "tensor_memory", "instructions")
        if found[name] > kept[name]
    ]
    if found["matrix"] != kept["matrix"]:
        told.append(f"matrix instruction {kept['matrix']} -> {found['matrix']}")
    told += [
        f"{name} {kept[name]} -> {found[name]}"
        for name in ("loads", "stores")
        if _narrow(found[name]) > _narrow(kept[name])
    ]
    for at, (loop, before) in enumerate(zip(found["loops"], kept["loops"], strict=False)):
        told += [
            f"loop {at}: {name} {before.get(name, 0)} -> {count}"
            for name, count in loop.items()
            if count > before.get(name, 0)
        ]
    return told


def _narrow(widths: Mapping[str, int]) -> int:
    return sum(count for width, count in widths.items() if int(width) < 128)


def main(arguments: list[str] | None = None) -> None:
    """Print what the gates need, or write it to a file."""
    parser = argparse.ArgumentParser(description="Compile kernels ahead of time and print what they need.")
    parser.add_argument("names", nargs="*", help="gates to compile; all without any")
    parser.add_argument("--capability", type=int, choices=CAPABILITIES, help="the only one to compile for")
    parser.add_argument("--output", type=Path, help="a file to update with them")
    chosen = parser.parse_args(arguments)
    import triton

    if chosen.capability is not None and chosen.output is not None:
        parser.error("a table has all capabilities")
    rows = measured(chosen.names, CAPABILITIES if chosen.capability is None else (chosen.capability,))
    if chosen.output is None:
        sys.stdout.write(text(triton.__version__, rows))
        return
    if chosen.names and chosen.output.exists():
        rows = json.loads(chosen.output.read_text())["gates"] | rows
    known = {gate.name for gate in gates()}
    rows = {name: rows[name] for name in sorted(rows) if name in known}
    chosen.output.write_text(text(triton.__version__, rows))


def text(version: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table as JSON with one line for each gate and capability, so that a change shows as that line."""
    gates = ",\n".join(
        f"  {json.dumps(name)}: {{\n"
        + ",\n".join(f"   {json.dumps(at)}: {json.dumps(found)}" for at, found in row.items())
        + "\n  }"
        for name, row in rows.items()
    )
    return f'{{\n "triton": {json.dumps(version)},\n "gates": {{\n{gates}\n }}\n}}\n'


if __name__ == "__main__":
    main()
