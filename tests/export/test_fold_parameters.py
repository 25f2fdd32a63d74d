"""What follows from parameters alone is a number of the file, and nothing else is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from grape_compile.encoding import rope
from grape_compile.export.onnx.fold_parameters import fold_parameters
from grape_compile.nn import GRAPEAttention, LearnedRotation


def names(program: torch.export.ExportedProgram) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


def test_bases_and_spectra_are_numbers() -> None:
    torch.manual_seed(0)
    attention = GRAPEAttention(16, 2, LearnedRotation(rope(8), basis="cayley"))
    with torch.no_grad():
        for parameter in attention.grape.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    states = torch.randn(2, 5, 16)
    program = torch.export.export(attention, (states,))
    before = str(program.graph)
    folded = fold_parameters(program)
    assert str(program.graph) == before
    assert {"aten.linalg_solve.default", "aten.exp.default"} <= names(program)
    assert not {"aten.linalg_solve.default", "aten.exp.default", "aten.eye.default"} & names(folded)
    # A few roundings of numbers below one.
    torch.testing.assert_close(folded.module()(states), attention(states), rtol=0, atol=1e-6)


class Counts(nn.Module):
    """A buffer that every call writes to, a transposed weight, and linear algebra on what comes in."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.eye(3))
        self.weight = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        solved: Tensor = torch.linalg.solve(self.calls + 0, x) + torch.linalg.matrix_exp(x) @ self.weight.mT
        self.calls.add_(1.0)
        return solved


def test_what_changes_is_computed() -> None:
    program = torch.export.export(Counts(), (torch.randn(3, 3),))
    assert fold_parameters(program) is program
