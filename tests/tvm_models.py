"""Models that are made into libraries, and what a process without torch does with them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

#: Stands before a program: whatever asks for torch finds none.
BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "onnx"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])
sys.meta_path.insert(0, Blocked())
"""

#: Run a decoder with a cache on the calls of `calls.npz`: prompts of three lengths, then steps behind the last.
RUNNER = (
    BLOCKED
    + """
import numpy as np
import grape_compile
assert "tvm" not in sys.modules
from grape_compile.export.tvm import load
path, calls, out = sys.argv[1:]
artifact = load(path)
cache = [value for value in artifact.about.inputs if value.name.startswith("past_key_values.")]
held, found = {}, {}
for name, ids in np.load(calls).items():
    if name.startswith("prompt"):
        held = {v.name: np.zeros((ids.shape[0], v.shape[1], 0, v.shape[3]), v.dtype) for v in cache}
        seen = 0
    seen += ids.shape[1]
    results = artifact.run(
        ids,
        np.ones((ids.shape[0], seen), np.int64),
        np.arange(seen - ids.shape[1], seen)[None].repeat(ids.shape[0], 0),
        **held,
    )
    held = {name: results[name.replace("past_key_values", "present")] for name in held}
    found[name] = results["logits"]
np.savez(out, **found)
assert not any(name.partition(".")[0] == "torch" for name in sys.modules)
try:
    grape_compile.inspect
except ImportError as failure:
    assert "pip install" in str(failure)
else:
    raise AssertionError("inspect without torch")
"""
)


class Turned(nn.Module):
    """A layer's product whose halves turn by their place."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)
        self.inv_freq = nn.Buffer(10000.0 ** -(torch.arange(width // 2) / (width // 2)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        angle = torch.arange(x.shape[1])[:, None] * self.inv_freq
        table = torch.cat((angle, angle), -1)
        low, high = x.chunk(2, -1)
        return x * table.cos() + torch.cat((-high, low), -1) * table.sin()


def turned() -> tuple[Turned, tuple[Tensor]]:
    """A model and its input, as the command line asks for them."""
    torch.manual_seed(0)
    return Turned(), (torch.randn(2, 6, 8),)


def decoder(family: str, hidden: int, layers: int) -> Any:
    """A language model with random weights, its vocabulary small."""
    from transformers import AutoModelForCausalLM, BloomConfig, GPTJConfig, LlamaConfig

    heads = max(hidden // 64, 4)
    special = {"bos_token_id": 1, "eos_token_id": 2}
    configs: dict[str, Callable[[], Any]] = {
        "llama": lambda: LlamaConfig(
            vocab_size=96,
            hidden_size=hidden,
            intermediate_size=hidden * 2,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
        ),
        "gptj": lambda: GPTJConfig(
            vocab_size=96,
            n_embd=hidden,
            n_layer=layers,
            n_head=heads,
            rotary_dim=hidden // heads // 2,
            **special,
        ),
        "bloom": lambda: BloomConfig(
            vocab_size=96, hidden_size=hidden, n_layer=layers, n_head=heads, **special
        ),
    }
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(configs[family]()).eval()


def program(code: str) -> list[str]:
    """A process that runs this code."""
    return [sys.executable, "-W", "ignore", "-c", code]
