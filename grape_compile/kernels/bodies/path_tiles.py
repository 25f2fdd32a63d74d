"""What the kernels of path biases share: the edges of a tile, and their sums from the last key of a row backwards.

A sum along the keys of a tile would cross the threads that share a row at every step. So the columns of a tile hold
its keys in another order, in which each of LANES threads owns a run of neighbouring keys: it sums its run by itself,
and the threads exchange one number each. The order is that of the accumulators of a matrix product, whose columns
2 t, 2 t + 1 (mod 8) belong to thread t of four (PTX, matrix fragments); where a thread owns a whole row, LANES is one.

Edges are logarithms to the base two, as logits are.
"""

import triton
import triton.language as tl

from grape_compile.kernels.bodies.attention_tiles import LOG2E, visible

#: What an edge is made of the product of query and key.
LOG_SIGMOID = tl.constexpr(0)
BOUNDED_LOG_SIGMOID = tl.constexpr(1)
NEGATIVE_EXP = tl.constexpr(2)
IDENTITY = tl.constexpr(3)

# Minimax polynomials. With |x| <= 1, log2 of the sigmoid is x log2(e) / 2 - 1 + x^2 EVEN(x^2), off by 6e-9, and the
# sigmoid of -x is 1/2 - x ODD(x^2), off by 4e-9. On [0, 1], log2(1 + e) is e SOFT(e), off by 6e-9 of it.
EVEN_0 = tl.constexpr(-0.18033669473851563)
EVEN_1 = tl.constexpr(0.0075122380729174725)
EVEN_2 = tl.constexpr(-0.0004954689351645593)
EVEN_3 = tl.constexpr(3.132321050830512e-05)
ODD_0 = tl.constexpr(0.2499999965344251)
ODD_1 = tl.constexpr(-0.020833160009344313)
ODD_2 = tl.constexpr(0.0020819428016635487)
ODD_3 = tl.constexpr(-0.00020687147722052595)
ODD_4 = tl.constexpr(1.667139824766058e-05)
SOFT_0 = tl.constexpr(1.4426950351389123)
SOFT_1 = tl.constexpr(-0.7213462823875272)
SOFT_2 = tl.constexpr(0.4808542354885249)
SOFT_3 = tl.constexpr(-0.36005842432925844)
SOFT_4 = tl.constexpr(0.28410215157036695)
SOFT_5 = tl.constexpr(-0.22150122904866673)
SOFT_6 = tl.constexpr(0.15414573324747716)
SOFT_7 = tl.constexpr(-0.08332928681146001)
SOFT_8 = tl.constexpr(0.029254888761597358)
SOFT_9 = tl.constexpr(-0.004816827380017442)


@triton.jit
def keys_of_columns(BLOCK: tl.constexpr, LANES: tl.constexpr):
    """Return which key of a tile each of its columns holds."""
    column = tl.arange(0, BLOCK)
    return column // 2 % LANES * (BLOCK // LANES) + column // (2 * LANES) * 2 + column % 2


@triton.jit
def linked(product, LINK: tl.constexpr):
    """Return the edges of products (GRAPE 5.2), as powers of two."""
    if LINK == BOUNDED_LOG_SIGMOID:
        square = product * product
        even = EVEN_0 + square * (EVEN_1 + square * (EVEN_2 + square * EVEN_3))
        edge = square * even + (product * (0.5 * LOG2E) - 1.0)
    elif LINK == LOG_SIGMOID:
        small = tl.exp2(-tl.abs(product) * LOG2E)
        edge = tl.minimum(product, 0.0) * LOG2E - small * soft(small)
    elif LINK == NEGATIVE_EXP:
        edge = -LOG2E * tl.exp2(product * LOG2E)
    else:
        edge = product * LOG2E
    return edge


@triton.jit
def soft(small):
    """Return log2(1 + e) / e."""
    high = SOFT_5 + small * (SOFT_6 + small * (SOFT_7 + small * (SOFT_8 + small * SOFT_9)))
    return SOFT_0 + small * (SOFT_1 + small * (SOFT_2 + small * (SOFT_3 + small * (SOFT_4 + small * high))))


@triton.jit
def slope_of_link(product, LINK: tl.constexpr):
    """Return the derivative of an edge, as a natural logarithm, by its product."""
    if LINK == BOUNDED_LOG_SIGMOID:
        square = product * product
        slope = 0.5 - product * (
            ODD_0 + square * (ODD_1 + square * (ODD_2 + square * (ODD_3 + square * ODD_4)))
        )
    elif LINK == LOG_SIGMOID:
        small = tl.exp2(-tl.abs(product) * LOG2E)
        slope = tl.where(product < 0.0, 1.0, small) / (1.0 + small)
    elif LINK == NEGATIVE_EXP:
        slope = -tl.exp2(product * LOG2E)
    else:
        slope = product * 0.0 + 1.0
    return slope


@triton.jit
def sums_behind(numbers, carry, ROWS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """Return for each key of a tile the sum of the numbers of all keys behind it, and for each row that of all keys.

    `carry` [ROWS] is the sum of the tiles behind. A thread sums its run as a tree; with four of them, two exchanges add
    what the threads of later keys have.
    """
    runs = tl.permute(tl.reshape(numbers, [ROWS, BLOCK // (2 * LANES), LANES, 2]), [0, 2, 1, 3])
    inside, totals = tree(tl.reshape(runs, [ROWS, LANES, BLOCK // LANES]), ROWS, LANES, BLOCK // LANES)
    if LANES == 1:
        ahead = carry[:, None]
        carry += tl.reshape(totals, [ROWS])
    else:
        tl.static_assert(LANES == 4)
        later = tl.arange(0, 2) == 1
        pairs = tl.reshape(totals, [ROWS, 2, 2])
        neighbour = tl.sum(tl.where(later[None, None, :], pairs, 0.0), 2)
        pair = tl.sum(pairs, 2)
        second = tl.sum(tl.where(later[None, :], pair, 0.0), 1)
        of_pairs = tl.where(later[None, :], 0.0, second[:, None]) + carry[:, None]
        of_lanes = tl.where(later[None, None, :], 0.0, neighbour[:, :, None]) + of_pairs[:, :, None]
        ahead = tl.reshape(of_lanes, [ROWS, LANES])
        carry += tl.sum(pair, 1)
    runs = tl.reshape(inside + ahead[:, :, None], [ROWS, LANES, BLOCK // (2 * LANES), 2])
    return tl.reshape(tl.permute(runs, [0, 2, 1, 3]), [ROWS, BLOCK]), carry


@triton.jit
def tree(numbers, ROWS: tl.constexpr, LANES: tl.constexpr, COUNT: tl.constexpr):
    """Return the sums of what stands behind each number of the last axis, and those of all."""
    if COUNT == 1:
        sums = numbers * 0.0
        totals = tl.reshape(numbers, [ROWS, LANES])
    else:
        even, odd = tl.split(tl.reshape(numbers, [ROWS, LANES, COUNT // 2, 2]))
        behind, totals = tree(even + odd, ROWS, LANES, COUNT // 2)
        sums = tl.reshape(tl.join(behind + odd, behind), [ROWS, LANES, COUNT])
    return sums, totals


@triton.jit
def rows_of(START, token, first, places, size, axis, AXIS: tl.constexpr, NEAR: tl.constexpr):
    """Load the rows `places` of a tile from `first` on, AXIS numbers each; with NEAR those that there are, zero else."""
    pointers = START + first.to(tl.int64) * token + places[:, None] * token + axis[None, :]
    known = (axis < AXIS if AXIS < axis.shape[0] else axis >= 0)[None, :]
    if NEAR:
        known = known & (first + places < size)[:, None]
    return tl.load(pointers, mask=known, other=0.0)


@triton.jit
def biased(
    scores, product, carry, slope, factor, at, key_at, keys, window, LINK: tl.constexpr, NEAR: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Return logits, what stands behind each key, and behind the tile; NEAR tiles have keys that some row may not see.

    A key behind which a row stands no more has no edge to it.
    """
    edges = linked(product, LINK)
    if NEAR:
        edges = tl.where(key_at[None, :] <= at[:, None], edges, 0.0)
    sums, carry = sums_behind(edges, carry, ROWS, BLOCK, LANES)
    logits = scores * factor + sums * slope
    if NEAR or WINDOW:
        seen = visible(at[:, None], key_at[None, :], keys, window, CAUSAL, WINDOW)
        logits = tl.where(seen, logits, -float("inf"))
    return logits, sums, carry


@triton.jit
def any_gains(length, NORMS, blocks, slope, carry, level, rounded_away, KEY_BLOCK: tl.constexpr):
    """Return whether some row could gain from the first tiles of keys, whose weights a smaller bias only lowers.

    `length` is scale |q| as a power of two, NORMS the largest |k| up to the end of each tile. All those keys together
    weigh at most their number times the largest; where that is `rounded_away` below `level` the row has all it needs.
    """
    highest = length * tl.load(NORMS + tl.maximum(blocks - 1, 0)) + slope * carry
    least = level - rounded_away - tl.log2((blocks * KEY_BLOCK).to(tl.float32))
    # What is no number is no reason to leave.
    gains = tl.where(highest < least, 0, 1)
    return (tl.max(gains, 0) > 0) | (slope < 0.0)


@triton.jit
def edge_changes(
    changes, product, walked, slope, at, key_at, LINK: tl.constexpr, NEAR: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Return the gradients of the products of a tile, and the sum of all `changes` walked over so far.

    The edge of a key is part of the bias of all keys before it. Its gradient is the sum of theirs, which is minus that
    of the key itself and of all behind it, as the gradients of a row's logits add up to zero.
    """
    behind, walked = sums_behind(changes, walked, ROWS, BLOCK, LANES)
    by_product = (behind + changes) * (slope_of_link(product, LINK) * -slope)
    if NEAR:
        by_product = tl.where(key_at[None, :] <= at[:, None], by_product, 0.0)
    return by_product, walked
