"""ONNX Runtime: found when it is asked for, with its two packages told apart and its providers checked."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from grape_compile.errors import GrapeError

CPU: Final = "CPUExecutionProvider"


def runtime() -> Any:
    """Return the module onnxruntime; GrapeError where it is missing, or there twice."""
    both = [name for name in ("onnxruntime", "onnxruntime-gpu") if _is_installed(name)]
    if len(both) == 2:
        raise GrapeError(
            "run an ONNX file",
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files",
            "pip uninstall onnxruntime onnxruntime-gpu, then install the one you need",
        )
    try:
        return importlib.import_module("onnxruntime")
    except ModuleNotFoundError as missing:
        raise GrapeError(
            "run an ONNX file",
            "onnxruntime is not installed",
            "pip install 'grape-compile[ort]' (or [ort-gpu]), or verify=False",
        ) from missing


def session(
    path: str | Path | bytes,
    providers: Sequence[str] = (CPU,),
    threads: int = 0,
    *,
    folder: Path | None = None,
) -> Any:
    """Return a session on exactly these providers; GrapeError for one that the session does not use.

    `folder` is where the external data of a graph given as bytes lies.

    `onnxruntime.get_available_providers` names what a package was built with; only a session tells what there is.
    """
    found = runtime()
    found.set_default_logger_severity(3)
    options = found.SessionOptions()
    options.intra_op_num_threads = threads
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    unknown = [name for name in providers if name not in found.get_available_providers()]
    if unknown:
        raise _no_provider(unknown[0], found.get_available_providers())
    source = path if isinstance(path, bytes) else str(path)
    try:
        made = found.InferenceSession(source, options, providers=list(providers))
    except Exception as failure:
        raise GrapeError(
            f"load {path if not isinstance(path, bytes) else 'an ONNX graph'} in ONNX Runtime",
            str(failure).splitlines()[0],
            "a whole ONNX file whose operators the provider has",
        ) from failure
    if providers and providers[0] not in made.get_providers():
        raise _no_provider(providers[0], made.get_providers())
    return made


def _no_provider(name: str, there: Sequence[str]) -> GrapeError:
    return GrapeError(
        f"run on {name}", f"the session has {', '.join(there)}", f"one of these, or a package with {name}"
    )


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
