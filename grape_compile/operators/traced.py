"""How the compiler sees into an operator that `torch.export` keeps whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._subclasses.functional_tensor import FunctionalTensorMode


def decompose_when_compiled(operator: Any, body: Callable[..., Any]) -> None:
    """Let AOTAutograd trace through the body of a custom operator, and `torch.export` keep its node.

    This is what `torch.library.triton_op` registers, without its search of the body for Triton kernels: that
    search imports Triton (or warns that it is missing) while this package is being imported.
    """

    def dispatch(mode: Any, op: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Deferred: torch.export loads much that an eager user of the operators never needs.
        from torch.export._trace import custom_triton_ops_decomposition_disabled

        if custom_triton_ops_decomposition_disabled():
            return mode.__torch_dispatch__(op, types, args, kwargs)
        with mode:
            return body(*args, **kwargs)

    operator.register_torch_dispatch(FunctionalTensorMode, dispatch)
