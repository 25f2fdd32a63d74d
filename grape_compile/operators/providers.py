"""Who computes `grape::attend` and `grape::rotate`: declared tables; each row is a module, imported when asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Literal, Protocol, cast

import torch
from torch import Tensor

from grape_compile.errors import OperandError
from grape_compile.operators.call import AttendCall, Gradients
from grape_compile.operators.turn_call import TurnCall

if TYPE_CHECKING:
    from grape_compile.operators.decode_call import DecodeCall


class AttendKernel(Protocol):
    """What a provider of `grape::attend` defines: the module itself, or an object with these functions."""

    def supports(self, call: AttendCall) -> Literal[True] | str:
        """Return True, or a sentence that says why this call is not for this provider."""

    def forward(self, call: AttendCall) -> tuple[Tensor, Tensor]:
        """Return output and logsumexp."""

    def backward(self, call: AttendCall, gradient: Tensor, output: Tensor, logsumexp: Tensor) -> Gradients:
        """Return the gradients for a cotangent of the output."""


class TurnKernel(Protocol):
    """What a provider of `grape::rotate` defines."""

    def supports(self, call: TurnCall, outputs: Sequence[Tensor] | None = None) -> Literal[True] | str:
        """Return True, or a sentence that says why this call, into `outputs` if given, is not for this provider."""

    def forward(self, call: TurnCall, outputs: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Return every tensor turned, in new memory or in `outputs`, which may be the tensors themselves."""

    def gradients(
        self, call: TurnCall, cotangents: Sequence[Tensor], *, of_tensors: bool
    ) -> tuple[list[Tensor] | None, dict[str, Tensor]]:
        """Return the gradients of the tensors (where asked) and of the floating slots."""


class DecodeKernel(Protocol):
    """What a provider of `grape::decode` defines."""

    def supports(self, call: DecodeCall) -> Literal[True] | str:
        """Return True, or a sentence that says why this call is not for this provider."""

    def forward(self, call: DecodeCall) -> Tensor:
        """Append the new tokens to the caches and return what they see."""


@dataclass(frozen=True)
class Provider:
    """One way to compute an operator: the `module` defines what the protocol of its table names.

    It is asked about calls on its `devices` only (none named: all), the highest priority first. A provider of
    `grape::attend` that `turns_queries` itself is given them as they are. A `special` one is for calls of one kind, and
    a report does not say of the others why it left them.
    """

    name: str
    module: str
    priority: int
    devices: tuple[str, ...] = ()
    turns_queries: bool = False
    special: bool = False

    def kernel(self) -> AttendKernel:
        """Import the module of a row of `PROVIDERS` on first use."""
        return cast(AttendKernel, import_module(self.module))

    def turn_kernel(self) -> TurnKernel:
        """Import the module of a row of `TURN_PROVIDERS` on first use."""
        return cast(TurnKernel, import_module(self.module))

    def decode_kernel(self) -> DecodeKernel:
        """Import the module of a row of `DECODE_PROVIDERS` on first use."""
        return cast(DecodeKernel, import_module(self.module))


PROVIDERS: tuple[Provider, ...] = (
    Provider(
        "triton decoding", "grape_compile.kernels.decoding", priority=30, devices=("cuda",), special=True
    ),
    Provider("triton", "grape_compile.kernels.attention", priority=20, devices=("cuda",), turns_queries=True),
    Provider("triton path", "grape_compile.kernels.path", priority=18, devices=("cuda",), turns_queries=True),
    Provider("flex", "grape_compile.operators.flex", priority=15, devices=("cuda",)),
    Provider("flash_cpu", "grape_compile.operators.flash_cpu", priority=10, devices=("cpu",)),
    Provider("scanned", "grape_compile.operators.scanned", priority=5),
    Provider("chunked", "grape_compile.operators.chunked", priority=0),
)


TURN_PROVIDERS: tuple[Provider, ...] = (
    Provider("triton", "grape_compile.kernels.turning", priority=10, devices=("cuda",)),
    Provider("torch", "grape_compile.operators.plain_turn", priority=0),
)


DECODE_PROVIDERS: tuple[Provider, ...] = (
    Provider("triton decoding", "grape_compile.kernels.decoding_step", priority=10, devices=("cuda",)),
    Provider("torch", "grape_compile.operators.plain_decode", priority=0),
)


def choose(call: AttendCall, providers: Sequence[Provider] | None = None) -> Provider:
    """Return the provider of highest priority that takes the call, or raise OperandError with all reasons."""
    table = PROVIDERS if providers is None else providers
    return _first("grape::attend", call.query.device, table, lambda row: row.kernel().supports(call))


def choose_turn(call: TurnCall, outputs: Sequence[Tensor] | None = None) -> Provider:
    """Return the provider of highest priority that turns the tensors of the call, into `outputs` if given."""
    return _first(
        "grape::rotate", call.device, TURN_PROVIDERS, lambda row: row.turn_kernel().supports(call, outputs)
    )


def choose_decode(call: DecodeCall) -> Provider:
    """Return the provider of highest priority that takes a step of decoding."""
    device = call.query.device
    return _first("grape::decode", device, DECODE_PROVIDERS, lambda row: row.decode_kernel().supports(call))


def computes_angles(device: torch.device) -> bool:
    """Whether a kernel of this device makes cosines and sines itself, so that tables of them are only in the way."""
    return any(device.type in provider.devices for provider in TURN_PROVIDERS)


def turns_queries(device: torch.device) -> bool:
    """Whether a provider of attention on this device turns queries itself."""
    return any(row.turns_queries and device.type in (row.devices or (device.type,)) for row in PROVIDERS)


def turn_lowering(call: TurnCall) -> str:
    """Return what turns the tensors of a call; where a kernel of their device does not, also why."""
    return _lowering(
        "grape::rotate",
        call.device,
        TURN_PROVIDERS,
        choose_turn(call),
        lambda row: row.turn_kernel().supports(call),
    )


def attend_lowering(call: AttendCall) -> str:
    """Return what computes a call; where a kernel of its device does not, also why. On a CPU all is torch's own."""
    device = call.query.device
    if device.type == "cpu":
        return "grape::attend"
    return _lowering(
        "grape::attend", device, PROVIDERS, choose(call), lambda row: row.kernel().supports(call)
    )


def _lowering(
    operator: str,
    device: torch.device,
    providers: Sequence[Provider],
    chosen: Provider,
    supports: Callable[[Provider], Literal[True] | str],
) -> str:
    better = [row for row in providers if device.type in row.devices and row.priority > chosen.priority]
    if not better and device.type not in chosen.devices:
        return operator
    reasons = "; ".join(f"{row.name}: {supports(row)}" for row in better if not row.special)
    return f"{operator} by {chosen.name}" + (f" ({reasons})" if reasons else "")


def _first(
    operator: str,
    device: torch.device,
    providers: Sequence[Provider],
    supports: Callable[[Provider], Literal[True] | str],
) -> Provider:
    refusals = []
    for provider in sorted(providers, key=lambda row: -row.priority):
        if provider.devices and device.type not in provider.devices:
            refusals.append(f"{provider.name}: runs on {', '.join(provider.devices)}")
            continue
        answer = supports(provider)
        if answer is True:
            return provider
        refusals.append(f"{provider.name}: {answer}")
    raise OperandError(
        f"a provider of {operator}", "; ".join(refusals) or "no provider", "one of those operands"
    )
