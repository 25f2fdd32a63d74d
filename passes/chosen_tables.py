"""Refuse what turns by rows of tables that a model chose by its activations.

What: sums of activations times tables of cosines and sines of which the model kept some rows, by a mask or by indices
    that it computed (LightGlue drops keypoints it is sure of).
Why: which rows there are is known at run time alone, and what batches are padded with, zeros, turns nothing: the map of
    such a row is no rotation times the number that the others have.
Cost: one look at every node.
"""

from __future__ import annotations

from torch import fx

from grape_compile.passes.elements import PICKS, PRODUCTS
from grape_compile.passes.graph import ANGLES, Program, Taint, op_name
from grape_compile.passes.movement import MOVEMENTS
from grape_compile.passes.pieces import PADS, SCATTERS
from grape_compile.passes.plans import Miss

_CHOOSE = PICKS | {"aten::gather"}
_KEEP = MOVEMENTS | SCATTERS | PADS | {"aten::pad_sequence"}
_ADD = {"aten::add", "aten::sub"}


def turned_by_chosen_tables(program: Program) -> list[tuple[fx.Node, Miss]]:
    """Every sum of two products with such tables, and why it is left as it is."""
    chosen = _chosen(program)
    products = {
        node
        for node in program.graph.nodes
        if chosen and op_name(node) in PRODUCTS and _activations(program, node, chosen) == 1
    }
    miss = Miss(
        "chosen",
        "the tables of cosines and sines hold the rows that the model chose by its activations: which these are is "
        "known at run time alone, and rows of padding, all zeros, do not turn; turn before tokens are chosen",
        3,
        "a rotation by tables",
    )
    return [
        (node, miss)
        for node in program.graph.nodes
        if op_name(node) in _ADD and len(products & set(node.all_input_nodes)) == 2
    ]


def _chosen(program: Program) -> set[fx.Node]:
    """Tables of cosines and sines of which rows were chosen."""
    tables: set[fx.Node] = set()
    chosen: set[fx.Node] = set()
    for node in program.graph.nodes:
        name, operands = op_name(node), node.all_input_nodes
        if program.taints[node] < Taint.PARAMETER:
            if name in ANGLES or not tables.isdisjoint(operands):
                tables.add(node)
        elif (name in _CHOOSE and operands[0] in tables) or (
            name in _KEEP and not chosen.isdisjoint(operands)
        ):
            chosen.add(node)
    return chosen


def _activations(program: Program, node: fx.Node, chosen: set[fx.Node]) -> int:
    """How many activations a chosen table is multiplied with; none where there is no such table."""
    operands = set(node.all_input_nodes)
    others = [each for each in operands - chosen if program.taints[each] is Taint.DATA]
    return len(others) if operands & chosen else 0
