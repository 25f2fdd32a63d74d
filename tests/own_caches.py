"""Attention layers that keep their past themselves, as people write it: joined, listed, written into, round a ring.

Each is called with the tokens of one step, [B, T, hidden], and the number of tokens seen before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from attention_layers import HEAD_DIM, HEADS, HIDDEN, inverse_frequencies
from torch import Tensor, nn
from torch.nn import functional

ROOM = 24
RING = 8
SLOPES = torch.tensor([0.3, 0.07])


class Keeping(nn.Module):
    """Queries, keys, values and forget gates of a layer; `kept` is what a step leaves to the next."""

    slopes: Tensor
    inv_freq: Tensor
    kept: tuple[Tensor, ...] | list[Tensor] | None

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HIDDEN, 3 * HEADS * HEAD_DIM, bias=False)
        self.forget = nn.Linear(HIDDEN, HEADS)
        self.register_buffer("slopes", SLOPES.clone(), persistent=False)
        self.register_buffer("inv_freq", inverse_frequencies(HEAD_DIM // 2), persistent=False)
        self.kept = None

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self.qkv(x).unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        return query, key, value

    def turned(self, x: Tensor, places: Tensor) -> Tensor:
        angle = places[..., None].to(x.dtype) * self.inv_freq
        cos, sin = torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    def log_gates(self, x: Tensor) -> Tensor:
        """[B, H, T]"""
        return functional.logsigmoid(self.forget(x)).transpose(1, 2)


def mixed(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """Attention [B, T, hidden] over keys that are not `hidden`, with a bias."""
    scores = query @ key.transpose(-1, -2) * HEAD_DIM**-0.5 + bias
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    found: Tensor = (weights @ value).transpose(1, 2).flatten(-2)
    return found


def later(count: int, total: int) -> Tensor:
    """Keys behind each of the last queries, [T, all]."""
    return torch.arange(total) > torch.arange(total - count, total)[:, None]


# -- the past joined to the present ------------------------------------------------------------------------


class Joined(Keeping):
    """One tuple of tensors, longer by every step."""

    def joined(self, *new: Tensor) -> tuple[Tensor, ...]:
        if self.kept is not None:
            new = tuple(torch.cat((old, each), 2) for old, each in zip(self.kept, new, strict=True))
        self.kept = new
        return new


class JoinedRope(Joined):
    def forward(self, x: Tensor, past: int) -> Tensor:
        query, key, value = self.heads(x)
        places = torch.arange(past, past + x.shape[1])
        query, (key, value) = self.turned(query, places), self.joined(self.turned(key, places), value)
        return mixed(query, key, value, later(x.shape[1], key.shape[2]))


class TurnedWhenRead(Joined):
    """Keys are kept as they are and turn whenever they are read."""

    def forward(self, x: Tensor, past: int) -> Tensor:
        query, key, value = self.heads(x)
        key, value = self.joined(key, value)
        total = key.shape[2]
        query = self.turned(query, torch.arange(total - x.shape[1], total))
        key = self.turned(key, torch.arange(total))
        return mixed(query, key, value, later(x.shape[1], total))


class JoinedAlibi(Joined):
    def forward(self, x: Tensor, past: int) -> Tensor:
        query, key, value = self.heads(x)
        key, value = self.joined(key, value)
        total = key.shape[2]
        apart = torch.arange(total) - torch.arange(total - x.shape[1], total)[:, None]
        bias = self.slopes[:, None, None] * apart
        return mixed(query, key, value, later(x.shape[1], total), bias)


class JoinedGates(Joined):
    """FoX: log gates beside keys and values, summed up anew over all of them."""

    def forward(self, x: Tensor, past: int) -> Tensor:
        query, key, value = self.heads(x)
        key, value, gates = self.joined(key, value, self.log_gates(x))
        total = gates.cumsum(-1)
        bias = total[..., -x.shape[1] :, None] - total[..., None, :]
        return mixed(query, key, value, later(x.shape[1], key.shape[2]), bias)


class JoinedSums(Joined):
    """FoX: sums of log gates beside keys and values, which go on from the last one."""

    def forward(self, x: Tensor, past: int) -> Tensor:
        query, key, value = self.heads(x)
        sums = self.log_gates(x).cumsum(-1)
        if self.kept is not None:
            sums = self.kept[2][..., -1:] + sums
        key, value, kept = self.joined(key, value, sums)
        bias = sums[..., None] - kept[..., None, :]
        return mixed(query, key, value, later(x.shape[1], key.shape[2]), bias)


# -- a list with an entry a step ---------------------------------------------------------------------------


class Listed(Joined):
    def joined(self, *new: Tensor) -> tuple[Tensor, ...]:
        self.kept = [*(self.kept or []), *new]
        return tuple(torch.cat(self.kept[place :: len(new)], 2) for place in range(len(new)))


class ListedRope(Listed, JoinedRope):
    pass


class ListedAlibi(Listed):
    def forward(self, x: Tensor, past: int) -> Tensor:
        query, key, value = self.heads(x)
        key, value = self.joined(key, value)
        bias = self.slopes[:, None, None] * torch.arange(key.shape[2])
        return mixed(query, key, value, later(x.shape[1], key.shape[2]), bias)


# -- buffers that are written into -------------------------------------------------------------------------


class Room(Keeping):
    """Buffers with room for all tokens."""

    keys: Tensor
    values: Tensor
    gates: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(2, HEADS, ROOM, HEAD_DIM), persistent=False)
        self.register_buffer("gates", torch.zeros(2, HEADS, ROOM), persistent=False)


class IndexedRope(Room):
    """Copied in by places, over all the room: what is not written yet is hidden."""

    def forward(self, x: Tensor, past: int) -> Tensor:
        places = torch.arange(past, past + x.shape[1])
        query, key, value = self.heads(x)
        self.keys.index_copy_(2, places, self.turned(key, places))
        self.values.index_copy_(2, places, value)
        hidden = torch.arange(ROOM) > places[:, None]
        return mixed(self.turned(query, places), self.keys, self.values, hidden)


class IndexedAlibi(Room):
    def forward(self, x: Tensor, past: int) -> Tensor:
        places = torch.arange(past, past + x.shape[1])
        query, key, value = self.heads(x)
        self.keys.index_copy_(2, places, key)
        self.values.index_copy_(2, places, value)
        apart = torch.arange(ROOM) - places[:, None]
        bias = self.slopes[:, None, None] * apart
        return mixed(query, self.keys, self.values, apart > 0, bias)


class IndexedGates(Room):
    """FoX over all the room: a gate of one where nothing is written."""

    def forward(self, x: Tensor, past: int) -> Tensor:
        places = torch.arange(past, past + x.shape[1])
        query, key, value = self.heads(x)
        self.keys.index_copy_(2, places, key)
        self.values.index_copy_(2, places, value)
        self.gates.index_copy_(2, places, self.log_gates(x))
        total = self.gates.cumsum(-1)
        bias = total[..., places, None] - total[..., None, :]
        return mixed(query, self.keys, self.values, torch.arange(ROOM) > places[:, None], bias)


class SlicedRope(Room):
    """Assigned to a slice, and read up to its end."""

    def forward(self, x: Tensor, past: int) -> Tensor:
        end = past + x.shape[1]
        places = torch.arange(past, end)
        query, key, value = self.heads(x)
        self.keys[:, :, past:end] = self.turned(key, places)
        self.values[:, :, past:end] = value
        key, value = self.keys[:, :, :end], self.values[:, :, :end]
        return mixed(self.turned(query, places), key, value, later(x.shape[1], end))


class SlicedAlibi(Room):
    def forward(self, x: Tensor, past: int) -> Tensor:
        end = past + x.shape[1]
        query, key, value = self.heads(x)
        self.keys[:, :, past:end] = key
        self.values[:, :, past:end] = value
        apart = torch.arange(end) - torch.arange(past, end)[:, None]
        bias = self.slopes[:, None, None] * apart
        return mixed(query, self.keys[:, :, :end], self.values[:, :, :end], apart > 0, bias)


# -- a ring ------------------------------------------------------------------------------------------------


class Ring(Keeping):
    """The last tokens alone, each in the slot of its number, and which token is where."""

    keys: Tensor
    values: Tensor
    places: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(2, HEADS, RING, HEAD_DIM), persistent=False)
        self.register_buffer("places", torch.full((RING,), -1), persistent=False)

    def put(self, key: Tensor, value: Tensor, places: Tensor) -> Tensor:
        """What is hidden from each query."""
        slots = places % RING
        self.keys.index_copy_(2, slots, key)
        self.values.index_copy_(2, slots, value)
        self.places.index_copy_(0, slots, places)
        return (self.places > places[:, None]) | (self.places < 0)


class RingRope(Ring):
    def forward(self, x: Tensor, past: int) -> Tensor:
        places = torch.arange(past, past + x.shape[1])
        query, key, value = self.heads(x)
        hidden = self.put(self.turned(key, places), value, places)
        return mixed(self.turned(query, places), self.keys, self.values, hidden)


class RingAlibi(Ring):
    """Places are read from memory that was just written into: no pass looks through that."""

    def forward(self, x: Tensor, past: int) -> Tensor:
        places = torch.arange(past, past + x.shape[1])
        query, key, value = self.heads(x)
        hidden = self.put(key, value, places)
        bias = self.slopes[:, None, None] * (self.places - places[:, None])
        return mixed(query, self.keys, self.values, hidden, bias)


@dataclass(frozen=True)
class OwnCache:
    """A layer, and how many tensors it rotates and how many biases it adds in one step."""

    make: Callable[[], Keeping]
    rotations: int = 0
    biases: int = 0

    @property
    def name(self) -> str:
        return self.make.__name__


OWN_CACHES = (
    OwnCache(JoinedRope, rotations=2),
    OwnCache(TurnedWhenRead, rotations=2),
    OwnCache(JoinedAlibi, biases=1),
    OwnCache(JoinedGates, biases=1),
    OwnCache(JoinedSums, biases=1),
    OwnCache(ListedRope, rotations=2),
    OwnCache(ListedAlibi, biases=1),
    OwnCache(IndexedRope, rotations=2),
    OwnCache(IndexedAlibi, biases=1),
    OwnCache(IndexedGates, biases=1),
    OwnCache(SlicedRope, rotations=2),
    OwnCache(SlicedAlibi, biases=1),
    OwnCache(RingRope, rotations=2),
)
