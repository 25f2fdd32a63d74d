"""A library and its weights: run, saved and loaded, where torch may be absent."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Final

import numpy as np

from grape_compile.errors import GrapeError, OperandError
from grape_compile.export.staging import staged
from grape_compile.export.tvm import machine
from grape_compile.export.tvm.about import About, Value, about_of

#: Behind the name of the library.
WEIGHTS, ABOUT = ".params", ".json"
_WRITTEN: Final = (".so", ".tar")


@dataclass
class Artifact:
    """A model compiled for a target: `run` it here, `save` it, look at its `source` and its `report`.

    `weights` are tensors of TVM by name, in the order in which the compiled function takes them.
    """

    about: About
    weights: Mapping[str, Any]
    code: Any = field(repr=False)
    _run: machine.Runner | None = field(default=None, repr=False)

    def run(self, *args: Any, **kwargs: Any) -> dict[str, np.ndarray[Any, Any]]:
        """Return the results by name; arguments in the order or by the names of `about.inputs`.

        An argument is anything numpy takes for an array. Raises OperandError for one of another dtype or size, and
        GrapeError where the target is not this machine.
        """
        if self._run is None:
            self._run = machine.runner(
                self.code, self.about.target, self.about.device, list(self.weights.values())
            )
        given = self._arguments(args, kwargs)
        results = self._run(given)
        return {value.name: result for value, result in zip(self.about.outputs, results, strict=True)}

    @property
    def report(self) -> str:
        """What computes each encoding, and how exact the library is."""
        return str(self.about)

    @property
    def source(self) -> str:
        """The CUDA source of the kernels, or the assembly of a CPU's; only of what was built in this process."""
        return machine.source_of(self.code)

    def save(self, path: str | PathLike[str]) -> Path:
        """Write model.so, with the weights in model.so.params and a description in model.so.json; return the path.

        model.tar takes the object files instead, for a machine whose linker is not here. All files are there or none.
        Raises GrapeError for a path that cannot be written, EngineError where no linker makes a library.
        """
        place = Path(path)
        if place.suffix not in _WRITTEN:
            raise GrapeError(
                f"write {place}", f"the ending {place.suffix!r}", "model.so, or model.tar for objects"
            )
        with staged(place) as draft:
            machine.write_library(self.code, draft, self.about.target)
            # Objects become a library elsewhere: what it will be is not known.
            library, digest = draft.with_suffix(".so"), _digest(draft) if place.suffix == ".so" else ""
            machine.write_weights(self.weights, _behind(library, WEIGHTS))
            text = self.about.to_json(sha256=digest, weights=list(self.weights))
            _behind(library, ABOUT).write_text(text, encoding="utf-8")
        return place

    def _arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[np.ndarray[Any, Any]]:
        values = self.about.inputs
        names = [value.name for value in values]
        given = dict(zip(names, args, strict=False))
        twice = [name for name in kwargs if name in given]
        unknown = [name for name in kwargs if name not in names]
        given |= kwargs
        missing = [name for name in names if name not in given]
        if len(args) > len(names) or twice or unknown or missing:
            found = f"{len(args)} by order and {', '.join(kwargs) or 'none'} by name"
            raise OperandError("run a library", found, f"each once: {', '.join(map(str, values))}")
        sizes: dict[str, int] = {}
        arrays = [_checked(value, given[value.name], sizes) for value in values]
        for value, array in zip(values, arrays, strict=True):
            for size, wanted in zip(array.shape, value.shape, strict=True):
                if isinstance(wanted, str) and size != sum(sizes[name] for name in wanted.split(" + ")):
                    raise _misfit(value, array, sizes)
        return arrays


def load(path: str | PathLike[str]) -> Artifact:
    """Open what `Artifact.save` wrote at `path`.

    Raises GrapeError for a file that is not there, is none or belongs to another description, EngineError where TVM
    is absent or of another release than the library was made with.
    """
    place = Path(path)
    asked = f"load {place}"
    for each in (place, _behind(place, WEIGHTS), _behind(place, ABOUT)):
        if not each.is_file():
            raise GrapeError(
                asked, f"no file {each}", "the three files that Artifact.save wrote, side by side"
            )
    about, files = about_of(_behind(place, ABOUT).read_text(encoding="utf-8"), asked)
    if files["sha256"] not in ("", _digest(place)):
        raise GrapeError(
            asked,
            f"{_behind(place, ABOUT).name} describes another library",
            "files of one save, side by side",
        )
    machine.check_versions(about.versions, asked)
    weights = machine.read_weights(_behind(place, WEIGHTS), files["weights"], asked)
    return Artifact(about, weights, machine.open_library(place, asked))


def _behind(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checked(value: Value, given: Any, sizes: dict[str, int]) -> np.ndarray[Any, Any]:
    """Return an argument as an array, and note the sizes that have a name of their own."""
    array = np.asarray(given)
    fits = array.dtype == np.dtype(value.dtype) and len(array.shape) == len(value.shape)
    for size, wanted in zip(array.shape, value.shape, strict=False):
        if isinstance(wanted, int):
            fits = fits and size == wanted
        elif wanted is not None and " + " not in wanted:
            sizes.setdefault(wanted, size)
    if not fits:
        raise _misfit(value, array, sizes)
    return array


def _misfit(value: Value, array: np.ndarray[Any, Any], sizes: Mapping[str, int]) -> OperandError:
    known = ", ".join(f"{name} = {size}" for name, size in sizes.items())
    found = f"{array.dtype} of shape {array.shape}" + (f", where {known}" if known else "")
    return OperandError(f"the argument {value.name}", found, str(value))
