"""A model named in one word: `package.module:callable`, a `.pt2` file or a Hugging Face `config.json`."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from grape_compile.errors import ModelError

_FORMS = "package.module:callable, a .pt2 file, or the config.json of a Hugging Face model"
_SAMPLES = 16_000  # one second of sound at the rate the audio models of Hugging Face expect
_TRANSFORMERS_MODULE = re.compile(rb"\b(transformers(?:\.\w+)+)\.[A-Z]\w*")


@dataclass(frozen=True)
class NamedModel:
    """A model or exported program and the inputs of one call; a program carries its own inputs."""

    model: nn.Module | ExportedProgram
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def load(name: str, *, batch: int = 1, sequence: int = 16) -> NamedModel:
    """The model called `name`; inputs that have to be made up are `batch` rows of `sequence` tokens.

    Raises `ModelError` where nothing, or nothing that is a model, bears the name. What the named callable
    itself raises is not caught.
    """
    if name.endswith(".pt2"):
        return NamedModel(_saved_program(_existing(name)))
    if name.endswith(".json"):
        return _from_config(_existing(name), batch, sequence)
    if ":" in name:
        return _built(name, _callable(name)())
    raise ModelError(f"the model {name!r}", "a name of no known form", _FORMS)


def _existing(name: str) -> Path:
    path = Path(name)
    if not path.is_file():
        raise ModelError(f"the model {name!r}", "no such file", _FORMS)
    return path


def _saved_program(path: Path) -> ExportedProgram:
    asked, works = f"the exported program {str(path)!r}", "a file that torch.export.save wrote"
    if not zipfile.is_zipfile(path):
        raise ModelError(asked, "not a .pt2 archive", works)
    _import_output_classes(path)
    try:
        return torch.export.load(path)
    except Exception as error:  # torch.export.load raises whatever its unpickling meets in a foreign file
        raise ModelError(asked, f"{type(error).__name__}: {error}", works) from error


def _import_output_classes(path: Path) -> None:
    """Import what the program names of transformers: its output classes register themselves on import."""
    with zipfile.ZipFile(path) as archive:
        texts = [archive.read(name) for name in archive.namelist() if name.endswith(".json")]
    modules = {module.decode() for text in texts for module in _TRANSFORMERS_MODULE.findall(text)}
    for module in sorted(modules):
        with contextlib.suppress(ImportError):  # torch.export.load tells which class is missing
            importlib.import_module(module)


def _callable(name: str) -> Callable[[], object]:
    module_name, _, path = name.partition(":")
    # A console script does not look for modules where it was called; `python -m` does.
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, and something that it imports is not
        raise ModelError(
            f"the model {name!r}", str(error), f"a module that Python finds: {_FORMS}"
        ) from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise ModelError(
                f"the model {name!r}", f"no {path!r} in {module_name}", "a callable of that module"
            )
        found = getattr(found, part)
    if not callable(found):
        raise ModelError(f"the model {name!r}", f"a {type(found).__name__}", "a callable without arguments")
    built: Callable[[], object] = found
    return built


def _built(name: str, value: object) -> NamedModel:
    match value:
        case nn.Module() | ExportedProgram() as model:
            return NamedModel(model)
        case (nn.Module() | ExportedProgram() as model, tuple() | list() as args):
            return NamedModel(model, tuple(args))
        case (nn.Module() | ExportedProgram() as model, tuple() | list() as args, Mapping() as kwargs):
            return NamedModel(model, tuple(args), kwargs)
    raise ModelError(
        f"the model {name!r}",
        f"a {type(value).__name__} came back from the call",
        "a callable that returns an nn.Module, or (module, args, kwargs)",
    )


def _from_config(path: Path, batch: int, sequence: int) -> NamedModel:
    asked = f"the model of {str(path)!r}"
    try:
        from transformers import AutoConfig
    except ModuleNotFoundError as error:
        raise ModelError(asked, "transformers is not installed", "pip install transformers") from error
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise ModelError(asked, str(error), "a config.json whose model_type transformers knows") from error
    config.use_cache = False
    _check_memory(asked, config)
    model = _random_model(config).eval()
    return NamedModel(model, (), example_inputs(asked, model, batch, sequence))


def _random_model(config: Any) -> nn.Module:
    from transformers import AutoModel, AutoModelForCausalLM

    try:
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    except ValueError:  # no causal language model of this kind
        model = AutoModel.from_config(config)
    return model


def _check_memory(asked: str, config: Any) -> None:
    """Refuses a model larger than the machine: the operating system would end the process without a word."""
    if not hasattr(os, "sysconf"):
        return
    with torch.device("meta"):
        model = _random_model(config)
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    needed = sum(tensor.nbytes for tensor in tensors)
    present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > present:
        raise ModelError(
            asked,
            f"{needed / 2**30:.0f} GiB of weights on a machine with {present / 2**30:.0f} GiB of memory",
            "a copy of the file with fewer num_hidden_layers: its layers encode position alike",
        )


def example_inputs(asked: str, model: nn.Module, batch: int, sequence: int) -> dict[str, Tensor]:
    """Return small inputs for a model of transformers by its configuration; ModelError for a kind that is not known."""
    config: Any = model.config
    text: Any = config.get_text_config()
    name = str(getattr(model, "main_input_name", "input_ids"))
    generator = torch.Generator().manual_seed(0)
    if name == "input_ids":
        tokens = torch.randint(text.vocab_size, (batch, sequence), generator=generator)
        return {name: tokens, "decoder_input_ids": tokens} if config.is_encoder_decoder else {name: tokens}
    if name == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = vision.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return {name: torch.randn(batch, vision.num_channels, height, width, generator=generator)}
    if name == "input_values":
        return {name: torch.randn(batch, _SAMPLES, generator=generator)}
    raise ModelError(
        asked,
        f"its main input is {name!r}, and what that has to look like is not in the file",
        "package.module:callable, a function that returns (module, args, kwargs)",
    )
