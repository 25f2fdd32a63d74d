"""Calls of `grape::rotate` and `grape::attend` as functions of TensorIR; what has none is decomposed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from grape_compile.encoding import Rotation, nope, parse
from grape_compile.errors import GrapeError
from grape_compile.export.tvm.about import Place
from grape_compile.export.tvm.activations import activations
from grape_compile.export.tvm.flattening import Flat
from grape_compile.export.tvm.importing import Converter, Importer, dtype_of
from grape_compile.kernels.tensorir.attention import attention_space
from grape_compile.kernels.tensorir.attention_call import Attention
from grape_compile.kernels.tensorir.engine import PrimFunc, Target, relax
from grape_compile.kernels.tensorir.linear import linear_space
from grape_compile.kernels.tensorir.operands import Operand
from grape_compile.kernels.tensorir.replay import At, Recorded
from grape_compile.kernels.tensorir.rotation import rotation_space
from grape_compile.kernels.tensorir.space import Space
from grape_compile.kernels.tensorir.tasks import attention_task, linear_task, rotation_task, sized
from grape_compile.operators.operands import slot_names
from grape_compile.records import Task

_ROTATE, ATTEND = torch.ops.grape.rotate.default, torch.ops.grape.attend.default
#: What TVM calls a function that nothing is fused with.
OPAQUE: Final = 8


@dataclass
class Operators:
    """The functions for one target, each written once, as they were tuned where there are records of that."""

    target: Target
    recorded: Recorded
    functions: dict[Any, PrimFunc | str] = field(default_factory=dict)

    def keeps(self, operator: Any, *args: Any) -> bool:
        """Whether a call is a function of TensorIR: what `flatten` asks."""
        return all(isinstance(each, PrimFunc) for each in self._found(operator, args))

    def reason(self, text: str) -> str:
        """Return why a call with an encoding has no function; "" where none was asked for."""
        return next(
            (each for key, each in self.functions.items() if key[0] == text and isinstance(each, str)), ""
        )

    def converters(self) -> dict[str, Converter]:
        """Return what imports the calls that were kept."""
        return {
            **activations(self.target),
            "rotate.default": self._rotate,
            "attend.default": self._attend,
            "mm.default": self._product,
            "addmm.default": self._product,
            "bmm.default": self._product,
            "matmul.default": self._product,
        }

    def _found(self, operator: Any, args: Sequence[Any]) -> Iterator[PrimFunc | str]:
        if operator is _ROTATE:
            tensors, slots, text = args
            for tensor in tensors:
                yield self._turning(tensor, slots, text)
        else:
            yield self._attending(*args)

    def _turning(self, tensor: Any, slots: Sequence[Any], text: str) -> PrimFunc | str:
        operands = tuple(_operand(each) for each in (tensor, *slots))

        def at(sizes: Mapping[str, int]) -> tuple[Task, Space]:
            encoding = parse(text)
            if not isinstance(encoding, Rotation):
                raise GrapeError(text, "it is no rotation of commuting planes", "its decomposition")
            x, *values = (sized(each, sizes) for each in operands)
            named = dict(zip(slot_names(encoding), values, strict=True))
            return rotation_task(encoding, x, named), rotation_space(encoding, x, named, self.target)

        return self._once((text, operands), at)

    def _attending(
        self,
        query: Any,
        key: Any,
        value: Any,
        slots: Sequence[Any],
        text: str,
        mask: Any = None,
        is_causal: bool = False,
        scale: float | None = None,
        window: int | None = None,
        cap: float | None = None,
        sinks: Any = None,
        segments: Any = None,
    ) -> PrimFunc | str:
        if segments is not None:
            return "segments of several sequences in one"
        heads = [_operand(each) for each in (query, key, value)]
        more = {name: _operand(each) for name, each in (("mask", mask), ("sinks", sinks)) if each is not None}
        given = tuple(_operand(each) for each in slots)
        numbers: Any = {"is_causal": is_causal, "scale": scale, "window": window, "cap": cap}

        def at(sizes: Mapping[str, int]) -> tuple[Task, Space]:
            encoding = parse(text)
            values = (sized(each, sizes) for each in given)
            named = dict(zip(slot_names(encoding), values, strict=True))
            beside: Any = {name: sized(each, sizes) for name, each in more.items()}
            q, k, v = (sized(each, sizes) for each in heads)
            call = Attention(encoding, q, k, v, slots=named, **beside, **numbers)
            return attention_task(call), attention_space(call, self.target)

        return self._once((text, *heads, *more.items(), given, *numbers.values()), at)

    def _layer(self, x: Operand, weight: Operand, bias: Operand | None = None) -> PrimFunc | str:
        def at(sizes: Mapping[str, int]) -> tuple[Task, Space]:
            rows = sized(x, sizes)
            return linear_task(rows, weight, bias), linear_space(rows, weight, bias, self.target)

        return self._once(("linear", x, weight, bias), at)

    def _once(self, key: Any, at: At) -> PrimFunc | str:
        if key not in self.functions:
            self.functions[key] = _tried(lambda: at({})[1].write(self.recorded.point(at)))
        return self.functions[key]

    def _product(self, node: fx.Node, importer: Importer) -> Any:
        """A product of matrices; with the weights of a layer it is a function of its own."""
        *bias, left, right = node.args
        weight = _transposed(right)
        if weight is not None:
            function = self._layer(*(_operand(_value(each)) for each in (left, weight, *bias)))
            if isinstance(function, PrimFunc):
                given = [importer.env[each] for each in (left, weight, *bias)]
                return _called(function, given, node.meta["val"], importer)
        operands = [importer.env[each] for each in (left, right, *bias)]
        return importer.emit(_summed(dtype_of(node), *operands))

    def _rotate(self, node: fx.Node, importer: Importer) -> Any:
        arguments: tuple[Any, ...] = node.args
        tensors, slots, text = arguments
        given = [importer.env[slot] for slot in slots]
        results = []
        for tensor, value in zip(tensors, node.meta["val"], strict=True):
            function = self._turning(_value(tensor), [_value(slot) for slot in slots], text)
            results.append(_called(function, [importer.env[tensor], *given], value, importer))
        return results

    def _attend(self, node: fx.Node, importer: Importer) -> Any:
        function, tensors = self.attention_of(node)
        given = [importer.env[each] for each in tensors]
        return [_called(function, given, node.meta["val"][0], importer)]

    def attention_of(self, node: fx.Node) -> tuple[PrimFunc | str, list[fx.Node]]:
        """Return the function of a call of `grape::attend`, or why there is none, and the tensors that it takes."""
        named = _named(node)
        function = self._attending(**{name: fx.map_arg(each, _value) for name, each in named.items()})
        heads = [named[name] for name in ("query", "key", "value")]
        tensors = [*heads, named.get("mask"), named.get("sinks"), *named["slots"]]
        return function, [each for each in tensors if each is not None]


def _tried(write: Callable[[], PrimFunc]) -> PrimFunc | str:
    """Return a function, or why there is none."""
    try:
        return write()
    except GrapeError as refusal:
        return refusal.found


def _called(function: PrimFunc | str, given: Sequence[Any], value: Tensor, importer: Importer) -> Any:
    assert isinstance(function, PrimFunc), "a call that has no function is decomposed before"
    private = function.without_attr("global_symbol").with_attr("op_pattern", OPAQUE)
    name = importer.block_builder.add_func(private, str(function.attrs["global_symbol"]))
    shape = [importer.size(size) for size in value.shape]
    dtype = str(value.dtype).removeprefix("torch.")
    return importer.emit(relax.call_tir(name, list(given), relax.TensorType(shape, dtype)))


def _transposed(node: Any) -> fx.Node | None:
    """Return the matrix whose columns are the rows of a value."""
    if node.target is not torch.ops.aten.permute.default or list(node.args[1]) != [1, 0]:
        return None
    matrix = node.args[0]
    return matrix if isinstance(matrix, fx.Node) else None


def _summed(dtype: str, left: Any, right: Any, bias: Any = None) -> Any:
    """A product summed in float32 (float64 for float64) and rounded once, as torch does."""
    wide = "float32" if dtype in ("float16", "bfloat16") else dtype
    product = relax.op.matmul(left, right, out_dtype=wide)
    if bias is not None:
        product = relax.op.add(product, bias if wide == dtype else relax.op.astype(bias, wide))
    return product if wide == dtype else relax.op.astype(product, dtype)


def _named(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of a call by the names of the schema."""
    names = [argument.name for argument in ATTEND._schema.arguments]
    named: Mapping[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return {("text" if name == "encoding" else name): each for name, each in named.items()}


def _value(node: Any) -> Any:
    return node.meta["val"] if isinstance(node, fx.Node) else node


def _operand(tensor: Any) -> Operand:
    shape = tuple(size if isinstance(size, int) else str(size) for size in tensor.shape)
    return Operand(shape, str(tensor.dtype).removeprefix("torch."))


def places(program: ExportedProgram, flat: Flat, operators: Operators) -> Iterator[Place]:
    """Yield what computes each rotated tensor and each attention of a rewritten program."""
    kept = _counted(flat.program)
    for text, count in _counted(program).items():
        named = "attention" if text == str(nope()) else text
        yield from [Place(named, "TensorIR")] * min(count, kept[text])
        reason = operators.reason(text)
        yield from [Place(named, f"decomposed: {reason}" if reason else "decomposed")] * (count - kept[text])


def _counted(program: ExportedProgram) -> Counter[str]:
    """Count the rotated tensors and the attentions of a program by encoding."""
    found: Counter[str] = Counter()
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            if node.target is _ROTATE:
                found[str(node.args[2])] += len(node.args[0])
            elif node.target is ATTEND:
                found[str(_named(node)["text"])] += 1
            elif node.target is torch.ops.aten.scaled_dot_product_attention.default:
                found[str(nope())] += 1
    return found
