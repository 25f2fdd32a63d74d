"""Sigmoids and hyperbolic tangents of a library keep the contract, at their ends too."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("tvm")

from grape_compile.export.tvm import build


class Activations(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x.sigmoid(), x.tanh(), nn.functional.silu(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_activations_are_what_torch_computes(dtype: torch.dtype) -> None:
    model = Activations()
    ends = torch.tensor(
        [-104.0, -88.0, -87.0, -0.0, 1e-20, 0.625, 87.0, 104.0, torch.inf, -torch.inf, torch.nan]
    )
    x = torch.cat((torch.linspace(-12, 12, 1001), ends)).to(dtype)[None]
    library = build(model, (x[:, :64].expand(2, 64).contiguous(),), target="llvm", verify=False)
    for found, own, exact in zip(library.run(x.numpy()).values(), model(x), model(x.double()), strict=True):
        unit = torch.finfo(dtype).eps / 2
        # A result passes the exponential, a sum, a quotient and at most one product.
        allowed = (unit + 4 * torch.finfo(torch.float32).eps) * exact.abs() + torch.finfo(dtype).tiny
        result = torch.from_numpy(found)
        assert torch.equal(result.isnan(), own.isnan())
        fits = (result.double() - exact).abs() <= allowed
        assert (fits | ~own.isfinite()).all()
        np.testing.assert_array_equal(found[~np.isfinite(own.numpy())], own[~own.isfinite()].numpy())
