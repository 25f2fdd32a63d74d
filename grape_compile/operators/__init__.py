"""What an encoding computes: `grape::rotate`, `grape::attend`, and their definitions in plain torch.

Importing this package registers the operators as `torch.ops.grape.rotate`, `torch.ops.grape.attend` and others.
"""

from grape_compile.operators.attention import attend, attend_decomposition
from grape_compile.operators.decode import decode
from grape_compile.operators.logit_bias import logit_bias
from grape_compile.operators.normed import rotate_normed
from grape_compile.operators.reference import reference_attend, reference_bias, reference_rotate
from grape_compile.operators.rotate_into import rotate_into
from grape_compile.operators.rotation import decompositions, rotate, rotate_decomposition
from grape_compile.operators.upgraded import looked_at

__all__ = [
    "attend",
    "attend_decomposition",
    "decode",
    "decompositions",
    "logit_bias",
    "looked_at",
    "reference_attend",
    "reference_bias",
    "reference_rotate",
    "rotate",
    "rotate_decomposition",
    "rotate_into",
    "rotate_normed",
]
