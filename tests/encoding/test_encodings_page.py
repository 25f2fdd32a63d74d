"""docs/encodings.md says what is so: its texts come out of its calls, and it leaves out no encoding."""

import doctest
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from grape_compile import encoding
from grape_compile.encoding import Encoding, parse
from grape_compile.encoding.text import VOCABULARY

PAGE = Path(__file__).parents[2] / "docs" / "encodings.md"
TEXT = PAGE.read_text(encoding="utf-8")
CODE = re.compile(r"`([^`]+)`")


def tables() -> Iterator[tuple[list[str], list[list[str]]]]:
    """Heading and rows of every table of the page."""
    for block in re.findall(r"(?:^\|.*\n)+", TEXT, flags=re.MULTILINE):
        heading, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines())
        yield heading, rows


def code(cell: str) -> str:
    (found,) = CODE.findall(cell)
    return str(found)


def calls() -> list[tuple[str, str]]:
    """(call, text) of every row that has both."""
    return [
        (code(row[0]), code(row[1])) for heading, rows in tables() for row in rows if heading[1:2] == ["text"]
    ]


def vocabulary() -> dict[str, set[str]]:
    (rows,) = (rows for heading, rows in tables() if heading == ["kind", "names"])
    return {kind: set(CODE.findall(names)) for kind, names in rows}


@pytest.mark.parametrize(("call", "text"), calls())
def test_a_call_prints_its_text_and_the_text_reads_back(call: str, text: str) -> None:
    value = eval(call, dict(vars(encoding)))
    assert isinstance(value, Encoding)
    assert str(value) == text
    assert parse(text) == value


def test_the_table_lists_every_encoding() -> None:
    (rows,) = (rows for heading, rows in tables() if heading[0] == "encoding" and heading[-1] == "lowered to")
    listed = [code(row[0]) for row in rows]
    known = [name for name, kind in VOCABULARY.items() if issubclass(kind, Encoding)]
    assert len(listed) == len(set(listed))
    assert set(listed) == set(known)
    assert vocabulary()["encodings"] == set(listed)


def test_the_vocabulary_is_the_one_that_parses() -> None:
    listed: set[str] = set().union(*vocabulary().values())
    assert listed == set(VOCABULARY)


def test_the_examples_run() -> None:
    results = doctest.testfile(str(PAGE), module_relative=False)
    assert results.attempted > 0
    assert results.failed == 0


def test_every_figure_is_there_and_shown() -> None:
    pages = [page.read_text(encoding="utf-8") for page in PAGE.parent.glob("*.md")]
    shown = {figure for page in pages for figure in re.findall(r"!\[[^\]]+\]\((figures/[^)]+)\)", page)}
    assert shown == {f"figures/{file.name}" for file in (PAGE.parent / "figures").iterdir()}
