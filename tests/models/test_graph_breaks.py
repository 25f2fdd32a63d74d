"""Behind a graph break: tables made before it are known by their mark, and by nothing else."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import BY_NAME, output_of
from attention_layers import inverse_frequencies
from measuring import GrapeCalls
from torch import Tensor, nn

from grape_compile import grape_compile, inspect, report


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch leaves it untyped
def pause() -> None:
    """Breaks the graph."""


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Broken(nn.Module):
    """Makes tables, breaks the graph, does something to them, and turns by them."""

    inv_freq: Tensor

    def __init__(self, between: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.register_buffer("inv_freq", inverse_frequencies(8))
        self.between = between

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        angle = torch.outer(positions.to(x.dtype), self.inv_freq)
        cos, sin = torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()
        pause()
        cos, sin = self.between(cos, sin)
        pause()
        return turned(x, cos, sin)


def untouched(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return cos, sin


class Spoils:
    """Leaves the tables alone until it is told otherwise."""

    def __init__(self, spoil: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        self.spoil, self.is_on = spoil, False

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch leaves it untyped
    def __call__(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return self.spoil(cos, sin) if self.is_on else (cos, sin)


def written_into(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos[:, :8] *= 3
    return cos, sin


def replaced(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat((3 * cos[:, :8], cos[:, 8:]), -1), sin


def exchanged(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return sin, cos


STEPS = torch.arange(12)
X = torch.randn(2, 3, 12, 16, generator=torch.Generator().manual_seed(0))


def test_tables_are_known_behind_the_break() -> None:
    calls = GrapeCalls()
    model = grape_compile(Broken(untouched), backend=calls)
    for positions in (STEPS, STEPS + 5, STEPS.flip(0)):
        calls.reset()
        torch.testing.assert_close(model(X, positions), Broken(untouched)(X, positions))
        assert calls.rotated == 1
    (site,) = report(model).sites
    assert "geometric" in str(site.encoding)
    assert site.evidence == "tables"
    assert report(model).refusals == ()


class Fleeting(nn.Module):
    """Breaks the graph where it makes tables, of positions that nobody keeps (OmniGen)."""

    inv_freq: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", inverse_frequencies(8))

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        pause()
        angle = positions.double()[:, None] * self.inv_freq
        return torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return turned(x, *self.tables(positions + 1))


def test_tables_of_positions_that_are_gone() -> None:
    model, calls = Fleeting().double(), GrapeCalls()
    wanted = model(X.double(), STEPS)
    compiled = grape_compile(model, backend=calls)
    torch.testing.assert_close(compiled(X.double(), STEPS), wanted, rtol=1e-12, atol=1e-12)
    assert calls.rotated == 1, str(report(compiled))


def test_angles_of_activations_are_known_behind_the_break() -> None:
    calls = GrapeCalls()
    model = grape_compile(Broken(untouched), backend=calls)
    for seed in (0, 1):
        places = torch.randn(12, generator=torch.Generator().manual_seed(seed))
        calls.reset()
        torch.testing.assert_close(model(X, places), Broken(untouched)(X, places))
        assert calls.rotated == 1


@pytest.mark.parametrize("spoil", [written_into, replaced, exchanged], ids=lambda spoil: spoil.__name__)
def test_other_tables_in_a_later_call_are_not_taken_for_the_first(spoil: Any) -> None:
    between, calls = Spoils(spoil), GrapeCalls()
    model, original = grape_compile(Broken(between), backend=calls), Broken(between)
    assert (model(X, STEPS) - original(X, STEPS)).abs().max() == 0
    for is_on, rotated in ((True, 0), (False, 1)):
        between.is_on = is_on
        calls.reset()
        torch.testing.assert_close(model(X, STEPS), original(X, STEPS), rtol=1e-6, atol=1e-6)
        assert calls.rotated == rotated


def test_tables_of_two_calls_are_not_tables_of_one() -> None:
    """The cosine of this call with the sine of the last: equal to nothing that was proved."""
    kept: list[Tensor] = []

    def stale(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        kept.append(sin)
        return cos, kept[-2] if len(kept) > 1 else sin

    between, calls = Spoils(stale), GrapeCalls()
    between.is_on = True
    model = grape_compile(Broken(between), backend=calls)
    model(X, STEPS)
    assert calls.rotated == 1
    calls.reset()
    wanted = turned(
        X, *(torch.outer(at.float(), inverse_frequencies(8)).repeat(1, 2) for at in (STEPS, STEPS))
    )
    found = model(X, STEPS + 7)
    angles = [torch.outer(at.float(), inverse_frequencies(8)).repeat(1, 2) for at in (STEPS + 7, STEPS)]
    wanted = turned(X, angles[0].cos(), angles[1].sin())
    torch.testing.assert_close(found, wanted)
    assert calls.rotated == 0


class Moved(nn.Module):
    """Tables that pass a graph of their own, one after the other, on their way: rows in the order of windows."""

    inv_freq: Tensor

    def __init__(self, orders: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.register_buffer("inv_freq", inverse_frequencies(8))
        self.orders = torch.compiler.disable(orders)

    def window(self, table: Tensor, order: Tensor) -> Tensor:
        pause()
        moved = table.reshape(table.shape[0] // 2, 2, -1)[order].reshape(table.shape)
        pause()
        return moved

    def forward(self, x: Tensor, positions: Tensor, order: Tensor) -> Tensor:
        angle = torch.outer(positions.to(x.dtype), self.inv_freq).repeat(1, 2)
        first, second = self.orders(order)
        cos, sin = self.window(angle.cos(), first), self.window(angle.sin(), second)
        return turned(x, cos, sin)


def test_tables_moved_by_one_graph_called_twice() -> None:
    model, calls = Moved(lambda order: (order, order)), GrapeCalls()
    grape_compile(model, backend=calls)
    for length in (12, 12, 8, 10):
        x, positions = X[:, :, :length], STEPS[:length] + length
        order = torch.randperm(length // 2, generator=torch.Generator().manual_seed(length))
        calls.reset()
        found = model(x, positions, order)
        torch.testing.assert_close(found, Moved(model.orders)(x, positions, order), rtol=1e-6, atol=1e-6)
        assert calls.rotated == 1
    assert report(model).refusals == ()


def test_tables_moved_in_different_ways_are_no_tables_of_one_angle() -> None:
    """First in the same way, so that the graph is read as a rotation; then not, which has to be seen, and is told."""
    apart = [False]
    model, calls = Moved(lambda order: (order, order.flip(0) if apart[0] else order)), GrapeCalls()
    grape_compile(model, backend=calls)
    for apart[0], rotated in ((False, 1), (True, 0), (False, 1)):
        calls.reset()
        found = model(X, STEPS, torch.arange(6))
        torch.testing.assert_close(found, Moved(model.orders)(X, STEPS, torch.arange(6)))
        assert calls.rotated == rotated
    (refusal,) = report(model).refusals
    assert refusal.rule == "outside"
    assert "later call" in refusal.reason


class Angles(nn.Module):
    inv_freq: Tensor

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.register_buffer("inv_freq", inverse_frequencies(8) / scale)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        pause()
        angle = torch.outer(positions.float(), self.inv_freq).repeat(1, 2)
        return angle.cos(), angle.sin()


class Layer(nn.Module):
    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        pause()
        return turned(x, cos, sin)


class Layers(nn.Module):
    """Frequencies by layer, as local and global attention have them: the same operators on another buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.angles = nn.ModuleList([Angles(1.0), Angles(8.0)])
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        for layer, tables in zip(self.layers, [each(positions) for each in self.angles], strict=True):
            x = layer(x, *tables)
        return x


def test_one_graph_serves_layers_with_tables_of_their_own() -> None:
    calls = GrapeCalls()
    model = grape_compile(Layers(), backend=calls)
    for positions in (STEPS, STEPS + 3):
        calls.reset()
        torch.testing.assert_close(model(X, positions), Layers()(X, positions), rtol=1e-5, atol=1e-5)
        assert calls.rotated == 2
    assert report(model).refusals == ()


def test_tables_of_angles_that_are_given_are_refused() -> None:
    """Cosine and sine of one tensor, which does not show that it repeats its columns."""

    class Handed(nn.Module):
        def forward(self, x: Tensor, angle: Tensor) -> Tensor:
            cos, sin = angle.cos(), angle.sin()
            pause()
            return turned(x, cos, sin)

    angle = torch.outer(STEPS.float(), inverse_frequencies(8)).repeat(1, 2)
    model = grape_compile(Handed(), backend="eager")
    torch.testing.assert_close(model(X, angle), Handed()(X, angle))
    (refusal,) = report(model).refusals
    assert "nothing shows" in refusal.reason


def test_a_copy_of_a_table_has_no_origin() -> None:
    """A mark belongs to the tensor: it goes into no copy and no file."""
    kept: list[Tensor] = []

    def copied(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        kept[:] = [copy.deepcopy(cos), sin]
        torch.save(cos, io.BytesIO())
        return kept[0], sin

    between, calls = Spoils(copied), GrapeCalls()
    between.is_on = True
    model = grape_compile(Broken(between), backend=calls)
    torch.testing.assert_close(model(X, STEPS), Broken(untouched)(X, STEPS))
    assert calls.rotated == 0
    assert [refusal.rule for refusal in report(model).refusals] == ["outside"]


class Given(nn.Module):
    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return turned(x, cos, sin)


def test_tables_that_a_caller_gives_are_refused_with_a_reason() -> None:
    angle = torch.outer(STEPS.float(), inverse_frequencies(8)).repeat(1, 2)
    compiled = grape_compile(Given(), backend="eager")
    torch.testing.assert_close(compiled(X, angle.cos(), angle.sin()), Given()(X, angle.cos(), angle.sin()))
    for found in (report(compiled), inspect(Given(), (X, angle.cos(), angle.sin()))):
        assert found.sites == ()
        assert [refusal.rule for refusal in found.refusals] == ["outside"]
        assert "graph break" in found.refusals[0].reason


@pytest.mark.parametrize("join", [lambda c, s: torch.stack((c, s), -1), lambda c, s: torch.cat((c, s), -1)])
def test_tables_given_in_one_tensor_are_refused_as_well(join: Callable[[Tensor, Tensor], Tensor]) -> None:
    class Joined(nn.Module):
        def forward(self, x: Tensor, both: Tensor) -> Tensor:
            cos, sin = both.unbind(-1) if both.dim() == 3 else both.chunk(2, -1)
            return turned(x, cos, sin)

    angle = torch.outer(STEPS.float(), inverse_frequencies(8)).repeat(1, 2)
    found = inspect(Joined(), (X, join(angle.cos(), angle.sin())))
    assert [refusal.rule for refusal in found.refusals] == ["outside"]


def test_a_bias_made_before_the_break_is_refused() -> None:
    class Biased(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            steps, slopes = torch.arange(q.shape[2]), 0.5 ** torch.arange(1.0, 4.0)
            bias = slopes[:, None, None] * (steps - steps[:, None])
            pause()
            return (q @ k.transpose(-1, -2) + bias).softmax(-1) @ v

    model = grape_compile(Biased(), backend="eager")
    torch.testing.assert_close(model(X, X, X), Biased()(X, X, X))
    assert report(model).sites == ()
    assert ["graph break" in refusal.reason for refusal in report(model).refusals] == [True]


@pytest.mark.parametrize("cut", [lambda table, n: table[:, :n, :n], lambda table, n: table[:, -1:, -n:]])
def test_a_bias_cut_from_a_buffer_before_the_break_is_told(cut: Callable[[Tensor, int], Tensor]) -> None:
    """Also where the cut begins at an offset that is open, so that the graph is given any tensor."""

    class Cut(nn.Module):
        table: Tensor

        def __init__(self) -> None:
            super().__init__()
            steps, slopes = torch.arange(32), 0.5 ** torch.arange(1.0, 4.0)
            self.register_buffer("table", slopes[:, None, None] * (steps - steps[:, None]))

        def forward(self, x: Tensor) -> Tensor:
            bias = cut(self.table, x.shape[2])
            pause()
            return (x @ x.transpose(-1, -2) + bias).softmax(-1) @ x

    model = grape_compile(Cut(), backend="eager", dynamic=True)
    torch.testing.assert_close(model(X), Cut()(X))
    assert report(model).sites == ()
    assert len(report(model).refusals) == 1, str(report(model))


def test_a_gate_that_is_no_rotation_is_not_taken_for_one() -> None:
    """Factors of any modulus are no tables of one angle: neither a site nor a refusal."""
    found = inspect(Given(), (X, torch.randn(12, 16), torch.randn(12, 16)))
    assert (found.sites, found.refusals) == ((), ())


def test_a_model_broken_in_every_layer() -> None:
    """As the loops over experts of dbrx and jetmoe break it: tables of the first graph, layers in the later ones."""
    row = BY_NAME["llama"]
    model, calls = row.build(), GrapeCalls()
    for layer in model.get_submodule("model.layers").children():
        run = layer.get_submodule("mlp").forward

        def broken(x: Tensor, run: Callable[[Tensor], Tensor] = run) -> Tensor:
            pause()
            return run(x)

        layer.get_submodule("mlp").forward = broken
    grape_compile(model, backend=calls)
    original = row.build()
    for length in (16, 9):
        inputs = row.inputs(seq=length)
        calls.reset()
        with torch.no_grad():
            found, wanted = output_of(model(**inputs)), output_of(original(**inputs))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        assert calls.rotated == row.rotations
    assert report(model).refusals == ()
    # One graph for all layers; the report says for which.
    told = [site.module for site in report(model).sites]
    assert sorted(set(told)) == [f"model.layers.{number}.self_attn" for number in range(2)]
    assert len(told) == row.rotations
