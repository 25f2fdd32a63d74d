"""A model on a GPU is proved on the CPU: so is a program that names a device this machine does not have."""

from __future__ import annotations

import pytest
import torch
from attention_layers import HIDDEN
from rotation_spellings import ROTATION_SPELLINGS, Spelling

from grape_compile import inspect

CHOSEN = ("plain", "rolled", "fused_multiply_add")


@pytest.mark.parametrize(
    "spelling", [row for row in ROTATION_SPELLINGS if row.name in CHOSEN], ids=lambda spelling: spelling.name
)
def test_tables_made_on_another_device(spelling: Spelling) -> None:
    program = torch.export.export(spelling.make(), (torch.randn(2, 7, HIDDEN),), strict=False)
    # A device no build of torch can allocate on.
    made = [node for node in program.graph.nodes if node.kwargs.get("device") is not None]
    for node in made:
        node.update_kwarg("device", torch.device("vulkan"))
    found = inspect(program)
    assert made
    assert len(found.sites) == spelling.rotations
    assert found.refusals == ()
