"""Attention with a path bias, backward: all sums over queries, by what the sums over keys have left behind.

No two programs add to the same number, so that results are the same at every run.
"""

import triton
import triton.language as tl

from grape_compile.kernels.bodies.attention_operands import LOG2E, NONE
from grape_compile.kernels.bodies.attention_tiles import masked
from grape_compile.kernels.bodies.path_tiles import (
    edge_changes,
    hidden,
    keys_of_columns,
    path_behind,
    rows_of,
    slope_of_link,
)


@triton.jit
def path_by_key(
    QUERY, KEY, VALUE, GRADIENT, EDGE_QUERY, EDGE_KEY, SIZES, SLOPES, MASK,
    BY_KEY, BY_VALUE, BY_EDGE, LEVELS, CARRIES, LAST,
    query_batch, query_head, query_token, key_batch, key_head, key_token, value_batch, value_head, value_token,
    gradient_batch, gradient_head, gradient_token, edge_query_batch, edge_query_head, edge_query_token,
    edge_key_batch, edge_key_head, edge_key_token, mask_batch, mask_head, mask_query, mask_key,
    base, heads, queries, keys, window, scale,
    GROUPS: tl.constexpr, HEAD: tl.constexpr, HEAD_BLOCK: tl.constexpr, VALUES: tl.constexpr,
    VALUE_BLOCK: tl.constexpr, EDGE_BLOCK: tl.constexpr, QUERY_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr,
    CARRY_BLOCK: tl.constexpr, LANES: tl.constexpr, SPLIT: tl.constexpr, LINK: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, MASKED: tl.constexpr, LEAVES: tl.constexpr, PRECISION: tl.constexpr, EDGES: tl.constexpr,
):  # fmt: skip
    """Gradients of KEY_BLOCK keys and values by one query head, or with EDGES of the keys' side of its path.

    Query heads count from `base`. CARRY_BLOCK is the tile of keys of the sums over keys, which divides this one's.
    `LAST` [heads, tiles] is the number behind the last query that walked over a tile. `BY_KEY` and `BY_VALUE`
    [heads, T_k, HEAD or VALUES] and `BY_EDGE` [B, H, T_k, EDGE_BLOCK] are contiguous.
    """
    tiles = tl.cdiv(keys, KEY_BLOCK)
    tile = tl.program_id(0) % tiles
    first = tile * KEY_BLOCK
    local = tl.program_id(0) // tiles
    number = (base + local).to(tl.int64)
    batch = number // heads
    head = number % heads
    row = tl.arange(0, QUERY_BLOCK)
    inner = tl.arange(0, HEAD_BLOCK)
    outer = tl.arange(0, VALUE_BLOCK)
    edge = tl.arange(0, EDGE_BLOCK)
    places = keys_of_columns(KEY_BLOCK, LANES, SPLIT)
    there = first + places < keys
    key_start = KEY + batch * key_batch + head // GROUPS * key_head
    value_start = VALUE + batch * value_batch + head // GROUPS * value_head
    edge_start = EDGE_KEY + batch * edge_key_batch + head * edge_key_head
    key = rows_of(key_start, key_token, first, places, keys, inner, HEAD, True)
    value = rows_of(value_start, value_token, first, places, keys, outer, VALUES, True)
    edge_key = rows_of(edge_start, edge_key_token, first, places, keys, edge, EDGE_BLOCK, True)
    query_start = QUERY + batch * query_batch + head * query_head
    gradient_start = GRADIENT + batch * gradient_batch + head * gradient_head
    edge_start = EDGE_QUERY + batch * edge_query_batch + head * edge_query_head
    mask_start = MASK + batch * mask_batch + head * mask_head
    slope = tl.load(SLOPES + number)
    size = None
    if SIZES is not None:
        size = tl.load(SIZES + number) * LOG2E
    carry_tiles = tl.cdiv(keys, CARRY_BLOCK)
    carry_tile = tl.minimum((first + KEY_BLOCK) // CARRY_BLOCK, carry_tiles) - 1
    carries = CARRIES + (local.to(tl.int64) * carry_tiles + carry_tile) * queries
    part = (tl.num_programs(0) // tiles).to(tl.int64) * carry_tiles * queries
    levels = LEVELS + number * 3 * queries

    offset = keys - queries
    start = 0
    if CAUSAL:
        start = tl.maximum(first - offset, 0) // QUERY_BLOCK * QUERY_BLOCK
    stop = queries
    if WINDOW:
        stop = tl.minimum(stop, tl.maximum(first + KEY_BLOCK - 1 + window - offset, 0))
    if LEAVES:
        stop = tl.minimum(stop, tl.load(LAST + local * tiles + tile))
    # Some of the keys lie ahead of a query before this one.
    past = tl.maximum(first + KEY_BLOCK - 1 - offset, start)
    past = tl.cdiv(past - start, QUERY_BLOCK) * QUERY_BLOCK + start
    by_key = tl.zeros([KEY_BLOCK, EDGE_BLOCK if EDGES else HEAD_BLOCK], tl.float32)
    by_value = tl.zeros([KEY_BLOCK, EDGE_BLOCK if EDGES else VALUE_BLOCK], tl.float32)
    for begin in tl.range(start, stop, QUERY_BLOCK):
        by_key, by_value = key_step(
            by_key, by_value, key, value, edge_key, query_start, gradient_start, edge_start, mask_start, carries, part,
            carry_tile, levels, begin, first, row, places, there, inner, outer, edge, query_token,
            gradient_token, edge_query_token, mask_query, mask_key, queries, keys, window, scale, slope, size, HEAD,
            VALUES, EDGE_BLOCK, QUERY_BLOCK, KEY_BLOCK, LANES, SPLIT, LINK, True, CAUSAL, WINDOW, MASKED, PRECISION,
            EDGES,
        )  # fmt: skip
    if EDGES:
        edges = BY_EDGE + (number * keys + first) * EDGE_BLOCK
        tl.store(edges + places[:, None] * EDGE_BLOCK + edge[None, :], by_key, mask=there[:, None])
    else:
        tl.store(
            BY_KEY + (local.to(tl.int64) * keys + first) * HEAD + places[:, None] * HEAD + inner[None, :],
            (by_key * scale).to(BY_KEY.dtype.element_ty),
            mask=there[:, None] & (inner < HEAD if HEAD < HEAD_BLOCK else inner >= 0)[None, :],
        )
        tl.store(
            BY_VALUE
            + (local.to(tl.int64) * keys + first) * VALUES
            + places[:, None] * VALUES
            + outer[None, :],
            by_value.to(BY_VALUE.dtype.element_ty),
            mask=there[:, None] & (outer < VALUES if VALUES < VALUE_BLOCK else outer >= 0)[None, :],
        )


@triton.jit
def key_step(
    by_key, by_value, key, value, edge_key, QUERY, GRADIENT, EDGE_QUERY, MASK, CARRIES, part, carry_tile,
    LEVELS, begin, first, row, places, there, inner, outer, edge, query_token, gradient_token, edge_query_token,
    mask_query, mask_key, queries, keys, window, scale, slope, size,
    HEAD: tl.constexpr, VALUES: tl.constexpr, EDGE_BLOCK: tl.constexpr, QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr, LANES: tl.constexpr, SPLIT: tl.constexpr, LINK: tl.constexpr, NEAR: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, EDGES: tl.constexpr,
):  # fmt: skip
    """Add a tile of queries to all sums of all keys."""
    begin = tl.multiple_of(begin, QUERY_BLOCK)
    there_row = begin + row < queries
    at = begin + row + keys - queries
    query = rows_of(QUERY, query_token, begin, row, queries, inner, HEAD, True)
    edge_query = rows_of(EDGE_QUERY, edge_query_token, begin, row, queries, edge, EDGE_BLOCK, True)
    # A row that has not come this far has no weights here.
    walked_over = there_row & (
        tl.load(LEVELS + 2 * queries + begin + row, mask=there_row, other=0.0) <= carry_tile
    )
    left_behind = walked_over
    if CAUSAL:
        # Tiles ahead of a row have no sums.
        left_behind = walked_over & (at >= first + KEY_BLOCK)
    carry = tl.load(CARRIES + begin + row, mask=left_behind, other=0.0)
    # Cotangents and logits come late: they need not be in registers while edges are summed.
    product = tl.dot(edge_query, tl.trans(edge_key), input_precision=PRECISION)
    if size is not None:
        product = product * size
    if EDGES:
        steep = slope_of_link(product, LINK) * -slope
    bias, _ = path_behind(
        product, carry, at, first + places, LINK, NEAR, QUERY_BLOCK, KEY_BLOCK, LANES, SPLIT
    )
    gradient = rows_of(GRADIENT, gradient_token, begin, row, queries, outer, VALUES, True)
    logits = tl.dot(query, tl.trans(key), input_precision=PRECISION) * (scale * LOG2E) + bias * slope
    logits = hidden(logits, at, first + places, keys, window, NEAR, CAUSAL, WINDOW)
    if MASKED != NONE:
        offsets = (begin.to(tl.int64) + row)[:, None] * mask_query + (first + places)[None, :] * mask_key
        logits = masked(logits, MASK, offsets, there_row[:, None] & there[None, :], MASKED)
    level = tl.load(LEVELS + begin + row, mask=walked_over, other=float("inf"))
    weights = tl.exp2(logits - level[:, None])
    delta = tl.load(LEVELS + queries + begin + row, mask=walked_over, other=0.0)
    changes = tl.dot(gradient, tl.trans(value), input_precision=PRECISION)
    changes = weights * (changes - delta[:, None])
    if EDGES:
        walked = tl.load(CARRIES + part + begin + row, mask=left_behind, other=0.0)
        by_product, _ = edge_changes(
            changes, steep, walked, at, first + places, NEAR, QUERY_BLOCK, KEY_BLOCK, LANES, SPLIT
        )
        by_key = tl.dot(
            tl.trans(by_product.to(edge_query.dtype)), edge_query, by_key, input_precision=PRECISION
        )
    else:
        by_value = tl.dot(tl.trans(weights.to(gradient.dtype)), gradient, by_value, input_precision=PRECISION)
        by_key = tl.dot(tl.trans(changes.to(query.dtype)), query, by_key, input_precision=PRECISION)
    return by_key, by_value
