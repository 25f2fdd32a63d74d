"""How the compiler and the transforms of `torch.func` see into an operator that `torch.export` keeps whole."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch._library.autograd import make_autograd_impl
from torch._subclasses.functional_tensor import FunctionalTensorMode

from grape_compile.operators.constants import Use, used_as


def decompose_when_compiled(
    operator: Any, body: Callable[..., Any], when: Callable[..., bool] = lambda *_: True
) -> None:
    """Let AOTAutograd trace through the body of those calls of a custom operator, and `torch.export` keep their node.

    This is what `torch.library.triton_op` registers, without its search of the body for Triton kernels: that
    search imports Triton (or warns that it is missing) while this package is being imported.
    """

    def dispatch(mode: Any, op: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _is_exporting() or not when(*args):
            return mode.__torch_dispatch__(op, types, args, kwargs)
        with mode, used_as(Use.COMPILED):
            return body(*args, **kwargs)

    operator.register_torch_dispatch(FunctionalTensorMode, dispatch)


def _is_compiling() -> bool:
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FUNCTIONAL)
    return mode is not None and not _is_exporting()


def _is_exporting() -> bool:
    # Deferred: torch.export loads much that an eager user of the operators never needs.
    from torch.export._trace import custom_triton_ops_decomposition_disabled

    return bool(custom_triton_ops_decomposition_disabled())


def define_for_transforms(
    operator: Any, definition: Callable[..., Any], when_compiled: Callable[..., bool] | None = None
) -> None:
    """Let `torch.func.grad`, `vjp`, `jvp` and what is made of them differentiate the definition of a custom operator.

    So does AOTAutograd with the calls that `when_compiled` chooses: a compiler fuses their definition.

    torch gives a custom operator an old-style autograd function, which these transforms refuse. The definition is plain
    torch, so that they see through it, to any order; without a transform the operator's own gradients are taken.
    """
    own = make_autograd_impl(operator._opoverload, operator)

    def differentiate(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return definition(*args, **kwargs)
        if when_compiled is not None and _is_compiling() and when_compiled(*args):
            with used_as(Use.COMPILED):
                return definition(*args, **kwargs)
        return own(keyset, *args, **kwargs)

    if when_compiled is not None:
        # Without gradients, in inference mode, the call does not come by the implementation above.
        decompose_when_compiled(operator, definition, when_compiled)
    with warnings.catch_warnings():
        # torch says that a kernel it registered itself is replaced.
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
        operator._lib.impl(operator._name, differentiate, "Autograd", with_keyset=True, allow_override=True)
