"""What a compiler sees of the kernels: launches in the graph that write their outputs and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from attention_layers import HIDDEN
from kernel_cases import DEVICE, kernels_first
from rotation_spellings import ROTATION_SPELLINGS, Spelling

from grape_compile import grape_compile, report
from grape_compile.encoding import Encoding, alibi, fox, grape_ap, rope
from grape_compile.operators import attention, providers
from grape_compile.operators.providers import turn_lowering
from grape_compile.operators.sample import tensor
from grape_compile.operators.turn_call import TurnCall

ROOT = Path(__file__).parents[2]

#: Traces forward and backward for a Hopper GPU that is not there.
PROGRAM = """
import json, sys
import torch
import triton
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from triton.backends.compiler import GPUTarget

from grape_compile.encoding import Half, Learned, Positions, Rotation
from grape_compile.operators import rotate, rotate_into
from kernel_cases import kernels_only


class Absent:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


triton.runtime.driver.set_active(Absent())
encoding = Rotation(Half(16), Learned("f"), Positions("n"))


def layer(query, key, positions, frequencies):
    turned = rotate([query, key], encoding, {"n": positions, "f": frequencies})
    return (turned[0].float().square().sum() + turned[1].float().square().sum(),)


def in_place(hidden, weight, positions, frequencies):
    heads = torch.nn.functional.linear(hidden, weight).unflatten(-1, (-1, 16)).transpose(1, 2)
    rotate_into([heads], [heads], encoding, {"n": positions, "f": frequencies})
    return (heads.float().square().sum(),)


dynamic = sys.argv[1] == "dynamic"
with kernels_only(), FakeTensorMode(shape_env=ShapeEnv()) as mode:
    kinds = [DimDynamic.DYNAMIC if dynamic else DimDynamic.STATIC] * 2
    sized = mode.from_tensor(torch.empty(3, 37), symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds))
    batch, length = sized.shape
    query, key = (torch.empty(batch, length, heads, 16).transpose(1, 2).requires_grad_() for heads in (4, 2))
    positions = torch.zeros(batch, 1, length, dtype=torch.int64)
    operands = query, key, positions, torch.zeros(8, requires_grad=True)
    joint = aot_export_joint_simple(layer, operands, trace_joint=True)
    hidden, weight = torch.empty(batch, length, 64), torch.empty(64, 64)
    with torch.no_grad():
        alone = aot_export_joint_simple(in_place, (hidden, weight, positions, torch.zeros(8)), trace_joint=False)
    guards = [str(guard.expr) for guard in mode.shape_env.guards]
launches = [
    sorted(node.kwargs["tensors_to_clone"])
    for node in joint.graph.nodes
    if node.target is torch.ops.higher_order.triton_kernel_wrapper_functional
]
(launch,) = [node for node in alone.graph.nodes if "triton" in str(node.target)]
given, node = launch.kwargs["kwargs"], launch.kwargs["kwargs"]["y0"]
written_over, others = [sorted(launch.kwargs["tensors_to_clone"]), given["x0"] is node], 0
while node.op == "call_function":
    others, node = others + len(node.users) - 1, node.args[0]
copies = [str(node.target) for node in joint.graph.nodes if "clone" in str(node.target)]
print(json.dumps([launches, copies, guards, [*written_over, others]]))
"""


@pytest.mark.parametrize("sizes", ["static", "dynamic"])
def test_one_launch_forth_and_one_back_that_copy_nothing(sizes: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    )
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, sizes], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    launches, copies, guards, in_place = json.loads(done.stdout.splitlines()[-1])
    assert launches == [["y0", "y1"], ["by_sin", "d0", "d1"]]
    assert copies == []
    # What is turned in place is read by its own launch alone, so that a compiler writes there without a copy.
    assert in_place == [["y0"], True, 0]
    # A graph for any number of rows and tokens stays one.
    assert guards == []


CHOSEN = ("in_the_middle", "axis_after_axis", "cos_and_sin_tables", "grouped_queries")


@pytest.mark.parametrize(
    "spelling", [row for row in ROTATION_SPELLINGS if row.name in CHOSEN], ids=lambda spelling: spelling.name
)
def test_a_model_turns_by_the_kernel_and_its_report_says_so(spelling: Spelling) -> None:
    model = spelling.make().to(DEVICE)
    given = tensor(2, 7, HIDDEN, dtype=torch.float32).to(DEVICE)
    wanted = model(given)
    with kernels_first():
        compiled = grape_compile(model, backend="eager")
        found = compiled(given)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    sites = report(compiled).sites
    assert len(sites) == spelling.rotations
    assert {site.lowering for site in sites} == {"grape::rotate by triton"}


def test_the_report_says_why_a_kernel_does_not_apply() -> None:
    call = TurnCall((torch.zeros(2, 4, 8, dtype=torch.float64, device=DEVICE),), rope(8), {})
    with kernels_first():
        assert turn_lowering(call) == "grape::rotate by torch (triton: float64 tensors turn in float64)"


def test_the_kernels_of_the_table_are_those_of_rotations() -> None:
    """By a tensor that only stands for one of a GPU: no test here puts its own row into the table."""
    with FakeTensorMode():
        call = TurnCall((torch.empty(2, 4, 8, dtype=torch.float16, device="cuda"),), rope(8), {})
        assert turn_lowering(call) == "grape::rotate by triton"


@pytest.mark.parametrize("encoding", [alibi(4), fox(), grape_ap(4)], ids=["alibi", "fox", "path"])
def test_gradients_lie_as_compilers_plan(encoding: Encoding, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the gradient of heads [B, H, T, D] lies as they do, token after token."""
    monkeypatch.setattr(attention, "_planned", torch.empty_like)
    kernel = "path" if encoding.slots == grape_ap(4).slots else "attention"
    row = providers.Provider("triton", f"grape_compile.kernels.{kernel}", priority=99, devices=(DEVICE,))
    monkeypatch.setattr(providers, "PROVIDERS", (row,))
    made = [tensor(1, 17, count, 8, dtype=torch.float32, seed=count).to(DEVICE) for count in (4, 2, 2)]
    query, key, value = (each.transpose(1, 2) for each in made)
    sizes = {"log_forget": (1, 4, 17), "path_query": (1, 4, 17, 8), "path_key": (1, 4, 17, 8)}
    slots = [-torch.rand(sizes[name], device=DEVICE) for name in encoding.slots]
    options = str(encoding), None, True, 1.0, None
    results = torch.ops.grape.attend(query, key, value, slots, *options)
    operands = torch.ones_like(results[0]), query, key, value, *results, slots
    ending = *options, None, None, None, bool(slots), False
    found = torch.ops.grape.attend_backward(*operands, *ending)
    with FakeTensorMode() as mode:
        told = torch.ops.grape.attend_backward(
            *([mode.from_tensor(one) for one in each] if isinstance(each, list) else mode.from_tensor(each)
              for each in operands), *ending
        )  # fmt: skip
    assert [each.stride() for each in told] == [each.stride() for each in found]
    assert [each.stride() for each in told[:3]] == [each.stride() for each in (query, key, value)]


def test_without_triton_everything_imports_and_runs() -> None:
    program = """
import sys
sys.modules["triton"] = None
import importlib, pkgutil
import torch
import grape_compile
from grape_compile.encoding import rope
from grape_compile.errors import GrapeError
from grape_compile.kernels import turning
from grape_compile.operators import rotate
from grape_compile.operators.turn_call import TurnCall
for module in pkgutil.walk_packages(grape_compile.__path__, "grape_compile."):
    if ".bodies." not in module.name:
        try:
            importlib.import_module(module.name)
        except GrapeError as missing:
            assert "apache-tvm" in str(missing)
heads = torch.ones(1, 2, 3, 8)
rotate([heads], rope(8))
print(turning.supports(TurnCall((heads,), rope(8), {})))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "Triton is not installed: pip install 'grape-compile[gpu]'"
