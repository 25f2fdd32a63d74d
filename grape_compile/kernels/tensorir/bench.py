"""What a worker process does for the tuner: compile a program into a file, time it, run it, here or on a server.

Such a process may be killed, or end by what it runs, at any moment. It needs no torch.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from grape_compile.kernels.tensorir import engine

#: Repetitions of one timing, and the least milliseconds of one repetition.
REPEAT: Final = 3
LEAST_MILLISECONDS: Final = 20

Array = np.ndarray[Any, Any]
rpc: Final = engine.rpc
#: A process that one call after the other can be sent to, and that may end without harm.
Worker: Final = engine.PopenWorker


@dataclass(frozen=True)
class Server:
    """One device of a fleet, taken for one session: where it listens, and the key it expects."""

    host: str
    port: int
    key: str

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Library:
    """A compiled program: its file and its function."""

    path: str
    function: str


@dataclass(frozen=True)
class Session:
    """Where libraries run: on a server for at most `seconds`, without one in this process; `target` is a text."""

    target: str
    server: Server | None = None
    seconds: int = 60


def ready() -> None:
    """Do nothing: who can call this has imported all that the others need."""


def build(program: str, target: str, path: str) -> None:
    """Compile a module, given as JSON, into a library that the file's ending names the form of."""
    module, place = engine.tvm.ir.load_json(program), _target(target)
    library = engine.compile_module(module, place)
    library.export_library(path, **_linking(path, place))


def library_ending(target: str, *, is_here: bool) -> str:
    """Return what a library's file ends in: objects that the device links itself, where its linker is not at hand."""
    return ".so" if is_here or _is_android(_target(target)) else ".tar"


def _linking(path: str, target: engine.Target) -> dict[str, Any]:
    if path.endswith(".tar"):
        return {"fcompile": engine.tar.tar}
    return {"fcompile": engine.ndk.create_shared} if _is_android(target) else {}


def _is_android(target: engine.Target) -> bool:
    return "android" in str(target)


def measure(session: Session, libraries: Sequence[Library], arguments: str, rounds: int) -> list[list[float]]:
    """Return the seconds of each library, REPEAT for each round, in which all have their turn.

    `arguments` is a file of arrays in the order of the function's own, results included.
    """
    with _connected(session) as (remote, device):
        timed = [
            _loaded(remote, library).time_evaluator(
                library.function, device, number=1, repeat=REPEAT, min_repeat_ms=LEAST_MILLISECONDS
            )
            for library in libraries
        ]
        values = [engine.device_tensor(value, device) for value in _arrays(arguments)]
        times: list[list[float]] = [[] for _ in timed]
        for _ in range(rounds):
            for held, evaluate in zip(times, timed, strict=True):
                held += (float(each) for each in evaluate(*values).results)
        return times


def compute(session: Session, library: Library, arguments: str) -> list[Array]:
    """Return the arguments of a library after one run of it."""
    with _connected(session) as (remote, device):
        values = [engine.device_tensor(value, device) for value in _arrays(arguments)]
        _loaded(remote, library)[library.function](*values)
        return [value.numpy() for value in values]


def device_of(session: Session) -> str:
    """Return the name of a GPU, or how many threads a CPU runs."""
    with _connected(session) as (remote, device):
        if engine.is_gpu(_target(session.target)):
            return str(device.device_name)
        threads = int(remote.get_function("runtime.NumThreads")())
        return f"{threads} thread" + ("s" if threads > 1 else "")


def device_here(target: str) -> str:
    """Return what tells the device of this machine from others: the name of a GPU, or of a CPU and its threads."""
    found = device_of(Session(target))
    return f"{_processor()}, {found}" if found.endswith(("thread", "threads")) else found


def why_not_here(target: str) -> str:
    """Return why programs for a target do not run on this machine, or nothing."""
    wanted, here = _target(target), engine.to_target("llvm")
    if not engine.tvm.device(wanted.get_target_device_type(), 0).exist:
        return f"no {wanted.kind.name} device"
    if wanted.kind.name != "llvm" or str(wanted) == str(here):
        return ""
    have, needs = (set(engine.tvm.target.codegen.llvm_get_cpu_features(each)) for each in (here, wanted))
    missing = sorted(needs - have)
    return f"a CPU without {', '.join(missing[:5])}" if missing else ""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    return named[0] if named else platform.processor() or platform.machine()


def save(arguments: Sequence[Array], path: Path) -> None:
    """Write arrays for `measure` and `compute`."""
    brains = [value.dtype.name == "bfloat16" for value in arguments]
    plain = [
        value.view(np.uint16) if is_brain else value
        for value, is_brain in zip(arguments, brains, strict=True)
    ]
    # numpy has no bfloat16 of its own.
    np.savez(path, *plain, bfloat16=np.array(brains))


def _arrays(path: str) -> list[Array]:
    with np.load(path) as held:
        brains = held["bfloat16"]
        return [_value(held[f"arr_{at}"], bool(is_brain)) for at, is_brain in enumerate(brains)]


def _value(array: Array, is_brain: bool) -> Array:
    if not is_brain:
        return array
    import ml_dtypes

    return array.view(ml_dtypes.bfloat16)


@contextmanager
def _connected(session: Session) -> Iterator[tuple[Any, Any]]:
    """Open a session and its device; a server removes what it was given when the session ends."""
    server = session.server
    remote: Any = (
        rpc.LocalSession()
        if server is None
        else rpc.connect(server.host, server.port, server.key, session_timeout=session.seconds)
    )
    yield remote, remote.device(_target(session.target).get_target_device_type(), 0)


def _target(text: str) -> engine.Target:
    return engine.to_target(json.loads(text))


def _loaded(remote: Any, library: Library) -> Any:
    name = Path(library.path).name
    remote.upload(library.path, name)
    return remote.load_module(name)
