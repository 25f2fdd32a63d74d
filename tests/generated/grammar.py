"""The grammar: hypothesis strategies that draw programs. Earlier choices are simpler: failures shrink to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from generated import edits, spoils
from generated.attentions import BIASED, PLAIN, REPEATS
from generated.biases import ALIBI, KIN, SLOPES, WRONG
from generated.clocks import CLOCKS, FREQUENCIES, LOOK_UPS, PRODUCTS
from generated.edits import Edit
from generated.program import Angles, Program, Shape, Side, Table, conversions
from generated.spoils import Spoil
from generated.turns import TURNS, Turn

Value = TypeVar("Value")
PLACES = st.integers(0, 63)


def one_of(values: Sequence[Value]) -> SearchStrategy[Value]:
    return st.sampled_from(values)


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    dim = draw(one_of((8, 4, 12, 16)))
    width = draw(one_of([dim, *(size for size in (4, 8) if size < dim)]))
    heads = draw(one_of((2, 4)))
    return Shape(
        heads=heads,
        kv_heads=draw(one_of([heads, *(count for count in (1, 2) if count < heads)])),
        dim=dim,
        width=width,
        offset=draw(one_of(sorted({0, dim - width, (dim - width) // 2}))),
        heads_last=draw(st.booleans()),
        fused=draw(st.booleans()),
        normed=draw(st.booleans()),
    )


@st.composite
def angles(draw: st.DrawFn) -> Angles:
    clock = draw(one_of(CLOCKS))
    products = [each for each in PRODUCTS if (each.batched if clock.batched else each.single)]
    table = None
    if clock.whole and draw(st.booleans()):
        look_ups = [each for each in LOOK_UPS if not clock.batched or each.__name__ != "by_selection"]
        if clock.function.__name__ != "counted":
            look_ups = [each for each in look_ups if each.__name__ != "by_slice"]
        form = draw(one_of(("angle", "tables", "wide", "complex")))
        convert = None if form == "angle" else draw(one_of(conversions(form, draw(one_of(PAIRS)))))
        table = Table(form, draw(one_of(look_ups)), convert)
    return Angles(
        clock,
        draw(one_of(FREQUENCIES)),
        draw(one_of(("buffer", "forward", "parameter", "logarithm"))),
        draw(one_of(products)),
        table,
        without_gradient=draw(st.booleans()),
    )


PAIRS = ("halves", "neighbours")


def _turns(source: Angles, shape: Shape) -> list[Turn]:
    """The words that can turn by these angles."""
    found = [turn for turn in TURNS if turn.anywhere or not (shape.heads_last or source.clock.batched)]
    table = source.table
    if table is None or table.form == "angle":
        return found
    found = [turn for turn in found if turn.form == table.form]
    if table.form != "wide":
        return found
    halves = table.convert in conversions("wide", "halves")
    return [turn for turn in found if turn.pairs == ("halves" if halves else "neighbours")]


@st.composite
def sides(draw: st.DrawFn, source: Angles, shape: Shape) -> Side:
    turn = draw(one_of(_turns(source, shape)))
    given = "angle" if source.table is None else source.table.form
    convert = draw(one_of(conversions(turn.form, turn.pairs))) if turn.form != given else None
    return Side(turn, convert)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Any program, right or with one thing wrong."""
    shape = draw(shapes())
    kind = draw(one_of(("rotation", "bias", "both")))
    source = query = key = value = bias = slopes = None
    if kind != "bias":
        source = draw(angles())
        query, key = draw(sides(source, shape)), draw(sides(source, shape))
        value = draw(st.none() | st.none() | sides(source, shape))
    if kind != "rotation":
        bias = draw(one_of(ALIBI) | one_of(KIN) | one_of(WRONG))
        slopes = draw(one_of(SLOPES))
    parts = [part for part, each in (("query", query), ("key", key), ("bias", bias)) if each is not None]
    spoil = draw(st.none() | st.builds(Spoil, one_of(parts), one_of(spoils.KINDS), PLACES))
    door = draw(one_of(("export",) * 30 + ("compile",)))
    return Program(
        shape=shape,
        attention=draw(one_of(PLAIN if bias is None else BIASED)),
        angles=source,
        query=query,
        key=key,
        value=value,
        bias=bias,
        slopes=slopes,
        slopes_holder=draw(one_of(("buffer", "forward", "logarithm", "finished"))),
        repeat=draw(one_of(REPEATS)) if shape.kv_heads < shape.heads else None,
        spoil=spoil,
        edits=tuple(draw(st.lists(st.builds(Edit, one_of(edits.KINDS), PLACES), max_size=6))),
        decomposed=draw(one_of(("",) * 14 + ("core", "functional"))) if door == "export" else "",
        shuffle=draw(st.none() | st.none() | st.integers(0, 99)),
        dynamic=draw(one_of((False, False, False, True))),
        dtype=draw(one_of((torch.float64, torch.float64, torch.float32))),
        length=draw(one_of((7, 6, 9))),
        door=door,
        gradients=draw(one_of((False, False, False, True))),
    )
