"""A decoder of two layers that is given its keys and values and returns them, with queries and keys rotated."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

LAYERS, HEADS, WIDTH, VOCABULARY = 2, 2, 8, 50
CACHED = f'rotation(half({WIDTH}), geometric(10000.0), positions("positions"))'


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(HEADS * WIDTH, 3 * HEADS * WIDTH)
        self.inv_freq: Tensor
        self.register_buffer("inv_freq", 10000.0 ** (-torch.arange(0, WIDTH, 2).float() / WIDTH))

    def forward(self, hidden: Tensor, places: Tensor, mask: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        rows, tokens, _ = hidden.shape
        parts = self.project(hidden).chunk(3, -1)
        query, key, value = (part.view(rows, tokens, HEADS, WIDTH).transpose(1, 2) for part in parts)
        angle = places[:, None, :, None].float() * self.inv_freq
        query, key = (_turned(each, angle.cos(), angle.sin()) for each in (query, key))
        both = torch.cat((past, torch.stack((key, value))), 3)
        counted = torch.arange(both.shape[3])
        seen = counted[None, :] <= counted[-tokens:, None]
        scores = query @ both[0].transpose(2, 3) * WIDTH**-0.5
        scores = scores.masked_fill(~(seen & (mask[:, None, None, :] > 0)), -1e9)
        mixed = scores.softmax(-1) @ both[1]
        return mixed.transpose(1, 2).reshape(rows, tokens, -1), both


def _turned(value: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = value.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class Cached(nn.Module):
    """Tokens, a mask over past and tokens, positions, and for each layer keys and values [2, B, H, past, 8]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, HEADS * WIDTH)
        self.layers = nn.ModuleList(_Layer() for _ in range(LAYERS))

    def forward(self, ids: Tensor, mask: Tensor, places: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        hidden, present = self.embed(ids), []
        for layer, own in zip(self.layers, past, strict=True):
            mixed, kept = layer(hidden, places, mask, own)
            hidden = hidden + mixed
            present.append(kept)
        return hidden @ self.embed.weight.t(), *present

    def export(self, path: Path, *, traced: bool) -> None:
        """Write an ONNX file whose mask has a size of a name of its own."""
        rows, tokens, past = 2, 5, 7
        names = ["input_ids", "attention_mask", "position_ids", *(f"past.{layer}" for layer in range(LAYERS))]
        args = (
            torch.randint(0, VOCABULARY, (rows, tokens)),
            torch.ones(rows, past + tokens, dtype=torch.int64),
            torch.arange(past, past + tokens).expand(rows, tokens),
            *(torch.randn(2, rows, HEADS, past, WIDTH) for _ in range(LAYERS)),
        )
        axes: list[dict[int, Any]] = [
            {0: "rows", 1: "tokens"},
            {0: "rows", 1: "total"},
            {0: "rows", 1: "tokens"},
            *({1: "rows", 3: "past"} for _ in range(LAYERS)),
        ]
        options: dict[str, Any] = {"dynamic_axes": dict(zip(names, axes, strict=True))}
        if not traced:
            sizes = {name: Dim(name, max=64) for name in ("rows", "tokens", "past")}
            sizes["total"] = Dim.DYNAMIC
            shapes = [{axis: sizes[name] for axis, name in each.items()} for each in axes]
            options = {
                "dynamic_shapes": (*shapes[:3], tuple(shapes[3:])),
                "external_data": False,
                "verbose": False,
            }
        outputs = ["logits", *(f"present.{layer}" for layer in range(LAYERS))]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                self.eval(), args, path, dynamo=not traced, opset_version=18,
                input_names=names, output_names=outputs, **options,
            )  # fmt: skip
