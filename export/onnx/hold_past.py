"""Hand the cache to the attention that reads it: the operator appends the new keys and values itself.

What: keys and values that are those of a cache with new ones behind them, read by one attention alone, or by the
    branches of one choice: then each of them appends, and one of them by its attention.
Leaves alone: keys with columns beside them, a cache that something else reads, a causality that is an attribute.
Ensures: the grown cache is the operator's own output, under the name it had, and the scale stands on the queries:
    ONNX Runtime multiplies one row by keys three times as fast where no factor is asked of the product.
"""

from __future__ import annotations

import onnx_ir as ir

from grape_compile.export.onnx.builder import FLOAT, MICROSOFT, Builder, joined, sizes

#: Where queries, keys, values, the caches and the outputs of keys and values stand.
_OPERATORS = {("", "Attention"): (4, 5), (MICROSOFT, "MultiHeadAttention"): (6, 7)}


def hold_past(graph: ir.Graph) -> int:
    """Let attention take its cache, in place, and return how many do."""
    for choice in [node for node in graph if node.op_type == "If"]:
        _sink(choice)
    graphs = [graph, *(branch for node in graph for branch in _branches(node))]
    return sum(_hold(each, node, graph) for each in graphs for node in list(each) if _is_attention(node))


def _is_attention(node: ir.Node) -> bool:
    return (node.domain, node.op_type) in _OPERATORS


def _branches(node: ir.Node) -> list[ir.Graph]:
    """The graphs that an If chooses between."""
    if node.op_type != "If":
        return []
    return [node.attributes[name].as_graph() for name in ("then_branch", "else_branch")]


def _sink(choice: ir.Node) -> None:
    """Let the branches of an If append to the caches that one of them hands to attention, if nobody else reads them."""
    branches = _branches(choice)
    attention = next((node for branch in branches for node in branch if _is_attention(node)), None)
    if attention is None:
        return
    appends = [_appended(attention, place) for place in (1, 2)]
    own = {node for branch in branches for node in branch.all_nodes()}
    for append in appends:
        if append is None or any(user not in own for user, _ in append.outputs[0].uses()):
            return
    for append in appends:
        assert append is not None
        _append_within(choice, append)


def _append_within(choice: ir.Node, append: ir.Node) -> None:
    """Let every branch append to a cache, and the choice return what it became."""
    grown, graph = append.outputs[0], append.graph
    assert graph is not None
    choice.resize_outputs(len(choice.outputs) + 1)
    chosen = choice.outputs[-1]
    chosen.type, chosen.shape = grown.type, grown.shape
    for branch in _branches(choice):
        inner = ir.Node("", append.op_type, append.inputs, append.attributes.values(), num_outputs=1)
        own, result = set(branch.all_nodes()), inner.outputs[0]
        result.name, result.type = f"{branch.name}_{grown.name}", grown.type
        result.shape = ir.Shape([size if isinstance(size, int) else None for size in sizes(grown)])
        branch.insert_before(branch[0], inner)
        for user, at in tuple(grown.uses()):
            if user in own:
                user.replace_input_with(at, result)
        branch.outputs.append(result)
    chosen.name, grown.name = grown.name, f"{grown.name}_before"
    ir.convenience.replace_all_uses_with(grown, chosen, replace_graph_outputs=True)
    graph.remove(append, safe=True)


def _hold(graph: ir.Graph, node: ir.Node, root: ir.Graph) -> bool:
    places = _OPERATORS[node.domain, node.op_type]
    grown = [_grown(node, place) for place in (1, 2)]
    if grown[0] is None or grown[1] is None or len(node.outputs) != 1:
        return False
    if any(node.attributes.get_int(name, 0) for name in ("is_causal", "unidirectional")):
        return False
    if len(node.inputs) > places[0] and any(value is not None for value in node.inputs[places[0] :]):
        return False
    (past_key, new_key), (past_value, new_value) = (tuple(each.inputs) for each in grown if each is not None)
    if past_key is None or new_key is None or past_value is None or new_value is None:
        return False
    builder = Builder(graph, node, root)
    inputs = [*node.inputs, *(None,) * (places[0] - len(node.inputs)), past_key, past_value]
    news = [new_key, new_value]
    if node.domain == MICROSOFT:
        # With a cache the operator takes new keys and values by token.
        news = [joined(builder, new) for new in news]
    inputs[1:3] = news
    attributes = dict(node.attributes)
    query = node.inputs[0]
    if query is not None and _may_be_scaled(node, query):
        factor = builder.constant(node.attributes["scale"].as_float(), FLOAT)
        shape = None if query.shape is None else sizes(query)  # a value of a branch has none
        inputs[0] = builder.op("Mul", query, factor, shape=shape)
        attributes["scale"] = ir.AttrFloat32("scale", 1.0)
    held = ir.Node(
        node.domain,
        node.op_type,
        inputs,
        list(attributes.values()),
        num_outputs=3,
        name=f"{node.name}_past",
    )
    held.metadata_props.update(node.metadata_props)
    old = [node.outputs[0], *(each.outputs[0] for each in grown if each is not None)]
    graph.insert_before(node, held)
    for value, new in zip(old, held.outputs, strict=True):
        new.shape, new.type = value.shape, value.type
        new.name, value.name = value.name, f"{value.name}_before"
        ir.convenience.replace_all_uses_with(value, new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    return True


def _may_be_scaled(node: ir.Node, query: ir.Value) -> bool:
    """Whether the scale is told, and nothing is added to the queries before they are multiplied by it."""
    scale = node.attributes.get_float("scale", 0.0)
    added = node.domain == MICROSOFT and len(node.inputs) > 3 and node.inputs[3] is not None
    return scale not in (0.0, 1.0) and not added and query.dtype == FLOAT


def _grown(node: ir.Node, place: int) -> ir.Node | None:
    """What appends new tokens to a cache for this operand and nothing else."""
    source = _appended(node, place)
    alone = source is not None and all(user is node for user, _ in source.outputs[0].uses())
    return source if alone else None


def _appended(node: ir.Node, place: int) -> ir.Node | None:
    """What appends new tokens to a cache that this operand is."""
    value = node.inputs[place]
    source = None if value is None else value.producer()
    if value is None or source is None or source.op_type != "Concat" or len(source.inputs) != 2:
        return None
    if value.shape is None or len(value.shape) != 4 or source.attributes.get_int("axis", 0) not in (2, -2):
        return None
    past = source.inputs[0]
    return None if past is None or not past.is_graph_input() else source
