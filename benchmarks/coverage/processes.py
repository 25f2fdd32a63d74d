"""One process per model: a crash, a hang or a lack of memory costs one row."""

from __future__ import annotations

import inspect
import multiprocessing
import os
import resource
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from benchmarks.coverage.architectures import Architecture, draw_parameters
from benchmarks.coverage.doors import DOORS, Case, first_line
from benchmarks.coverage.inputs import candidates
from benchmarks.coverage.oracle import output_of
from benchmarks.coverage.truth import counting

MEMORY = 12 << 30
ALWAYS = ("static",)
"""Doors that a model without an encoding goes through too: nothing must be found."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """An architecture and the doors it still has to go through."""

    architecture: Architecture
    doors: tuple[str, ...]


def run_all(tasks: Sequence[Task], *, jobs: int, timeout: float) -> Iterator[Record]:
    """The records of all tasks as they finish, `jobs` processes at a time, each at most `timeout` seconds."""
    waiting = list(reversed(tasks))
    running: list[_Worker] = []
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(_Worker(waiting.pop(), timeout))
        wait([worker.connection for worker in running], timeout=1.0)
        for worker in list(running):
            if worker.finished():
                running.remove(worker)
                yield worker.record


def warm_up() -> None:
    """Capture one model, so that every process starts with what torch imports on first use."""
    module = torch.nn.Linear(2, 2)
    torch.export.export(module, (torch.ones(1, 2),), strict=False)
    torch.compile(module, backend="eager")(torch.ones(1, 2))
    torch.compiler.reset()


class _Worker:
    """A running process and what it has told so far."""

    def __init__(self, task: Task, timeout: float) -> None:
        context = multiprocessing.get_context("fork")
        self.connection, far_end = context.Pipe(duplex=False)
        self.record: Record = {"name": task.architecture.name, "doors": {}}
        self.end = time.monotonic() + timeout
        self.process: BaseProcess = context.Process(target=_work, args=(task, far_end), daemon=True)
        self.process.start()
        far_end.close()

    def finished(self) -> bool:
        """Whether the process has ended; one that is out of time is ended."""
        try:
            while self.connection.poll():
                told = self.connection.recv()
                self.record["doors"].update(told.pop("doors", {}))
                self.record.update(told)
        except EOFError:
            self.process.join()
            if self.process.exitcode:
                self._lost(f"the process ended with status {self.process.exitcode}")
            self.record.pop("at", None)
            return True
        if time.monotonic() > self.end:
            self.process.kill()
            self.process.join()
            self._lost("out of time")
            return True
        return False

    def _lost(self, reason: str) -> None:
        door = self.record.pop("at", None)
        if door is None:
            self.record["unbuilt"] = reason
        else:
            self.record["doors"][door] = {"failed": reason}


def _work(task: Task, connection: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.filterwarnings("ignore")
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    case, description = _case(task.architecture)
    connection.send(description)
    if case is None:
        return
    for door in task.doors:
        if not case.truth.sites and door not in ALWAYS:
            continue
        connection.send({"at": door})
        start, busy = time.perf_counter(), time.process_time()
        try:
            outcome = DOORS[door](case)
        except Exception as failure:
            outcome = {"failed": first_line(failure)}
        outcome["seconds"] = round(time.perf_counter() - start, 2)
        outcome["processor_seconds"] = round(time.process_time() - busy, 2)
        connection.send({"doors": {door: outcome}})
        torch.compiler.reset()
    connection.send({"at": None})


def _case(architecture: Architecture) -> tuple[Case | None, Record]:
    """The first model that can be built and run, with its description; None with the reasons against all of them."""
    failures: list[str] = []
    for model, config in architecture.models():
        if isinstance(config, Exception):
            failures.append(first_line(config))
            continue
        tried = False
        for inputs in candidates(model, config, architecture.name):
            tried = True
            try:
                with torch.no_grad(), counting(model) as truth:
                    model(**inputs)
            except Exception as failure:
                failures.append(first_line(failure))
                continue
            case = Case(model, inputs, truth)
            return case, {
                "model": type(model).__name__,
                "attention": config._attn_implementation,
                "drawn": _drawn(case),
                "inputs": {name: list(getattr(value, "shape", ())) for name, value in inputs.items()},
                "truth": {"rotations": truth.rotations, "biases": truth.biases},
                "counted": truth.functions,
            }
        if not tried:
            failures.append(f"no inputs are known for {type(model).__name__}{_arguments(model)}")
    return None, {"unbuilt": "; ".join(dict.fromkeys(failures)) or "no model class"}


def _arguments(model: torch.nn.Module) -> str:
    """The names of what a forward pass must be given."""
    parameters = inspect.signature(model.forward).parameters.values()
    required = (
        each.name for each in parameters if each.default is each.empty and each.kind < each.VAR_KEYWORD
    )
    return f"({', '.join(required)})"


def _drawn(case: Case) -> bool:
    """Draw the parameters, unless the model's own start is the only one that stays finite."""
    kept = {name: parameter.detach().clone() for name, parameter in case.model.named_parameters()}
    draw_parameters(case.model, 0)
    try:
        with torch.no_grad():
            if output_of(case.model(**case.inputs)).isfinite().any():
                return True
    except Exception:  # fall back to the model's own start
        pass
    with torch.no_grad():
        for name, parameter in case.model.named_parameters():
            parameter.copy_(kept[name])
    return False
