"""Generate text with a library that `grape-compile export tvm` wrote, without torch.

Write a library first, of a model of your own or of a configuration with random weights:

    grape-compile export tvm config.json --kv-cache -o model.so
    python examples/run_tvm.py model.so 5 17 42 --tokens 16
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from grape_compile.export.tvm import load


def generate(path: Path, prompt: Sequence[int], count: int) -> list[int]:
    """Return `count` greedy tokens after a prompt."""
    artifact = load(path)
    cache = [value for value in artifact.about.inputs if value.name.startswith("past_key_values.")]
    held = {value.name: np.zeros(empty(value.shape), value.dtype) for value in cache}
    ids, seen, made = np.array([prompt], np.int64), 0, list[int]()
    for _ in range(count):
        seen += ids.shape[1]
        results = artifact.run(
            input_ids=ids,
            attention_mask=np.ones((1, seen), np.int64),
            position_ids=np.arange(seen - ids.shape[1], seen, dtype=np.int64)[None],
            **held,
        )
        held = {name: results[name.replace("past_key_values.", "present.")] for name in held}
        made.append(int(results["logits"][0, -1].argmax()))
        ids = np.array([made[-1:]], np.int64)
    return made


def empty(shape: Sequence[int | str | None]) -> tuple[int, ...]:
    """The shape of a cache of no tokens, of one row."""
    heads, width = (size for size in shape if isinstance(size, int))
    return (1, heads, 0, width)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("library", type=Path)
    parser.add_argument("prompt", type=int, nargs="+", help="numbers of tokens")
    parser.add_argument("--tokens", type=int, default=8, help="how many to make")
    given = parser.parse_args()
    print(*generate(given.library, given.prompt, given.tokens))


if __name__ == "__main__":
    main()
