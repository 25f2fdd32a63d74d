"""What a run found, as text: one line while it goes on, the page of all rows at its end."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.coverage.doors import DOORS
from benchmarks.coverage.processes import Record

TITLE = """# Coverage

Every architecture of transformers {transformers} as a tiny random model (torch {torch}, {processor}), and what
grape_compile finds in it. Written by `make coverage`.

**Truth** is counted by patching the model's own functions while it runs: each tensor that is rotated is one site, each
attention layer that adds ALiBi is one. A cell reads found / truth, then the error. For `static` that is the largest
absolute difference of a site to an fp64 replay of the model's own code; elsewhere it is the relative root-mean-square
error of the output (and, for training, of the gradients) against the original in fp64, over three draws. It may be
1.25 times that of the original plus 1e-7; a cell that breaks this contract says so. Where the original does not run in
fp64 (`o`), ours is compared with the original itself.

| column | what happens |
|---|---|
| static | `inspect`: `torch.export` with the shapes of the example |
| dynamic | `torch.export` with a symbolic sequence, `rewrite`, run at a longer one |
| compile | `grape_compile(backend="eager")`, forward without gradients |
| cache | the same, one token after a prefill |
| training | the same in training mode, with gradients |
| bf16 | the same with parameters in bfloat16 |

A dash means that the model, torch.export or torch.compile alone does not take that way; the reason is in
`benchmarks/results/coverage.json`. An empty cell was not run yet (`make coverage` goes on where it stopped).
"""


def page(document: dict[str, Any]) -> str:
    """The page: totals, the table, what was missed and why, models without an encoding, models not built."""
    rows: list[Record] = document["rows"]
    encoded = [row for row in rows if "truth" in row and any(row["truth"].values())]
    plain = [row for row in rows if "truth" in row and not any(row["truth"].values())]
    unbuilt = [row for row in rows if "unbuilt" in row]
    parts = [
        TITLE.format(**document["machine"]),
        "## In numbers\n",
        *_totals(encoded, plain),
        "\n## Table\n",
        *_table(encoded),
        "\n## Missed, and why\n",
        *(_missed(encoded) or ["Nothing."]),
        f"\n## Without an encoding\n\n{len(plain)} architectures rotate and bias nothing.",
        *_false_positives(plain),
        "\n" + ", ".join(f"`{row['name']}`" for row in plain),
    ]
    if unbuilt:
        parts.append(
            "\n## Not built\n\nNo tiny model of these runs on inputs made up from the configuration.\n"
        )
        parts += [f"* `{row['name']}`: {row['unbuilt'][:160]}" for row in unbuilt]
    return "\n".join(parts) + "\n"


def line_of(record: Record) -> str:
    """One finished model, for the eye."""
    if "unbuilt" in record:
        return f"{record['name']}: not built: {record['unbuilt'][:120]}"
    cells = (f"{door} {_cell(outcome)}" for door, outcome in record["doors"].items())
    return f"{record['name']}: {', '.join(cells)}"


def complete(outcome: dict[str, Any]) -> bool:
    """Whether a door found all there is and nothing else."""
    return "truth" in outcome and all(outcome[kind] == count for kind, count in outcome["truth"].items())


def _totals(encoded: list[Record], plain: list[Record]) -> Iterable[str]:
    yield "| column | models | all sites found | sites found | sites there are | contract broken | failed |"
    yield "|---|---|---|---|---|---|---|"
    for door in DOORS:
        outcomes = [row["doors"][door] for row in encoded if door in row["doors"]]
        counted = [each for each in outcomes if "truth" in each]
        found = sum(min(each[kind], each["truth"][kind]) for each in counted for kind in each["truth"])
        there = sum(sum(each["truth"].values()) for each in counted)
        broken = sum(each.get("holds") is False for each in counted)
        failed = sum("failed" in each for each in outcomes)
        yield (
            f"| {door} | {len(counted)} | {sum(map(complete, counted))} | {found} | {there} | {broken} | {failed} |"
        )
    yield from _evidence(encoded)
    wrong = sum(_sites(row["doors"].get("static", {})) for row in plain)
    yield f"\nFalse positives on {len(plain)} architectures without an encoding: {wrong}."


def _evidence(rows: list[Record]) -> Iterable[str]:
    """How many sites of causal language models were followed to their formula, as far as the records tell."""
    outcomes = [
        row["doors"].get("static", {}) for row in rows if row.get("model", "").endswith("ForCausalLM")
    ]
    told = [outcome for outcome in outcomes if "proved" in outcome]
    proved, sites = sum(outcome["proved"] for outcome in told), sum(map(_sites, told))
    if sites:
        yield (
            f"\nProved, not only handed on as tables: {proved} of the {sites} sites of {len(told)} causal language "
            f"models ({proved / sites:.0%})."
        )


def _table(rows: list[Record]) -> Iterable[str]:
    yield f"| model | {' | '.join(DOORS)} |"
    yield "|---" * (1 + len(DOORS)) + "|"
    for row in rows:
        cells = (_cell(row["doors"].get(door, {})) for door in DOORS)
        yield f"| {row['name']} | {' | '.join(cells)} |"


def _cell(outcome: dict[str, Any]) -> str:
    if not outcome:
        return ""
    if "failed" in outcome:
        return "failed"
    if "truth" not in outcome:
        return "-"
    text = f"{_sites(outcome)} / {sum(outcome['truth'].values())}"
    error = outcome.get("error", outcome["replay"])
    if error is not None:
        text += f", {error:.0e}" + (" o" if outcome.get("oracle") == "original" else "")
    return text if outcome.get("holds", True) else f"{text} **broken**"


def _sites(outcome: dict[str, Any]) -> int:
    return int(outcome.get("rotations", 0) + outcome.get("biases", 0))


def _missed(rows: list[Record]) -> list[str]:
    lines = []
    for row in rows:
        for door, outcome in row["doors"].items():
            if "failed" in outcome:
                lines.append(f"* `{row['name']}`, {door}: {outcome['failed']}")
            elif "truth" in outcome and not complete(outcome):
                reasons = "; ".join(dict.fromkeys(each["reason"] for each in outcome["refusals"]))
                lines.append(f"* `{row['name']}`, {door}: {_cell(outcome)}. {reasons or 'No refusal.'}")
    return lines


def _false_positives(rows: list[Record]) -> Iterable[str]:
    for row in rows:
        outcome = row["doors"].get("static", {})
        if _sites(outcome):
            yield f"\n* `{row['name']}`: {', '.join(outcome['encodings'])}"
