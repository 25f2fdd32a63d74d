"""Every error this package raises on purpose: one base class, one text of three parts."""

from __future__ import annotations

import re

_OBJECT = re.compile(r"\s*(?:\bat |\(<class '[^']*'>, )?(?:0x[0-9a-fA-F]{6,}|\d{12,})\)?")


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


class EngineError(GrapeError, ImportError):
    """An engine that is absent, of a release that does not work, or that cannot do what a target needs."""


class UpgradeError(GrapeError, RuntimeError):
    """A model whose encoding cannot be exchanged as asked, or an upgraded one that would run its old encoding."""


class ModelError(GrapeError, TypeError):
    """Something that is not a model was given where a model is wanted."""


def first_line(failure: BaseException) -> str:
    """What failed, in one line that names no object by its address.

    >>> first_line(RuntimeError("x (<class 'int'>, 140306221156464) is not tracked by <T object at 0x7f9b966dfbd0>"))
    'RuntimeError: x is not tracked by <T object>'
    """
    lines = str(failure).strip().splitlines()
    return f"{type(failure).__name__}: {_OBJECT.sub('', lines[0]) if lines else ''}"
