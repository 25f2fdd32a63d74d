"""The models that are timed: random weights, nothing downloaded."""

from __future__ import annotations

import os
from types import MethodType
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.decoder import AlongPaths, Decoder, Forgetting

VOCABULARY = 1000
FAMILIES = ("llama", "qwen3", "gptj", "bloom", "mpt", "gpt2", "fox", "grape_ap")
HAND_WRITTEN: dict[str, type[Forgetting | AlongPaths]] = {"fox": Forgetting, "grape_ap": AlongPaths}


def build(
    family: str, *, hidden: int = 512, heads: int = 8, layers: int = 4, vocabulary: int = VOCABULARY
) -> nn.Module:
    """A model of the family in eval mode, the same one every time."""
    torch.manual_seed(0)
    model: nn.Module = _make(family, hidden, heads, layers, vocabulary).eval()
    return model


def without_bias(model: nn.Module) -> nn.Module:
    """The same BLOOM or MPT with plain causal attention: what is left of its time when the bias costs nothing."""
    for module in model.modules():
        if isinstance(module, transformers.models.bloom.modeling_bloom.BloomAttention):
            module.forward = MethodType(_plain_bloom, module)
        elif isinstance(module, transformers.models.mpt.modeling_mpt.MptAttention):
            module.forward = MethodType(_plain_mpt, module)
    return model


def _plain_bloom(
    attention: Any, hidden_states: Tensor, residual: Tensor, **unused: object
) -> tuple[Tensor, None]:
    heads = attention.query_key_value(hidden_states).unflatten(-1, (attention.num_heads, 3, -1))
    return residual + attention.dense(_plain_causal(*heads.unbind(-2))), None


def _plain_mpt(
    attention: Any, hidden_states: Tensor, position_bias: Tensor, **unused: object
) -> tuple[Tensor, None]:
    heads = attention.Wqkv(hidden_states).unflatten(-1, (3, attention.n_heads, -1))
    return attention.out_proj(_plain_causal(*heads.unbind(-3))), None


def _plain_causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[B, T, H, D] in, [B, T, H * D] out."""
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    return scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)


def token_ids(length: int, batch: int = 1) -> Tensor:
    """Sequences of tokens, the same ones every time."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(0))


def forward(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits, no gradients, no cache."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def _make(family: str, hidden: int, heads: int, layers: int, vocabulary: int) -> Any:
    if family in ("llama", "qwen3"):
        sizes = {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads // 2}
        sizes |= {"hidden_size": hidden, "intermediate_size": 3 * hidden, "head_dim": hidden // heads}
        if family == "llama":
            return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=vocabulary, **sizes))
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(vocab_size=vocabulary, **sizes))
    if family == "gptj":
        sizes = {"n_layer": layers, "n_head": heads, "rotary_dim": hidden // heads // 2, "n_positions": 4096}
        return transformers.GPTJForCausalLM(
            transformers.GPTJConfig(vocab_size=vocabulary, n_embd=hidden, **sizes)
        )
    if family == "bloom":
        sizes = {"n_layer": layers, "n_head": heads}
        return transformers.BloomForCausalLM(
            transformers.BloomConfig(vocab_size=vocabulary, hidden_size=hidden, **sizes)
        )
    if family == "mpt":
        sizes = {"n_layers": layers, "n_heads": heads, "max_seq_len": 4096}
        return transformers.MptForCausalLM(
            transformers.MptConfig(vocab_size=vocabulary, d_model=hidden, **sizes)
        )
    if family == "gpt2":
        sizes = {"n_layer": layers, "n_head": heads}
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=vocabulary, n_embd=hidden, **sizes)
        )
    if family in HAND_WRITTEN:
        return Decoder(HAND_WRITTEN[family], hidden, heads, layers, vocabulary)
    raise ValueError(f"asked for the family {family!r}; there are {', '.join(FAMILIES)}")
