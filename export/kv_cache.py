"""A decoder of transformers as a function of its cache: past_key_values.N.key in, present.N.key out."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from grape_compile.errors import CaptureError, ModelError
from grape_compile.export.capturing import BATCH, SEQUENCE, Captured
from grape_compile.export.cases import Case

PAST, TOTAL, CAPACITY = "past_sequence", "total_sequence", "capacity"
#: How the names of a file's caches begin, in and out.
CACHE_IN, CACHE_OUT = "past_key_values.", "present."
#: What `kv_cache` is for a file whose caches are of one size, in and out.
SHARED: Final = "shared"
#: Rows, new tokens and cached tokens of the call that is captured: different, so that no two sizes are taken for one.
_ROWS, _NEW, _OLD = 2, 5, 7
_POSITIONS: Final = "position_ids"


class Cached(nn.Module):
    """Logits and the grown cache from token ids, a mask over all tokens, positions of the new ones, and the cache.

    The cache of every layer keeps all tokens, also where the model looks at a window of them: its mask hides the rest.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        config: Any = model.config
        self.vocabulary = int(config.get_text_config().vocab_size)
        self.takes_positions = _POSITIONS in inspect.signature(model.forward).parameters

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past_key_values: list[Tensor]
    ) -> list[Tensor]:
        cache = _filled(past_key_values)
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self.takes_positions:
            given[_POSITIONS] = position_ids
        result = self.model(**given, past_key_values=cache, use_cache=True)
        return [result.logits, *_held(result.past_key_values)]


def with_cache(model: Any) -> Captured:
    """Capture a decoder with its cache; it makes its own example.

    Raises ModelError for what is no causal language model of transformers, CaptureError where torch.export refuses it.
    """
    if isinstance(model, ExportedProgram) or not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise ModelError(
            "export a decoder with its cache",
            f"a {type(model).__name__}",
            "a causal language model of transformers",
        )
    cached = Cached(model).eval()
    inputs = _example(cached)
    layers = len(inputs["past_key_values"]) // 2
    # Open, but without names: what the code decides by them holds at other sizes than it can say by name.
    rows = {0: Dim.AUTO, 1: Dim.AUTO}
    shapes = {
        "input_ids": rows,
        "attention_mask": rows,
        _POSITIONS: rows,
        "past_key_values": [{0: Dim.AUTO, 2: Dim.AUTO} for _ in range(2 * layers)],
    }
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.export.export(cached, (), inputs, dynamic_shapes=shapes, strict=False)
    except Exception as failure:
        lines = str(failure).strip().splitlines()
        raise CaptureError(
            f"export {type(model).__name__} with its cache",
            f"{type(failure).__name__}: {lines[0] if lines else ''}",
            "kv_cache=False",
        ) from failure
    parts = [f"{at}.{part}" for at in range(layers) for part in ("key", "value")]
    names = ["input_ids", "attention_mask", _POSITIONS]
    return Captured(
        program,
        cached,
        (*names, *(f"{CACHE_IN}{part}" for part in parts)),
        ("logits", *(f"{CACHE_OUT}{part}" for part in parts)),
        {
            "input_ids": (BATCH, SEQUENCE),
            "attention_mask": (BATCH, TOTAL),
            _POSITIONS: (BATCH, SEQUENCE),
            **{f"{CACHE_IN}{part}": (BATCH, None, PAST, None) for part in parts},
            "logits": (BATCH, SEQUENCE, None),
            **{f"{CACHE_OUT}{part}": (BATCH, None, TOTAL, None) for part in parts},
        },
        type(model).__name__,
    )


def in_one_size(axes: Mapping[str, tuple[str | None, ...]]) -> dict[str, tuple[str | None, ...]]:
    """Return names of sizes for caches that are as large going out as coming in."""
    caches, sizes = (CACHE_IN, CACHE_OUT), (BATCH, None, CAPACITY, None)
    return {name: sizes if name.startswith(caches) else own for name, own in axes.items()}


def cached_cases(captured: Captured, seed: int, least: int = 0) -> list[Case]:
    """Return a prompt of one row, one of three rows padded on the left, several tokens more, and one step.

    With `least`, the first prompt has at least so many tokens, and so many more are a case before the step.
    """
    model = captured.model
    assert isinstance(model, Cached)
    random = torch.Generator().manual_seed(seed)
    vocabulary = model.vocabulary

    def ids(rows: int, count: int) -> Tensor:
        return torch.randint(min(3, vocabulary - 1), vocabulary, (rows, count), generator=random)

    count = max(9, least)
    one = _call(ids(1, count), torch.ones(1, count, dtype=torch.int64), _empty(captured, 1))
    mask = torch.ones(3, 11, dtype=torch.int64)
    mask[0, :4], mask[2, :1] = 0, 0
    prompt = _call(ids(3, 11), mask, _empty(captured, 3))
    cases = [
        Case("a prompt, batch 1", one),
        Case("a prompt, batch 3, left padding", prompt, prompt[1] != 0),
    ]
    inputs = prompt
    more = {3: "three tokens", least: f"{least} tokens", 1: "one token"}
    for new, told in more.items():
        if not new:
            continue
        with torch.no_grad():
            _, *held = model(*inputs[:3], list(inputs[3:]))
        inputs = _call(ids(3, new), torch.cat([inputs[1], inputs[1].new_ones(3, new)], 1), held)
        cases.append(Case(f"{told} more, batch 3", inputs, torch.ones(3, new, dtype=torch.bool)))
    return cases


def _call(ids: Tensor, mask: Tensor, held: Sequence[Tensor]) -> tuple[Tensor, ...]:
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return (ids, mask, positions, *held)


def _empty(captured: Captured, rows: int) -> list[Tensor]:
    given = captured.program.example_inputs
    assert given is not None
    return [part.new_zeros(rows, part.shape[1], 0, part.shape[3]) for part in given[1]["past_key_values"]]


def _example(cached: Cached) -> dict[str, Any]:
    ids = torch.arange(3, 3 + _ROWS * (_NEW + _OLD)).reshape(_ROWS, -1) % cached.vocabulary
    mask = torch.ones_like(ids)
    with torch.no_grad():
        first = cached.model(input_ids=ids[:, :_OLD], attention_mask=mask[:, :_OLD], use_cache=True)
    held = getattr(first, "past_key_values", None)
    if held is None or not hasattr(held, "layers"):
        raise ModelError(
            "export a decoder with its cache",
            f"{type(cached.model).__name__} returns {type(held).__name__} for it",
            "a causal language model of transformers whose layers keep keys and values",
        )
    parts = [part.clone() for part in _held(held)]
    if any(part.dim() != 4 or part.shape[2] != _OLD for part in parts):
        found = next(tuple(part.shape) for part in parts if part.dim() != 4 or part.shape[2] != _OLD)
        raise ModelError(
            "export a decoder with its cache",
            f"{type(cached.model).__name__} keeps a tensor of shape {found} for {_OLD} tokens",
            "layers that keep keys and values [batch, heads, tokens, head_dim]",
        )
    positions = torch.arange(_OLD, _OLD + _NEW).expand(_ROWS, -1).contiguous()
    return {
        "input_ids": ids[:, _OLD:].clone(),
        "attention_mask": mask,
        _POSITIONS: positions,
        "past_key_values": parts,
    }


def _held(cache: Any) -> list[Tensor]:
    return [part for layer in cache.layers for part in (layer.keys, layer.values)]


def _filled(parts: Sequence[Tensor]) -> Any:
    """Return a cache of transformers that holds these tensors; an empty one is as good as any other."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache()
    for key, value in zip(parts[::2], parts[1::2], strict=True):
        layer = DynamicLayer()
        layer.keys, layer.values, layer.is_initialized = key, value, True
        layer.dtype, layer.device = key.dtype, key.device
        cache.layers.append(layer)
    return cache
