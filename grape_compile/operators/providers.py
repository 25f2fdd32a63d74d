"""Who computes `grape::attend`: one declared table; each row is a module, imported when asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Literal, Protocol, cast

from torch import Tensor

from grape_compile.errors import OperandError
from grape_compile.operators.call import AttendCall, Gradients


class AttendKernel(Protocol):
    """What a provider of `grape::attend` defines: the module itself, or an object with these functions."""

    def supports(self, call: AttendCall) -> Literal[True] | str:
        """Return True, or a sentence that says why this call is not for this provider."""

    def forward(self, call: AttendCall) -> tuple[Tensor, Tensor]:
        """Return output and logsumexp."""

    def backward(self, call: AttendCall, gradient: Tensor, output: Tensor, logsumexp: Tensor) -> Gradients:
        """Return the gradients for a cotangent of the output."""


@dataclass(frozen=True)
class Provider:
    """One way to compute `grape::attend`: the `module` defines `supports`, `forward` and `backward`.

    It is asked about calls on its `devices` only (none named: all), the highest priority first.
    """

    name: str
    module: str
    priority: int
    devices: tuple[str, ...] = ()

    def kernel(self) -> AttendKernel:
        """Import the module on first use."""
        return cast(AttendKernel, import_module(self.module))


PROVIDERS: tuple[Provider, ...] = (
    Provider("flash_cpu", "grape_compile.operators.flash_cpu", priority=10, devices=("cpu",)),
    Provider("scanned", "grape_compile.operators.scanned", priority=5),
    Provider("chunked", "grape_compile.operators.chunked", priority=0),
)


def choose(call: AttendCall, providers: Sequence[Provider] | None = None) -> Provider:
    """Return the provider of highest priority that takes the call, or raise OperandError with all reasons."""
    refusals = []
    for provider in sorted(PROVIDERS if providers is None else providers, key=lambda row: -row.priority):
        if provider.devices and call.query.device.type not in provider.devices:
            refusals.append(f"{provider.name}: runs on {', '.join(provider.devices)}")
            continue
        answer = provider.kernel().supports(call)
        if answer is True:
            return provider
        refusals.append(f"{provider.name}: {answer}")
    raise OperandError(
        "a provider of grape::attend", "; ".join(refusals) or "no provider", "one of those operands"
    )
