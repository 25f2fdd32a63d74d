"""What makes a layer of a model an upgraded one: a hook that carries the slots of its encoding into every graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from grape_compile.encoding import (
    Accumulated,
    Bias,
    Compose,
    Encoding,
    Multiplicative,
    PathBias,
    Positions,
)
from grape_compile.errors import UpgradeError
from grape_compile.nn.streams import Stream, cache_among
from grape_compile.nn.trainable import Slots
from grape_compile.operators.prepare import by_root_mean_square, parts
from grape_compile.operators.upgraded import TOKENS, asks_for_places

#: The name under which an attention module has its encoding.
NAME = "grape"


@dataclass(eq=False)
class Upgraded:
    """The forward pre-hook of an attention module whose encoding is its child `grape`, or that of another, `shared`.

    It marks the hidden states with the encoding and its slots (`grape::upgraded`). `frequencies`, `turned`,
    `attended` and `unbiased` tell what the module's own code does; `entry` is the number of the layer it adds to
    caches.
    """

    module: str
    frequencies: tuple[float, ...]
    turned: int
    attended: int
    entry: int
    carried: Carried
    unbiased: bool
    shared: nn.Module | None = None

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        place, hidden = _hidden(self.module, args, kwargs)
        trained: Any = getattr(module, NAME) if self.shared is None else self.shared
        slots = trained.carried(hidden)
        cache = cache_among(args, kwargs)
        stream = None
        if cache is not None:
            stream = Stream(cache, self.entry, getattr(module, "layer_idx", None))
        text = self.carried.fill(slots, stream, hidden)
        marked = torch.ops.grape.upgraded(
            hidden,
            list(slots.values()),
            list(slots),
            text,
            self.module,
            list(self.frequencies),
            self.turned,
            self.attended,
            stream is not None and stream.ends_with(hidden),
            self.unbiased,
        )
        if isinstance(place, str):
            return args, {**kwargs, place: marked}
        return (*args[:place], marked, *args[place + 1 :]), kwargs


def is_upgraded(model: nn.Module) -> bool:
    """Whether any module of a model is an upgraded layer."""
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return any(isinstance(hook, Upgraded) for hook in hooks)


def _hidden(module: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int | str, Tensor]:
    """The hidden states [B, T, C] among the arguments of a module, and their place."""
    given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for place, value in given:
        if isinstance(value, Tensor) and value.dim() == 3 and value.is_floating_point():
            return place, value
    raise UpgradeError(
        f"read the hidden states that {module} is called with",
        "no tensor of three axes among its arguments",
        "a module that is given hidden states [batch, tokens, channels]",
    )


@dataclass(frozen=True)
class Carried:
    """How the slots of an encoding are carried, in plain values that torch.compile traces at no cost.

    `rates` names the rates that become phases, `sums` those that biases sum up over all tokens, `gate` that of keys
    that turn, which a cache does not hold as they were; `text` is the encoding
    for keys that are all at hand, `streamed` that for keys from a cache, where the edges of a path have turned.
    `asks_for_places`: what is added asks where among the keys a query stands.
    """

    text: str
    streamed: str
    rates: str | None
    sums: tuple[str, ...]
    gate: str | None
    path: Path | None
    asks_for_places: bool

    @classmethod
    def of(cls, encoding: Encoding) -> Carried:
        """What there is to carry of an encoding."""
        whole = parts(encoding)
        clocks = [(part, part.clock) for part in whole if isinstance(part, Multiplicative | Bias)]
        running = [(part, clock.slot) for part, clock in clocks if isinstance(clock, Accumulated)]
        rates = [slot for part, slot in running if isinstance(part, Multiplicative)]
        turns = any(isinstance(part, Multiplicative) for part in whole)
        gates = [
            part.gate.key for part in whole if turns and isinstance(part, Bias) and part.gate is not None
        ]
        paths = [part for part in whole if isinstance(part, PathBias)]
        streamed = [
            replace(part, normalised="none", turn=None) if isinstance(part, PathBias) else part
            for part in whole
        ]
        return cls(
            str(encoding),
            str(Compose(tuple(streamed)).canonical() if streamed else encoding),
            rates[0] if rates else None,
            tuple(slot for part, slot in running if isinstance(part, Bias)),
            gates[0] if gates else None,
            Path.of(paths[0]) if paths else None,
            any(map(asks_for_places, whole)),
        )

    def fill(self, slots: Slots, stream: Stream | None, hidden: Tensor) -> str:
        """Let slots of new tokens be those of all tokens; return the encoding they belong to."""
        kept: Slots = {}
        if self.rates is not None:
            rates = slots.pop(self.rates).to(torch.float64)
            sums = rates.cumsum(-1)
            before = None if stream is None else stream.last()
            if before is not None:
                sums = sums + before[:, :1, :, 0]  # one phase for all heads, however many are kept
            slots["phases"] = (sums - rates).squeeze(1)
            kept["phases"] = sums.unsqueeze(-1)
        if stream is None:
            return self.text
        if self.asks_for_places and not stream.ends_with(hidden):
            slots[TOKENS] = stream.tokens(hidden)
        for name in self.sums:
            kept[name] = slots[name].unsqueeze(-1)
        if self.gate is not None:
            kept[self.gate] = torch.ops.grape.awaited(hidden, slots[self.gate]).unsqueeze(-1)
        if self.path is not None:
            slots[self.path.query], kept[self.path.key] = self.path.turned(slots, stream)
        if kept:
            for name, whole in _appended(kept, stream).items():
                if name != "phases":
                    slots[name] = whole
        return self.streamed


@dataclass(frozen=True)
class Path:
    """How the edges of a path are kept: divided by their root mean square, turned once by the text `turn`."""

    query: str
    key: str
    normalised: str
    turn: str | None

    @classmethod
    def of(cls, path: PathBias) -> Path:
        """What is done to the edges of a path bias, whose turn has a spectrum in closed form."""
        turn = None if path.turn is None else str(path.turn.by(Positions("steps")))
        return cls(path.query, path.key, path.normalised, turn)

    def turned(self, slots: Slots, stream: Stream) -> tuple[Tensor, Tensor]:
        """The queries and the edges of new tokens, as a bias without turn and norm takes them."""
        query, edges = slots[self.query], slots[self.key]
        if self.normalised == "both":
            query = by_root_mean_square(query)
        if self.normalised != "none":
            edges = by_root_mean_square(edges)
        if self.turn is not None:
            steps = torch.arange(edges.shape[-2], device=edges.device) + stream.length()
            edges = torch.ops.grape.rotate([edges], [steps], self.turn)[0]
        return query, edges


def _appended(kept: Slots, stream: Stream) -> Slots:
    """Keep numbers [B, H or 1, T, C] of new tokens side by side; return those of all tokens, [B, H, T_k(, C)]."""
    heads = max(each.shape[1] for each in kept.values())
    double = any(each.dtype == torch.float64 for each in kept.values())
    wide = [
        each.to(torch.float64 if double else torch.float32).expand(-1, heads, -1, -1)
        for each in kept.values()
    ]
    whole = stream.append(torch.cat(wide, -1))
    slots: Slots = {}
    start = 0
    for name, new in kept.items():
        count = new.shape[-1]
        part = whole[..., start : start + count]
        slots[name] = (part if count > 1 else part.squeeze(-1)).to(new.dtype)
        start += count
    return slots
