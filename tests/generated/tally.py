"""What a run of generated programs has shown, as counts that add up over processes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Tally:
    """Counts over programs. `told` are near misses that were left with a sentence."""

    programs: int = 0
    unusable: int = 0
    truths: int = 0
    found: int = 0
    near_misses: int = 0
    refused: int = 0
    told: int = 0
    free: int = 0
    wrong: int = 0
    worst: float = 0.0

    def add(self, other: Tally) -> None:
        for name, value in vars(other).items():
            mine = getattr(self, name)
            setattr(self, name, max(mine, value) if name == "worst" else mine + value)

    def lines(self) -> list[str]:
        recall = 100 * self.found / max(self.truths, 1)
        rewritten = self.found + self.free
        precision = 100 * (1 - self.wrong / max(rewritten + self.wrong, 1))
        return [
            f"programs {self.programs}, sites in them {self.truths}, near misses {self.near_misses}",
            f"recall {recall:.2f} % ({self.found} of {self.truths})",
            f"precision {precision:.2f} % ({self.wrong} wrong rewrites; near misses refused: {self.refused} of "
            f"{self.near_misses}, {self.told} with a sentence)",
            f"equality: largest error {self.worst:.2g} of the bound",
        ]
