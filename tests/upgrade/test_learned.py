"""What holds for encodings holds after training: bases are orthogonal, logits depend on offsets, norms stay."""

from typing import Any

import pytest
import torch
from torch import nn
from upgrading import ROWS, encodings, upgraded

from grape_compile.encoding import Multiplicative, Positions
from grape_compile.nn import LearnedRotation, MixedRotation, OrthogonalBasis
from grape_compile.operators import reference_rotate
from grape_compile.operators.prepare import parts


def train(model: nn.Module, steps: int) -> None:
    """Training of the encodings alone, by loud and random targets."""
    ids = ROWS["llama"].inputs(seq=8)["input_ids"]
    optimiser = torch.optim.Adam(encodings(model).values(), lr=1e-2)
    for step in range(steps):
        labels = torch.randint(3, 90, ids.shape, generator=torch.Generator().manual_seed(step))
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"basis": "cayley"}, 20),
        *(
            pytest.param(options, 1000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])
            for options in (
                {"basis": "cayley"},
                {"basis": "householder"},
                {"basis": "orthogonal"},
                {"non_commuting": 8, "basis": "cayley"},
            )
        ),
    ],
    ids=str,
)
def test_laws_after_training(options: dict[str, Any], steps: int) -> None:
    model = upgraded(ROWS["llama"], "grape-m", **options)
    train(model, steps)
    own = model.get_submodule("model.layers.0.self_attn.grape")
    assert isinstance(own, LearnedRotation | MixedRotation)
    assert isinstance(own.basis, OrthogonalBasis)
    with torch.no_grad():
        basis, slots = own.basis(), own(torch.zeros(1, 1, 64))
    assert (basis - torch.eye(16)).abs().max() > 1e-2  # it learned
    assert (basis.mT @ basis - torch.eye(16)).abs().max() < 1e-6
    turned = [part for part in parts(own.encoding) if isinstance(part, Multiplicative)]
    wide = {name: slot.double() for name, slot in slots.items()}
    query, key = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def at(tensor: torch.Tensor, place: int) -> torch.Tensor:
        for part in turned:
            assert isinstance(part.clock, Positions)
            [tensor] = reference_rotate([tensor], part, {**wide, part.clock.slot: torch.tensor([place])})
        return tensor

    logits = [float((at(query, 7 + shift) * at(key, 3 + shift)).sum()) for shift in (0, 5, 1000)]
    # The basis is a float32 number: it is orthogonal to 1e-6, not further.
    assert max(logits) - min(logits) < 2e-5 * float(query.norm() * key.norm())
    assert abs(float(at(query, 11).norm() / query.norm()) - 1.0) < 1e-6
