"""The report as text and as JSON."""

import json
import math
import re
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grape_compile.encoding import alibi, parse, rope
from grape_compile.errors import EncodingError, GrapeError
from grape_compile.passes.site import Refusal, Site
from grape_compile.reporting import Report, site_cells

LONG = parse(
    "rotation(partial(half(32), 0, 64), scaled(yarn(40.0, 4096), geometric(10000.0)), positions('p'), "
    "out=partial(interleaved(32), 0, 64), scale=1.25)"
)


def rotation(layer: int, error: float | None = 1e-15) -> Site:
    return Site(
        "rotation",
        rope(64),
        f"model.layers.{layer}.self_attn",
        "modeling.py:12",
        "proved",
        error,
        "grape::rotate",
    )


def refusal(module: str) -> Refusal:
    return Refusal(
        "position",
        "The angle goes through tanh, which no clock of the algebra does, so the place is left as it was "
        "and keeps running the model's own code.",
        "tanh_3",
        module,
        "modeling.py:40",
        "rotation(half(64), geometric(10000.0), steps)",
    )


EVERYTHING = Report(
    (
        *(rotation(layer, error=layer * 1.2e-16) for layer in range(32) for _ in "qk"),
        *(
            Site("rotation", LONG, f"vision.{i}.attn", "vision.py:3", "tables", 2e-7, "eager")
            for i in (0, 1, 4)
        ),
        Site("bias", alibi(8), "", "bias.py:7", "proved"),
    ),
    (refusal("decoder.0.attn"), refusal("decoder.1.attn"), refusal("head")),
)

TEXT = Path(__file__).with_name("report.txt").read_text(encoding="utf-8").removesuffix("\n")


def test_the_table() -> None:
    assert str(EVERYTHING) == TEXT


def test_the_table_fits_a_wide_terminal() -> None:
    assert max(map(len, TEXT.splitlines())) <= 120


def test_long_module_names_wrap() -> None:
    layers = [layer for layer in range(60) if layer % 6 != 5]
    report = Report(tuple(rotation(layer) for layer in layers))
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= 120
    column = "".join(line[:36].strip() for line in lines[3:])
    assert column.startswith("model.layers.{0..4,6..10,")
    assert column.endswith(",54..58}.self_attn")


def test_nothing_found() -> None:
    assert str(Report()) == "no position encodings found"


def test_a_refusal_without_source_names_its_node() -> None:
    place = Refusal("position", "Nothing is mixed.", "mul_3", "layer", "")
    assert str(Report((), (place,))).endswith("Nothing is mixed.\n    at graph node mul_3")


def test_what_differs_is_not_folded() -> None:
    other = Site(
        "rotation", rope(64), "model.layers.1.self_attn", "modeling.py:12", "tables", 1e-15, "inductor"
    )
    assert len(site_cells([rotation(0), other])) == 2


def unfolded(name: str) -> set[str]:
    """The names a folded name stands for, read back from its text alone."""
    parts = re.split(r"\{([^}]*)\}", name)
    choices: list[list[str]] = []
    for position, part in enumerate(parts):
        if position % 2 == 0:
            choices.append([part])
            continue
        runs = [run.split("..") for run in part.split(",")]
        choices.append([str(number) for run in runs for number in range(int(run[0]), int(run[-1]) + 1)])
    return {"".join(choice) for choice in product(*choices)}


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=20))
def test_folding_neither_loses_nor_invents_a_place(places: list[tuple[int, int]]) -> None:
    modules = [f"stages.{stage}.blocks.{block}.attn" for stage, block in places]
    rows = site_cells(
        Site("rotation", rope(64), module, "modeling.py:12", "proved", 0.0, "inductor") for module in modules
    )
    named = [name for row in rows for name in unfolded(row[0])]
    assert sorted(named) == sorted(set(modules))
    assert sum(int(row[1].removeprefix("x")) for row in rows) == len(modules)


def test_json_reads_back() -> None:
    assert Report.from_json(EVERYTHING.to_json()) == EVERYTHING


def test_json_is_plain() -> None:
    document = json.loads(EVERYTHING.to_json())
    assert set(document) == {"format", "sites", "refusals"}
    assert document["sites"][0] == {
        "kind": "rotation",
        "encoding": "rotation(half(64), geometric(10000.0), steps)",
        "module": "model.layers.0.self_attn",
        "source": "modeling.py:12",
        "evidence": "proved",
        "error": 0.0,
        "lowering": "grape::rotate",
    }


@pytest.mark.parametrize("error", [math.inf, math.nan])
def test_json_has_no_infinities(error: float) -> None:
    text = Report((rotation(0, error=error),)).to_json()
    json.loads(text, parse_constant=pytest.fail)
    read = Report.from_json(text).sites[0].error
    assert read is not None
    assert str(read) == str(error)


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        "[]",
        "{}",
        '{"format": 2, "sites": [], "refusals": []}',
        '{"format": 1, "sites": [{"kind": "rotation"}], "refusals": []}',
    ],
)
def test_foreign_json_is_refused(text: str) -> None:
    with pytest.raises(GrapeError, match=r"Report\.to_json"):
        Report.from_json(text)


def test_an_unknown_encoding_in_json_is_refused() -> None:
    text = Report((rotation(0),)).to_json().replace("geometric", "arithmetic")
    with pytest.raises(EncodingError, match="arithmetic"):
        Report.from_json(text)


def test_a_sum_holds_both() -> None:
    first, second = Report((rotation(0),)), Report((rotation(1),), (refusal("head"),))
    assert first + second == Report((rotation(0), rotation(1)), (refusal("head"),))
