"""Tiny random models of the architectures the project promises to rewrite, each with its counted truth.

One row is one architecture: how to build it from its configuration, what to feed it, how many tensors it
rotates in one forward pass and how many of its attention layers add a linear bias. Weights are drawn so that
attention is sharp: with the usual standard deviation of 0.02 every score is near zero and a wrong rotation
would hardly move a logit.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers as hf
from torch import Tensor, nn

from benchmarks.coverage.architectures import draw_parameters as draw_parameters

VOCABULARY = 128
LAYERS = 2
HEADS = 4
HEAD_DIM = 16

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HEADS * HEAD_DIM,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
# Every expert is chosen: a routing that tips over on a rounding error would drown what is measured here.
TWO_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 2}


@dataclass(frozen=True, eq=False)
class Architecture:
    """One row: `make` builds the untrained model; `rotations` and `biases` are its sites per forward pass."""

    name: str
    make: Callable[[], nn.Module]
    rotations: int = 2 * LAYERS
    biases: int = 0
    decoder: bool = True
    input_kind: str = "ids"
    forward: dict[str, Any] = field(default_factory=dict)

    @property
    def sites(self) -> int:
        return self.rotations + self.biases

    def build(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model in eval mode, its parameters drawn from `seed`.

        Only parameters are cast to `dtype`: a checkpoint loaded in bfloat16 keeps its frequencies in float32.
        """
        torch.manual_seed(seed)
        model = self.make().eval()
        draw_parameters(model, seed)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        settings = getattr(model, "generation_config", None)
        if settings is not None:
            settings.eos_token_id, settings.pad_token_id = None, 0
        return model

    def inputs(
        self, batch: int = 2, seq: int = 16, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> dict[str, Any]:
        """Keyword arguments of one forward pass: token ids, or an image whose patches are the sequence."""
        generator = torch.Generator().manual_seed(seed)
        if self.input_kind == "pixels":
            pixels = torch.randn(batch, 3, 32, 32, generator=generator)
            return {"pixel_values": pixels.to(dtype), **self.forward}
        ids = torch.randint(3, 90, (batch, seq), generator=generator)
        if self.input_kind == "encoder-decoder":
            return {"input_ids": ids, "decoder_input_ids": ids.flip(1), **self.forward}
        return {"input_ids": ids, **self.forward}


def output_of(result: Any) -> Tensor:
    """The tensor a model is judged by: what it returns, its logits, or its last hidden state."""
    if isinstance(result, Tensor):
        return result
    output: Tensor = result.logits if hasattr(result, "logits") else result.last_hidden_state
    return output


def _rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


def _yarn(**parameters: Any) -> dict[str, Any]:
    return _rope("yarn", factor=4.0, original_max_position_embeddings=64, **parameters)


def _llama(**changes: Any) -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED | changes))


def _llama3() -> Any:
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    return _llama(**_rope("llama3", **scaling))


def _mistral() -> Any:
    return hf.MistralForCausalLM(hf.MistralConfig(**GROUPED, sliding_window=8))


def _mixtral() -> Any:
    return hf.MixtralForCausalLM(hf.MixtralConfig(**GROUPED, **TWO_EXPERTS))


def _qwen2() -> Any:
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**GROUPED))


def _qwen3() -> Any:
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED, head_dim=HEAD_DIM))


def _gemma2() -> Any:
    sizes = GROUPED | {"head_dim": HEAD_DIM, "query_pre_attn_scalar": HEAD_DIM, "sliding_window": 8}
    return hf.Gemma2ForCausalLM(hf.Gemma2Config(**sizes))


def _gemma3() -> Any:
    layers = ["sliding_attention", "full_attention"]
    sizes = GROUPED | {"head_dim": HEAD_DIM, "query_pre_attn_scalar": HEAD_DIM, "sliding_window": 8}
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**sizes, layer_types=layers))


def _llama_dynamic() -> Any:
    # Longer than what it was trained on from the first decoded tokens on: the frequencies change underway.
    return _llama(**_rope("dynamic", factor=2.0) | {"max_position_embeddings": 12})


def _phi() -> Any:
    return hf.PhiForCausalLM(hf.PhiConfig(**GROUPED))


def _phi3() -> Any:
    return hf.Phi3ForCausalLM(hf.Phi3Config(**GROUPED, original_max_position_embeddings=256))


def _phi3_longrope() -> Any:
    planes = range(HEAD_DIM // 2)
    factors = {
        "short_factor": [1.0 + 0.1 * j for j in planes],
        "long_factor": [2.0 + 0.1 * j for j in planes],
    }
    trained = {"original_max_position_embeddings": 12}
    return hf.Phi3ForCausalLM(hf.Phi3Config(**GROUPED, **trained, **_rope("longrope", **factors, **trained)))


def _gpt_neox() -> Any:
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SIZES))


def _gptj() -> Any:
    sizes = {
        "n_positions": 256,
        "n_embd": 64,
        "n_layer": LAYERS,
        "n_head": HEADS,
        "n_inner": 96,
        "rotary_dim": 8,
    }
    return hf.GPTJForCausalLM(hf.GPTJConfig(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, **sizes))


def _falcon(**changes: Any) -> Any:
    sizes = {key: size for key, size in SIZES.items() if key != "intermediate_size"}
    return hf.FalconForCausalLM(hf.FalconConfig(**sizes, ffn_hidden_size=96, **changes))


def _bloom(heads: int) -> Any:
    sizes = {"hidden_size": heads * HEAD_DIM, "n_layer": LAYERS, "n_head": heads, "pad_token_id": 0}
    return hf.BloomForCausalLM(hf.BloomConfig(vocab_size=VOCABULARY, **sizes))


def _mpt() -> Any:
    sizes = {"d_model": 64, "n_heads": HEADS, "n_layers": LAYERS, "max_seq_len": 256, "expansion_ratio": 2}
    return hf.MptForCausalLM(hf.MptConfig(vocab_size=VOCABULARY, **sizes))


def _cohere() -> Any:
    return hf.CohereForCausalLM(hf.CohereConfig(**GROUPED))


def _glm4() -> Any:
    return hf.Glm4ForCausalLM(hf.Glm4Config(**GROUPED, head_dim=HEAD_DIM))


def _deepseek_v3(**changes: Any) -> Any:
    latent = {
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
    }
    experts = {"n_routed_experts": 2, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    depth = {"first_k_dense_replace": 1, "moe_intermediate_size": 32, "num_mtp_layers": 0}
    sizes = SIZES | {"num_key_value_heads": HEADS}
    return hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**sizes, **latent, **experts, **depth, **changes))


def _gpt_oss() -> Any:
    return hf.GptOssForCausalLM(
        hf.GptOssConfig(**GROUPED, **TWO_EXPERTS, head_dim=HEAD_DIM, sliding_window=8)
    )


def _llama4() -> Any:
    # The fourth layer is the one without a rotation.
    sizes = GROUPED | {"num_hidden_layers": 4, "head_dim": HEAD_DIM, "intermediate_size_mlp": 64}
    return hf.Llama4ForCausalLM(hf.Llama4TextConfig(**sizes, **TWO_EXPERTS, attention_chunk_size=8))


def _qwen2_vl_text_sizes() -> dict[str, Any]:
    return GROUPED | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    }


def _qwen2_vl_text() -> Any:
    return hf.Qwen2VLTextModel(hf.Qwen2VLTextConfig(**_qwen2_vl_text_sizes()))


def _qwen2_vl() -> Any:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    tokens = {
        "image_token_id": 120,
        "video_token_id": 121,
        "vision_start_token_id": 122,
        "vision_end_token_id": 123,
    }
    config = hf.Qwen2VLConfig(text_config=_qwen2_vl_text_sizes(), vision_config=vision, **tokens)
    return hf.Qwen2VLForConditionalGeneration(config)


def _esm() -> Any:
    sizes = SIZES | {"pad_token_id": 1, "mask_token_id": 32}
    return hf.EsmForMaskedLM(hf.EsmConfig(**sizes, position_embedding_type="rotary", token_dropout=False))


def _roformer() -> Any:
    return hf.RoFormerForCausalLM(hf.RoFormerConfig(**SIZES, is_decoder=True))


def _eurobert() -> Any:
    return hf.EuroBertForMaskedLM(hf.EuroBertConfig(**GROUPED, mask_token_id=4))


def _dinov3_vit() -> Any:
    sizes = {key: SIZES[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    vision = {"image_size": 32, "patch_size": 4, "num_attention_heads": HEADS, "num_register_tokens": 2}
    return hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**sizes, **vision))


def _gpt2() -> Any:
    sizes = {"n_positions": 256, "n_embd": 64, "n_layer": LAYERS, "n_head": HEADS}
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, **sizes))


def _opt() -> Any:
    sizes = {"ffn_dim": 96, "word_embed_proj_dim": 64}
    plain = {key: size for key, size in SIZES.items() if key != "intermediate_size"}
    return hf.OPTForCausalLM(hf.OPTConfig(**plain, **sizes))


def _bert() -> Any:
    return hf.BertForMaskedLM(hf.BertConfig(**SIZES))


def _t5() -> Any:
    sizes = {"d_model": 64, "d_kv": HEAD_DIM, "d_ff": 96, "num_layers": LAYERS, "num_heads": HEADS}
    return hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **sizes)
    )


def _swin() -> Any:
    sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
    return hf.SwinModel(hf.SwinConfig(**sizes, window_size=4))


NO_CACHE = {"use_cache": False}


def _decoder(name: str, make: Callable[[], nn.Module], **changes: Any) -> Architecture:
    return Architecture(name, make, **{"forward": NO_CACHE} | changes)


def _encoder(name: str, make: Callable[[], nn.Module], **changes: Any) -> Architecture:
    return Architecture(name, make, **{"decoder": False} | changes)


def _with_bias(name: str, make: Callable[[], nn.Module]) -> Architecture:
    return _decoder(name, make, rotations=0, biases=LAYERS)


ENCODED: tuple[Architecture, ...] = (
    _decoder("llama", _llama),
    _decoder("llama-linear", lambda: _llama(**_rope("linear", factor=2.0))),
    _decoder("llama-yarn", lambda: _llama(**_yarn())),
    _decoder("llama-llama3", _llama3),
    _decoder("mistral", _mistral),
    _decoder("mixtral", _mixtral),
    _decoder("qwen2", _qwen2),
    _decoder("qwen3", _qwen3),
    _decoder("gemma2", _gemma2),
    _decoder("gemma3", _gemma3),
    _decoder("phi", _phi),
    _decoder("phi3", _phi3),
    _decoder("gpt_neox", _gpt_neox),
    _decoder("gptj", _gptj),
    _decoder("falcon", _falcon),
    _decoder("falcon-new_decoder", lambda: _falcon(new_decoder_architecture=True, num_kv_heads=2)),
    _with_bias("bloom", lambda: _bloom(heads=4)),
    _with_bias("bloom-6heads", lambda: _bloom(heads=6)),
    _with_bias("mpt", _mpt),
    _decoder("cohere", _cohere),
    _decoder("glm4", _glm4),
    _decoder("deepseek_v3", _deepseek_v3),
    _decoder("deepseek_v3-yarn", lambda: _deepseek_v3(**_yarn(mscale=1.0, mscale_all_dim=1.0))),
    _decoder("gpt_oss", _gpt_oss),
    _decoder("llama4_text", _llama4, rotations=6),
    _decoder("qwen2_vl_text", _qwen2_vl_text, decoder=False),
    _decoder("qwen2_vl", _qwen2_vl),
    _encoder("esm", _esm),
    _decoder("roformer", _roformer),
    _encoder("eurobert", _eurobert),
    _encoder("dinov3_vit", _dinov3_vit, input_kind="pixels"),
)

CACHED: tuple[Architecture, ...] = (
    *(
        row
        for row in ENCODED
        if row.name
        in ("llama", "gptj", "bloom", "mpt", "falcon", "gemma3", "mistral", "deepseek_v3", "gpt_oss", "qwen3")
    ),
    _with_bias("falcon-alibi", lambda: _falcon(alibi=True)),
    _decoder("phi3-longrope", _phi3_longrope),
    _decoder("llama-dynamic", _llama_dynamic),
)
"""Decoders that stand for the ways of writing a position down, run with every kind of cache."""

WITHOUT: tuple[Architecture, ...] = (
    _decoder("gpt2", _gpt2, rotations=0),
    _decoder("opt", _opt, rotations=0),
    _encoder("bert", _bert, rotations=0),
    _encoder("t5", _t5, rotations=0, input_kind="encoder-decoder", forward=NO_CACHE),
    _encoder("swin", _swin, rotations=0, input_kind="pixels"),
)

ARCHITECTURES = ENCODED + WITHOUT
BY_NAME = {row.name: row for row in ARCHITECTURES}


class Logits(nn.Module):
    """A model as a function of token ids to one tensor: what an exporter likes to be given."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return output_of(self.model(input_ids=ids, use_cache=False))
