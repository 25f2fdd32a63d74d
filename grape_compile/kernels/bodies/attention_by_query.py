"""Attention backward, first kernel: all sums over keys, with the weights computed again from the logsumexp."""

import triton
import triton.language as tl

from grape_compile.kernels.bodies.attention_operands import (
    CLOCK,
    LN2,
    LOG2E,
    Sight,
    bias_of,
    inside,
    key_range,
    place_of,
    rows_of,
    store_tile,
    tile_of,
)
from grape_compile.kernels.bodies.attention_tiles import (
    apart,
    capped,
    key_distance,
    part_of_queries,
    term_sums,
    through_cap,
    tile_logits,
)


@triton.jit
def attention_by_query(
    QUERY, KEY, VALUE, OUTPUT, GRADIENT, LOGSUMEXP, LEVELS, BY_QUERY, ROWS, SLOPES, COLUMNS, GATES, MASK, SEGMENTS,
    SINKS, SPANS,
    query_batch, query_head, query_token, key_batch, key_head, key_token, value_batch, value_head, value_token,
    output_batch, output_head, output_token, gradient_batch, gradient_head, gradient_token, by_query_batch,
    by_query_head, by_query_token, columns_batch, columns_head, columns_row, gates_batch, gates_head,
    mask_batch, mask_head, mask_query, mask_key,
    heads, queries, levels_row, keys, window, scale, cap, segments_batch, sinks_batch, sinks_head,
    GROUPS: tl.constexpr, HEAD: tl.constexpr, HEAD_BLOCK: tl.constexpr, VALUES: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, LEVEL_BLOCK: tl.constexpr, BIAS: tl.constexpr,
    SIGHT: tl.constexpr, SINK: tl.constexpr, CAPPED: tl.constexpr, SPANNED: tl.constexpr, PRECISION: tl.constexpr,
    WANTS_DELTA: tl.constexpr, WANTS_APART: tl.constexpr, WANTS_SPREAD: tl.constexpr, WANTS_CLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of QUERY_BLOCK queries of one head, their `LEVELS`, and sums over keys.

    `LEVELS` [4, B, H, padded] is what the sums over queries need, padded to whole tiles of LEVEL_BLOCK: the logsumexp
    as a power of two, infinite where there are no weights; the same without the part of the bias that sees the query
    alone, whose distances count from the first query of a tile; delta, the sum of output times gradient, with
    WANTS_DELTA freed of the rounding of the output, which sums over many queries would show; the level's distance to
    the first query of the tile, where it has a clock.
    `ROWS` [B, H, 3, T_q] takes the sums over keys of a logit's gradient times the difference of the level, times the
    spread of the term, and times the derivative of the term by its difference.
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
    first_at = begin + keys - queries
    query_start = QUERY + batch * query_batch + head * query_head
    query = tile_of(query_start, begin, query_token, row, there_row, inner, inner_known)
    gradient_start = GRADIENT + batch * gradient_batch + head * gradient_head
    gradient = tile_of(gradient_start, begin, gradient_token, row, there_row, outer, outer_known)
    output_start = OUTPUT + batch * output_batch + head * output_head
    output = tile_of(output_start, begin, output_token, row, there_row, outer, outer_known)
    delta = tl.sum(output.to(tl.float32) * gradient.to(tl.float32), 1)
    wide_number = number.to(tl.int64)
    level = tl.load(LOGSUMEXP + wide_number * queries + begin + row, mask=there_row, other=-float("inf"))
    # A row without a key, or no row: weights exp(logit - inf) are zero.
    level = tl.where(level == -float("inf"), float("inf"), level) * LOG2E

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

    origin = (begin + row) // LEVEL_BLOCK * LEVEL_BLOCK + keys - queries
    level_query = apart(bias.columns.level, origin, rows.level_high, rows.level_low, bias, BIAS.level)
    term_query = apart(bias.columns.term, origin, rows.term_high, rows.term_low, bias, BIAS.term)
    base = part_of_queries(bias, level_query, term_query, rows.gate, BIAS.gate_query, BIAS.gate_key, BIAS)
    levels = LEVELS + wide_number * levels_row + begin + row
    part = (tl.num_programs(0) // tiles).to(tl.int64) * levels_row
    tl.store(levels, level)
    tl.store(levels + part, level - base)
    if BIAS.level == CLOCK:
        tl.store(levels + 3 * part, level_query)

    start, stop, past_start, past_stop = key_range(
        first_at, keys, window, BIAS, SIGHT, QUERY_BLOCK, KEY_BLOCK
    )
    if SPANNED:
        spans = SPANS + (number * tiles + tile) * 2
        start = tl.maximum(start, tl.load(spans) * KEY_BLOCK)
        if not SIGHT.causal:
            stop = tl.minimum(stop, tl.load(spans + 1) * KEY_BLOCK)
    factor = (cap if CAPPED else scale) * LOG2E
    by_query = tl.zeros([QUERY_BLOCK, HEAD_BLOCK], tl.float32)
    rest = tl.zeros([QUERY_BLOCK], tl.float32)
    by_apart = tl.zeros([QUERY_BLOCK], tl.float32)
    by_spread = tl.zeros([QUERY_BLOCK], tl.float32)
    by_clock = tl.zeros([QUERY_BLOCK], tl.float32)
    for first in tl.range(start, stop, KEY_BLOCK):
        first = tl.multiple_of(first, KEY_BLOCK)
        there = first + column < keys
        key = tile_of(key_start, first, key_token, column, there, inner, inner_known)
        value = tile_of(value_start, first, value_token, column, there, outer, outer_known)
        products = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        products = capped(products, scale / cap, CAPPED)
        past = (first >= past_start) & (first + KEY_BLOCK <= past_stop)
        logits, base, level_query, term_query, gate_key = tile_logits(
            products * factor,
            bias,
            sight,
            rows,
            first,
            past,
            mask_offsets,
            there_row,
            level,
            BIAS,
            SIGHT,
            KEY_BLOCK,
            True,
        )
        weights = tl.exp2(logits)
        changes = tl.dot(gradient, tl.trans(value), input_precision=PRECISION)
        changes = weights * (changes - delta[:, None])
        straight = through_cap(changes, products, CAPPED)
        by_query = tl.dot(straight.to(key.dtype), key, by_query, input_precision=PRECISION)
        if WANTS_DELTA:
            rest += tl.sum(changes, 1)
        if WANTS_APART:
            level_key = key_distance(bias.columns.level, first, bias, BIAS.level, KEY_BLOCK)
            by_apart += tl.sum(changes * (level_key[None, :] + level_query[:, None]), 1)
        if WANTS_SPREAD or WANTS_CLOCK:
            term_key = key_distance(bias.columns.term, first, bias, BIAS.term, KEY_BLOCK)
            more_spread, more_clock = term_sums(
                changes, bias, term_key[None, :] + term_query[:, None], rows.gate[:, None] if BIAS.gate_query else 0.0,
                gate_key, BIAS, WANTS_SPREAD, WANTS_CLOCK,
            )  # fmt: skip
            by_spread += more_spread
            by_clock += more_clock
    if WANTS_DELTA:
        # The gradients of a query's logits, of its sink's with them, sum to zero; what is left over is what rounding
        # the output did to delta.
        if SINK:
            sink = tl.load(SINKS + batch * sinks_batch + head * sinks_head) * LOG2E
            delta -= delta * tl.exp2(sink - level)
        delta += rest
    tl.store(levels + 2 * part, delta)
    by_query_start = BY_QUERY + batch * by_query_batch + head * by_query_head
    store_tile(by_query_start, begin, by_query_token, row, there_row, inner, inner_known, by_query * scale)
    sums = ROWS + wide_number * 3 * queries + begin + row
    if WANTS_APART:
        tl.store(sums, by_apart, mask=there_row)
    if WANTS_SPREAD:
        tl.store(sums + queries, by_spread, mask=there_row)
    if WANTS_CLOCK:
        tl.store(sums + 2 * queries, by_clock * LN2, mask=there_row)
