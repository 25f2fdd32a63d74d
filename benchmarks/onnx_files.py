"""The models that ONNX files are made of, and the exporters that make them.

Peers: torch.onnx at opset 20 ("plain") and at opset 23, onnxscript's `optimize_for_ort` and `onnxruntime.transformers`
on the plain file, and the exporter of transformers with its fusions for a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
import transformers as hf
from torch import nn

from grape_compile.export.onnx import export

VOCABULARY, LAYERS, HEADS, HIDDEN = 1000, 4, 8, 512
PLAIN = "plain opset 20"
OURS = {f"ours, {target}": target for target in ("standard", "ort", "portable")}


def _sizes(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 1408,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 4096,
        **more,
    }


def _gptj() -> Any:
    sizes = {"n_positions": 4096, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "rotary_dim": 32}
    return hf.GPTJForCausalLM(hf.GPTJConfig(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, **sizes))


def _deepseek_v3() -> Any:
    latent = {
        "q_lora_rank": 128,
        "kv_lora_rank": 128,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 32,
        "v_head_dim": 64,
    }
    experts = {"first_k_dense_replace": LAYERS, "n_routed_experts": 2, "num_experts_per_tok": 2, "n_group": 1}
    rest = {"topk_group": 1, "num_mtp_layers": 0, "moe_intermediate_size": 256}
    return hf.DeepseekV3ForCausalLM(
        hf.DeepseekV3Config(**_sizes(num_key_value_heads=HEADS), **latent, **experts, **rest)
    )


GROUPED = {"num_key_value_heads": 2}
#: Each family and the length of its prompt.
FAMILIES: dict[str, tuple[Callable[[], Any], int]] = {
    "llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_sizes(**GROUPED))), 512),
    "qwen3": (lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_sizes(**GROUPED, head_dim=64))), 512),
    "gpt_neox": (lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_sizes())), 512),
    "gptj": (_gptj, 512),
    "cohere": (lambda: hf.CohereForCausalLM(hf.CohereConfig(**_sizes(**GROUPED))), 512),
    "glm4": (
        lambda: hf.Glm4ForCausalLM(hf.Glm4Config(**_sizes(**GROUPED, head_dim=64, pad_token_id=0))),
        512,
    ),
    "deepseek_v3": (_deepseek_v3, 512),
    "bloom": (
        lambda: hf.BloomForCausalLM(
            hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN, n_layer=LAYERS, n_head=HEADS)
        ),
        1024,
    ),
    "mpt": (
        lambda: hf.MptForCausalLM(
            hf.MptConfig(
                vocab_size=VOCABULARY, d_model=HIDDEN, n_heads=HEADS, n_layers=LAYERS, max_seq_len=4096
            )
        ),
        1024,
    ),
}


#: What onnxruntime.transformers calls a family; the others are nearest to GPT-2.
KINDS = {"llama": "qwen3", "qwen3": "qwen3", "gpt_neox": "gpt_neox"}


def files(family: str, model: nn.Module, folder: Path) -> Iterator[tuple[str, Path | str]]:
    """Yield the file of every exporter, or what it says instead of one."""
    ids = torch.randint(3, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    open_sizes = {name: dict.fromkeys((0, 1), torch.export.Dim.AUTO) for name in given}
    with torch.no_grad():
        program = torch.export.export(
            model,
            (),
            {**given, "use_cache": False},
            dynamic_shapes={**open_sizes, "use_cache": None},
            strict=False,
        )

    plain = folder / "plain.onnx"

    def by_torch(opset: int, path: Path) -> None:
        torch.onnx.export(program, f=str(path), dynamo=True, opset_version=opset, external_data=False)

    def by_onnxscript(path: Path) -> None:
        from onnxscript.rewriter.ort_fusions import optimize_for_ort

        ir.save(optimize_for_ort(ir.load(plain))[0], path)

    def by_onnxruntime(path: Path) -> None:
        from onnxruntime.transformers.optimizer import optimize_model

        made = optimize_model(
            str(plain), KINDS.get(family, "gpt2"), num_heads=HEADS, hidden_size=HIDDEN, opt_level=0
        )
        made.save_model_to_file(str(path))

    def by_transformers(path: Path) -> None:
        from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

        made = OnnxExporter().export(
            model, {**given, "use_cache": False}, config=OnnxConfig(dynamic=True, ort_fusions="cpu")
        )
        ir.save(made.program, path)

    def by_us(target: str) -> Callable[[Path], Any]:
        return lambda path: export(model, (), given, path, target=target, verify=False)

    ways: dict[str, Callable[[Path], Any]] = {
        PLAIN: lambda path: by_torch(20, path),
        "torch opset 23": lambda path: by_torch(23, path),
        "onnxscript": by_onnxscript,
        "onnxruntime.transformers": by_onnxruntime,
        "transformers": by_transformers,
        **{name: by_us(target) for name, target in OURS.items()},
    }
    for name, way in ways.items():
        path = plain if name == PLAIN else folder / f"{len(list(folder.iterdir()))}.onnx"
        try:
            with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                way(path)
        except Exception as failure:
            yield name, f"{type(failure).__name__}: {str(failure).splitlines()[0][:120]}"
            continue
        yield name, path
