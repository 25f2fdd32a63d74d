"""Multiplicative GRAPE with commuting planes: RoPE and all of its conventions are one value."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from grape_compile.encoding import checks
from grape_compile.encoding.base import SLOT, Multiplicative, check_roles
from grape_compile.encoding.clock import Clock, Steps, Tables
from grape_compile.encoding.planes import Axes, Planes, planes_of
from grape_compile.encoding.spectrum import Spectrum
from grape_compile.errors import EncodingError


@dataclass(frozen=True, slots=True)
class Rotation(Multiplicative):
    """Turns each plane by its frequency times the clock: exp(n sum_j theta_j L_j) (GRAPE 3.1, Algorithm 1).

    Plane j with input coordinates (i0, i1), output coordinates (o0, o1), angle
    a = orientation * clock * theta_j:

        y[o0] = scale * (cos a * x[i0] - sin a * x[i1])
        y[o1] = scale * (sin a * x[i0] + cos a * x[i1])

    Coordinates outside of every plane pass through unscaled: the remaining input coordinates in increasing
    order go to the remaining output coordinates in increasing order. `out` holds the output coordinates
    (None: those of `planes`). Orientation +1 is Llama's sign; angles are in radians. `scale` is a norm factor
    such as YaRN's. `basis` names an orthogonal [D, D] tensor E: y = R(x E). The E^T of E R E^T cancels
    between query and key and is not applied. `spectrum` is None exactly where the clock is `Tables`, whose
    cosines and sines replace those of clock * theta_j.
    """

    planes: Planes
    spectrum: Spectrum | None
    clock: Clock
    orientation: int = 1
    out: Planes | None = None
    basis: str | None = field(default=None, metadata=SLOT)
    scale: float = 1.0

    def __post_init__(self) -> None:
        checks.member(self, "planes", Planes)
        checks.member(self, "spectrum", Spectrum, optional=True)
        checks.member(self, "clock", Clock)
        checks.sign(self, "orientation")
        checks.member(self, "out", Planes, optional=True)
        checks.positive(self, "scale")
        if self.basis is not None:
            checks.slot(self, "basis")
        self._check_clock()
        self._check_out()
        check_roles(self)

    @property
    def head_dim(self) -> int:
        """Number of coordinates of the head."""
        return self.planes.head_dim

    @property
    def output(self) -> Planes:
        """The planes of the result: `out`, or `planes` where that is None."""
        return self.planes if self.out is None else self.out

    def inverse(self) -> Rotation:
        """Return what undoes this: opposite orientation, planes and out exchanged, scale inverted.

        Raises EncodingError with a basis: the inverse of R(x E) multiplies by E^T last, and a rotation
        multiplies first.
        """
        if self.basis is not None:
            raise EncodingError(
                f"the inverse of {self}",
                f"its basis {self.basis!r} acts before the rotation, so its inverse acts after it",
                "the inverse without the basis, followed by a product with the transposed basis",
            )
        planes, out = self.planes, self.out
        if out is not None:
            planes, out = _with_axes(out, self.planes.axes()), _with_axes(self.planes, ())
        return replace(self, planes=planes, out=out, orientation=-self.orientation, scale=1.0 / self.scale)

    def at(self, length: int) -> Rotation:
        """Return the rotation of a sequence of `length` tokens, its spectrum the one of that length."""
        return self if self.spectrum is None else replace(self, spectrum=self.spectrum.at(length))

    def canonical(self) -> Rotation:
        """Return the one of this meaning: simplest planes, `out` where it differs, i0 < i1 in plane 0.

        A plane written as (i1, i0) turns the other way, so one orientation of plane 0 stands for both.
        """
        pairs, out, orientation = self.planes.pairs(), self.output.pairs(), self.orientation
        if pairs[0][0] > pairs[0][1]:
            pairs, out, orientation = _swapped(pairs), _swapped(out), -orientation
        planes = planes_of(pairs, self.head_dim)
        axes = () if isinstance(self.clock, Tables) else self.planes.axes()
        return replace(
            self,
            planes=_with_axes(planes, axes),
            spectrum=None if self.spectrum is None else self.spectrum.canonical(),
            orientation=orientation,
            out=None if out == pairs else planes_of(out, self.head_dim),
        )

    def _check_clock(self) -> None:
        if (self.spectrum is None) != isinstance(self.clock, Tables):
            works = (
                "a spectrum, or tables as the clock"
                if self.spectrum is None
                else "none as the spectrum: tables hold the finished angles"
            )
            checks.refuse(self, "spectrum", works)
        if isinstance(self.clock, Steps) and self.planes.axis_count > 1:
            checks.refuse(self, "clock", "positions for planes of several axes: steps have one axis")

    def _check_out(self) -> None:
        if self.out is None:
            return
        count, size = self.planes.count, self.planes.head_dim
        if (self.out.count, self.out.head_dim) != (count, size):
            checks.refuse(self, "out", f"{count} planes in a head of {size}, as the input has")
        if any(self.out.axes()):
            checks.refuse(self, "out", "planes without axes: the axes belong to the input planes")


def _with_axes(planes: Planes, axes: tuple[int, ...]) -> Planes:
    """Return the same pairs with these axes; simplest form where the axes change."""
    if planes.axes() == axes or not (any(axes) or any(planes.axes())):
        return planes
    plain = planes_of(planes.pairs(), planes.head_dim)
    return Axes(plain, axes) if any(axes) else plain


def _swapped(pairs: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    return tuple((second, first) for first, second in pairs)
