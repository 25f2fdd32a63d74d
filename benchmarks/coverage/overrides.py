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

_ONE_WIDTH = {"hidden_size": 256, "projection_dim": 256}
_NOTE_TEXT = {"head_dim": 32}
_NOTE_VISION = {"adapter_in_dim": 64, "adapter_out_dim": 64}
_NOTE_AUDIO = {"adapter_input_size": 64, "adapter_out_dim": 64}
_INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
_NO_DROPOUT = {"dropout_rate": 0.0}
_FEW_FILTERS = {"num_filters": 4}
_SHARED_EXPERT = {"shared_expert_intermediate_size": 32}

CHANGES: dict[str, dict[str, Any]] = {
    "blt/Blt": {"global_config": {"encoder_cross_output_size": 128}},
    "clvp/Clvp": {"text_config": _ONE_WIDTH, "speech_config": _ONE_WIDTH},
    "deepseek_ocr2/DeepseekOcr2Vision": {"sam_config": {"downsample_channels": [64, 64]}},
    "dots3_note/Dots3NoteText": _NOTE_TEXT,
    "dots3_note/Dots3NoteVision": _NOTE_VISION,
    "dots3_note/Dots3NoteAudio": _NOTE_AUDIO,
    "dots3_note/Dots3Note": {
        "text_config": _NOTE_TEXT,
        "vision_config": _NOTE_VISION,
        "audio_config": _NOTE_AUDIO,
    },
    "mllama/MllamaVision": {"intermediate_layers_indices": [0], "vision_output_dim": 128},
    "molmo2/Molmo2Vision": {"image_size": [32, 32], "num_position_embeddings": 64},
    "moonshine_streaming/MoonshineStreaming": {"num_key_value_heads": 4},
    "molmo2/Molmo2Adapter": {"vision_feature_layer": [-1]},
    "moshi/MoshiDepth": {"num_codebooks": 17, "input_size": 64},
    "phi4_multimodal/Phi4MultimodalAudio": {"ext_pw_out_channel": 64, "nemo_conv_channels": 64},
    "pocket_tts_audio_tokenizer": {"upsample_groups": 64},
    "qwen3_omni_moe/Qwen3OmniMoeTalkerText": _SHARED_EXPERT,
    "qwen3_omni_moe/Qwen3OmniMoeTalker": {"text_config": _SHARED_EXPERT, "spatial_merge_size": 2},
    "qwen4_exp/Qwen4ExpText": _INDEXER,
    "qwen4_exp/Qwen4Exp": {"text_config": _INDEXER},
    "t5gemma2/T5Gemma2Text": _NO_DROPOUT,
    "t5gemma2/T5Gemma2Encoder": {"text_config": _NO_DROPOUT},
    "t5gemma2/T5Gemma2Decoder": _NO_DROPOUT,
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
    "vibevoice/VibeVoice": {"audio_config": _FEW_FILTERS, "semantic_model_config": _FEW_FILTERS},
    "vibevoice_asr/VibeVoiceAsr": {
        "acoustic_tokenizer_encoder_config": _FEW_FILTERS,
        "semantic_tokenizer_encoder_config": _FEW_FILTERS,
    },
    "wav2vec2_bert": _ROTARY_POSITIONS,
    "wav2vec2_conformer": _ROTARY_POSITIONS,
    "zamba2": {
        "use_mem_rope": True,
        "n_mamba_heads": 2,
        "mamba_headdim": 64,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "mamba_ngroups": 1,
        "layers_block_type": ["mamba", "hybrid"],
        "hybrid_layer_ids": [1],
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
    "qwen3_vl@image": (
        "Qwen3VLForConditionalGeneration",
        {"vision_config": {"deepstack_visual_indexes": [0]}},
    ),
    "glm4v@image": ("Glm4vForConditionalGeneration", {}),
    "mistral3@image": ("Mistral3ForConditionalGeneration", {}),
    "llama4@image": ("Llama4ForConditionalGeneration", {"vision_config": {"intermediate_size": 256}}),
}
"""Further rows: the model class and its settings."""
