"""Checks that constructors make: each settles one field to its exact type, or raises EncodingError."""

from __future__ import annotations

import math
import operator
import re
from numbers import Integral, Real
from typing import NoReturn, SupportsIndex, TypeGuard

from grape_compile.encoding.base import Term, term_name
from grape_compile.errors import EncodingError

#: A tensor name needs no escape in the text form: letters, digits, underscores and dots.
_SLOT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")


def refuse(term: Term, field: str, works: str) -> NoReturn:
    """Raise the EncodingError of a field whose value is outside of the algebra."""
    found = f"{field} = {_shown(getattr(term, field))}"
    raise EncodingError(f"{term_name(type(term))} with {field}", found, works)


def whole(term: Term, field: str, least: int) -> None:
    """Settle a whole number of at least `least`."""
    value: object = getattr(term, field)
    if not _is_whole(value) or operator.index(value) < least:
        refuse(term, field, f"a whole number, {least} or more")
    _settle(term, field, operator.index(value))


def even(term: Term, field: str) -> None:
    """Settle a positive even number: a size that splits into planes."""
    whole(term, field, 2)
    if getattr(term, field) % 2:
        refuse(term, field, "an even size: a plane takes two coordinates")


def sign(term: Term, field: str) -> None:
    """Settle 1 or -1."""
    value: object = getattr(term, field)
    if not _is_whole(value) or operator.index(value) not in (1, -1):
        refuse(term, field, "1 or -1")
    _settle(term, field, operator.index(value))


def positive(term: Term, field: str) -> None:
    """Settle a finite real number above zero as a float."""
    number = _as_float(getattr(term, field))
    if number is None or not number > 0:
        refuse(term, field, "a finite number above 0")
    _settle(term, field, number)


def real(term: Term, field: str) -> None:
    """Settle a finite real number as a float (zero without a sign)."""
    number = _as_float(getattr(term, field))
    if number is None:
        refuse(term, field, "a finite number")
    _settle(term, field, number + 0.0)


def reals(term: Term, field: str) -> None:
    """Settle a sequence of one or more finite numbers as a tuple of floats (zero without a sign)."""
    numbers = [_as_float(value) for value in _items(getattr(term, field))]
    if not numbers or None in numbers:
        refuse(term, field, "one or more finite numbers")
    _settle(term, field, tuple(number + 0.0 for number in numbers if number is not None))


def positives(term: Term, field: str) -> None:
    """Settle a sequence of one or more finite numbers above zero as a tuple of floats."""
    numbers = [_as_float(value) for value in _items(getattr(term, field))]
    if not numbers or not all(number is not None and number > 0 for number in numbers):
        refuse(term, field, "one or more finite numbers above 0")
    _settle(term, field, tuple(numbers))


def wholes(term: Term, field: str) -> None:
    """Settle a sequence of whole numbers, none negative, as a tuple."""
    numbers = _naturals(getattr(term, field))
    if not numbers:
        refuse(term, field, "one or more whole numbers, 0 or more")
    _settle(term, field, numbers)


def pairs(term: Term, field: str) -> None:
    """Settle a sequence of pairs of whole numbers, none negative, as a tuple of tuples."""
    couples = [_naturals(value) for value in _items(getattr(term, field))]
    if not couples or not all(len(couple) == 2 for couple in couples):
        refuse(term, field, "one or more pairs of coordinates, 0 or more")
    _settle(term, field, tuple(couples))


def flag(term: Term, field: str) -> None:
    """Check a truth value."""
    if not isinstance(getattr(term, field), bool):
        refuse(term, field, "true or false")


def choice(term: Term, field: str, words: tuple[str, ...]) -> None:
    """Check one of a few words."""
    if getattr(term, field) not in words:
        refuse(term, field, f"one of {', '.join(words)}")


def slot(term: Term, field: str) -> None:
    """Check the name of a tensor."""
    value = getattr(term, field)
    if not isinstance(value, str) or not _SLOT_NAME.fullmatch(value):
        refuse(term, field, "a name of ASCII letters, digits, '_' and '.' that starts with a letter or '_'")


def member(term: Term, field: str, kind: type[Term], *, optional: bool = False) -> None:
    """Check a field that holds a value of one family (or None where `optional`)."""
    value = getattr(term, field)
    if not (isinstance(value, kind) or (optional and value is None)):
        names = ", ".join(sorted({term_name(each) for each in _leaves(kind)}))
        refuse(term, field, f"one of {names}" + (", or none" if optional else ""))


def members(term: Term, field: str, kind: type[Term]) -> None:
    """Settle a sequence of one or more values of one family as a tuple."""
    values = _items(getattr(term, field))
    if not values or not all(isinstance(value, kind) for value in values):
        refuse(term, field, f"one or more values of {term_name(kind)}")
    _settle(term, field, tuple(values))


def _settle(term: Term, field: str, value: object) -> None:
    # The one way to normalise a frozen dataclass while it is being built.
    object.__setattr__(term, field, value)


def _is_whole(value: object) -> TypeGuard[SupportsIndex]:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _naturals(value: object) -> tuple[int, ...]:
    """Return the whole numbers of a sequence, or nothing where one is negative or no whole number."""
    numbers = [operator.index(item) for item in _items(value) if _is_whole(item)]
    return tuple(numbers) if len(numbers) == len(_items(value)) and min(numbers, default=0) >= 0 else ()


def _as_float(value: object) -> float | None:
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _items(value: object) -> list[object]:
    return list(value) if isinstance(value, (tuple, list)) else []


def _shown(value: object) -> str:
    text = str(value) if isinstance(value, Term) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _leaves(kind: type[Term]) -> set[type[Term]]:
    below = kind.__subclasses__()
    return {leaf for each in below for leaf in _leaves(each)} if below else {kind}
