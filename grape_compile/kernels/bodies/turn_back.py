"""The kernel of the way back: gradients of both tensors and of the angles in one pass over heads and cotangents.

A program takes BLOCK tokens of one (outer, inner) place of the batch and walks all heads of both tensors, so that the
gradient of an angle is one sum, always in the same order.
"""

import triton
import triton.language as tl

from grape_compile.kernels.bodies.turn import (
    PLAIN,
    TABLES,
    angles_of,
    block_of,
    move_rest,
    put_planes,
    take_planes,
)


@triton.jit
def heads_back(
    cos_sum, sin_sum, x, x_head, x_token, g, g_head, g_token, d, d_head, d_token,
    start, rows, seen, planes, turning, cos, sin, in_table, out_table, rest_in, rest_out,
    HEADS: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr,
    IN_START: tl.constexpr, IN_RUN: tl.constexpr, IN_STEP: tl.constexpr, IN_APART: tl.constexpr,
    OUT_START: tl.constexpr, OUT_RUN: tl.constexpr, OUT_STEP: tl.constexpr, OUT_APART: tl.constexpr,
    REST_0: tl.constexpr, REST_0_WIDTH: tl.constexpr, REST_0_IN: tl.constexpr, REST_0_OUT: tl.constexpr,
    REST_1: tl.constexpr, REST_1_WIDTH: tl.constexpr, REST_1_IN: tl.constexpr, REST_1_OUT: tl.constexpr,
    TABLED: tl.constexpr, TABLED_ANGLES: tl.constexpr,
):  # fmt: skip
    """Add what the angles receive over all heads; store the gradient of the heads where `d` points somewhere.

    For TABLED_ANGLES in both sums, those of cosine and sine; else that of the angle in the second.
    """
    source = x + start * x_token + rows[:, None] * x_token
    cotangent = g + start * g_token + rows[:, None] * g_token
    target = d
    if d is not None:
        target += start * d_token + rows[:, None] * d_token
    for head in range(HEADS):
        far = tl.cast(head, tl.int64)
        at = cotangent + far * g_head
        one, two = take_planes(
            at, seen, planes, turning, out_table, COUNT, WIDTH, OUT_START, OUT_RUN, OUT_STEP, OUT_APART, ""
        )
        turned_one, turned_two = one * cos + two * sin, two * cos - one * sin
        first, second = take_planes(
            source + far * x_head, seen, planes, turning, in_table, COUNT, WIDTH, IN_START, IN_RUN, IN_STEP, IN_APART,
            "",
        )  # fmt: skip
        if TABLED_ANGLES:
            cos_sum += one * first + two * second
            sin_sum += two * first - one * second
        else:
            sin_sum += turned_two * first - turned_one * second
        if d is not None:
            to = target + far * d_head
            put_planes(
                to, turned_one, turned_two, seen, planes, turning, in_table,
                COUNT, WIDTH, IN_START, IN_RUN, IN_STEP, IN_APART,
            )  # fmt: skip
            if REST_0 > 0:
                move_rest(
                    at, to, seen, None, 1.0, 0.0, rest_out, rest_in,
                    REST_0, REST_0_WIDTH, REST_0_OUT, REST_0_IN, TABLED, PLAIN,
                )  # fmt: skip
            if REST_1 > 0:
                move_rest(
                    at, to, seen, None, 1.0, 0.0, rest_out, rest_in,
                    REST_1, REST_1_WIDTH, REST_1_OUT, REST_1_IN, False, PLAIN,
                )  # fmt: skip
    return cos_sum, sin_sum


@triton.jit
def turn_back(
    x0, x0_outer, x0_inner, x0_head, x0_token, g0, g0_outer, g0_inner, g0_head, g0_token,
    d0, d0_outer, d0_inner, d0_head, d0_token,
    x1, x1_outer, x1_inner, x1_head, x1_token, g1, g1_outer, g1_inner, g1_head, g1_token,
    d1, d1_outer, d1_inner, d1_head, d1_token,
    a, a_outer, a_inner, a_token, a_plane, b, b_outer, b_inner, b_token, b_plane, axis,
    in_table, out_table, rest_in, rest_out, by_cos, by_sin,
    tokens, inners, cos_factor, sin_factor,
    HEADS_0: tl.constexpr, HEADS_1: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr,
    IN_START: tl.constexpr, IN_RUN: tl.constexpr, IN_STEP: tl.constexpr, IN_APART: tl.constexpr,
    OUT_START: tl.constexpr, OUT_RUN: tl.constexpr, OUT_STEP: tl.constexpr, OUT_APART: tl.constexpr,
    REST_0: tl.constexpr, REST_0_WIDTH: tl.constexpr, REST_0_IN: tl.constexpr, REST_0_OUT: tl.constexpr,
    REST_1: tl.constexpr, REST_1_WIDTH: tl.constexpr, REST_1_IN: tl.constexpr, REST_1_OUT: tl.constexpr,
    TABLED: tl.constexpr, SOURCE: tl.constexpr, BY_TOKEN: tl.constexpr,
):  # fmt: skip
    """d = scale R(-sign a b) g, and the sums over heads of what the angles receive; grid (blocks * outer * inner,).

    `by_sin` [outer, inner, tokens, COUNT] gets the gradient of sign a b (`by_cos` is None), or for tables those of
    scale * cosine and sign * scale * sine in `by_cos` and `by_sin`.
    """
    place, outer, inner, start, rows, seen = block_of(tl.program_id(0), tokens, inners, BLOCK)
    planes = tl.arange(0, WIDTH)
    turning = planes < COUNT
    cos, sin = angles_of(
        a, a_outer, a_inner, a_token, a_plane, b, b_outer, b_inner, b_token, b_plane, axis,
        outer, inner, start, rows, seen, planes, turning, SOURCE, BY_TOKEN,
    )  # fmt: skip
    cos *= cos_factor
    sin *= sin_factor
    cos_sum = tl.zeros((BLOCK, WIDTH), tl.float32)
    sin_sum = tl.zeros((BLOCK, WIDTH), tl.float32)
    if d0 is not None:
        d0 += outer * d0_outer + inner * d0_inner
    cos_sum, sin_sum = heads_back(
        cos_sum, sin_sum, x0 + outer * x0_outer + inner * x0_inner, x0_head, x0_token,
        g0 + outer * g0_outer + inner * g0_inner, g0_head, g0_token, d0, d0_head, d0_token,
        start, rows, seen, planes, turning, cos, sin, in_table, out_table, rest_in, rest_out, HEADS_0, COUNT, WIDTH,
        IN_START, IN_RUN, IN_STEP, IN_APART, OUT_START, OUT_RUN, OUT_STEP, OUT_APART,
        REST_0, REST_0_WIDTH, REST_0_IN, REST_0_OUT, REST_1, REST_1_WIDTH, REST_1_IN, REST_1_OUT,
        TABLED, SOURCE == TABLES,
    )  # fmt: skip
    if HEADS_1 > 0:
        if d1 is not None:
            d1 += outer * d1_outer + inner * d1_inner
        cos_sum, sin_sum = heads_back(
            cos_sum, sin_sum, x1 + outer * x1_outer + inner * x1_inner, x1_head, x1_token,
            g1 + outer * g1_outer + inner * g1_inner, g1_head, g1_token, d1, d1_head, d1_token,
            start, rows, seen, planes, turning, cos, sin, in_table, out_table, rest_in, rest_out,
            HEADS_1, COUNT, WIDTH,
            IN_START, IN_RUN, IN_STEP, IN_APART, OUT_START, OUT_RUN, OUT_STEP, OUT_APART,
            REST_0, REST_0_WIDTH, REST_0_IN, REST_0_OUT, REST_1, REST_1_WIDTH, REST_1_IN, REST_1_OUT,
            TABLED, SOURCE == TABLES,
        )  # fmt: skip
    to = (place.to(tl.int64) * tokens + start + rows)[:, None] * COUNT + planes[None, :]
    both = seen[:, None] & turning[None, :]
    if SOURCE == TABLES:
        tl.store(by_cos + to, cos_sum, mask=both)
        tl.store(by_sin + to, sin_sum, mask=both)
    else:
        tl.store(by_sin + to, sin_sum, mask=both)
