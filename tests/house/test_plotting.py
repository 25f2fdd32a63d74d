"""Pictures of encodings show the numbers of the encodings."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from grape_compile.encoding import (
    Compose,
    Encoding,
    Half,
    Positions,
    Rotation,
    Tables,
    alibi,
    fox,
    gated_alibi,
    grape_ap,
    nope,
    rope,
)
from grape_compile.errors import GrapeError
from grape_compile.nn import LearnedRotation, MixedRotation, PathEdges, Sum
from grape_compile.operators.samples import BIASES, COMPOSITIONS, GENERATORS, PATHS, ROTATIONS, Sample
from grape_compile.passes.site import Site
from grape_compile.plotting import effective_window, plot_encoding


def panels(figure: Any) -> dict[str, Any]:
    return {axes.get_title(): axes for axes in figure.get_axes()}


def heights(axes: Any) -> list[list[float]]:
    return [list(line.get_ydata()) for line in axes.lines]


def test_a_rotation_before_and_now() -> None:
    torch.manual_seed(0)
    module = LearnedRotation(rope(8), basis="cayley")
    before = module(torch.zeros(0))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    found = panels(plot_encoding(module, before=before))
    assert set(found) == {"planes", "spectrum", "a vector with itself", "basis"}
    old, new = heights(found["spectrum"])
    assert old == pytest.approx([1.0, 0.1, 0.01, 0.001], rel=1e-6)
    assert new == pytest.approx(module.spectrum().tolist(), rel=1e-6)
    theta = module.spectrum().detach().double()
    # Each plane of a rotated vector keeps the cosine of its angle, and a basis changes nothing of their mean.
    expected = [float((n * theta).cos().mean()) for n in range(96)]
    assert heights(found["a vector with itself"])[1] == pytest.approx(expected, abs=1e-6)
    image = torch.tensor(found["basis"].images[0].get_array().tolist())
    torch.testing.assert_close(image, module.basis().detach(), rtol=0, atol=1e-6)  # type: ignore[misc]


def test_a_bias_per_head() -> None:
    found = panels(plot_encoding(alibi(8), length=32))
    assert [title for title in found if title.startswith("head")] == [f"head {h} of 8" for h in (1, 3, 6, 8)]
    image = torch.tensor(found["head 1 of 8"].images[0].get_array().filled(0.0).tolist())
    places = torch.arange(32.0)
    torch.testing.assert_close(image, (0.5 * (places[None] - places[:, None])).tril())
    window = heights(found["effective window of 32 keys"])[0]
    assert window == sorted(window)
    assert effective_window(torch.zeros(2, 5, 5)) == pytest.approx([5.0, 5.0])


def test_parts_are_rows_and_content_is_that_of_the_first_sequence() -> None:
    torch.manual_seed(0)
    module = Sum({"turn": MixedRotation(rope(8), 4), "path": PathEdges(16, 4)})
    hidden = torch.randn(2, 10, 16)
    found = panels(plot_encoding(module, module(hidden), before=module(2 * hidden)))
    assert {"generator", "planes", "head 1 of 4", "effective window of 10 keys"} <= set(found)
    turned = heights(found["spectrum"])
    assert turned
    assert "no position" in [text.get_text() for text in plot_encoding(nope()).texts]


def test_a_site() -> None:
    site = Site("rotation", rope(8), "layer", "model.py:1", "proved", 0.0, "grape::rotate")
    assert "spectrum" in panels(plot_encoding(site))


@pytest.mark.parametrize(
    "sample", [*ROTATIONS, *GENERATORS, *BIASES, *PATHS, *COMPOSITIONS], ids=lambda sample: sample.name
)
def test_every_encoding_is_drawn(sample: Sample) -> None:
    figure = plot_encoding(sample.encoding, sample.slots())
    assert all(axes.has_data() or not axes.axison for axes in figure.get_axes())


MISSING: list[tuple[Encoding, dict[str, Tensor], str]] = [
    (fox(), {}, "log_forget"),
    (gated_alibi(4), {"gate_query": torch.ones(1, 4, 5)}, "gate_key"),
    (Compose((rope(8).by(Positions("n")), grape_ap(4))), {}, "n, path_query, path_key"),
    (Rotation(Half(8), None, Tables()), {}, "cos, sin"),
]


@pytest.mark.parametrize(("encoding", "slots", "absent"), MISSING)
def test_missing_tensors(encoding: Encoding, slots: dict[str, Tensor], absent: str) -> None:
    with pytest.raises(GrapeError) as caught:
        plot_encoding(encoding, slots)
    assert caught.value.found == f"no tensor for {absent}"
    with pytest.raises(GrapeError):
        plot_encoding(PathEdges(16, 4))


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(GrapeError, match=r"grape-compile\[docs\]"):
        plot_encoding(rope(8))
