"""What a run found, as text: one line while it goes on, the page of all rows at its end."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks.coverage.doors import DOORS, SAMPLED
from benchmarks.coverage.processes import Record

TITLE = """# Coverage

Every architecture of transformers {transformers} as a tiny random model, and what grape_compile finds in it. Written by
`make coverage` on {date}: torch {torch}, Python {python}, one thread of {processor}.

**Truth** is counted by patching the model's own functions while it runs: each tensor that is rotated is one site, each
attention layer that adds ALiBi is one. A cell reads found / truth, then the error. For `static` that is the largest
absolute difference of a site to an fp64 replay of the model's own code; elsewhere it is the relative root-mean-square
error of the output (and, for training, of the gradients) against the original in fp64, over three draws. It may be
1.25 times the larger of the original's and of plain `torch.compile`'s, plus 1e-7; a cell that breaks this contract says
so. Where the original does not run in fp64 (`o`), ours is compared with the original itself. Where torch.compile or
torch.export alone is as far off as ours, and the original as it runs is nearer (`c`), the difference is theirs. No
error stands where the original itself goes another way than in fp64 and gives an output of another shape.

| column | what happens |
|---|---|
| static | `inspect`: `torch.export` with the shapes of the example |
| dynamic | `torch.export` with a symbolic sequence, `rewrite`, run at a longer one |
| compile | `grape_compile(backend="eager")`, forward without gradients |
| cache | the same, one token after a prefill |
| training | the same in training mode, with gradients |
| bf16 | the same with parameters in bfloat16; every run makes the choices of the oracle (by `topk`, `max` and `>`) |
| generate | greedy generation with a cache from a left-padded batch, the sites of all its forward passes; the encoder \
of pictures, which `generate` calls by itself, is compiled as well |
| inductor | `grape_compile(backend="inductor")`, with gradients in fp32 and forward in bfloat16; {sample} models |

A dash means that the model, torch.export or torch.compile alone does not take that way; the reasons stand
[below](#ways-a-model-does-not-take). An empty cell was not run yet (`make coverage` goes on where it stopped).
Cells are kept from run to run and may be older than the code; `make coverage FRESH=1` measures all of them anew.
"""

PROMISED_SECONDS = 1.5


def page(document: dict[str, Any]) -> str:
    """The page: totals, what was missed and why, the table, models without an encoding, models not built."""
    rows: list[Record] = document["rows"]
    encoded = [row for row in rows if "truth" in row and any(row["truth"].values())]
    plain = [row for row in rows if "truth" in row and not any(row["truth"].values())]
    parts = [
        TITLE.format(**document["machine"], date=document["date"], sample=_sample_size(encoded)),
        "## In numbers\n",
        *_totals(encoded, plain),
        *_seconds(encoded),
        *_cost(document.get("cost", [])),
        "\n## Missed, and why\n",
        *(_missed(encoded) or ["Nothing."]),
        "\n## Table\n",
        *_table(encoded),
        *_sampled(encoded),
        *_false_positives(plain),
        *_folded("Without an encoding", f"{len(plain)} architectures", _names(plain)),
        *_ways_not_taken(encoded),
        *_unbuilt([row for row in rows if "unbuilt" in row]),
    ]
    return "\n".join(parts) + "\n"


def _sample_size(rows: list[Record]) -> int:
    """Families in the sample for Inductor; those of earlier samples count where they ran."""
    return max(SAMPLED["inductor"], sum("inductor" in row["doors"] for row in rows))


def line_of(record: Record) -> str:
    """One finished model, for the eye."""
    if "unbuilt" in record:
        return f"{record['name']}: not built: {record['unbuilt'][:120]}"
    cells = (f"{door} {_cell(outcome)}" for door, outcome in record["doors"].items())
    return f"{record['name']}: {', '.join(cells)}"


def complete(outcome: dict[str, Any]) -> bool:
    """Whether a door found all there is and nothing else."""
    return "truth" in outcome and all(outcome[kind] == count for kind, count in outcome["truth"].items())


def _totals(encoded: list[Record], plain: list[Record]) -> Iterator[str]:
    yield "| column | models | complete | share | sites found | sites | contract broken | failed | dash | not run |"
    yield "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
    for door in DOORS:
        outcomes = [row["doors"][door] for row in encoded if door in row["doors"]]
        counted = [each for each in outcomes if "truth" in each]
        whole = sum(map(complete, counted))
        found = sum(min(each[kind], each["truth"][kind]) for each in counted for kind in each["truth"])
        there = sum(sum(each["truth"].values()) for each in counted)
        broken = sum(each.get("holds") is False for each in counted)
        failed = sum("failed" in each for each in outcomes)
        rows = min(SAMPLED.get(door, len(encoded)), len(encoded))
        numbers = (
            len(counted), whole, f"{whole / len(counted):.1%}" if counted else "-", found, there, broken, failed,
            len(outcomes) - len(counted) - failed, max(rows - len(outcomes), 0),
        )  # fmt: skip
        yield f"| {door} | {' | '.join(map(str, numbers))} |"
    yield from _evidence(encoded)
    wrong = sum(_sites(row["doors"].get("static", {})) for row in plain)
    yield f"\nFalse positives on {len(plain)} architectures without an encoding: {wrong}."


def _evidence(rows: list[Record]) -> Iterator[str]:
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


def _seconds(rows: list[Record]) -> Iterator[str]:
    """What `inspect` takes after import."""
    outcomes = [row["doors"]["static"] for row in rows if "static" in row["doors"]]
    for name, what in (
        ("processor_seconds", "of one processor"),
        ("seconds", "on the clock of a shared machine"),
    ):
        seconds = sorted(each[name] for each in outcomes if name in each and "truth" in each)
        if len(seconds) > 1:
            tenths = statistics.quantiles(seconds, n=10, method="inclusive")
            below = sum(each <= PROMISED_SECONDS for each in seconds)
            yield (
                f"\n`inspect` takes {statistics.median(seconds):.2f} s {what} for the median of {len(seconds)} models, "
                f"{tenths[-1]:.2f} s at the ninetieth percentile; {below} stay within {PROMISED_SECONDS} s."
            )


def _cost(rows: list[dict[str, Any]]) -> Iterator[str]:
    """What detecting and rewriting add to a cold compilation; in GPT-2 there is nothing to find."""
    if rows:
        yield "\nOf a cold compilation (`python -m benchmarks.run cost`; GPT-2 has nothing to find):\n"
        yield "| model | torch.compile alone, s | detecting and rewriting, s | share | at most |\n|---|--:|--:|--:|--:|"
    for row in rows:
        cold, ours = (row["seconds"][name]["median"] for name in ("torch.compile", "detect and rewrite"))
        most = "" if row["promised"] is None else f"{row['promised']:.0%}"
        yield f"| {row['name']} | {cold:.1f} | {ours:.2f} | {ours / cold:.1%} | {most} |"


def _table(rows: list[Record]) -> Iterator[str]:
    doors = [door for door in DOORS if door not in SAMPLED]
    yield f"| model | {' | '.join(doors)} |"
    yield "|---" * (1 + len(doors)) + "|"
    for row in rows:
        cells = (_cell(row["doors"].get(door, {})) for door in doors)
        yield f"| {row['name']} | {' | '.join(cells)} |"


def _sampled(rows: list[Record]) -> Iterator[str]:
    for door in SAMPLED:
        ran = [row for row in rows if door in row["doors"]]
        if not ran:
            continue
        yield f"\n## Through {door.capitalize()}\n"
        yield "| model | fp32, with gradients | bound | bf16 | bound |\n|---|---|---|---|---|"
        for row in ran:
            outcome = row["doors"][door]
            half = outcome.get("bf16", {})
            yield (
                f"| {row['name']} | {_cell(outcome)} | {_number(outcome.get('bound'))} | "
                f"{_number(half.get('error'))} | {_number(half.get('bound'))} |"
            )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0e}"


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
        text += " c" if "compiled" in outcome and outcome["holds"] else ""
    return text if outcome.get("holds", True) else f"{text} **broken**"


def _sites(outcome: dict[str, Any]) -> int:
    return int(outcome.get("rotations", 0) + outcome.get("biases", 0))


def _missed(rows: list[Record]) -> list[str]:
    """One item a model and reason, with the columns it holds for."""
    lines = []
    for row in rows:
        by_reasons: dict[tuple[str, ...], list[str]] = {}
        for door, outcome in row["doors"].items():
            if "failed" in outcome:
                by_reasons.setdefault((_text(outcome["failed"]),), []).append(f"{door} failed")
            elif "truth" in outcome and not complete(outcome):
                by_reasons.setdefault(_reasons(outcome), []).append(f"{door} {_cell(outcome)}")
        for reasons, cells in by_reasons.items():
            lines.append(f"* `{row['name']}` ({'; '.join(cells)})")
            lines += [f"  * {reason}" for reason in reasons or ("No refusal.",)]
    return lines


def _reasons(outcome: dict[str, Any]) -> tuple[str, ...]:
    """What the refusals say, each sentence once, with the line of the model it is about."""
    said = {
        f"{_text(' '.join(each['reason'].split()))} {_where(each)}".strip(): None
        for each in outcome["refusals"]
    }
    return tuple(said)


def _where(refusal: dict[str, Any]) -> str:
    return f"(`{refusal['source'].rpartition('models/')[2]}`)" if refusal["source"] else ""


def _false_positives(rows: list[Record]) -> Iterator[str]:
    wrong = [row for row in rows if _sites(row["doors"].get("static", {}))]
    if wrong:
        yield "\n## Found where nothing is\n"
    for row in wrong:
        yield f"* `{row['name']}`: {', '.join(row['doors']['static']['encodings'])}"


def _ways_not_taken(rows: list[Record]) -> Iterator[str]:
    by_reason: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for door, outcome in row["doors"].items():
            if "skipped" in outcome:
                reason = " ".join(outcome["skipped"].split())[:160]
                by_reason.setdefault((door, reason), []).append(f"`{row['name']}`")
    places = {door: place for place, door in enumerate(DOORS)}
    lines = [
        f"* {door}: {_text(reason)}: {', '.join(names)}"
        for (door, reason), names in sorted(
            by_reason.items(), key=lambda item: (places[item[0][0]], item[0][1])
        )
    ]
    count = sum(len(names) for names in by_reason.values())
    yield from _folded("Ways a model does not take", f"{count} dashes", lines)


def _unbuilt(rows: list[Record]) -> Iterator[str]:
    lines = [f"* `{row['name']}`: {_text(' '.join(row['unbuilt'].split())[:200])}" for row in rows]
    yield from _folded(
        "Not built",
        f"{len(rows)} configurations of which no tiny model runs on inputs made up from them",
        lines,
    )


def _names(rows: list[Record]) -> list[str]:
    return [", ".join(f"`{row['name']}`" for row in rows)] if rows else []


def _folded(title: str, summary: str, lines: Iterable[str]) -> Iterator[str]:
    lines = list(lines)
    if lines:
        yield f"\n## {title}\n\n<details><summary>{summary}</summary>\n"
        yield from lines
        yield "\n</details>"


def _text(words: str) -> str:
    """Words of others, kept from being read as markup."""
    return words.replace("<", "&lt;").replace("|", "\\|").replace("*", "\\*")
