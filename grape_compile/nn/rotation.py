"""Rotations that train: spectrum, basis and phase of Multiplicative GRAPE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor, nn

from grape_compile.encoding import (
    Accumulated,
    Axes,
    Compose,
    Encoding,
    Learned,
    NonCommuting,
    Rotation,
    Tables,
    planes_of,
)
from grape_compile.errors import EncodingError, OperandError
from grape_compile.nn.basis import OrthogonalBasis
from grape_compile.nn.spectrum import SLOWNESS, LearnedSpectrum
from grape_compile.nn.trainable import Projection, Slots, TrainableEncoding, wide

#: log(exp(0.001) - 1) to the eight bits of bfloat16, so that no dtype moves the start of a phase.
_START: Final = -6.90625


class ContextualRates(nn.Module):
    """w_t = sigmoid((W x_t + b) / 16): what each token adds to the phase that replaces its position (GRAPE 3).

    W = 0 and b = softplus^-1(1e-3) at the start, as in the authors' models: every token then counts `start`, 0.394 of
    a position. From hidden states [B, T, C] to [B, 1, T], or [B, heads, T].
    """

    def __init__(self, hidden_size: int, heads: int | None = None) -> None:
        super().__init__()
        self.proj = Projection(hidden_size, heads or 1)
        with torch.no_grad():
            self.proj.weight.zero_()
            self.proj.bias.fill_(_START)

    @property
    def start(self) -> float:
        """What each token counts at the start."""
        return float(torch.sigmoid(torch.tensor(_START / SLOWNESS)))

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.sigmoid(self.proj(hidden) / SLOWNESS).mT


class LearnedRotation(TrainableEncoding):
    """GRAPE-M from any rotation: its planes and clock, frequencies that train (GRAPE 3.1).

    `theta` starts at `frequencies`, by default those of the rotation, so that nothing changes at the start. `heads`:
    one spectrum (and basis) for each head. `basis`: a method of `OrthogonalBasis`. `context`, the size of the hidden
    states: the phase by `ContextualRates` replaces the position; frequencies are then divided by what a token counts
    at the start, which makes it the same rotation there too. Raises OperandError where frequencies are missing or
    do not fit.
    """

    def __init__(
        self,
        rotation: Rotation,
        frequencies: Sequence[float] | Tensor | None = None,
        *,
        heads: int | None = None,
        basis: str | None = None,
        context: int | None = None,
    ) -> None:
        super().__init__()
        theta = _frequencies(rotation, frequencies)
        clock = rotation.clock
        self.basis = None if basis is None else OrthogonalBasis(rotation.head_dim, basis, heads)
        self.rates = None
        self.reads_hidden = context is not None
        if context is not None:
            _check_context(rotation)
            clock = Accumulated("rates", False)
            self.rates = ContextualRates(context)
            theta = theta / self.rates.start
        self.spectrum = LearnedSpectrum(theta, heads)
        self.encoding = replace(
            rotation, spectrum=Learned("theta"), clock=clock, basis=None if basis is None else "basis"
        )

    def forward(self, hidden: Tensor, query: Tensor | None = None, key: Tensor | None = None) -> Slots:
        slots = {"theta": self.spectrum()}
        if self.basis is not None:
            slots["basis"] = self.basis()
        if self.rates is not None:
            slots["rates"] = self.rates(hidden)
        return slots


class MixedRotation(TrainableEncoding):
    """Compact non-commuting GRAPE-M: the first `mixed` / 2 planes turn by one learned generator (GRAPE App. D).

    The coordinates of these planes turn by exp(n L) with `generator` [mixed, mixed], of which the skew part counts,
    at the start the planes' own frequencies on its diagonal blocks: nothing changes there. The other planes train
    like those of `LearnedRotation`. A `basis` is of the whole head, so that both parts always commute and logits
    depend on the offset alone. Raises OperandError for rotations that it cannot take apart.
    """

    columns: Tensor
    frame: Tensor

    def __init__(
        self,
        rotation: Rotation,
        mixed: int,
        frequencies: Sequence[float] | Tensor | None = None,
        *,
        basis: str | None = None,
    ) -> None:
        super().__init__()
        theta = _frequencies(rotation, frequencies)
        _check_mixed(rotation, mixed)
        pairs, count, size = rotation.planes.pairs(), mixed // 2, rotation.head_dim
        self.register_buffer("columns", torch.tensor(pairs[:count]).flatten(), persistent=False)
        turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
        self.generator = nn.Parameter(torch.block_diag(*(float(each) * turn for each in theta[:count])))
        self.basis = None if basis is None else OrthogonalBasis(size, basis)
        self.register_buffer("frame", torch.eye(size)[:, self.columns], persistent=False)
        mixing = NonCommuting(size, rotation.clock, rotation.orientation, basis="frame")
        self.spectrum = None
        parts: tuple[Encoding, ...] = (mixing,)
        if count < len(pairs):
            self.spectrum = LearnedSpectrum(theta[count:])
            others = replace(
                rotation,
                planes=planes_of(pairs[count:], size),
                spectrum=Learned("theta"),
                basis=None if basis is None else "basis",
            )
            parts = (mixing, others)
        self.encoding = Compose(parts).canonical()

    def forward(self, hidden: Tensor, query: Tensor | None = None, key: Tensor | None = None) -> Slots:
        slots = {"generator": wide(self.generator), "frame": wide(self.frame)}
        if self.basis is not None:
            basis = self.basis()
            slots["frame"] = basis[:, self.columns]
            if self.spectrum is not None:
                slots["basis"] = basis
        if self.spectrum is not None:
            slots["theta"] = self.spectrum()
        return slots


def _frequencies(rotation: Rotation, given: Sequence[float] | Tensor | None) -> Tensor:
    count = rotation.planes.count
    if isinstance(rotation.clock, Tables) or rotation.basis is not None:
        raise OperandError(
            f"a learned spectrum for {rotation}",
            "a clock of finished cosines and sines, or a basis that is there already",
            "the rotation by positions or steps without a basis, and its frequencies",
        )
    if given is None:
        assert rotation.spectrum is not None, "a rotation has no spectrum only where its clock is `Tables`"
        try:
            given = rotation.spectrum.frequencies(count)
        except EncodingError as unknown:
            raise OperandError(
                f"a learned spectrum for {rotation}", unknown.found, f"its {count} `frequencies`"
            ) from unknown
    theta = torch.as_tensor(given, dtype=torch.float64)
    if theta.shape[-1:] != (count,) or theta.dim() != 1:
        raise OperandError(
            f"the frequencies of {rotation}",
            f"a shape of {tuple(theta.shape)}",
            f"[{count}], one for each plane",
        )
    return theta


def _check_context(rotation: Rotation) -> None:
    if isinstance(rotation.planes, Axes):
        raise OperandError(
            f"one contextual phase for {rotation}", "positions of several axes", "a rotation of one axis"
        )


def _check_mixed(rotation: Rotation, mixed: int) -> None:
    asked, count = f"{mixed} coordinates of {rotation} that mix", rotation.planes.count
    if mixed % 2 or not 4 <= mixed <= 2 * count:
        raise OperandError(asked, f"{count} planes", f"an even number from 4 to {2 * count}")
    if rotation.scale != 1.0 or rotation.out is not None or isinstance(rotation.planes, Axes):
        raise OperandError(
            asked,
            "a rotation with a scale, other planes for its output, or several axes",
            "a rotation without them, or a learned spectrum instead",
        )
