"""Upgraded models for tests: which targets fit which architecture, and values as after some training."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from architectures import BY_NAME, CACHED, Architecture
from torch import Tensor, nn

from grape_compile import upgrade

ROWS = BY_NAME | {row.name: row for row in CACHED}
TURNING = ("grape-m", "grape-m-ctx")
ADDING = ("grape-a-q", "grape-a-k", "grape-a-qk", "fox", "grape-ap")
SUMS = ("grape-m+fox", "grape-m+grape-ap", "grape-m+grape-a-qk")
#: Six spellings of RoPE with and without grouped heads, norms, scales and windows, kept as frequencies and as tables;
#: two of ALiBi; a latent attention, a soft cap, sinks, fused projections.
FAMILIES = (
    "llama",
    "gptj",
    "bloom",
    "mpt",
    "qwen3",
    "gpt_neox",
    "falcon",
    "gemma2",
    "phi3",
    "cohere",
    "deepseek_v3",
    "gpt_oss",
)


def targets(row: Architecture) -> tuple[str, ...]:
    """The targets that fit an architecture: ALiBi has nothing that turns."""
    return (*ADDING, "nope") if row.biases else (*TURNING, *ADDING, *SUMS, "nope")


def starts_the_same(row: Architecture, to: str) -> bool:
    """Whether the upgraded model computes the same at the start."""
    return to in TURNING or (bool(row.biases) and to in ADDING and to != "grape-ap")


def upgraded(row: Architecture, to: str, seed: int = 0, **options: Any) -> nn.Module:
    """A model of a row, upgraded, its graphs run as they are; what it starts with is no matter here."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*start.*|.*no longer encoded.*", category=UserWarning)
        return upgrade(row.build(seed), to, **{"backend": "eager"} | options)


def encodings(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the encodings of an upgraded model."""
    return {name: each for name, each in model.named_parameters() if ".grape." in name}


def learn_anything(model: nn.Module, seed: int = 0, size: float = 0.3) -> None:
    """Move the encodings of a model somewhere, as training does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in encodings(model).values():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def drop_weights(model: nn.Module, share: float) -> nn.Module:
    """The model in training, its attention dropping out this share of its weights; nothing else is dropped."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            module.p = share if name.endswith("attention_dropout") else 0.0
        for kind in ("attention_dropout", "attn_dropout_p", "dropout"):
            if isinstance(getattr(module, kind, None), int | float):
                setattr(module, kind, share)
    return model.train()


def relative(found: Tensor, right: Tensor) -> float:
    """Relative root-mean-square difference."""
    return float((found.double() - right.double()).norm() / right.double().norm())
