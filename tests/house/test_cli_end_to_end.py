"""The command line with nothing replaced: a model by its configuration, and the same model exported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grape_compile.named_models import load
from grape_compile.reporting import Report, summary

CONFIG = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def inspected(name: str) -> Report:
    command = [str(Path(sys.executable).with_name("grape-compile")), "inspect", name, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Report.from_json(done.stdout)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama") / "config.json"
    path.write_text(json.dumps(CONFIG), encoding="utf-8")
    return path


def expect(report: Report) -> None:
    assert summary(report) == "4 rotations"
    assert {str(site.encoding) for site in report.sites} == {"rotation(half(16), geometric(10000.0), steps)"}
    assert {site.evidence for site in report.sites} == {"proved"}


def test_a_configuration(config: Path) -> None:
    expect(inspected(str(config)))


def test_an_exported_program(config: Path) -> None:
    named = load(str(config))
    assert isinstance(named.model, torch.nn.Module)
    program = torch.export.export(named.model, named.args, dict(named.kwargs))
    path = config.with_name("llama.pt2")
    torch.export.save(program, path)
    expect(inspected(str(path)))
