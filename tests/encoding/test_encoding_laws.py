"""Laws of the algebra over random values: one text, one canonical form, one meaning, inverses that undo."""

from __future__ import annotations

import copy
import pickle
from itertools import product

import pytest
from encoding_meaning import bias, head_dim, matrix
from encoding_strategies import encodings, invertible, rotations
from hypothesis import given, settings

from grape_compile.encoding import Compose, Encoding, Rotation, parse

#: Random values are large here, and a shared machine is slow at times.
laws = settings(max_examples=60, deadline=None)
HEADS, TOKENS = range(2), (0, 1, 3)


def meaning(encoding: Encoding, size: int) -> list[float]:
    """Every number that a model could see of the encoding at a few tokens."""
    entries = [entry for token in TOKENS for row in matrix(encoding, size, token) for entry in row]
    return entries + [bias(encoding, head, *tokens) for head in HEADS for tokens in product(TOKENS, TOKENS)]


@laws
@given(encodings())
def test_the_text_reads_back_as_the_same_value(encoding: Encoding) -> None:
    text = str(encoding)
    assert parse.__wrapped__(text) == encoding
    assert str(parse(text)) == text
    assert hash(parse(text)) == hash(encoding)
    assert text == text.lower()
    assert len(text.splitlines()) == 1


@laws
@given(encodings())
def test_copies_are_equal(encoding: Encoding) -> None:
    assert copy.deepcopy(encoding) == encoding
    assert pickle.loads(pickle.dumps(encoding)) == encoding


@laws
@given(encodings())
def test_canonical_form_is_final_and_means_the_same(encoding: Encoding) -> None:
    canonical = encoding.canonical()
    assert canonical.canonical() == canonical
    assert sorted(canonical.slots) == sorted(encoding.slots)
    size = head_dim(encoding)
    assert meaning(canonical, size) == pytest.approx(meaning(encoding, size), rel=1e-9, abs=1e-9)


@laws
@given(invertible())
def test_the_inverse_undoes(encoding: Encoding) -> None:
    size = head_dim(encoding)
    both = Compose((encoding, encoding.inverse()))
    identity = [float(i == k) for _ in TOKENS for i in range(size) for k in range(size)]
    nothing = [0.0] * (len(HEADS) * len(TOKENS) ** 2)
    assert meaning(both, size) == pytest.approx(identity + nothing, rel=1e-9, abs=1e-9)


@laws
@given(invertible())
def test_the_inverse_of_the_inverse_is_the_encoding(encoding: Encoding) -> None:
    assert encoding.inverse().inverse().canonical() == encoding.canonical()
    assert encoding.canonical().inverse().canonical() == encoding.inverse().canonical()


@laws
@given(rotations())
def test_slots_name_each_tensor_once_in_the_order_of_the_fields(rotation: Rotation) -> None:
    expected = (
        *(rotation.spectrum.slots if rotation.spectrum else ()),
        *rotation.clock.slots,
        *((rotation.basis,) if rotation.basis else ()),
    )
    assert rotation.slots == expected
