"""The public surface: a change of a name, a parameter or a default has to be made here too, knowingly."""

import inspect
from dataclasses import fields
from importlib.metadata import entry_points
from inspect import Parameter, Signature

import grape_compile
from grape_compile.passes.site import Refusal, Site
from grape_compile.reporting import Report

FUNCTIONS = {
    "grape_compile": (
        "(model, *, backend='inductor', dynamic=None, fullgraph=False, on_refusal='keep', options=None)"
    ),
    "inspect": "(model, args=(), kwargs=None, *, dynamic_shapes=None)",
    "parameter_groups": "(model, *, lr, weight_decay=0.0, encoding_lr=None)",
    "report": "(model)",
    "restore": "(model)",
    "rewrite": "(program, args=())",
    "upgrade": (
        "(model, to, *, where=None, share='layer', args=(), kwargs=None, backend='inductor', basis=None, "
        "per_head=False, non_commuting=None, dim=8)"
    ),
}
CLASSES = {"Report"}


def bare(signature: Signature) -> str:
    """Names, kinds and defaults alone: annotations are the type checker's."""
    parameters = [each.replace(annotation=Parameter.empty) for each in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=Signature.empty))


def test_names() -> None:
    assert set(grape_compile.__all__) == {*FUNCTIONS, *CLASSES}


def test_signatures() -> None:
    found = {name: bare(inspect.signature(getattr(grape_compile, name))) for name in FUNCTIONS}
    assert found == FUNCTIONS


def test_no_function_is_shadowed_by_a_module() -> None:
    assert all(inspect.isfunction(getattr(grape_compile, name)) for name in FUNCTIONS)


def test_fields() -> None:
    found = {kind.__name__: [field.name for field in fields(kind)] for kind in (Report, Site, Refusal)}
    assert found == {
        "Report": ["sites", "refusals"],
        "Site": ["kind", "encoding", "module", "source", "evidence", "error", "lowering"],
        "Refusal": ["rule", "reason", "node", "module", "source", "nearest"],
    }


def test_the_backend_is_found_by_name() -> None:
    [backend] = entry_points(group="torch_dynamo_backends", name="grape")
    assert backend.value == "grape_compile.compiler:grape"
    inspect.signature(backend.load()).bind("graph", "example inputs", options={})
