"""The comparison by training: equal starts, runs that go on where they were killed, a page that tells what came out."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_lm
import torch
from tiny_lm import PRESETS, Settings, TinyLM, bits_per_byte, checkpoint, corpus, train, trained

from benchmarks import results_page

QUICK = PRESETS["quick"]


@pytest.fixture
def text(monkeypatch: pytest.MonkeyPatch) -> None:
    """A little of the corpus: reading all of it takes longer than training."""
    random = torch.Generator().manual_seed(0)
    pieces = [torch.randint(97, 123, (20_000,), generator=random, dtype=torch.uint8) for _ in range(2)]
    monkeypatch.setattr(tiny_lm, "corpus", lambda: pieces)


def test_text_is_cut_by_file() -> None:
    training, validation = corpus()
    assert 0.05 < len(validation) / len(training) < 0.25
    assert len(training) > 5_000_000
    assert torch.equal(corpus()[1][:1000], validation[:1000])


def test_encodings_share_their_start() -> None:
    models = {}
    for encoding in ("rope", "fox", "grape-ap"):
        models[encoding] = TinyLM(QUICK, encoding)
        models[encoding].start(3)
    shared = dict(models["rope"].named_parameters())
    for model in models.values():
        own = dict(model.named_parameters())
        assert all(torch.equal(own[name], parameter) for name, parameter in shared.items())


def test_a_killed_run_goes_on(tmp_path: Path, text: None) -> None:
    """The same losses, and the same weights to the bit."""

    class Killed(Exception):
        pass

    def kill(step: int, bits: float) -> None:
        if step == 7:
            raise Killed

    whole = train("grape-a-qk", 1, QUICK, tmp_path / "whole")
    with pytest.raises(Killed):
        train("grape-a-qk", 1, QUICK, tmp_path / "killed", kill)
    again = train("grape-a-qk", 1, QUICK, tmp_path / "killed")
    assert {**whole, "seconds": 0} == {**again, "seconds": 0}
    assert len(whole["losses"]) == QUICK.steps
    states = [
        torch.load(checkpoint("grape-a-qk", 1, QUICK, tmp_path / name))["model"]
        for name in ("whole", "killed")
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_training_learns(tmp_path: Path, text: None) -> None:
    """Letters alone cost at most log2(26) bits once the model knows that there is nothing else."""
    settings = replace(QUICK, steps=60, rate=1e-2)
    found = train("alibi", 0, settings, tmp_path)
    assert found["losses"][0] > 7
    assert found["bits per byte"]["1"] < 5.2


def test_plain_rope_is_rope(tmp_path: Path, text: None) -> None:
    plain = trained("plain rope", preset="quick", folder=tmp_path)
    rope = trained("rope", preset="quick", folder=tmp_path)
    tokens = torch.randint(256, (2, 30))
    torch.testing.assert_close(plain(tokens), rope(tokens), rtol=0, atol=1e-5)


def test_every_length_sees_the_same_bytes() -> None:
    """A model without attention cannot tell windows apart."""
    model = TinyLM(QUICK, "nope")
    model.start(0)
    with torch.no_grad():
        for block in model.blocks:
            block.get_parameter("attention.o_proj.weight").zero_()
    validation = torch.arange(1000).remainder(256).to(torch.uint8)
    found = [bits_per_byte(model, validation, QUICK, multiple, 2) for multiple in (1, 2, 4, 8)]
    assert found == pytest.approx([found[0]] * 4, rel=1e-6)


def run(encoding: str, seed: int, bits: float, slope: float = 0.0) -> dict[str, Any]:
    return {
        "encoding": encoding,
        "seed": seed,
        "settings": {**vars(Settings(1, 1, 1, 128, 4, 100))},
        "parameters": 1000,
        "losses": [bits],
        "validation": [[50, bits + 1], [100, bits]],
        "seconds": 120.0,
        "bits per byte": {str(multiple): bits + slope * (multiple - 1) for multiple in (1, 2, 4, 8)},
    }


def test_the_page_tells_what_came_out(tmp_path: Path) -> None:
    """FoX ahead of ALiBi as in the paper, RoPE ahead of ALiBi against it, GRAPE-AP and FoX too close."""
    runs = [
        each
        for seed in range(3)
        for each in (
            run("fox", seed, 2.0 + 0.01 * seed),
            run("grape-ap", seed, 2.0 + 0.01 * (2 - seed)),
            run("rope", seed, 2.2 + 0.01 * seed, slope=0.1),
            run("alibi", seed, 2.5 + 0.011 * seed),
        )
    ]
    results = tmp_path / "tiny_lm.json"
    results.write_text(json.dumps({"machine": {"chip": "x"}, "preset": "cpu", "planned": 21, "runs": runs}))
    results_page.main(["--results", str(results), "--page", str(tmp_path / "docs" / "results.md")])
    page = (tmp_path / "docs" / "results.md").read_text()
    assert "| RoPE | 3 | 2.210 ± 0.010 | 2.310 ± 0.010 | 2.510 ± 0.010 | 2.910 ± 0.010 |" in page
    assert (
        "Of the 6 pairs that the paper orders, 4 come out in its order, 1 the other way round, and 1 differ"
        in page
    )
    assert "**Not finished: 12 of 21 runs so far.**" in page
    assert "The other way round: ALiBi before RoPE." in page
    assert "Open: GRAPE-AP before FoX." in page
    assert "and more with RoPE +0.70." in page
    for figure in ("tiny_lm_curves.png", "tiny_lm_lengths.png"):
        assert (tmp_path / "docs" / "figures" / figure).stat().st_size > 5_000
    assert "What was learned" not in page
    (tmp_path / "docs" / "figures" / "tiny_lm_fox.png").touch()
    results_page.main(["--results", str(results), "--page", str(tmp_path / "docs" / "results.md")])
    page = (tmp_path / "docs" / "results.md").read_text()
    assert "(figures/tiny_lm_fox.png)" in page
    assert "(figures/tiny_lm_grape-m.png)" not in page


@pytest.mark.slow
def test_the_whole_comparison_runs_and_resumes(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "examples" / "train_tiny_lm.py"
    command = [sys.executable, str(script), "--preset", "quick", "--work", str(tmp_path), "--seeds", "0", "1"]
    for encodings in (["fox"], ["fox", "grape-m"]):
        done = subprocess.run(
            [*command, "--encodings", *encodings, "--figures", str(tmp_path)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        trained_now = set(re.findall(r"(\S+), seed \d: ", done.stderr))
        assert trained_now == {encodings[-1]}
        found = json.loads((tmp_path / "tiny_lm.json").read_text())
        assert len(found["runs"]) == 2 * len(encodings)
    assert (tmp_path / "tiny_lm_grape-m.png").exists()
