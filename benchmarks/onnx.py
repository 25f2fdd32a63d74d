"""ONNX files of one model by several exporters: what is in them, how exact and how fast they are on a CPU.

    python -m benchmarks.onnx prompts llama gptj
    python -m benchmarks.onnx steps bloom mpt

Files take turns on one thread; a time is the processor time of a call, which other work on the machine disturbs least.
Peers: torch.onnx at opset 20 ("plain") and at opset 23, onnxscript's `optimize_for_ort` and `onnxruntime.transformers`
on the plain file, and the exporter of transformers with its fusions for a CPU. Memory is what a process that only runs
the file needs more at its peak than after loading it.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
import transformers as hf
from torch import Tensor, nn

from benchmarks.cases import keep
from benchmarks.coverage.architectures import draw_parameters
from benchmarks.measuring import machine
from grape_compile.export.kv_cache import CACHE_IN, CACHE_OUT, SHARED, with_cache
from grape_compile.export.onnx import export

VOCABULARY, LAYERS, HEADS, HIDDEN = 1000, 4, 8, 512
FUSED = ("RotaryEmbedding", "Attention", "MultiHeadAttention", "GroupQueryAttention")
PLAIN = "plain opset 20"
#: Tokens in the cache of a step, and those that a buffer for it holds.
CACHED, CAPACITY = 2048, 2304
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


def open_file(path: Path) -> Any:
    """A session on one thread of the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def call(session: Any, ids: Tensor) -> Callable[[], Any]:
    """A call of a file on these tokens, all of them seen."""
    feeds = {
        each.name: (ids if "ids" in each.name else torch.ones_like(ids)).numpy()
        for each in session.get_inputs()
    }
    return lambda: session.run(None, feeds)[0]


#: Runs a file once on so many tokens and prints by how many KiB its peak is above what loading it left.
_PEAK = """
import sys
import numpy as np, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.log_severity_level = 1, 3
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
given = {each.name: np.ones((1, int(sys.argv[2])), np.int64) for each in session.get_inputs()}
told = lambda name: int(open("/proc/self/status").read().split(name)[1].split()[0])
open("/proc/self/clear_refs", "w").write("5")  # what loading needed for a while does not count
held = told("VmRSS:")
session.run(None, given)
print(told("VmHWM:") - held)
"""


def peak(path: Path, length: int) -> int:
    """Bytes that a run of a file on so many tokens needs beside the file."""
    told = subprocess.run(
        [sys.executable, "-c", _PEAK, str(path), str(length)], capture_output=True, check=True
    )
    return 1024 * int(told.stdout)


def processor_times(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of processor time of each, taking turns; two rounds before them do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 2):
        for name, way in ways.items():
            start = time.process_time()
            way()
            if turn > 1:
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(each) for name, each in seconds.items()}


def _error(found: Any, right: Tensor) -> float:
    return float(np.linalg.norm(found - right.numpy()) / np.linalg.norm(right.numpy()))


def measured(family: str, rounds: int) -> Iterator[dict[str, Any]]:
    """One row for every file of a family."""
    make, length = FAMILIES[family]
    torch.manual_seed(0)
    model = make().eval()
    draw_parameters(model, 0)
    with tempfile.TemporaryDirectory() as folder:
        rows: dict[str, dict[str, Any]] = {}
        calls: dict[str, Callable[[], Any]] = {}
        prompt = torch.randint(3, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(1))
        for name, path in files(family, model, Path(folder)):
            row = rows[name] = {
                "name": f"{family}, {name}",
                "family": family,
                "exporter": name,
                "holds": None,
            }
            if isinstance(path, str):
                row["failure"] = path
                continue
            try:
                session = open_file(path)
                counted = Counter(node.op_type for node in ir.load(path).graph.all_nodes())
                row |= {
                    "nodes": sum(counted.values()),
                    "fused": {kind: counted[kind] for kind in FUSED if counted[kind]},
                }
                row["bytes"] = sum(each.stat().st_size for each in Path(folder).glob(f"{path.stem}.onnx*"))
                row["error"] = _errors(session, model)
                row["peak"] = peak(path, length)
                calls[name] = call(session, prompt)
            except Exception as failure:
                row["failure"] = f"{type(failure).__name__}: {str(failure).splitlines()[0][:120]}"
        times = processor_times(calls, rounds)
        for name, row in rows.items():
            if name in times:
                row |= {"seconds": times[name], "faster": times[PLAIN] / times[name]}
            yield row | {"told": _told(row)}


def decoded(family: str, rounds: int) -> Iterator[dict[str, Any]]:
    """One row for every file of a family with a cache: a step of one token behind 2048."""
    torch.manual_seed(0)
    model = FAMILIES[family][0]().eval()
    draw_parameters(model, 0)
    captured = with_cache(model)
    with tempfile.TemporaryDirectory() as folder:
        paths = {PLAIN: Path(folder) / "plain.onnx"}
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            torch.onnx.export(
                captured.program, f=str(paths[PLAIN]), dynamo=True, input_names=list(captured.input_names)
            )
        for name, target in OURS.items():
            for way, told in ((True, ""), (SHARED, f", {SHARED}")):
                path = paths[f"{name}{told}"] = Path(folder) / f"{target}{told}.onnx"
                export(model, path=path, target=target, kv_cache=way, verify=False)
        sessions = {name: open_file(path) for name, path in paths.items()}
        cache = _cache(sessions[PLAIN])
        steps = {
            name: (_step_in_place if name.endswith(SHARED) else _step)(session, cache)
            for name, session in sessions.items()
        }
        right = steps[PLAIN]()
        times = processor_times(steps, 3 * rounds)
        for name, step in steps.items():
            error = float(np.linalg.norm(step() - right) / np.linalg.norm(right))
            faster = times[PLAIN] / times[name]
            yield {
                "name": f"{family}, a step behind {CACHED} tokens, {name}",
                "family": family,
                "exporter": name,
                "seconds": times[name],
                "faster": faster,
                "difference": error,
                "holds": None,
                "told": f"{faster:.3f} x the plain file; differs by {error:.1e}",
            }


def _cache(session: Any) -> dict[str, Any]:
    """Keys and values of the tokens before a step: one copy for all files, since their memory is most of its time."""
    random = np.random.default_rng(0)
    past = [each for each in session.get_inputs() if each.name.startswith("past_key_values")]
    return {
        each.name: random.standard_normal((1, each.shape[1], CACHED, each.shape[3])).astype(np.float32)
        for each in past
    }


def _step(session: Any, cache: dict[str, Any]) -> Callable[[], Any]:
    feeds = {**_token(session), **cache}
    return lambda: session.run(None, feeds)[0]


def _token(session: Any) -> dict[str, Any]:
    """What a step is given beside its cache."""
    given = {
        "input_ids": np.full((1, 1), 7, np.int64),
        "attention_mask": np.ones((1, CACHED + 1), np.int64),
        "position_ids": np.full((1, 1), CACHED, np.int64),
    }
    asked = {each.name for each in session.get_inputs()}
    return {name: numbers for name, numbers in given.items() if name in asked}


def _step_in_place(session: Any, cache: dict[str, Any]) -> Callable[[], Any]:
    """A step whose caches are buffers, bound as input and output."""
    binding = session.io_binding()
    for name, numbers in _token(session).items():
        binding.bind_cpu_input(name, numbers)
    binding.bind_output("logits")
    buffers = []
    for name, numbers in cache.items():
        rows, heads, count, width = numbers.shape
        buffer = np.zeros((rows, heads, CAPACITY, width), numbers.dtype)
        buffer[:, :, :count] = numbers
        buffers.append(held := onnxruntime.OrtValue.ortvalue_from_numpy(buffer))
        binding.bind_ortvalue_input(name, held)
        binding.bind_ortvalue_output(name.replace(CACHE_IN, CACHE_OUT), held)

    def step(buffers: Any = buffers) -> Any:
        session.run_with_iobinding(binding)  # it does not keep the buffers
        return binding.get_outputs()[0].numpy()

    return step


def _errors(session: Any, model: nn.Module) -> dict[str, float | str]:
    found: dict[str, float | str] = {}
    for batch in (1, 3):
        ids = torch.randint(3, VOCABULARY, (batch, 24), generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            right = model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        try:
            found[str(batch)] = _error(call(session, ids)(), right)
        except Exception as failure:
            found[str(batch)] = type(failure).__name__
    return found


def _told(row: dict[str, Any]) -> str:
    if "seconds" not in row:
        return str(row.get("failure", "not timed"))
    fused = ", ".join(f"{count} {kind}" for kind, count in row["fused"].items()) or "nothing fused"
    needed = f"{row['peak'] / 2**20:.0f} MiB at the peak"
    return f"{row['faster']:.3f} x the plain file ({fused}); {needed}; errors {row['error']}"


WAYS: dict[str, Callable[[str, int], Iterator[dict[str, Any]]]] = {"prompts": measured, "steps": decoded}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the families named on the command line, all without a name."""
    parser = argparse.ArgumentParser(description="compare ONNX files of several exporters")
    parser.add_argument(
        "way", choices=WAYS, help="whole prompts without a cache, or steps of one token behind one"
    )
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=", ".join(FAMILIES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="by default benchmarks/results/onnx_WAY.json")
    given = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    rows = (row for family in given.families or FAMILIES for row in WAYS[given.way](family, given.rounds))
    about = {**machine(), "onnxruntime": onnxruntime.__version__, "clock": "processor time, one thread"}
    out = given.out or Path("benchmarks/results") / f"onnx_{given.way}.json"
    keep("onnx", rows, out, {"machine": about})


if __name__ == "__main__":
    main()
