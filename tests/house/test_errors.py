"""Every error is a GrapeError, the built-in error a caller would expect, and can be pickled."""

import pickle

import pytest

from grape_compile.errors import (
    CaptureError,
    EncodingError,
    EngineError,
    GrapeError,
    ModelError,
    OperandError,
    RefusalError,
    UpgradeError,
)

KINDS = {
    EncodingError: ValueError,
    OperandError: ValueError,
    CaptureError: RuntimeError,
    EngineError: ImportError,
    RefusalError: RuntimeError,
    UpgradeError: RuntimeError,
    ModelError: TypeError,
}


def test_none_is_forgotten() -> None:
    assert set(GrapeError.__subclasses__()) == set(KINDS)


@pytest.mark.parametrize(("kind", "builtin"), KINDS.items())
def test_text_and_kind(kind: type[GrapeError], builtin: type[Exception]) -> None:
    error = kind("rotate", "an odd size", "an even size")
    assert isinstance(error, builtin)
    assert str(error) == "asked: rotate\nfound: an odd size\nwould work: an even size"


@pytest.mark.parametrize("kind", KINDS)
def test_pickle(kind: type[GrapeError]) -> None:
    error = kind("rotate", "an odd size", "an even size")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == str(error)
