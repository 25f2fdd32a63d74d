"""Tiny configurations of any architecture: a default one edited in place, one built from small sizes, a shallow one."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import re
import sys
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

VOCABULARY = 128
# The last ids are left to special tokens: images, sounds, ends.
SPECIAL_IDS = 28
MOST_LAYERS = 4


def _alike(size: int, names: str) -> dict[str, int]:
    return dict.fromkeys(names.split(), size)


# As many experts as are chosen: a routing that tips over on a rounding error would drown what is measured.
SIZES: dict[str, int] = {
    **_alike(
        64,
        "hidden_size d_model n_embd embed_dim embed_dims dim hidden_dim width encoder_embed_dim intermediate_size_mlp "
        "lru_width out_hidden_size projection_dim text_hidden_size vision_hidden_size vision_output_dim output_dim "
        "projector_hidden_size projector_input_dim projector_output_dim encoder_hash_byte_group_vocab embedding_size "
        "backbone_hidden_size emb_dim hidden_size_global cross_hidden_size",
    ),
    **_alike(
        96,
        "intermediate_size ffn_dim n_inner ffn_hidden_size encoder_ffn_dim decoder_ffn_dim mlp_dim block_ff_dim d_ff",
    ),
    **_alike(
        32,
        "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size crop_size "
        "expert_ffn_hidden_size moe_ffn_hidden_size shared_intermediate_size global_head_dim q_lora_rank kv_lora_rank "
        "o_lora_rank",
    ),
    **_alike(
        16,
        "head_dim kv_channels attention_head_dim swa_head_dim attention_head_size qk_nope_head_dim v_head_dim "
        "index_head_dim indexer_head_dim hidden_size_per_layer_input mamba_d_head mamba_d_state mamba_head_dim "
        "ssm_state_size mamba_chunk_size chunk_size linear_key_head_dim linear_value_head_dim attention_window_size "
        "num_mel_bins n_mels num_conv_pos_embeddings d_kv cross_head_dim",
    ),
    **_alike(
        8,
        "qk_rope_head_dim rotary_dim index_topk mamba_n_heads mamba_num_heads mamba_dt_rank sliding_window "
        "local_attention attention_chunk_size",
    ),
    **_alike(
        4,
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
        "encoder_num_attention_heads decoder_num_attention_heads attention_heads num_global_query_heads "
        "swa_num_attention_heads index_n_heads mamba_d_conv linear_num_value_heads patch_size spatial_patch_size "
        "frames_per_clip cross_num_attention_heads cross_num_key_value_heads",
    ),
    **_alike(
        2,
        "num_key_value_heads n_kv_heads multi_query_group_num num_kv_heads encoder_num_key_value_heads "
        "decoder_num_key_value_heads swa_num_key_value_heads num_global_key_value_heads num_hidden_layers n_layer "
        "n_layers num_layers depth encoder_layers decoder_layers num_blocks encoder_num_hidden_layers "
        "decoder_num_hidden_layers num_decoder_layers num_encoder_layers type_vocab_size zero_expert_num "
        "n_mamba_heads linear_num_key_heads num_codebooks audio_num_codebooks tubelet_size num_experts_per_tok moe_k "
        "moe_topk top_k_experts num_experts_per_token moe_top_k num_experts num_local_experts n_routed_experts "
        "moe_num_experts num_routed_experts",
    ),
    **_alike(1, "n_group topk_group first_k_dense_replace num_dense_layers mamba_n_groups n_groups"),
    **_alike(0, "num_nextn_predict_layers num_mtp_layers num_kv_shared_layers"),
    **_alike(256, "max_position_embeddings n_positions max_sequence_length max_seq_len n_ctx"),
    **_alike(
        VOCABULARY,
        "vocab_size padded_vocab_size vocab_size_per_layer_input audio_vocab_size text_vocab_size "
        "encoder_vocab_size decoder_vocab_size codebook_size",
    ),
    "qk_head_dim": 24,
    "mamba_d_ssm": 128,
    "conv_depthwise_kernel_size": 3,
}
"""Small value of an attribute, used where a configuration has the attribute and it is an integer."""

LAYERS = re.compile(r"(layers?|depth|blocks)$")
DEPTH_SIZES = {name: size for name, size in SIZES.items() if LAYERS.search(name)}

MISSING = {
    "num_experts_per_tok": 2,
    "n_routed_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "head_dim": 16,
    "num_key_value_heads": 4,
}
"""The same where the default is None and the model needs a number."""

HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
NO_DEPTHS = ("num_dense_layers", "num_nextn_predict_layers", "num_mtp_layers", "num_kv_shared_layers")
# A number that counts things is never made larger than it was.
COUNTS = ("num_", "n_", "first_", "moe_k", "moe_topk")
TOKEN_ID = re.compile(r"_token_(id|index)$|_token$|_id$|_index$")
KEY_VALUE_HEADS = re.compile(r"(key_value|kv)_heads?|query_group")


def shrunk(config_class: type[PreTrainedConfig], changes: Mapping[str, Any]) -> PreTrainedConfig:
    """The default configuration, edited in place; `changes` go on top, those under `__init__` to the constructor."""
    rest = dict(changes)
    config = config_class(**rest.pop("__init__", {}))
    _shrink(config, rest, set())
    return config


def trimmed(config_class: type[PreTrainedConfig], changes: Mapping[str, Any]) -> PreTrainedConfig:
    """The default configuration with fewer layers alone, for those whose sizes hang together in ways of their own."""
    rest = dict(changes)
    config = config_class(**rest.pop("__init__", {}))
    _shrink(config, rest, set(), DEPTH_SIZES)
    return config


def grown(config_class: type[PreTrainedConfig], changes: Mapping[str, Any]) -> PreTrainedConfig:
    """A configuration constructed from small sizes, for those that derive settings of layers on construction."""
    rest = dict(changes)
    return _grow(config_class, {**rest.pop("__init__", {}), **rest})


def parts(config: PreTrainedConfig) -> dict[str, PreTrainedConfig]:
    """The configurations inside a configuration."""
    return {name: value for name, value in vars(config).items() if isinstance(value, PreTrainedConfig)}


def _shrink(
    config: PreTrainedConfig, changes: Mapping[str, Any], seen: set[int], sizes: Mapping[str, int] = SIZES
) -> None:
    if id(config) in seen:
        return
    seen.add(id(config))
    inner = parts(config)
    before = {name: _get(config, name) for name in ("head_dim", "qk_rope_head_dim", "num_hidden_layers")}
    heads = next((_get(config, name) for name in HEADS if isinstance(_get(config, name), int)), 0)
    kept = _kept_layers(config)
    for name, value in list(vars(config).items()):
        if kept and isinstance(value, list | tuple) and len(value) == before["num_hidden_layers"]:
            _set(config, name, type(value)(value[i] for i in kept))
    for name, value in MISSING.items():
        if hasattr(type(config), name) and _get(config, name, 0) is None:
            _set(config, name, value)
    for name, size in sizes.items():
        value = _get(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or name in inner:
            continue
        if KEY_VALUE_HEADS.search(name):
            size = 1 if value == 1 else 4 if value >= heads else 2
        if name in DEPTHS and kept:
            size = len(kept)
        if (
            name == "head_dim"
            and before["qk_rope_head_dim"]
            and before["head_dim"] == before["qk_rope_head_dim"]
        ):
            size = SIZES["qk_rope_head_dim"]
        if name.startswith(COUNTS) or LAYERS.search(name):
            size = min(size, value)
        _set(config, name, size)
    _still(config)
    if sizes is SIZES:
        _small_ids(config)
        _small_image(config)
    for name, part in inner.items():
        change = changes.get(name)
        _shrink(part, change if isinstance(change, Mapping) else {}, seen, sizes)
    for name, value in changes.items():
        if name not in inner:
            _set(config, name, value)
    _fit_rotary(config)


def _kept_layers(config: PreTrainedConfig) -> list[int]:
    """Layers that show every kind of layer once, at least two of them; empty where there is no depth."""
    depth = _get(config, "num_hidden_layers")
    if not isinstance(depth, int) or depth <= 0:
        return []
    lists = [
        value for value in vars(config).values() if isinstance(value, list | tuple) and len(value) == depth
    ]
    kinds = [tuple(json.dumps(each[i], default=str) for each in lists) for i in range(depth)]
    kept = [kinds.index(kind) for kind in dict.fromkeys(kinds)][:MOST_LAYERS] if lists else []
    kept += [i for i in range(depth) if i not in kept][: max(0, 2 - len(kept))]
    return sorted(kept)


def _still(config: PreTrainedConfig) -> None:
    """No dropout, as a training step is compared with another run of itself; no cache among the results."""
    if _get(config, "use_cache"):
        _set(config, "use_cache", False)
    for name, value in list(vars(config).items()):
        if re.search(r"drop(out|_path|_rate|_prob)|layerdrop|_pdrop$|_drop$", name) and isinstance(
            value, float
        ):
            _set(config, name, 0.0)


def _small_ids(config: PreTrainedConfig) -> None:
    for name, value in list(vars(config).items()):
        if TOKEN_ID.search(name) and _is_large_id(value):
            _set(config, name, _small_id(name))


def _is_large_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= VOCABULARY


def _small_id(name: str) -> int:
    return VOCABULARY - SPECIAL_IDS + int(hashlib.md5(name.encode()).hexdigest(), 16) % SPECIAL_IDS


def _small_image(config: PreTrainedConfig) -> None:
    size = _get(config, "image_size")
    if isinstance(size, int):
        _set(config, "image_size", 32)
    elif isinstance(size, list | tuple):
        _set(config, "image_size", [32] * len(size))


def _grow(config_class: type[PreTrainedConfig], changes: Mapping[str, Any]) -> PreTrainedConfig:
    default = config_class()
    known = set(vars(default)) | set(inspect.signature(config_class.__init__).parameters)
    for base in config_class.__mro__[:-1]:
        known |= set(getattr(base, "__annotations__", {}))
    given: dict[str, Any] = {}
    for name, size in SIZES.items():
        value = _get(default, name)
        numeric = isinstance(value, int) and not isinstance(value, bool)
        if name in known and (numeric or name in ("head_dim", "num_attention_heads")):
            given[name] = size
    if "per_layer_config" in inspect.getsource(sys.modules[config_class.__module__]):
        given["global_head_dim"] = SIZES["global_head_dim"]
    kinds = _get(default, "layer_types")
    if isinstance(kinds, list | tuple) and kinds:
        given["layer_types"] = (list(dict.fromkeys(kinds)) * 2)[: max(2, len(set(kinds)))]
        given["num_hidden_layers"] = len(given["layer_types"])
    for name, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            change = changes.get(name, {})
            given[name] = value if type(value) is config_class else _grow(type(value), change)
        elif TOKEN_ID.search(name) and _is_large_id(value):
            given[name] = _small_id(name)
    given.update({name: value for name, value in changes.items() if name not in parts(default)})
    config = config_class(**given)
    _still(config)
    _fit_rotary(config)
    return config


def _fit_rotary(config: PreTrainedConfig) -> None:
    """Fit what has one entry per plane or axis to the small head: long and short factors, M-RoPE sections."""
    parameters = _get(config, "rope_parameters")
    if not isinstance(parameters, dict):
        return
    head = _get(config, "head_dim") or _get(config, "hidden_size", 64) // max(
        1, _get(config, "num_attention_heads", 4) or 4
    )
    sections = _default_sections(config) if _get(config, "vocab_size") else None
    for each in [parameters, *(value for value in parameters.values() if isinstance(value, dict))]:
        share = each.get("partial_rotary_factor", _get(config, "partial_rotary_factor", 1.0) or 1.0)
        planes = max(1, int(head * share) // 2)
        for name, step in (("short_factor", 0.0), ("long_factor", 0.1)):
            if each.get(name):
                each[name] = [1.0 + step * plane for plane in range(planes)]
        proportions = each.get("mrope_section") or (sections if "rope_type" in each else None)
        if proportions:
            fitted = [max(1, round(planes * part / sum(proportions))) for part in proportions]
            fitted[0] += planes - sum(fitted)
            each["mrope_section"] = fitted


def _default_sections(config: PreTrainedConfig) -> list[int] | None:
    """The M-RoPE sections a model falls back to, which only its code knows."""
    name = type(config).__module__.replace(".configuration_", ".modeling_")
    try:
        source = inspect.getsource(importlib.import_module(name))
    except ImportError:
        return None
    found = re.search(r'mrope_section", \[([\d, ]+)\]', source)
    return [int(number) for number in found.group(1).split(",")] if found else None


def _get(config: PreTrainedConfig, name: str, default: Any = None) -> Any:
    try:
        return getattr(config, name, default)
    except Exception:  # a configuration per layer refuses questions about all of them
        return default


def _set(config: PreTrainedConfig, name: str, value: Any) -> None:
    try:
        setattr(config, name, value)
    except Exception:  # a checked configuration keeps what it takes
        return
