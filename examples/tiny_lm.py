"""A byte-level language model with any position encoding, trained on the standard library of the running Python.

`train` trains one model and can be killed and called again; `trained` gives a trained model, and trains it first where
there is none. `train_tiny_lm.py` compares encodings with it.
"""

from __future__ import annotations

import hashlib
import math
import os
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grape_compile.nn import GRAPEAttention

BYTES = 256
#: Folders of the standard library that hold tests, and what others installed beside it.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
#: Lengths at which a model is evaluated, as multiples of the one it was trained at.
MULTIPLES = (1, 2, 4, 8)
#: Points of a training curve, each the mean loss of the steps around it.
CURVE = 100


@dataclass(frozen=True)
class Settings:
    """One budget, the same for all encodings: sizes of model and batch, number of steps, learning rate."""

    width: int
    layers: int
    heads: int
    length: int
    batch: int
    steps: int
    rate: float = 1e-3
    windows: int = 64
    device: str = "cpu"


PRESETS = {
    "cpu": Settings(width=128, layers=5, heads=4, length=128, batch=4, steps=1200),
    # The text is read four to five times.
    "gpu": Settings(
        width=512, layers=8, heads=8, length=512, batch=64, steps=1500, windows=256, device="cuda"
    ),
    "quick": Settings(width=32, layers=1, heads=2, length=16, batch=4, steps=12, windows=2),
    "minute": Settings(width=128, layers=2, heads=4, length=128, batch=4, steps=500),
}


class RopeAttention(nn.Module):
    """Causal attention with RoPE in plain torch, as models write it; parameters as those of `GRAPEAttention`."""

    cos: Tensor
    sin: Tensor

    def __init__(self, width: int, heads: int, longest: int) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        frequencies = 10000.0 ** (-torch.arange(0, self.head_dim, 2) / self.head_dim)
        angles = torch.arange(longest)[:, None] * torch.cat((frequencies, frequencies))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = (
            proj(hidden).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(self.turned(query), self.turned(key), value, is_causal=True)
        result: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return result

    def turned(self, heads: Tensor) -> Tensor:
        """Each half of a head [B, H, T, D] turns with the other."""
        length = heads.shape[-2]
        first, second = heads.chunk(2, dim=-1)
        return heads * self.cos[:length] + torch.cat((-second, first), dim=-1) * self.sin[:length]


class Block(nn.Module):
    """Attention and two linear layers, each behind a norm and beside the residual stream."""

    def __init__(self, width: int, attention: nn.Module) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = attention
        self.up_proj = nn.Linear(width, 4 * width, bias=False)
        self.down_proj = nn.Linear(4 * width, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden))
        result: Tensor = hidden + self.down_proj(F.gelu(self.up_proj(self.mlp_norm(hidden))))
        return result


class TinyLM(nn.Module):
    """Bytes in, logits of the next byte out; `encoding` is a name of `grape_compile.nn.trainable`, or "plain rope"."""

    def __init__(self, settings: Settings, encoding: str) -> None:
        super().__init__()
        width, heads = settings.width, settings.heads
        self.embedding = nn.Embedding(BYTES, width)
        self.blocks = nn.ModuleList(
            Block(
                width,
                RopeAttention(width, heads, settings.length * MULTIPLES[-1])
                if encoding == "plain rope"
                else GRAPEAttention(width, heads, encoding),
            )
            for _ in range(settings.layers)
        )
        self.norm = nn.RMSNorm(width)

    def start(self, seed: int) -> None:
        """Give all weights outside of the encodings the same start for one seed, whatever the encoding draws."""
        random = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if ".grape." in name or parameter.dim() < 2:
                continue
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 if "embedding" in name else 0.5 * parameter.shape[-1] ** -0.5
            std *= (2 * len(self.blocks)) ** -0.5 if writes else 1.0
            with torch.no_grad():
                parameter.copy_(std * torch.randn(parameter.shape, generator=random))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        return F.linear(self.norm(hidden), self.embedding.weight)


def corpus() -> tuple[Tensor, Tensor]:
    """The sources of the standard library as bytes, to train with and to validate with: every tenth file by name."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(
        (path.relative_to(root).as_posix(), path)
        for path in root.rglob("*.py")
        if not LEFT_OUT & set(path.relative_to(root).parts)
    )
    texts: tuple[list[bytes], list[bytes]] = ([], [])
    for name, path in files:
        held_out = hashlib.sha256(name.encode()).digest()[0] % 10 == 0
        texts[held_out].append(path.read_bytes())
    train, validation = (torch.frombuffer(bytearray(b"\0".join(each)), dtype=torch.uint8) for each in texts)
    return train, validation


def batch(text: Tensor, settings: Settings, seed: int, step: int) -> Tensor:
    """The bytes of one step, [batch, length + 1]: the same for every encoding, wherever a run was resumed."""
    random = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(text) - settings.length - 1, (settings.batch, 1), generator=random)
    return text[starts + torch.arange(settings.length + 1)].long().to(settings.device)


@torch.no_grad()
def bits_per_byte(model: TinyLM, text: Tensor, settings: Settings, multiple: int, windows: int) -> float:
    """The mean loss over windows of `multiple` training lengths; every multiple sees the same bytes."""
    whole = settings.length * MULTIPLES[-1]
    starts = torch.linspace(0, len(text) - whole - 1, windows).long()
    total = 0.0
    for start in starts.tolist():
        piece = text[start : start + whole + 1].long().to(settings.device)
        tokens, targets = (each.view(-1, settings.length * multiple) for each in (piece[:-1], piece[1:]))
        total += float(F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()))
    return total / windows / math.log(2.0)


def groups(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Parameters with weight decay, and those without: norms, and all of an encoding."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (free if ".grape." in name or parameter.dim() < 2 else decayed).append(parameter)
    yield {"params": decayed, "weight_decay": 0.1}
    yield {"params": free, "weight_decay": 0.0}


def rate(settings: Settings, step: int) -> float:
    """Learning rate: rises over the first twentieth of the steps, then falls as a cosine to a tenth."""
    rising = settings.steps / 20
    if step < rising:
        return settings.rate * (step + 1) / rising
    done = (step - rising) / (settings.steps - rising)
    return settings.rate * (0.55 + 0.45 * math.cos(math.pi * done))


def train(
    encoding: str,
    seed: int,
    settings: Settings,
    folder: Path,
    tell: Callable[[int, float], None] = lambda step, loss: None,
) -> dict[str, Any]:
    """Train one model, from its last checkpoint where there is one, and return what was measured.

    `folder` keeps a checkpoint every twentieth of the steps. `tell` hears the step and its bits per byte.
    """
    torch.manual_seed(seed)
    text, validation = corpus()
    model = TinyLM(settings, encoding)
    model.start(seed)
    model.to(settings.device)
    optimiser = torch.optim.AdamW(groups(model), lr=settings.rate, betas=(0.9, 0.95))
    path = checkpoint(encoding, seed, settings, folder)
    state: dict[str, Any] = {"step": 0, "losses": [], "validation": [], "seconds": 0.0}
    if path.exists():
        # The optimiser counts its steps on the CPU, and moves the rest to where the parameters are.
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state.pop("model"))
        optimiser.load_state_dict(state.pop("optimiser"))
    every = max(settings.steps // 20, 1)
    began = time.perf_counter()
    for step in range(state["step"], settings.steps):
        for group in optimiser.param_groups:
            group["lr"] = rate(settings, step)
        tokens = batch(text, settings, seed, step)
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        bits = float(loss.detach()) / math.log(2.0)
        state["losses"].append(bits)
        tell(step + 1, bits)
        if (step + 1) % every == 0 or step + 1 == settings.steps:
            few = bits_per_byte(model, validation, settings, 1, max(settings.windows // 8, 1))
            state["validation"].append((step + 1, few))
            state["seconds"] += time.perf_counter() - began
            began = time.perf_counter()
            parts = {"model": model.state_dict(), "optimiser": optimiser.state_dict()}
            save({**state, "step": step + 1, **parts}, path)
    return {
        "encoding": encoding,
        "seed": seed,
        "settings": asdict(settings),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "losses": [sum(some) / len(some) for some in in_pieces(state["losses"], CURVE)],
        "validation": state["validation"],
        "seconds": state["seconds"],
        "bits per byte": {
            str(multiple): bits_per_byte(model, validation, settings, multiple, settings.windows)
            for multiple in MULTIPLES
        },
    }


def in_pieces(numbers: Sequence[float], count: int) -> Iterator[Sequence[float]]:
    """Cut a list into pieces of one length, at most `count` of them and a rest."""
    size = max(len(numbers) // count, 1)
    return (numbers[at : at + size] for at in range(0, len(numbers), size))


def checkpoint(encoding: str, seed: int, settings: Settings, folder: Path) -> Path:
    """Where the checkpoint of a run lies; runs of other settings have other names."""
    mark = hashlib.sha256(repr(settings).encode()).hexdigest()[:8]
    return folder / f"{encoding}-{seed}-{mark}.pt"


def save(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint beside its place and move it there, so that a killed run leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def trained(
    encoding: str = "rope", seed: int = 0, preset: str = "minute", folder: Path = Path("build/tiny_lm")
) -> TinyLM:
    """Return a trained model, from its checkpoint or trained now; "plain rope" is that of "rope" in plain torch."""
    settings, written = PRESETS[preset], encoding.removeprefix("plain ")
    train(written, seed, settings, folder)
    path = checkpoint(written, seed, settings, folder)
    state = torch.load(path, map_location="cpu", weights_only=True)
    model = TinyLM(settings, encoding)
    model.load_state_dict(state["model"])
    return model.eval()
