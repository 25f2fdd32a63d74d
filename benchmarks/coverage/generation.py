"""Greedy generation, the default cache: what ran in the prompt and in every token after it, and how exact it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from benchmarks.coverage.arguments import Inputs
from benchmarks.coverage.inputs import redrawn
from benchmarks.coverage.oracle import (
    AGAINST_ORIGINAL,
    FLOOR,
    MARGIN,
    SEEDS,
    Deviation,
    InDouble,
    in_double,
    live,
)

NEW_TOKENS = 4
PADDED = 3
"""Tokens of the second sample that are padding, at its left."""


class Ran:
    """A backend that counts what its graphs rotate and bias each time they run: layers may share one graph."""

    def __init__(self, backend: str) -> None:
        self.inner = torch._dynamo.lookup_backend(backend)  # noqa: TID251 - by name, as torch.compile takes it
        self.rotations = self.biases = 0

    def __call__(self, module: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        graphs = [each.graph for each in module.modules() if isinstance(each, fx.GraphModule)]
        nodes = [node for graph in graphs for node in graph.nodes]
        rotated = [node for node in nodes if node.target is torch.ops.grape.rotate.default]
        rotations = sum(len(node.args[0]) for node in rotated)
        biases = sum(node.target is torch.ops.grape.attend.default for node in nodes)
        compiled = self.inner(module, list(examples))

        def call(*args: Any) -> Any:
            self.rotations += rotations
            self.biases += biases
            return compiled(*args)

        return call


@dataclass(frozen=True)
class Generated:
    """Tokens [batch, new] and the logits each was chosen by, [batch, new, vocabulary]."""

    tokens: Tensor
    logits: Tensor


def prompt(inputs: Inputs) -> Inputs:
    """A batch of two whose second sample begins with padding; where there is a picture each has the same."""
    if "pixel_values" in inputs:
        inputs = {name: _twice(value) for name, value in inputs.items()}
    ids = inputs["input_ids"].clone()
    mask = torch.ones_like(ids)
    ids[1:, :PADDED] = mask[1:, :PADDED] = 0
    return {**inputs, "input_ids": ids, "attention_mask": mask}


def _twice(value: Any) -> Any:
    """A value for each of two samples."""
    return torch.cat([value, value]) if isinstance(value, Tensor) else value * 2


def encoder_of(model: nn.Module) -> nn.Module:
    """The part of a model that sees pictures."""
    find: Any = model.get_encoder
    found: nn.Module = find(modality="image")
    return found


def generated(model: nn.Module, inputs: Inputs) -> Generated:
    """The most likely tokens, one after another."""
    torch.manual_seed(0)
    generate: Any = model.generate
    with torch.no_grad():
        found = generate(
            **copy.deepcopy(inputs),
            do_sample=False,
            use_cache=True,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            return_dict_in_generate=True,
            output_logits=True,
            pad_token_id=0,
        )
    return Generated(found.sequences[:, -NEW_TOKENS:], torch.stack(found.logits, 1))


def compared(ours: nn.Module, original: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Error of the logits of ours and of the original over `SEEDS`, and whether the same tokens were chosen.

    `inputs` are those of one forward pass. Logits are compared as long as the tokens before them agree. Where two
    tokens are closer to each other than the errors of the logits, either may be chosen.
    """
    wide: nn.Module | None = in_double(original)
    errors = {"ours": Deviation(), "original": Deviation()}
    same, ties = True, 0
    for seed in SEEDS:
        drawn = prompt(redrawn(inputs, seed))
        runs = {"ours": generated(ours, drawn), "original": generated(original, drawn)}
        reference = _in_double(wide, drawn) if wide is not None else None
        if reference is None:
            wide, reference = None, runs["original"]
        for name, found in runs.items():
            for sample in range(len(reference.tokens)):
                end, tie = _agreement(found, reference, sample)
                errors[name].add(
                    {"output": found.logits[sample, :end]}, {"output": reference.logits[sample, :end]}
                )
                ties += name == "ours" and tie is True
                same &= name == "original" or tie is not False
    error, other = errors["ours"].relative, errors["original"].relative
    bound = MARGIN * other + FLOOR if wide is not None else AGAINST_ORIGINAL[torch.float32]
    return {
        "error": error,
        "original": other,
        "oracle": "original" if wide is None else "fp64",
        "bound": bound,
        "near ties": ties,
        "holds": same and error <= bound,
    }


def _in_double(wide: nn.Module, inputs: Inputs) -> Generated | None:
    try:
        with InDouble():
            return generated(wide, inputs)
    except Exception:  # kernels without float64, casts to float32 that no mode sees
        return None


def _agreement(found: Generated, wanted: Generated, sample: int) -> tuple[int, bool | None]:
    """How many tokens were chosen from the same past, and where the next differs, whether rounding explains it."""
    differs = (found.tokens[sample] != wanted.tokens[sample]).nonzero()
    if not len(differs):
        return NEW_TOKENS, None
    at = int(differs[0])
    ours, theirs = found.logits[sample, at].double(), wanted.logits[sample, at].double()
    margin = theirs[wanted.tokens[sample, at]] - theirs[found.tokens[sample, at]]
    return at + 1, bool(margin <= 2 * (ours - theirs)[live(theirs)].abs().max())
