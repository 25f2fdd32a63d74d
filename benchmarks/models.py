"""The models that are timed: random weights, nothing downloaded."""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 1000
FAMILIES = ("llama", "bloom", "mpt")


def build(family: str, *, hidden: int = 512, heads: int = 8, layers: int = 4) -> nn.Module:
    """A model of the family in eval mode, the same one every time."""
    torch.manual_seed(0)
    model: nn.Module = _make(family, hidden, heads, layers).eval()
    return model


def token_ids(length: int) -> Tensor:
    """One sequence, the same one every time."""
    return torch.randint(3, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0))


def forward(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits, no gradients, no cache."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def _make(family: str, hidden: int, heads: int, layers: int) -> Any:
    if family == "llama":
        sizes = {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads // 2}
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=3 * hidden, **sizes
        )
        return transformers.LlamaForCausalLM(config)
    if family == "bloom":
        sizes = {"n_layer": layers, "n_head": heads}
        return transformers.BloomForCausalLM(
            transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=hidden, **sizes)
        )
    if family == "mpt":
        sizes = {"n_layers": layers, "n_heads": heads, "max_seq_len": 4096}
        return transformers.MptForCausalLM(
            transformers.MptConfig(vocab_size=VOCABULARY, d_model=hidden, **sizes)
        )
    raise ValueError(f"asked for the family {family!r}; there are {', '.join(FAMILIES)}")
