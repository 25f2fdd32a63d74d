"""`upgrade`: a trainable encoding in place of the fixed one of a model, and what training it asks for."""

from __future__ import annotations

import fnmatch
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from grape_compile.compiler import Backend, grape_compile
from grape_compile.errors import CaptureError, ModelError, UpgradeError
from grape_compile.named_models import example_inputs
from grape_compile.nn.targets import Origin, Target
from grape_compile.nn.trainable import TrainableEncoding
from grape_compile.nn.upgraded import NAME, Carried, Upgraded
from grape_compile.operators import looked_at
from grape_compile.passes.capture import capture_export, has_unknown_sizes
from grape_compile.passes.graph import Program
from grape_compile.passes.layers import Layer, find_layers
from grape_compile.passes.marks import marks_of
from grape_compile.passes.pipeline import rewrite_program, unmoved
from grape_compile.passes.site import Refusal
from grape_compile.passes.trace_run import capture_run, untouched

Model = TypeVar("Model", bound=nn.Module)
Where = str | Sequence[str] | Callable[[str, nn.Module], bool] | None


def upgrade(
    model: Model,
    to: str,
    *,
    where: Where = None,
    share: str = "layer",
    args: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
    backend: str | Backend = "inductor",
    basis: str | None = None,
    per_head: bool = False,
    non_commuting: int | None = None,
    dim: int = 8,
) -> Model:
    """Replace the position encoding of a model by a trainable one, compile the model in place, return the same object.

    `to` is "grape-m", "grape-m-ctx", "grape-a-q", "grape-a-k", "grape-a-qk", "fox", "grape-ap", "nope", or a sum of a
    rotation and what is added ("grape-m+grape-ap"). Every attention module that has a position encoding (`where`: those
    whose name a pattern matches, or a predicate of name and module chooses) gets a child `grape` with the parameters,
    or with `share="model"` the first one for all. From RoPE to grape-m and grape-m-ctx, and from ALiBi to fox and
    grape-a-*, the model computes the same at the start; where that is impossible a warning says what it starts with.

    The encodings are found on example `args` and `kwargs` (by default small ones for a Hugging Face model). `basis`
    ("cayley", "householder", "orthogonal"), `per_head` and `non_commuting` (so many coordinates mixed by one generator)
    belong to grape-m, `dim` to the edges of grape-ap. `backend` is that of `grape_compile`.

    Raises ModelError for something that is no module, UpgradeError where the model cannot have the target. The model is
    then unchanged. An upgraded model runs compiled by grape_compile, or exported and rewritten: in any other way it
    raises UpgradeError.
    """
    if not isinstance(model, nn.Module):
        raise ModelError("upgrade a model", f"a {type(model).__name__}", "a torch.nn.Module")
    target = Target.read(to, basis, per_head, non_commuting, dim)
    if share not in ("layer", "model"):
        raise UpgradeError("upgrade a model", f"share={share!r}", 'share="layer" or share="model"')
    _require_plain(model)
    args, kwargs = _example(model, args, kwargs)
    program, sizes = _captured(model, args, kwargs)
    layers, refusals = find_layers(program)
    chosen = [layer for layer in layers if _is_chosen(model, layer.module, where)]
    if not chosen:
        raise _nothing_found(model, target, layers, refusals, where)
    for layer in chosen:
        _require_fit(model, layer, target, refusals)
    trained = [_trained(model, layer, target, sizes) for layer in chosen]
    if share == "model":
        trained = _shared(chosen, trained, target)
    with _put_back_on_failure(model):
        _install(model, chosen, trained, target)
        _require_moved(model, args, kwargs)
        for note in dict.fromkeys(_note(layer, target) for layer in chosen):
            if note:
                warnings.warn(note, stacklevel=2)
        return grape_compile(model, backend=backend)


def parameter_groups(
    model: nn.Module, *, lr: float, weight_decay: float = 0.0, encoding_lr: float | None = None
) -> list[dict[str, Any]]:
    """Return the parameters of a model for an optimiser in two groups: all others, and those of its encodings.

    Those of encodings have no weight decay: it would pull frequencies and slopes towards where they started, and gates
    towards none. Their learning rate is `encoding_lr`, by default `lr`: the authors' models slow a spectrum down by
    its parametrisation, exp(log_theta / 16). Parameters that are frozen are left out, and empty groups too.
    """
    own = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, TrainableEncoding)
        for parameter in module.parameters()
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {
            "params": [each for each in trained if id(each) not in own],
            "lr": lr,
            "weight_decay": weight_decay,
        },
        {
            "params": [each for each in trained if id(each) in own],
            "lr": lr if encoding_lr is None else encoding_lr,
            "weight_decay": 0.0,
        },
    ]
    return [group for group in groups if group["params"]]


# -- what the model has ---------------------------------------------------------------------------------------


def _require_plain(model: nn.Module) -> None:
    """Raise UpgradeError for a model whose modules cannot be given hooks, or have an encoding already."""
    if isinstance(model, torch.jit.ScriptModule):
        raise UpgradeError(
            "upgrade a model",
            "a frozen or scripted module, whose code cannot change",
            "the nn.Module it was made of",
        )
    for name, module in model.named_modules():
        if any(isinstance(hook, Upgraded) for hook in module._forward_pre_hooks.values()):
            raise UpgradeError(
                "upgrade a model",
                f"{name or 'it'} was upgraded already",
                "the model as it was before, loaded anew",
            )


def _example(
    model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any] | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args or kwargs:
        return tuple(args), dict(kwargs or {})
    if not hasattr(model, "config"):
        raise UpgradeError(
            f"upgrade a {type(model).__name__}",
            "no example to find its encodings with",
            "args or kwargs that its forward accepts",
        )
    found: dict[str, Any] = example_inputs("an example to upgrade a model with", model, 2, 8)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    inputs = {name: value.to(device) for name, value in found.items()}
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    return (), inputs


def _captured(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Program, dict[str, int]]:
    """The program of a model's own code, and by module the size of the hidden states it is given."""
    sizes: dict[str, int] = {}
    with untouched(model), _noting_sizes(model, sizes):
        vars(model).pop("_compiled_call_impl", None)
        try:
            return _program(model, args, kwargs), sizes
        except CaptureError as failure:
            raise UpgradeError(
                f"find the encodings of {type(model).__name__}",
                f"{failure.asked}: {failure.found}",
                failure.works,
            ) from failure


def _program(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.export.export(model, args, kwargs, strict=False)
    except UpgradeError:
        raise
    except Exception:
        exported = None
    if exported is not None and not has_unknown_sizes(exported):
        return capture_export(exported, args, kwargs)
    with looked_at():
        return capture_run(model, args, kwargs)


@contextmanager
def _noting_sizes(model: nn.Module, sizes: dict[str, int]) -> Iterator[None]:
    names = {module: name for name, module in model.named_modules()}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.dim() == 3 and value.is_floating_point():
                sizes[names[module]] = int(value.shape[-1])
                return

    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _is_chosen(model: nn.Module, name: str, where: Where) -> bool:
    if where is None:
        return True
    if callable(where):
        return bool(where(name, model.get_submodule(name)))
    patterns = [where] if isinstance(where, str) else where
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _nothing_found(
    model: nn.Module, target: Target, layers: Sequence[Layer], refusals: Sequence[Refusal], where: Where
) -> UpgradeError:
    asked = f"upgrade a {type(model).__name__} to {target}"
    if layers:
        names = ", ".join(layer.module or "the model itself" for layer in layers)
        return UpgradeError(asked, f"no layer that where={where!r} chooses", f"one of {names}")
    reasons = "; ".join(dict.fromkeys(refusal.reason for refusal in refusals))
    found = f"no position encoding that could be read ({reasons})" if reasons else "no position encoding"
    return UpgradeError(asked, found, "a model with rotations of queries and keys, or with ALiBi")


def _require_fit(model: nn.Module, layer: Layer, target: Target, refusals: Sequence[Refusal]) -> None:
    """Raise UpgradeError where a layer has to keep its encoding."""
    name = layer.module or "the model"
    asked = f"upgrade {name} to {target}"
    if layer.obstacle:
        raise UpgradeError(asked, layer.obstacle, "other layers, chosen by where")
    if target.turns and layer.unread:
        raise UpgradeError(
            asked, layer.unread, "targets that take the rotation out, or other layers by where"
        )
    if target.adds and layer.heads is None:
        reasons = (
            "; ".join(dict.fromkeys(each.reason for each in refusals)) or "no attention beside its rotations"
        )
        raise UpgradeError(
            asked, f"an attention that cannot be read: {reasons}", "grape-m, which leaves it as it is"
        )
    module = model.get_submodule(layer.module)
    if hasattr(module, NAME):
        raise UpgradeError(asked, f"{name} has something called {NAME!r} already", "a module without it")
    for path, part in module.named_modules(prefix=name):
        weight = getattr(part, "weight", None)
        if callable(weight) or (isinstance(weight, Tensor) and not weight.is_floating_point()):
            raise UpgradeError(
                asked, f"{path} is quantised ({type(part).__name__})", "the model before it is quantised"
            )
        if isinstance(weight, Tensor) and weight.is_inference():
            raise UpgradeError(
                asked,
                f"{path} is frozen for good: its weight was made in inference mode",
                "a model made outside of torch.inference_mode(); requires_grad_(False) freezes its weights",
            )


# -- what it gets ---------------------------------------------------------------------------------------------


def _trained(model: nn.Module, layer: Layer, target: Target, sizes: dict[str, int]) -> TrainableEncoding:
    """The encoding of a layer, beside its weights."""
    name = layer.module
    if name not in sizes:
        raise UpgradeError(
            f"upgrade {name or 'the model'} to {target}",
            "no hidden states [batch, tokens, channels] among the arguments it is called with",
            "a module that holds the projections of its queries and keys",
        )
    origin = Origin(
        sizes[name],
        layer.heads,
        layer.head_dim,
        layer.key_heads,
        layer.rotation,
        layer.alike,
        layer.frequencies,
        layer.slopes,
        layer.is_causal,
    )
    module = model.get_submodule(name)
    weight = next((each for each in module.parameters() if each.is_floating_point()), None)
    made = target.for_layer(origin, name or "the model").train(module.training)
    if weight is None:
        return made
    return made.to(weight.device, torch.float64 if weight.dtype == torch.float64 else torch.float32)


def _shared(
    layers: Sequence[Layer], trained: Sequence[TrainableEncoding], target: Target
) -> list[TrainableEncoding]:
    """One encoding for all layers, which have the same one now."""
    first = layers[0]
    for layer, made in zip(layers, trained, strict=True):
        same = str(made.encoding) == str(trained[0].encoding) and all(
            one is other or (one is not None and other is not None and torch.equal(one, other))
            for one, other in ((layer.frequencies, first.frequencies), (layer.slopes, first.slopes))
        )
        if not same:
            raise UpgradeError(
                f"one {target} for all layers",
                f"{layer.module} encodes position otherwise than {first.module}",
                'share="layer", or layers of one kind chosen by where',
            )
    return [trained[0]] * len(trained)


def _install(
    model: nn.Module, layers: Sequence[Layer], trained: Sequence[TrainableEncoding], target: Target
) -> None:
    entry = _cache_layers(model)
    for number, (layer, made) in enumerate(zip(layers, trained, strict=True)):
        module = model.get_submodule(layer.module)
        is_first = all(made is not other for other in trained[:number])
        if is_first:
            module.add_module(NAME, made)
        attended = int(target.adds or layer.slopes is not None)
        carried = Carried.of(made.encoding)
        theta = () if layer.frequencies is None else tuple(map(float, layer.frequencies))
        counts = layer.turned, attended, entry + number
        unbiased = layer.heads is not None and layer.slopes is None
        hook = Upgraded(layer.module, theta, *counts, carried, unbiased, None if is_first else made)
        module.register_forward_pre_hook(hook, with_kwargs=True)


def _cache_layers(model: nn.Module) -> int:
    """How many layers the model's own caches have at most."""
    numbers = [getattr(module, "layer_idx", None) for module in model.modules()]
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        numbers.append(getattr(config.get_text_config(), "num_hidden_layers", 0) - 1)
    return 1 + max((number for number in numbers if isinstance(number, int)), default=-1)


@contextmanager
def _put_back_on_failure(model: nn.Module) -> Iterator[None]:
    """Take out what was installed where the rest fails."""
    try:
        yield
    except BaseException:
        for module in model.modules():
            hooks = module._forward_pre_hooks
            for key in [key for key, hook in hooks.items() if isinstance(hook, Upgraded)]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
                module._modules.pop(NAME, None)
        raise


def _require_moved(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise UpgradeError unless every layer takes its new encoding in a graph of the example."""
    program, _ = _captured(model, args, kwargs)
    found = rewrite_program(program)
    if marks_of(program.graph):
        raise unmoved(found.refusals)


def _note(layer: Layer, target: Target) -> str:
    """What a layer starts with where that is not what it computed before."""
    if target.turns and not target.adds:
        return ""
    if target.turns:
        return (
            f"{target}: the rotation starts as it was; what is added starts at a thousandth of ALiBi's slopes, so that "
            "logits barely change"
        )
    if not target.adds:
        return f"{target}: positions are no longer encoded, so the model computes something else"
    if layer.slopes is None:
        return (
            f"{target}: no parameters of it compute a rotation; it starts as in the authors' models, and the model "
            "computes something else until it is trained"
        )
    if target.parts == ("grape-ap",):
        return (
            f"{target}: its edges depend on the tokens, so it cannot start as ALiBi; it starts as in the authors' "
            "models, with the slopes of the layer"
        )
    return ""
