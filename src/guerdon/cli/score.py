"""``guerdon score``: rewards from YAML over records from a file or a pipe."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from guerdon.cli.common import guarded, progress

__all__ = ["read_spec", "score_command"]


@guarded
def score_command(
    rewards: Annotated[Path, typer.Argument(help="YAML; its key reward holds a name, a mapping, or a list to add up.")],
    source: Annotated[
        Path | None, typer.Argument(help="JSONL, CSV or Parquet; standard input (JSONL) without.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSONL to write; the same command goes on where it stopped.")] = None,
    format: Annotated[str, typer.Option(help="auto, jsonl, csv or parquet.")] = "auto",
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Records scored together.")] = 256,
    summary: Annotated[Path | None, typer.Option(help="Write the summary as JSON here too.")] = None,
    histogram: Annotated[Path | None, typer.Option(help="Write a histogram of the values (PNG).")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 1 where a record has no valid score.")] = False,
) -> None:
    """Score completions; one JSON line per record on stdout (or in OUT), the summary on stderr.

    A record has completion (text, messages, or an OpenAI-format reply), and optionally prompt, reference, id and more.
    A score that fails is a line with "valid": false and a reason, never a 0.

    Example: guerdon score rewards.yaml < in.jsonl > out.jsonl
    """
    from guerdon.errors import DataError
    from guerdon.evaluation.score_stream import Summary, read_records, score_records

    spec = read_spec(rewards)
    if source is not None and not source.is_file():
        raise DataError(f"{source} does not exist; give a file, or nothing for standard input")
    records = read_records(source if source is not None else sys.stdin, format)
    found = Summary()
    done = _resume(out, found) if out is not None else 0
    for _ in range(done):
        if next(records, None) is None:
            raise DataError(f"{out} holds {done} scores and the input has fewer records; use another output")
    if done:
        progress(f"{out} holds {done} scores; going on behind them")
    target: Any = out.open("a", encoding="utf-8") if out is not None else sys.stdout
    try:
        for row in score_records(records, spec, workers=workers, batch=batch, first=done):
            target.write(json.dumps(row, ensure_ascii=True, allow_nan=False, default=str) + "\n")
            found.add(row)
            if found.n % 10_000 == 0:
                progress(f"{found.n} records")
    finally:
        target.flush()
        if out is not None:
            target.close()
    _report(found)
    if summary is not None:
        summary.write_text(json.dumps(found.to_dict(), indent=1) + "\n", encoding="utf-8")
    if histogram is not None:
        from guerdon.report.histogram import plot_histogram

        plot_histogram(found.sample(), histogram, xlabel="reward", title=f"{found.valid} of {found.n} records")
    if strict and found.valid < found.n:
        raise typer.Exit(1)


def read_spec(rewards: Path) -> Any:
    """What a file of rewards says under its one key ``reward``.

    Raises:
        ConfigError: it has other keys, or is no YAML.
    """
    from guerdon.errors import ConfigError
    from guerdon.training.settings import load_yaml

    found = load_yaml(rewards)
    if set(found) != {"reward"}:
        raise ConfigError(f"{rewards}: one key 'reward' is expected, got {', '.join(map(repr, found)) or 'nothing'}")
    return found["reward"]


def _resume(out: Path, found: Any) -> int:
    """Take in whole lines of an earlier start; a line cut in the middle is cut off."""
    if not out.exists():
        return 0
    whole = 0
    with out.open("r+b") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            found.add(json.loads(line))
            whole += len(line)
        file.truncate(whole)
    return int(found.n)


def _report(found: Any) -> None:
    progress(f"{found.n} records, {found.valid} with a value")
    for reason, count in found.reasons.most_common(10):
        progress(f"  {count:>8}  {reason}")
    for name, row in found.values.items():
        progress(
            f"  {name:<24} mean {row['mean']:.4g}  std {row['std']:.4g}  min {row['min']:.4g}  median {row['median']:.4g}  "
            f"max {row['max']:.4g}"
        )
