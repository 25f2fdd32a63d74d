"""What is known of a library: its arguments, how it was made, how exact it is. Needs neither torch nor TVM."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from grape_compile.errors import GrapeError
from grape_compile.export.comparison import Comparison

#: Version of the form of the file.
FORM: Final = 1


@dataclass(frozen=True)
class Value:
    """One argument or result.

    A size is a number, a name (equal names, equal sizes), a sum of names such as "past + new", or None where it is any.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}[{', '.join('any' if size is None else str(size) for size in self.shape)}]"


@dataclass(frozen=True)
class Place:
    """One encoding or attention of the model, and what computes it."""

    encoding: str
    how: str


@dataclass(frozen=True)
class About:
    """A library: what it takes and returns, for which target, of which model, and how it was verified."""

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    target: Mapping[str, Any]
    device: str
    model: str
    versions: Mapping[str, str]
    places: tuple[Place, ...] = ()
    refusals: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    comparisons: tuple[Comparison, ...] = field(default=())

    @property
    def encodings(self) -> tuple[str, ...]:
        """The encodings, as text that `grape_compile.encoding.parse` reads."""
        return tuple(dict.fromkeys(place.encoding for place in self.places if place.encoding != "attention"))

    def __str__(self) -> str:
        target = self.target.get("tag") or self.target.get("kind")
        lines = [f"{self.model} for {target}"]
        lines += [f"  takes {each}" for each in self.inputs]
        lines += [f"  returns {each}" for each in self.outputs]
        for (encoding, how), count in Counter((each.encoding, each.how) for each in self.places).items():
            lines.append(f"  {count} x {encoding}: {how}")
        lines += [f"  left as it was: {refusal}" for refusal in self.refusals]
        for each in self.comparisons:
            lines.append(f"  {each.case}: error {each.file:.1e}, the original's own {each.original:.1e}")
        return "\n".join((*lines, *(f"  {note}" for note in self.notes)))

    def to_json(self, **files: Any) -> str:
        """Return all of it as JSON, with what is to be known of the files; `about_of` reads both back."""
        return json.dumps({"form": FORM, "files": files, **asdict(self)}, indent=1)


def about_of(text: str, asked: str) -> tuple[About, dict[str, Any]]:
    """Read what `to_json` wrote, and what it says of the files; GrapeError for anything else."""
    try:
        content = json.loads(text)
        if content.pop("form") != FORM:
            raise ValueError(f"not of form {FORM}")
        files = content.pop("files")
        for name in ("inputs", "outputs"):
            content[name] = tuple(
                Value(each["name"], each["dtype"], tuple(each["shape"])) for each in content[name]
            )
        content["places"] = tuple(Place(**each) for each in content["places"])
        content["comparisons"] = tuple(Comparison(**each) for each in content["comparisons"])
        content["refusals"], content["notes"] = tuple(content["refusals"]), tuple(content["notes"])
        return About(**content), files
    except (ValueError, KeyError, TypeError, AttributeError) as failure:
        raise GrapeError(
            asked,
            f"a description that does not read ({type(failure).__name__}: {failure})",
            "the files that Artifact.save wrote, by this version of grape_compile, side by side",
        ) from failure
