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
    apart,
    clock_at,
    key_distance,
    key_range,
    masked,
    near_logits,
    part_of_keys,
    part_of_queries,
    past_logits,
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
    """Output and logsumexp of QUERY_BLOCK queries of one head; the longest walks start first."""
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
    # Queries are the last of the keys.
    first_at = begin + keys - queries
    at = first_at + row
    query_start = QUERY + batch * query_batch + head * query_head + wide_begin * query_token
    query = tl.load(
        query_start + row[:, None] * query_token + inner[None, :],
        mask=there_row[:, None] & inner_known,
        other=0.0,
    )
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
    start, stop, past_start, past_stop = key_range(
        first_at, keys, window, CAUSAL, WINDOW, LEVEL, TERM, ABSOLUTE, QUERY_BLOCK, KEY_BLOCK
    )
    if PRUNED:
        start = tl.maximum(start, tl.load(FIRST + number * tiles + tile) * KEY_BLOCK)

    bare = LEVEL == NONE and TERM == NONE and MASKED == NONE
    factor = 1.0 if bare else scale * LOG2E
    best = tl.full([QUERY_BLOCK], LOWEST, tl.float32)
    total = tl.zeros([QUERY_BLOCK], tl.float32)
    sums = tl.zeros([QUERY_BLOCK, VALUE_BLOCK], tl.float32)
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
                products, factor, by_key[None, :], term_key[None, :], term_query[:, None],
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
        else:
            level_key = key_distance(columns, first, columns_row, LEVEL, KEY_BLOCK)
            term_key = key_distance(term_columns, first, columns_row, TERM, KEY_BLOCK)
            logits = near_logits(
                products, factor, level_slope, level_key[None, :], level_query[:, None], term_slope, term_key[None, :],
                term_query[:, None], gate_query[:, None] if GATE_QUERY else 0.0, gate_key,
                LEVEL, TERM, ABSOLUTE, GATE_QUERY, GATE_KEY,
            )  # fmt: skip
            seen = visible(at[:, None], (first + column)[None, :], keys, window, CAUSAL, WINDOW)
            logits = tl.where(seen, logits, -float("inf"))
            base = level_query * 0.0
        if MASKED != NONE:
            offsets = row[:, None] * mask_query + (first + column)[None, :] * mask_key
            logits = masked(logits, mask_start, offsets, there_row[:, None] & there[None, :], MASKED)
        if bare:
            # The scale is positive: one multiply-add an element instead of a product and a difference.
            larger = tl.maximum(best, tl.max(logits, 1) * (scale * LOG2E))
            weights = tl.exp2(logits * (scale * LOG2E) - larger[:, None])
        else:
            larger = tl.maximum(best, tl.max(logits, 1) + base)
            weights = tl.exp2(logits - (larger - base)[:, None])
        shrink = tl.exp2(best - larger)
        total = total * shrink + tl.sum(weights, 1)
        sums = sums * shrink[:, None]
        value = tl.load(
            value_tile + column[:, None] * value_token + outer[None, :],
            mask=there[:, None] & outer_known,
            other=0.0,
        )
        sums = tl.dot(weights.to(value.dtype), value, sums, input_precision=PRECISION)
        best = larger
    # A row without a key: zero, and no logsumexp.
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    output = OUTPUT + batch * output_batch + head * output_head + wide_begin * output_token
    tl.store(
        output + row[:, None] * output_token + outer[None, :],
        (sums / total[:, None]).to(OUTPUT.dtype.element_ty),
        mask=there_row[:, None] & outer_known,
    )
    levels = tl.where(empty, -float("inf"), (best + tl.log2(total)) * LN2)
    tl.store(LOGSUMEXP + number.to(tl.int64) * queries + begin + row, levels, mask=there_row)
