"""Sigmoids and hyperbolic tangents of a CPU, many at a time: those of TVM are calls into the C library, one at a time.

They are expressions in the loops that TVM makes of the operators around them. Exponentials stay calls: ours, made for
weights of attention, is infinite a little too early.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from torch import fx

from grape_compile.export.tvm.importing import Converter, Importer, dtype_of
from grape_compile.kernels.tensorir import arithmetic
from grape_compile.kernels.tensorir.engine import T, Target, is_gpu, relax, tirx, tvm

Function = Callable[[Any], Any]


def activations(target: Target) -> dict[str, Converter]:
    """Return what imports calls of these functions: none for a GPU, which has instructions for them."""
    if is_gpu(target):
        return {}
    return {f"{name}.default": _each(name, function) for name, function in _FUNCTIONS.items()}


def _each(name: str, function: Function) -> Converter:
    """Return what computes a function of every number of a tensor in float32; other dtypes are left to TVM."""

    def converted(node: fx.Node, importer: Importer) -> Any:
        (given,) = node.all_input_nodes
        dtype = dtype_of(node)
        if dtype_of(given) != dtype or dtype not in ("float16", "float32"):
            return importer.emit(getattr(relax.op, name)(importer.env[given]))

        def computed(x: Any) -> Any:
            def one(*at: Any) -> Any:
                value = x[at].astype("float32")
                # Limits would make a number of what is none.
                return T.Select(tirx.isnan(value), value, function(value)).astype(dtype)

            return tvm.te.compute(x.shape, one, name=name)

        return importer.block_builder.emit_te(computed, importer.env[given])

    return converted


def _exp(x: Any) -> Any:
    return arithmetic.exp(x, arithmetic.plain)


def _tanh(x: Any) -> Any:
    return arithmetic.tanh(x, _exp, arithmetic.plain)


_FUNCTIONS: Final[dict[str, Function]] = {
    "sigmoid": lambda x: arithmetic.sigmoid(x, arithmetic.plain),
    "tanh": _tanh,
}
