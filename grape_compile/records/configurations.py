"""Best configurations of kernels: a file that holds for one machine and code, replaced as a whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

#: Version of the file's form.
FORM: Final = 1


@dataclass(frozen=True)
class Key:
    """What a record holds for: any other GPU, compiler or kernel may want other configurations."""

    gpu: str
    capability: str
    triton: str
    source: str


@dataclass(frozen=True)
class Records:
    """Best configurations by case, and a sentence where the file could not be used (then there are none)."""

    cases: Mapping[str, Mapping[str, Any]]
    problem: str = ""


def read(path: Path, key: Key) -> Records:
    """Return the records of a file that hold for `key`; none for a missing, broken or foreign file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Records({})
    except (OSError, ValueError) as failure:
        return Records({}, f"{path} cannot be read as tuning records ({failure}); it is ignored")
    if not isinstance(content, dict) or content.get("form") != FORM or not _is_table(content.get("cases")):
        return Records({}, f"{path} holds no tuning records of form {FORM}; it is ignored")
    found, wanted = content.get("key"), asdict(key)
    if found != wanted:
        held = found if isinstance(found, dict) else {}
        apart = [
            f"{name} {held.get(name)!r}, not {value!r}"
            for name, value in wanted.items()
            if held.get(name) != value
        ]
        return Records({}, f"{path} was recorded for {'; '.join(apart)}; it is ignored")
    return Records(content["cases"])


def write(path: Path, key: Key, cases: Mapping[str, Mapping[str, Any]]) -> None:
    """Replace the file: whoever reads it, or kills this, finds the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"form": FORM, "key": asdict(key), "cases": cases}, indent=1, sort_keys=True) + "\n"
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _is_table(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(each, dict) for each in value.values())
