"""Upgraded models against the definition of their encodings, in float64, written over the model's own attention."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers.models.eurobert.modeling_eurobert as eurobert
import transformers.models.llama.modeling_llama as llama
from architectures import output_of
from torch import Tensor, nn
from transformers import AttentionInterface
from upgrading import ROWS, learn_anything, relative, upgraded

from grape_compile import restore
from grape_compile.nn import TrainableEncoding
from grape_compile.operators import reference_attend


def by_definition(model: nn.Module, inputs: dict[str, Any], *, is_causal: bool) -> Tensor:
    """The logits of a model in float64 whose layers attend by `reference_attend`, their encodings read off it."""
    restore(model)
    model.double()
    hidden: dict[nn.Module, Tensor] = {}
    for module in model.modules():
        if isinstance(getattr(module, "grape", None), TrainableEncoding):
            module._forward_pre_hooks.clear()
            module._forward_pre_hooks_with_kwargs.clear()
            module.register_forward_pre_hook(
                lambda module, args, kwargs: hidden.update({module: kwargs["hidden_states"]}),
                with_kwargs=True,
            )

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **rest: Any
    ) -> tuple[Tensor, None]:
        own: Any = module.grape
        slots = own(hidden[module], query, key)
        if "positions" in own.encoding.slots:
            slots["positions"] = torch.arange(query.shape[2])
        if "theta" in slots and slots["theta"].dim() == 3:  # a spectrum for each key head, and its queries
            groups = query.shape[1] // key.shape[1]
            slots["theta"] = slots["theta"].repeat_interleave(groups, 0)
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        output = reference_attend(
            query, key, value, own.encoding, slots, is_causal=is_causal, scale=rest["scaling"]
        )
        return output.transpose(1, 2), None

    AttentionInterface.register("by_definition", attend)
    model.config._attn_implementation = "by_definition"  # type: ignore[union-attr] # a configuration
    with torch.no_grad():
        return output_of(model(**inputs))


@pytest.fixture
def unturned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference turns queries and keys, so the model does not."""
    plain: Callable[..., tuple[Tensor, Tensor]] = lambda query, key, *_, **__: (query, key)  # noqa: E731
    for library in (llama, eurobert):
        monkeypatch.setattr(library, "apply_rotary_pos_emb", plain)


@pytest.mark.parametrize(
    ("name", "to", "options"),
    [
        ("llama", "grape-m", {"basis": "cayley"}),
        ("llama", "fox", {}),
        ("llama", "grape-a-qk", {}),
        ("llama", "grape-ap", {}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("llama", "grape-m", {"per_head": True}),
                ("llama", "grape-m", {"non_commuting": 8}),
                ("llama", "grape-m-ctx", {}),
                ("llama", "grape-m+grape-ap", {}),
                ("llama", "grape-m+grape-a-qk", {}),
                ("llama", "grape-a-k", {}),
                ("llama", "nope", {}),
                ("eurobert", "fox", {}),
                ("eurobert", "grape-a-qk", {}),
                ("eurobert", "grape-m+fox", {}),
            )
        ),
    ],
    ids=str,
)
def test_against_the_definition(
    name: str, to: str, options: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    row = ROWS[name]
    inputs = row.inputs(seq=24)
    model = upgraded(row, to, **options)
    learn_anything(model)
    with torch.no_grad():
        found = output_of(model(**inputs))
    plain = row.build()
    with torch.no_grad():
        own = relative(output_of(plain(**inputs)), output_of(plain.double()(**inputs)))
    request.getfixturevalue("unturned")
    # What the layers add to rounding: at most what all of the model has.
    right = by_definition(model, inputs, is_causal=row.decoder)
    assert relative(found, right) <= 1.25 * max(own, 5e-7) + 1e-7
