"""ALiBi of 8192 tokens builds no matrix of tokens by tokens, forward or backward."""

from __future__ import annotations

import subprocess
import sys

import pytest

MEASURE = """
import torch
from grape_compile.encoding import Bias, Learned, Steps, alibi
from grape_compile.operators import attend

torch.set_num_threads(1)

def resident(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name + ":")) / 1024

def layer(length, encoding, slots):
    query, key, value = (torch.randn(1, 8, length, 64, requires_grad=True) for _ in range(3))
    cotangent = torch.randn(1, 8, length, 64)
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")  # the peak starts again from what is resident now
    before = resident("VmRSS")
    attend(query, key, value, encoding, slots, is_causal=True).backward(cotangent)
    return resident("VmHWM") - before

learned = {learned}
encoding = Bias(Learned("slopes"), Steps()) if learned else alibi(8)
slots = {{"slopes": torch.rand(8, requires_grad=True)}} if learned else {{}}
layer(64, encoding, slots)
print(layer(8192, encoding, slots))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
def test_peak_memory_of_alibi(learned: bool) -> None:
    """Peak above the inputs below 512 MiB; one float32 matrix of 8 heads would be 2048 MiB."""
    code = MEASURE.format(learned=learned)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    peak = float(done.stdout)
    # Output and three gradients alone are 64 MiB: a smaller number would be a broken measurement.
    assert 64 <= peak < 512
