"""Attention backward, second kernel: all sums over queries, by what the first has left of each query.

No two programs add to the same number, so that results are the same at every run.
"""

import triton
import triton.language as tl

from grape_compile.kernels.bodies.attention_operands import (
    CLOCK,
    LN2,
    LOG2E,
    NONE,
    Sight,
    bias_of,
    clock_at,
    inside,
    place_of,
    store_tile,
    tile_of,
)
from grape_compile.kernels.bodies.attention_tiles import (
    apart,
    capped,
    key_distance,
    masked,
    near_logits,
    part_of_keys,
    part_of_queries,
    past_logits,
    term_sums,
    through_cap,
    visible,
)


@triton.jit
def attention_by_key(
    QUERY, KEY, VALUE, GRADIENT, LEVELS, BY_KEY, BY_VALUE, SUMS, SLOPES, COLUMNS, GATES, MASK, SEGMENTS, SPANS,
    query_batch, query_head, query_token, key_batch, key_head, key_token, value_batch, value_head, value_token,
    gradient_batch, gradient_head, gradient_token, by_key_batch, by_key_head, by_key_token, by_value_batch,
    by_value_head, by_value_token, columns_batch, columns_head, columns_row, gates_batch, gates_head,
    mask_batch, mask_head, mask_query, mask_key,
    key_heads, queries, levels_row, keys, window, scale, cap, segments_batch,
    GROUPS: tl.constexpr, HEAD: tl.constexpr, HEAD_BLOCK: tl.constexpr, VALUES: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, BIAS: tl.constexpr, SIGHT: tl.constexpr, CAPPED: tl.constexpr,
    SPANNED: tl.constexpr, PRECISION: tl.constexpr, WANTS_SUM: tl.constexpr, WANTS_SPREAD: tl.constexpr,
    WANTS_CLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of KEY_BLOCK keys and values of one head, and sums over the queries of each of its query heads.

    Tiles are transposed, keys by queries, so that weights and their gradients stay in registers between two products.
    `SUMS` [B, H, 3, T_k] takes the sums over queries of a logit's gradient, of it times the spread of the term, and
    times the derivative of the term by its difference.
    """
    tiles = tl.cdiv(keys, KEY_BLOCK)
    tile, _, batch, key_number = place_of(tiles, key_heads)
    first = tile * KEY_BLOCK
    row = tl.arange(0, QUERY_BLOCK)
    column = tl.arange(0, KEY_BLOCK)
    inner = tl.arange(0, HEAD_BLOCK)
    outer = tl.arange(0, VALUE_BLOCK)
    inner_known = inside(inner, HEAD, HEAD_BLOCK)
    outer_known = inside(outer, VALUES, VALUE_BLOCK)
    there = first + column < keys
    key_start = KEY + batch * key_batch + key_number * key_head
    value_start = VALUE + batch * value_batch + key_number * value_head
    key = tile_of(key_start, first, key_token, column, there, inner, inner_known)
    value = tile_of(value_start, first, value_token, column, there, outer, outer_known)
    offset = keys - queries
    start = 0
    past_start = 0
    if SIGHT.causal:
        start = tl.maximum(first - offset, 0) // QUERY_BLOCK * QUERY_BLOCK
    if SIGHT.causal or BIAS.level != NONE or BIAS.term != NONE:
        past_start = tl.maximum(first + KEY_BLOCK - offset, 0)
    stop = queries
    past_stop = queries + QUERY_BLOCK
    if SIGHT.window:
        stop = tl.minimum(stop, tl.maximum(first + KEY_BLOCK - 1 + window - offset, 0))
        past_stop = first + window - offset
    if BIAS.absolute and BIAS.term == CLOCK:
        past_stop = 0

    factor = (cap if CAPPED else scale) * LOG2E
    by_key = tl.zeros([KEY_BLOCK, HEAD_BLOCK], tl.float32)
    by_value = tl.zeros([KEY_BLOCK, VALUE_BLOCK], tl.float32)
    part = (tl.num_programs(0) // tiles).to(tl.int64) * GROUPS * levels_row
    for member in tl.range(0, GROUPS):
        head = key_number * GROUPS + member
        number = batch * key_heads * GROUPS + head
        query_start = QUERY + batch * query_batch + head * query_head
        gradient_start = GRADIENT + batch * gradient_batch + head * gradient_head
        gates = GATES + batch * gates_batch + head * gates_head
        levels = LEVELS + number * levels_row
        bias = bias_of(
            SLOPES, COLUMNS, number, batch, head, columns_batch, columns_head, columns_row, keys, BIAS
        )  # fmt: skip
        sight = Sight(
            window, MASK + batch * mask_batch + head * mask_head, mask_query, mask_key,
            SEGMENTS + batch * segments_batch,
        )  # fmt: skip
        level_key = key_distance(bias.columns.level, first, bias, BIAS.level, KEY_BLOCK)
        term_key = key_distance(bias.columns.term, first, bias, BIAS.term, KEY_BLOCK)
        by_keys = part_of_keys(bias, first, BIAS, KEY_BLOCK)
        level_high, level_low = clock_at(bias.columns.level, first + KEY_BLOCK, bias, BIAS.level)
        term_high, term_low = clock_at(bias.columns.term, first + KEY_BLOCK, bias, BIAS.term)
        gate_key = 0.0
        if BIAS.gate_key:
            gate_key = tl.load(bias.columns.gate + first + column)[:, None]
        segment = 0
        if SIGHT.segmented:
            segment = tl.load(sight.segments + first + column, mask=there, other=0)
        head_start = start
        head_stop = stop
        if SPANNED:
            spans = SPANS + (number * tiles + tile) * 2
            if not SIGHT.causal:
                head_start = tl.maximum(start, tl.load(spans) * QUERY_BLOCK)
            head_stop = tl.minimum(stop, tl.load(spans + 1) * QUERY_BLOCK)
        sums = tl.zeros([KEY_BLOCK], tl.float32)
        by_spread = tl.zeros([KEY_BLOCK], tl.float32)
        by_clock = tl.zeros([KEY_BLOCK], tl.float32)
        for begin in tl.range(head_start, head_stop, QUERY_BLOCK):
            begin = tl.multiple_of(begin, QUERY_BLOCK)
            known = begin + row < queries
            query = tile_of(query_start, begin, query_token, row, known, inner, inner_known)
            gradient = tile_of(gradient_start, begin, gradient_token, row, known, outer, outer_known)
            past_level = tl.load(levels + part + begin + row)
            products = tl.dot(key, tl.trans(query), input_precision=PRECISION)
            products = capped(products, scale / cap, CAPPED)
            scaled = products * factor
            # From the origin of the keys to the first of the queries, and on to each of them.
            level_apart = -apart(bias.columns.level, begin + offset, level_high, level_low, bias, BIAS.level)
            term_apart = -apart(bias.columns.term, begin + offset, term_high, term_low, bias, BIAS.term)
            if BIAS.term == CLOCK:
                # As the other kernel takes it, so that both see the same zero where times meet.
                time_high, time_low = clock_at(bias.columns.term, begin + offset + row, bias, BIAS.term)
                term_query = apart(bias.columns.term, first + KEY_BLOCK, time_high, time_low, bias, BIAS.term)
            else:
                term_query = term_apart - row.to(tl.float32)
            gate_query = 0.0
            if BIAS.gate_query:
                gate_query = (tl.load(gates + begin + row, mask=known, other=0.0) * bias.term_slope)[None, :]
            if (begin >= past_start) & (begin + QUERY_BLOCK <= past_stop):
                base = part_of_queries(
                    bias, level_apart, term_apart, 0.0, False, BIAS.gate_query or BIAS.gate_key, BIAS
                )
                logits = past_logits(
                    scaled, (by_keys + base)[:, None], (term_key + term_apart)[:, None],
                    term_query[None, :], gate_query, gate_key, BIAS,
                )  # fmt: skip
                logits -= past_level[None, :]
            else:
                level = tl.load(levels + begin + row)
                at = begin + offset + row
                if BIAS.level == CLOCK:
                    level_query = level_apart + tl.load(levels + 3 * part + begin + row)
                else:
                    level_query = apart(bias.columns.level, first + KEY_BLOCK, at, at, bias, BIAS.level)
                logits = near_logits(
                    scaled, bias, level_key[:, None], level_query[None, :], term_key[:, None],
                    term_query[None, :], gate_query, gate_key, BIAS,
                )  # fmt: skip
                seen = visible(at[None, :], (first + column)[:, None], keys, window, SIGHT)
                logits = tl.where(seen, logits - level[None, :], -float("inf"))
            if SIGHT.masked != NONE:
                offsets = (begin.to(tl.int64) + row)[None, :] * mask_query + (first + column)[
                    :, None
                ] * mask_key
                logits = masked(logits, sight.mask, offsets, known[None, :] & there[:, None], SIGHT.masked)
            if SIGHT.segmented:
                own = tl.load(sight.segments + begin + offset + row, mask=known, other=0)
                logits = tl.where(own[None, :] == segment[:, None], logits, -float("inf"))
            weights = tl.exp2(logits)
            by_value = tl.dot(weights.to(gradient.dtype), gradient, by_value, input_precision=PRECISION)
            delta = tl.load(levels + 2 * part + begin + row)
            changes = tl.zeros([KEY_BLOCK, QUERY_BLOCK], tl.float32) - delta[None, :]
            changes = weights * tl.dot(value, tl.trans(gradient), changes, input_precision=PRECISION)
            straight = through_cap(changes, products, CAPPED)
            by_key = tl.dot(straight.to(query.dtype), query, by_key, input_precision=PRECISION)
            if WANTS_SUM:
                sums += tl.sum(changes, 1)
            if WANTS_SPREAD or WANTS_CLOCK:
                more_spread, more_clock = term_sums(
                    changes, bias, term_key[:, None] + term_query[None, :], gate_query, gate_key, BIAS, WANTS_SPREAD,
                    WANTS_CLOCK,
                )  # fmt: skip
                by_spread += more_spread
                by_clock += more_clock
        places = SUMS + number * 3 * keys + first + column
        if WANTS_SUM:
            tl.store(places, sums, mask=there)
        if WANTS_SPREAD:
            tl.store(places + keys, by_spread, mask=there)
        if WANTS_CLOCK:
            tl.store(places + 2 * keys, by_clock * LN2, mask=there)
    by_key_start = BY_KEY + batch * by_key_batch + key_number * by_key_head
    store_tile(by_key_start, first, by_key_token, column, there, inner, inner_known, by_key * scale)
    by_value_start = BY_VALUE + batch * by_value_batch + key_number * by_value_head
    store_tile(by_value_start, first, by_value_token, column, there, outer, outer_known, by_value)
