"""Every error this package raises on purpose: one base class, one text of three parts."""

from __future__ import annotations


class GrapeError(Exception):
    """Base of all errors: what was `asked`, what was `found` (shape, dtype, node), and what `works` instead.

    >>> print(GrapeError("rotate a tensor", "its last axis has size 7", "an even size"))
    asked: rotate a tensor
    found: its last axis has size 7
    would work: an even size
    """

    def __init__(self, asked: str, found: str, works: str) -> None:
        super().__init__(asked, found, works)
        self.asked = asked
        self.found = found
        self.works = works

    def __str__(self) -> str:
        return f"asked: {self.asked}\nfound: {self.found}\nwould work: {self.works}"


class EncodingError(GrapeError, ValueError):
    """A value outside the algebra, or a text that does not parse as an encoding."""


class OperandError(GrapeError, ValueError):
    """Tensors that an operator cannot take: wrong shape, dtype, device or number."""


class CaptureError(GrapeError, RuntimeError):
    """A model that neither `torch.export` nor the `torch.compile` door could turn into a graph."""


class RefusalError(GrapeError, RuntimeError):
    """A place that was not rewritten although the caller asked for `on_refusal="raise"`."""


class ModelError(GrapeError, TypeError):
    """Something that is not a model was given where a model is wanted."""
