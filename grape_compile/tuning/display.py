"""Shows a search in a terminal: one line for each operator."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from grape_compile.tuning.programs import Progress


@contextmanager
def shown() -> Iterator[Callable[[Progress], None]]:
    """Return what draws progress on stderr while the search runs; a file gets one line for each trial."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield lambda step: console.print(f"{step.task}: {told(step)}", soft_wrap=True, markup=False)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(20),
        TextColumn("{task.fields[told]}"),
    )
    with Bars(*columns, console=console) as bars:
        lines: dict[object, object] = {}

        def draw(step: Progress) -> None:
            if step.task not in lines:
                lines[step.task] = bars.add_task(_short(str(step.task)), total=step.trials, told="")
            line = lines[step.task]
            bars.update(line, completed=step.done, total=step.trials, told=told(step))  # type: ignore[arg-type]

        yield draw


def told(step: Progress) -> str:
    """Return the trials, the best time, the share of a model's time and the time that is left.

    >>> from grape_compile.records import Task
    >>> told(Progress(Task("rotate", "nope", "x[8]:float32", "float32"), 5, 64, 3.62e-05, 0.25, 89.0))
    '5 of 64 trials, best 36.2 us, 25 % of the time, 1:29 left'
    """
    best = f"best {1e6 * step.best:.1f} us" if math.isfinite(step.best) else "none runs yet"
    minutes, seconds = divmod(round(step.left), 60)
    share = f"{100 * step.share:.0f} % of the time"
    return f"{step.done} of {step.trials} trials, {best}, {share}, {minutes}:{seconds:02} left"


def _short(text: str, width: int = 48) -> str:
    return text if len(text) <= width else f"{text[: width - 3]}..."
