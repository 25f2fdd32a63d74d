"""The algebra of position encodings: values without tensors that print, compare, compose and invert.

An encoding is structure; tensors fill its named slots at each use. `parse(str(encoding)) == encoding`.
Equations and section numbers are those of GRAPE (arXiv 2512.07805). Nothing here imports torch.
"""

from grape_compile.encoding.base import Encoding, Multiplicative, Term
from grape_compile.encoding.bias import Absolute, Bias, Distance, Euclidean, Signed
from grape_compile.encoding.clock import Accumulated, Clock, Positions, Steps, Tables
from grape_compile.encoding.compose import Compose, Nope
from grape_compile.encoding.describe import describe_frequencies, describe_slopes
from grape_compile.encoding.gate import Gate
from grape_compile.encoding.named import (
    alibi,
    axial_rope,
    fox,
    gated_alibi,
    grape_ap,
    grape_m,
    mrope,
    nope,
    rope,
)
from grape_compile.encoding.non_commuting import NonCommuting
from grape_compile.encoding.path import Identity, Link, LogSigmoid, NegativeExp, PathBias
from grape_compile.encoding.planes import Axes, Half, Interleaved, Pairs, Partial, Planes, planes_of
from grape_compile.encoding.rank2 import Rank2
from grape_compile.encoding.rotation import Rotation
from grape_compile.encoding.scaling import (
    ByParts,
    DynamicNtk,
    Linear,
    Llama3,
    Longrope,
    Ntk,
    PerPlane,
    Proportional,
    Rule,
    Yarn,
    longrope_norm_factor,
    yarn_norm_factor,
)
from grape_compile.encoding.slopes import AlibiSlopes, Constant, Slopes, Uniform
from grape_compile.encoding.spectrum import Geometric, Scaled, Spectrum, Tiled
from grape_compile.encoding.tensors import Learned, Table
from grape_compile.encoding.text import parse

__all__ = [
    "Absolute",
    "Accumulated",
    "AlibiSlopes",
    "Axes",
    "Bias",
    "ByParts",
    "Clock",
    "Compose",
    "Constant",
    "Distance",
    "DynamicNtk",
    "Encoding",
    "Euclidean",
    "Gate",
    "Geometric",
    "Half",
    "Identity",
    "Interleaved",
    "Learned",
    "Linear",
    "Link",
    "Llama3",
    "LogSigmoid",
    "Longrope",
    "Multiplicative",
    "NegativeExp",
    "NonCommuting",
    "Nope",
    "Ntk",
    "Pairs",
    "Partial",
    "PathBias",
    "PerPlane",
    "Planes",
    "Positions",
    "Proportional",
    "Rank2",
    "Rotation",
    "Rule",
    "Scaled",
    "Signed",
    "Slopes",
    "Spectrum",
    "Steps",
    "Table",
    "Tables",
    "Term",
    "Tiled",
    "Uniform",
    "Yarn",
    "alibi",
    "axial_rope",
    "describe_frequencies",
    "describe_slopes",
    "fox",
    "gated_alibi",
    "grape_ap",
    "grape_m",
    "longrope_norm_factor",
    "mrope",
    "nope",
    "parse",
    "planes_of",
    "rope",
    "yarn_norm_factor",
]
