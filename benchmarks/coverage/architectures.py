"""The architectures of the installed transformers: which there are, and one tiny random model of each."""

from __future__ import annotations

import copy
import importlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from benchmarks.coverage.configurations import grown, shrunk, trimmed
from benchmarks.coverage.overrides import CHANGES, VARIANTS
from benchmarks.coverage.truth import has_encoding_code

MODELS = Path(transformers.__file__).parent / "models"
PREFERRED = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM", "Model", "Backbone", "")
"""Endings of class names, the best first: a head that mixes all positions shows a wrong rotation."""
CLASSES_TRIED = 3
MOST_PARAMETERS = 60_000_000


@dataclass(frozen=True)
class Architecture:
    """One configuration class, and the model classes it may be built as, the best first."""

    name: str
    module: str
    classes: tuple[str, ...]
    changes: Mapping[str, Any] = field(default_factory=dict)
    encodes: bool = True

    def models(self) -> Iterator[tuple[nn.Module, Any]]:
        """Every model that can be built, with its configuration. Raises nothing: failures are yielded.

        The class is tried with a default configuration edited in place, then with one built from small sizes, then
        with the default one made shallow, if that is not too large.
        """
        module = importlib.import_module(self.module)
        # Missing image libraries do not matter to a model that is given tensors.
        module.requires_backends = lambda *_: None  # type: ignore[attr-defined]
        changes = dict(self.changes)
        for name in self.classes[:CLASSES_TRIED]:
            model_class = getattr(module, name)
            for make in (shrunk, grown, trimmed):
                try:
                    config = make(model_class.config_class, changes)
                    if make is trimmed and _parameters(model_class, config) > MOST_PARAMETERS:
                        continue
                    yield _built(model_class, config), config
                except Exception as failure:
                    yield nn.Identity(), failure


def _parameters(model_class: Any, config: Any) -> int:
    """How many numbers a model holds, found without making them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in model_class(copy.deepcopy(config)).parameters())


def _built(model_class: Any, config: Any) -> nn.Module:
    """The model in eval mode, its parameters drawn; in the attention that torch fuses where it knows that."""
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    try:
        model = model_class(config)
    except (ValueError, ImportError) as failure:
        if "sdpa" not in str(failure).lower() and "scaled_dot" not in str(failure).lower():
            raise
        config._attn_implementation = "eager"
        model = model_class(config)
    built: nn.Module = model.float().eval()
    return built


def draw_parameters(model: nn.Module, seed: int) -> None:
    """Draw all trainable parameters: matrices keep the variance of their input, vectors are disturbed.

    With the usual standard deviation of 0.02 attention is flat and a wrong rotation hardly moves the output. Frozen
    ones are left alone (RoFormer keeps its table of sines and cosines in a parameter).
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.requires_grad:
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2:
                # Around one for a scale, around zero for a bias: whichever the configuration starts with.
                parameter.copy_(parameter.round() + 0.1 * noise)
            else:
                experts = parameter.dim() == 3
                inputs = parameter.shape[-1] if experts else parameter[0].numel()
                parameter.copy_(noise / max(inputs, 1) ** 0.5)


def architectures(only: Sequence[str] = ()) -> Iterator[Architecture]:
    """All architectures, or those whose model folder or name is in `only`; those with encodings first.

    A folder whose code rotates and biases nothing itself counts by its first configuration alone, a configuration that
    several files have models of by the first file.
    """
    without = []
    seen: set[str] = set()
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        folder = path.parent.name
        if folder == "auto" or (only and folder not in {_folder(name) for name in only}):
            continue
        found = [
            each
            for each in _of_module(folder, f"transformers.models.{folder}.{path.stem}")
            if each.name not in seen and (not only or folder in only or each.name in only)
        ]
        seen |= {each.name for each in found}
        if found and not found[0].encodes:
            without += found[:1]
        else:
            yield from found
    yield from without


def _of_module(folder: str, name: str) -> list[Architecture]:
    try:
        module = importlib.import_module(name)
        by_config = _classes_by_config(module)
    except Exception:  # a framework that is not installed; the package itself says which on use
        return []
    encodes = has_encoding_code(module)
    found = []
    for config, classes in by_config.items():
        label = f"{folder}/{config.removesuffix('Config')}"
        changes = {**CHANGES.get(folder, {}), **CHANGES.get(label, {})}
        found.append(Architecture(label, name, classes, changes, encodes))
    for label, (class_name, changes) in VARIANTS.items():
        if _folder(label) == folder and hasattr(module, class_name):
            found.append(Architecture(label, name, (class_name,), changes))
    return found


def _folder(name: str) -> str:
    return re.split("[/@]", name)[0]


def _classes_by_config(module: ModuleType) -> dict[str, tuple[str, ...]]:
    grouped: dict[str, list[str]] = {}
    for name, value in vars(module).items():
        if not isinstance(value, type) or value.__module__ != module.__name__:
            continue
        if not issubclass(value, PreTrainedModel) or name.endswith("PreTrainedModel"):
            continue
        config = getattr(value, "config_class", None)
        if config is not None and _has_forward(value):
            grouped.setdefault(config.__name__, []).append(name)
    return {config: tuple(sorted(names, key=_rank)) for config, names in grouped.items()}


def _has_forward(model_class: type) -> bool:
    return any(
        "forward" in vars(base) for base in model_class.__mro__ if base not in (PreTrainedModel, nn.Module)
    )


def _rank(name: str) -> tuple[int, int]:
    return next(i for i, ending in enumerate(PREFERRED) if name.endswith(ending)), len(name)
