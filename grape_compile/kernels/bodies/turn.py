"""One kernel that turns queries and keys: forward, backward with the opposite sign, in place or into other memory.

A program takes BLOCK tokens of one (outer, inner) place of the batch and GROUP heads of one of the two tensors, so that
an angle is computed once for all heads of the group. Plane j of a tensor is the pair of coordinates

    first = START + (j // RUN) * STEP + j % RUN,    second = first + APART

which is half (RUN = APART = planes), interleaved (RUN = APART = 1, STEP = 2) and halves of several axes side by side;
with RUN = 0 the pairs are read from a table.
"""

import triton
import triton.language as tl

from grape_compile.kernels.bodies.angles import cos_sin, cos_sin_exact

#: Where angles come from.
STEPS = tl.constexpr(0)
POSITIONS = tl.constexpr(1)
EXACT = tl.constexpr(2)
TABLES = tl.constexpr(3)

#: What is normalised: nothing, a head before it turns, a head after, all heads of a token before they turn.
PLAIN = tl.constexpr(0)
BEFORE = tl.constexpr(1)
AFTER = tl.constexpr(2)
ACROSS = tl.constexpr(3)


@triton.jit
def block_of(program, tokens, inners, BLOCK: tl.constexpr):
    """The block of tokens of a program: its place in the batch, as one number and as outer and inner, its first token,
    its rows, and which of them there are.
    """
    blocks = tl.cdiv(tokens, BLOCK)
    start = (program % blocks).to(tl.int64) * BLOCK
    place = program // blocks
    rows = tl.arange(0, BLOCK)
    return (
        place,
        (place // inners).to(tl.int64),
        (place % inners).to(tl.int64),
        start,
        rows,
        start + rows < tokens,
    )


@triton.jit
def angles_of(
    a, a_outer, a_inner, a_token, a_plane, b, b_outer, b_inner, b_token, b_plane, axis,
    outer, inner, start, rows, seen, planes, turning,
    SOURCE: tl.constexpr, BY_TOKEN: tl.constexpr,
):  # fmt: skip
    """Cosine and sine [BLOCK, PLANES] of a block of tokens.

    `a` holds positions (a_plane is the stride of the axes) or cosines, `b` frequencies or sines.
    """
    at_a = a
    if SOURCE != STEPS:
        at_a += outer * a_outer + inner * a_inner + start * a_token
    at_b = b + outer * b_outer + inner * b_inner
    both = seen[:, None] & turning[None, :]
    if SOURCE == TABLES:
        at_b += start * b_token
        cos = tl.load(at_a + rows[:, None] * a_token + planes[None, :] * a_plane, mask=both, other=1.0)
        sin = tl.load(at_b + rows[:, None] * b_token + planes[None, :] * b_plane, mask=both, other=0.0)
        return cos.to(tl.float32), sin.to(tl.float32)
    if BY_TOKEN:
        at_b += start * b_token
        frequency = tl.load(at_b + rows[:, None] * b_token + planes[None, :] * b_plane, mask=both, other=0.0)
    else:
        frequency = tl.load(at_b + planes * b_plane, mask=turning, other=0.0)[None, :]
    if SOURCE == STEPS:
        position = (start + rows)[:, None]
    elif axis is None:
        position = tl.load(at_a + rows * a_token, mask=seen, other=0)[:, None]
    else:
        of_plane = tl.load(axis + planes, mask=turning, other=0)
        position = tl.load(at_a + rows[:, None] * a_token + of_plane[None, :] * a_plane, mask=both, other=0)
    if SOURCE == EXACT:
        return cos_sin_exact(position.to(tl.float64), frequency)
    return cos_sin(position.to(tl.float32) * frequency.to(tl.float32))


@triton.jit
def places(table, planes, turning, COUNT: tl.constexpr, START: tl.constexpr, RUN: tl.constexpr, STEP: tl.constexpr,
           APART: tl.constexpr):  # fmt: skip
    """Coordinates of the first and the second member of every plane."""
    if RUN == 0:
        first = tl.load(table + planes, mask=turning, other=0)
        second = tl.load(table + COUNT + planes, mask=turning, other=0)
        return first, second
    if RUN == COUNT:
        first = START + planes
    else:
        first = START + planes // RUN * STEP + planes % RUN
    return first, first + APART


@triton.jit
def take_planes(
    at, seen, planes, turning, table,
    COUNT: tl.constexpr, WIDTH: tl.constexpr, START: tl.constexpr, RUN: tl.constexpr, STEP: tl.constexpr,
    APART: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """First and second coordinate of every plane [rows, WIDTH] of the heads that `at` [rows, 1] points to, float32.

    `KEEP` tells the cache; what is read with another word is read again.
    """
    if RUN == 1 and STEP == 2 and APART == 1:
        pairs = tl.arange(0, 2 * WIDTH)
        whole = tl.load(
            at + (START + pairs)[None, :],
            mask=seen[:, None] & (pairs < 2 * COUNT)[None, :],
            other=0.0,
            eviction_policy=KEEP,
        )
        first, second = tl.split(tl.reshape(whole, (seen.shape[0], WIDTH, 2)))
    else:
        one, two = places(table, planes, turning, COUNT, START, RUN, STEP, APART)
        both = seen[:, None] & turning[None, :]
        first = tl.load(at + one[None, :], mask=both, other=0.0, eviction_policy=KEEP)
        second = tl.load(at + two[None, :], mask=both, other=0.0, eviction_policy=KEEP)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def put_planes(
    at, first, second, seen, planes, turning, table,
    COUNT: tl.constexpr, WIDTH: tl.constexpr, START: tl.constexpr, RUN: tl.constexpr, STEP: tl.constexpr,
    APART: tl.constexpr,
):  # fmt: skip
    """Store the coordinates of every plane where `take_planes` with these constants reads them."""
    kind = at.dtype.element_ty
    first, second = first.to(kind), second.to(kind)
    if RUN == 1 and STEP == 2 and APART == 1:
        pairs = tl.arange(0, 2 * WIDTH)
        whole = tl.reshape(tl.join(first, second), (seen.shape[0], 2 * WIDTH))
        tl.store(at + (START + pairs)[None, :], whole, mask=seen[:, None] & (pairs < 2 * COUNT)[None, :])
    else:
        one, two = places(table, planes, turning, COUNT, START, RUN, STEP, APART)
        both = seen[:, None] & turning[None, :]
        tl.store(at + one[None, :], first, mask=both)
        tl.store(at + two[None, :], second, mask=both)


@triton.jit
def rest_places(table, count: tl.constexpr, WIDTH: tl.constexpr, START: tl.constexpr, TABLED: tl.constexpr):
    """Coordinates START ... of a piece that does not turn, or those of a table, and which of WIDTH there are."""
    at = tl.arange(0, WIDTH)
    there = at < count
    if TABLED:
        return tl.load(table + at, mask=there, other=0), there
    return START + at, there


@triton.jit
def take_rest(
    at, seen, table, COUNT: tl.constexpr, WIDTH: tl.constexpr, START: tl.constexpr, TABLED: tl.constexpr
):
    """A piece of the coordinates that do not turn, [rows, WIDTH], float32."""
    place, there = rest_places(table, COUNT, WIDTH, START, TABLED)
    return tl.load(at + place[None, :], mask=seen[:, None] & there[None, :], other=0.0).to(tl.float32)


@triton.jit
def put_rest(
    at,
    piece,
    seen,
    table,
    COUNT: tl.constexpr,
    WIDTH: tl.constexpr,
    START: tl.constexpr,
    TABLED: tl.constexpr,
):
    """Store a piece of the coordinates that do not turn."""
    place, there = rest_places(table, COUNT, WIDTH, START, TABLED)
    tl.store(at + place[None, :], piece.to(at.dtype.element_ty), mask=seen[:, None] & there[None, :])


@triton.jit
def weights_of(weight, place, there, offset):
    """The weights of the norm at these coordinates, [1, ...], float32."""
    return (tl.load(weight + place, mask=there, other=0.0).to(tl.float32) + offset)[None, :]


@triton.jit
def squares_of(
    at, seen, planes, turning, cos, sin, in_table, rest_in,
    COUNT: tl.constexpr, WIDTH: tl.constexpr, START: tl.constexpr, RUN: tl.constexpr, STEP: tl.constexpr,
    APART: tl.constexpr, REST_0: tl.constexpr, REST_0_WIDTH: tl.constexpr, REST_0_IN: tl.constexpr,
    REST_1: tl.constexpr, REST_1_WIDTH: tl.constexpr, REST_1_IN: tl.constexpr, TABLED: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """Sum of squares of the heads that `at` points to, [rows]: as they are, or turned where NORM is AFTER."""
    first, second = take_planes(
        at, seen, planes, turning, in_table, COUNT, WIDTH, START, RUN, STEP, APART, "evict_last"
    )
    if NORM == AFTER:
        first, second = first * cos - second * sin, second * cos + first * sin
    total = tl.sum(first * first + second * second, 1)
    if REST_0 > 0:
        rest = take_rest(at, seen, rest_in, REST_0, REST_0_WIDTH, REST_0_IN, TABLED)
        total += tl.sum(rest * rest, 1)
    if REST_1 > 0:
        rest = take_rest(at, seen, rest_in, REST_1, REST_1_WIDTH, REST_1_IN, False)
        total += tl.sum(rest * rest, 1)
    return total


@triton.jit
def move_rest(
    source, target, seen, weight, factor, offset, rest_in, rest_out,
    COUNT: tl.constexpr, WIDTH: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, TABLED: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """Copy a piece of the coordinates that do not turn, normalised where heads are."""
    piece = take_rest(source, seen, rest_in, COUNT, WIDTH, IN, TABLED)
    if NORM == AFTER:
        place, there = rest_places(rest_out, COUNT, WIDTH, OUT, TABLED)
        piece *= factor * weights_of(weight, place, there, offset)
    elif NORM != PLAIN:
        place, there = rest_places(rest_in, COUNT, WIDTH, IN, TABLED)
        piece *= factor * weights_of(weight, place, there, offset)
    put_rest(target, piece, seen, rest_out, COUNT, WIDTH, OUT, TABLED)


@triton.jit
def turn_head(
    source, target, weight, seen, planes, turning, cos, sin, squares, in_table, out_table, rest_in, rest_out,
    epsilon, offset, SIZE: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr,
    IN_START: tl.constexpr, IN_RUN: tl.constexpr, IN_STEP: tl.constexpr, IN_APART: tl.constexpr,
    OUT_START: tl.constexpr, OUT_RUN: tl.constexpr, OUT_STEP: tl.constexpr, OUT_APART: tl.constexpr,
    REST_0: tl.constexpr, REST_0_WIDTH: tl.constexpr, REST_0_IN: tl.constexpr, REST_0_OUT: tl.constexpr,
    REST_1: tl.constexpr, REST_1_WIDTH: tl.constexpr, REST_1_IN: tl.constexpr, REST_1_OUT: tl.constexpr,
    TABLED: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Turn one head of a block of tokens; where it is normalised, by the mean of `squares` over SIZE."""
    first, second = take_planes(
        source, seen, planes, turning, in_table, COUNT, WIDTH, IN_START, IN_RUN, IN_STEP, IN_APART, ""
    )
    factor = 1.0
    if NORM != PLAIN:
        factor = tl.rsqrt(squares / SIZE + epsilon)[:, None]
    if NORM == BEFORE or NORM == ACROSS:
        one, two = places(in_table, planes, turning, COUNT, IN_START, IN_RUN, IN_STEP, IN_APART)
        first *= factor * weights_of(weight, one, turning, offset)
        second *= factor * weights_of(weight, two, turning, offset)
    if NORM == AFTER:
        first *= factor
        second *= factor
    out_first = first * cos - second * sin
    out_second = second * cos + first * sin
    if NORM == AFTER:
        one, two = places(out_table, planes, turning, COUNT, OUT_START, OUT_RUN, OUT_STEP, OUT_APART)
        out_first *= weights_of(weight, one, turning, offset)
        out_second *= weights_of(weight, two, turning, offset)
    put_planes(
        target, out_first, out_second, seen, planes, turning, out_table,
        COUNT, WIDTH, OUT_START, OUT_RUN, OUT_STEP, OUT_APART,
    )  # fmt: skip
    if REST_0 > 0:
        move_rest(
            source, target, seen, weight, factor, offset, rest_in, rest_out,
            REST_0, REST_0_WIDTH, REST_0_IN, REST_0_OUT, TABLED, NORM,
        )  # fmt: skip
    if REST_1 > 0:
        move_rest(
            source, target, seen, weight, factor, offset, rest_in, rest_out,
            REST_1, REST_1_WIDTH, REST_1_IN, REST_1_OUT, False, NORM,
        )  # fmt: skip


@triton.jit
def turn_heads(
    x, x_head, x_token, y, y_head, y_token, to_rows, place_token, place_row, rows_there, weight, weight_head,
    group, start, rows, seen, planes, turning, cos, sin,
    in_table, out_table, rest_in, rest_out, epsilon, offset,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr,
    IN_START: tl.constexpr, IN_RUN: tl.constexpr, IN_STEP: tl.constexpr, IN_APART: tl.constexpr,
    OUT_START: tl.constexpr, OUT_RUN: tl.constexpr, OUT_STEP: tl.constexpr, OUT_APART: tl.constexpr,
    REST_0: tl.constexpr, REST_0_WIDTH: tl.constexpr, REST_0_IN: tl.constexpr, REST_0_OUT: tl.constexpr,
    REST_1: tl.constexpr, REST_1_WIDTH: tl.constexpr, REST_1_IN: tl.constexpr, REST_1_OUT: tl.constexpr,
    TABLED: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Turn the heads of one group; x and y point to the first head of the tensor at this place of the batch."""
    source = x + start * x_token + rows[:, None] * x_token
    target = y + start * y_token + rows[:, None] * y_token
    if to_rows is not None:
        place = tl.load(to_rows + (start + rows) * place_token, mask=seen, other=0)
        place = tl.where(place < 0, place + rows_there, place)
        # Nothing outside of the memory that was given is written to.
        seen &= (place >= 0) & (place < rows_there)
        target += (place * place_row)[:, None]
    squares = tl.zeros((seen.shape[0],), tl.float32)
    if NORM == ACROSS:
        for head in range(HEADS):
            at = source + tl.cast(head, tl.int64) * x_head
            squares += squares_of(
                at, seen, planes, turning, cos, sin, in_table, rest_in,
                COUNT, WIDTH, IN_START, IN_RUN, IN_STEP, IN_APART,
                REST_0, REST_0_WIDTH, REST_0_IN, REST_1, REST_1_WIDTH, REST_1_IN, TABLED, NORM,
            )  # fmt: skip
        for head in range(HEADS):
            far = tl.cast(head, tl.int64)
            turn_head(
                source + far * x_head, target + far * y_head, weight + far * weight_head,
                seen, planes, turning, cos, sin, squares, in_table, out_table, rest_in, rest_out,
                epsilon, offset, HEAD_DIM * HEADS, COUNT, WIDTH,
                IN_START, IN_RUN, IN_STEP, IN_APART, OUT_START, OUT_RUN, OUT_STEP, OUT_APART,
                REST_0, REST_0_WIDTH, REST_0_IN, REST_0_OUT, REST_1, REST_1_WIDTH, REST_1_IN, REST_1_OUT,
                TABLED, NORM,
            )  # fmt: skip
    else:
        # Loads of several heads at once want registers, which a norm or coordinates beside the planes have taken.
        unrolled: tl.constexpr = GROUP if NORM == PLAIN and REST_0 == 0 else 1
        for number in tl.range(0, GROUP, loop_unroll_factor=unrolled):
            head = group * GROUP + number
            far = tl.cast(head, tl.int64)
            there = seen & (head < HEADS)
            at = source + far * x_head
            if NORM != PLAIN:
                squares = squares_of(
                    at, there, planes, turning, cos, sin, in_table, rest_in,
                    COUNT, WIDTH, IN_START, IN_RUN, IN_STEP, IN_APART,
                    REST_0, REST_0_WIDTH, REST_0_IN, REST_1, REST_1_WIDTH, REST_1_IN, TABLED, NORM,
                )  # fmt: skip
            turn_head(
                at, target + far * y_head, weight,
                there, planes, turning, cos, sin, squares, in_table, out_table, rest_in, rest_out,
                epsilon, offset, HEAD_DIM, COUNT, WIDTH,
                IN_START, IN_RUN, IN_STEP, IN_APART, OUT_START, OUT_RUN, OUT_STEP, OUT_APART,
                REST_0, REST_0_WIDTH, REST_0_IN, REST_0_OUT, REST_1, REST_1_WIDTH, REST_1_IN, REST_1_OUT,
                TABLED, NORM,
            )  # fmt: skip


@triton.jit
def turn(
    x0, x0_outer, x0_inner, x0_head, x0_token, y0, y0_outer, y0_inner, y0_head, y0_token,
    x1, x1_outer, x1_inner, x1_head, x1_token, y1, y1_outer, y1_inner, y1_head, y1_token,
    places0, places0_token, places0_row, places0_rows, places1, places1_token, places1_row, places1_rows,
    a, a_outer, a_inner, a_token, a_plane, b, b_outer, b_inner, b_token, b_plane, axis,
    weight0, weight0_head, weight1, weight1_head,
    in_table, out_table, rest_in, rest_out,
    tokens, inners, cos_factor, sin_factor, epsilon, offset,
    HEADS_0: tl.constexpr, HEADS_1: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr,
    IN_START: tl.constexpr, IN_RUN: tl.constexpr, IN_STEP: tl.constexpr, IN_APART: tl.constexpr,
    OUT_START: tl.constexpr, OUT_RUN: tl.constexpr, OUT_STEP: tl.constexpr, OUT_APART: tl.constexpr,
    REST_0: tl.constexpr, REST_0_WIDTH: tl.constexpr, REST_0_IN: tl.constexpr, REST_0_OUT: tl.constexpr,
    REST_1: tl.constexpr, REST_1_WIDTH: tl.constexpr, REST_1_IN: tl.constexpr, REST_1_OUT: tl.constexpr,
    TABLED: tl.constexpr, SOURCE: tl.constexpr, BY_TOKEN: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """y = scale R(sign a b) x for both tensors; grid (groups of both * blocks * outer * inner,).

    `places` name the rows of y that tokens are written to, where it has more rows than tokens.
    """
    groups_0: tl.constexpr = (HEADS_0 + GROUP - 1) // GROUP
    groups_1: tl.constexpr = (HEADS_1 + GROUP - 1) // GROUP
    program = tl.program_id(0)
    group = program % (groups_0 + groups_1)
    _, outer, inner, start, rows, seen = block_of(program // (groups_0 + groups_1), tokens, inners, BLOCK)
    planes = tl.arange(0, WIDTH)
    turning = planes < COUNT
    cos, sin = angles_of(
        a, a_outer, a_inner, a_token, a_plane, b, b_outer, b_inner, b_token, b_plane, axis,
        outer, inner, start, rows, seen, planes, turning, SOURCE, BY_TOKEN,
    )  # fmt: skip
    cos *= cos_factor
    sin *= sin_factor
    if group < groups_0:
        turn_heads(
            x0 + outer * x0_outer + inner * x0_inner, x0_head, x0_token,
            y0 + outer * y0_outer + inner * y0_inner, y0_head, y0_token,
            places0, places0_token, places0_row, places0_rows, weight0, weight0_head,
            group, start, rows, seen, planes, turning, cos, sin, in_table, out_table, rest_in, rest_out,
            epsilon, offset, HEADS_0, GROUP, HEAD_DIM, COUNT, WIDTH,
            IN_START, IN_RUN, IN_STEP, IN_APART, OUT_START, OUT_RUN, OUT_STEP, OUT_APART,
            REST_0, REST_0_WIDTH, REST_0_IN, REST_0_OUT, REST_1, REST_1_WIDTH, REST_1_IN, REST_1_OUT, TABLED, NORM,
        )  # fmt: skip
    elif groups_1 > 0:
        turn_heads(
            x1 + outer * x1_outer + inner * x1_inner, x1_head, x1_token,
            y1 + outer * y1_outer + inner * y1_inner, y1_head, y1_token,
            places1, places1_token, places1_row, places1_rows, weight1, weight1_head,
            group - groups_0, start, rows, seen, planes, turning, cos, sin, in_table, out_table, rest_in, rest_out,
            epsilon, offset, HEADS_1, GROUP, HEAD_DIM, COUNT, WIDTH,
            IN_START, IN_RUN, IN_STEP, IN_APART, OUT_START, OUT_RUN, OUT_STEP, OUT_APART,
            REST_0, REST_0_WIDTH, REST_0_IN, REST_0_OUT, REST_1, REST_1_WIDTH, REST_1_IN, REST_1_OUT, TABLED, NORM,
        )  # fmt: skip
