"""Attention over 8192 tokens builds no matrix of tokens by tokens, forward or backward, whatever the encoding."""

from __future__ import annotations

import subprocess
import sys

import pytest

MEASURE = """
import sys
import torch
from grape_compile.encoding import parse
from grape_compile.operators import attend

torch.set_num_threads(1)

def resident(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name + ":")) / 1024

def layer(length, encoding):
    query, key, value = (torch.randn(1, 8, length, 64, requires_grad=True) for _ in range(3))
    cotangent = torch.randn(1, 8, length, 64)
    shapes = dict(slopes=(8,), log_forget=(1, 8, length), gate_query=(1, 8, length), gate_key=(1, 8, length),
                  rates=(1, 1, length), path_query=(1, 8, length, 8), path_key=(1, 8, length, 8))
    slots = {name: torch.rand(shapes[name]) for name in encoding.slots}
    slots = {name: (-slot if name == "log_forget" else slot / 64).requires_grad_() for name, slot in slots.items()}
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")  # the peak starts again from what is resident now
    before = resident("VmRSS")
    attend(query, key, value, encoding, slots, is_causal=True).backward(cotangent)
    assert all(slot.grad is not None for slot in slots.values())
    return resident("VmHWM") - before

encoding = parse(sys.argv[1])
layer(64, encoding)
print(layer(8192, encoding))
"""

ENCODINGS = {
    "alibi": "bias(alibi_slopes(8), steps)",
    "learned_alibi": 'bias(learned("slopes"), steps)',
    "fox": 'bias(uniform(-1.0), accumulated("log_forget", true))',
    "gated": 'bias(alibi_slopes(8), steps, gate=gate(query="gate_query", key="gate_key"))',
    "phase_modulated": 'bias(learned("slopes"), accumulated("rates", false))',
    "absolute": "bias(alibi_slopes(8), steps, distance=absolute)",
    "grape_ap": 'path_bias(log_sigmoid, learned("slopes"), 8, turn=rotation(interleaved(8), geometric(1.0), steps))',
    "contextual_and_ap": 'compose((rotation(half(64), geometric(1e4), accumulated("rates", false)), '
    'path_bias(log_sigmoid, learned("slopes"), 8, normalised="both")))',
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_peak_memory(encoding: str) -> None:
    """Peak above the inputs below 512 MiB; one float32 matrix of 8 heads would be 2048 MiB."""
    command = [sys.executable, "-c", MEASURE, ENCODINGS[encoding]]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak = float(done.stdout)
    print(f"{encoding}: {peak:.0f} MiB above the inputs")
    # Output and three gradients alone are 64 MiB: a smaller number would be a broken measurement.
    assert 64 <= peak < 512
