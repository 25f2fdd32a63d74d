"""The table of hand-written models: how to build each, how many sites it has and what they mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from architectures import Architecture
from torch import nn

from research import dense, forgetting, gated, linear, paths, phases, planar, spectra
from research.dense import HALVES, NEIGHBOURS, PATH_HALVES, PATH_NEIGHBOURS, Formula
from research.parts import LAYERS, LanguageModel

#: No multiple of a block, a window or a grid.
LENGTH = 33


@dataclass(frozen=True, eq=False)
class ResearchModel(Architecture):
    """One row: `formula` is the meaning of its attention.

    The encoding of every bias site contains all of `bias_text`, that of every rotation site all of `rotation_text`.
    """

    formula: Formula = dense.plain
    bias_text: tuple[str, ...] = ()
    rotation_text: tuple[str, ...] = ()

    def inputs(
        self, batch: int = 2, seq: int = LENGTH, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> dict[str, Any]:
        return super().inputs(batch, seq, seed, dtype)


def _model(
    name: str,
    attention: Callable[[], nn.Module],
    formula: Formula,
    *,
    bias: tuple[str, ...] = (),
    rotation: tuple[str, ...] = (),
    shared: Callable[[], nn.Module] | None = None,
) -> ResearchModel:
    return ResearchModel(
        name,
        lambda: LanguageModel(attention, shared and shared()),
        rotations=2 * LAYERS if rotation else 0,
        biases=LAYERS if bias else 0,
        formula=formula,
        bias_text=bias,
        rotation_text=rotation,
    )


ROPE = ("rotation(", "half(16)", "steps")
INCLUSIVE = ("bias(", "accumulated(", ", true)")
EXCLUSIVE = ("bias(", "accumulated(", ", false)")
GATE_QUERY = ("bias(", "steps", "gate(query=")
GATE_KEY = ("bias(", "steps", "gate(key=")
GATE_BOTH = ("bias(", "steps", "gate(query=", ", key=")
STEPS = ("bias(", "steps")
ABSOLUTE = ("bias(", "steps", "absolute")
PLACES = ("bias(", "positions(")
NORM = ("bias(", "positions(", "euclidean")
PHASE_HALVES = ("rotation(", "half(16)", "accumulated(", ", false)")
PHASE_NEIGHBOURS = ("rotation(", "interleaved(16)", "accumulated(", ", false)")
LEARNED_HALVES = ("rotation(", "half(16)", "learned(", "steps")
LEARNED_NEIGHBOURS = ("rotation(", "interleaved(16)", "learned(", "steps")
PATH = ("path_bias(log_sigmoid",)


def _fox(name: str, attention: Callable[[], nn.Module]) -> ResearchModel:
    return _model(name, attention, dense.forgetting(), bias=INCLUSIVE)


def _alibi(name: str, attention: Callable[[], nn.Module]) -> ResearchModel:
    return _model(name, attention, dense.linear(), bias=STEPS)


FORGETTING = (
    _fox("fox-nanogpt", forgetting.NanoGpt),
    _fox("fox-float_mask", forgetting.FloatMask),
    _fox("fox-heads_last", forgetting.HeadsLast),
    _fox("fox-difference_of_last", forgetting.DifferenceOfLast),
    _fox("fox-softplus", forgetting.Softplus),
    _fox("fox-log_of_sigmoid", forgetting.LogOfSigmoid),
    _fox("fox-summed_in_float32", forgetting.SummedInFloat32),
    _fox("fox-by_key_alone", forgetting.ByKeyAlone),
    _model(
        "fox-rope", forgetting.WithRope, dense.with_rope(dense.forgetting()), bias=INCLUSIVE, rotation=ROPE
    ),
    _model(
        "fox-exclusive_by_pad",
        forgetting.ExclusiveByPad,
        dense.forgetting(inclusive=False),
        bias=EXCLUSIVE,
    ),
    _model(
        "fox-exclusive_by_subtraction",
        forgetting.ExclusiveBySubtraction,
        dense.forgetting(inclusive=False),
        bias=EXCLUSIVE,
    ),
)

_QUERY = dense.gated(query=True, key=False)
_KEY = dense.gated(query=False, key=True)
_BEFORE = dense.gated(query=True, key=True, norm="before")
_AFTER = dense.gated(query=True, key=True, norm="after")
_UNIT = dense.gated(query=True, key=True, unit=True)

GATED = (
    _model("gate_q", gated.GateQuery, _QUERY, bias=GATE_QUERY),
    _model("gate_q-float_mask", gated.GateQueryFloatMask, _QUERY, bias=GATE_QUERY),
    _model("gate_k", gated.GateKey, _KEY, bias=GATE_KEY),
    _model("gate_k-heads_last", gated.GateKeyHeadsLast, _KEY, bias=GATE_KEY),
    _model("gate_qk", gated.GateBoth, dense.gated(query=True, key=True), bias=GATE_BOTH),
    _model("gate_qk-before_norm", gated.GateBothBeforeNorm, _BEFORE, bias=GATE_BOTH),
    _model("gate_qk-after_norm", gated.GateBothAfterNorm, _AFTER, bias=GATE_BOTH),
    _model("gate_qk-unit", gated.GateBothUnit, _UNIT, bias=GATE_BOTH),
)

PHASES = (
    _model("phase_bias", phases.PhaseBias, dense.phase_bias, bias=INCLUSIVE),
    _model("phase_bias-per_head", phases.PhaseBiasPerHead, dense.phase_bias_per_head, bias=INCLUSIVE),
    _model("contextual", phases.ContextualHalves, dense.contextual(HALVES), rotation=PHASE_HALVES),
    _model(
        "contextual-neighbours",
        phases.ContextualNeighbours,
        dense.contextual(NEIGHBOURS),
        rotation=PHASE_NEIGHBOURS,
    ),
    _model(
        "contextual-per_head",
        phases.ContextualHalvesPerHead,
        dense.contextual(HALVES),
        rotation=PHASE_HALVES,
    ),
    _model(
        "contextual-neighbours-per_head",
        phases.ContextualNeighboursPerHead,
        dense.contextual(NEIGHBOURS),
        rotation=PHASE_NEIGHBOURS,
    ),
)

_HALVES, _NEIGHBOURS = dense.learned_spectrum(HALVES), dense.learned_spectrum(NEIGHBOURS)
_ORTHOGONAL = dense.learned_spectrum(HALVES, dense.linear_basis)
_CAYLEY = dense.learned_spectrum(NEIGHBOURS, dense.cayley_basis)

SPECTRA = (
    _model("learned", spectra.SharedSpectrum, _HALVES, rotation=LEARNED_HALVES),
    _model("learned-per_head", spectra.SpectrumPerHead, _NEIGHBOURS, rotation=LEARNED_NEIGHBOURS),
    _model("learned-per_head-heads_last", spectra.SpectrumPerHeadLast, _HALVES, rotation=LEARNED_HALVES),
    _model("learned-orthogonal", spectra.OrthogonalBasis, _ORTHOGONAL, rotation=LEARNED_HALVES),
    _model("learned-cayley-per_head", spectra.CayleyBasis, _CAYLEY, rotation=LEARNED_NEIGHBOURS),
)

_PATH_HALVES = dense.path(PATH_HALVES)

PATHS = (
    _model("path-total_minus_cumulative", paths.TotalMinusCumulative, _PATH_HALVES, bias=PATH),
    _model(
        "path-flip_cumulative_flip",
        paths.FlipCumulativeFlip,
        dense.path(PATH_NEIGHBOURS, normalised="both"),
        bias=PATH,
    ),
    _model("path-float_mask", paths.FloatMask, dense.path(PATH_NEIGHBOURS, eps=1e-5), bias=PATH),
    _model("path-heads_last", paths.HeadsLast, _PATH_HALVES, bias=PATH),
    _model("path-rope", paths.WithRope, dense.with_rope(_PATH_HALVES), bias=PATH, rotation=ROPE),
)

LINEAR = (
    _alibi("alibi-float_mask", linear.FloatMask),
    _alibi("alibi-baddbmm", linear.BatchedMultiplyAdd),
    _model("alibi-before_scaling", linear.BeforeScaling, dense.linear(0.25), bias=STEPS),
    _alibi("alibi-after_scaling", linear.AfterScaling),
    _model("alibi-both_ways", linear.BothWays, dense.linear(both_ways=True), bias=ABSOLUTE),
    _model(
        "alibi-both_ways-float_mask",
        linear.BothWaysFloatMask,
        dense.linear(both_ways=True),
        bias=ABSOLUTE,
    ),
    _model("alibi-norm", linear.NormalisedQueriesAndKeys, dense.linear(norm=True), bias=STEPS),
    _alibi("alibi-heads_last", linear.HeadsLast),
    _model(
        "alibi-shared_by_layers",
        linear.TakesBias,
        dense.linear(),
        bias=STEPS,
        shared=linear.PositionalBias,
    ),
)

PLANAR = (
    _model("planar-two_slopes", planar.TwoSlopes, dense.two_slopes_on_a_grid, bias=PLACES),
    _model(
        "planar-two_slopes-float_mask",
        planar.TwoSlopesFloatMask,
        dense.two_slopes_of_places,
        bias=PLACES,
    ),
    _model("planar-euclidean", planar.Euclidean, dense.euclidean, bias=NORM),
    _model("planar-euclidean-of_axes", planar.EuclideanOfAxes, dense.euclidean, bias=NORM),
)

RESEARCH_MODELS: tuple[ResearchModel, ...] = (
    *FORGETTING,
    *GATED,
    *PHASES,
    *SPECTRA,
    *PATHS,
    *LINEAR,
    *PLANAR,
)
