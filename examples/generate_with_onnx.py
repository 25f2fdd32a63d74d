"""Generate text with an exported decoder: ONNX Runtime and its IO binding, without torch.

Write a file first, of a model of your own or of a configuration with random weights:

    grape-compile export onnx config.json --kv-cache -o model.onnx
    python examples/generate_with_onnx.py model.onnx 5 17 42 --tokens 16

The cache stays where the session put it: what one step returns is bound as input of the next. A step copies it all the
same, to put a token behind it; not with --shared-cache in place of --kv-cache: then one buffer with room for all tokens
is bound as input and output.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime


def generate(path: Path, prompt: Sequence[int], count: int) -> list[int]:
    """Return `count` greedy tokens after a prompt."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    inputs = {each.name: each for each in session.get_inputs()}
    cache = [name for name in inputs if name.startswith("past_key_values.")]
    present = [name.replace("past_key_values.", "present.") for name in cache]
    room = len(prompt) + count if inputs[cache[0]].shape[2] == "capacity" else 0
    held: list[Any] = [_zeros(inputs[name].shape, inputs[name].type, room) for name in cache]
    ids, seen, made = np.array([prompt], np.int64), 0, list[int]()
    for _ in range(count):
        seen += ids.shape[1]
        call = {
            "input_ids": ids,
            "attention_mask": np.ones((1, seen), np.int64),
            "position_ids": np.arange(seen - ids.shape[1], seen, dtype=np.int64)[None],
        }
        binding = session.io_binding()
        for name in call.keys() & inputs.keys():
            binding.bind_cpu_input(name, call[name])
        for name, value in zip(cache, held, strict=True):
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("logits")
        for name, value in zip(present, held, strict=True):
            if room:
                binding.bind_ortvalue_output(name, value)
            else:
                binding.bind_output(name)
        session.run_with_iobinding(binding)
        logits, *grown = binding.get_outputs()
        held = held if room else grown
        made.append(int(logits.numpy()[0, -1].argmax()))
        ids = np.array([made[-1:]], np.int64)
    return made


def _zeros(shape: Sequence[int | str], kind: str, room: int) -> Any:
    """A cache of one row with room for so many tokens."""
    dtype = np.float16 if "float16" in kind else np.float32
    heads, width = (size for size in shape if isinstance(size, int))
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((1, heads, room, width), dtype))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path)
    parser.add_argument("prompt", type=int, nargs="+", help="token ids")
    parser.add_argument("--tokens", type=int, default=16)
    given = parser.parse_args()
    print(*generate(given.path, given.prompt, given.tokens))


if __name__ == "__main__":
    main()
