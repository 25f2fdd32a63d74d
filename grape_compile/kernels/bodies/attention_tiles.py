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
    scaled, bias, sight, rows, first, past, mask_offsets, there, level,
    BIAS: tl.constexpr, SIGHT: tl.constexpr, KEY_BLOCK: tl.constexpr, LESS: tl.constexpr,
):  # fmt: skip
    """Return the logits of queries by the keys from `first` on: with LESS, less the `level` of each query, or else less
    what the bias adds to the whole row, which is the second that comes back.

    `scaled` are products times what makes them powers of two, multiplied before the branches: Triton 3.6 pipelines no
    loop in which a branch reads what a matrix instruction returns.

    `past`: all of these queries see all of these keys, which lie behind them. `there` says which query is. With them
    come the queries' distances to the origin of the tile, of level and term, and the gates of the keys.
    """
    level_query = apart(
        bias.columns.level, first + KEY_BLOCK, rows.level_high, rows.level_low, bias, BIAS.level
    )
    term_query = apart(bias.columns.term, first + KEY_BLOCK, rows.term_high, rows.term_low, bias, BIAS.term)
    column = first + tl.arange(0, KEY_BLOCK)
    gate_query = rows.gate[:, None] if BIAS.gate_query else 0.0
    gate_key = 0.0
    if BIAS.gate_key:
        gate_key = tl.load(bias.columns.gate + column)[None, :]
    if past:
        by_key = part_of_keys(bias, first, BIAS, KEY_BLOCK)
        term_key = key_distance(bias.columns.term, first, bias, BIAS.term, KEY_BLOCK)
        logits = past_logits(
            scaled, by_key[None, :], term_key[None, :], term_query[:, None], gate_query, gate_key, BIAS
        )  # fmt: skip
        base = part_of_queries(bias, level_query, term_query, rows.gate, BIAS.gate_query, BIAS.gate_key, BIAS)
        if LESS:
            logits -= (level - base)[:, None]
    else:
        level_key = key_distance(bias.columns.level, first, bias, BIAS.level, KEY_BLOCK)
        term_key = key_distance(bias.columns.term, first, bias, BIAS.term, KEY_BLOCK)
        logits = near_logits(
            scaled, bias, level_key[None, :], level_query[:, None], term_key[None, :], term_query[:, None],
            gate_query, gate_key, BIAS,
        )  # fmt: skip
        if LESS:
            logits -= level[:, None]
        seen = visible(rows.at[:, None], column[None, :], bias.keys, sight.window, SIGHT)
        logits = tl.where(seen, logits, -float("inf"))
        base = tl.zeros_like(level_query)
    known = there[:, None] & (column < bias.keys)[None, :]
    if SIGHT.masked != NONE:
        offsets = mask_offsets[:, None] + column[None, :] * sight.mask_key
        logits = masked(logits, sight.mask, offsets, known, SIGHT.masked)
    if SIGHT.segmented:
        segment = tl.load(sight.segments + column, mask=column < bias.keys, other=0)
        logits = tl.where(rows.segment[:, None] == segment[None, :], logits, -float("inf"))
    return logits, base, level_query, term_query, gate_key


@triton.jit
def key_distance(clock, first, bias, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Return clock_j - origin of the tile of keys from `first` on."""
    index = tl.arange(0, BLOCK)
    if KIND == CLOCK:
        distance = tl.load(clock + LOCAL * bias.columns.stride + first + index)
    else:
        distance = (index - BLOCK).to(tl.float32)
    return distance


@triton.jit
def apart(clock, place, high, low, bias, KIND: tl.constexpr):
    """Return the clock at `place` less a clock of two parts."""
    if KIND == CLOCK:
        own_high, own_low = clock_at(clock, place, bias, KIND)
        difference = (own_high - high) + (own_low - low)
    else:
        difference = (place - high).to(tl.float32)
    return difference


@triton.jit
def part_of_keys(bias, first, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """Return what a bias adds to all logits of a key in the past: read where it was prepared, or slopes times steps."""
    if BIAS.level == CLOCK or BIAS.term == CLOCK or BIAS.gate_key:
        by_key = tl.load(bias.columns.keyed + first + tl.arange(0, BLOCK))
    elif BIAS.level == NONE and (BIAS.term == NONE or BIAS.gate_query):
        by_key = tl.zeros([BLOCK], tl.float32)
    else:
        slope = bias.level_slope
        if BIAS.term != NONE and not BIAS.gate_query:
            slope += bias.term_slope
        by_key = slope * (tl.arange(0, BLOCK) - BLOCK).to(tl.float32)
    return by_key


@triton.jit
def part_of_queries(
    bias,
    level_query,
    term_query,
    gate_query,
    GATE_QUERY: tl.constexpr,
    GATE_KEY: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Return what a bias adds to all logits of a query in the past, for its distances to an origin."""
    by_query = tl.zeros_like(level_query)
    if BIAS.level != NONE:
        by_query = bias.level_slope * level_query
    if BIAS.term != NONE:
        if GATE_QUERY:
            by_query += gate_query * term_query
        elif not GATE_KEY:
            by_query += bias.term_slope * term_query
    return by_query


@triton.jit
def past_logits(scaled, by_key, term_key, term_query, gate_query, gate_key, BIAS: tl.constexpr):
    """Return logits of keys in the past without the part that sees the query alone."""
    if BIAS.level != NONE or BIAS.gate_key or (BIAS.term != NONE and not BIAS.gate_query):
        logits = scaled + by_key
    else:
        logits = scaled
    if BIAS.gate_query:
        logits += gate_query * term_key
    if BIAS.gate_key:
        logits += gate_key * term_query
    return logits


@triton.jit
def near_logits(
    scaled,
    bias,
    level_key,
    level_query,
    term_key,
    term_query,
    gate_query,
    gate_key,
    BIAS: tl.constexpr,
):
    """Return logits whose differences are taken before they are multiplied."""
    logits = scaled
    if BIAS.level != NONE:
        logits += bias.level_slope * (level_key + level_query)
    if BIAS.term != NONE:
        logits += steepness(bias, gate_query, gate_key, BIAS) * spread(term_key + term_query, BIAS.absolute)
    return logits


@triton.jit
def steepness(bias, gate_query, gate_key, BIAS: tl.constexpr):
    """Return what multiplies a distance: the slope, or it times the gates of query and key."""
    if BIAS.gate_query and BIAS.gate_key:
        steep = gate_query + gate_key
    elif BIAS.gate_query:
        steep = gate_query
    elif BIAS.gate_key:
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
    changes, bias, difference, gate_query, gate_key, BIAS: tl.constexpr, WANTS_SPREAD: tl.constexpr,
    WANTS_CLOCK: tl.constexpr,
):  # fmt: skip
    """Return sums of logit gradients times the spread of the term, and times its derivative by the difference."""
    by_spread = 0.0
    by_clock = 0.0
    if WANTS_SPREAD:
        by_spread = tl.sum(changes * spread(difference, BIAS.absolute), 1)
    if WANTS_CLOCK:
        steep = steepness(bias, gate_query, gate_key, BIAS)
        by_clock = tl.sum(changes * (steep * slope_of_spread(difference, BIAS.absolute)), 1)
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
def masked(logits, MASK, offsets, known, KIND: tl.constexpr):
    """Return logits under a mask, read at `offsets` where `known`."""
    if KIND == BYTES:
        logits = tl.where(tl.load(MASK + offsets, mask=known, other=0) != 0, logits, -float("inf"))
    if KIND == NUMBERS:
        added = tl.load(MASK + offsets, mask=known, other=0.0).to(tl.float32)
        logits += tl.where(added < ABSORBING, added, added * LOG2E)
    return logits


@triton.jit
def visible(query_at, key_at, keys, window, SIGHT: tl.constexpr):
    """Return which keys a query may see, by their numbers."""
    seen = key_at < keys
    if SIGHT.causal:
        seen = seen & (key_at <= query_at)
    if SIGHT.window:
        seen = seen & (key_at > query_at - window)
    return seen
