"""Attention with additive biases, forward: a tile of queries walks over its keys with a running softmax."""

import triton
import triton.language as tl

from grape_compile.kernels.bodies.attention_operands import (
    LN2,
    LOG2E,
    NONE,
    Sight,
    bias_of,
    inside,
    key_range,
    place_of,
    rows_of,
    store_tile,
    tile_of,
    turned_tile,
)
from grape_compile.kernels.bodies.attention_tiles import LOWEST, capped, tile_logits


@triton.jit
def attention_forward(
    QUERY, KEY, VALUE, OUTPUT, LOGSUMEXP, SLOPES, COLUMNS, GATES, MASK, SEGMENTS, SINKS, SPANS, COS, SIN,
    query_batch, query_head, query_token, key_batch, key_head, key_token, value_batch, value_head, value_token,
    output_batch, output_head, output_token, columns_batch, columns_head, columns_row, gates_batch, gates_head,
    mask_batch, mask_head, mask_query, mask_key,
    heads, queries, keys, window, scale, cap, segments_batch, sinks_batch, sinks_head, turn_batch, turn_head,
    turn_token,
    GROUPS: tl.constexpr, HEAD: tl.constexpr, HEAD_BLOCK: tl.constexpr, VALUES: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, BIAS: tl.constexpr, SIGHT: tl.constexpr, SINK: tl.constexpr,
    CAPPED: tl.constexpr, SPANNED: tl.constexpr, TURNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and logsumexp of QUERY_BLOCK queries of one head; the longest walks start first.

    TURNED: queries turn on their way in, and are rounded to their dtype as they would be in memory.
    """
    tiles = tl.cdiv(queries, QUERY_BLOCK)
    tile, number, batch, head = place_of(tiles, heads)
    tile = tiles - 1 - tile
    begin = tile * QUERY_BLOCK
    row = tl.arange(0, QUERY_BLOCK)
    column = tl.arange(0, KEY_BLOCK)
    inner = tl.arange(0, HEAD_BLOCK)
    outer = tl.arange(0, VALUE_BLOCK)
    inner_known = inside(inner, HEAD, HEAD_BLOCK)
    outer_known = inside(outer, VALUES, VALUE_BLOCK)
    there_row = begin + row < queries
    # Queries are the last of the keys.
    first_at = begin + keys - queries
    query_start = QUERY + batch * query_batch + head * query_head
    if TURNED == NONE:
        query = tile_of(query_start, begin, query_token, row, there_row, inner, inner_known)
    else:
        turns = batch * turn_batch + head * turn_head
        query = turned_tile(
            query_start, query_token, COS + turns, SIN + turns, turn_token, begin, row, there_row, TURNED, HEAD
        )  # fmt: skip
    key_start = KEY + batch * key_batch + head // GROUPS * key_head
    value_start = VALUE + batch * value_batch + head // GROUPS * value_head
    bias = bias_of(
        SLOPES, COLUMNS, number, batch, head, columns_batch, columns_head, columns_row, keys, BIAS
    )  # fmt: skip
    sight = Sight(
        window, MASK + batch * mask_batch + head * mask_head, mask_query, mask_key, SEGMENTS + batch * segments_batch
    )  # fmt: skip
    gates = GATES + batch * gates_batch + head * gates_head
    rows = rows_of(bias, sight, gates, begin + row, there_row, first_at + row, BIAS, SIGHT)
    mask_offsets = (begin.to(tl.int64) + row) * mask_query
    start, stop, past_start, past_stop = key_range(
        first_at, keys, window, BIAS, SIGHT, QUERY_BLOCK, KEY_BLOCK
    )
    if SPANNED:
        spans = SPANS + (number * tiles + tile) * 2
        start = tl.maximum(start, tl.load(spans) * KEY_BLOCK)
        if not SIGHT.causal:
            stop = tl.minimum(stop, tl.load(spans + 1) * KEY_BLOCK)

    scaled = (cap if CAPPED else scale) * LOG2E
    bare: tl.constexpr = BIAS.level == NONE and BIAS.term == NONE and SIGHT.masked == NONE
    factor = 1.0 if bare else scaled
    best = tl.full([QUERY_BLOCK], LOWEST, tl.float32)
    total = tl.zeros([QUERY_BLOCK], tl.float32)
    if SINK:
        sink = tl.load(SINKS + batch * sinks_batch + head * sinks_head) * LOG2E
        best = tl.maximum(best, sink)
        total = tl.exp2(sink - best)
    sums = tl.zeros([QUERY_BLOCK, VALUE_BLOCK], tl.float32)
    for first in tl.range(start, stop, KEY_BLOCK):
        first = tl.multiple_of(first, KEY_BLOCK)
        there = first + column < keys
        key = tile_of(key_start, first, key_token, column, there, inner, inner_known)
        products = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        products = capped(products, scale / cap, CAPPED)
        past = (first >= past_start) & (first + KEY_BLOCK <= past_stop)
        logits, base, _, _, _ = tile_logits(
            products * factor,
            bias,
            sight,
            rows,
            first,
            past,
            mask_offsets,
            there_row,
            0.0,
            BIAS,
            SIGHT,
            KEY_BLOCK,
            False,
        )
        if bare:
            # The scale is positive: one multiply-add an element instead of a product and a difference.
            larger = tl.maximum(best, tl.max(logits, 1) * scaled)
            weights = tl.exp2(logits * scaled - larger[:, None])
        else:
            larger = tl.maximum(best, tl.max(logits, 1) + base)
            weights = tl.exp2(logits - (larger - base)[:, None])
        shrink = tl.exp2(best - larger)
        total = total * shrink + tl.sum(weights, 1)
        sums = sums * shrink[:, None]
        value = tile_of(value_start, first, value_token, column, there, outer, outer_known)
        sums = tl.dot(weights.to(value.dtype), value, sums, input_precision=PRECISION)
        best = larger
    # A row without a key: zero, and no logsumexp.
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    output = OUTPUT + batch * output_batch + head * output_head
    store_tile(output, begin, output_token, row, there_row, outer, outer_known, sums / total[:, None])
    levels = tl.where(empty, -float("inf"), (best + tl.log2(total)) * LN2)
    tl.store(LOGSUMEXP + number.to(tl.int64) * queries + begin + row, levels, mask=there_row)
