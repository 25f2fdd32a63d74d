"""What a path bias adds to a step of decoding: the edges of a tile of keys, for queries of several heads at once.

The heads that share a key head have keys of the path of their own. Their coordinates stand beside each other, those of
one head where the queries of all other heads are zero, so that one product has the edges of all.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from grape_compile.kernels.bodies.attention_operands import LOG2E
from grape_compile.kernels.bodies.path_tiles import BOUNDED_LOG_SIGMOID, linked, sums_behind


class Path(NamedTuple):
    """Queries [ROWS, EDGE_BLOCK] of a path, slopes [ROWS, 1]; keys: a pointer, where the numbers of the first are."""

    query: Any
    slope: Any
    keys: Any
    first: Any
    token: Any
    known: Any


@triton.jit
def path_of(
    EDGE_QUERY, EDGE_KEY, SLOPES, first_head, member, token, there, query_head, query_token, key_start, key_head,
    key_token, slopes_head, EDGE: tl.constexpr, EDGE_BLOCK: tl.constexpr, MEMBERS: tl.constexpr,
):  # fmt: skip
    """Return the path of the rows of a tile, each of head `first_head + member`.

    EDGE coordinates of each of MEMBERS heads, which is one where all have the same keys.
    """
    place = tl.arange(0, EDGE_BLOCK)
    known = place < MEMBERS * EDGE
    head = first_head + member
    pointers = EDGE_QUERY + (head * query_head + token * query_token)[:, None] + (place % EDGE)[None, :]
    own = there[:, None] & known[None, :]
    if MEMBERS > 1:
        own = own & (place // EDGE == member[:, None])
    query = tl.load(pointers, mask=own, other=0.0)
    slope = tl.load(SLOPES + head * slopes_head, mask=there, other=0.0)
    first = key_start + (first_head + place // EDGE) * key_head + place % EDGE
    return Path(query, slope[:, None], EDGE_KEY, first[None, :], key_token, known[None, :])


@triton.jit
def edges_behind(
    path, carry, key_at, there, at, LINK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
    WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return for all rows the sums of the edges behind each key of a tile, and of all of them, as powers of two.

    `carry` [ROWS] is the sum of the tiles behind; the keys stand in the order of `path_tiles.keys_of_columns`. A key
    behind which a row stands no more has no edge to it. WIDTH numbers of a key are neighbours, and read at once.
    """
    places = path.first + key_at[:, None].to(tl.int64) * path.token
    places = tl.max_contiguous(tl.multiple_of(places, [1, WIDTH]), [1, WIDTH])
    key = tl.load(path.keys + places, mask=there[:, None] & path.known, other=0.0)
    product = tl.dot(path.query, tl.trans(key), input_precision=PRECISION)
    if LINK != BOUNDED_LOG_SIGMOID:
        product = product * LOG2E
    edges = tl.where(there[None, :] & (key_at[None, :] <= at), linked(product, LINK), 0.0)
    return sums_behind(edges, carry, ROWS, BLOCK, LANES, 1)
