"""Attention with additive biases, forward: a tile of queries walks over its keys with a running softmax."""

import triton
import triton.language as tl

from grape_compile.kernels.bodies.attention_tiles import (
    CLOCK,
    CLOCK_SIZE,
    LN2,
    LOG2E,
    LOWEST,
    NONE,
    biased,
    key_distance,
    masked,
    query_clock,
    query_distance,
    visible,
)


@triton.jit
def attention_forward(
    QUERY, KEY, VALUE, OUTPUT, LOGSUMEXP, SLOPES, COLUMNS, GATES, MASK, FIRST,
    query_batch, query_head, query_token, key_batch, key_head, key_token, value_batch, value_head, value_token,
    output_batch, output_head, output_token, columns_batch, columns_head, columns_row, gates_batch, gates_head,
    mask_batch, mask_head, mask_query, mask_key,
    heads, queries, keys, window, scale,
    GROUPS: tl.constexpr, HEAD: tl.constexpr, HEAD_BLOCK: tl.constexpr, VALUES: tl.constexpr,
    VALUE_BLOCK: tl.constexpr, QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, LEVEL: tl.constexpr, TERM: tl.constexpr, ABSOLUTE: tl.constexpr, GATE_QUERY: tl.constexpr,
    GATE_KEY: tl.constexpr, MASKED: tl.constexpr, PRUNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and logsumexp of QUERY_BLOCK queries of one head; the longest walks start first.

    The keys come in three stages: those a window may cut, those in the past that every query sees, the rest.
    """
    tiles = tl.cdiv(queries, QUERY_BLOCK)
    tile = tiles - 1 - tl.program_id(0) % tiles
    number = tl.program_id(0) // tiles
    head = number % heads
    batch = (number // heads).to(tl.int64)
    wide_head = head.to(tl.int64)
    key_number = (head // GROUPS).to(tl.int64)
    begin = tile * QUERY_BLOCK
    row = tl.arange(0, QUERY_BLOCK)
    column = tl.arange(0, KEY_BLOCK)
    inner = tl.arange(0, HEAD_BLOCK)
    outer = tl.arange(0, VALUE_BLOCK)
    known = (begin + row < queries)[:, None]
    # Queries are the last of the keys.
    first_at = begin + keys - queries
    at = first_at + row
    inner_known = (inner < HEAD if HEAD < HEAD_BLOCK else inner >= 0)[None, :]
    outer_known = (outer < VALUES if VALUES < VALUE_BLOCK else outer >= 0)[None, :]
    query_start = QUERY + batch * query_batch + wide_head * query_head + begin.to(tl.int64) * query_token
    query = tl.load(
        query_start + row[:, None] * query_token + inner[None, :], mask=known & inner_known, other=0.0
    )
    key_start = KEY + batch * key_batch + key_number * key_head
    value_start = VALUE + batch * value_batch + key_number * value_head
    columns = COLUMNS + batch * columns_batch + wide_head * columns_head
    mask_start = MASK + batch * mask_batch + wide_head * mask_head + begin.to(tl.int64) * mask_query

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
        gate_query = (tl.load(gates + row, mask=begin + row < queries, other=0.0) * term_slope)[:, None]

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

    factor = 1.0 if LEVEL == NONE and TERM == NONE and MASKED == NONE else scale * LOG2E
    best = tl.full([QUERY_BLOCK], LOWEST, tl.float32)
    total = tl.zeros([QUERY_BLOCK], tl.float32)
    sums = tl.zeros([QUERY_BLOCK, VALUE_BLOCK], tl.float32)
    for first in tl.range(start, stop, KEY_BLOCK):
        first = tl.multiple_of(first, KEY_BLOCK)
        there = first + column < keys
        key_tile = key_start + first.to(tl.int64) * key_token
        key_cells = key_tile + column[:, None] * key_token + inner[None, :]
        key = tl.load(key_cells, mask=there[:, None] & inner_known, other=0.0)
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
                products, factor, level_slope, level_key[None, :], level_query[:, None], term_slope,
                term_key[None, :], term_query[:, None], gate_query, gate_key,
                LEVEL, TERM, ABSOLUTE, GATE_QUERY, GATE_KEY, True,
            )  # fmt: skip
        else:
            logits, base = biased(
                products, factor, level_slope, level_key[None, :], level_query[:, None], term_slope,
                term_key[None, :], term_query[:, None], gate_query, gate_key,
                LEVEL, TERM, ABSOLUTE, GATE_QUERY, GATE_KEY, False,
            )  # fmt: skip
            seen = visible(at[:, None], (first + column)[None, :], keys, window, CAUSAL, WINDOW)
            logits = tl.where(seen, logits, -float("inf"))
        if MASKED != NONE:
            offsets = row[:, None] * mask_query + (first + column)[None, :] * mask_key
            logits = masked(logits, mask_start, offsets, known & there[None, :], MASKED)
        if LEVEL == NONE and TERM == NONE and MASKED == NONE:
            # The scale is positive: one multiply-add an element instead of a product and a difference.
            larger = tl.maximum(best, tl.max(logits, 1) * (scale * LOG2E))
            weights = tl.exp2(logits * (scale * LOG2E) - larger[:, None])
        else:
            base = tl.reshape(base, [QUERY_BLOCK])
            larger = tl.maximum(best, tl.max(logits, 1) + base)
            weights = tl.exp2(logits - (larger - base)[:, None])
        shrink = tl.exp2(best - larger)
        total = total * shrink + tl.sum(weights, 1)
        sums = sums * shrink[:, None]
        value_tile = value_start + first.to(tl.int64) * value_token
        value_cells = value_tile + column[:, None] * value_token + outer[None, :]
        value = tl.load(value_cells, mask=there[:, None] & outer_known, other=0.0)
        sums = tl.dot(weights.to(value.dtype), value, sums, input_precision=PRECISION)
        best = larger
    # A row without a key: zero, and no logsumexp.
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    sums = sums / total[:, None]
    output = OUTPUT + batch * output_batch + wide_head * output_head + begin.to(tl.int64) * output_token
    tl.store(
        output + row[:, None] * output_token + outer[None, :],
        sums.to(OUTPUT.dtype.element_ty),
        mask=known & outer_known,
    )
    levels = tl.where(empty, -float("inf"), (best + tl.log2(total)) * LN2)
    tl.store(LOGSUMEXP + number.to(tl.int64) * queries + begin + row, levels, mask=begin + row < queries)
