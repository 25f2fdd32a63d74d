"""What an export did: the operators that compute each encoding, and how exact the file is."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from grape_compile.export.comparison import Comparison
from grape_compile.export.onnx.lower import Lowered
from grape_compile.passes.site import Refusal, Site


@dataclass(frozen=True)
class OnnxReport:
    """The file at `path`: what it holds and how it was verified; `comparisons` are empty with verify=False."""

    path: Path
    target: str
    lowered: tuple[Lowered, ...]
    operators: dict[str, int]
    sites: tuple[Site, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    external_data: Path | None = None
    notes: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        lines = [f"{self.path} ({self.target})"]
        for (encoding, how), count in Counter((each.encoding, each.how) for each in self.lowered).items():
            lines.append(f"  {count} x {encoding}: {how}")
        for refusal in self.refusals:
            lines.append(f"  left as it was: {refusal.module or 'model'}: {refusal.reason}")
        for each in self.comparisons:
            lines.append(f"  {each.case}: error {each.file:.1e}, the original's own {each.original:.1e}")
        if not self.comparisons:
            lines.append("  not verified")
        return "\n".join((*lines, *(f"  {note}" for note in self.notes)))

    def to_json(self) -> str:
        """Return the report as JSON."""
        return json.dumps(
            {
                "path": str(self.path),
                "target": self.target,
                "places": [asdict(each) for each in self.lowered],
                "operators": self.operators,
                "refusals": [
                    {"rule": each.rule, "reason": each.reason, "module": each.module}
                    for each in self.refusals
                ],
                "comparisons": [asdict(each) for each in self.comparisons],
                "external_data": None if self.external_data is None else str(self.external_data),
                "notes": list(self.notes),
            },
            indent=2,
        )
