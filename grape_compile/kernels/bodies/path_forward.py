"""Attention with a path bias, forward: a running sum of edges and a running softmax, from the diagonal backwards."""

import triton
import triton.language as tl

from grape_compile.kernels.bodies.attention_operands import LN2, LOG2E, NONE, NUMBERS, turned_tile
from grape_compile.kernels.bodies.attention_tiles import LOWEST, masked
from grape_compile.kernels.bodies.path_tiles import (
    any_gains,
    as_runs,
    edges_of,
    hidden,
    keys_of_columns,
    of_runs,
    rows_of,
    sums_apart,
)


@triton.jit
def path_forward(
    QUERY, KEY, VALUE, OUTPUT, LOGSUMEXP, EDGE_QUERY, EDGE_KEY, SIZES, SLOPES, MASK, NORMS, COS, SIN,
    query_batch, query_head, query_token, key_batch, key_head, key_token, value_batch, value_head, value_token,
    output_batch, output_head, output_token, edge_query_batch, edge_query_head, edge_query_token,
    edge_key_batch, edge_key_head, edge_key_token, mask_batch, mask_head, mask_query, mask_key,
    heads, queries, keys, window, scale, rounded_away, turn_batch, turn_head, turn_token,
    GROUPS: tl.constexpr, HEAD: tl.constexpr, HEAD_BLOCK: tl.constexpr, VALUES: tl.constexpr,
    VALUE_BLOCK: tl.constexpr, EDGE_BLOCK: tl.constexpr, QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr, LANES: tl.constexpr, SPLIT: tl.constexpr, CHUNK: tl.constexpr, LINK: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, MASKED: tl.constexpr, LEAVES: tl.constexpr, TURNED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and logsumexp of QUERY_BLOCK queries of one head; the longest walks start first.

    With LEAVES a walk ends where no row gains from the keys that are left, which is looked at every CHUNK tiles.
    TURNED: queries turn on their way in, and are rounded to their dtype as they would be in memory.
    """
    tiles = tl.cdiv(queries, QUERY_BLOCK)
    tile = tiles - 1 - tl.program_id(0) % tiles
    number = tl.program_id(0) // tiles
    batch = (number // heads).to(tl.int64)
    head = (number % heads).to(tl.int64)
    begin = tile * QUERY_BLOCK
    wide_begin = begin.to(tl.int64)
    row = tl.arange(0, QUERY_BLOCK)
    inner = tl.arange(0, HEAD_BLOCK)
    outer = tl.arange(0, VALUE_BLOCK)
    edge = tl.arange(0, EDGE_BLOCK)
    there_row = begin + row < queries
    # Queries are the last of the keys.
    first_at = begin + keys - queries
    at = first_at + row
    query_start = QUERY + batch * query_batch + head * query_head
    if TURNED == NONE:
        query = rows_of(query_start, query_token, begin, row, queries, inner, HEAD, True)
    else:
        turns = batch * turn_batch + head * turn_head
        query = turned_tile(
            query_start, query_token, COS + turns, SIN + turns, turn_token, begin, row, there_row, TURNED, HEAD
        )  # fmt: skip
    edge_start = EDGE_QUERY + batch * edge_query_batch + head * edge_query_head
    edge_query = rows_of(edge_start, edge_query_token, begin, row, queries, edge, EDGE_BLOCK, True)
    key_start = KEY + batch * key_batch + head // GROUPS * key_head
    value_start = VALUE + batch * value_batch + head // GROUPS * value_head
    edge_start = EDGE_KEY + batch * edge_key_batch + head * edge_key_head
    mask_start = MASK + batch * mask_batch + head * mask_head + wide_begin * mask_query
    slope = tl.load(SLOPES + number)
    size = None
    if SIZES is not None:
        size = tl.load(SIZES + number) * LOG2E
    norms = NORMS + number // GROUPS * tl.cdiv(keys, KEY_BLOCK)
    length = tl.sqrt(tl.sum(query.to(tl.float32) * query.to(tl.float32), 1)) * (scale * LOG2E)

    places = keys_of_columns(KEY_BLOCK, LANES, SPLIT)
    stop = tl.cdiv(keys, KEY_BLOCK)
    if CAUSAL:
        stop = tl.minimum(stop, tl.cdiv(first_at + QUERY_BLOCK, KEY_BLOCK))
    start = 0
    if WINDOW:
        start = tl.maximum(first_at - window + 1, 0) // KEY_BLOCK
    # Tiles from here on have keys that lie ahead of some row.
    near = tl.maximum(tl.minimum((first_at + 1) // KEY_BLOCK, stop), start)
    best = tl.full([QUERY_BLOCK], LOWEST, tl.float32)
    total = tl.zeros([QUERY_BLOCK], tl.float32)
    carry = tl.zeros([QUERY_BLOCK], tl.float32)
    sums = tl.zeros([QUERY_BLOCK, VALUE_BLOCK], tl.float32)
    for index in tl.range(0, stop - near):
        first = tl.multiple_of((stop - 1 - index) * KEY_BLOCK, KEY_BLOCK)
        best, total, carry, sums = step(
            best, total, carry, sums, query, edge_query, key_start, value_start, edge_start, mask_start, first, places,
            at, row, there_row, inner, outer, edge, key_token, value_token, edge_key_token, mask_query, mask_key, keys,
            window, scale, slope, size, HEAD, VALUES, EDGE_BLOCK, QUERY_BLOCK, KEY_BLOCK, LANES, SPLIT, LINK, True,
            CAUSAL, WINDOW,
            MASKED, PRECISION,
        )  # fmt: skip
    left = near - start
    goes_on = left > 0
    while goes_on:
        count = left
        if LEAVES:
            count = tl.minimum(left, CHUNK)
        for index in tl.range(0, count):
            first = tl.multiple_of((start + left - 1 - index) * KEY_BLOCK, KEY_BLOCK)
            best, total, carry, sums = step(
                best, total, carry, sums, query, edge_query, key_start, value_start, edge_start, mask_start, first,
                places, at, row, there_row, inner, outer, edge, key_token, value_token, edge_key_token, mask_query,
                mask_key, keys, window, scale, slope, size, HEAD, VALUES, EDGE_BLOCK, QUERY_BLOCK, KEY_BLOCK, LANES,
                SPLIT, LINK,
                False, CAUSAL, WINDOW, MASKED, PRECISION,
            )  # fmt: skip
        left -= count
        goes_on = left > 0
        if LEAVES:
            level = tl.where(there_row, best, float("inf"))
            goes_on = goes_on & any_gains(
                length, norms, start + left, slope, carry, level, rounded_away, KEY_BLOCK
            )
    # A row without a key: zero, and no logsumexp.
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    output = OUTPUT + batch * output_batch + head * output_head + wide_begin * output_token
    tl.store(
        output + row[:, None] * output_token + outer[None, :],
        (sums / total[:, None]).to(OUTPUT.dtype.element_ty),
        mask=there_row[:, None] & (outer < VALUES if VALUES < VALUE_BLOCK else outer >= 0)[None, :],
    )
    levels = tl.where(empty, -float("inf"), (best + tl.log2(total)) * LN2)
    tl.store(LOGSUMEXP + number.to(tl.int64) * queries + begin + row, levels, mask=there_row)


@triton.jit
def step(
    best, total, carry, sums, query, edge_query, KEY, VALUE, EDGE_KEY, MASK, first, places, at, row, there_row, inner,
    outer, edge, key_token, value_token, edge_key_token, mask_query, mask_key, keys, window, scale, slope, size,
    HEAD: tl.constexpr, VALUES: tl.constexpr, EDGE_BLOCK: tl.constexpr, QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    LANES: tl.constexpr, SPLIT: tl.constexpr, LINK: tl.constexpr, NEAR: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add a tile of keys to the largest logits, the weights, the sums of edges and the weighted values of all rows."""
    key = rows_of(KEY, key_token, first, places, keys, inner, HEAD, NEAR)
    edge_key = rows_of(EDGE_KEY, edge_key_token, first, places, keys, edge, EDGE_BLOCK, NEAR)
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    product = tl.dot(edge_query, tl.trans(edge_key), input_precision=PRECISION)
    if size is not None:
        product = product * size
    edges = edges_of(product, at, first + places, LINK, NEAR)
    sums_of_run, ahead, carry = sums_apart(edges, carry, QUERY_BLOCK, KEY_BLOCK, LANES, SPLIT)
    # The scale is positive: it meets the logits when they become weights, in one multiply-add.
    scaled = scale * LOG2E
    if MASKED == NUMBERS:
        scores = scores * scaled
        scaled = 1.0
    scores = hidden(scores, at, first + places, keys, window, NEAR, CAUSAL, WINDOW)
    if MASKED != NONE:
        offsets = row[:, None] * mask_query + (first + places)[None, :] * mask_key
        scores = masked(scores, MASK, offsets, there_row[:, None] & (first + places < keys)[None, :], MASKED)
    logits = as_runs(scores, QUERY_BLOCK, KEY_BLOCK, LANES, SPLIT) + sums_of_run * (slope / scaled)
    # What stands behind a whole run is a number for each row and run, which meets the largest logit.
    behind = ahead * slope
    larger = tl.maximum(best, tl.max(tl.max(logits, 2) * scaled + behind, 1))
    weights = tl.exp2(logits * scaled - (larger[:, None] - behind)[:, :, None])
    weights = of_runs(weights, QUERY_BLOCK, KEY_BLOCK, LANES, SPLIT)
    shrink = tl.exp2(best - larger)
    total = total * shrink + tl.sum(weights, 1)
    value = rows_of(VALUE, value_token, first, places, keys, outer, VALUES, NEAR)
    sums = tl.dot(weights.to(value.dtype), value, sums * shrink[:, None], input_precision=PRECISION)
    return larger, total, carry, sums
