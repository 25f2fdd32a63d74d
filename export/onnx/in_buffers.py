"""Run a file whose caches are buffers of fixed size: one buffer in and out, or two."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from grape_compile.errors import GrapeError
from grape_compile.export.capturing import Captured
from grape_compile.export.contract import Run
from grape_compile.export.kv_cache import CACHE_IN, CACHE_OUT
from grape_compile.export.onnx.runtime import runtime

#: What lies in a buffer where no token is. No result may depend on it.
_LEFT: Final = 7.0


def in_buffers(made: Any, captured: Captured) -> dict[str, Run]:
    """The ways of running a session: buffers nearly full or mostly empty, shared by input and output or not."""
    ways = {
        ", one buffer in and out": (1, 1, True),
        ", a mostly empty buffer in and out": (3, 1, True),
        ", one buffer in and another out": (1, 1, False),
    }
    return {way: partial(_run, made, captured, *how) for way, how in ways.items()}


def _run(
    made: Any, captured: Captured, times: int, more: int, is_shared: bool, inputs: Sequence[Tensor]
) -> list[Tensor]:
    """Run on buffers of `times` the tokens and `more`; what was in them already has to stay."""
    given = dict(zip(captured.input_names, inputs, strict=True))
    asked = {each.name for each in made.get_inputs()}
    count = given["attention_mask"].shape[1]
    binding = made.io_binding()
    held: dict[str, Any] = {}
    for name in asked:
        numbers = given[name].numpy()
        if name.startswith(CACHE_IN):
            numbers = _filled(numbers, times * count + more)
            held[name.replace(CACHE_IN, CACHE_OUT)] = runtime().OrtValue.ortvalue_from_numpy(numbers)
            binding.bind_ortvalue_input(name, held[name.replace(CACHE_IN, CACHE_OUT)])
        else:
            binding.bind_cpu_input(name, numbers)
    for name in captured.output_names:
        if is_shared and name in held:
            binding.bind_ortvalue_output(name, held[name])
        else:
            binding.bind_output(name)
    made.run_with_iobinding(binding)
    found = []
    for name, value in zip(captured.output_names, binding.get_outputs(), strict=True):
        numbers = value.numpy()
        if name in held:
            _check(name, numbers[:, :, count:])
            numbers = numbers[:, :, :count]
        found.append(torch.from_numpy(np.array(numbers)))  # what the session gives lies in its own memory
    return found


def _filled(numbers: Any, capacity: int) -> Any:
    rows, heads, count, width = numbers.shape
    buffer = np.full((rows, heads, capacity, width), _LEFT, numbers.dtype)
    buffer[:, :, :count] = numbers
    return buffer


def _check(name: str, rest: Any) -> None:
    if not bool((rest == _LEFT).all()):
        raise GrapeError(
            "a file whose caches are buffers",
            f"{name} was written to behind its last token",
            "kv_cache=True, and a report of this",
        )
