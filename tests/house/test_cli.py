"""The command line, with the inspection itself replaced: names, output and mistakes."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from grape_compile.cli import main
from grape_compile.encoding import rope
from grape_compile.named_models import load
from grape_compile.passes.site import Refusal, Site
from grape_compile.reporting import Report

REPORT = Report(
    tuple(
        Site("rotation", rope(64), f"layers.{i}.attn", "model.py:1", "proved", 1e-15, "none")
        for i in range(2)
    ),
    (Refusal("position", "Because of [tanh].", "tanh", "layers.2.attn", "model.py:9"),),
)
BUILDERS = """
import torch
from torch import nn


def bare():
    print("noise of the model")
    return nn.Linear(2, 2)


def with_inputs():
    return nn.Linear(2, 2), (torch.ones(1, 2),), {"flag": 1}


def nothing():
    return 3


def breaks():
    raise RuntimeError("its own mistake")


constant = 3
"""


@dataclass
class Inspection:
    """Stands in for `grape_compile.inspecting`: remembers its arguments and returns one report."""

    calls: list[tuple[Any, ...]] = field(default_factory=list)

    def inspect(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Report:
        self.calls.append((model, args, kwargs))
        return REPORT


@dataclass(frozen=True)
class Done:
    status: int
    out: str
    err: str


Command = Callable[..., Done]


@pytest.fixture
def inspection(monkeypatch: pytest.MonkeyPatch) -> Inspection:
    compiler, stand_in = ModuleType("grape_compile.inspecting"), Inspection()
    compiler.__dict__["inspect"] = stand_in.inspect
    monkeypatch.setitem(sys.modules, "grape_compile.inspecting", compiler)
    return stand_in


@pytest.fixture
def command(
    inspection: Inspection,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Command:
    (tmp_path / "cli_builders.py").write_text(BUILDERS, encoding="utf-8")
    (tmp_path / "cli_incomplete.py").write_text("import a_module_nobody_wrote\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["grape-compile", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        assert isinstance(end.value.code, int)
        return Done(end.value.code, captured.out, captured.err)

    return run


def test_without_a_terminal_the_report_is_plain_text(command: Command) -> None:
    assert command("inspect", "cli_builders:bare") == Done(0, f"{REPORT}\n", "noise of the model\n")


def test_json_is_all_that_is_printed(command: Command) -> None:
    done = command("inspect", "cli_builders:bare", "--json")
    assert Report.from_json(done.out) == REPORT
    assert done.status == 0


def test_on_a_terminal_the_report_is_a_table(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "140")
    out = command("inspect", "cli_builders:bare").out
    assert "\x1b[" in out
    for text in ("2 rotations, 1 refusal", "layers.{0..1}.attn", str(rope(64)), "Because of [tanh]."):
        assert text in out


def test_a_callable_may_bring_its_inputs(command: Command, inspection: Inspection) -> None:
    assert command("inspect", "cli_builders:with_inputs").status == 0
    [(model, args, kwargs)] = inspection.calls
    assert isinstance(model, nn.Linear)
    assert torch.equal(args[0], torch.ones(1, 2))
    assert kwargs == {"flag": 1}


def test_an_exported_program(command: Command, inspection: Inspection) -> None:
    program = torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),))
    torch.export.save(program, "linear.pt2")
    assert command("inspect", "linear.pt2").status == 0
    assert isinstance(inspection.calls[0][0], torch.export.ExportedProgram)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("llama", "a name of no known form"),
        ("cli_builders:absent", "no 'absent' in cli_builders"),
        ("cli_builders:constant", "a int"),
        ("cli_builders:nothing", "a int came back"),
        ("nobody.wrote:this", "No module named 'nobody'"),
        ("absent.pt2", "no such file"),
        ("absent.json", "no such file"),
        ("text.pt2", "not a .pt2 archive"),
        ("broken.json", "not a valid JSON file"),
        ("unknown.json", "model type `never_heard_of`"),
        ("untyped.json", "Should have a `model_type` key"),
    ],
)
def test_a_mistake_is_one_message(command: Command, name: str, found: str) -> None:
    for file, text in {
        "text.pt2": "text",
        "broken.json": "{",
        "unknown.json": '{"model_type": "never_heard_of"}',
        "untyped.json": "{}",
    }.items():
        Path(file).write_text(text, encoding="utf-8")
    done = command("inspect", name)
    assert done.status == 2
    assert done.out == ""
    assert done.err.startswith("asked: the ")
    assert found in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("arguments", [("inspect",), ("inspect", "x", "--seq", "1"), ("absent",)])
def test_wrong_usage(command: Command, arguments: tuple[str, ...]) -> None:
    done = command(*arguments)
    assert done.status == 2
    assert done.out == ""
    assert "Usage: grape-compile" in done.err


@pytest.mark.parametrize(
    ("name", "error"), [("cli_builders:breaks", RuntimeError), ("cli_incomplete:model", ModuleNotFoundError)]
)
@pytest.mark.usefixtures("command")
def test_a_mistake_inside_the_model_keeps_its_traceback(name: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        load(name)


@pytest.mark.parametrize("extra", ["typer", "rich"])
def test_without_the_extra(command: Command, monkeypatch: pytest.MonkeyPatch, extra: str) -> None:
    monkeypatch.setitem(sys.modules, extra, None)
    done = command("inspect", "cli_builders:bare")
    assert done.status == 2
    assert f"needs {extra}: pip install 'grape-compile[cli]'" in done.err


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "vocab_size": 96, **SMALL},
    "t5": {"model_type": "t5", "vocab_size": 96, "d_model": 32, "d_ff": 48, "d_kv": 16, "num_layers": 1},
    "dinov3_vit": {"model_type": "dinov3_vit", "image_size": 32, "patch_size": 8, **SMALL},
    "wav2vec2-conformer": {
        "model_type": "wav2vec2-conformer",
        "position_embeddings_type": "rotary",
        "num_conv_pos_embedding_groups": 2,
        **SMALL,
    },
}


@pytest.fixture
def config(tmp_path: Path) -> Callable[[dict[str, Any]], str]:
    def write(values: dict[str, Any]) -> str:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(values), encoding="utf-8")
        return str(path)

    return write


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_configuration_becomes_a_model_that_runs(config: Callable[..., str], kind: str) -> None:
    named = load(config(CONFIGS[kind]), batch=2, sequence=5)
    assert isinstance(named.model, nn.Module)
    assert not named.model.training
    assert all(tensor.shape[0] == 2 for tensor in named.kwargs.values())
    with torch.no_grad():
        named.model(*named.args, **named.kwargs)


def test_the_inputs_are_as_long_as_asked(config: Callable[..., str]) -> None:
    named = load(config(CONFIGS["llama"]), batch=3, sequence=7)
    assert named.kwargs["input_ids"].shape == (3, 7)


def test_a_causal_language_model_keeps_its_head(config: Callable[..., str]) -> None:
    assert type(load(config(CONFIGS["llama"])).model).__name__ == "LlamaForCausalLM"


def test_a_model_larger_than_the_machine(command: Command, config: Callable[..., str]) -> None:
    done = command("inspect", config(CONFIGS["llama"] | {"vocab_size": 2**45}))
    assert done.status == 2
    assert "GiB of weights on a machine with" in done.err
