"""Attention with a path bias, backward: all sums over keys, from the diagonal backwards; first heads, then edges.

The sums over queries start in the middle of a walk. So these leave behind, for every row and tile of keys, what they
had
summed before that tile.
"""

import triton
import triton.language as tl

from grape_compile.kernels.bodies.attention_operands import LN2, LOG2E, NONE
from grape_compile.kernels.bodies.attention_tiles import masked
from grape_compile.kernels.bodies.path_tiles import (
    any_gains,
    edge_changes,
    hidden,
    keys_of_columns,
    path_behind,
    rows_of,
    slope_of_link,
)


@triton.jit
def path_by_query(
    QUERY, KEY, VALUE, OUTPUT, GRADIENT, LOGSUMEXP, EDGE_QUERY, EDGE_KEY, SIZES, SLOPES, MASK, NORMS,
    BY_QUERY, BY_EDGE, BY_SLOPE, LEVELS, CARRIES,
    query_batch, query_head, query_token, key_batch, key_head, key_token, value_batch, value_head, value_token,
    output_batch, output_head, output_token, gradient_batch, gradient_head, gradient_token,
    by_query_batch, by_query_head, by_query_token, edge_query_batch, edge_query_head, edge_query_token,
    edge_key_batch, edge_key_head, edge_key_token, mask_batch, mask_head, mask_query, mask_key,
    base, heads, queries, keys, window, scale, rounded_away,
    GROUPS: tl.constexpr, HEAD: tl.constexpr, HEAD_BLOCK: tl.constexpr, VALUES: tl.constexpr,
    VALUE_BLOCK: tl.constexpr, EDGE_BLOCK: tl.constexpr, QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr, LANES: tl.constexpr, SPLIT: tl.constexpr, CHUNK: tl.constexpr, LINK: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, MASKED: tl.constexpr, LEAVES: tl.constexpr, PRECISION: tl.constexpr, EDGES: tl.constexpr,
):  # fmt: skip
    """Gradients of QUERY_BLOCK queries of one head, or with EDGES of their side of the path; heads count from `base`.

    `LEVELS` [B, H, 3, T_q] takes what all later sums need: the logsumexp as a power of two, infinite where there are no
    weights; delta, the sum of output times gradient; the number of the first tile that a row walked over. `CARRIES`
    [2, heads, tiles of keys, T_q] takes what stands behind each tile: the sum of the edges and, with EDGES, of the
    gradients of the logits. `BY_EDGE` [B, H, T_q, EDGE_BLOCK] and `BY_SLOPE` [B, H, T_q] are the gradients of the
    products' queries, and the sums of the gradients of logits times their bias without its slope.

    The rounding of the output puts delta off, which a sum along a path would show. As the gradients of a row's logits
    add up to zero, their sum is that error: hence the walk for the edges follows the one that finds it.
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
    levels = LEVELS + number * 3 * queries + begin + row
    if EDGES:
        level = tl.load(levels, mask=there_row, other=float("inf"))
        delta = tl.load(levels + queries, mask=there_row, other=0.0)
    else:
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
    size = None
    if SIZES is not None:
        size = tl.load(SIZES + number) * LOG2E
    key_tiles = tl.cdiv(keys, KEY_BLOCK)
    norms = NORMS + number // GROUPS * key_tiles
    length = tl.sqrt(tl.sum(query.to(tl.float32) * query.to(tl.float32), 1)) * (scale * LOG2E)
    carries = CARRIES + local * key_tiles * queries + begin
    if EDGES:
        carries += (tl.num_programs(0) // tiles).to(tl.int64) * key_tiles * queries

    places = keys_of_columns(KEY_BLOCK, LANES, SPLIT)
    stop = key_tiles
    if CAUSAL:
        stop = tl.minimum(stop, tl.cdiv(first_at + QUERY_BLOCK, KEY_BLOCK))
    start = 0
    if WINDOW:
        start = tl.maximum(first_at - window + 1, 0) // KEY_BLOCK
    if EDGES:
        start = tl.min(tl.load(levels + 2 * queries, mask=there_row, other=float("inf")), 0).to(tl.int32)
    # Tiles from here on have keys that lie ahead of some row.
    near = tl.maximum(tl.minimum((first_at + 1) // KEY_BLOCK, stop), start)
    carry = tl.zeros([QUERY_BLOCK], tl.float32)
    walked = tl.zeros([QUERY_BLOCK], tl.float32)
    by_slope = tl.zeros([QUERY_BLOCK], tl.float32)
    sums = tl.zeros([QUERY_BLOCK, EDGE_BLOCK if EDGES else HEAD_BLOCK], tl.float32)
    for index in tl.range(0, stop - near):
        carry, walked, by_slope, sums = back_step(
            carry, walked, by_slope, sums, query, edge_query, gradient, level, delta, key_start, value_start,
            edge_start,
            mask_start, carries, stop - 1 - index, places, at, row, there_row, inner, outer, edge, key_token,
            value_token, edge_key_token, mask_query, mask_key, queries, keys, window, scale, slope, size, HEAD, VALUES,
            EDGE_BLOCK, QUERY_BLOCK, KEY_BLOCK, LANES, SPLIT, LINK, True, CAUSAL, WINDOW, MASKED, PRECISION, EDGES,
        )  # fmt: skip
    left = near - start
    goes_on = left > 0
    while goes_on:
        count = left
        if LEAVES:
            count = tl.minimum(left, CHUNK)
        for index in tl.range(0, count):
            carry, walked, by_slope, sums = back_step(
                carry, walked, by_slope, sums, query, edge_query, gradient, level, delta, key_start, value_start,
                edge_start, mask_start, carries, start + left - 1 - index, places, at, row, there_row, inner, outer,
                edge, key_token, value_token, edge_key_token, mask_query, mask_key, queries, keys, window, scale, slope,
                size, HEAD, VALUES, EDGE_BLOCK, QUERY_BLOCK, KEY_BLOCK, LANES, SPLIT, LINK, False, CAUSAL, WINDOW,
                MASKED, PRECISION, EDGES,
            )  # fmt: skip
        left -= count
        goes_on = left > 0
        if LEAVES:
            goes_on = goes_on & any_gains(
                length, norms, start + left, slope, carry, level, rounded_away, KEY_BLOCK
            )
    if EDGES:
        edges = BY_EDGE + (number * queries + wide_begin) * EDGE_BLOCK
        tl.store(edges + row[:, None] * EDGE_BLOCK + edge[None, :], sums, mask=there_row[:, None])
        tl.store(BY_SLOPE + number * queries + begin + row, by_slope * LN2, mask=there_row)
    else:
        tl.store(levels, level, mask=there_row)
        tl.store(levels + queries, delta + walked, mask=there_row)
        tl.store(levels + 2 * queries, (start + left + row * 0).to(tl.float32), mask=there_row)
        by_query_start = (
            BY_QUERY + batch * by_query_batch + head * by_query_head + wide_begin * by_query_token
        )
        tl.store(
            by_query_start + row[:, None] * by_query_token + inner[None, :],
            (sums * scale).to(BY_QUERY.dtype.element_ty),
            mask=there_row[:, None] & (inner < HEAD if HEAD < HEAD_BLOCK else inner >= 0)[None, :],
        )


@triton.jit
def back_step(
    carry, walked, by_slope, sums, query, edge_query, gradient, level, delta, KEY, VALUE, EDGE_KEY, MASK, CARRIES,
    tile, places, at, row, there_row, inner, outer, edge,
    key_token, value_token, edge_key_token, mask_query, mask_key, queries, keys, window, scale, slope, size,
    HEAD: tl.constexpr, VALUES: tl.constexpr, EDGE_BLOCK: tl.constexpr, QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr, LANES: tl.constexpr, SPLIT: tl.constexpr, LINK: tl.constexpr, NEAR: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, EDGES: tl.constexpr,
):  # fmt: skip
    """Add a tile of keys to all sums of all rows, and leave behind what the sums were before it."""
    first = tl.multiple_of(tile * KEY_BLOCK, KEY_BLOCK)
    left_behind = CARRIES + tile.to(tl.int64) * queries + row
    tl.store(left_behind, walked if EDGES else carry, mask=there_row)
    key = rows_of(KEY, key_token, first, places, keys, inner, HEAD, NEAR)
    value = rows_of(VALUE, value_token, first, places, keys, outer, VALUES, NEAR)
    edge_key = rows_of(EDGE_KEY, edge_key_token, first, places, keys, edge, EDGE_BLOCK, NEAR)
    # Logits come last: they need not be in registers while edges are summed.
    product = tl.dot(edge_query, tl.trans(edge_key), input_precision=PRECISION)
    if size is not None:
        product = product * size
    if EDGES:
        steep = slope_of_link(product, LINK) * -slope
    bias, carry = path_behind(
        product, carry, at, first + places, LINK, NEAR, QUERY_BLOCK, KEY_BLOCK, LANES, SPLIT
    )
    logits = tl.dot(query, tl.trans(key), input_precision=PRECISION) * (scale * LOG2E) + bias * slope
    logits = hidden(logits, at, first + places, keys, window, NEAR, CAUSAL, WINDOW)
    if MASKED != NONE:
        offsets = row[:, None] * mask_query + (first + places)[None, :] * mask_key
        logits = masked(logits, MASK, offsets, there_row[:, None] & (first + places < keys)[None, :], MASKED)
    weights = tl.exp2(logits - level[:, None])
    changes = tl.dot(gradient, tl.trans(value), input_precision=PRECISION)
    changes = weights * (changes - delta[:, None])
    if EDGES:
        by_slope += tl.sum(changes * bias, 1)
        by_product, walked = edge_changes(
            changes, steep, walked, at, first + places, NEAR, QUERY_BLOCK, KEY_BLOCK, LANES, SPLIT
        )
        sums = tl.dot(by_product.to(edge_key.dtype), edge_key, sums, input_precision=PRECISION)
    else:
        walked += tl.sum(changes, 1)
        sums = tl.dot(changes.to(key.dtype), key, sums, input_precision=PRECISION)
    return carry, walked, by_slope, sums
