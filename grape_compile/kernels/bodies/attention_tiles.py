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

from grape_compile.kernels.bodies.attention_operands import (
    BYTES,
    CLOCK,
    LOCAL,
    LOG2E,
    NONE,
    NUMBERS,
    clock_at,
)

#: The largest of no logits: differences of it are numbers.
LOWEST = tl.constexpr(-3.4028234663852886e38)
#: A mask below this has absorbed every logit; as a power of two it would no longer be finite.
ABSORBING = tl.constexpr(-1e38)


@triton.jit
def tile_logits(
    products, factor, bias, sight, rows, first, past, mask_offsets, there, QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
):  # fmt: skip
    """Return the logits of queries by the keys from `first` on, less a number of each query, and that number.

    `past`: all of these queries see all of these keys, which lie behind them. `there` says which query is. With them
    come the queries' distances to the origin of the tile, of level and term, and the gates of the keys.
    """
    level_query = apart(bias.columns, first + KEY_BLOCK, rows.level_high, rows.level_low, bias, bias.LEVEL)
    term_query = apart(bias.term_columns, first + KEY_BLOCK, rows.term_high, rows.term_low, bias, bias.TERM)
    column = first + tl.arange(0, KEY_BLOCK)
    gate_query = rows.gate[:, None] if bias.GATE_QUERY else 0.0
    gate_key = 0.0
    if bias.GATE_KEY:
        gate_key = tl.load(bias.gate_columns + column)[None, :]
    if past:
        by_key = part_of_keys(bias, first, KEY_BLOCK)
        term_key = key_distance(bias.term_columns, first, bias, bias.TERM, KEY_BLOCK)
        logits = past_logits(
            products, factor, bias, by_key[None, :], term_key[None, :], term_query[:, None], gate_query, gate_key
        )  # fmt: skip
        base = part_of_queries(bias, level_query, term_query, rows.gate, bias.GATE_QUERY, bias.GATE_KEY)
    else:
        level_key = key_distance(bias.columns, first, bias, bias.LEVEL, KEY_BLOCK)
        term_key = key_distance(bias.term_columns, first, bias, bias.TERM, KEY_BLOCK)
        logits = near_logits(
            products, factor, bias, level_key[None, :], level_query[:, None], term_key[None, :], term_query[:, None],
            gate_query, gate_key,
        )  # fmt: skip
        logits = tl.where(visible(sight, rows.at[:, None], column[None, :], bias.keys), logits, -float("inf"))
        base = level_query * 0.0
    known = there[:, None] & (column < bias.keys)[None, :]
    if sight.MASKED != NONE:
        logits = masked(logits, sight, mask_offsets[:, None] + column[None, :] * sight.mask_key, known)
    if sight.SEGMENTED:
        segment = tl.load(sight.segments + column, mask=column < bias.keys, other=0)
        logits = tl.where(rows.segment[:, None] == segment[None, :], logits, -float("inf"))
    return logits, base, level_query, term_query, gate_key


@triton.jit
def key_distance(COLUMNS, first, bias, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Return clock_j - origin of the tile of keys from `first` on."""
    index = tl.arange(0, BLOCK)
    if KIND == CLOCK:
        distance = tl.load(COLUMNS + LOCAL * bias.stride + first + index)
    else:
        distance = (index - BLOCK).to(tl.float32)
    return distance


@triton.jit
def apart(COLUMNS, place, high, low, bias, KIND: tl.constexpr):
    """Return the clock at `place` less a clock of two parts."""
    if KIND == CLOCK:
        own_high, own_low = clock_at(COLUMNS, place, bias.keys, bias.stride, KIND)
        difference = (own_high - high) + (own_low - low)
    else:
        difference = (place - high).to(tl.float32)
    return difference


@triton.jit
def part_of_keys(bias, first, BLOCK: tl.constexpr):
    """Return what a bias adds to all logits of a key in the past: read where it was prepared, or slopes times steps."""
    if bias.LEVEL == CLOCK or bias.TERM == CLOCK or bias.GATE_KEY:
        by_key = tl.load(bias.keyed + first + tl.arange(0, BLOCK))
    elif bias.LEVEL == NONE and (bias.TERM == NONE or bias.GATE_QUERY):
        by_key = tl.zeros([BLOCK], tl.float32)
    else:
        slope = bias.level_slope
        if bias.TERM != NONE and not bias.GATE_QUERY:
            slope += bias.term_slope
        by_key = slope * (tl.arange(0, BLOCK) - BLOCK).to(tl.float32)
    return by_key


@triton.jit
def part_of_queries(
    bias, level_query, term_query, gate_query, GATE_QUERY: tl.constexpr, GATE_KEY: tl.constexpr
):
    """Return what a bias adds to all logits of a query in the past, for its distances to an origin."""
    by_query = level_query * 0.0
    if bias.LEVEL != NONE:
        by_query = bias.level_slope * level_query
    if bias.TERM != NONE:
        if GATE_QUERY:
            by_query += gate_query * term_query
        elif not GATE_KEY:
            by_query += bias.term_slope * term_query
    return by_query


@triton.jit
def past_logits(products, factor, bias, by_key, term_key, term_query, gate_query, gate_key):
    """Return logits of keys in the past without the part that sees the query alone."""
    if bias.LEVEL != NONE or bias.GATE_KEY or (bias.TERM != NONE and not bias.GATE_QUERY):
        logits = products * factor + by_key
    else:
        logits = products * factor
    if bias.GATE_QUERY:
        logits += gate_query * term_key
    if bias.GATE_KEY:
        logits += gate_key * term_query
    return logits


@triton.jit
def near_logits(
    products, factor, bias, level_key, level_query, term_key, term_query, gate_query, gate_key
):
    """Return logits whose differences are taken before they are multiplied."""
    logits = products * factor
    if bias.LEVEL != NONE:
        logits += bias.level_slope * (level_key + level_query)
    if bias.TERM != NONE:
        logits += steepness(bias, gate_query, gate_key) * spread(term_key + term_query, bias.ABSOLUTE)
    return logits


@triton.jit
def steepness(bias, gate_query, gate_key):
    """Return what multiplies a distance: the slope, or it times the gates of query and key."""
    if bias.GATE_QUERY and bias.GATE_KEY:
        steep = gate_query + gate_key
    elif bias.GATE_QUERY:
        steep = gate_query
    elif bias.GATE_KEY:
        steep = gate_key
    else:
        steep = bias.term_slope
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
def term_sums(
    changes, bias, difference, gate_query, gate_key, AXIS: tl.constexpr, WANTS_SPREAD: tl.constexpr,
    WANTS_CLOCK: tl.constexpr,
):  # fmt: skip
    """Return sums of logit gradients times the spread of the term, and times its derivative by the difference."""
    by_spread = 0.0
    by_clock = 0.0
    if WANTS_SPREAD:
        by_spread = tl.sum(changes * spread(difference, bias.ABSOLUTE), AXIS)
    if WANTS_CLOCK:
        steep = steepness(bias, gate_query, gate_key)
        by_clock = tl.sum(changes * (steep * slope_of_spread(difference, bias.ABSOLUTE)), AXIS)
    return by_spread, by_clock


@triton.jit
def capped(products, rate, CAPPED: tl.constexpr):
    """Return tanh(rate * products), off by 1e-7 of itself, or the products without a cap.

    A polynomial for small arguments (Cephes, tanhf), where 1 - 2 / (1 + exp(2 x)) would lose digits.
    """
    if CAPPED:
        angle = products * rate
        square = angle * angle
        small = ((-5.70498872745e-3 * square + 2.06390887954e-2) * square - 5.37397155531e-2) * square
        small = ((small + 1.33314422036e-1) * square - 3.33332819422e-1) * square * angle + angle
        length = tl.abs(angle)
        large = 1.0 - 2.0 / (1.0 + tl.exp2(length * (2.0 * LOG2E)))
        products = tl.where(length < 0.625, small, tl.where(angle < 0.0, -large, large))
    return products


@triton.jit
def through_cap(changes, products, CAPPED: tl.constexpr):
    """Return the gradients of scaled products, over the scale, from those of the logits."""
    if CAPPED:
        changes = changes * (1.0 - products * products)
    return changes


@triton.jit
def masked(logits, sight, offsets, known):
    """Return logits under a mask, read at `offsets` where `known`."""
    if sight.MASKED == BYTES:
        logits = tl.where(tl.load(sight.mask + offsets, mask=known, other=0) != 0, logits, -float("inf"))
    if sight.MASKED == NUMBERS:
        added = tl.load(sight.mask + offsets, mask=known, other=0.0).to(tl.float32)
        logits += tl.where(added < ABSORBING, added, added * LOG2E)
    return logits


@triton.jit
def visible(sight, query_at, key_at, keys):
    """Return which keys a query may see, by their numbers."""
    seen = key_at < keys
    if sight.CAUSAL:
        seen = seen & (key_at <= query_at)
    if sight.WINDOW:
        seen = seen & (key_at > query_at - sight.window)
    return seen
