"""Pair the rows of a per-token matrix into planes and decide whether each plane turns."""

from __future__ import annotations

import torch

from grape_compile.encoding import Rotation, planes_of
from grape_compile.passes.angle_names import name_angle
from grape_compile.passes.coefficients import Coefficients, scaled_turns, sign_of
from grape_compile.passes.plans import Entry, Miss, Reading, RotationPlan

_NEAR = 1e-5


def name_rotation(
    reading: Reading, mixed: dict[int, list[Entry]], through: dict[int, int]
) -> RotationPlan | Miss:
    """The rotation that rows mixing two channels each (`mixed`) and rows passing one (`through`) make, or a miss."""
    return _Planes(reading, mixed, through).plan()


class _Planes:
    """Pairs rows into planes and decides whether each is a rotation."""

    def __init__(self, reading: Reading, mixed: dict[int, list[Entry]], through: dict[int, int]) -> None:
        self.reading, self.mixed, self.through = reading, mixed, through
        self.coefficients = Coefficients(reading, mixed)

    def plan(self) -> RotationPlan | Miss:
        planes = self._unturned() or self._pairs()
        if isinstance(planes, Miss):
            return planes
        ordered = self._turns(planes)
        if isinstance(ordered, Miss):
            return ordered
        pairs_in, pairs_out, cosines, sines, sign = ordered
        width = self.reading.shape[-1]
        miss = self._passing()
        if miss is not None:
            return miss
        named = name_angle(self.coefficients, cosines, sines, sign)
        if isinstance(named, Miss):
            return named
        planes_in, planes_out = planes_of(pairs_in, width), planes_of(pairs_out, width)
        out = None if planes_in == planes_out else planes_out
        encoding = Rotation(
            planes_in, named.spectrum, named.clock, orientation=sign, out=out, scale=named.scale
        )
        operator = Rotation(
            planes_in,
            named.operator_spectrum,
            named.operator_clock,
            orientation=sign,
            out=out,
            scale=named.scale,
        )
        reading = self.reading
        return RotationPlan(
            reading.source,
            reading.output,
            encoding,
            operator,
            named.operands,
            named.evidence,
            reading.region,
            reading.order,
        )

    def _unturned(self) -> Miss | None:
        """Rows that are one input channel times the number one, since the table they are in is filled up: they pass."""
        for out, entries in list(self.mixed.items()):
            ends = {entry.source: self.coefficients.resolve(out, entry.source) for entry in entries}
            left = {source: end for source, end in ends.items() if (end.kind, end.number) != ("number", 0.0)}
            if len(left) == 2:
                continue
            if [(end.kind, end.number) for end in left.values()] != [("number", 1.0)]:
                return Miss("planes", f"output channel {out} is scaled and not turned", 2)
            self.through[out] = min(left)
            del self.mixed[out]
        return None if self.mixed else Miss("mixing", "no two channels are mixed", 0)

    def _pairs(self) -> list[tuple[int, int]] | Miss:
        """Rows that combine the same two input channels, as pairs ordered by their first input channel."""
        rows: dict[tuple[int, int], list[int]] = {}
        for out, (first, second) in self.mixed.items():
            rows.setdefault((first.source, second.source), []).append(out)
        if any(len(outs) != 2 for outs in rows.values()):
            return Miss("planes", "the mixed channels do not form 2 x 2 planes", 2)
        sources = [channel for key in rows for channel in key] + list(self.through.values())
        if len(set(sources)) != len(sources):
            return Miss("planes", "an input channel appears in more than one plane", 2)
        return [(min(rows[key]), max(rows[key])) for key in sorted(rows)]

    def _passing(self) -> Miss | None:
        """Coordinates outside the planes must keep their order (the convention of `Rotation`)."""
        sources = [self.through[out] for out in sorted(self.through)]
        if sources != sorted(sources):
            return Miss("planes", "channels outside the planes are permuted", 2)
        return None

    def _turns(
        self, planes: list[tuple[int, int]]
    ) -> (
        tuple[list[tuple[int, int]], list[tuple[int, int]], list[tuple[int, int]], list[tuple[int, int]], int]
        | Miss
    ):
        """Input and output coordinates per plane, the entries holding cos and sin, and the common orientation."""
        pairs_in, pairs_out, cosines, sines, signs = [], [], [], [], []
        for first, second in planes:
            left, right = self.mixed[first][0].source, self.mixed[first][1].source
            for o0, o1 in ((first, second), (second, first)):
                diagonal = self.coefficients.compare((o0, left), (o1, right))
                across = self.coefficients.compare((o0, right), (o1, left))
                if diagonal == 1 and across == -1:
                    break
            else:
                return self._near_miss(first, second, left, right)
            pairs_in.append((left, right))
            pairs_out.append((o0, o1))
            cosines.append((o0, left))
            sines.append((o1, left))
            signs.append(
                1
                if self.coefficients.resolve(o1, left).number
                * sign_of(self.coefficients.resolve(o0, left).number)
                > 0
                else -1
            )
        if len(set(signs)) == 1:
            return pairs_in, pairs_out, cosines, sines, signs[0]
        for plane, sign in enumerate(signs):
            if sign != signs[0]:
                (left, right), (o0, o1) = pairs_in[plane], pairs_out[plane]
                pairs_in[plane], pairs_out[plane] = (right, left), (o1, o0)
                cosines[plane], sines[plane] = (o1, right), (o0, right)
        return pairs_in, pairs_out, cosines, sines, signs[0]

    def _near_miss(self, first: int, second: int, left: int, right: int) -> Miss:
        a, d = self.coefficients.values((first, left)), self.coefficients.values((second, right))
        b, c = self.coefficients.values((first, right)), self.coefficients.values((second, left))
        if torch.allclose(a, -d, atol=_NEAR) and torch.allclose(b, c, atol=_NEAR):
            return Miss(
                "reflection",
                f"channels {left} and {right} are reflected (determinant -1), not rotated",
                4,
                "a rotation of the same planes",
            )
        grams = ((a * a + c * c) - (b * b + d * d)).abs().max(), (a * b + c * d).abs().max()
        if torch.allclose(a, d, atol=_NEAR) and torch.allclose(b, -c, atol=_NEAR):
            scaled = scaled_turns((a * a + c * c)[None].sqrt(), _NEAR)
            return scaled or self._unproved((first, left), (second, right))
        return Miss(
            "orthogonal",
            f"the map of channels {left} and {right} is not a rotation times a constant: its columns differ in length "
            f"by {float(grams[0]):.2g} and their product is {float(grams[1]):.2g} where both should vanish",
            4,
            "a rotation of the same planes",
        )

    def _unproved(self, one: tuple[int, int], other: tuple[int, int]) -> Miss:
        """Of two coefficients that are equal in this example alone."""
        if self.coefficients.may_change:
            return _CHANGING
        if not self.coefficients.apart(one, other):
            return Miss(
                "operands",
                "the coefficients turn in this example, but nothing shows that they do in every call: they are "
                "products of several values",
                3,
                "a rotation by tables",
            )
        return Miss(
            "operands",
            f"channels {one[1]} and {other[1]} turn by different elements of one tensor (angles of all channels, or "
            "positions along several axes): nothing shows that these are equal in every call, and where they are not "
            "this is no rotation; what the model itself makes equal, by expanding or repeating, is seen to be",
            3,
            "a rotation by given positions",
        )


_CHANGING = Miss(
    "buffer",
    "channels turn by numbers that are equal in the tensors they are kept in, which may change unseen (what the graph "
    "writes to, a buffer of an exported program that a state dict may replace), and where they are not equal this is "
    "no rotation: keep them with persistent=False, or keep one half and repeat it in the forward pass",
    3,
    "a rotation by tables",
)
