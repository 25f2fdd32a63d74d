"""The kernel of a rotation in the plane of two vectors: x + F M F^T x, a head read once (GRAPE 2.3)."""

import triton
import triton.language as tl

from grape_compile.kernels.bodies.turn import block_of


@triton.jit
def plane_heads(
    x, x_head, x_token, y, y_head, y_token, frame_a, frame_b,
    m00, m01, m10, m11, group, start, rows, seen, columns, there, HEADS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Turn the heads of one group; the entries of M are [rows, 1], the vectors of F [1, columns]."""
    for number in tl.static_range(GROUP):
        head = group * GROUP + number
        far = tl.cast(head, tl.int64)
        both = (seen & (head < HEADS))[:, None] & there[None, :]
        at = x + start * x_token + far * x_head + rows[:, None] * x_token + columns[None, :]
        heads = tl.load(at, mask=both, other=0.0).to(tl.float32)
        along_a = tl.sum(heads * frame_a, 1)[:, None]
        along_b = tl.sum(heads * frame_b, 1)[:, None]
        moved_a = m00 * along_a + m01 * along_b
        moved_b = m10 * along_a + m11 * along_b
        turned = heads + moved_a * frame_a + moved_b * frame_b
        at = y + start * y_token + far * y_head + rows[:, None] * y_token + columns[None, :]
        tl.store(at, turned.to(y.dtype.element_ty), mask=both)


@triton.jit
def plane(
    x0, x0_outer, x0_inner, x0_head, x0_token, y0, y0_outer, y0_inner, y0_head, y0_token,
    x1, x1_outer, x1_inner, x1_head, x1_token, y1, y1_outer, y1_inner, y1_head, y1_token,
    frame, frame_outer, frame_inner, frame_row, frame_column,
    entries, entry, entries_outer, entries_inner, entries_token,
    tokens, inners,
    HEADS_0: tl.constexpr, HEADS_1: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """y = x + M(x F) F^T for both tensors; grid (groups of both * blocks * outer * inner,).

    F is [..., HEAD_DIM, 2]; the four entries of M, row by row, are `entry` apart.
    """
    groups_0: tl.constexpr = (HEADS_0 + GROUP - 1) // GROUP
    groups_1: tl.constexpr = (HEADS_1 + GROUP - 1) // GROUP
    program = tl.program_id(0)
    group = program % (groups_0 + groups_1)
    _, outer, inner, start, rows, seen = block_of(program // (groups_0 + groups_1), tokens, inners, BLOCK)
    columns = tl.arange(0, WIDTH)
    there = columns < HEAD_DIM
    vector = frame + outer * frame_outer + inner * frame_inner + columns * frame_row
    frame_a = tl.load(vector, mask=there, other=0.0)[None, :]
    frame_b = tl.load(vector + frame_column, mask=there, other=0.0)[None, :]
    at = entries + outer * entries_outer + inner * entries_inner + (start + rows) * entries_token
    m00 = tl.load(at, mask=seen, other=0.0)[:, None]
    m01 = tl.load(at + entry, mask=seen, other=0.0)[:, None]
    m10 = tl.load(at + 2 * entry, mask=seen, other=0.0)[:, None]
    m11 = tl.load(at + 3 * entry, mask=seen, other=0.0)[:, None]
    if group < groups_0:
        plane_heads(
            x0 + outer * x0_outer + inner * x0_inner, x0_head, x0_token,
            y0 + outer * y0_outer + inner * y0_inner, y0_head, y0_token, frame_a, frame_b, m00, m01, m10, m11,
            group, start, rows, seen, columns, there, HEADS_0, GROUP,
        )  # fmt: skip
    elif groups_1 > 0:
        plane_heads(
            x1 + outer * x1_outer + inner * x1_inner, x1_head, x1_token,
            y1 + outer * y1_outer + inner * y1_inner, y1_head, y1_token, frame_a, frame_b, m00, m01, m10, m11,
            group - groups_0, start, rows, seen, columns, there, HEADS_1, GROUP,
        )  # fmt: skip
