"""Decoding with every kind of cache: each forward pass goes through every operator, the error contract holds.

A scenario is what was seen before, how many tokens come now, what is padded and whether the model is told its
positions. The past is filled by the plain model, so that only the step is judged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from architectures import CACHED, HEAD_DIM, Architecture, draw_parameters
from measuring import SEEDS, Deviation, GrapeCalls, InDouble, bound, in_double
from torch import Tensor, nn
from transformers import DynamicCache, QuantizedCache, StaticCache

from grape_compile import grape_compile, report

ROOM = 24
"""Tokens a static cache has room for: more than are ever seen, so that some keys are never live."""

CACHES: Mapping[str, Callable[[nn.Module], Any]] = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=ROOM),
    "quantised": lambda model: QuantizedCache("fp8", config=model.config),
}


@dataclass(frozen=True)
class Scenario:
    """`past` tokens seen, `step` tokens now; padding per sample, at the `side` named; positions told or not."""

    name: str
    past: int = 6
    step: int = 1
    paddings: tuple[int, ...] = (0, 0)
    side: str = "left"
    told: bool = False

    def mask(self) -> Tensor:
        """1 for a token, 0 for padding: [batch, past + step]."""
        mask = torch.ones(len(self.paddings), self.past + self.step, dtype=torch.long)
        for sample, padding in enumerate(self.paddings):
            start = 0 if self.side == "left" else self.past - padding
            mask[sample, start : start + padding] = 0
        return mask

    def arguments(self, ids: Tensor, tokens: slice, cache: str) -> dict[str, Any]:
        """What the model is given for some of the tokens; a static cache wants a mask over all it has room for."""
        mask = self.mask()
        given: dict[str, Any] = {"input_ids": ids[:, tokens], "use_cache": True}
        if any(self.paddings) or cache == "static":
            room = ROOM - tokens.stop if cache == "static" else 0
            given["attention_mask"] = nn.functional.pad(mask[:, : tokens.stop], (0, room))
        if self.told:
            given["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, tokens]
        return given


SCENARIOS = (
    Scenario("one token"),
    Scenario("several tokens", step=4),
    Scenario("past the window", past=12, step=3),
    Scenario("left padding", paddings=(0, 2, 5)),
    Scenario("left padding, several tokens", step=3, paddings=(0, 2, 5)),
    Scenario("right padding", paddings=(0, 2, 4), side="right", told=True),
    Scenario("right padding, several tokens", step=3, paddings=(0, 2, 4), side="right", told=True),
    Scenario("positions told", step=2, told=True),
    Scenario("nothing before", past=0, step=6, paddings=(0, 3)),
)
UNTOLD = {"bloom", "mpt"}
"""Models that take no positions."""
SLIDING = {"mistral", "gemma3", "gpt_oss"}
"""Models with windows, of which transformers quantises no cache."""
BREAKS = {("mpt", "static"): "MPT cuts its bias at a length that is a tensor: a graph break in every layer"}
"""Where torch.compile holds no layer in one graph, and why: the model must run as it is."""

QUICK = {
    ("llama", "static", "left padding, several tokens"),
    ("gptj", "dynamic", "right padding, several tokens"),
    ("bloom", "static", "left padding, several tokens"),
    ("mpt", "quantised", "left padding"),
    ("falcon-alibi", "static", "right padding, several tokens"),
    ("gemma3", "static", "past the window"),
    ("mistral", "dynamic", "past the window"),
    ("deepseek_v3", "static", "several tokens"),
    ("phi3-longrope", "dynamic", "past the window"),
}


def _cases() -> Iterator[Any]:
    for row in CACHED:
        for cache in CACHES:
            for scenario in SCENARIOS:
                if (scenario.told and row.name in UNTOLD) or (cache == "quantised" and row.name in SLIDING):
                    continue
                quick = (row.name, cache, scenario.name) in QUICK
                name = f"{row.name}, {cache}, {scenario.name}"
                yield pytest.param(row, cache, scenario, id=name, marks=[] if quick else [pytest.mark.slow])


def step(model: nn.Module, filler: nn.Module, ids: Tensor, cache: str, scenario: Scenario) -> Tensor:
    """Logits of the step, after `filler` has seen the past."""
    seen, past = CACHES[cache](filler), scenario.past
    with torch.no_grad():
        if past:
            filler(**scenario.arguments(ids, slice(0, past), cache), past_key_values=seen)
        tokens = slice(past, past + scenario.step)
        logits: Tensor = model(**scenario.arguments(ids, tokens, cache), past_key_values=seen).logits
    return logits


@pytest.mark.parametrize(("row", "cache", "scenario"), list(_cases()))
@pytest.mark.timeout(600)
def test_a_step_with_a_past(row: Architecture, cache: str, scenario: Scenario) -> None:
    calls, errors = GrapeCalls(), {"ours": Deviation(), "plain": Deviation()}
    plain, ours = row.build(), grape_compile(row.build(), backend=calls)
    live = scenario.mask()[:, scenario.past :].bool()
    for seed in SEEDS:
        ids = row.inputs(batch=len(live), seq=scenario.past + scenario.step, seed=seed)["input_ids"]
        for model in (plain, ours):
            draw_parameters(model, seed)
        calls.reset()
        found = step(ours, plain, ids, cache, scenario)
        assert calls.rotated + calls.attended == (0 if (row.name, cache) in BREAKS else row.sites)
        assert found.isfinite().all()
        wide = in_double(plain)
        with InDouble():
            reference = step(wide, wide, ids, cache, scenario)[live]
        errors["ours"].add(found[live], reference)
        errors["plain"].add(step(plain, plain, ids, cache, scenario)[live], reference)
    if (row.name, cache) not in BREAKS:
        assert report(ours).refusals == (), str(report(ours))
    assert errors["ours"].relative <= bound([errors["plain"].relative])


class Packed(torch.Tensor):
    """Keys in half the memory, as the packages that quantise caches hold them: a tensor around another."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Packed:
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, strides=held.stride())

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(held: dict[str, Tensor], meta: None, size: object, stride: object) -> Packed:
        return Packed(held["held"])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares the disabled one
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return func(*(arg.unpacked() if isinstance(arg, Packed) else arg for arg in args), **(kwargs or {}))

    def unpacked(self) -> Tensor:
        return self.held.float()


class OverPackedKeys(nn.Module):
    """Rotated queries over keys that come packed."""

    inv_freq: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(HEAD_DIM, HEAD_DIM)
        self.register_buffer("inv_freq", 10000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM))

    def forward(self, x: Tensor, past: Packed) -> Tensor:
        angle = torch.arange(x.shape[1])[:, None] * self.inv_freq
        cos, sin = (torch.cat([part, part], -1) for part in (angle.cos(), angle.sin()))
        query = self.project(x)
        query = query * cos + torch.cat([-query[..., HEAD_DIM // 2 :], query[..., : HEAD_DIM // 2]], -1) * sin
        scores: Tensor = (query @ past.unpacked().mT).softmax(-1)
        return scores + (past * 2.0).mean()


def test_keys_that_are_a_tensor_around_another() -> None:
    model = OverPackedKeys()
    x, past = torch.randn(2, 5, HEAD_DIM), Packed(torch.randn(2, 3, HEAD_DIM).half())
    with torch.no_grad():
        wanted = model(x, past)
        ours = grape_compile(model, backend="eager")
        torch.testing.assert_close(ours(x, past), wanted, rtol=1e-5, atol=1e-6)
    assert len(report(ours).sites) == 1, str(report(ours))
