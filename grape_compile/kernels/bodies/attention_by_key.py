"""Attention backward, second kernel: all sums over queries, by what the first has left of each query.

No two programs add to the same number, so that results are the same at every run.
"""

import triton
import triton.language as tl

from grape_compile.kernels.bodies.attention_tiles import (
    CLOCK,
    CLOCK_SIZE,
    LN2,
    LOG2E,
    NONE,
    apart,
    clock_at,
    key_distance,
    masked,
    near_logits,
    part_of_keys,
    part_of_queries,
    past_logits,
    slope_of_spread,
    spread,
    steepness,
    visible,
)


@triton.jit
def attention_by_key(
    QUERY, KEY, VALUE, GRADIENT, LEVELS, BY_KEY, BY_VALUE, SUMS, SLOPES, COLUMNS, GATES, MASK, LAST,
    query_batch, query_head, query_token, key_batch, key_head, key_token, value_batch, value_head, value_token,
    gradient_batch, gradient_head, gradient_token, by_key_batch, by_key_head, by_key_token, by_value_batch,
    by_value_head, by_value_token, columns_batch, columns_head, columns_row, gates_batch, gates_head,
    mask_batch, mask_head, mask_query, mask_key,
    key_heads, queries, levels_row, keys, window, scale,
    GROUPS: tl.constexpr, HEAD: tl.constexpr, HEAD_BLOCK: tl.constexpr, VALUES: tl.constexpr,
    VALUE_BLOCK: tl.constexpr, QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, LEVEL: tl.constexpr, TERM: tl.constexpr, ABSOLUTE: tl.constexpr, GATE_QUERY: tl.constexpr,
    GATE_KEY: tl.constexpr, MASKED: tl.constexpr, PRUNED: tl.constexpr, PRECISION: tl.constexpr,
    WANTS_SUM: tl.constexpr, WANTS_SPREAD: tl.constexpr, WANTS_CLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of KEY_BLOCK keys and values of one head, and sums over the queries of each of its query heads.

    Tiles are transposed, keys by queries, so that weights and their gradients stay in registers between two products.
    `SUMS` [B, H, 3, T_k] takes the sums over queries of a logit's gradient, of it times the spread of the term, and
    times the derivative of the term by its difference.
    """
    tiles = tl.cdiv(keys, KEY_BLOCK)
    tile = tl.program_id(0) % tiles
    first = tile * KEY_BLOCK
    wide_first = first.to(tl.int64)
    batch = (tl.program_id(0) // tiles // key_heads).to(tl.int64)
    key_number = (tl.program_id(0) // tiles % key_heads).to(tl.int64)
    row = tl.arange(0, QUERY_BLOCK)
    column = tl.arange(0, KEY_BLOCK)
    inner = tl.arange(0, HEAD_BLOCK)
    outer = tl.arange(0, VALUE_BLOCK)
    there = first + column < keys
    inner_known = (inner < HEAD if HEAD < HEAD_BLOCK else inner >= 0)[None, :]
    outer_known = (outer < VALUES if VALUES < VALUE_BLOCK else outer >= 0)[None, :]
    key_start = KEY + batch * key_batch + key_number * key_head + wide_first * key_token
    value_start = VALUE + batch * value_batch + key_number * value_head + wide_first * value_token
    key = tl.load(
        key_start + column[:, None] * key_token + inner[None, :], mask=there[:, None] & inner_known, other=0.0
    )
    value = tl.load(
        value_start + column[:, None] * value_token + outer[None, :],
        mask=there[:, None] & outer_known,
        other=0.0,
    )
    offset = keys - queries
    start = 0
    past_start = 0
    if CAUSAL:
        start = tl.maximum(first - offset, 0) // QUERY_BLOCK * QUERY_BLOCK
    if CAUSAL or LEVEL != NONE or TERM != NONE:
        past_start = tl.maximum(first + KEY_BLOCK - offset, 0)
    stop = queries
    past_stop = queries + QUERY_BLOCK
    if WINDOW:
        stop = tl.minimum(stop, tl.maximum(first + KEY_BLOCK - 1 + window - offset, 0))
        past_stop = first + window - offset
    if ABSOLUTE and TERM == CLOCK:
        past_stop = 0

    by_key = tl.zeros([KEY_BLOCK, HEAD_BLOCK], tl.float32)
    by_value = tl.zeros([KEY_BLOCK, VALUE_BLOCK], tl.float32)
    part = (tl.num_programs(0) // tiles).to(tl.int64) * GROUPS * levels_row
    for member in tl.range(0, GROUPS):
        head = key_number * GROUPS + member
        number = batch * key_heads * GROUPS + head
        query_start = QUERY + batch * query_batch + head * query_head
        gradient_start = GRADIENT + batch * gradient_batch + head * gradient_head
        mask_start = MASK + batch * mask_batch + head * mask_head
        gates = GATES + batch * gates_batch + head * gates_head
        levels = LEVELS + number * levels_row
        columns = COLUMNS + batch * columns_batch + head * columns_head
        term_columns = columns + (CLOCK_SIZE * columns_row if LEVEL == CLOCK else 0)
        gate_columns = term_columns + (CLOCK_SIZE * columns_row if TERM == CLOCK else 0)
        keyed = gate_columns + (columns_row if GATE_KEY else 0)
        level_slope = tl.load(SLOPES + number * 2) * LOG2E if LEVEL != NONE else 0.0
        term_slope = tl.load(SLOPES + number * 2 + 1) * LOG2E if TERM != NONE else 0.0
        level_key = key_distance(columns, first, columns_row, LEVEL, KEY_BLOCK)
        term_key = key_distance(term_columns, first, columns_row, TERM, KEY_BLOCK)
        by_keys = part_of_keys(
            keyed, first, level_slope, term_slope, LEVEL, TERM, GATE_QUERY, GATE_KEY, KEY_BLOCK
        )
        level_high, level_low = clock_at(columns, first + KEY_BLOCK, keys, columns_row, LEVEL)
        term_high, term_low = clock_at(term_columns, first + KEY_BLOCK, keys, columns_row, TERM)
        gate_key = 0.0
        if GATE_KEY:
            gate_key = tl.load(gate_columns + first + column)
        head_stop = stop
        if PRUNED:
            head_stop = tl.minimum(stop, tl.load(LAST + number * tiles + tile) * QUERY_BLOCK)
        sums = tl.zeros([KEY_BLOCK], tl.float32)
        by_spread = tl.zeros([KEY_BLOCK], tl.float32)
        by_clock = tl.zeros([KEY_BLOCK], tl.float32)
        for begin in tl.range(start, head_stop, QUERY_BLOCK):
            begin = tl.multiple_of(begin, QUERY_BLOCK)
            known = begin + row < queries
            query_tile = query_start + begin.to(tl.int64) * query_token
            gradient_tile = gradient_start + begin.to(tl.int64) * gradient_token
            query = tl.load(
                query_tile + row[:, None] * query_token + inner[None, :],
                mask=known[:, None] & inner_known,
                other=0.0,
            )
            gradient = tl.load(
                gradient_tile + row[:, None] * gradient_token + outer[None, :],
                mask=known[:, None] & outer_known,
                other=0.0,
            )
            past_level = tl.load(levels + part + begin + row)
            products = tl.dot(key, tl.trans(query), input_precision=PRECISION)
            # From the origin of the keys to the first of the queries, and on to each of them.
            level_apart = -apart(columns, begin + offset, level_high, level_low, keys, columns_row, LEVEL)
            term_apart = -apart(term_columns, begin + offset, term_high, term_low, keys, columns_row, TERM)
            if TERM == CLOCK:
                # As the other kernel takes it, so that both see the same zero where times meet.
                time_high, time_low = clock_at(term_columns, begin + offset + row, keys, columns_row, TERM)
                term_query = apart(
                    term_columns, first + KEY_BLOCK, time_high, time_low, keys, columns_row, TERM
                )
            else:
                term_query = term_apart - row.to(tl.float32)
            gate_query = 0.0
            if GATE_QUERY:
                gate_query = (tl.load(gates + begin + row, mask=known, other=0.0) * term_slope)[None, :]
            if (begin >= past_start) & (begin + QUERY_BLOCK <= past_stop):
                base = part_of_queries(
                    level_slope,
                    level_apart,
                    term_slope,
                    term_apart,
                    0.0,
                    LEVEL,
                    TERM,
                    False,
                    GATE_QUERY or GATE_KEY,
                )
                logits = past_logits(
                    products, scale * LOG2E, (by_keys + base)[:, None], (term_key + term_apart)[:, None],
                    term_query[None, :], gate_query, gate_key[:, None] if GATE_KEY else 0.0,
                    LEVEL, TERM, GATE_QUERY, GATE_KEY,
                )  # fmt: skip
                logits -= past_level[None, :]
            else:
                level = tl.load(levels + begin + row)
                at = begin + offset + row
                if LEVEL == CLOCK:
                    level_query = level_apart + tl.load(levels + 3 * part + begin + row)
                else:
                    level_query = apart(columns, first + KEY_BLOCK, at, at, keys, columns_row, LEVEL)
                logits = near_logits(
                    products, scale * LOG2E, level_slope, level_key[:, None], level_query[None, :], term_slope,
                    term_key[:, None], term_query[None, :], gate_query,
                    gate_key[:, None] if GATE_KEY else 0.0, LEVEL, TERM, ABSOLUTE, GATE_QUERY, GATE_KEY,
                )  # fmt: skip
                seen = visible(at[None, :], (first + column)[:, None], keys, window, CAUSAL, WINDOW)
                logits = tl.where(seen, logits - level[None, :], -float("inf"))
            if MASKED != NONE:
                offsets = (begin.to(tl.int64) + row)[None, :] * mask_query + (first + column)[
                    :, None
                ] * mask_key
                logits = masked(logits, mask_start, offsets, known[None, :] & there[:, None], MASKED)
            weights = tl.exp2(logits)
            by_value = tl.dot(weights.to(gradient.dtype), gradient, by_value, input_precision=PRECISION)
            delta = tl.load(levels + 2 * part + begin + row)
            changes = tl.zeros([KEY_BLOCK, QUERY_BLOCK], tl.float32) - delta[None, :]
            changes = weights * tl.dot(value, tl.trans(gradient), changes, input_precision=PRECISION)
            by_key = tl.dot(changes.to(query.dtype), query, by_key, input_precision=PRECISION)
            if WANTS_SUM:
                sums += tl.sum(changes, 1)
            if WANTS_SPREAD or WANTS_CLOCK:
                difference = term_key[:, None] + term_query[None, :]
                if WANTS_SPREAD:
                    by_spread += tl.sum(changes * spread(difference, ABSOLUTE), 1)
                if WANTS_CLOCK:
                    steep = steepness(
                        term_slope, gate_query, gate_key[:, None] if GATE_KEY else 0.0, GATE_QUERY, GATE_KEY
                    )
                    by_clock += tl.sum(changes * (steep * slope_of_spread(difference, ABSOLUTE)), 1)
        places = SUMS + number * 3 * keys + first + column
        if WANTS_SUM:
            tl.store(places, sums, mask=there)
        if WANTS_SPREAD:
            tl.store(places + keys, by_spread, mask=there)
        if WANTS_CLOCK:
            tl.store(places + 2 * keys, by_clock * LN2, mask=there)
    by_key_start = BY_KEY + batch * by_key_batch + key_number * by_key_head + wide_first * by_key_token
    tl.store(
        by_key_start + column[:, None] * by_key_token + inner[None, :],
        (by_key * scale).to(BY_KEY.dtype.element_ty),
        mask=there[:, None] & inner_known,
    )
    by_value_start = (
        BY_VALUE + batch * by_value_batch + key_number * by_value_head + wide_first * by_value_token
    )
    tl.store(
        by_value_start + column[:, None] * by_value_token + outer[None, :],
        by_value.to(BY_VALUE.dtype.element_ty),
        mask=there[:, None] & outer_known,
    )
