"""Moves a trained RoPE model to encodings that learn: the same function at first, a little training, an ONNX file.

    python examples/upgrade_llama.py

The model is the byte-level one of train_tiny_lm.py, its rotation written as Llama writes it; it is trained first where
there is no checkpoint. Needs the extras `onnx` and `ort`.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from pathlib import Path
from textwrap import fill, indent
from typing import Any

import torch
from tiny_lm import PRESETS, batch, bits_per_byte, corpus, trained
from torch import Tensor
from torch.nn import functional as F

from grape_compile import parameter_groups, report, upgrade
from grape_compile.export import onnx

TARGETS = ("grape-m", "grape-m+grape-ap")
SETTINGS = PRESETS["minute"]
STEPS, WINDOWS = 100, 8


def main() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)  # of torch, about itself
    print("A RoPE model of two layers; where build/tiny_lm has none, it is trained for a minute.", flush=True)
    original, (text, validation) = trained("plain rope"), corpus()
    tokens = batch(validation, SETTINGS, seed=7, step=0)[:, :-1]
    with torch.no_grad():
        before = original(tokens)
    print(f"  as it was trained: {told(original, validation)}")
    continued = copy.deepcopy(original)
    learn(continued, text)
    print(f"  after {STEPS} steps more: {told(continued, validation)}")
    for to in TARGETS:
        print(f"\nUpgraded to {to}", flush=True)
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always", UserWarning)
            model = upgrade(copy.deepcopy(original), to, args=(tokens,), backend="eager")
        for note in notes:
            print(indent(fill(str(note.message), 100), "  | "))
        with torch.no_grad():
            change = float((model(tokens) - before).norm() / before.norm())
        print(f"  {len(report(model).sites)} sites; logits differ by {change:.1e} from those of RoPE")
        learn(model, text)
        print(f"  after {STEPS} steps: {told(model, validation)}")
        print(f"  {moved(model)}", flush=True)
        print(f"  {exported(model, tokens)}")


def learn(model: torch.nn.Module, text: Tensor) -> None:
    """A short training; encodings without weight decay, and faster: they begin where they were."""
    groups = parameter_groups(model, lr=3e-4, weight_decay=0.1, encoding_lr=1e-2)
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for step in range(STEPS):
        tokens = batch(text, SETTINGS, seed=1, step=step)
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def told(model: Any, validation: Tensor) -> str:
    """Bits per byte at the length of training, and at four times that."""
    losses = (bits_per_byte(model, validation, SETTINGS, multiple, WINDOWS) for multiple in (1, 4))
    return "{:.3f} bits per byte, {:.3f} at four times the length".format(*losses)


def moved(model: torch.nn.Module) -> str:
    """By how much the encodings learned."""
    thetas = [each for name, each in model.named_parameters() if name.endswith("log_theta")]
    factors = torch.cat([(each.detach() / 16).exp() for each in thetas])
    return f"learned frequencies: {factors.min():.3f} to {factors.max():.3f} times those of RoPE"


def exported(model: torch.nn.Module, tokens: Tensor) -> str:
    """What an ONNX file of the model computes in ONNX Runtime, beside the model."""
    from onnxruntime import InferenceSession

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.export(model.eval(), (tokens,), path=path, target="standard")
        session = InferenceSession(path, providers=["CPUExecutionProvider"])
        [found] = session.run(None, {session.get_inputs()[0].name: tokens.numpy()})
        size = path.stat().st_size / 1e6
    with torch.no_grad():
        right = model(tokens)
    change = float((torch.from_numpy(found) - right).norm() / right.norm())
    return f"ONNX file of {size:.1f} MB: its logits in ONNX Runtime differ by {change:.1e} from those of the model"


if __name__ == "__main__":
    main()
