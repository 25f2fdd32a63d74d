"""What the kernels of path biases share: the edges of a tile, and their sums from the last key of a row backwards.

A sum along the keys of a tile would cross the threads that share a row at every step. So the columns of a tile hold
its keys in another order, in which each of LANES threads owns a run of neighbouring keys: it sums its run by itself,
and the threads exchange one number each. The order is that of the accumulators of a matrix product, whose columns
2 t, 2 t + 1 (mod 8) belong to thread t of four (PTX, matrix fragments); where a thread owns a whole row, LANES is one.
Where warps share the columns of a tile, each of SPLIT has as many keys that follow each other.

Edges are logarithms to the base two, as logits are.
"""

import triton
import triton.language as tl

from grape_compile.kernels.bodies.attention_operands import LOG2E

#: What an edge is made of the product of query and key.
LOG_SIGMOID = tl.constexpr(0)
BOUNDED_LOG_SIGMOID = tl.constexpr(1)
NEGATIVE_EXP = tl.constexpr(2)
IDENTITY = tl.constexpr(3)

# Minimax polynomials. With |x| <= 1, log2 of the sigmoid is x log2(e) / 2 - 1 + x^2 EVEN(x^2), off by 6e-9, and the
# sigmoid of -x is 1/2 - x ODD(x^2), off by 4e-9. On [0, 1], log2(1 + e) is e SOFT(e), off by 4e-8 of it.
EVEN_0 = tl.constexpr(-0.18033669473851563)
EVEN_1 = tl.constexpr(0.0075122380729174725)
EVEN_2 = tl.constexpr(-0.0004954689351645593)
EVEN_3 = tl.constexpr(3.132321050830512e-05)
ODD_0 = tl.constexpr(0.2499999965344251)
ODD_1 = tl.constexpr(-0.020833160009344313)
ODD_2 = tl.constexpr(0.0020819428016635487)
ODD_3 = tl.constexpr(-0.00020687147722052595)
ODD_4 = tl.constexpr(1.667139824766058e-05)
SOFT_0 = tl.constexpr(1.442695004146902)
SOFT_1 = tl.constexpr(-0.7213410656438125)
SOFT_2 = tl.constexpr(0.4807109434924307)
SOFT_3 = tl.constexpr(-0.35855221129927506)
SOFT_4 = tl.constexpr(0.27620562613042343)
SOFT_5 = tl.constexpr(-0.19832179544101008)
SOFT_6 = tl.constexpr(0.11427689352357988)
SOFT_7 = tl.constexpr(-0.04344091021588957)
SOFT_8 = tl.constexpr(0.007767552048712649)


@triton.jit
def keys_of_columns(BLOCK: tl.constexpr, LANES: tl.constexpr, SPLIT: tl.constexpr):
    """Return which key of a tile each of its columns holds."""
    column = tl.arange(0, BLOCK)
    inside = column % (BLOCK // SPLIT)
    run = inside // 2 % LANES * (BLOCK // SPLIT // LANES) + inside // (2 * LANES) * 2 + inside % 2
    return column // (BLOCK // SPLIT) * (BLOCK // SPLIT) + run


@triton.jit
def linked(product, LINK: tl.constexpr):
    """Return the edges of products (GRAPE 5.2), as powers of two; unless bounded, so are the products."""
    if LINK == BOUNDED_LOG_SIGMOID:
        square = product * product
        even = EVEN_0 + square * (EVEN_1 + square * (EVEN_2 + square * EVEN_3))
        edge = square * even + (product * (0.5 * LOG2E) - 1.0)
    elif LINK == LOG_SIGMOID:
        small = tl.exp2(-tl.abs(product))
        edge = tl.minimum(product, 0.0) - small * soft(small)
    elif LINK == NEGATIVE_EXP:
        edge = -LOG2E * tl.exp2(product)
    else:
        edge = product
    return edge


@triton.jit
def soft(small):
    """Return log2(1 + e) / e."""
    high = SOFT_4 + small * (SOFT_5 + small * (SOFT_6 + small * (SOFT_7 + small * SOFT_8)))
    return SOFT_0 + small * (SOFT_1 + small * (SOFT_2 + small * (SOFT_3 + small * high)))


@triton.jit
def slope_of_link(product, LINK: tl.constexpr):
    """Return the derivative of an edge, as a natural logarithm, by its product, as a natural number."""
    if LINK == BOUNDED_LOG_SIGMOID:
        square = product * product
        slope = 0.5 - product * (
            ODD_0 + square * (ODD_1 + square * (ODD_2 + square * (ODD_3 + square * ODD_4)))
        )
    elif LINK == LOG_SIGMOID:
        small = tl.exp2(-tl.abs(product))
        slope = tl.where(product < 0.0, 1.0, small) / (1.0 + small)
    elif LINK == NEGATIVE_EXP:
        slope = -tl.exp2(product)
    else:
        slope = product * 0.0 + 1.0
    return slope


@triton.jit
def as_runs(numbers, ROWS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, SPLIT: tl.constexpr):
    """Return a tile as the runs of those who share its rows, [ROWS, owners, run]: no number changes its thread."""
    RUN: tl.constexpr = BLOCK // (LANES * SPLIT)
    runs = tl.permute(tl.reshape(numbers, [ROWS, SPLIT, RUN // 2, LANES, 2]), [0, 1, 3, 2, 4])
    return tl.reshape(runs, [ROWS, LANES * SPLIT, RUN])


@triton.jit
def of_runs(runs, ROWS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, SPLIT: tl.constexpr):
    """Return the tile of runs."""
    RUN: tl.constexpr = BLOCK // (LANES * SPLIT)
    numbers = tl.permute(tl.reshape(runs, [ROWS, SPLIT, LANES, RUN // 2, 2]), [0, 1, 3, 2, 4])
    return tl.reshape(numbers, [ROWS, BLOCK])


@triton.jit
def sums_behind(
    numbers, carry, ROWS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, SPLIT: tl.constexpr
):
    """Return for each key of a tile the sum of the numbers of all keys behind it, and for each row that of all keys.

    `carry` [ROWS] is the sum of the tiles behind.
    """
    OWNERS: tl.constexpr = LANES * SPLIT
    runs = as_runs(numbers, ROWS, BLOCK, LANES, SPLIT)
    ahead, carry = owners_behind(tl.sum(runs, 2), carry, ROWS, OWNERS)
    sums, _ = run_behind(runs, ahead, ROWS, OWNERS, BLOCK // OWNERS, False)
    return of_runs(sums, ROWS, BLOCK, LANES, SPLIT), carry


@triton.jit
def sums_apart(
    numbers, carry, ROWS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, SPLIT: tl.constexpr
):
    """Return what `sums_behind` does in two parts: runs [ROWS, owners, run], and [ROWS, owners] for all of a run."""
    OWNERS: tl.constexpr = LANES * SPLIT
    runs = as_runs(numbers, ROWS, BLOCK, LANES, SPLIT)
    sums, totals = run_behind(runs, 0.0, ROWS, OWNERS, BLOCK // OWNERS, True)
    ahead, carry = owners_behind(totals, carry, ROWS, OWNERS)
    return sums, ahead, carry


@triton.jit
def owners_behind(totals, carry, ROWS: tl.constexpr, COUNT: tl.constexpr):
    """Return the sum of what the threads behind each thread have, and that of all: two exchanges for each doubling."""
    if COUNT == 1:
        ahead = tl.reshape(carry, [ROWS, 1])
        carry += tl.reshape(totals, [ROWS])
    else:
        later = (tl.arange(0, 2) == 1)[None, None, :]
        pairs = tl.reshape(totals, [ROWS, COUNT // 2, 2])
        neighbour = tl.sum(tl.where(later, pairs, 0.0), 2)
        of_pairs, carry = owners_behind(tl.sum(pairs, 2), carry, ROWS, COUNT // 2)
        ahead = tl.where(later, 0.0, neighbour[:, :, None]) + of_pairs[:, :, None]
        ahead = tl.reshape(ahead, [ROWS, COUNT])
    return ahead, carry


@triton.jit
def run_behind(
    numbers, ahead, ROWS: tl.constexpr, LANES: tl.constexpr, COUNT: tl.constexpr, LAST: tl.constexpr
):
    """Return the sums of what stands behind each number of the last axis, and those of all: from the last one on.

    `ahead` [ROWS, LANES] is what stands behind them; LAST: nothing does.
    """
    if COUNT == 1:
        own = tl.reshape(numbers, [ROWS, LANES])
        if LAST:
            sums = tl.zeros([ROWS, LANES, 1], tl.float32)
            ahead = own
        else:
            sums = tl.reshape(ahead, [ROWS, LANES, 1])
            ahead += own
    else:
        halves = tl.permute(tl.reshape(numbers, [ROWS, LANES, 2, COUNT // 2]), [0, 1, 3, 2])
        early, late = tl.split(halves)
        late_sums, ahead = run_behind(late, ahead, ROWS, LANES, COUNT // 2, LAST)
        early_sums, ahead = run_behind(early, ahead, ROWS, LANES, COUNT // 2, False)
        halves = tl.permute(tl.join(early_sums, late_sums), [0, 1, 3, 2])
        sums = tl.reshape(halves, [ROWS, LANES, COUNT])
    return sums, ahead


@triton.jit
def rows_of(START, token, first, places, size, axis, AXIS: tl.constexpr, NEAR: tl.constexpr):
    """Load the rows `places` of a tile from `first` on, AXIS numbers each.

    NEAR tiles may end behind the last row, which then stands for those that are not there: nobody looks at them.
    """
    if NEAR:
        places = tl.minimum(places, size - 1 - first)
    pointers = START + first.to(tl.int64) * token + places[:, None] * token + axis[None, :]
    if AXIS < axis.shape[0]:
        rows = tl.load(pointers, mask=(axis < AXIS)[None, :], other=0.0)
    else:
        rows = tl.load(pointers)
    return rows


@triton.jit
def edges_of(product, at, key_at, LINK: tl.constexpr, NEAR: tl.constexpr):
    """Return the edges of a tile; NEAR tiles have keys that lie ahead of some row.

    A key behind which a row stands no more has no edge to it.
    """
    edges = linked(product, LINK)
    if NEAR:
        edges = tl.where(key_at[None, :] <= at[:, None], edges, 0.0)
    return edges


@triton.jit
def path_behind(
    product, carry, at, key_at, LINK: tl.constexpr, NEAR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    LANES: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Return the sums of the edges behind each key and behind the tile."""
    return sums_behind(edges_of(product, at, key_at, LINK, NEAR), carry, ROWS, BLOCK, LANES, SPLIT)


@triton.jit
def hidden(logits, at, key_at, keys, window, NEAR: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Return logits without those of keys that a row may not see."""
    if NEAR or WINDOW:
        seen = key_at[None, :] < keys
        if CAUSAL:
            seen = seen & (key_at[None, :] <= at[:, None])
        if WINDOW:
            seen = seen & (key_at[None, :] > at[:, None] - window)
        logits = tl.where(seen, logits, -float("inf"))
    return logits


@triton.jit
def any_gains(length, NORMS, blocks, slope, carry, level, rounded_away, KEY_BLOCK: tl.constexpr):
    """Return whether some row could gain from the first tiles of keys, whose weights a smaller bias only lowers.

    `length` is scale |q| as a power of two, NORMS the largest |k| up to the end of each tile. All those keys together
    weigh at most their number times the largest; where that is `rounded_away` below `level` the row has all it needs.
    """
    blocks = tl.maximum(blocks, 1)
    highest = length * tl.load(NORMS + blocks - 1) + slope * carry
    least = level - rounded_away - tl.log2((blocks * KEY_BLOCK).to(tl.float32))
    # What is no number is no reason to leave.
    gains = tl.where(highest < least, 0, 1)
    return (tl.max(gains, 0) > 0) | (slope < 0.0)


@triton.jit
def edge_changes(
    changes, steep, walked, at, key_at, NEAR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    LANES: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Return the gradients of the products of a tile, and the sum of all `changes` walked over so far.

    `steep` is minus the slope times the derivative of the link. The edge of a key is part of the bias of all keys
    before
    it. Its gradient is the sum of theirs, which is minus that of the key itself and of all behind it, as the gradients
    of
    a row's logits add up to zero.
    """
    behind, walked = sums_behind(changes, walked, ROWS, BLOCK, LANES, SPLIT)
    by_product = (behind + changes) * steep
    if NEAR:
        by_product = tl.where(key_at[None, :] <= at[:, None], by_product, 0.0)
    return by_product, walked
