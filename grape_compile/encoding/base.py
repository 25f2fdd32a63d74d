"""What all values of the algebra share: frozen, printed as call syntax, naming the tensors they need."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, Self

from grape_compile.errors import EncodingError

if TYPE_CHECKING:
    from grape_compile.encoding.clock import Clock

#: Metadata of a dataclass field that holds the name of a tensor (or None).
SLOT: Final[Mapping[str, bool]] = {"slot": True}


def term_name(kind: type[Term]) -> str:
    """Return the name of a class in the text form: its Python name in snake case.

    >>> term_name(Term)
    'term'
    """
    return re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower()


@dataclass(frozen=True, slots=True)
class Term:
    """A value of the algebra: structure without tensors, hashable, equal by value.

    `str` writes call syntax: required fields by position, the others by keyword where they differ from their
    default, no parentheses where nothing is left to write.
    """

    def __str__(self) -> str:
        arguments = [text for field in fields(self) if (text := _argument(field, getattr(self, field.name)))]
        name = term_name(type(self))
        return f"{name}({', '.join(arguments)})" if arguments else name

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the tensors this value needs: depth first in the order of the fields, each name once."""
        return _slots(self)


@lru_cache(maxsize=4096)
def _slots(term: Term) -> tuple[str, ...]:
    """Return the slots of a value; every call of an operator asks for them."""
    return tuple(dict.fromkeys(name for name, _ in slot_roles(term)))


@dataclass(frozen=True, slots=True)
class Encoding(Term, ABC):
    """How a position acts on queries, keys and logits (GRAPE, arXiv 2512.07805, section 1)."""

    @abstractmethod
    def inverse(self) -> Encoding:
        """Return the encoding that undoes this one; EncodingError where no value of the algebra does."""

    @abstractmethod
    def canonical(self) -> Encoding:
        """Return the value that stands for all of the same meaning; `slots` may change their order."""


class Multiplicative(Encoding, ABC):
    """Turns queries and keys by an orthogonal G(n) = exp(n X), X skew (GRAPE 2-3), up to a norm factor.

    Its logits depend on the offset of the clock alone.
    """

    # No dataclass: one with slots is made twice, and the first would count as a kind of encoding.
    __slots__ = ()

    @property
    @abstractmethod
    def head_dim(self) -> int:
        """Number of coordinates of the head."""

    if TYPE_CHECKING:

        @property
        def clock(self) -> Clock:
            """Its clock; a field of every subclass, which an inherited property would give a default."""

    def by(self, clock: Clock) -> Self:
        """Return the same rotation by another clock."""
        return replace(self, clock=clock)  # type: ignore[call-arg] # a field of every subclass


def slot_roles(value: object) -> Iterator[tuple[str, str]]:
    """Yield (tensor name, role) of every slot below `value`; the role is `class.field`."""
    if isinstance(value, tuple):
        for item in value:
            yield from slot_roles(item)
    if not isinstance(value, Term):
        return
    for field in fields(value):
        content = getattr(value, field.name)
        if not field.metadata.get("slot"):
            yield from slot_roles(content)
        elif content is not None:
            yield content, f"{term_name(type(value))}.{field.name}"


def check_roles(term: Term) -> None:
    """Raise EncodingError where one tensor name stands for two different things."""
    roles: dict[str, str] = {}
    for name, role in slot_roles(term):
        if roles.setdefault(name, role) != role:
            raise EncodingError(
                f"one tensor {name!r} in {term_name(type(term))}",
                f"it is named both as {roles[name]} and as {role}",
                "a name of its own for each tensor",
            )


def _argument(field: Field[Any], value: object) -> str:
    """Write one argument, or "" for a value that is its default."""
    if field.default is MISSING:
        return _literal(value)
    return "" if value == field.default else f"{field.name}={_literal(value)}"


def _literal(value: object) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, tuple):
        inner = ", ".join(map(_literal, value))
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    return str(value) if isinstance(value, Term) else repr(value)
