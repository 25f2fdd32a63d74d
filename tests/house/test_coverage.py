"""The coverage benchmark: what it counts, what survives a kill, what a lost process costs."""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import BY_NAME
from torch import nn

from benchmarks.coverage import records
from benchmarks.coverage.__main__ import sampled
from benchmarks.coverage.architectures import Architecture, architectures
from benchmarks.coverage.arguments import completed
from benchmarks.coverage.choices import Choices, held, noted
from benchmarks.coverage.doors import DOORS
from benchmarks.coverage.generation import NEW_TOKENS, generated, prompt
from benchmarks.coverage.inputs import LENGTH, Random, candidates, lengthened, redrawn
from benchmarks.coverage.oracle import Deviation, InDouble
from benchmarks.coverage.page import complete, page
from benchmarks.coverage.processes import Task, run_all
from benchmarks.coverage.truth import counting


@pytest.mark.parametrize(
    "name", ["llama", "gptj", "llama4_text", "roformer", "dinov3_vit", "bloom", "mpt", "gpt2", "t5"]
)
def test_the_truth_is_counted_as_by_hand(name: str) -> None:
    row = BY_NAME[name]
    model = row.build()
    for _ in range(2):  # nothing stays patched
        with torch.no_grad(), counting(model) as truth:
            model(**row.inputs())
        assert (truth.rotations, truth.biases) == (row.rotations, row.biases)


def gated(x: torch.Tensor) -> torch.Tensor:
    """What an index keeps."""
    values, places = torch.topk(x, 2, dim=1)
    return values.softmax(1) * places


def mixed(x: torch.Tensor) -> torch.Tensor:
    """The two best experts share a token where their scores are close."""
    best, place = x.max(1, keepdim=True)
    close = x.masked_fill(best - x > 0.15, float("-inf"))
    return close.softmax(1) + place


def evaluating(graph: torch.fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
    """A compiler that computes values itself, which are no choices of the model."""
    numbers = torch.rand(1, 3)
    torch.topk(numbers, 2), numbers.max(1), numbers > 0.5
    return graph


@pytest.mark.parametrize("router", [gated, mixed])
def test_choices_of_the_oracle_are_held(router: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Through autograd and torch.compile alike; another number of choices is an error, and nothing stays patched."""
    scores = torch.tensor([[0.3, 0.2, 0.1], [0.1, 0.3, 0.2]], requires_grad=True)
    with noted() as choices:
        router(scores.flip(1))
    compiled = (torch.compile(router, backend=backend) for backend in ("eager", "aot_eager", evaluating))
    for run in (router, *compiled):
        with held(choices):
            found = run(scores)
        wanted = BY_CHOICES[router](scores, choices)
        torch.testing.assert_close(found, wanted)
        for one, other in zip(
            *(torch.autograd.grad(each.sum(), scores) for each in (found, wanted)), strict=True
        ):
            torch.testing.assert_close(one, other)
        assert not torch.equal(router(scores), found)
    with held(choices), pytest.raises(ValueError, match="does not make"):
        router(router(scores))


BY_CHOICES: dict[Any, Callable[[torch.Tensor, Choices], torch.Tensor]] = {
    gated: lambda x, made: x.gather(1, made["topk"][0]).softmax(1) * made["topk"][0],
    mixed: lambda x, made: x.masked_fill(made[">"][0], float("-inf")).softmax(1) + made["max"][0],
}


def test_whole_numbers_are_compared_as_ever() -> None:
    numbers = torch.tensor([[1, 3, 2]])
    with noted() as choices:
        numbers.max(1), numbers > 2
    assert choices == {}


def test_architectures_are_chosen_by_folder_and_by_name() -> None:
    names = [each.name for each in architectures(["gptj", "bloom@6heads"])]
    assert names == ["bloom@6heads", "gptj/GPTJ"]
    assert [each.name for each in architectures(["esm"])] == ["esm/Esm"]  # two files have models of it


@dataclass(frozen=True)
class Hangs(Architecture):
    def models(self) -> Iterator[tuple[nn.Module, Any]]:
        time.sleep(60)
        return iter(())


@dataclass(frozen=True)
class Crashes(Architecture):
    def models(self) -> Iterator[tuple[nn.Module, Any]]:
        os._exit(3)


def test_a_hang_and_a_crash_cost_one_row_each() -> None:
    lost = [Task(each, ("static",)) for each in (Hangs("hangs", "", ()), Crashes("crashes", "", ()))]
    found = {record["name"]: record for record in run_all(lost, jobs=2, timeout=3.0)}
    assert found["hangs"]["unbuilt"] == "out of time"
    assert found["crashes"]["unbuilt"] == "the process ended with status 3"


def test_tokens_are_generated_with_a_cache() -> None:
    """After the prompt a forward pass sees one token, though the models of the benchmark keep no cache unasked."""
    (llama,) = architectures(["llama/Llama"])
    model, config = next(iter(llama.models()))
    lengths: list[int] = []
    model.register_forward_pre_hook(
        lambda _, args, given: lengths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    inputs = next(candidates(model, config, llama.name))
    generated(model, prompt({"input_ids": inputs["input_ids"]}))
    assert lengths == [LENGTH] + [1] * (NEW_TOKENS - 1)


@pytest.mark.slow
def test_a_model_goes_through_every_door() -> None:
    tasks = [Task(each, tuple(DOORS)) for each in architectures(["gptj"])]
    (record,) = run_all(tasks, jobs=1, timeout=280.0)
    assert set(record["doors"]) == set(DOORS)
    for outcome in record["doors"].values():
        assert complete(outcome)
        assert outcome.get("holds", True)


def test_records_survive_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "coverage.jsonl"
    records.append(path, {"name": "llama", "doors": {"static": {}}})
    records.append(path, {"name": "llama", "doors": {"bf16": {}}})
    with path.open("a") as file:
        file.write('{"name": "cut o')
    assert {name: set(record["doors"]) for name, record in records.load(path).items()} == {
        "llama": {"static", "bf16"}
    }


def test_inputs_are_drawn_anew_and_lengthened() -> None:
    ids = torch.arange(12).reshape(2, 6)
    longer = lengthened({"input_ids": ids, "use_cache": False}, 2)
    assert longer["input_ids"].tolist()[0] == [0, 1, 2, 3, 4, 5, 0, 1]
    fresh = redrawn({"input_ids": ids}, seed=1)["input_ids"]
    assert fresh.sort().values.tolist() == ids.tolist()


def test_a_wrong_small_tensor_is_not_hidden_by_a_large_one() -> None:
    reference = {"output": torch.full((4,), 1e3), "weight": torch.ones(4)}
    deviation = Deviation()
    deviation.add({"output": reference["output"], "weight": -reference["weight"]}, reference)
    assert deviation.relative > 1
    lost = Deviation()
    lost.add({"output": reference["output"]}, reference)
    assert lost.relative == float("inf")


def test_the_page_tells_what_was_missed_and_why() -> None:
    outcome = {
        "rotations": 3,
        "biases": 0,
        "truth": {"rotations": 4, "biases": 0},
        "replay": 1e-15,
        "proved": 2,
        "encodings": [],
        "refusals": [{"reason": "the map is a\nreflection", "source": "transformers/models/a/b.py:7"}],
    }
    rows = [
        {
            "name": "missed",
            "model": "AnyForCausalLM",
            "truth": outcome["truth"],
            "doors": {"static": outcome, "cache": {"skipped": "none"}},
        },
        {"name": "plain", "truth": {"rotations": 0, "biases": 0}, "doors": {"static": {}}},
        {"name": "unknown", "unbuilt": "no model class", "doors": {}},
    ]
    machine = {"transformers": "5", "torch": "2", "python": "3", "processor": "any"}
    text = page({"machine": machine, "date": "2026-01-01", "rows": rows})
    assert "| missed | 3 / 4, 1e-15 |" in text
    assert "* `missed` (static 3 / 4, 1e-15)\n  * the map is a reflection (`a/b.py:7`)" in text
    assert "2 of the 3 sites of 1 causal language models (67%)" in text
    assert "* cache: none: `missed`" in text
    assert "False positives on 1 architectures without an encoding: 0." in text
    assert "* `unknown`: no model class" in text


def test_random_numbers_in_double_are_those_of_float() -> None:
    torch.manual_seed(0)
    first, second = torch.rand(3), torch.empty(3).uniform_(-1, 1)
    torch.manual_seed(0)
    with InDouble():
        wide = torch.rand(3), torch.empty(3, dtype=torch.float32).uniform_(-1, 1)
    assert wide[0].dtype is wide[1].dtype is torch.float64
    assert torch.equal(wide[0], first.double())
    assert torch.equal(wide[1], second.double())


def test_a_sample_is_spread_over_the_families() -> None:
    known = [Architecture(f"{family}/{size}", family, ()) for family in "abcdefgh" for size in (1, 2)]
    done: dict[str, dict[str, Any]] = {
        each.name: {"truth": {"rotations": each.module != "a"}, "doors": {}} for each in known
    }
    done["c/1"]["doors"] = {"inductor": {}}
    tasks = list(sampled(known, ("static", "inductor"), done, {"inductor": 3}))
    assert [task.architecture.name for task in tasks] == ["b/1", "d/1", "f/1"]
    assert {task.doors for task in tasks} == {("inductor",)}


class Captioner(nn.Module):
    """Takes a picture only with a box and a mask for every token."""

    def forward(self, input_ids: Any, bbox: Any, attention_mask: Any, unheard_of: Any = None) -> Any:
        return input_ids


def test_arguments_that_go_together_are_made_up_by_name() -> None:
    inputs = {"input_ids": torch.zeros(2, 6, dtype=torch.long)}
    whole = completed(inputs, Captioner(), Random(None), helpful=False)
    assert whole is not None
    assert {name: tuple(value.shape) for name, value in whole.items()} == {
        "input_ids": (2, 6),
        "bbox": (2, 6, 4),
        "attention_mask": (2, 6),
    }
