"""Biases finished in a buffer: found for as long as the buffer holds them, and the model's own result after that."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_layers import example, sharpen
from finished_biases import BY_CUT, FINISHED_BIASES, KEPT, FinishedBias, Kept, filled
from measuring import GrapeCalls
from torch import Tensor, nn

from grape_compile import grape_compile, inspect, report, rewrite
from grape_compile.passes.capture import capture_export
from grape_compile.passes.pipeline import rewrite_program

TABLE = 1e-5
"""Of an output: logits of up to 64 * 0.3 from slopes that a table in float32 tells to 2^-24."""
ANY = ({1: torch.export.Dim.DYNAMIC},)

spellings = pytest.mark.parametrize("spelling", FINISHED_BIASES, ids=lambda each: each.cut.__name__)


class Pair:
    """A layer as it is and a copy that is compiled; what is done is done to both."""

    def __init__(self, layer: nn.Module, *, dynamic: bool | None = True) -> None:
        self.calls = GrapeCalls()
        self.plain = sharpen(layer)
        self.ours = grape_compile(copy.deepcopy(self.plain), backend=self.calls, dynamic=dynamic)

    def attended(self, length: int) -> int:
        """How many operators ran, where the results agree."""
        self.calls.reset()
        dtype = next(self.plain.parameters()).dtype
        x = example(length).to(dtype)
        wanted = self.plain(x)
        assert (self.ours(x) - wanted).abs().max() <= TABLE * wanted.abs().max()
        return self.calls.attended

    @property
    def tables(self) -> list[Tensor]:
        return [layer.get_buffer("table") for layer in (self.plain, self.ours)]


@spellings
def test_a_finished_bias_is_found_until_it_is_changed(spelling: FinishedBias) -> None:
    pair = Pair(spelling.make())
    assert [pair.attended(length) for length in (12, 17)] == [1, 1], str(report(pair.ours))
    for table in pair.tables:
        table.mul_(2)
    assert pair.attended(17) == 1
    before = pair.tables[0].clone()
    for table in pair.tables:
        table[..., 3] += 1
    # Steps are a clock: the operator takes it as it is.
    assert pair.attended(17) == (spelling is BY_CUT["steps"])
    for table in pair.tables:
        table.copy_(before)
    assert pair.attended(12) == 1


@pytest.mark.parametrize("name", ["mpt", "baichuan", "jina", "distances"])
def test_a_table_with_one_entry_off(name: str) -> None:
    """It is none that the example cuts out."""
    layer = BY_CUT[name].make()
    layer.table[..., KEPT // 2] *= 1.001 if layer.table.is_floating_point() else 2
    pair = Pair(layer)
    assert [pair.attended(length) for length in (12, KEPT)] == [0, 0]
    assert [refusal.rule for refusal in report(pair.ours).refusals] == ["table"]


@pytest.mark.parametrize("spelling", [BY_CUT["mpt"], BY_CUT["baichuan"], BY_CUT["jina"]])
@pytest.mark.parametrize("shapes", [None, ANY])
def test_an_exported_program(spelling: FinishedBias, shapes: Any) -> None:
    """What a state dict may replace is not relied on."""
    for persistent in (False, True):
        plain = sharpen(spelling.make(persistent=persistent))
        program = torch.export.export(plain, (example(),), dynamic_shapes=shapes, strict=False)
        rewritten, found = rewrite(program)
        assert [refusal.rule for refusal in found.refusals] == ["buffer"] * persistent, str(found)
        assert len(found.sites) == (not persistent)
        x = example(12 if shapes is None else 33)
        torch.testing.assert_close(rewritten.module()(x), plain(x), rtol=TABLE, atol=TABLE)


def test_a_file_holds_what_the_buffer_held() -> None:
    """No state is loaded into a program that is made for a file."""
    program = torch.export.export(BY_CUT["baichuan"].make(persistent=True), (example(),), strict=False)
    assert len(rewrite_program(capture_export(program)).sites) == 1


def test_another_table_in_its_place() -> None:
    pair = Pair(BY_CUT["mpt"].make(persistent=True))
    assert pair.attended(12) == 1
    bent = pair.plain.get_buffer("table").square()
    for table, operators in ((bent, 0), (3 * pair.plain.get_buffer("table"), 1)):
        wanted = torch.func.functional_call(pair.plain, {"table": table}, (example(),))
        pair.calls.reset()
        found = torch.func.functional_call(pair.ours, {"table": table}, (example(),))
        torch.testing.assert_close(found, wanted, rtol=TABLE, atol=TABLE)
        assert pair.calls.attended == operators
        for layer in (pair.plain, pair.ours):
            layer.load_state_dict({**pair.plain.state_dict(), "table": table.clone()}, assign=operators == 1)
        assert pair.attended(12) == operators
    assert any("buffer held other numbers" in refusal.reason for refusal in report(pair.ours).refusals)
    for layer in (pair.plain, pair.ours):
        layer.double()
    assert pair.attended(12) == 1
    copies = [copy.deepcopy(layer) for layer in (pair.plain, pair.ours)]
    for each in copies:
        each.get_buffer("table")[..., -2] = 5.0
    torch.testing.assert_close(copies[1](example().double()), copies[0](example().double()))
    assert pair.attended(12) == 1


def test_a_table_that_grows() -> None:
    """As models make theirs anew where a sequence is longer than it."""

    def growing(layer: Kept, scores: Tensor, length: int) -> Tensor:
        if length > layer.table.shape[-1]:
            layer.table = BY_CUT["press"].table(2 * length)
        return scores + layer.table[:, :length, :length]

    pair = Pair(Kept(BY_CUT["press"].table(16), growing), dynamic=None)
    assert pair.attended(12) == 1
    pair.attended(20)  # the call that makes the table has it in no buffer
    assert [pair.attended(21), pair.attended(23)] == [1, 1], str(report(pair.ours))


@pytest.mark.parametrize(
    ("slope", "size", "found"), [(0.25, 250, True), (0.25, 300, False), (0.3, 64, False)]
)
def test_tables_of_few_bits(slope: float, size: int, found: bool) -> None:
    """bfloat16 tells 256 distances apart: a table that is no line any more is left as it is."""
    table = (torch.tensor([slope, slope / 4]).view(1, 2, 1, 1) * torch.arange(1 - size, 1)).bfloat16()
    pair = Pair(Kept(table, BY_CUT["mpt"].cut))
    assert pair.attended(12) == found
    if not found:
        assert ["bfloat16" in refusal.reason for refusal in report(pair.ours).refusals] == [True]


def test_learned_slopes_keep_their_gradients() -> None:
    pair = Pair(BY_CUT["distances"].make().double())
    for layer in (pair.plain, pair.ours):
        torch.autograd.backward(layer(example().double()), example(seed=1).double())
    wanted, found = (
        {name: p.grad for name, p in layer.named_parameters()} for layer in (pair.plain, pair.ours)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert pair.calls.attended == 1


def test_a_table_the_graph_writes_to() -> None:
    def counting(layer: Kept, scores: Tensor, length: int) -> Tensor:
        layer.table[..., -1] += 0.5
        return filled(scores + layer.table[:, :, :, -length:])

    pair = Pair(Kept(BY_CUT["mpt"].table(KEPT), counting))
    assert [pair.attended(12) for _ in range(2)] == [0, 0]


def test_a_mask_in_a_buffer_is_a_mask_for_as_long_as_it_holds() -> None:
    """`is_causal` in the place of a mask says what the buffer held."""

    def masked(layer: Kept, scores: Tensor, length: int) -> Tensor:
        steps = torch.arange(length)
        bias = torch.tensor([0.25, 0.0625]).view(2, 1, 1) * (steps - steps[:, None])
        return (scores + bias).masked_fill(~layer.table[:length, :length], -torch.inf)

    pair = Pair(Kept(torch.ones(KEPT, KEPT, dtype=torch.bool).tril(), masked))
    assert pair.attended(12) == 1
    for table in pair.tables:
        table[:, 0] = False
        table[0, 0] = True
    assert pair.attended(12) == 0
    program = torch.export.export(Kept(pair.tables[0], masked, persistent=True), (example(),), strict=False)
    rewritten, found = rewrite(program)
    assert len(found.sites) == 1
    (call,) = (node for node in rewritten.graph.nodes if "attend" in str(node.target))
    assert not call.kwargs["is_causal"]


def test_a_parameter_that_is_not_trained() -> None:
    for trained in (False, True):
        layer = BY_CUT["mpt"].make()
        table = layer.table
        del layer.table
        layer.table = nn.Parameter(table, requires_grad=trained)
        pair = Pair(layer)
        assert pair.attended(12) == (not trained)


class Turned(nn.Module):
    """Tables as wide as a head, kept in buffers; `between` runs before they are used."""

    cos: Tensor
    sin: Tensor

    def __init__(self, between: Callable[[], None] = lambda: None, *, persistent: bool = True) -> None:
        super().__init__()
        self.between = between
        angle = torch.outer(torch.arange(32.0), 100.0 ** -torch.arange(0, 1, 0.25)).repeat(1, 2)
        self.register_buffer("cos", angle.cos(), persistent=persistent)
        self.register_buffer("sin", angle.sin(), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        cos, sin = self.cos[: x.shape[-2]], self.sin[: x.shape[-2]]
        self.between()
        half = torch.cat((-x[..., 4:], x[..., :4]), -1)
        return x * cos + half * sin


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch leaves it untyped
def pause() -> None:
    """Breaks the graph."""


@pytest.mark.parametrize("between", [lambda: None, pause], ids=["one graph", "a graph break"])
def test_tables_whose_halves_were_seen_to_be_equal(between: Callable[[], None]) -> None:
    """Both halves of a table of cosines are one operand for as long as they are equal."""
    calls = GrapeCalls()
    plain, ours = Turned(between), grape_compile(Turned(between), backend=calls)
    x = torch.randn(2, 3, 12, 8)
    for rotated, place in ((1, None), (2, (slice(None), slice(None))), (2, (slice(5), slice(2)))):
        for layer in (plain, ours):
            if place is not None:
                layer.get_buffer("cos")[place] *= 0.5
        torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=1e-6)
        assert calls.rotated == rotated, str(report(ours))


def test_equal_halves_that_a_state_dict_may_replace() -> None:
    x = torch.randn(2, 3, 12, 8)
    for persistent in (False, True):
        rewritten, found = rewrite(torch.export.export(Turned(persistent=persistent), (x,), strict=False))
        assert [refusal.rule for refusal in found.refusals] == ["buffer"] * persistent, str(found)
        assert len(found.sites) == (not persistent)
        torch.testing.assert_close(rewritten.module()(x), Turned()(x), rtol=1e-5, atol=1e-6)


def test_distances_that_are_given_are_read_at_every_query() -> None:
    """One row of a matrix stands for the others only where the matrix cannot be another one."""

    class Given(nn.Module):
        def forward(self, x: Tensor, apart: Tensor) -> Tensor:
            scores = x @ x.transpose(-1, -2) + torch.tensor([0.5, 0.25]).view(2, 1, 1) * apart
            return filled(scores).softmax(-1) @ x

    x, steps = torch.randn(1, 2, 12, 8), torch.arange(12)
    found = inspect(Given(), (x, steps - steps[:, None]))
    assert found.sites == ()
    assert [refusal.rule for refusal in found.refusals] == ["buffer"]


def test_entries_that_only_the_example_hides() -> None:
    class Padded(nn.Module):
        bias: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("bias", 0.25 * torch.arange(12.0), persistent=False)
            self.bias[5] = 7.0

        def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
            scores = (x @ x.transpose(-1, -2) + self.bias).masked_fill(hidden[:, None, None], -torch.inf)
            return filled(scores).softmax(-1) @ x

    found = inspect(Padded(), (torch.randn(1, 2, 12, 8), torch.arange(12)[None] == 5))
    assert found.sites == (), str(found)
