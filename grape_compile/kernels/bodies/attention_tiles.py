"""What the kernels of biased attention share: a tile of logits, some queries by some keys, in powers of two.

A bias has up to two terms, slope * gate * (clock of the key - clock of the query). Each tile has an origin, the clock
just behind its keys, so that a difference of clocks is the key's distance to the origin plus the query's. Where all
keys of a tile lie in the past of all its queries both distances are negative, and nothing is lost when they are
multiplied out: what sees the key alone is one multiply-add an element, what sees the query alone is a number per row
that meets the maximum and the logsumexp. In all other tiles the difference is taken first.

Vectors of queries and of keys come with an axis of size one each, so that the same lines serve a tile and its transpose.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
#: The largest of no logits: differences of it are numbers.
LOWEST = tl.constexpr(-3.4028234663852886e38)
#: A mask below this has absorbed every logit; in powers of two it would no longer be finite.
ABSORBING = tl.constexpr(-1e38)

#: What a term counts: nothing, key numbers, or the numbers of a clock.
NONE = tl.constexpr(0)
STEPS = tl.constexpr(1)
CLOCK = tl.constexpr(2)
#: What hides keys: nothing, a byte that is zero, or numbers that are added.
BYTES = tl.constexpr(1)
NUMBERS = tl.constexpr(2)

#: A clock as three vectors: its rounding, what the rounding left out, its distance to the origin of the key's tile.
HIGH = tl.constexpr(0)
LOW = tl.constexpr(1)
LOCAL = tl.constexpr(2)
CLOCK_SIZE = tl.constexpr(3)


@triton.jit
def key_distance(COLUMNS, first, keys, stride, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Return clock_j - origin of the tile of keys from `first` on."""
    index = tl.arange(0, BLOCK)
    if KIND == STEPS:
        distance = (index - BLOCK).to(tl.float32)
    else:
        distance = tl.load(COLUMNS + LOCAL * stride + first + index, mask=first + index < keys, other=0.0)
    return distance


@triton.jit
def query_distance(COLUMNS, high, low, at, first, keys, stride, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Return origin - clock_t for queries at key numbers `at`, whose clocks are `high` + `low`."""
    origin = first + BLOCK
    if KIND == STEPS:
        distance = (origin - at).to(tl.float32)
    else:
        place = tl.minimum(origin, keys - 1)
        distance = (tl.load(COLUMNS + place) - high) + (tl.load(COLUMNS + LOW * stride + place) - low)
    return distance


@triton.jit
def query_clock(COLUMNS, at, keys, stride, KIND: tl.constexpr):
    """Return the clocks of queries at key numbers `at` in two parts."""
    if KIND == CLOCK:
        known = (at >= 0) & (at < keys)
        high = tl.load(COLUMNS + at, mask=known, other=0.0)
        low = tl.load(COLUMNS + LOW * stride + at, mask=known, other=0.0)
    else:
        high = at
        low = at
    return high, low


@triton.jit
def steepness(slope, gate_query, gate_key, GATE_QUERY: tl.constexpr, GATE_KEY: tl.constexpr):
    """Return what multiplies a distance: the slope, or it times the gates of query and key."""
    if GATE_QUERY and GATE_KEY:
        steep = gate_query + gate_key
    elif GATE_QUERY:
        steep = gate_query
    elif GATE_KEY:
        steep = gate_key
    else:
        steep = slope
    return steep


@triton.jit
def spread(apart, ABSOLUTE: tl.constexpr):
    """Return the distance of a difference of clocks: signed, or minus its length."""
    if ABSOLUTE:
        distance = -tl.abs(apart)
    else:
        distance = apart
    return distance


@triton.jit
def biased(
    products, scale, level_slope, level_key, level_query, term_slope, term_key, term_query, gate_query, gate_key,
    LEVEL: tl.constexpr, TERM: tl.constexpr, ABSOLUTE: tl.constexpr, GATE_QUERY: tl.constexpr, GATE_KEY: tl.constexpr,
    PAST: tl.constexpr,
):  # fmt: skip
    """Return logits, and what is to be added to all logits of a query.

    The level is slope * (key + query distance). The term is steep * spread(key + query distance), with the slope in the
    gates. With PAST all keys lie before all queries, and both are multiplied out.
    """
    base = level_query * 0.0
    if PAST and not (ABSOLUTE and TERM == CLOCK):
        if LEVEL != NONE:
            by_key = level_slope * level_key
            base += level_slope * level_query
        if TERM != NONE:
            if GATE_KEY:
                key_part = gate_key * term_key
            elif GATE_QUERY:
                key_part = term_key * 0.0
            else:
                key_part = term_slope * term_key
            if LEVEL != NONE:
                by_key += key_part
            else:
                by_key = key_part
        if LEVEL != NONE or (TERM != NONE and (GATE_KEY or not GATE_QUERY)):
            logits = products * scale + by_key
        else:
            logits = products * scale
        if TERM != NONE:
            if GATE_QUERY:
                logits += gate_query * term_key
                base += gate_query * term_query
            if GATE_KEY:
                logits += gate_key * term_query
            if not GATE_QUERY and not GATE_KEY:
                base += term_slope * term_query
    else:
        logits = products * scale
        if LEVEL != NONE:
            logits += level_slope * (level_key + level_query)
        if TERM != NONE:
            steep = steepness(term_slope, gate_query, gate_key, GATE_QUERY, GATE_KEY)
            logits += steep * spread(term_key + term_query, ABSOLUTE)
    return logits, base


@triton.jit
def masked(logits, MASK, offsets, known, KIND: tl.constexpr):
    """Return logits under a mask, read at `offsets` where `known`."""
    if KIND == BYTES:
        logits = tl.where(tl.load(MASK + offsets, mask=known, other=0) != 0, logits, -float("inf"))
    if KIND == NUMBERS:
        added = tl.load(MASK + offsets, mask=known, other=0.0).to(tl.float32)
        logits += tl.where(added < ABSORBING, added, added * LOG2E)
    return logits


@triton.jit
def visible(query_at, key_at, keys, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Return which keys a query may see."""
    seen = key_at < keys
    if CAUSAL:
        seen = seen & (key_at <= query_at)
    if WINDOW:
        seen = seen & (key_at > query_at - window)
    return seen


@triton.jit
def slope_of_spread(apart, ABSOLUTE: tl.constexpr):
    """Return the derivative of the spread by the difference of clocks; zero where two absolute times meet."""
    if ABSOLUTE:
        slope = tl.where(apart > 0.0, -1.0, tl.where(apart < 0.0, 1.0, 0.0))
    else:
        slope = 1.0
    return slope
