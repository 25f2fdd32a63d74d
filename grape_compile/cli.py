"""The command line: `grape-compile inspect MODEL`, `export onnx MODEL`, `export tvm MODEL`, `tune`."""

import contextlib
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from grape_compile.errors import GrapeError

if TYPE_CHECKING:
    import torch
    import typer

    from grape_compile.reporting import Report

_MISTAKE = 2


def main() -> None:
    """Runs the command line; a mistake of the caller is one message on stderr and exit status 2."""
    try:
        import rich  # noqa: F401 - asked for here, used by `_show`
        import typer
    except ModuleNotFoundError as missing:
        sys.stderr.write(f"The command line needs {missing.name}: pip install 'grape-compile[cli]'\n")
        sys.exit(_MISTAKE)
    try:
        app()(prog_name="grape-compile")
    except GrapeError as error:
        typer.echo(error, err=True)
        sys.exit(_MISTAKE)


def app() -> "typer.Typer":
    """The commands, built on call: the module itself loads without the `cli` extra."""
    import typer

    commands = typer.Typer(
        name="grape-compile", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
    )

    @commands.callback()
    def describe() -> None:
        """Finds position encodings in PyTorch models."""

    @commands.command("inspect")
    def inspect_model(
        model: Annotated[
            str,
            typer.Argument(
                help="package.module:callable that returns a module or (module, args, kwargs); "
                "a .pt2 file of torch.export.save; or the config.json of a Hugging Face model"
            ),
        ],
        json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
        seq: Annotated[int, typer.Option(min=2, help="Tokens per row of a config.json's input.")] = 16,
        batch: Annotated[int, typer.Option(min=1, help="Rows of a config.json's input.")] = 1,
    ) -> None:
        """Prints where MODEL encodes position. Nothing is changed and nothing is downloaded."""
        report = _inspect(model, batch=batch, sequence=seq)
        if json:
            typer.echo(report.to_json())
        else:
            _show(report)

    @commands.command("tune")
    def tune(
        names: Annotated[
            list[str] | None,
            typer.Argument(help="A model, as for inspect; with --merge, directories of records."),
        ] = None,
        kernels: Annotated[
            bool, typer.Option("--kernels", help="Tune the Triton kernels of attention layers on this GPU.")
        ] = False,
        target: Annotated[
            str, typer.Option(help="Tune programs of TVM for it: llvm, or a tag such as nvidia/nvidia-h100.")
        ] = "",
        trials: Annotated[int, typer.Option(min=1, help="Programs to try for each operator.")] = 64,
        tracker: Annotated[str, typer.Option(help="host:port of a tracker, whose devices run them.")] = "",
        key: Annotated[str, typer.Option(help="What the devices are called there, if not all alike.")] = "",
        merge: Annotated[
            bool, typer.Option("--merge", help="Put directories of records together, in --out.")
        ] = False,
        out: Annotated[str, typer.Option("--out", "-o", help="The directory to merge into.")] = "",
        batch: Annotated[int, typer.Option(min=1, help="Rows of a batch.")] = 1,
        tokens: Annotated[
            int, typer.Option(min=0, help="Tokens of a row; 0 means 512 for a model, else 4096.")
        ] = 0,
        heads: Annotated[int, typer.Option(min=1, help="Heads of the queries.")] = 32,
        key_heads: Annotated[int, typer.Option(min=0, help="Heads of the keys; 0 means as many.")] = 0,
        head_dim: Annotated[int, typer.Option(min=2, help="Coordinates of a head.")] = 128,
        dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
        encoding: Annotated[
            list[str] | None,
            typer.Option(
                help="Text of an encoding, as in a report; again for more. None: halves by positions."
            ),
        ] = None,
        records: Annotated[
            str,
            typer.Option(help="Directory of records; with --kernels a file, by default what kernels read."),
        ] = "",
        fresh: Annotated[
            bool, typer.Option("--fresh", help="--kernels: tune again what is recorded.")
        ] = False,
    ) -> None:
        """Finds the fastest programs for a device and records them: MODEL --target, --kernels, or --merge A B -o C."""
        asked = [
            name
            for name, given in (("--kernels", kernels), ("--target", target), ("--merge", merge))
            if given
        ]
        if len(asked) != 1:
            works = "MODEL --target llvm --records DIR; --kernels; or --merge A B -o C"
            raise GrapeError("tune", " and ".join(asked) or "neither MODEL --target nor --kernels", works)
        if merge:
            typer.echo(_merge(names or [], out))
            return
        from grape_compile import tuning
        from grape_compile.encoding import parse

        layer = tuning.Shape(batch, tokens or 4096, heads, key_heads or heads, head_dim, _dtype(dtype))
        encodings = [parse(text) for text in encoding or ()]
        if kernels:
            typer.echo(tuning.tune_kernels([layer], encodings, records=records or None, fresh=fresh))
            return
        if not records:
            raise GrapeError("tune", "no directory for the records", "--records DIR")
        from grape_compile import named_models
        from grape_compile.tuning.display import shown

        tune_programs = tuning.tune

        with contextlib.redirect_stdout(sys.stderr):
            models = [named_models.load(name, batch=batch, sequence=tokens or 512) for name in names or ()]
        wanted: list[tuple[Any, Sequence[Any], Mapping[str, Any]]] = [
            (each.model, each.args, each.kwargs) for each in models
        ]
        wanted += [(each, (layer,), {}) for each in encodings]
        if not wanted:
            raise GrapeError("tune", "no model", "MODEL, or --encoding TEXT")
        for model, args, kwargs in wanted:
            with shown() as progress:
                report = tune_programs(
                    model, args, kwargs, target=target, trials=trials, records=records,
                    tracker=tracker or None, key=key, progress=progress,
                )  # fmt: skip
            typer.echo(report)

    exports = typer.Typer(no_args_is_help=True, help="Writes MODEL for another runtime.")
    commands.add_typer(exports, name="export")

    @exports.command("onnx")
    def export_onnx(
        model: Annotated[str, typer.Argument(help="As for inspect; or an .onnx file, which is rewritten.")],
        out: Annotated[str, typer.Option("--out", "-o", help="The file to write.")] = "model.onnx",
        target: Annotated[
            str, typer.Option(help="standard (opset 23), ort (com.microsoft) or portable (opset 18).")
        ] = "standard",
        kv_cache: Annotated[
            bool, typer.Option("--kv-cache", help="A decoder that takes and returns its cache.")
        ] = False,
        shared_cache: Annotated[
            bool,
            typer.Option("--shared-cache", help="The same with caches of one size: one buffer in and out."),
        ] = False,
        verify: Annotated[
            bool, typer.Option("--verify/--no-verify", help="Run the file against the model.")
        ] = True,
        json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
        seq: Annotated[int, typer.Option(min=2, help="Tokens per row of a config.json's input.")] = 16,
        batch: Annotated[int, typer.Option(min=1, help="Rows of a config.json's input.")] = 2,
    ) -> None:
        """Writes MODEL as an ONNX file whose encodings and attention are operators, and verifies it."""
        from grape_compile import named_models
        from grape_compile.export.onnx import export, rewrite_onnx

        def tell(step: str) -> None:
            typer.echo(f"{step} ...", err=True)

        if model.endswith(".onnx"):
            if kv_cache or shared_cache:
                raise GrapeError(
                    "give a decoder a cache", f"the file {model}", "the model that it was exported from"
                )
            written = rewrite_onnx(model, out, target=target, verify=verify, progress=tell)
            typer.echo(written.to_json() if json else str(written))
            return
        with contextlib.redirect_stdout(sys.stderr):
            named = named_models.load(model, batch=batch, sequence=seq)
            written = export(
                named.model,
                named.args,
                dict(named.kwargs),
                out,
                target=target,
                kv_cache="shared" if shared_cache else kv_cache,
                verify=verify,
                progress=tell,
            )
        typer.echo(written.to_json() if json else str(written))

    @exports.command("tvm")
    def export_tvm(
        model: Annotated[str, typer.Argument(help="As for inspect.")],
        target: Annotated[
            str,
            typer.Option(
                help="llvm (this CPU), or a tag such as nvidia/nvidia-h100, raspberry-pi/4b-aarch64."
            ),
        ] = "llvm",
        out: Annotated[
            str, typer.Option("--out", "-o", help="The library to write; a .tar takes its objects.")
        ] = "model.so",
        kv_cache: Annotated[
            bool, typer.Option("--kv-cache", help="A decoder that takes and returns its cache.")
        ] = False,
        records: Annotated[
            str, typer.Option(help="A directory of tuning records to build with; see `grape-compile tune`.")
        ] = "",
        dtype: Annotated[str, typer.Option(help="float16 or float32; by default the model's own.")] = "",
        verify: Annotated[
            bool, typer.Option("--verify/--no-verify", help="Run the library against the model.")
        ] = True,
        json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
        seq: Annotated[int, typer.Option(min=2, help="Tokens per row of a config.json's input.")] = 16,
        batch: Annotated[int, typer.Option(min=1, help="Rows of a config.json's input.")] = 2,
    ) -> None:
        """Writes MODEL as a library that runs without torch, its weights and description beside it."""
        from grape_compile import named_models
        from grape_compile.export.tvm import build

        with contextlib.redirect_stdout(sys.stderr):
            named = named_models.load(model, batch=batch, sequence=seq)
            built = build(
                named.model,
                named.args,
                dict(named.kwargs),
                target=target,
                records=records or None,
                kv_cache=kv_cache,
                dtype=_dtype(dtype) if dtype else None,
                verify=verify,
                progress=lambda step: typer.echo(f"{step} ...", err=True),
            )
            built.save(out)
        typer.echo(built.about.to_json() if json else built.report)

    return commands


def _merge(directories: list[str], out: str) -> object:
    from grape_compile.records import merge

    if not directories or not out:
        raise GrapeError(
            "merge records", "no directories" if not directories else "no --out", "--merge A B -o C"
        )
    return merge(directories, out)


def _dtype(name: str) -> "torch.dtype":
    import torch

    known = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if name not in known:
        raise GrapeError("a dtype of queries and keys", repr(name), ", ".join(known))
    return known[name]


def _inspect(name: str, *, batch: int, sequence: int) -> "Report":
    from grape_compile import named_models
    from grape_compile.inspecting import inspect

    # What a model prints while it is built and run is not part of the report.
    with contextlib.redirect_stdout(sys.stderr):
        named = named_models.load(name, batch=batch, sequence=sequence)
        return inspect(named.model, named.args, dict(named.kwargs))


def _show(report: "Report") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from grape_compile.reporting import HEADER, refusal_paragraphs, site_cells, summary

    console = Console(highlight=False)
    if not console.is_terminal:
        sys.stdout.write(f"{report}\n")
        return
    console.print(Text(summary(report), style="bold"))
    if report.sites:
        table = Table(*HEADER, box=None, header_style="dim", pad_edge=False)
        for cells in site_cells(report.sites):
            table.add_row(*(Text(cell, overflow="fold") for cell in cells))
        console.print(table)
    for paragraph in refusal_paragraphs(report.refusals):
        console.print(Text(f"\n{paragraph}", style="yellow"))
