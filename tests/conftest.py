"""What holds for every test: nothing is downloaded, one thread, kernels interpreted without a GPU, programs counted."""

import os
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from generated.tally import Tally

# Without a GPU kernels are interpreted. Triton reads this when it is imported, whoever imports it first.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(1)


def tallies(reporter: pytest.TerminalReporter) -> Iterator[Tally]:
    """What the tests over generated programs counted, in whichever process they ran."""
    for outcome in ("passed", "failed"):
        for report in reporter.getreports(outcome):
            yield from (Tally(**value) for name, value in report.user_properties if name == "generated")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    total = Tally()
    for tally in tallies(terminalreporter):
        total.add(tally)
    if total.programs:
        terminalreporter.section("generated programs")
        terminalreporter.write_line("\n".join(total.lines()))
