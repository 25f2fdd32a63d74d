"""Attention backward, first kernel: all sums over keys, with the weights computed again from the logsumexp."""

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
    key_range,
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
def attention_by_query(
    QUERY, KEY, VALUE, OUTPUT, GRADIENT, LOGSUMEXP, LEVELS, BY_QUERY, ROWS, SLOPES, COLUMNS, GATES, MASK, FIRST,
    query_batch, query_head, query_token, key_batch, key_head, key_token, value_batch, value_head, value_token,
    output_batch, output_head, output_token, gradient_batch, gradient_head, gradient_token, by_query_batch,
    by_query_head, by_query_token, columns_batch, columns_head, columns_row, gates_batch, gates_head,
    mask_batch, mask_head, mask_query, mask_key,
    heads, queries, levels_row, keys, window, scale,
    GROUPS: tl.constexpr, HEAD: tl.constexpr, HEAD_BLOCK: tl.constexpr, VALUES: tl.constexpr,
    VALUE_BLOCK: tl.constexpr, QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, LEVEL_BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, LEVEL: tl.constexpr, TERM: tl.constexpr, ABSOLUTE: tl.constexpr,
    GATE_QUERY: tl.constexpr, GATE_KEY: tl.constexpr, MASKED: tl.constexpr, PRUNED: tl.constexpr,
    PRECISION: tl.constexpr, WANTS_DELTA: tl.constexpr, WANTS_APART: tl.constexpr, WANTS_SPREAD: tl.constexpr,
    WANTS_CLOCK: tl.constexpr,
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
    tile = tiles - 1 - tl.program_id(0) % tiles
    number = tl.program_id(0) // tiles
    batch = (number // heads).to(tl.int64)
    head = (number % heads).to(tl.int64)
    begin = tile * QUERY_BLOCK
    wide_begin = begin.to(tl.int64)
    row = tl.arange(0, QUERY_BLOCK)
    column = tl.arange(0, KEY_BLOCK)
    inner = tl.arange(0, HEAD_BLOCK)
    outer = tl.arange(0, VALUE_BLOCK)
    inner_known = (inner < HEAD if HEAD < HEAD_BLOCK else inner >= 0)[None, :]
    outer_known = (outer < VALUES if VALUES < VALUE_BLOCK else outer >= 0)[None, :]
    there_row = begin + row < queries
    query_known = there_row[:, None] & inner_known
    value_known = there_row[:, None] & outer_known
    first_at = begin + keys - queries
    at = first_at + row
    query_start = QUERY + batch * query_batch + head * query_head + wide_begin * query_token
    query = tl.load(query_start + row[:, None] * query_token + inner[None, :], mask=query_known, other=0.0)
    gradient_start = GRADIENT + batch * gradient_batch + head * gradient_head + wide_begin * gradient_token
    gradient = tl.load(
        gradient_start + row[:, None] * gradient_token + outer[None, :], mask=value_known, other=0.0
    )
    output_start = OUTPUT + batch * output_batch + head * output_head + wide_begin * output_token
    output = tl.load(output_start + row[:, None] * output_token + outer[None, :], mask=value_known, other=0.0)
    delta = tl.sum(output.to(tl.float32) * gradient.to(tl.float32), 1)
    wide_number = number.to(tl.int64)
    level = tl.load(LOGSUMEXP + wide_number * queries + begin + row, mask=there_row, other=-float("inf"))
    # A row without a key, or no row: weights exp(logit - inf) are zero.
    level = tl.where(level == -float("inf"), float("inf"), level) * LOG2E

    key_start = KEY + batch * key_batch + head // GROUPS * key_head
    value_start = VALUE + batch * value_batch + head // GROUPS * value_head
    mask_start = MASK + batch * mask_batch + head * mask_head + wide_begin * mask_query
    columns = COLUMNS + batch * columns_batch + head * columns_head
    term_columns = columns + (CLOCK_SIZE * columns_row if LEVEL == CLOCK else 0)
    gate_columns = term_columns + (CLOCK_SIZE * columns_row if TERM == CLOCK else 0)
    keyed = gate_columns + (columns_row if GATE_KEY else 0)
    level_slope = tl.load(SLOPES + number * 2) * LOG2E if LEVEL != NONE else 0.0
    term_slope = tl.load(SLOPES + number * 2 + 1) * LOG2E if TERM != NONE else 0.0
    level_high, level_low = clock_at(columns, at, keys, columns_row, LEVEL)
    term_high, term_low = clock_at(term_columns, at, keys, columns_row, TERM)
    gate_query = 0.0
    if GATE_QUERY:
        gates = GATES + batch * gates_batch + head * gates_head + begin
        gate_query = tl.load(gates + row, mask=there_row, other=0.0) * term_slope

    origin = (begin + row) // LEVEL_BLOCK * LEVEL_BLOCK + keys - queries
    level_query = apart(columns, origin, level_high, level_low, keys, columns_row, LEVEL)
    term_query = apart(term_columns, origin, term_high, term_low, keys, columns_row, TERM)
    base = part_of_queries(
        level_slope, level_query, term_slope, term_query, gate_query, LEVEL, TERM, GATE_QUERY, GATE_KEY
    )
    levels = LEVELS + wide_number * levels_row + begin + row
    part = (tl.num_programs(0) // tiles).to(tl.int64) * levels_row
    tl.store(levels, level)
    tl.store(levels + part, level - base)
    if LEVEL == CLOCK:
        tl.store(levels + 3 * part, level_query)

    start, stop, past_start, past_stop = key_range(
        first_at, keys, window, CAUSAL, WINDOW, LEVEL, TERM, ABSOLUTE, QUERY_BLOCK, KEY_BLOCK
    )
    if PRUNED:
        start = tl.maximum(start, tl.load(FIRST + number * tiles + tile) * KEY_BLOCK)
    by_query = tl.zeros([QUERY_BLOCK, HEAD_BLOCK], tl.float32)
    rest = tl.zeros([QUERY_BLOCK], tl.float32)
    by_apart = tl.zeros([QUERY_BLOCK], tl.float32)
    by_spread = tl.zeros([QUERY_BLOCK], tl.float32)
    by_clock = tl.zeros([QUERY_BLOCK], tl.float32)
    for first in tl.range(start, stop, KEY_BLOCK):
        first = tl.multiple_of(first, KEY_BLOCK)
        there = first + column < keys
        key_tile = key_start + first.to(tl.int64) * key_token
        value_tile = value_start + first.to(tl.int64) * value_token
        key = tl.load(
            key_tile + column[:, None] * key_token + inner[None, :],
            mask=there[:, None] & inner_known,
            other=0.0,
        )
        value = tl.load(
            value_tile + column[:, None] * value_token + outer[None, :],
            mask=there[:, None] & outer_known,
            other=0.0,
        )
        products = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        level_query = apart(columns, first + KEY_BLOCK, level_high, level_low, keys, columns_row, LEVEL)
        term_query = apart(term_columns, first + KEY_BLOCK, term_high, term_low, keys, columns_row, TERM)
        gate_key = 0.0
        if GATE_KEY:
            gate_key = tl.load(gate_columns + first + column)[None, :]
        if (first >= past_start) & (first + KEY_BLOCK <= past_stop):
            by_key = part_of_keys(
                keyed, first, level_slope, term_slope, LEVEL, TERM, GATE_QUERY, GATE_KEY, KEY_BLOCK
            )
            term_key = key_distance(term_columns, first, columns_row, TERM, KEY_BLOCK)
            logits = past_logits(
                products, scale * LOG2E, by_key[None, :], term_key[None, :], term_query[:, None],
                gate_query[:, None] if GATE_QUERY else 0.0, gate_key, LEVEL, TERM, GATE_QUERY, GATE_KEY,
            )  # fmt: skip
            base = part_of_queries(
                level_slope,
                level_query,
                term_slope,
                term_query,
                gate_query,
                LEVEL,
                TERM,
                GATE_QUERY,
                GATE_KEY,
            )
            logits -= (level - base)[:, None]
        else:
            level_key = key_distance(columns, first, columns_row, LEVEL, KEY_BLOCK)
            term_key = key_distance(term_columns, first, columns_row, TERM, KEY_BLOCK)
            logits = near_logits(
                products, scale * LOG2E, level_slope, level_key[None, :], level_query[:, None], term_slope,
                term_key[None, :], term_query[:, None], gate_query[:, None] if GATE_QUERY else 0.0, gate_key,
                LEVEL, TERM, ABSOLUTE, GATE_QUERY, GATE_KEY,
            )  # fmt: skip
            seen = visible(at[:, None], (first + column)[None, :], keys, window, CAUSAL, WINDOW)
            logits = tl.where(seen, logits - level[:, None], -float("inf"))
        if MASKED != NONE:
            offsets = row[:, None] * mask_query + (first + column)[None, :] * mask_key
            logits = masked(logits, mask_start, offsets, there_row[:, None] & there[None, :], MASKED)
        weights = tl.exp2(logits)
        changes = tl.dot(gradient, tl.trans(value), input_precision=PRECISION)
        changes = weights * (changes - delta[:, None])
        by_query = tl.dot(changes.to(key.dtype), key, by_query, input_precision=PRECISION)
        if WANTS_DELTA:
            rest += tl.sum(changes, 1)
        if WANTS_APART:
            level_key = key_distance(columns, first, columns_row, LEVEL, KEY_BLOCK)
            by_apart += tl.sum(changes * (level_key[None, :] + level_query[:, None]), 1)
        if WANTS_SPREAD or WANTS_CLOCK:
            term_key = key_distance(term_columns, first, columns_row, TERM, KEY_BLOCK)
            difference = term_key[None, :] + term_query[:, None]
            if WANTS_SPREAD:
                by_spread += tl.sum(changes * spread(difference, ABSOLUTE), 1)
            if WANTS_CLOCK:
                steep = steepness(
                    term_slope, gate_query[:, None] if GATE_QUERY else 0.0, gate_key, GATE_QUERY, GATE_KEY
                )
                by_clock += tl.sum(changes * (steep * slope_of_spread(difference, ABSOLUTE)), 1)
    # The gradients of a query's logits sum to zero; what is left over is what rounding the output did to delta.
    tl.store(levels + 2 * part, delta + rest)
    by_query_start = BY_QUERY + batch * by_query_batch + head * by_query_head + wide_begin * by_query_token
    tl.store(
        by_query_start + row[:, None] * by_query_token + inner[None, :],
        (by_query * scale).to(BY_QUERY.dtype.element_ty),
        mask=query_known,
    )
    rows = ROWS + wide_number * 3 * queries + begin + row
    if WANTS_APART:
        tl.store(rows, by_apart, mask=there_row)
    if WANTS_SPREAD:
        tl.store(rows + queries, by_spread, mask=there_row)
    if WANTS_CLOCK:
        tl.store(rows + 2 * queries, by_clock * LN2, mask=there_row)
