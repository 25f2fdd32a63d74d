"""Inputs a model may accept: tried in turn until one runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.coverage.arguments import Inputs, completed

BATCH, LENGTH = 2, 16
FRAMES = 64
SAMPLES = ((1, 4000), (1, 1, 4000), (1, 1, 16000), (1, 7680), (1, 1, 7680))
FIRST_ID, LAST_ID = 3, 90

HIDDEN = (
    "inputs_embeds",
    "hidden_states",
    "latents",
    "patch_embeds",
    "noise_embeds",
    "image_features",
    "audio_mel",
)

SEQUENCE_AXIS = {
    "input_ids": 1,
    "mm_token_type_ids": 1,
    "decoder_input_ids": 1,
    "attention_mask": 1,
    "inputs_embeds": 1,
    "input_values": -1,
}
"""The axis of an input that grows with the sequence."""


def candidates(model: nn.Module, config: Any, name: str) -> Iterator[Inputs]:
    """Keyword arguments of one forward pass, the most telling first."""
    accepted = set(inspect.signature(model.forward).parameters)
    settings: Inputs = {"use_cache": False} if "use_cache" in accepted else {}
    random = Random(config)
    if name in SPECIAL:
        yield from ({**settings, **inputs} for inputs in SPECIAL[name](random))
        return
    made: list[Iterator[Inputs]] = []
    decodes = "decoder_input_ids" in accepted and getattr(config, "is_encoder_decoder", False)
    target = {"decoder_input_ids": random.ids[:, :8].clone()} if decodes else {}
    books = getattr(getattr(config, "decoder_config", None), "num_channels", None)
    if decodes and isinstance(books, int):
        target = {"decoder_input_ids": random.ids[:, :8, None].repeat(1, 1, books) % 8}
    if "input_ids" in accepted:
        made.append(_text(random, target))
    if accepted & {"pixel_values", "hidden_states", "flatten_patches"}:
        made.append(_image(random, accepted))
    if "pixel_values_videos" in accepted:
        made.append(_video(random))
    if "input_features" in accepted:
        made.append(_features(random, target))
    if "input_values" in accepted:
        made.append(_sound(random, target))
    if "past_values" in accepted:
        made.append(iter([{"past_values": random.normal(1, 4 * random.number("patch_length", default=32))}]))
    made.extend(_hidden(random, each) for each in HIDDEN if each in accepted)
    alone = [inputs for group in made for inputs in group]
    yield from ({**settings, **inputs} for inputs in alone)
    for helpful in (False, True):
        for inputs in alone:
            whole = completed(inputs, model, random, helpful)
            if whole is not None and whole.keys() != inputs.keys():
                yield {**settings, **whole}


class Random:
    """Random tensors of the shapes a configuration speaks of."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.generator: torch.Generator = torch.Generator().manual_seed(0)
        self.ids: Tensor = torch.randint(FIRST_ID, LAST_ID, (BATCH, LENGTH), generator=self.generator)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def number(self, *names: str, default: int, of: Any = None) -> int:
        for name in names:
            value = getattr(of or self.config, name, None)
            if isinstance(value, list | tuple) and value:
                value = value[0]
            if isinstance(value, int) and value > 0:
                return value
        return default

    @property
    def channels(self) -> int:
        return self.number("num_channels", "in_channels", "in_chans", default=3)

    @property
    def side(self) -> int:
        return self.number("image_size", default=32)

    @property
    def patch(self) -> int:
        return self.number("patch_size", default=4)

    @property
    def patch_values(self) -> int:
        return self.channels * self.number("temporal_patch_size", default=1) * self.patch**2

    @property
    def mels(self) -> int:
        return self.number("num_mel_bins", "feature_size", "n_mels", default=80)

    @property
    def width(self) -> int:
        return self.number("hidden_size", "d_model", default=64)


def _text(random: Random, target: Inputs) -> Iterator[Inputs]:
    ids = random.ids
    yield {"input_ids": ids, **target}
    yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), **target}
    yield {"input_ids": ids % 8, **target}
    books = random.number("num_codebooks", "num_channels", "n_codebooks", "audio_num_codebooks", default=2)
    yield {"input_ids": (ids % 8)[..., None].repeat(1, 1, books), **target}


def _image(random: Random, accepted: set[str]) -> Iterator[Inputs]:
    grid, patches, channels, side = torch.tensor([[1, 8, 8]]), 64, random.channels, random.side
    grid_name = next((name for name in ("grid_thw", "image_grid_thw") if name in accepted), None)
    main = next(name for name in ("hidden_states", "pixel_values", "flatten_patches") if name in accepted)
    if grid_name is not None:
        for shape in (
            (patches, random.patch_values),
            (patches, 2 * random.patch_values),
            (patches, channels, random.patch, random.patch),
            (1, patches, channels, random.patch, random.patch),
        ):
            yield {main: random.normal(*shape), grid_name: grid}
    if "pixel_values" not in accepted:
        return
    pixels = random.normal(BATCH, channels, side, side)
    yield {"pixel_values": pixels}
    if "input_ids" in accepted:
        yield {"pixel_values": pixels, "input_ids": random.ids}
    yield {"pixel_values": random.normal(1, 2, channels, side, side)}
    yield {"pixel_values": pixels, "image_sizes": torch.tensor([[side, side]] * BATCH)}
    places = torch.cartesian_prod(torch.arange(8), torch.arange(8))[None]
    yield {"pixel_values": random.normal(1, patches, random.patch_values), "pixel_position_ids": places}
    if "decoder_input_ids" in accepted:
        yield {"pixel_values": pixels, "decoder_input_ids": random.ids[:, :8].clone()}


def _video(random: Random) -> Iterator[Inputs]:
    frames = random.number("frames_per_clip", default=4)
    yield {"pixel_values_videos": random.normal(1, frames, random.channels, random.side, random.side)}


def _features(random: Random, target: Inputs) -> Iterator[Inputs]:
    target = {name: ids[:1] for name, ids in target.items()}
    mask = torch.ones(1, FRAMES, dtype=torch.long)
    for mels in dict.fromkeys((random.mels, 16, 80, 128, 160)):
        for shape in ((1, FRAMES, mels), (1, mels, FRAMES)):
            yield {"input_features": random.normal(*shape), **target}
            yield {"input_features": random.normal(*shape), "attention_mask": mask, **target}
    yield {"input_features": random.normal(1, random.mels, 3000), **target}
    yield {"input_features": random.normal(random.mels, FRAMES), **target}
    yield {"input_features": random.normal(1, 16, 2 * FRAMES), **target}


def _sound(random: Random, target: Inputs) -> Iterator[Inputs]:
    target = {name: ids[:1] for name, ids in target.items()}
    for shape in (*SAMPLES, (1, FRAMES, random.mels)):
        yield {"input_values": random.normal(*shape), **target}


def _hidden(random: Random, name: str) -> Iterator[Inputs]:
    yield {name: random.normal(1, LENGTH, random.width)}
    yield {name: random.normal(1, random.width, LENGTH)}
    yield {name: random.normal(1, random.width, 8, 8)}
    yield {name: random.normal(1, FRAMES, random.number("input_size", "input_feat_size", default=80))}


def _picture_in_text(random: Random) -> Iterator[Inputs]:
    """Text with one picture of 64 patches between its tokens: patches in a grid, or a square of pixels."""
    vision, token = random.config.vision_config, random.config.image_token_id
    merged = 1 / vision.pixel_shuffle_ratio if hasattr(vision, "pixel_shuffle_ratio") else None
    merged = merged or getattr(vision, "spatial_merge_size", None) or random.config.spatial_merge_size
    ids = random.ids[:1]
    picture = torch.full((1, 64 // int(merged) ** 2), token)
    ids = torch.cat([ids[:, : LENGTH // 2], picture, ids[:, LENGTH // 2 :]], 1)
    channels = random.number("in_channels", "num_channels", default=3, of=vision)
    if hasattr(vision, "temporal_patch_size"):
        yield {
            "input_ids": ids,
            "pixel_values": random.normal(64, channels * vision.temporal_patch_size * vision.patch_size**2),
            "image_grid_thw": torch.tensor([[1, 8, 8]]),
            "mm_token_type_ids": (ids == token).long(),
        }
        return
    side = 8 * vision.patch_size
    square = {"input_ids": ids, "pixel_values": random.normal(1, channels, side, side)}
    yield square
    yield {**square, "image_sizes": [(side, side)]}


def _merged_video(random: Random) -> Iterator[Inputs]:
    yield {
        "pixel_values": random.normal(64, random.config.num_channels * random.config.patch_size**2),
        "grid_thw": torch.tensor([[1, 8, 8]]),
        "merge_sizes": torch.tensor([1]),
    }


def _tiles(random: Random) -> Iterator[Inputs]:
    yield {
        "pixel_values": random.normal(1, 1, 4, 3, 32, 32),
        "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(1, 1, 4, dtype=torch.long),
    }


def _masked(random: Random) -> Iterator[Inputs]:
    yield {"input_ids": random.ids, "attention_mask": torch.ones_like(random.ids)}


SPECIAL: Mapping[str, Callable[[Random], Iterator[Inputs]]] = {
    **dict.fromkeys(
        (
            f"{folder}@image"
            for folder in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "mistral3", "llama4")
        ),
        _picture_in_text,
    ),
    "video_llama_3/VideoLlama3Vision": _merged_video,
    "mllama/MllamaVision": _tiles,
    "bloom@mask": _masked,
}


def decoded(inputs: Inputs) -> Inputs | None:
    """What tokens follow: token ids, with the picture among them; None where there is another sequence beside them."""
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or "decoder_input_ids" in inputs:
        return None
    if "pixel_values" not in inputs:
        return {"input_ids": ids}
    return {name: value for name, value in inputs.items() if name != "use_cache"}


def redrawn(inputs: Inputs, seed: int) -> Inputs:
    """Other values of the same kind: floating tensors are drawn anew, token ids are shuffled along their sequence."""
    generator = torch.Generator().manual_seed(seed)
    fresh = dict(inputs)
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            fresh[name] = torch.randn(value.shape, generator=generator).to(value.dtype)
    ids = inputs.get("input_ids")
    if isinstance(ids, Tensor) and "pixel_values" not in inputs:
        fresh["input_ids"] = ids[:, torch.randperm(ids.shape[1], generator=generator)]
    return fresh


def lengthened(inputs: Inputs, by: int) -> Inputs:
    """The same with a longer sequence: its first entries follow once more."""
    longer = dict(inputs)
    for name, axis in sequence_axes(inputs).items():
        value = inputs[name]
        longer[name] = torch.cat([value, value.narrow(axis, 0, by)], axis)
    return longer


def sequence_axes(inputs: Inputs) -> dict[str, int]:
    """The axis along which each input grows with the sequence."""
    axes = {
        name: axis % inputs[name].dim()
        for name, axis in SEQUENCE_AXIS.items()
        if isinstance(inputs.get(name), Tensor)
    }
    features = inputs.get("input_features")
    if isinstance(features, Tensor):
        axes["input_features"] = max(range(1, features.dim()), key=lambda axis: features.shape[axis])
    return axes
