"""Attention with a path bias, backward, first kernel: all sums over keys, from the diagonal backwards.

The second kernel starts in the middle of a walk. So this one leaves behind, for every row and tile of keys, what it had
summed before that tile.
"""

import triton
import triton.language as tl

from grape_compile.kernels.bodies.attention_tiles import LN2, LOG2E, NONE, masked
from grape_compile.kernels.bodies.path_tiles import (
    BOUNDED_LOG_SIGMOID,
    any_gains,
    biased,
    edge_changes,
    keys_of_columns,
    rows_of,
)


@triton.jit
def path_by_query(
    QUERY, KEY, VALUE, OUTPUT, GRADIENT, LOGSUMEXP, EDGE_QUERY, EDGE_KEY, SIZES, SLOPES, MASK, NORMS,
    BY_QUERY, BY_EDGE, BY_SLOPE, LEVELS, CARRIES, FIRST,
    query_batch, query_head, query_token, key_batch, key_head, key_token, value_batch, value_head, value_token,
    output_batch, output_head, output_token, gradient_batch, gradient_head, gradient_token,
    by_query_batch, by_query_head, by_query_token, edge_query_batch, edge_query_head, edge_query_token,
    edge_key_batch, edge_key_head, edge_key_token, mask_batch, mask_head, mask_query, mask_key,
    base, heads, queries, keys, window, scale, rounded_away,
    GROUPS: tl.constexpr, HEAD: tl.constexpr, HEAD_BLOCK: tl.constexpr, VALUES: tl.constexpr,
    VALUE_BLOCK: tl.constexpr, EDGE_BLOCK: tl.constexpr, QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr, LANES: tl.constexpr, CHUNK: tl.constexpr, LINK: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, MASKED: tl.constexpr, LEAVES: tl.constexpr, PRECISION: tl.constexpr, WANTS: tl.constexpr,
):  # fmt: skip
    """Gradients of QUERY_BLOCK queries of one head, and of their side of the path; heads count from `base`.

    `LEVELS` [B, H, 3, T_q] is what the sums over queries need: the logsumexp as a power of two, infinite where there are
    no weights; delta, the sum of output times gradient; what delta was off by. `CARRIES` [heads, 3, tiles of keys, T_q] takes what stands
    behind each tile: the sum of the edges, of the gradients of the logits, of the weights. `FIRST` [B, H, T_q] is the
    first tile that a row walked over. `BY_EDGE` [B, H, T_q, EDGE_BLOCK] and `BY_SLOPE` [B, H, T_q] are the gradients of
    the products' queries, and the sums of the gradients of logits times their bias without its slope.

    Delta is off by the rounding of the output, which a sum over a path would show. As the gradients of the logits add up
    to zero, their sum is that error, and all that was found is freed of its part of it, by the weights.
    """
    tiles = tl.cdiv(queries, QUERY_BLOCK)
    tile = tiles - 1 - tl.program_id(0) % tiles
    local = (tl.program_id(0) // tiles).to(tl.int64)
    number = base + local
    batch = number // heads
    head = number % heads
    begin = tile * QUERY_BLOCK
    wide_begin = begin.to(tl.int64)
    row = tl.arange(0, QUERY_BLOCK)
    inner = tl.arange(0, HEAD_BLOCK)
    outer = tl.arange(0, VALUE_BLOCK)
    edge = tl.arange(0, EDGE_BLOCK)
    there_row = begin + row < queries
    first_at = begin + keys - queries
    at = first_at + row
    query_start = QUERY + batch * query_batch + head * query_head
    query = rows_of(query_start, query_token, begin, row, queries, inner, HEAD, True)
    edge_start = EDGE_QUERY + batch * edge_query_batch + head * edge_query_head
    edge_query = rows_of(edge_start, edge_query_token, begin, row, queries, edge, EDGE_BLOCK, True)
    gradient_start = GRADIENT + batch * gradient_batch + head * gradient_head
    gradient = rows_of(gradient_start, gradient_token, begin, row, queries, outer, VALUES, True)
    output_start = OUTPUT + batch * output_batch + head * output_head
    output = rows_of(output_start, output_token, begin, row, queries, outer, VALUES, True)
    delta = tl.sum(output.to(tl.float32) * gradient.to(tl.float32), 1)
    level = tl.load(LOGSUMEXP + number * queries + begin + row, mask=there_row, other=-float("inf"))
    # A row without a key, or no row: weights exp(logit - inf) are zero.
    level = tl.where(level == -float("inf"), float("inf"), level) * LOG2E
    key_start = KEY + batch * key_batch + head // GROUPS * key_head
    value_start = VALUE + batch * value_batch + head // GROUPS * value_head
    edge_start = EDGE_KEY + batch * edge_key_batch + head * edge_key_head
    mask_start = MASK + batch * mask_batch + head * mask_head + wide_begin * mask_query
    slope = tl.load(SLOPES + number)
    size = 1.0
    if LINK != BOUNDED_LOG_SIGMOID:
        size = tl.load(SIZES + number)
    key_tiles = tl.cdiv(keys, KEY_BLOCK)
    norms = NORMS + number // GROUPS * key_tiles
    length = tl.sqrt(tl.sum(query.to(tl.float32) * query.to(tl.float32), 1)) * (scale * LOG2E)
    part = key_tiles.to(tl.int64) * queries
    carries = CARRIES + local * (3 if WANTS else 1) * part + begin

    places = keys_of_columns(KEY_BLOCK, LANES)
    stop = key_tiles
    if CAUSAL:
        stop = tl.minimum(stop, tl.cdiv(first_at + QUERY_BLOCK, KEY_BLOCK))
    start = 0
    if WINDOW:
        start = tl.maximum(first_at - window + 1, 0) // KEY_BLOCK
    # Tiles from here on have keys that lie ahead of some row.
    near = tl.maximum(tl.minimum((first_at + 1) // KEY_BLOCK, stop), start)
    carry = tl.zeros([QUERY_BLOCK], tl.float32)
    walked = tl.zeros([QUERY_BLOCK], tl.float32)
    weighed = tl.zeros([QUERY_BLOCK], tl.float32)
    by_slope = tl.zeros([QUERY_BLOCK], tl.float32)
    by_slope_rest = tl.zeros([QUERY_BLOCK], tl.float32)
    by_query = tl.zeros([QUERY_BLOCK, HEAD_BLOCK], tl.float32)
    by_edge = tl.zeros([QUERY_BLOCK, EDGE_BLOCK], tl.float32)
    by_edge_rest = tl.zeros([QUERY_BLOCK, EDGE_BLOCK], tl.float32)
    for index in tl.range(0, stop - near):
        carry, walked, weighed, by_slope, by_slope_rest, by_query, by_edge, by_edge_rest = back_step(
            carry, walked, weighed, by_slope, by_slope_rest, by_query, by_edge, by_edge_rest, query, edge_query,
            gradient, level, delta, key_start, value_start, edge_start, mask_start, carries, part, stop - 1 - index,
            places, at, row, there_row, inner, outer, edge, key_token, value_token, edge_key_token, mask_query, mask_key,
            queries, keys, window, scale, slope, size, HEAD, VALUES, EDGE_BLOCK, QUERY_BLOCK, KEY_BLOCK, LANES, LINK,
            True, CAUSAL, WINDOW, MASKED, PRECISION, WANTS,
        )  # fmt: skip
    left = near - start
    goes_on = left > 0
    while goes_on:
        count = left
        if LEAVES:
            count = tl.minimum(left, CHUNK)
        for index in tl.range(0, count):
            carry, walked, weighed, by_slope, by_slope_rest, by_query, by_edge, by_edge_rest = back_step(
                carry, walked, weighed, by_slope, by_slope_rest, by_query, by_edge, by_edge_rest, query, edge_query,
                gradient, level, delta, key_start, value_start, edge_start, mask_start, carries, part,
                start + left - 1 - index, places, at, row, there_row, inner, outer, edge, key_token, value_token,
                edge_key_token, mask_query, mask_key, queries, keys, window, scale, slope, size, HEAD, VALUES,
                EDGE_BLOCK, QUERY_BLOCK, KEY_BLOCK, LANES, LINK, False, CAUSAL, WINDOW, MASKED, PRECISION, WANTS,
            )  # fmt: skip
        left -= count
        goes_on = left > 0
        if LEAVES:
            goes_on = goes_on & any_gains(
                length, norms, start + left, slope, carry, level, rounded_away, KEY_BLOCK
            )
    if WANTS:
        delta += walked
        by_edge -= walked[:, None] * by_edge_rest
        by_slope -= walked * by_slope_rest
        edges = BY_EDGE + (number * queries + wide_begin) * EDGE_BLOCK
        tl.store(edges + row[:, None] * EDGE_BLOCK + edge[None, :], by_edge, mask=there_row[:, None])
        tl.store(BY_SLOPE + number * queries + begin + row, by_slope * LN2, mask=there_row)
    levels = LEVELS + number * 3 * queries + begin + row
    tl.store(levels, level, mask=there_row)
    tl.store(levels + 2 * queries, walked, mask=there_row)
    tl.store(levels + queries, delta, mask=there_row)
    tl.store(FIRST + number * queries + begin + row, start + left + row * 0, mask=there_row)
    by_query_start = BY_QUERY + batch * by_query_batch + head * by_query_head + wide_begin * by_query_token
    tl.store(
        by_query_start + row[:, None] * by_query_token + inner[None, :],
        (by_query * scale).to(BY_QUERY.dtype.element_ty),
        mask=there_row[:, None] & (inner < HEAD if HEAD < HEAD_BLOCK else inner >= 0)[None, :],
    )


@triton.jit
def back_step(
    carry, walked, weighed, by_slope, by_slope_rest, by_query, by_edge, by_edge_rest, query, edge_query, gradient,
    level, delta, KEY, VALUE, EDGE_KEY, MASK, CARRIES, part, tile, places, at, row, there_row, inner, outer, edge,
    key_token, value_token, edge_key_token, mask_query, mask_key, queries, keys, window, scale, slope, size,
    HEAD: tl.constexpr, VALUES: tl.constexpr, EDGE_BLOCK: tl.constexpr, QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr, LANES: tl.constexpr, LINK: tl.constexpr, NEAR: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, WANTS: tl.constexpr,
):  # fmt: skip
    """Add a tile of keys to all sums of all rows, and leave behind what the sums were before it."""
    first = tl.multiple_of(tile * KEY_BLOCK, KEY_BLOCK)
    left_behind = CARRIES + tile.to(tl.int64) * queries + row
    tl.store(left_behind, carry, mask=there_row)
    key = rows_of(KEY, key_token, first, places, keys, inner, HEAD, NEAR)
    value = rows_of(VALUE, value_token, first, places, keys, outer, VALUES, NEAR)
    edge_key = rows_of(EDGE_KEY, edge_key_token, first, places, keys, edge, EDGE_BLOCK, NEAR)
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    product = tl.dot(edge_query, tl.trans(edge_key), input_precision=PRECISION)
    if LINK != BOUNDED_LOG_SIGMOID:
        product = product * size
    logits, sums, carry = biased(
        scores, product, carry, slope, scale * LOG2E, at, first + places, keys, window, LINK, NEAR, CAUSAL, WINDOW,
        QUERY_BLOCK, KEY_BLOCK, LANES,
    )  # fmt: skip
    if MASKED != NONE:
        offsets = row[:, None] * mask_query + (first + places)[None, :] * mask_key
        logits = masked(logits, MASK, offsets, there_row[:, None] & (first + places < keys)[None, :], MASKED)
    weights = tl.exp2(logits - level[:, None])
    changes = tl.dot(gradient, tl.trans(value), input_precision=PRECISION)
    changes = weights * (changes - delta[:, None])
    by_query = tl.dot(changes.to(key.dtype), key, by_query, input_precision=PRECISION)
    if WANTS:
        tl.store(left_behind + part, walked, mask=there_row)
        tl.store(left_behind + 2 * part, weighed, mask=there_row)
        by_slope += tl.sum(changes * sums, 1)
        by_slope_rest += tl.sum(weights * sums, 1)
        by_product, walked = edge_changes(
            changes, product, walked, slope, at, first + places, LINK, NEAR, QUERY_BLOCK, KEY_BLOCK, LANES
        )
        by_edge = tl.dot(by_product.to(edge_key.dtype), edge_key, by_edge, input_precision=PRECISION)
        by_product, weighed = edge_changes(
            weights, product, weighed, slope, at, first + places, LINK, NEAR, QUERY_BLOCK, KEY_BLOCK, LANES
        )
        by_edge_rest = tl.dot(
            by_product.to(edge_key.dtype), edge_key, by_edge_rest, input_precision=PRECISION
        )
    return carry, walked, weighed, by_slope, by_slope_rest, by_query, by_edge, by_edge_rest
