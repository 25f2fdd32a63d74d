"""Tell of positions that meet activations where nothing was read: what came near must not be missed in silence.

What: a product of two activations to which something made of positions is added, or that is multiplied by it, and no
    attention around it was read; a score_mod of `flex_attention` that reads positions; activations multiplied by
    cosines and by sines of positions that meet, or by a function of matrices (an exponential, an inverse) that
    positions are in, and no rotation was read there.
"""

from __future__ import annotations

from collections.abc import Container
from contextlib import suppress

import torch
from torch import Tensor, fx

from grape_compile.passes.clocks import is_positional
from grape_compile.passes.contractions import CONTRACTIONS
from grape_compile.passes.elements import COMPLEX, PICKS
from grape_compile.passes.exponentials import EXPONENTIALS, exponential_behind, is_made_of_positions
from grape_compile.passes.graph import Program, Taint, Unreadable, fake, op_name
from grape_compile.passes.memory import writes
from grape_compile.passes.movement import MOVEMENTS
from grape_compile.passes.pieces import PADS
from grape_compile.passes.plans import Miss
from grape_compile.passes.replay import Replay
from grape_compile.passes.score_terms import PASSED
from grape_compile.passes.scores import DEAD

_SCALED = {*PASSED, *MOVEMENTS, "aten::mul", "aten::div", "aten::neg"}
_MASKED = {*_SCALED, "aten::add", "aten::sub", "aten::masked_fill", "aten::where"}


def unread_biases(program: Program, replay: Replay, known: Container[fx.Node]) -> list[tuple[fx.Node, Miss]]:
    """Products of two activations, none of those `known`, with a bias made of positions, and what becomes of them."""
    products: dict[fx.Node, fx.Node | None] = {}
    told: dict[fx.Node, tuple[fx.Node, Miss]] = {}
    for node in program.graph.nodes:
        products[node] = product = _product(program, node, products)
        if (
            product is None
            or product in known
            or product in told
            or op_name(node) not in ("aten::add", "aten::sub", "aten::mul")
        ):
            continue
        others = [
            each
            for each in node.all_input_nodes
            if products.get(each) is not product and fake(each) is not None
        ]
        if len(others) != 1 or not (is_positional(others[0]) or _is_stored(program, others[0])):
            continue
        if op_name(node) == "aten::mul":
            if _weighs_keys(program, replay, others[0]):
                told[product] = node, _WEIGHED
        elif _differs(program, replay, others[0]):
            told[product] = node, _miss(program, node)
    return [
        *told.values(),
        *((node, _FLEXIBLE) for node in program.graph.nodes if _is_flexible(program, node)),
    ]


_COMPARISONS = {f"aten::{name}" for name in ("ge", "gt", "le", "lt", "eq", "ne")}
_FLEXIBLE = Miss(
    "attention",
    "flex_attention is given a score_mod that reads the numbers of query and key for more than a mask: biases are read "
    "where scores are written out or a mask is added",
    3,
    "a bias by steps",
)


def _is_flexible(program: Program, node: fx.Node) -> bool:
    """A call of `flex_attention` whose scores are changed by their places."""
    if str(node.target) != "flex_attention" or len(node.args) < 4 or not isinstance(node.args[3], fx.Node):
        return False
    body = getattr(program.module, str(node.args[3].target), None)
    if not isinstance(body, fx.GraphModule):
        return False
    places = body.graph.find_nodes(op="placeholder")[3:5]
    return any(op_name(user) not in _COMPARISONS for place in places for user in place.users)


def _is_stored(program: Program, node: fx.Node) -> bool:
    """Whether a value over keys is made of what the model keeps, and of no weight."""
    value = fake(node)
    shape = () if value is None else value.shape
    return program.taints[node] is Taint.STRUCTURE and len(shape) > 1 and str(shape[-1]) != "1"


def _product(program: Program, node: fx.Node, products: dict[fx.Node, fx.Node | None]) -> fx.Node | None:
    """The product of two activations a value is, scaled and shifted."""
    name = op_name(node)
    if program.taints[node] is not Taint.DATA:
        return None
    data = [each for each in node.all_input_nodes if program.taints[each] is Taint.DATA]
    if name in CONTRACTIONS | {"aten::baddbmm"}:
        return node if len(data) >= 2 else None
    found = {products.get(each) for each in data} - {None} if name in _MASKED else set()
    return found.pop() if len(found) == 1 and (len(data) == 1 or name in ("aten::add", "aten::sub")) else None


def _value(program: Program, replay: Replay, node: fx.Node) -> Tensor | None:
    """The numbers of a value; None for an activation, and for what cannot be replayed."""
    if program.taints[node] is Taint.DATA:
        return None
    with suppress(Unreadable):
        return replay.tensor(node)
    return None


def _differs(program: Program, replay: Replay, node: fx.Node) -> bool:
    """Whether a value adds more than one number to what it does not hide."""
    value = _value(program, replay, node)
    if value is None:
        return True
    live = value[value > DEAD]
    return live.numel() > 0 and bool((live != live[0]).any())


def _weighs_keys(program: Program, replay: Replay, node: fx.Node) -> bool:
    """Whether a factor without activations differs along its last axis, zeros aside."""
    value = _value(program, replay, node)
    if value is None or value.dim() < 2 or value.shape[-1] < 2 or value.is_complex():
        return False
    value = value.double()
    high = value.masked_fill(value == 0, -torch.inf).amax(-1)
    low = value.masked_fill(value == 0, torch.inf).amin(-1)
    return bool((high > low).any())


_WEIGHED = Miss(
    "attention",
    "a product of two activations is multiplied by numbers that positions choose, key by key (a decay, say): what is "
    "read is what is added to the scores before a softmax, such as the logarithm of a decay",
    3,
    "a bias by steps",
)


def _miss(program: Program, node: fx.Node) -> Miss:
    stale = _stale_behind(program, node)
    if stale is not None:
        return Miss(
            "memory",
            "a position bias is added to a product of two activations, but it or a mask beside it is made of what the "
            f"graph has written into in place ({stale.name} reads it), which is not looked through: make positions and "
            "masks anew in the forward pass, or of what the write returns",
            3,
            "a bias by steps or by given positions",
        )
    while len(users := [user for user in node.users if op_name(user) in _MASKED]) == 1:
        node = users[0]
    uses = ", ".join(sorted({op_name(user).removeprefix("aten::") or user.name for user in node.users}))
    return Miss(
        "attention",
        "a position bias is added to a product of two activations, but no softmax over keys and mean of values was "
        f"read behind it: what it goes on to is {uses}",
        3,
        "a bias by steps, by given positions or by a running sum",
    )


def _stale_behind(program: Program, node: fx.Node) -> fx.Node | None:
    """What reads memory that was written into, among all that is added to a product or hides a part of it."""
    added = [node]
    while len(users := [user for user in added[-1].users if op_name(user) in _MASKED]) == 1:
        added.append(users[0])
    stack = [each for step in added for each in step.all_input_nodes if each not in added]
    seen = set(stack)
    while stack:
        each = stack.pop()
        if each in program.stale or writes(each):
            return each
        inner = [] if op_name(each) in CONTRACTIONS else each.all_input_nodes
        stack += [operand for operand in inner if operand not in seen]
        seen.update(inner)
    return None


def unread_turns(program: Program, known: Container[fx.Node]) -> list[tuple[fx.Node, Miss]]:
    """Activations multiplied by cosines and by sines of positions that meet in no value that is `known`."""
    kinds: dict[fx.Node, frozenset[str]] = {}
    told: list[tuple[fx.Node, Miss]] = []
    for node in program.graph.nodes:
        kinds[node], met = _kinds(program, node, kinds)
        if met and node not in known:
            told.append((node, _no_turn(node)))
    return told


def unread_matrices(program: Program, known: Container[fx.Node]) -> list[tuple[fx.Node, Miss]]:
    """Activations multiplied by a function of matrices that positions are in, at no value that is `known`."""
    told: list[tuple[fx.Node, Miss]] = []
    for node in program.graph.nodes:
        if program.taints[node] is Taint.DATA and op_name(node) in _TIMES and node not in known:
            made = next(filter(None, (_matrices_in(program, each) for each in node.all_input_nodes)), None)
            if made is not None:
                told.append((node, _of_matrices(made)))
    return told


def _matrices_in(program: Program, node: fx.Node) -> fx.Node | None:
    """The function of matrices that an operand is a multiple of, where positions or activations are in those."""
    if program.taints[node] is Taint.DATA:
        return exponential_behind(node)
    seen, stack = {node}, [node]
    while stack:
        step = stack.pop()
        if op_name(step) in _FUNCTIONS:
            value = step.meta["val"]
            held = value[0] if isinstance(value, tuple | list) else value
            several = held.dim() > 2
            if several and is_made_of_positions(program, step):
                return step
        elif op_name(step) in _LINEAR:
            new = [each for each in step.all_input_nodes if each not in seen]
            seen.update(new)
            stack += new
    return None


def _of_matrices(made: fx.Node) -> Miss:
    return Miss(
        "generator",
        f"activations are multiplied by matrices that {op_name(made).removeprefix('aten::')} makes of positions or of "
        "given numbers, and nothing shows how they turn: what is read are exponentials of one position times one skew "
        "matrix (A - A.mT), multiplied with queries and keys as they are, and planes that turn by cosines and sines",
        3,
        "a rotation by the exponential of one position times one skew matrix",
    )


def _kinds(
    program: Program, node: fx.Node, kinds: dict[fx.Node, frozenset[str]]
) -> tuple[frozenset[str], bool]:
    """Of which angles' functions a value is a multiple, and whether those of two operands meet here."""
    name = op_name(node)
    if program.taints[node] is not Taint.DATA:
        own = {"aten::cos": {"cos"}, "aten::sin": {"sin"}, "aten::polar": {"cos", "sin"}}.get(name)
        if own is not None and is_positional(node):
            return frozenset(own), False
        passed = _hands_on(program, node, name) and (
            kind for each in node.all_input_nodes for kind in kinds.get(each, ())
        )
        return frozenset(passed or ()), False
    if name not in _LINEAR:
        return frozenset(), False
    data = [
        kinds.get(each, frozenset()) for each in node.all_input_nodes if program.taints[each] is Taint.DATA
    ]
    factors = [kinds.get(each, frozenset()) for each in node.all_input_nodes] if name in _TIMES else data
    both = frozenset(kind for each in factors for kind in each)
    return both, len(both) == 2 and not any(len(each) == 2 for each in data)


def _hands_on(program: Program, node: fx.Node, name: str) -> bool:
    """Whether a table made of tables is one still: what a layer with weights makes of a time is a condition."""
    weighs = name in CONTRACTIONS and any(
        program.taints[each] is Taint.PARAMETER for each in node.all_input_nodes
    )
    return fake(node) is not None and name in _LINEAR | _HOLDS and not weighs


_LINEAR = MOVEMENTS | CONTRACTIONS | {
    "aten::add", "aten::sub", "aten::mul", "aten::div", "aten::neg", "aten::addcmul", "aten::sum", "aten::complex",
    "aten::slice_scatter", "aten::select_scatter",
}  # fmt: skip


_FUNCTIONS = EXPONENTIALS | {
    f"aten::{name}"
    for name in (
        "linalg_solve", "linalg_solve_ex", "linalg_inv", "linalg_inv_ex", "inverse", "matrix_power",
        "linalg_matrix_power", "linalg_householder_product", "linalg_qr",
    )
}  # fmt: skip
_TIMES = CONTRACTIONS | {"aten::mul", "aten::div", "aten::addcmul"}
_HOLDS = COMPLEX | PICKS | PADS | {
    "aten::detach", "aten::embedding", "aten::gather", "aten::masked_fill", "aten::where",
}  # fmt: skip


def _no_turn(node: fx.Node) -> Miss:
    return Miss(
        "readable",
        "activations are multiplied by the cosine and the sine of positions, but what they become cannot be read as a "
        "rotation of their channels",
        1,
        "a rotation by steps",
    )
