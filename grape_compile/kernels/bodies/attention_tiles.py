"""What the kernels of biased attention share: a tile of logits, some queries by some keys, as powers of two.

A bias has up to two terms, slope * gate * (clock of the key - clock of the query). Each tile has an origin, the clock
just behind its keys, so that a difference of clocks is the key's distance to the origin plus the query's. Where all
keys of a tile lie in the past of all its queries both distances are negative, and nothing is lost when they are
multiplied out: what sees the key alone is one multiply-add an element, what sees the query alone is a number per row
that meets the maximum or the logsumexp. In all other tiles the difference is taken first.

Vectors of queries and of keys come with an axis of size one each, so that a tile may be transposed.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
#: The largest of no logits: differences of it are numbers.
LOWEST = tl.constexpr(-3.4028234663852886e38)
#: A mask below this has absorbed every logit; as a power of two it would no longer be finite.
ABSORBING = tl.constexpr(-1e38)

#: What a term counts: nothing, key numbers, or the numbers of a clock.
NONE = tl.constexpr(0)
STEPS = tl.constexpr(1)
CLOCK = tl.constexpr(2)
#: What hides keys: nothing, a byte that is zero, or numbers that are added.
BYTES = tl.constexpr(1)
NUMBERS = tl.constexpr(2)

#: A clock as three vectors: its rounding, what the rounding left out, its distance to the origin of the key's tile.
LOW = tl.constexpr(1)
LOCAL = tl.constexpr(2)
CLOCK_SIZE = tl.constexpr(3)


@triton.jit
def key_distance(COLUMNS, first, stride, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Return clock_j - origin of the tile of keys from `first` on."""
    index = tl.arange(0, BLOCK)
    if KIND == CLOCK:
        distance = tl.load(COLUMNS + LOCAL * stride + first + index)
    else:
        distance = (index - BLOCK).to(tl.float32)
    return distance


@triton.jit
def clock_at(COLUMNS, place, keys, stride, KIND: tl.constexpr):
    """Return the clock at key numbers in two parts; of steps, the key number."""
    if KIND == CLOCK:
        place = tl.minimum(tl.maximum(place, 0), keys - 1)
        high = tl.load(COLUMNS + place)
        low = tl.load(COLUMNS + LOW * stride + place)
    else:
        high = place
        low = place
    return high, low


@triton.jit
def apart(COLUMNS, place, high, low, keys, stride, KIND: tl.constexpr):
    """Return the clock at `place` less a clock of two parts."""
    if KIND == CLOCK:
        own_high, own_low = clock_at(COLUMNS, place, keys, stride, KIND)
        difference = (own_high - high) + (own_low - low)
    else:
        difference = (place - high).to(tl.float32)
    return difference


@triton.jit
def part_of_keys(
    KEYED, first, level_slope, term_slope, LEVEL: tl.constexpr, TERM: tl.constexpr, GATE_QUERY: tl.constexpr,
    GATE_KEY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return what a bias adds to all logits of a key in the past: read where it was prepared, or slopes times steps."""
    if LEVEL == CLOCK or TERM == CLOCK or GATE_KEY:
        by_key = tl.load(KEYED + first + tl.arange(0, BLOCK))
    elif LEVEL == NONE and (TERM == NONE or GATE_QUERY):
        by_key = tl.zeros([BLOCK], tl.float32)
    else:
        slope = level_slope
        if TERM != NONE and not GATE_QUERY:
            slope += term_slope
        by_key = slope * (tl.arange(0, BLOCK) - BLOCK).to(tl.float32)
    return by_key


@triton.jit
def part_of_queries(
    level_slope, level_query, term_slope, term_query, gate_query, LEVEL: tl.constexpr, TERM: tl.constexpr,
    GATE_QUERY: tl.constexpr, GATE_KEY: tl.constexpr,
):  # fmt: skip
    """Return what a bias adds to all logits of a query in the past, for its distances to an origin."""
    by_query = level_query * 0.0
    if LEVEL != NONE:
        by_query = level_slope * level_query
    if TERM != NONE:
        if GATE_QUERY:
            by_query += gate_query * term_query
        elif not GATE_KEY:
            by_query += term_slope * term_query
    return by_query


@triton.jit
def past_logits(
    products, factor, by_key, term_key, term_query, gate_query, gate_key, LEVEL: tl.constexpr, TERM: tl.constexpr,
    GATE_QUERY: tl.constexpr, GATE_KEY: tl.constexpr,
):  # fmt: skip
    """Return logits of keys in the past without the part that sees the query alone."""
    if LEVEL != NONE or GATE_KEY or (TERM != NONE and not GATE_QUERY):
        logits = products * factor + by_key
    else:
        logits = products * factor
    if GATE_QUERY:
        logits += gate_query * term_key
    if GATE_KEY:
        logits += gate_key * term_query
    return logits


@triton.jit
def near_logits(
    products, factor, level_slope, level_key, level_query, term_slope, term_key, term_query, gate_query, gate_key,
    LEVEL: tl.constexpr, TERM: tl.constexpr, ABSOLUTE: tl.constexpr, GATE_QUERY: tl.constexpr, GATE_KEY: tl.constexpr,
):  # fmt: skip
    """Return logits whose differences are taken before they are multiplied."""
    logits = products * factor
    if LEVEL != NONE:
        logits += level_slope * (level_key + level_query)
    if TERM != NONE:
        steep = steepness(term_slope, gate_query, gate_key, GATE_QUERY, GATE_KEY)
        logits += steep * spread(term_key + term_query, ABSOLUTE)
    return logits


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
def spread(difference, ABSOLUTE: tl.constexpr):
    """Return the distance of a difference of clocks: signed, or minus its length."""
    if ABSOLUTE:
        distance = -tl.abs(difference)
    else:
        distance = difference
    return distance


@triton.jit
def slope_of_spread(difference, ABSOLUTE: tl.constexpr):
    """Return the derivative of the spread; zero where two absolute times meet."""
    if ABSOLUTE:
        slope = tl.where(difference > 0.0, -1.0, tl.where(difference < 0.0, 1.0, 0.0))
    else:
        slope = 1.0
    return slope


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
def key_range(
    first_at, keys, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, LEVEL: tl.constexpr, TERM: tl.constexpr,
    ABSOLUTE: tl.constexpr, QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr,
):  # fmt: skip
    """Return start and stop of the keys that queries from key number `first_at` on may see, and of the past: the tiles
    that all of them see and whose bias is multiplied out."""
    start = 0
    stop = keys
    past_start = 0
    past_stop = keys // KEY_BLOCK * KEY_BLOCK
    if CAUSAL:
        stop = tl.minimum(keys, tl.maximum(first_at + QUERY_BLOCK, 0))
    if CAUSAL or LEVEL != NONE or TERM != NONE:
        past_stop = tl.minimum(tl.maximum(first_at, 0) // KEY_BLOCK * KEY_BLOCK, past_stop)
    if ABSOLUTE and TERM == CLOCK:
        # Nobody knows on which side of a query such a key lies.
        past_stop = 0
    if WINDOW:
        start = tl.maximum(first_at - window + 1, 0) // KEY_BLOCK * KEY_BLOCK
        past_start = tl.maximum(first_at + QUERY_BLOCK - window, 0)
    return start, stop, past_start, past_stop
