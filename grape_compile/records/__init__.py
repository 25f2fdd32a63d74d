"""Tuning records: files that say for which machine and code they hold."""

from grape_compile.records.configurations import Key, Records, read, write
from grape_compile.records.log import Log, Merged, merge, read_log
from grape_compile.records.trials import Held, Place, Task, Trial, Winner

__all__ = [
    "Held",
    "Key",
    "Log",
    "Merged",
    "Place",
    "Records",
    "Task",
    "Trial",
    "Winner",
    "merge",
    "read",
    "read_log",
    "write",
]
