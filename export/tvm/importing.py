"""From a flat program to a module of Relax: TVM's importer, held to the shapes and dtypes that torch gave."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial, reduce
from operator import add, mul
from typing import Any, Final, Protocol

import sympy  # type: ignore[import-untyped]  # it has no annotations
import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._sympy.functions import FloorDiv, Max, Min, PythonMod
from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

from grape_compile.errors import CaptureError, GrapeError, first_line
from grape_compile.export.tvm.flattening import Flat
from grape_compile.kernels.tensorir.engine import IRModule, relax, tirx, tvm
from grape_compile.passes.graph import module_path, source_line

#: The function that a library holds.
MAIN: Final = "main"
_ASKED: Final = "import a program into TVM"


class Converter(Protocol):
    """Writes the call of one operator."""

    def __call__(self, node: fx.Node, importer: Importer) -> Any:
        """Return the value of a node."""


def imported(flat: Flat, converters: Mapping[str, Converter]) -> IRModule:
    """Return a module whose `main` takes the inputs and then the weights; CaptureError names what is not known.

    `converters` are by the name of an operator without its library, besides those of this file.
    """
    importer = Importer(converters)
    unknown = next((node for node in _calls(flat) if _name(node) not in importer.convert_map), None)
    if unknown is not None:
        raise CaptureError(
            _ASKED, f"{_place(unknown)}, which TVM's importer does not have", "the way by ONNX"
        )
    try:
        module = importer.from_exported_program(flat.program, False, False, False, None)
    except GrapeError:
        raise
    except Exception as failure:
        at = "" if importer.at is None else f"{_place(importer.at)}: "
        raise CaptureError(_ASKED, at + first_line(failure), "the way by ONNX") from failure
    module[MAIN] = module[MAIN].with_attr("num_input", len(flat.inputs))
    return module


def _calls(flat: Flat) -> list[fx.Node]:
    return [node for node in flat.program.graph.nodes if node.op == "call_function"]


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _place(node: fx.Node) -> str:
    at = ", ".join(part for part in (module_path(node), source_line(node)) if part)
    return f"{node.target} ({at})" if at else str(node.target)


class Importer(ExportedProgramImporter):  # type: ignore[misc]  # TVM is not annotated
    """TVM's importer, whose every value has the dtype that torch gave it, and whose sizes are torch's own.

    A size is what torch knows of it: an expression in the sizes of the inputs, in which equal ones are one symbol. `at`
    is the node that is being imported.
    """

    def __init__(self, converters: Mapping[str, Converter]) -> None:
        self._own = {**_CONVERTERS, **converters}
        self._symbols: dict[str, Any] = {}
        self._analyzer = tvm.sym.Analyzer()
        self.at: fx.Node | None = None
        super().__init__()

    def create_convert_map(self) -> dict[str, Callable[[fx.Node], Any]]:
        """Return what converts a call, by the name of its operator."""
        found = {name: self._held(convert) for name, convert in super().create_convert_map().items()}
        for name, converter in self._own.items():
            found[name] = self._held(partial(converter, importer=self))
        return {name: self._sized(convert) for name, convert in found.items()}

    def _process_derived_symbol(self, symbol: Any, variables: dict[str, Any]) -> Any:
        """Keep the variables of the sizes; every expression is one, not a variable of its own name."""
        self._symbols = variables
        return (str(symbol), None) if symbol.is_Symbol else (str(symbol), self._expression(symbol))

    def size(self, value: int | torch.SymInt) -> Any:
        """Return a size as TVM writes it."""
        return value if isinstance(value, int) else self._expression(value.node.expr)

    def sizes(self, node: fx.Node) -> list[Any]:
        """Return the shape of a node's value."""
        return [self.size(size) for size in node.meta["val"].shape]

    def emit(self, expression: Any) -> Any:
        """Bind an expression to a variable and return it."""
        return self.block_builder.emit(expression)

    def _sized(self, convert: Callable[[fx.Node], Any]) -> Callable[[fx.Node], Any]:
        def sized(node: fx.Node) -> Any:
            self.at = node
            value = node.meta.get("val")
            return self.size(value) if isinstance(value, torch.SymInt) else convert(node)

        return sized

    def _held(self, convert: Callable[[fx.Node], Any]) -> Callable[[fx.Node], Any]:
        def held(node: fx.Node) -> Any:
            if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1:
                raise CaptureError(_ASKED, f"{_place(node)} with factors", "the way by ONNX")
            result, value = convert(node), node.meta.get("val")
            is_tensor = isinstance(value, Tensor) and isinstance(
                getattr(result, "ty", None), relax.TensorType
            )
            if not is_tensor:
                return result
            if str(result.ty.dtype) != dtype_of(node):
                result = self.emit(relax.op.astype(result, dtype_of(node)))
            return self._of_sizes(result, node)

        return held

    def _of_sizes(self, result: Any, node: fx.Node) -> Any:
        """Say the sizes of a value where TVM has others, or none: what it cannot prove, torch has."""
        sizes = self.sizes(node)
        found = result.ty.shape
        if isinstance(found, relax.ShapeExpr) and all(map(self._analyzer.can_prove_equal, found, sizes)):
            return result
        return self.block_builder.match_cast(result, relax.TensorType(sizes, dtype_of(node)))

    def _expression(self, symbol: Any) -> Any:
        if symbol.is_Integer:
            return tirx.IntImm("int64", int(symbol))
        if symbol.is_Symbol:
            return self._symbols.setdefault(str(symbol), tirx.Var(str(symbol), "int64"))
        parts = [self._expression(part) for part in symbol.args]
        match symbol:
            case sympy.Add():
                return reduce(add, parts)
            case sympy.Mul():
                return reduce(mul, parts)
            case sympy.Pow() if symbol.exp.is_Integer and symbol.exp > 0:
                return reduce(mul, parts[:1] * int(symbol.exp))
            case FloorDiv():
                return tirx.floordiv(*parts)
            case PythonMod():
                return tirx.floormod(*parts)
            case Max():
                return reduce(tirx.max, parts)
            case Min():
                return reduce(tirx.min, parts)
        raise CaptureError(_ASKED, f"a size that is {symbol}", "sizes that are sums, products and quotients")


def dtype_of(node: fx.Node) -> str:
    """Return the dtype of a node's value, by the name that TVM has for it."""
    return str(node.meta["val"].dtype).removeprefix("torch.")


def _rows(node: fx.Node, importer: Importer) -> Any:
    """Rows of a table; a number past its end reads the last row instead of foreign memory."""
    table, numbers = (importer.env[each] for each in node.args[:2])
    return importer.emit(relax.op.take(table, numbers, axis=0, mode="clip"))


def _indexed(node: fx.Node, importer: Importer) -> Any:
    """Places along one axis, from the end where they are negative, and none past it."""
    given, indices = node.args
    assert isinstance(given, fx.Node)
    assert isinstance(indices, list | tuple)
    places = [(axis, each) for axis, each in enumerate(indices) if isinstance(each, fx.Node)]
    axis, index = places[0]
    size = given.meta["val"].shape[axis]
    if len(places) != 1 or index.meta["val"].dtype == torch.bool or not isinstance(size, int):
        return importer._index_tensor(node)
    numbers = _within(importer.env[index], dtype_of(index), size)
    return importer.emit(relax.op.take(importer.env[given], numbers, axis=axis, mode="clip"))


def _gathered(node: fx.Node, importer: Importer) -> Any:
    given, axis, index = node.args[:3]
    assert isinstance(given, fx.Node)
    assert isinstance(index, fx.Node)
    assert isinstance(axis, int)
    size, numbers = given.meta["val"].shape[axis], importer.env[index]
    if isinstance(size, int):
        last = relax.const(size - 1, dtype_of(index))
        numbers = relax.op.minimum(_within(numbers, dtype_of(index), size), last)
    return importer.emit(relax.op.gather_elements(importer.env[given], numbers, axis=axis))


def _within(numbers: Any, dtype: str, size: int) -> Any:
    """Count negative numbers from the end, and let none stay negative."""
    nothing = relax.const(0, dtype)
    counted = relax.op.where(
        relax.op.less(numbers, nothing), relax.op.add(numbers, relax.const(size, dtype)), numbers
    )
    return relax.op.maximum(counted, nothing)


def _clamped(node: fx.Node, importer: Importer) -> Any:
    """Whole numbers have no infinity, which TVM takes for a limit that is not given."""
    given, *limits = node.args
    if node.meta["val"].is_floating_point():
        return importer._clamp(node)
    assert isinstance(given, fx.Node)
    limits += [node.kwargs.get(name) for name in ("min", "max")][len(limits) :]
    found = importer.env[given]
    for limit, bound in zip(limits, (relax.op.maximum, relax.op.minimum), strict=True):
        if limit is not None:
            found = bound(found, relax.const(limit, dtype_of(node)))
    return importer.emit(found)


def _of_shape(form: Callable[[Any, Any], Any]) -> Converter:
    """Return what converts a call that gives a tensor another shape by `form`: nothing to do where it has it."""

    def converted(node: fx.Node, importer: Importer) -> Any:
        (given, *_) = node.args
        assert isinstance(given, fx.Node)
        if node.meta["val"].shape == given.meta["val"].shape:
            return importer.env[given]
        return importer.emit(form(importer.env[given], importer.sizes(node)))

    return converted


def _sliced(node: fx.Node, importer: Importer) -> Any:
    """As many places behind the first one as torch counted, which lie within the axis."""
    args: Any = (*node.args, *(0, None, None, 1)[len(node.args) - 1 :])
    given, axis, first, _, step = args
    axis %= len(given.meta["val"].shape)
    begin: Any = 0 if first is None else first.meta["val"] if isinstance(first, fx.Node) else first
    if not statically_known_true(begin >= 0) and not isinstance(begin, int):
        return importer._slice(node)
    return importer.emit(_part(given, axis, begin, importer.sizes(node)[axis], step, importer))


def _selected(node: fx.Node, importer: Importer) -> Any:
    """One place of an axis, from its end where it is negative."""
    args: Any = node.args
    given, axis, index = args
    if not isinstance(index, int):
        return importer._select(node)
    axis %= len(given.meta["val"].shape)
    return importer.emit(relax.op.squeeze(_part(given, axis, index, 1, 1, importer), [axis]))


def _part(given: fx.Node, axis: int, begin: Any, count: Any, step: Any, importer: Importer) -> Any:
    """So many places of an axis from `begin` on, which is counted from the end where it is a negative number."""
    size, place = importer.sizes(given)[axis], importer.size(begin)
    if isinstance(begin, int) and begin < 0:
        place = max(size + begin, 0) if isinstance(size, int) else tirx.max(size + begin, 0)
    return relax.op.strided_slice(
        importer.env[given], [axis], [place], [place + count * step], [step], assume_inbound=True
    )


def _filled(node: fx.Node, importer: Importer) -> Any:
    """One number everywhere; TVM's own constant may not be infinite."""
    number = node.args[1]
    if isinstance(number, fx.Node):
        is_like = node.target is torch.ops.aten.full_like.default
        return importer._full_like(node) if is_like else importer._full(node)
    value = relax.const(number, dtype_of(node))
    return importer.emit(relax.op.broadcast_to(value, importer.sizes(node)))


def _summed_up(node: fx.Node, importer: Importer) -> Any:
    """Running sums in the dtype of the result: truths are counted."""
    given, axis = node.args[:2]
    return importer.emit(
        relax.op.cumsum(relax.op.astype(importer.env[given], dtype_of(node)), axis, dtype_of(node))
    )


def _raised(node: fx.Node, importer: Importer) -> Any:
    """Squares and cubes are products, as torch computes them; a call into the C library takes 20 times as long."""
    args: Any = node.args
    given, exponent = args
    if exponent not in (2, 3) or not given.meta["val"].is_floating_point():
        return importer._pow(node)
    value = importer.env[given]
    wide = relax.op.astype(value, "float32") if dtype_of(node) == "float16" else value
    return importer.emit(reduce(relax.op.multiply, [wide] * int(exponent)))


def _reduced(reduce: Callable[..., Any]) -> Converter:
    def converted(node: fx.Node, importer: Importer) -> Any:
        given, *rest = node.args
        axes = list(rest[0]) if rest and rest[0] else None  # type: ignore[arg-type]  # a list, says the schema
        return importer.emit(reduce(importer.env[given], axes, bool(rest[1]) if len(rest) > 1 else False))

    return converted


_CONVERTERS: Final[Mapping[str, Converter]] = {
    "embedding.default": _rows,
    "clamp.default": _clamped,
    "index.Tensor": _indexed,
    "gather.default": _gathered,
    "slice.Tensor": _sliced,
    "select.int": _selected,
    "pow.Tensor_Scalar": _raised,
    "full.default": _filled,
    "full_like.default": _filled,
    "cumsum.default": _summed_up,
    "view.default": _of_shape(relax.op.reshape),
    "reshape.default": _of_shape(relax.op.reshape),
    "_unsafe_view.default": _of_shape(relax.op.reshape),
    "expand.default": _of_shape(relax.op.broadcast_to),
    "amax.default": _reduced(relax.op.max),
    "amin.default": _reduced(relax.op.min),
}
