"""Attention with a path bias, backward, second kernel: all sums over queries, by what the first has left behind.

No two programs add to the same number, so that results are the same at every run.
"""

import triton
import triton.language as tl

from grape_compile.kernels.bodies.attention_tiles import LOG2E, NONE, masked
from grape_compile.kernels.bodies.path_tiles import (
    BOUNDED_LOG_SIGMOID,
    biased,
    edge_changes,
    keys_of_columns,
    rows_of,
)


@triton.jit
def path_by_key(
    QUERY, KEY, VALUE, GRADIENT, EDGE_QUERY, EDGE_KEY, SIZES, SLOPES, MASK,
    BY_KEY, BY_VALUE, BY_EDGE, LEVELS, CARRIES, FIRST, LAST,
    query_batch, query_head, query_token, key_batch, key_head, key_token, value_batch, value_head, value_token,
    gradient_batch, gradient_head, gradient_token, by_key_batch, by_key_head, by_key_token,
    by_value_batch, by_value_head, by_value_token, edge_query_batch, edge_query_head, edge_query_token,
    edge_key_batch, edge_key_head, edge_key_token, mask_batch, mask_head, mask_query, mask_key,
    base, key_heads, queries, keys, window, scale,
    GROUPS: tl.constexpr, HEAD: tl.constexpr, HEAD_BLOCK: tl.constexpr, VALUES: tl.constexpr,
    VALUE_BLOCK: tl.constexpr, EDGE_BLOCK: tl.constexpr, QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr, CARRY_BLOCK: tl.constexpr, LANES: tl.constexpr, LINK: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, MASKED: tl.constexpr, LEAVES: tl.constexpr, PRECISION: tl.constexpr, WANTS: tl.constexpr,
):  # fmt: skip
    """Gradients of KEY_BLOCK keys and values of one head, and of the keys' side of the path of each of its query heads.

    Key heads count from `base`; CARRY_BLOCK is the first kernel's tile of keys, which divides this one's. `LAST`
    [heads, tiles] is the number behind the last query that walked over a tile.
    """
    tiles = tl.cdiv(keys, KEY_BLOCK)
    tile = tl.program_id(0) % tiles
    first = tile * KEY_BLOCK
    local = (tl.program_id(0) // tiles).to(tl.int64)
    key_number = base + local
    batch = key_number // key_heads
    key_head_number = key_number % key_heads
    row = tl.arange(0, QUERY_BLOCK)
    inner = tl.arange(0, HEAD_BLOCK)
    outer = tl.arange(0, VALUE_BLOCK)
    edge = tl.arange(0, EDGE_BLOCK)
    places = keys_of_columns(KEY_BLOCK, LANES)
    there = first + places < keys
    key_start = KEY + batch * key_batch + key_head_number * key_head
    value_start = VALUE + batch * value_batch + key_head_number * value_head
    key = rows_of(key_start, key_token, first, places, keys, inner, HEAD, True)
    value = rows_of(value_start, value_token, first, places, keys, outer, VALUES, True)
    carry_tiles = tl.cdiv(keys, CARRY_BLOCK)
    carry_tile = tl.minimum((first + KEY_BLOCK) // CARRY_BLOCK, carry_tiles) - 1
    part = carry_tiles.to(tl.int64) * queries

    offset = keys - queries
    start = 0
    if CAUSAL:
        start = tl.maximum(first - offset, 0) // QUERY_BLOCK * QUERY_BLOCK
    stop = queries
    if WINDOW:
        stop = tl.minimum(stop, tl.maximum(first + KEY_BLOCK - 1 + window - offset, 0))
    # The keys lie ahead of some query before this one.
    past = tl.maximum(first + KEY_BLOCK - 1 - offset, start)
    past = tl.cdiv(past - start, QUERY_BLOCK) * QUERY_BLOCK + start
    by_key = tl.zeros([KEY_BLOCK, HEAD_BLOCK], tl.float32)
    by_value = tl.zeros([KEY_BLOCK, VALUE_BLOCK], tl.float32)
    for member in tl.range(0, GROUPS):
        head = key_head_number * GROUPS + member
        number = key_number * GROUPS + member
        query_start = QUERY + batch * query_batch + head * query_head
        gradient_start = GRADIENT + batch * gradient_batch + head * gradient_head
        edge_start = EDGE_QUERY + batch * edge_query_batch + head * edge_query_head
        mask_start = MASK + batch * mask_batch + head * mask_head
        key_edges = EDGE_KEY + batch * edge_key_batch + head * edge_key_head
        edge_key = rows_of(key_edges, edge_key_token, first, places, keys, edge, EDGE_BLOCK, True)
        carries = CARRIES + (local * GROUPS + member) * (3 if WANTS else 1) * part + carry_tile.to(tl.int64) * queries
        levels = LEVELS + number * 3 * queries
        walks = FIRST + number * queries
        slope = tl.load(SLOPES + number)
        size = 1.0
        if LINK != BOUNDED_LOG_SIGMOID:
            size = tl.load(SIZES + number)
        head_stop = stop
        if LEAVES:
            head_stop = tl.minimum(stop, tl.load(LAST + (local * GROUPS + member) * tiles + tile))
        by_edge = tl.zeros([KEY_BLOCK, EDGE_BLOCK], tl.float32)
        for begin in tl.range(start, tl.minimum(past, head_stop), QUERY_BLOCK):
            by_key, by_value, by_edge = key_step(
                by_key, by_value, by_edge, key, value, edge_key, query_start, gradient_start, edge_start, mask_start,
                carries, part, carry_tile, levels, walks, begin, first, row, places, there,
                inner, outer, edge, query_token, gradient_token, edge_query_token, mask_query, mask_key, queries, keys,
                window, scale, slope, size, HEAD, VALUES, EDGE_BLOCK, QUERY_BLOCK, KEY_BLOCK, LANES, LINK, True, CAUSAL,
                WINDOW, MASKED, PRECISION, WANTS,
            )  # fmt: skip
        for begin in tl.range(past, head_stop, QUERY_BLOCK):
            by_key, by_value, by_edge = key_step(
                by_key, by_value, by_edge, key, value, edge_key, query_start, gradient_start, edge_start, mask_start,
                carries, part, carry_tile, levels, walks, begin, first, row, places, there,
                inner, outer, edge, query_token, gradient_token, edge_query_token, mask_query, mask_key, queries, keys,
                window, scale, slope, size, HEAD, VALUES, EDGE_BLOCK, QUERY_BLOCK, KEY_BLOCK, LANES, LINK, False,
                CAUSAL, WINDOW, MASKED, PRECISION, WANTS,
            )  # fmt: skip
        if WANTS:
            edges = BY_EDGE + (number * keys + first) * EDGE_BLOCK
            tl.store(edges + places[:, None] * EDGE_BLOCK + edge[None, :], by_edge, mask=there[:, None])
    by_key_start = BY_KEY + batch * by_key_batch + key_head_number * by_key_head
    tl.store(
        by_key_start + (first + places).to(tl.int64)[:, None] * by_key_token + inner[None, :],
        (by_key * scale).to(BY_KEY.dtype.element_ty),
        mask=there[:, None] & (inner < HEAD if HEAD < HEAD_BLOCK else inner >= 0)[None, :],
    )
    by_value_start = BY_VALUE + batch * by_value_batch + key_head_number * by_value_head
    tl.store(
        by_value_start + (first + places).to(tl.int64)[:, None] * by_value_token + outer[None, :],
        by_value.to(BY_VALUE.dtype.element_ty),
        mask=there[:, None] & (outer < VALUES if VALUES < VALUE_BLOCK else outer >= 0)[None, :],
    )


@triton.jit
def key_step(
    by_key, by_value, by_edge, key, value, edge_key, QUERY, GRADIENT, EDGE_QUERY, MASK, CARRIES, part, carry_tile,
    LEVELS, FIRST, begin, first, row, places, there, inner, outer, edge, query_token, gradient_token, edge_query_token,
    mask_query, mask_key, queries, keys, window, scale, slope, size,
    HEAD: tl.constexpr, VALUES: tl.constexpr, EDGE_BLOCK: tl.constexpr, QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr, LANES: tl.constexpr, LINK: tl.constexpr, NEAR: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, WANTS: tl.constexpr,
):  # fmt: skip
    """Add a tile of queries to all sums of all keys."""
    begin = tl.multiple_of(begin, QUERY_BLOCK)
    there_row = begin + row < queries
    at = begin + row + keys - queries
    query = rows_of(QUERY, query_token, begin, row, queries, inner, HEAD, True)
    gradient = rows_of(GRADIENT, gradient_token, begin, row, queries, outer, VALUES, True)
    edge_query = rows_of(EDGE_QUERY, edge_query_token, begin, row, queries, edge, EDGE_BLOCK, True)
    # Rows that have not come this far have no weights here.
    walked_over = there_row & (tl.load(FIRST + begin + row, mask=there_row, other=0) <= carry_tile)
    level = tl.load(LEVELS + begin + row, mask=walked_over, other=float("inf"))
    delta = tl.load(LEVELS + queries + begin + row, mask=walked_over, other=0.0)
    left_behind = walked_over
    if CAUSAL:
        # Those ahead of which all of the tiles behind lie started later.
        left_behind = walked_over & (at >= first + KEY_BLOCK)
    carry = tl.load(CARRIES + begin + row, mask=left_behind, other=0.0)
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    product = tl.dot(edge_query, tl.trans(edge_key), input_precision=PRECISION)
    if LINK != BOUNDED_LOG_SIGMOID:
        product = product * size
    logits, _, _ = biased(
        scores, product, carry, slope, scale * LOG2E, at, first + places, keys, window, LINK, NEAR, CAUSAL, WINDOW,
        QUERY_BLOCK, KEY_BLOCK, LANES,
    )  # fmt: skip
    if MASKED != NONE:
        offsets = (begin.to(tl.int64) + row)[:, None] * mask_query + (first + places)[None, :] * mask_key
        logits = masked(logits, MASK, offsets, there_row[:, None] & there[None, :], MASKED)
    weights = tl.exp2(logits - level[:, None])
    by_value = tl.dot(tl.trans(weights.to(gradient.dtype)), gradient, by_value, input_precision=PRECISION)
    changes = tl.dot(gradient, tl.trans(value), input_precision=PRECISION)
    changes = weights * (changes - delta[:, None])
    by_key = tl.dot(tl.trans(changes.to(query.dtype)), query, by_key, input_precision=PRECISION)
    if WANTS:
        # What the first kernel had summed was off by its delta's share of the weights; here delta is exact.
        rest = tl.load(CARRIES + begin + row + 2 * part, mask=left_behind, other=0.0)
        walked = tl.load(CARRIES + begin + row + part, mask=left_behind, other=0.0)
        walked -= rest * tl.load(LEVELS + 2 * queries + begin + row, mask=walked_over, other=0.0)
        by_product, _ = edge_changes(
            changes, product, walked, slope, at, first + places, LINK, NEAR, QUERY_BLOCK, KEY_BLOCK, LANES
        )
        by_edge = tl.dot(
            tl.trans(by_product.to(edge_query.dtype)), edge_query, by_edge, input_precision=PRECISION
        )
    return by_key, by_value, by_edge
