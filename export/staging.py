"""Files that are there whole or not at all: written in a folder beside their place, then renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from grape_compile.errors import GrapeError


@contextlib.contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Give a place to write to; on success everything there is moved next to `path`, on failure nothing is left.

    GrapeError for a path that cannot be written.
    """
    if path.is_dir():
        raise _unwritable(path, "it is a folder")
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as failure:
        raise _unwritable(path, failure.strerror or str(failure)) from failure
    try:
        yield folder / path.name
        # The file itself comes last: once it is there, what it refers to is there.
        for made in sorted(folder.iterdir(), key=lambda each: each.name == path.name):
            os.replace(made, path.parent / made.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _unwritable(path: Path, reason: str) -> GrapeError:
    return GrapeError(f"write {path}", reason, "a path in a folder that exists and can be written to")
