"""A value for an argument of a forward pass that has to go with others, by its name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from benchmarks.coverage.inputs import Random

Inputs = dict[str, Any]
SEQUENCES = (
    "input_ids",
    "inputs_embeds",
    "hidden_states",
    "input_features",
    "audio_mel",
    "pixel_values",
    "input_values",
)
HELPFUL = re.compile(
    r"bbox|feature_lens|aftercnn_lens|patch_ids|num_patches|patch_embeds|last_hidden_state|encoder_hidden_states|"
    r"visual_\w+|input_features_mask|pixel_attention_mask|image_attention_mask|input_(ids|values|features)"
)
"""Arguments with a default that some models cannot do without."""


def completed(inputs: Inputs, model: nn.Module, random: Random, helpful: bool) -> Inputs | None:
    """The inputs with every argument that has no default, if `helpful` with those that are often needed too.

    None where an argument has a name that says nothing here.
    """
    whole = dict(inputs)
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if name in whole or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        required = parameter.default is parameter.empty
        if not required and not (helpful and HELPFUL.fullmatch(name)):
            continue
        value = _value(name, whole, random)
        if value is not None:
            whole[name] = value
        elif required:
            return None
    return whole


def _value(name: str, inputs: Inputs, random: Random) -> Any:
    if name in MAKERS:
        return MAKERS[name](inputs, random)
    if re.search(r"mask$", name):
        return torch.ones(*_sequence(inputs), dtype=torch.long)
    if re.search(r"(embeds?|states?|latents|features)$", name):
        return random.normal(*_sequence(inputs), random.width)
    return None


def _sequence(inputs: Inputs) -> tuple[int, int]:
    """Batch and length of the sequence at hand."""
    for name in SEQUENCES:
        value = inputs.get(name)
        if isinstance(value, Tensor):
            if name == "input_features" and value.dim() == 2:
                return 1, value.shape[1]
            if value.dim() <= 2:
                return value.shape[0], value.shape[-1]
            axis = _longest(value) if name.startswith(("input_features", "pixel", "input_values")) else 1
            return value.shape[0], value.shape[axis]
    return 1, 16


def _longest(value: Tensor) -> int:
    return max(range(1, value.dim()), key=lambda axis: value.shape[axis])


def _boxes(inputs: Inputs, random: Random) -> Tensor:
    """One box a token, left and top before right and bottom."""
    corner = torch.arange(4) // 2 * 10
    return corner.expand(*_sequence(inputs), 4).clone()


def _lengths(inputs: Inputs, random: Random) -> Tensor:
    batch, length = _sequence(inputs)
    return torch.full((batch,), length)


def _images(inputs: Inputs) -> int:
    pixels = inputs.get("pixel_values")
    return pixels.shape[1] if isinstance(pixels, Tensor) and pixels.dim() == 5 else 1


def _picture(inputs: Inputs, random: Random) -> Tensor:
    return random.normal(_sequence(inputs)[0], random.channels, random.side, random.side)


MAKERS: Mapping[str, Callable[[Inputs, Random], Any]] = {
    "aftercnn_lens": lambda inputs, random: (_lengths(inputs, random) - 1) // 2 + 1,
    "audio_mel_mask": lambda inputs, random: torch.zeros(*_sequence(inputs), dtype=torch.bool),
    "bbox": _boxes,
    "chunk_sample_lengths": lambda inputs, random: _lengths(inputs, random) * 160,
    "condition_vector": lambda inputs, random: random.normal(
        *_sequence(inputs), random.number("mel_dim", default=80)
    ),
    "feature_lens": _lengths,
    "context_hidden_states": lambda inputs, random: random.normal(*_sequence(inputs), 4 * random.width),
    "image_attention_mask": lambda inputs, random: torch.ones(*_sequence(inputs), _images(inputs)),
    "pooled_patches_idx": lambda inputs, random: torch.arange(_sequence(inputs)[1]).reshape(-1, 4),
    "input_features": lambda inputs, random: random.normal(_sequence(inputs)[0], 64, random.mels),
    "input_ids": lambda inputs, random: random.ids[: _sequence(inputs)[0]],
    "input_values": lambda inputs, random: random.normal(_sequence(inputs)[0], 1, 4000),
    "num_patches": lambda inputs, random: _sequence(inputs)[1] // 4,
    "patch_ids": lambda inputs, random: (torch.arange(_sequence(inputs)[1]) // 4).expand(*_sequence(inputs)),
    "pixel_values": _picture,
    "prompt_masks": _picture,
    "prompt_pixel_values": _picture,
    "quantized_code": lambda inputs, random: random.ids[: _sequence(inputs)[0]],
    "spatial_shapes": lambda inputs, random: torch.tensor([[8, 8]]).expand(_sequence(inputs)[0], 2),
    "task_inputs": lambda inputs, random: random.ids[: _sequence(inputs)[0]],
    "time_step": lambda inputs, random: torch.rand((), generator=random.generator),
    "visual_feats": lambda inputs, random: random.normal(
        _sequence(inputs)[0], 8, random.number("visual_feat_dim", default=64)
    ),
    "visual_pos": lambda inputs, random: random.normal(_sequence(inputs)[0], 8, 4).abs(),
}
