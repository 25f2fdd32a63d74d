"""Three models nobody wrote for us, their position encodings found and rewritten.

Llama (rotation of halves), GPT-J (neighbours, in a part of the head) and BLOOM (ALiBi) are built from
their configurations with random weights; nothing is downloaded. Each goes through inspect, compile, forward,
generate and one training step. Takes about two minutes on two cores:

    python examples/quickstart.py
"""

from __future__ import annotations

import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers
from torch import Tensor, nn

from grape_compile import grape_compile, inspect, report

HIDDEN, HEADS, LAYERS, VOCABULARY = 256, 8, 2, 1000
RUNS = 15


@dataclass(frozen=True)
class Example:
    """A model to build, and the length of the sequence its speed is measured at."""

    name: str
    build: Callable[[], Any]
    length: int


def llama() -> Any:
    sizes = {"num_attention_heads": HEADS, "num_key_value_heads": 4, "num_hidden_layers": LAYERS}
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=2 * HIDDEN, eos_token_id=None, **sizes
    )
    return transformers.LlamaForCausalLM(config)


def gptj() -> Any:
    sizes = {"n_embd": HIDDEN, "n_head": HEADS, "n_layer": LAYERS, "rotary_dim": 16, "n_positions": 2048}
    config = transformers.GPTJConfig(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=None, **sizes)
    return transformers.GPTJForCausalLM(config)


def bloom() -> Any:
    sizes = {"hidden_size": HIDDEN, "n_head": HEADS, "n_layer": LAYERS}
    config = transformers.BloomConfig(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=None, **sizes)
    return transformers.BloomForCausalLM(config)


EXAMPLES = (Example("Llama", llama, 512), Example("GPT-J", gptj, 512), Example("BLOOM", bloom, 1024))


def build(example: Example) -> Any:
    """The same random model every time."""
    torch.manual_seed(0)
    return example.build().eval()


def token_ids(length: int, batch: int = 1) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(0))


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def say(what: str, text: str) -> None:
    print(f"  {what:<10}{text}", flush=True)


def show_what_is_there(example: Example) -> None:
    start = time.perf_counter()
    found = inspect(build(example), (), {"input_ids": token_ids(64), "use_cache": False})
    say("inspect", f"{len(found.sites)} sites in {time.perf_counter() - start:.1f} s, the model unchanged")


def show_forward(model: nn.Module, eager: nn.Module, ids: Tensor) -> None:
    start = time.perf_counter()
    found = logits_of(model, ids)
    say("compile", f"{time.perf_counter() - start:.1f} s, first forward pass included")
    for line in str(report(model)).splitlines():
        print(f"    {line}".rstrip())
    wanted = logits_of(eager, ids)
    largest = (found - wanted).abs().max().item()
    say(
        "forward",
        f"largest deviation from the eager model {largest:.1e} (logits up to {wanted.abs().max():.1f})",
    )


def show_training(model: nn.Module, eager: nn.Module) -> None:
    ids = token_ids(128, batch=2)
    losses: list[list[float]] = []
    for each in (eager, model):
        each.train()
        optimizer = torch.optim.SGD(each.parameters(), lr=0.5)
        losses.append([])
        for _ in range(2):
            loss = each(input_ids=ids, labels=ids, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
        each.eval()
    before, after = losses[1]
    off = abs(after - losses[0][1])
    say(
        "train",
        f"loss {before:.4f} -> {after:.4f} after one step; the eager model's step differs by {off:.1e}",
    )


def show_generation(model: Any, eager: Any) -> None:
    ids = token_ids(16)
    options = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": 0,
    }
    found, wanted = (each.generate(ids, **options)[0, ids.shape[1] :].tolist() for each in (model, eager))
    agreement = "the same tokens as eager" if found == wanted else f"eager says {wanted}"
    say("generate", f"{found}: {agreement}")


def show_speed(model: nn.Module, example: Example, ids: Tensor) -> None:
    """Runs of the model and of `torch.compile` alone take turns: what else the machine does hits both."""
    alone = build(example)
    alone.compile()
    ways = {"torch.compile alone": alone, "grape_compile": model}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for run in range(RUNS + 2):
        for name, each in ways.items():
            start = time.perf_counter()
            logits_of(each, ids)
            if run >= 2:
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    told = ", ".join(f"{name} {1000 * median:.1f} ms" for name, median in medians.items())
    ratio = medians["torch.compile alone"] / medians["grape_compile"]
    say("speed", f"{told}: {ratio:.2f} x ({example.length} tokens, median of {RUNS})")


def main() -> None:
    """Run every example and print what happened."""
    warnings.filterwarnings("ignore")
    torch.set_float32_matmul_precision("highest")
    start = time.perf_counter()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{versions}, Python {platform.python_version()}, {torch.get_num_threads()} threads")
    for example in EXAMPLES:
        eager, model = build(example), build(example)
        millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        print(
            f"\n{example.name}  {LAYERS} layers, hidden {HIDDEN}, {HEADS} heads, {millions:.1f} M parameters"
        )
        ids = token_ids(example.length)
        show_what_is_there(example)
        grape_compile(model)
        show_forward(model, eager, ids)
        show_speed(model, example, ids)
        show_generation(model, eager)
        show_training(model, eager)
        torch.compiler.reset()
    print(f"\n{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
