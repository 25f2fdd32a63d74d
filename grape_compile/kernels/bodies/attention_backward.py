"""Attention with additive biases, backward: one kernel for all sums over keys, one for all sums over queries.

The first leaves for the second what a query needs, padded to whole tiles: its logsumexp as a power of two, infinite where
there are no weights, and delta = sum of output times gradient. Both compute the weights again from the logsumexp. No two programs add to the same number, so that results are the same
at every run.
"""

import triton
import triton.language as tl

from grape_compile.kernels.bodies.attention_tiles import (
    CLOCK,
    CLOCK_SIZE,
    LN2,
    LOG2E,
    NONE,
    biased,
    key_distance,
    masked,
    query_clock,
    query_distance,
    slope_of_spread,
    spread,
    steepness,
    visible,
)


@triton.jit
def attention_by_query(
    QUERY, KEY, VALUE, OUTPUT, GRADIENT, LOGSUMEXP, LEVELS, DELTA, BY_QUERY, ROWS, SLOPES, COLUMNS, GATES, MASK, FIRST,
    query_batch, query_head, query_token, key_batch, key_head, key_token, value_batch, value_head, value_token,
    output_batch, output_head, output_token, gradient_batch, gradient_head, gradient_token, by_query_batch,
    by_query_head, by_query_token, columns_batch, columns_head, columns_row, gates_batch, gates_head,
    mask_batch, mask_head, mask_query, mask_key,
    heads, queries, padded, keys, window, scale,
    GROUPS: tl.constexpr, HEAD: tl.constexpr, HEAD_BLOCK: tl.constexpr, VALUES: tl.constexpr,
    VALUE_BLOCK: tl.constexpr, QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, LEVEL: tl.constexpr, TERM: tl.constexpr, ABSOLUTE: tl.constexpr, GATE_QUERY: tl.constexpr,
    GATE_KEY: tl.constexpr, MASKED: tl.constexpr, PRUNED: tl.constexpr, PRECISION: tl.constexpr,
    WANTS_APART: tl.constexpr, WANTS_SPREAD: tl.constexpr, WANTS_CLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of QUERY_BLOCK queries of one head, `LEVELS` and `DELTA` [B, H, padded] of them, and sums over keys.

    The stages are those of the forward kernel. `ROWS` [B, H, 3, T_q] takes the sums over keys of a logit's gradient times
    the difference of the level, times the spread of the term, and times the derivative of the term by its difference.
    """
    tiles = tl.cdiv(queries, QUERY_BLOCK)
    tile = tiles - 1 - tl.program_id(0) % tiles
    number = tl.program_id(0) // tiles
    head = number % heads
    batch = (number // heads).to(tl.int64)
    wide_head = head.to(tl.int64)
    key_number = (head // GROUPS).to(tl.int64)
    begin = tile * QUERY_BLOCK
    wide_begin = begin.to(tl.int64)
    row = tl.arange(0, QUERY_BLOCK)
    column = tl.arange(0, KEY_BLOCK)
    inner = tl.arange(0, HEAD_BLOCK)
    outer = tl.arange(0, VALUE_BLOCK)
    there_row = begin + row < queries
    known = there_row[:, None]
    first_at = begin + keys - queries
    at = first_at + row
    inner_known = (inner < HEAD if HEAD < HEAD_BLOCK else inner >= 0)[None, :]
    outer_known = (outer < VALUES if VALUES < VALUE_BLOCK else outer >= 0)[None, :]
    query_start = QUERY + batch * query_batch + wide_head * query_head + wide_begin * query_token
    query = tl.load(
        query_start + row[:, None] * query_token + inner[None, :], mask=known & inner_known, other=0.0
    )
    value_known = known & outer_known
    gradient_start = GRADIENT + batch * gradient_batch + wide_head * gradient_head + wide_begin * gradient_token
    gradient = tl.load(
        gradient_start + row[:, None] * gradient_token + outer[None, :], mask=value_known, other=0.0
    )
    output_start = OUTPUT + batch * output_batch + wide_head * output_head + wide_begin * output_token
    output = tl.load(output_start + row[:, None] * output_token + outer[None, :], mask=value_known, other=0.0)
    delta = tl.sum(output.to(tl.float32) * gradient.to(tl.float32), 1)
    level = tl.load(LOGSUMEXP + number.to(tl.int64) * queries + begin + row, mask=there_row, other=-float("inf"))
    # A row without a key, or no row: weights exp(logit - inf) are zero.
    level = tl.where(level == -float("inf"), float("inf"), level) * LOG2E
    numbers = number.to(tl.int64) * padded + begin + row
    tl.store(LEVELS + numbers, level)
    tl.store(DELTA + numbers, delta)

    key_start = KEY + batch * key_batch + key_number * key_head
    value_start = VALUE + batch * value_batch + key_number * value_head
    columns = COLUMNS + batch * columns_batch + wide_head * columns_head
    mask_start = MASK + batch * mask_batch + wide_head * mask_head + wide_begin * mask_query
    term_columns = columns + (CLOCK_SIZE * columns_row if LEVEL == CLOCK else 0)
    gate_columns = term_columns + (CLOCK_SIZE * columns_row if TERM == CLOCK else 0)
    level_slope = 0.0
    term_slope = 0.0
    if LEVEL != NONE:
        level_slope = tl.load(SLOPES + number * 2) * LOG2E
    if TERM != NONE:
        term_slope = tl.load(SLOPES + number * 2 + 1) * LOG2E
    level_high, level_low = query_clock(columns, at, keys, columns_row, LEVEL)
    term_high, term_low = query_clock(term_columns, at, keys, columns_row, TERM)
    gate_query = 0.0
    if GATE_QUERY:
        gates = GATES + batch * gates_batch + wide_head * gates_head + begin
        gate_query = (tl.load(gates + row, mask=there_row, other=0.0) * term_slope)[:, None]

    stop = keys
    free_stop = keys // KEY_BLOCK * KEY_BLOCK
    if CAUSAL:
        stop = tl.minimum(keys, tl.maximum(first_at + QUERY_BLOCK, 0))
    if CAUSAL or LEVEL != NONE or TERM != NONE:
        free_stop = tl.minimum(tl.maximum(first_at, 0) // KEY_BLOCK * KEY_BLOCK, free_stop)
    start = 0
    if WINDOW:
        start = tl.maximum(first_at - window + 1, 0) // KEY_BLOCK * KEY_BLOCK
    if PRUNED:
        start = tl.maximum(start, tl.load(FIRST + number * tiles + tile) * KEY_BLOCK)
    free_start = start
    if WINDOW:
        inside = tl.cdiv(tl.maximum(first_at + QUERY_BLOCK - window, 0), KEY_BLOCK) * KEY_BLOCK
        free_start = tl.maximum(inside, start)
    free_stop = tl.maximum(free_stop, free_start)

    by_query = tl.zeros([QUERY_BLOCK, HEAD_BLOCK], tl.float32)
    by_apart = tl.zeros([QUERY_BLOCK], tl.float32)
    by_spread = tl.zeros([QUERY_BLOCK], tl.float32)
    by_clock = tl.zeros([QUERY_BLOCK], tl.float32)
    for first in tl.range(start, stop, KEY_BLOCK):
        first = tl.multiple_of(first, KEY_BLOCK)
        there = first + column < keys
        key_cells = key_start + first.to(tl.int64) * key_token + column[:, None] * key_token + inner[None, :]
        value_cells = (
            value_start + first.to(tl.int64) * value_token + column[:, None] * value_token + outer[None, :]
        )
        key = tl.load(key_cells, mask=there[:, None] & inner_known, other=0.0)
        value = tl.load(value_cells, mask=there[:, None] & outer_known, other=0.0)
        products = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        level_key = key_distance(columns, first, keys, columns_row, LEVEL, KEY_BLOCK) if LEVEL != NONE else column
        term_key = key_distance(term_columns, first, keys, columns_row, TERM, KEY_BLOCK) if TERM != NONE else column
        level_query = (
            query_distance(columns, level_high, level_low, at, first, keys, columns_row, LEVEL, KEY_BLOCK)
            if LEVEL != NONE else row
        )  # fmt: skip
        term_query = (
            query_distance(term_columns, term_high, term_low, at, first, keys, columns_row, TERM, KEY_BLOCK)
            if TERM != NONE else row
        )  # fmt: skip
        gate_key = 0.0
        if GATE_KEY:
            gate_key = (tl.load(gate_columns + first + column, mask=there, other=0.0) * term_slope)[None, :]
        if (first >= free_start) & (first + KEY_BLOCK <= free_stop):
            logits, base = biased(
                products, scale * LOG2E, level_slope, level_key[None, :], level_query[:, None], term_slope,
                term_key[None, :], term_query[:, None], gate_query, gate_key,
                LEVEL, TERM, ABSOLUTE, GATE_QUERY, GATE_KEY, True,
            )  # fmt: skip
            logits -= level[:, None] - base
        else:
            logits, base = biased(
                products, scale * LOG2E, level_slope, level_key[None, :], level_query[:, None], term_slope,
                term_key[None, :], term_query[:, None], gate_query, gate_key,
                LEVEL, TERM, ABSOLUTE, GATE_QUERY, GATE_KEY, False,
            )  # fmt: skip
            seen = visible(at[:, None], (first + column)[None, :], keys, window, CAUSAL, WINDOW)
            logits = tl.where(seen, logits - level[:, None], -float("inf"))
        if MASKED != NONE:
            offsets = row[:, None] * mask_query + (first + column)[None, :] * mask_key
            logits = masked(logits, mask_start, offsets, known & there[None, :], MASKED)
        weights = tl.exp2(logits)
        changes = tl.dot(gradient, tl.trans(value), input_precision=PRECISION)
        changes = weights * (changes - delta[:, None])
        by_query = tl.dot(changes.to(key.dtype), key, by_query, input_precision=PRECISION)
        if WANTS_APART:
            by_apart += tl.sum(changes * (level_key[None, :] + level_query[:, None]), 1)
        if WANTS_SPREAD:
            by_spread += tl.sum(changes * spread(term_key[None, :] + term_query[:, None], ABSOLUTE), 1)
        if WANTS_CLOCK:
            steep = steepness(term_slope, gate_query, gate_key, GATE_QUERY, GATE_KEY)
            steep = steep * slope_of_spread(term_key[None, :] + term_query[:, None], ABSOLUTE)
            by_clock += tl.sum(changes * steep, 1)
    by_query_start = BY_QUERY + batch * by_query_batch + wide_head * by_query_head + wide_begin * by_query_token
    tl.store(
        by_query_start + row[:, None] * by_query_token + inner[None, :],
        (by_query * scale).to(BY_QUERY.dtype.element_ty),
        mask=known & inner_known,
    )
    rows = ROWS + number.to(tl.int64) * 3 * queries + begin + row
    if WANTS_APART:
        tl.store(rows, by_apart, mask=there_row)
    if WANTS_SPREAD:
        tl.store(rows + queries, by_spread, mask=there_row)
    if WANTS_CLOCK:
        tl.store(rows + 2 * queries, by_clock * LN2, mask=there_row)


@triton.jit
def attention_by_key(
    QUERY, KEY, VALUE, GRADIENT, LEVELS, DELTA, BY_KEY, BY_VALUE, SUMS, SLOPES, COLUMNS, GATES, MASK, LAST,
    query_batch, query_head, query_token, key_batch, key_head, key_token, value_batch, value_head, value_token,
    gradient_batch, gradient_head, gradient_token, by_key_batch, by_key_head, by_key_token, by_value_batch,
    by_value_head, by_value_token, columns_batch, columns_head, columns_row, gates_batch, gates_head,
    mask_batch, mask_head, mask_query, mask_key,
    key_heads, queries, padded, keys, window, scale,
    GROUPS: tl.constexpr, HEAD: tl.constexpr, HEAD_BLOCK: tl.constexpr, VALUES: tl.constexpr,
    VALUE_BLOCK: tl.constexpr, QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, LEVEL: tl.constexpr, TERM: tl.constexpr, ABSOLUTE: tl.constexpr, GATE_QUERY: tl.constexpr,
    GATE_KEY: tl.constexpr, MASKED: tl.constexpr, PRUNED: tl.constexpr, PRECISION: tl.constexpr,
    WANTS_SUM: tl.constexpr, WANTS_SPREAD: tl.constexpr, WANTS_CLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of KEY_BLOCK keys and values of one head, and sums over the queries of each of its query heads.

    Tiles are transposed, keys by queries, so that weights and their gradients stay in registers between two products.
    Stages: queries for whom some keys lie ahead; those behind whom all keys lie; with a window, those it cuts off.
    `SUMS` [B, H, 3, T_k] takes the sums over queries of a logit's gradient, of it times the spread of the term, and times
    the derivative of the term by its difference.
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
        value_start + column[:, None] * value_token + outer[None, :], mask=there[:, None] & outer_known, other=0.0
    )
    offset = keys - queries
    start = 0
    free_start = 0
    if CAUSAL:
        start = tl.maximum(first - offset, 0) // QUERY_BLOCK * QUERY_BLOCK
    if CAUSAL or LEVEL != NONE or TERM != NONE:
        free_start = tl.cdiv(tl.maximum(first + KEY_BLOCK - offset, 0), QUERY_BLOCK) * QUERY_BLOCK
    stop = queries
    if WINDOW:
        stop = tl.minimum(stop, tl.maximum(first + KEY_BLOCK - 1 + window - offset, 0))

    by_key = tl.zeros([KEY_BLOCK, HEAD_BLOCK], tl.float32)
    by_value = tl.zeros([KEY_BLOCK, VALUE_BLOCK], tl.float32)
    for member in tl.range(0, GROUPS):
        head = key_number * GROUPS + member
        number = batch * key_heads * GROUPS + head
        query_start = QUERY + batch * query_batch + head * query_head
        gradient_start = GRADIENT + batch * gradient_batch + head * gradient_head
        columns = COLUMNS + batch * columns_batch + head * columns_head
        mask_start = MASK + batch * mask_batch + head * mask_head
        gates = GATES + batch * gates_batch + head * gates_head
        term_columns = columns + (CLOCK_SIZE * columns_row if LEVEL == CLOCK else 0)
        gate_columns = term_columns + (CLOCK_SIZE * columns_row if TERM == CLOCK else 0)
        level_slope = 0.0
        term_slope = 0.0
        if LEVEL != NONE:
            level_slope = tl.load(SLOPES + number * 2) * LOG2E
        if TERM != NONE:
            term_slope = tl.load(SLOPES + number * 2 + 1) * LOG2E
        level_key = key_distance(columns, first, keys, columns_row, LEVEL, KEY_BLOCK) if LEVEL != NONE else column
        term_key = key_distance(term_columns, first, keys, columns_row, TERM, KEY_BLOCK) if TERM != NONE else column
        gate_key = 0.0
        if GATE_KEY:
            gate_key = (tl.load(gate_columns + first + column, mask=there, other=0.0) * term_slope)[:, None]
        head_stop = stop
        if PRUNED:
            last = tl.load(LAST + number * tiles + tile)
            head_stop = tl.minimum(stop, last * QUERY_BLOCK)
        free_stop = head_stop
        if WINDOW:
            inside = tl.maximum(first + window - offset, 0) // QUERY_BLOCK * QUERY_BLOCK
            free_stop = tl.maximum(tl.minimum(inside, head_stop), free_start)
        sums = tl.zeros([KEY_BLOCK], tl.float32)
        by_spread = tl.zeros([KEY_BLOCK], tl.float32)
        by_clock = tl.zeros([KEY_BLOCK], tl.float32)
        for begin in tl.range(start, head_stop, QUERY_BLOCK):
            begin = tl.multiple_of(begin, QUERY_BLOCK)
            wide_begin = begin.to(tl.int64)
            known = begin + row < queries
            at = begin + offset + row
            query = tl.load(
                query_start + wide_begin * query_token + row[:, None] * query_token + inner[None, :],
                mask=known[:, None] & inner_known,
                other=0.0,
            )
            gradient = tl.load(
                gradient_start + wide_begin * gradient_token + row[:, None] * gradient_token + outer[None, :],
                mask=known[:, None] & outer_known,
                other=0.0,
            )
            level = tl.load(LEVELS + number * padded + begin + row)
            products = tl.dot(key, tl.trans(query), input_precision=PRECISION)
            level_query = row
            if LEVEL != NONE:
                level_high, level_low = query_clock(columns, at, keys, columns_row, LEVEL)
                level_query = query_distance(
                    columns, level_high, level_low, at, first, keys, columns_row, LEVEL, KEY_BLOCK
                )
            term_query = row
            if TERM != NONE:
                term_high, term_low = query_clock(term_columns, at, keys, columns_row, TERM)
                term_query = query_distance(
                    term_columns, term_high, term_low, at, first, keys, columns_row, TERM, KEY_BLOCK
                )
            gate_query = 0.0
            if GATE_QUERY:
                gate_query = (tl.load(gates + begin + row, mask=known, other=0.0) * term_slope)[None, :]
            if (begin >= free_start) & (begin + QUERY_BLOCK <= free_stop):
                logits, base = biased(
                    products, scale * LOG2E, level_slope, level_key[:, None], level_query[None, :], term_slope,
                    term_key[:, None], term_query[None, :], gate_query, gate_key,
                    LEVEL, TERM, ABSOLUTE, GATE_QUERY, GATE_KEY, True,
                )  # fmt: skip
                logits -= level[None, :] - base
            else:
                logits, base = biased(
                    products, scale * LOG2E, level_slope, level_key[:, None], level_query[None, :], term_slope,
                    term_key[:, None], term_query[None, :], gate_query, gate_key,
                    LEVEL, TERM, ABSOLUTE, GATE_QUERY, GATE_KEY, False,
                )  # fmt: skip
                seen = visible(at[None, :], (first + column)[:, None], keys, window, CAUSAL, WINDOW)
                logits = tl.where(seen, logits - level[None, :], -float("inf"))
            if MASKED != NONE:
                offsets = (wide_begin + row)[None, :] * mask_query + (first + column)[:, None] * mask_key
                logits = masked(logits, mask_start, offsets, known[None, :] & there[:, None], MASKED)
            weights = tl.exp2(logits)
            by_value = tl.dot(weights.to(gradient.dtype), gradient, by_value, input_precision=PRECISION)
            delta = tl.load(DELTA + number * padded + begin + row)
            changes = tl.zeros([KEY_BLOCK, QUERY_BLOCK], tl.float32) - delta[None, :]
            changes = weights * tl.dot(value, tl.trans(gradient), changes, input_precision=PRECISION)
            by_key = tl.dot(changes.to(query.dtype), query, by_key, input_precision=PRECISION)
            if WANTS_SUM:
                sums += tl.sum(changes, 1)
            if WANTS_SPREAD:
                by_spread += tl.sum(changes * spread(term_key[:, None] + term_query[None, :], ABSOLUTE), 1)
            if WANTS_CLOCK:
                steep = steepness(term_slope, gate_query, gate_key, GATE_QUERY, GATE_KEY)
                steep = steep * slope_of_spread(term_key[:, None] + term_query[None, :], ABSOLUTE)
                by_clock += tl.sum(changes * steep, 1)
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
    by_value_start = BY_VALUE + batch * by_value_batch + key_number * by_value_head + wide_first * by_value_token
    tl.store(
        by_value_start + column[:, None] * by_value_token + outer[None, :],
        by_value.to(BY_VALUE.dtype.element_ty),
        mask=there[:, None] & outer_known,
    )
