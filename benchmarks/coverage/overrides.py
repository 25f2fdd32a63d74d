"""Where a configuration needs help: settings that a generic small size cannot guess, and variants worth a row."""

from __future__ import annotations

from typing import Any


def _scaled(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


_BY_KIND_OF_LAYER = {
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
}
_ONE_SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
_TWO_EXPERTS = {"num_experts": 2, "top_k_experts": 2, "moe_intermediate_size": 32}
_FOUR_AXES = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2, 2]}}
_SHORT_WINDOW = {"sliding_window": 8}
_CONVOLUTION_AND_ATTENTION = {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}
_ROTARY_POSITIONS = {"position_embeddings_type": "rotary"}

CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "chameleon": {"vocabulary_map": {"<image>": 100, "IMGIMGA": 101}},
    "clvp/ClvpEncoder": {"hidden_size": 256, "projection_dim": 256},
    "cohere_compass/CohereCompass": {"text_config": _BY_KIND_OF_LAYER},
    "cohere_compass/CohereCompassText": _BY_KIND_OF_LAYER,
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0, "kv_n_heads": 2}},
    "deepseek_ocr2/DeepseekOcr2": {"text_config": _ONE_SPARSE},
    "deepseek_ocr2/DeepseekOcr2Text": _ONE_SPARSE,
    "diffusion_gemma/DiffusionGemma": {"text_config": _TWO_EXPERTS},
    "diffusion_gemma/DiffusionGemmaText": _TWO_EXPERTS,
    "emu3": {"vocabulary_map": {"<image>": 100}},
    "esm/Esm": {
        "__init__": {"vocab_size": 128, "pad_token_id": 1, "mask_token_id": 32},
        "position_embedding_type": "rotary",
        "token_dropout": False,
    },
    "gemma4/Gemma4Vision": {"default_output_length": 16, "pooling_kernel_size": 2},
    "granitemoehybrid": {"num_hidden_layers": 2, "layer_types": ["mamba", "attention"]},
    "granite4_vision/Granite4Vision": {
        "deepstack_layer_map": [],
        "spatial_target_layers": [],
        "downsample_rate": "1/2",
    },
    "hunyuan_vl/HunYuanVL": {"text_config": _FOUR_AXES},
    "hunyuan_vl/HunYuanVLText": _FOUR_AXES,
    "lfm2": _CONVOLUTION_AND_ATTENTION,
    "lfm2_moe": _CONVOLUTION_AND_ATTENTION,
    "llama4/Llama4Vision": {"intermediate_size": 256},
    "mimi": {"upsample_groups": 64},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "seamless_m4t": _ROTARY_POSITIONS,
    "step3p7/Step3p7": {"text_config": _SHORT_WINDOW},
    "step3p7/Step3p7Text": _SHORT_WINDOW,
    "wav2vec2_bert": _ROTARY_POSITIONS,
    "wav2vec2_conformer": _ROTARY_POSITIONS,
    "zamba2": {
        "use_mem_rope": True,
        "n_mamba_heads": 2,
        "mamba_headdim": 64,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "mamba_ngroups": 1,
    },
}
"""Settings by model folder or by `folder/Configuration`; those under `__init__` go to the constructor."""

_YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
_LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama@linear": ("LlamaForCausalLM", _scaled("linear", factor=2.0)),
    "llama@dynamic": ("LlamaForCausalLM", _scaled("dynamic", factor=2.0)),
    "llama@yarn": ("LlamaForCausalLM", _scaled("yarn", **_YARN)),
    "llama@llama3": ("LlamaForCausalLM", _scaled("llama3", **_LLAMA3)),
    "deepseek_v3@yarn": ("DeepseekV3ForCausalLM", _scaled("yarn", mscale=1.0, mscale_all_dim=1.0, **_YARN)),
    "falcon@alibi": ("FalconForCausalLM", {"alibi": True}),
    "falcon@new_decoder": ("FalconForCausalLM", {"new_decoder_architecture": True, "multi_query": False}),
    "bloom@6heads": ("BloomForCausalLM", {"n_head": 6, "hidden_size": 96}),
    "bloom@mask": ("BloomForCausalLM", {}),
    "qwen2_vl@image": ("Qwen2VLForConditionalGeneration", {}),
    "qwen2_5_vl@image": ("Qwen2_5_VLForConditionalGeneration", {}),
}
"""Further rows: the model class and its settings."""
