"""Every door into the library: torch.compile's backend name, exported programs, graph modules."""

import functools
import io

import pytest
import torch
from architectures import BY_NAME, Architecture, Logits, output_of
from attention_layers import HEAD_DIM, RotaryAttention, example, inverse_frequencies, sharpen
from bias_spellings import BIAS_SPELLINGS
from rotation_spellings import ROTATION_SPELLINGS, plain
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx

from grape_compile import inspect, rewrite
from grape_compile.errors import CaptureError

ROWS = [BY_NAME[name] for name in ("llama", "gptj", "bloom", "mpt", "deepseek_v3")]
rows = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


@functools.cache
def exported(row: Architecture, *, dynamic: bool = False) -> ExportedProgram:
    shapes = ({0: Dim("batch", min=2, max=8), 1: Dim("length", min=4, max=64)},) if dynamic else None
    return torch.export.export(Logits(row.build()), (ids_of(row),), dynamic_shapes=shapes)


def ids_of(row: Architecture, batch: int = 2, seq: int = 16) -> Tensor:
    ids: Tensor = row.inputs(batch=batch, seq=seq)["input_ids"]
    return ids


def operators_in(graph: fx.Graph) -> tuple[int, int]:
    """Tensors rotated and attentions with a bias, counted as nodes of ours."""
    rotated = attended = 0
    for node in graph.nodes:
        if node.target is torch.ops.grape.rotate.default:
            rotated += len(node.args[0])
        attended += node.target is torch.ops.grape.attend.default
    return rotated, attended


def assert_same(found: Tensor, row: Architecture, ids: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(found, Logits(row.build())(ids), rtol=1e-4, atol=1e-5)


@rows
def test_an_exported_program(row: Architecture) -> None:
    program, found = rewrite(exported(row))
    assert isinstance(program, ExportedProgram)
    assert operators_in(program.graph) == (row.rotations, row.biases)
    assert len(found.sites) == row.sites
    assert found.refusals == ()
    assert_same(program.module()(ids_of(row)), row, ids_of(row))


@rows
def test_an_exported_program_with_a_dynamic_shape(row: Architecture) -> None:
    program, found = rewrite(exported(row, dynamic=True))
    assert operators_in(program.graph) == (row.rotations, row.biases), str(found)
    module = program.module()
    for batch, length in ((2, 16), (3, 23), (2, 5)):
        ids = ids_of(row, batch, length)
        assert_same(module(ids), row, ids)


@rows
def test_the_given_program_is_left_as_it_was(row: Architecture) -> None:
    program = exported(row)
    text = str(program.graph)
    rewrite(program)
    assert str(program.graph) == text


@rows
def test_a_rewritten_program_is_saved_and_loaded(row: Architecture) -> None:
    program, _ = rewrite(exported(row))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    assert operators_in(loaded.graph) == (row.rotations, row.biases)
    assert_same(loaded.module()(ids_of(row)), row, ids_of(row))


@rows
def test_a_rewritten_program_is_exported_again(row: Architecture) -> None:
    program, _ = rewrite(exported(row))
    again = torch.export.export(program.module(), (ids_of(row),))
    assert operators_in(again.graph) == (row.rotations, row.biases)
    assert_same(again.module()(ids_of(row)), row, ids_of(row))


@rows
def test_decompositions_of_a_rewritten_program(row: Architecture) -> None:
    program, _ = rewrite(exported(row))
    decomposed = program.run_decompositions()
    assert_same(decomposed.module()(ids_of(row)), row, ids_of(row))


@rows
def test_a_decomposed_program_is_still_read(row: Architecture) -> None:
    """Core ATen is another spelling of the same model."""
    _, found = rewrite(exported(row).run_decompositions())
    kinds = [site.kind for site in found.sites]
    assert (kinds.count("rotation"), kinds.count("bias")) == (row.rotations, row.biases), str(found)


@rows
def test_a_second_rewrite_finds_nothing_left(row: Architecture) -> None:
    program, _ = rewrite(exported(row))
    again, found = rewrite(program)
    assert found.sites == ()
    assert operators_in(again.graph) == (row.rotations, row.biases)


@rows
def test_a_rewritten_program_is_compiled(row: Architecture) -> None:
    program, _ = rewrite(exported(row))
    compiled = torch.compile(program.module(), backend="aot_eager")
    assert_same(compiled(ids_of(row)), row, ids_of(row))


@pytest.mark.parametrize("row", ROWS[:1] + ROWS[2:3], ids=lambda row: row.name)
def test_training_through_a_rewritten_program(row: Architecture) -> None:
    program, _ = rewrite(exported(row))
    module = program.module()
    plain = Logits(row.build())
    gradients = []
    for each in (plain, module):
        torch.autograd.backward(each(ids_of(row)).square().mean())
        gradients.append({name: parameter.grad for name, parameter in each.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-6)


LAYERS = {
    "rotate_half": ROTATION_SPELLINGS[0].make,
    "narrow_tables": ROTATION_SPELLINGS[1].make,
    "alibi": BIAS_SPELLINGS[0].make,
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_graph_module(name: str) -> None:
    layer = sharpen(LAYERS[name]())
    module = torch.export.export(layer, (example(),)).module()
    assert isinstance(module, fx.GraphModule)
    rewritten, found = rewrite(module, (example(),))
    assert isinstance(rewritten, fx.GraphModule)
    rotated, attended = operators_in(rewritten.graph)
    assert rotated + attended == len(found.sites) > 0, str(found)
    torch.testing.assert_close(rewritten(example()), layer(example()), rtol=1e-4, atol=1e-5)


def test_a_graph_module_traced_symbolically() -> None:
    """Method calls and submodules in the graph, no ATen operators yet."""

    class Turned(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return plain(x, torch.outer(torch.arange(12.0), inverse_frequencies(8)))

    module = fx.symbolic_trace(Turned())
    x = torch.randn(2, 4, 12, 16)
    rewritten, found = rewrite(module, (x,))
    assert operators_in(rewritten.graph) == (1, 0), str(found)
    torch.testing.assert_close(rewritten(x), module(x))


class Scaled(nn.Module):
    """Two layers and a number that need not be given."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(RotaryAttention(plain), RotaryAttention(plain))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        out: Tensor = self.layers(x) * scale
        return out


def test_a_traced_module_of_submodules_is_trained_and_takes_other_sizes() -> None:
    model = sharpen(Scaled())
    traced = fx.symbolic_trace(model)
    assert traced.graph.find_nodes(op="call_module")
    rewritten, found = rewrite(traced, (example(),))
    assert len(found.sites) == 4, str(found)
    for x in (example(), example(9, 3), example(30, 1)):
        torch.testing.assert_close(rewritten(x), model(x), rtol=1e-4, atol=1e-5)
    gradients = []
    for each in (model, rewritten):
        model.zero_grad()
        torch.autograd.backward(each(example()).square().sum())
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


def test_a_module_traced_by_make_fx() -> None:
    model = sharpen(Scaled())
    for pre_dispatch in (False, True):
        rewritten, found = rewrite(make_fx(model, pre_dispatch=pre_dispatch)(example()), (example(),))
        assert len(found.sites) == 4, str(found)
        torch.testing.assert_close(rewritten(example()), model(example()), rtol=1e-4, atol=1e-5)


def test_a_layer_that_a_tracer_keeps_whole() -> None:
    model = sharpen(Scaled())

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, RotaryAttention) or super().is_leaf_module(m, module_qualified_name)

    traced = fx.GraphModule(model, Tracer().trace(model))
    rewritten, found = rewrite(traced, (example(),))
    assert len(found.sites) == 4, str(found)
    torch.testing.assert_close(rewritten(example()), model(example()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("args", [(), (torch.randn(3, 3),)], ids=["none", "of another shape"])
def test_a_traced_module_without_fitting_examples(args: tuple[Tensor, ...]) -> None:
    with pytest.raises(CaptureError) as caught:
        rewrite(fx.symbolic_trace(sharpen(Scaled())), args)
    assert "as `args`" in caught.value.works


def test_inspect_and_rewrite_agree() -> None:
    row = BY_NAME["llama"]
    program = exported(row)
    assert inspect(program).to_json() == rewrite(program)[1].to_json()


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_the_backend_by_its_name(name: str) -> None:
    """`torch.compile(model, backend="grape")`: the entry point, with Inductor behind it."""
    row = BY_NAME[name]
    assert "grape" in torch.compiler.list_backends()
    compiled = torch.compile(row.build(), backend="grape")
    with torch.no_grad():
        assert_same(output_of(compiled(**row.inputs())), row, ids_of(row))


def test_training_through_the_backend() -> None:
    row = BY_NAME["llama"]
    gradients = []
    for compiled in (False, True):
        model = row.build()
        run = torch.compile(model, backend="grape") if compiled else model
        torch.autograd.backward(output_of(run(**row.inputs())).square().mean())
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-6)


class TurnedInput(nn.Module):
    """A rotation of an argument with the name of a builtin."""

    def forward(self, input: Tensor) -> Tensor:
        angles = torch.arange(input.shape[-2])[:, None] * 100.0 ** (-torch.arange(4) / 4)
        cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
        first, second = input.chunk(2, -1)
        return input * cos + torch.cat((-second, first), -1) * sin


def test_an_argument_may_have_the_name_of_a_builtin() -> None:
    """torch.fx gives such a placeholder another name when a graph is copied; the signature knows the old one."""
    x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
    rewritten, found = rewrite(torch.export.export(TurnedInput(), (x,)))
    assert len(found.sites) == 1
    assert torch.allclose(rewritten.module()(x), TurnedInput()(x), atol=1e-6)


class Leading(nn.Module):
    """Attention over as many tokens as a given number says."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, count: Tensor) -> Tensor:
        tokens = count.item()
        torch._check(tokens >= 2)
        torch._check(tokens <= x.shape[1])
        found: Tensor = self.attention(x[:, :tokens])
        return found


def test_a_length_that_values_decide() -> None:
    model = Leading(sharpen(RotaryAttention(plain)))
    program, found = rewrite(torch.export.export(model, (example(), torch.tensor(5))))
    assert (len(found.sites), found.refusals) == (2, ()), str(found)
    assert {site.evidence for site in found.sites} == {"proved"}
    for tokens in (2, 5, 12):
        given = example(), torch.tensor(tokens)
        torch.testing.assert_close(program.module()(*given), model(*given), rtol=1e-5, atol=1e-6)


def test_positions_of_which_values_decide_the_number() -> None:
    """How many there are is known at run time alone, and not what was assumed: refused, and nothing breaks."""

    class Kept(nn.Module):
        def forward(self, x: Tensor, keep: Tensor) -> Tensor:
            places = keep.nonzero().squeeze(-1)
            return plain(x[:, places], torch.outer(places, inverse_frequencies(HEAD_DIM // 2)))

    x = torch.randn(2, 12, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    given = x, torch.arange(12) % 3 > 0
    program, found = rewrite(torch.export.export(Kept(), given))
    assert found.sites == ()
    assert ["decided by values" in refusal.reason for refusal in found.refusals] == [True], str(found)
    torch.testing.assert_close(program.module()(*given), Kept()(*given))


class TurnedAlongAxes(nn.Module):
    """Channels of one plane turn by positions along different axes, as with pictures in HunYuan-VL."""

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        first, second = (each[:, None] * inverse_frequencies(HEAD_DIM // 2) for each in positions)
        half = torch.cat((-x[..., HEAD_DIM // 2 :], x[..., : HEAD_DIM // 2]), -1)
        angle = torch.cat((first, second), -1)
        return x * angle.cos() + half * angle.sin()


def test_planes_that_turn_by_equal_positions_of_two_axes() -> None:
    """With one row of positions expanded by the model a rotation, with two rows given none, be they equal."""

    class TurnedAlongOne(TurnedAlongAxes):
        def forward(self, x: Tensor, positions: Tensor) -> Tensor:
            return super().forward(x, positions.expand(2, -1))

    x = torch.randn(2, 6, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    one = torch.arange(6)[None]
    assert len(inspect(TurnedAlongOne(), (x, one)).sites) == 1
    found = inspect(TurnedAlongAxes(), (x, one.repeat(2, 1)))
    assert found.sites == ()
    assert ["different elements of one tensor" in refusal.reason for refusal in found.refusals] == [True]
    rewritten, _ = rewrite(torch.export.export(TurnedAlongAxes(), (x, one.repeat(2, 1))))
    given = x, torch.stack([torch.arange(6), torch.arange(6).flip(0)])
    torch.testing.assert_close(rewritten.module()(*given), TurnedAlongAxes()(*given))


class Pruned(nn.Module):
    """Keeps the tokens it is sure of, and their rows of the tables; others are padding."""

    def forward(self, x: Tensor) -> Tensor:
        angle = torch.outer(torch.arange(x.shape[1]), inverse_frequencies(HEAD_DIM // 2))
        keep = x[..., 0] > 0
        wide = torch.cat((angle, angle), -1)
        tokens, cos, sin = (
            nn.utils.rnn.pad_sequence([each[chosen] for each, chosen in zip(rows, keep, strict=True)], True)
            for rows in (x, wide.cos().expand(len(x), -1, -1), wide.sin().expand(len(x), -1, -1))
        )
        half = torch.cat((-tokens[..., HEAD_DIM // 2 :], tokens[..., : HEAD_DIM // 2]), -1)
        return tokens * cos + half * sin


def test_rows_of_tables_that_a_model_chooses() -> None:
    x = torch.randn(2, 12, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    found = inspect(Pruned(), (x,))
    assert found.sites == ()
    assert [refusal.rule for refusal in found.refusals] == ["chosen"], str(found)
