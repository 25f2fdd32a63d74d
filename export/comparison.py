"""What verifying a file says: it is read where torch is not."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Comparison:
    """Relative root-mean-square errors against the original in float64: of the file and of the original itself."""

    case: str
    file: float
    original: float
