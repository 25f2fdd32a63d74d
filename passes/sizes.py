"""Sizes that a graph knows by symbols, as integers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from grape_compile.passes.graph import Unreadable, require_fake

_UNKNOWN = 6
"""A size that values decide (a number of patches): any will do, as what is read holds at all; halves and thirds are
whole numbers."""


class Sizes:
    """Turns symbolic sizes into integers: the hints of the captured example, or a chosen binding of symbols.

    A size known at run time alone has no hint; it is taken for some size within its range.
    """

    def __init__(self, binding: Mapping[Any, int] | None = None) -> None:
        self.binding = dict(binding or {})

    def __call__(self, value: Any) -> int:
        if isinstance(value, fx.Node):
            value = value.meta.get("val")
        if isinstance(value, bool | int):
            return int(value)
        if isinstance(value, torch.SymInt):
            return self._symbolic(value)
        raise Unreadable(f"{value!r} is no size")

    def _symbolic(self, value: torch.SymInt) -> int:
        expression = value.node.expr.xreplace(self.binding)
        if isinstance(expression, int) or expression.is_number:
            return int(expression)
        hint = value.node.hint
        if hint is None:
            some = getattr(
                value.node.shape_env, "optimization_hint", None
            )  # older releases of torch have none
            if some is None:
                raise Unreadable(f"{value} has no known value")
            hint = some(expression, fallback=_UNKNOWN)
        return int(hint)

    def real(self, value: torch.SymFloat) -> float:
        """A number computed from sizes, as a float."""
        expression = value.node.expr.xreplace(self.binding)
        known = expression if expression.is_number else value.node.hint
        if known is None:
            raise Unreadable(f"{value} has no known value")
        return float(known)

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Shape of a node's tensor."""
        return tuple(self(size) for size in require_fake(node).shape)
