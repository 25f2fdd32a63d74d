"""Attention of few queries over many keys: the keys are split among programs, and what each has seen is merged.

All queries that share a key head are rows of one tile, so that keys and values are read once. A program walks over one
part of the keys with a running softmax; the second kernel weighs the parts, always in the same order.
"""

import triton
import triton.language as tl

from grape_compile.kernels.bodies.angles import cos_sin, cos_sin_exact
from grape_compile.kernels.bodies.attention_operands import BYTES, CLOCK, LN2, LOG2E, NONE
from grape_compile.kernels.bodies.attention_tiles import ABSORBING, LOWEST, spread
from grape_compile.kernels.bodies.decode_path import edges_behind, path_of
from grape_compile.kernels.bodies.path_tiles import keys_of_columns
from grape_compile.kernels.bodies.turn import EXACT, STEPS, TABLES

#: Keys whose mask is looked at in one load before any of them is read.
SCAN = tl.constexpr(1024)


@triton.jit
def offsets_of(PAGES, key_at, there, token, page, PAGE: tl.constexpr):
    """Return where keys are, from the first number of their head on: only this knows how a cache lies in memory.

    With `PAGES`, the page of each PAGE keys of a sequence, pages are `page` numbers apart and hold keys in their order.
    """
    if PAGES is not None:
        pages = tl.load(PAGES + key_at // PAGE, mask=there, other=0).to(tl.int64)
        offsets = pages * page + (key_at % PAGE).to(tl.int64) * token
    else:
        offsets = key_at.to(tl.int64) * token
    return offsets


@triton.jit
def times_at(TIMES, row_offset, place, token, known):
    """Return the clock of rows [ROWS, 1] at key numbers that broadcast to them, float64."""
    return tl.load(TIMES + row_offset + place * token, mask=known, other=0).to(tl.float64)


@triton.jit
def apart(TIMES, row_offset, key_at, at, query_time, token, known, KIND: tl.constexpr):
    """Return clock_j - clock_t: the difference is taken in whole numbers or float64, then rounded to float32."""
    if KIND == CLOCK:
        difference = (times_at(TIMES, row_offset, key_at, token, known) - query_time).to(tl.float32)
    else:
        difference = (key_at - at).to(tl.float32)
    return difference


@triton.jit
def seen_by_mask(mask, KIND: tl.constexpr):
    """Return which keys a mask leaves."""
    if KIND == BYTES:
        seen = mask != 0
    else:
        seen = mask.to(tl.float32) > -float("inf")
    return seen


@triton.jit
def turned(
    heads, known, place, token, batch, COORDINATES, A, a_batch, a_token, a_plane, B, b_batch, b_token, b_plane,
    cos_factor, sin_factor, HEAD: tl.constexpr, HEAD_BLOCK: tl.constexpr, SOURCE: tl.constexpr,
):  # fmt: skip
    """The heads that `heads` [rows, 1] points to, turned: y_i = cos x_i + sign_i sin x_partner(i), float32.

    `COORDINATES` [3, HEAD]: the plane of each coordinate, -1 for none, its partner, and the sign.
    """
    inner = tl.arange(0, HEAD_BLOCK)
    there = inner < HEAD
    plane = tl.load(COORDINATES + inner, mask=there, other=-1)
    partner = tl.load(COORDINATES + HEAD + inner, mask=there, other=0)
    sign = tl.load(COORDINATES + 2 * HEAD + inner, mask=there, other=0).to(tl.float32)
    turning = (plane >= 0)[None, :]
    both = known & there[None, :]
    own = tl.load(heads + inner[None, :], mask=both, other=0.0).to(tl.float32)
    other = tl.load(heads + partner[None, :], mask=both & turning, other=0.0).to(tl.float32)
    if SOURCE == TABLES:
        at = token[:, None] * a_token + plane[None, :] * a_plane
        cos = tl.load(A + batch * a_batch + at, mask=both & turning, other=1.0).to(tl.float32)
        at = token[:, None] * b_token + plane[None, :] * b_plane
        sin = tl.load(B + batch * b_batch + at, mask=both & turning, other=0.0).to(tl.float32)
    else:
        frequency = tl.load(B + plane * b_plane, mask=plane >= 0, other=0.0)[None, :]
        position = place
        if SOURCE != STEPS:
            position = tl.load(A + batch * a_batch + token * a_token)
        if SOURCE == EXACT:
            cos, sin = cos_sin_exact(position[:, None].to(tl.float64), frequency)
        else:
            cos, sin = cos_sin(position[:, None].to(tl.float32) * frequency.to(tl.float32))
    cos = tl.where(turning, cos * cos_factor, 1.0)
    return own * cos + other * tl.where(turning, sin * sin_factor, 0.0) * sign[None, :]


@triton.jit
def biased(
    logits, key_at, there, at, level_slope, LEVEL_TIMES, level_row, level_time, level_token,
    term_slope, TERM_TIMES, term_row, term_time, term_token, gate_query, gates_key, gate_token, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, LEVEL: tl.constexpr, TERM: tl.constexpr, ABSOLUTE: tl.constexpr,
    GATE_QUERY: tl.constexpr, GATE_KEY: tl.constexpr,
):  # fmt: skip
    """Logits of all rows for some keys with their biases, and which of them are seen."""
    if LEVEL != NONE:
        logits += level_slope * apart(
            LEVEL_TIMES, level_row, key_at, at, level_time, level_token, there, LEVEL
        )
    if TERM != NONE:
        gate_key = 0.0
        if GATE_KEY:
            gate_key = tl.load(gates_key + key_at * gate_token, mask=there, other=0.0) * term_slope
        difference = apart(TERM_TIMES, term_row, key_at, at, term_time, term_token, there, TERM)
        steep = term_slope
        if GATE_QUERY or GATE_KEY:
            steep = gate_query + gate_key
        logits += steep * spread(difference, ABSOLUTE)
    seen = there
    if CAUSAL:
        seen = seen & (key_at <= at)
    if WINDOW:
        seen = seen & (key_at > at - window)
    return logits, seen


@triton.jit
def folded(best, total, sums, logits, seen, value, PRECISION: tl.constexpr):
    """A running softmax with one more tile of keys."""
    logits = tl.where(seen, logits, -float("inf"))
    larger = tl.maximum(best, tl.max(logits, 1))
    weights = tl.exp2(logits - larger[:, None])
    shrink = tl.exp2(best - larger)
    total = total * shrink + tl.sum(weights, 1)
    sums = tl.dot(weights.to(value.dtype), value, sums * shrink[:, None], input_precision=PRECISION)
    return larger, total, sums


@triton.jit
def decode_split(
    QUERY, KEY, VALUE, PARTS, LEVELS, MASK,
    LEVEL_SLOPES, LEVEL_TIMES, TERM_SLOPES, TERM_TIMES, GATES_QUERY, GATES_KEY,
    query_batch, query_head, query_token, key_batch, key_head, key_token, value_batch, value_head, value_token,
    mask_batch, mask_head, mask_query, mask_key,
    level_slopes_batch, level_slopes_head, level_times_batch, level_times_head, level_times_token,
    term_slopes_batch, term_slopes_head, term_times_batch, term_times_head, term_times_token,
    gates_query_batch, gates_query_head, gates_query_token, gates_key_batch, gates_key_head, gates_key_token,
    LENGTHS, NEW_KEY, NEW_VALUE, new_key_batch, new_key_head, new_key_token, new_value_batch, new_value_head,
    new_value_token, COORDINATES, A, a_batch, a_token, a_plane, B, b_batch, b_token, b_plane, cos_factor, sin_factor,
    CARRIES, EDGE_QUERY, EDGE_KEY, PATH_SLOPES, edge_query_batch, edge_query_head, edge_query_token,
    edge_key_batch, edge_key_head, edge_key_token, path_slopes_batch, path_slopes_head,
    PAGES, pages_batch, key_page, value_page, key_heads, queries, keys, window, splits, scale,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, HEAD: tl.constexpr, HEAD_BLOCK: tl.constexpr, VALUES: tl.constexpr,
    VALUE_BLOCK: tl.constexpr, KEY_BLOCK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    LEVEL: tl.constexpr, TERM: tl.constexpr, ABSOLUTE: tl.constexpr, GATE_QUERY: tl.constexpr, GATE_KEY: tl.constexpr,
    MASKED: tl.constexpr, ONE_MASK: tl.constexpr, SOURCE: tl.constexpr, PRECISION: tl.constexpr,
    LINK: tl.constexpr, EDGE: tl.constexpr, EDGE_BLOCK: tl.constexpr, MEMBERS: tl.constexpr, LANES: tl.constexpr,
    EDGE_WIDTH: tl.constexpr, EDGE_PRECISION: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Sums of one part of the keys: of values by their weights, of the weights, and the logit that weighs one.

    `PARTS` [B, H, T_q, splits, D_v] takes the first, `LEVELS` [B, H, T_q, 2, splits] the largest logit, in powers of
    two, and the sum of weights; grid (splits * B * key heads,). With `LENGTHS` [B], tokens in a cache, there are new
    keys and values behind them: the last part sees them from where they come and puts them into the cache, and no part
    reads there. With COORDINATES queries and new keys turn on their way. A part is walked over from its last key
    backwards: with `CARRIES` [B, H, T_q, splits] there is a path, and what its keys add to all before them goes there.
    With `PAGES` [B, ceil(keys / PAGE)] keys and values are those of pages [pages, key heads, PAGE, D].
    """
    split = tl.program_id(0) % splits
    number = tl.program_id(0) // splits
    batch = (number // key_heads).to(tl.int64)
    key_number = (number % key_heads).to(tl.int64)
    row = tl.arange(0, ROWS)
    there_row = row < GROUPS * queries
    # Rows that are not there read the last one's numbers.
    member = tl.minimum(row // queries, GROUPS - 1)
    token = row % queries
    head = key_number * GROUPS + member
    column = tl.arange(0, KEY_BLOCK)
    inner = tl.arange(0, HEAD_BLOCK)
    outer = tl.arange(0, VALUE_BLOCK)
    inner_known = (inner < HEAD if HEAD < HEAD_BLOCK else inner >= 0)[None, :]
    outer_known = (outer < VALUES if VALUES < VALUE_BLOCK else outer >= 0)[None, :]
    # Queries are the last of the keys.
    first_at = keys - queries
    if LENGTHS is not None:
        first_at = tl.load(LENGTHS + batch).to(tl.int32)
    at = (first_at + token)[:, None]
    query_heads = QUERY + batch * query_batch + (head * query_head + token * query_token)[:, None]
    if COORDINATES is not None:
        query = turned(
            query_heads, there_row[:, None], first_at + token, token, batch, COORDINATES, A, a_batch, a_token, a_plane,
            B, b_batch, b_token, b_plane, cos_factor, sin_factor, HEAD, HEAD_BLOCK, SOURCE,
        ).to(KEY.dtype.element_ty)  # fmt: skip
    else:
        query = tl.load(query_heads + inner[None, :], mask=there_row[:, None] & inner_known, other=0.0)

    start = 0
    stop = keys
    if LENGTHS is not None:
        stop = first_at
    elif CAUSAL:
        stop = tl.minimum(tl.maximum(first_at + queries, 0), keys)
    if WINDOW:
        start = tl.maximum(first_at - window + 1, 0) // KEY_BLOCK * KEY_BLOCK
    share = tl.cdiv(tl.cdiv(tl.maximum(stop - start, 0), KEY_BLOCK), splits) * KEY_BLOCK
    start += split * share
    stop = tl.minimum(stop, start + share)
    mask_start = MASK + batch * mask_batch
    if ONE_MASK:
        # What all rows are told to leave out is not read.
        first_seen = stop
        last_seen = start
        for begin in tl.range(start, stop, SCAN):
            place = begin + tl.arange(0, SCAN)
            known = place < stop
            told = tl.load(mask_start + place.to(tl.int64) * mask_key, mask=known, other=0)
            seen = known & seen_by_mask(told, MASKED)
            first_seen = tl.minimum(first_seen, tl.min(tl.where(seen, place, stop)))
            last_seen = tl.maximum(last_seen, tl.max(tl.where(seen, place + 1, start)))
        start = first_seen // KEY_BLOCK * KEY_BLOCK
        stop = last_seen
    else:
        mask_start += (head * mask_head + token * mask_query)[:, None]

    level_slope = 0.0
    level_row = (head * level_times_head + batch * level_times_batch)[:, None]
    level_time = 0.0
    if LEVEL != NONE:
        slopes = LEVEL_SLOPES + batch * level_slopes_batch + head * level_slopes_head
        level_slope = tl.load(slopes)[:, None] * LOG2E
    if LEVEL == CLOCK:
        level_time = times_at(LEVEL_TIMES, level_row, at, level_times_token, (at >= 0) & there_row[:, None])
    term_slope = 0.0
    term_row = (head * term_times_head + batch * term_times_batch)[:, None]
    term_time = 0.0
    gate_query = 0.0
    gates_key = GATES_KEY + (head * gates_key_head + batch * gates_key_batch)[:, None]
    if TERM != NONE:
        slopes = TERM_SLOPES + batch * term_slopes_batch + head * term_slopes_head
        term_slope = tl.load(slopes)[:, None] * LOG2E
    if TERM == CLOCK:
        term_time = times_at(TERM_TIMES, term_row, at, term_times_token, (at >= 0) & there_row[:, None])
    if GATE_QUERY:
        gates = GATES_QUERY + batch * gates_query_batch + head * gates_query_head + token * gates_query_token
        gate_query = tl.load(gates, mask=there_row, other=0.0)[:, None] * term_slope

    if PAGES is not None:
        PAGES += batch * pages_batch
    key_start = KEY + batch * key_batch + key_number * key_head
    value_start = VALUE + batch * value_batch + key_number * value_head
    best = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, VALUE_BLOCK], tl.float32)
    carry = tl.zeros([ROWS], tl.float32)
    if CARRIES is not None:
        path = path_of(
            EDGE_QUERY + batch * edge_query_batch, EDGE_KEY, PATH_SLOPES + batch * path_slopes_batch,
            key_number * GROUPS, member, token, there_row, edge_query_head, edge_query_token, batch * edge_key_batch,
            edge_key_head, edge_key_token, path_slopes_head, EDGE, EDGE_BLOCK, MEMBERS,
        )  # fmt: skip
        # The order in which threads that share a row add up what they own.
        column = keys_of_columns(KEY_BLOCK, LANES, 1)
    if LENGTHS is not None:
        if split == splits - 1:
            new = tl.arange(0, 16)
            there = new < queries
            heads = (
                NEW_KEY + batch * new_key_batch + key_number * new_key_head + (new * new_key_token)[:, None]
            )
            if COORDINATES is not None:
                key = turned(
                    heads, there[:, None], first_at + new, tl.minimum(new, queries - 1), batch, COORDINATES,
                    A, a_batch, a_token, a_plane, B, b_batch, b_token, b_plane, cos_factor, sin_factor,
                    HEAD, HEAD_BLOCK, SOURCE,
                ).to(KEY.dtype.element_ty)  # fmt: skip
            else:
                key = tl.load(heads + inner[None, :], mask=there[:, None] & inner_known, other=0.0)
            values = NEW_VALUE + batch * new_value_batch + key_number * new_value_head
            value = tl.load(
                values + (new * new_value_token)[:, None] + outer[None, :],
                mask=there[:, None] & outer_known,
                other=0.0,
            )
            key_at = first_at + new
            # Nothing outside of the cache is written to.
            known = there & (key_at >= 0) & (key_at < keys)
            inside = known[:, None]
            far = offsets_of(PAGES, key_at, known, key_token, key_page, PAGE)
            tl.store(key_start + far[:, None] + inner[None, :], key, mask=inside & inner_known)
            far = offsets_of(PAGES, key_at, known, value_token, value_page, PAGE)
            tl.store(value_start + far[:, None] + outer[None, :], value, mask=inside & outer_known)
            logits = tl.dot(query, tl.trans(key), input_precision=PRECISION) * (scale * LOG2E)
            logits, seen = biased(
                logits, key_at[None, :], tl.trans(inside), at, level_slope, LEVEL_TIMES, level_row, level_time,
                level_times_token, term_slope, TERM_TIMES, term_row, term_time, term_times_token, gate_query,
                gates_key, gates_key_token, window, CAUSAL, WINDOW, LEVEL, TERM, ABSOLUTE, GATE_QUERY, GATE_KEY,
            )  # fmt: skip
            if CARRIES is not None:
                behind, carry = edges_behind(
                    path, carry, key_at, there & (key_at < keys), at, LINK, ROWS, 16, 1, EDGE_WIDTH, EDGE_PRECISION
                )  # fmt: skip
                logits += path.slope * behind
            best, total, sums = folded(best, total, sums, logits, seen, value, PRECISION)
    count = tl.cdiv(tl.maximum(stop - start, 0), KEY_BLOCK)
    for index in tl.range(0, count):
        key_at = start + (count - 1 - index) * KEY_BLOCK + column
        there = key_at < stop
        far = offsets_of(PAGES, key_at, there, key_token, key_page, PAGE)
        key = tl.load(
            key_start + far[:, None] + inner[None, :],
            mask=there[:, None] & inner_known,
            other=0.0,
        )
        logits = tl.dot(query, tl.trans(key), input_precision=PRECISION) * (scale * LOG2E)
        logits, seen = biased(
            logits, key_at[None, :], there[None, :], at, level_slope, LEVEL_TIMES, level_row, level_time,
            level_times_token, term_slope, TERM_TIMES, term_row, term_time, term_times_token, gate_query, gates_key,
            gates_key_token, window, CAUSAL, WINDOW, LEVEL, TERM, ABSOLUTE, GATE_QUERY, GATE_KEY,
        )  # fmt: skip
        if CARRIES is not None:
            behind, carry = edges_behind(
                path, carry, key_at, there, at, LINK, ROWS, KEY_BLOCK, LANES, EDGE_WIDTH, EDGE_PRECISION
            )  # fmt: skip
            logits += path.slope * behind
        if MASKED != NONE:
            told = tl.load(mask_start + key_at.to(tl.int64)[None, :] * mask_key, mask=there[None, :], other=0)
            if MASKED == BYTES:
                seen = seen & (told != 0)
            else:
                added = told.to(tl.float32)
                logits += tl.where(added < ABSORBING, added, added * LOG2E)
        far = offsets_of(PAGES, key_at, there, value_token, value_page, PAGE)
        value = tl.load(
            value_start + far[:, None] + outer[None, :],
            mask=there[:, None] & outer_known,
            other=0.0,
        )
        best, total, sums = folded(best, total, sums, logits, seen, value, PRECISION)
    places = (batch * key_heads * GROUPS + head) * queries + token
    tl.store(LEVELS + 2 * places * splits + split, best, mask=there_row)
    tl.store(LEVELS + (2 * places + 1) * splits + split, total, mask=there_row)
    if CARRIES is not None:
        steep = tl.reshape(path.slope, [ROWS])
        tl.store(CARRIES + places * splits + split, carry * steep, mask=there_row)
    tl.store(
        PARTS + (places * splits + split)[:, None] * VALUES + outer[None, :],
        sums,
        mask=there_row[:, None] & outer_known,
    )


@triton.jit
def decode_merge(
    PARTS, LEVELS, CARRIES, OUTPUT, LOGSUMEXP, output_batch, output_head, output_token, heads, queries, splits,
    VALUES: tl.constexpr, VALUE_BLOCK: tl.constexpr, SPLIT_BLOCK: tl.constexpr, PARTS_BLOCK: tl.constexpr,
):  # fmt: skip
    """Output and logsumexp of one query of one head from its parts; grid (T_q * B * H,).

    `CARRIES` [B, H, T_q, splits], if given, are what the keys of a part add, as powers of two, to the logits of all
    keys before it: a path leads through them.
    """
    number = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, SPLIT_BLOCK)
    there = place < splits
    levels = tl.load(LEVELS + 2 * number * splits + place, mask=there, other=LOWEST)
    totals = tl.load(LEVELS + (2 * number + 1) * splits + place, mask=there, other=0.0)
    if CARRIES is not None:
        carries = tl.load(CARRIES + number * splits + place, mask=there, other=0.0)
        levels += tl.cumsum(carries, 0, reverse=True) - carries
    best = tl.maximum(tl.max(levels, 0), LOWEST)
    weights = tl.exp2(levels - best)
    total = tl.sum(weights * totals, 0)
    empty = total == 0.0
    outer = tl.arange(0, VALUE_BLOCK)
    known = (outer < VALUES if VALUES < VALUE_BLOCK else outer >= 0)[None, :]
    part = tl.arange(0, PARTS_BLOCK)
    sums = tl.zeros([VALUE_BLOCK], tl.float32)
    for first in tl.range(0, splits, PARTS_BLOCK):
        chosen = (first + part)[:, None] == place[None, :]
        weight = tl.sum(tl.where(chosen, weights[None, :], 0.0), 1)
        values = tl.load(
            PARTS + (number * splits + first + part)[:, None] * VALUES + outer[None, :],
            mask=(first + part < splits)[:, None] & known,
            other=0.0,
        )
        sums += tl.sum(weight[:, None] * values, 0)
    token = number % queries
    head = number // queries % heads
    batch = number // queries // heads
    tl.store(
        OUTPUT + batch * output_batch + head * output_head + token * output_token + outer,
        (sums / tl.where(empty, 1.0, total)).to(OUTPUT.dtype.element_ty),
        mask=outer < VALUES,
    )
    level = (best + tl.log2(tl.where(empty, 1.0, total))) * LN2
    tl.store(LOGSUMEXP + number, tl.where(empty, -float("inf"), level))
