"""Encodings at work: modules that train them, and the cache that streams tokens through attention."""

from grape_compile.nn.attention import AdditiveGRAPE, GRAPEAttention, PathIntegralGRAPE, RotaryGRAPE
from grape_compile.nn.basis import OrthogonalBasis
from grape_compile.nn.cache import StreamingCache
from grape_compile.nn.forget import ForgetGate
from grape_compile.nn.named import trainable
from grape_compile.nn.path import PathEdges
from grape_compile.nn.rotation import ContextualRates, LearnedRotation, MixedRotation
from grape_compile.nn.slopes import GatedSlopes, LearnedSlopes, SlopeFactors
from grape_compile.nn.spectrum import LearnedSpectrum
from grape_compile.nn.trainable import Fixed, Sum, TrainableEncoding

__all__ = [
    "AdditiveGRAPE",
    "ContextualRates",
    "Fixed",
    "ForgetGate",
    "GRAPEAttention",
    "GatedSlopes",
    "LearnedRotation",
    "LearnedSlopes",
    "LearnedSpectrum",
    "MixedRotation",
    "OrthogonalBasis",
    "PathEdges",
    "PathIntegralGRAPE",
    "RotaryGRAPE",
    "SlopeFactors",
    "StreamingCache",
    "Sum",
    "TrainableEncoding",
    "trainable",
]
