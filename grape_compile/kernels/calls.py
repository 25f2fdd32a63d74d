"""What kernels ask of a call of `grape::rotate`: which tensors go together, and along which axes they are walked."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

import torch
from torch import Tensor

from grape_compile.encoding import Accumulated, Multiplicative, Positions, Rank2, Rotation, Steps, Tables
from grape_compile.kernels.frames import Frame, frame_of
from grape_compile.kernels.launch import is_traced
from grape_compile.kernels.layouts import layout_of
from grape_compile.operators.angles import phase_dtype
from grape_compile.operators.turn_call import TurnCall

#: Calls of at most so many tokens, of decoding, are cases of their own.
FEW_TOKENS: Final = 16


def case_of(call: TurnCall, kind: str, tokens: int) -> str:
    """Return the name under which the configuration of a call is recorded."""
    place = "" if call.norm is None else call.norm.place
    clock, like = call.encoding.clock, call.tensors[0]
    exact = phase_dtype(clock, call.slots, like) == torch.float64
    angles = "exact" if exact else type(clock).__name__.lower()
    return _case(call.encoding, kind, 8 * like.element_size(), place, angles, _is_few(tokens))


def _is_few(tokens: int) -> bool:
    """Whether a call is one of decoding; a number of tokens that is a symbol may be any."""
    return type(tokens) is int and tokens <= FEW_TOKENS


@lru_cache(maxsize=1024)
def _case(encoding: Multiplicative, kind: str, bits: int, norm: str, angles: str, few: bool) -> str:
    planes = f"size={encoding.head_dim}"
    if isinstance(encoding, Rotation):
        planes = f"planes={encoding.planes}" + (f" out={encoding.output}" if encoding.out is not None else "")
    words = [
        kind,
        planes,
        f"angles={angles}",
        f"bits={bits}",
        f"norm={norm}" if norm else "",
        "few" if few else "many",
    ]
    return " ".join(word for word in words if word)


def frame_of_call(call: TurnCall, tensors: Sequence[Tensor]) -> Frame | str:
    """Return how to walk some tensors of a call, or a sentence where one launch cannot."""
    known = tuple(map(id, tensors))
    if known not in call.notes:
        call.notes[known] = _frame_of_call(call, tensors)
    found: Frame | str = call.notes[known]
    return found


def _frame_of_call(call: TurnCall, tensors: Sequence[Tensor]) -> Frame | str:
    first = tensors[0]
    token = first.dim() - 2 if isinstance(call.encoding.clock, Steps) else None
    return frame_of(tensors, _varying(call, first), token)


def _varying(call: TurnCall, tensor: Tensor) -> list[bool]:
    """Return along which leading axes angles differ, by shapes alone."""
    encoding, rank = call.encoding, tensor.dim() - 1
    found = [False] * rank
    shapes: list[Sequence[int]] = []
    clock = encoding.clock
    if isinstance(clock, Steps):
        found[-1] = True
    elif isinstance(clock, Positions | Accumulated):
        axes = isinstance(encoding, Rotation) and bool(layout_of(encoding).axes)
        shapes.append(call.slots[clock.slot].shape[axes:])
    names: tuple[str, ...] = clock.slots if isinstance(clock, Tables) else ()
    if isinstance(encoding, Rotation | Rank2) and encoding.spectrum is not None:
        names = encoding.spectrum.slots
    if isinstance(encoding, Rank2):
        names = (*names, encoding.a, encoding.b)
    shapes += [call.slots[name].shape[:-1] for name in names]
    for shape in shapes:
        for at, size in enumerate(shape):
            # A size may be a symbol, and a comparison with it no bool yet.
            found[rank - len(shape) + at] |= bool(size != 1)
    return found


def places_of(call: TurnCall) -> list[tuple[int, ...]]:
    """Return the tensors that one launch takes: two neighbours where they agree but for their heads, else one."""
    if "places" not in call.notes:
        call.notes["places"] = _places_of(call)
    found: list[tuple[int, ...]] = call.notes["places"]
    return found


def _places_of(call: TurnCall) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    at = 0
    while at < len(call.tensors):
        pair = call.tensors[at : at + 2]
        alike = (
            len(pair) == 2
            and pair[0].dim() == pair[1].dim()
            and not isinstance(frame_of_call(call, pair), str)
        )
        found.append((at, at + 1) if alike else (at,))
        at += len(found[-1])
    return found


def tensor_arguments(name: str, tensor: Tensor | None, frame: Frame) -> dict[str, Any]:
    """Return a pointer and its strides along the axes of a frame; None is no pointer."""
    strides = (0, 0, 0, 0) if tensor is None else frame.of(tensor).strides
    walked = zip(("outer", "inner", "head", "token"), strides, strict=True)
    return {name: tensor} | {f"{name}_{axis}": stride for axis, stride in walked}


def is_same(source: Tensor, output: Tensor) -> bool:
    """Whether two tensors are the same places in memory."""
    if source is output:
        return True
    if is_traced(source) or source.is_meta:
        return False
    same_memory = source.data_ptr() == output.data_ptr() and source.dtype == output.dtype
    return same_memory and source.shape == output.shape and source.stride() == output.stride()
