"""What the kernels of biased attention read: where a program stands, tiles of heads, a head's bias, what hides keys."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

#: What a term counts: nothing, key numbers, or the numbers of a clock.
NONE = tl.constexpr(0)
STEPS = tl.constexpr(1)
CLOCK = tl.constexpr(2)
#: How queries turn: in planes of coordinates half a head apart, or next to each other.
HALVES = tl.constexpr(1)
NEIGHBOURS = tl.constexpr(2)
#: What hides keys: nothing, a byte that is zero, or numbers that are added.
BYTES = tl.constexpr(1)
NUMBERS = tl.constexpr(2)

#: A clock as three vectors: its rounding, what the rounding left out, its distance to the origin of the key's tile.
LOW = tl.constexpr(1)
LOCAL = tl.constexpr(2)
CLOCK_SIZE = tl.constexpr(3)


class Columns(NamedTuple):
    """Where the vectors over the keys of one head are, `stride` numbers apart.

    The clocks of level and term, slopes times gates of keys, and what is added to all logits of a key in the past.
    """

    level: Any
    term: Any
    gate: Any
    keyed: Any
    stride: Any


class Bias(NamedTuple):
    """The bias of one head over `keys` keys: the slopes of its two terms as powers of two, and their vectors.

    What the terms are is a constant beside it, a `BiasKind`.
    """

    keys: Any
    level_slope: Any
    term_slope: Any
    columns: Any


class Sight(NamedTuple):
    """What hides keys from the queries of one head, each where the constant beside it, a `SightKind`, says so."""

    window: Any
    mask: Any
    mask_query: Any
    mask_key: Any
    segments: Any


class Rows(NamedTuple):
    """Queries of a tile: their key numbers, clocks in two parts, slope times gate, and segments."""

    at: Any
    level_high: Any
    level_low: Any
    term_high: Any
    term_low: Any
    gate: Any
    segment: Any


@triton.jit
def place_of(tiles, heads):
    """Return the tile of a program, the number of its head in the whole batch, and its batch and head."""
    number = tl.program_id(0) // tiles
    return tl.program_id(0) % tiles, number, (number // heads).to(tl.int64), (number % heads).to(tl.int64)


@triton.jit
def inside(index, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Return which of BLOCK coordinates a head of SIZE has."""
    return index < SIZE if SIZE < BLOCK else index >= 0


@triton.jit
def tile_of(start, first, stride, index, there, width, known):
    """Load rows `first + index` of a head that begins at `start`, zeros where they are not."""
    place = start + first.to(tl.int64) * stride
    return tl.load(
        place + index[:, None] * stride + width[None, :], mask=there[:, None] & known[None, :], other=0.0
    )


@triton.jit
def turned_tile(
    start, stride, COS, SIN, turn_stride, first, index, there, TURNED: tl.constexpr, HEAD: tl.constexpr
):  # fmt: skip
    """Load rows of a head, HEAD a power of two, that turn in halves or neighbours by tables of cosine and sine."""
    plane = tl.arange(0, HEAD // 2)
    known = plane >= 0
    if TURNED == HALVES:
        one = tile_of(start, first, stride, index, there, plane, known)
        two = tile_of(start + HEAD // 2, first, stride, index, there, plane, known)
    else:
        inner = tl.arange(0, HEAD)
        whole = tile_of(start, first, stride, index, there, inner, inner >= 0)
        one, two = tl.split(tl.reshape(whole, [index.shape[0], HEAD // 2, 2]))
    cos = tile_of(COS, first, turn_stride, index, there, plane, known)
    sin = tile_of(SIN, first, turn_stride, index, there, plane, known)
    wide_one, wide_two = one.to(tl.float32), two.to(tl.float32)
    turned = tl.join(
        (wide_one * cos - wide_two * sin).to(one.dtype), (wide_two * cos + wide_one * sin).to(two.dtype)
    )
    if TURNED == HALVES:
        turned = tl.permute(turned, (0, 2, 1))
    return tl.reshape(turned, [index.shape[0], HEAD])


@triton.jit
def store_tile(start, first, stride, index, there, width, known, tile):
    """Store rows `first + index` of a head that begins at `start`, rounded to its dtype."""
    place = start + first.to(tl.int64) * stride
    tl.store(
        place + index[:, None] * stride + width[None, :],
        tile.to(start.dtype.element_ty),
        mask=there[:, None] & known[None, :],
    )


@triton.jit
def bias_of(
    SLOPES, COLUMNS, number, batch, head, columns_batch, columns_head, stride, keys, BIAS: tl.constexpr
):
    """Return the bias of one head."""
    level = COLUMNS + batch * columns_batch + head * columns_head
    term = level + (CLOCK_SIZE * stride if BIAS.level == CLOCK else 0)
    gate = term + (CLOCK_SIZE * stride if BIAS.term == CLOCK else 0)
    keyed = gate + (stride if BIAS.gate_key else 0)
    level_slope = tl.load(SLOPES + number * 2) * LOG2E if BIAS.level != NONE else 0.0
    term_slope = tl.load(SLOPES + number * 2 + 1) * LOG2E if BIAS.term != NONE else 0.0
    return Bias(keys, level_slope, term_slope, Columns(level, term, gate, keyed, stride))


@triton.jit
def rows_of(bias, sight, gates, row, there, at, BIAS: tl.constexpr, SIGHT: tl.constexpr):
    """Return what a tile of queries, numbers `row`, brings to the biases and the sight of its head."""
    level_high, level_low = clock_at(bias.columns.level, at, bias, BIAS.level)
    term_high, term_low = clock_at(bias.columns.term, at, bias, BIAS.term)
    gate = 0.0
    if BIAS.gate_query:
        gate = tl.load(gates + row, mask=there, other=0.0) * bias.term_slope
    segment = 0
    if SIGHT.segmented:
        segment = tl.load(sight.segments + at, mask=there, other=0)
    return Rows(at, level_high, level_low, term_high, term_low, gate, segment)


@triton.jit
def clock_at(clock, place, bias, KIND: tl.constexpr):
    """Return the clock at key numbers in two parts; of steps, the key number."""
    if KIND == CLOCK:
        place = tl.minimum(tl.maximum(place, 0), bias.keys - 1)
        high = tl.load(clock + place)
        low = tl.load(clock + LOW * bias.columns.stride + place)
    else:
        high = place
        low = place
    return high, low


@triton.jit
def key_range(
    first_at,
    keys,
    window,
    BIAS: tl.constexpr,
    SIGHT: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
):
    """Return start and stop of the keys that queries from key number `first_at` on may see, and of the past: the tiles
    that all of them see and whose bias is multiplied out."""
    start = 0
    stop = keys
    past_start = 0
    past_stop = keys // KEY_BLOCK * KEY_BLOCK
    if SIGHT.causal:
        stop = tl.minimum(keys, tl.maximum(first_at + QUERY_BLOCK, 0))
    if SIGHT.causal or BIAS.level != NONE or BIAS.term != NONE:
        past_stop = tl.minimum(tl.maximum(first_at, 0) // KEY_BLOCK * KEY_BLOCK, past_stop)
    if BIAS.absolute and BIAS.term == CLOCK:
        # Nobody knows on which side of a query such a key lies.
        past_stop = 0
    if SIGHT.window:
        start = tl.maximum(first_at - window + 1, 0) // KEY_BLOCK * KEY_BLOCK
        past_start = tl.maximum(first_at + QUERY_BLOCK - window, 0)
    return start, stop, past_start, past_stop
