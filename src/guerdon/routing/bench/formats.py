"""Readers of recorded routing outcomes, all into one :class:`~guerdon.routing.bench.matrix.ScoreMatrix`.

A number that a source lacks is never filled with 0: a missing price is an error, a call that failed is
marked as failed, and a member that was not run is NaN. Where a source has no token counts, a stated
estimator takes their place and is written into the matrix' notes.
"""

from __future__ import annotations

import ast
import csv
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from guerdon.errors import ConfigError, DataError, nearest
from guerdon.routing.bench.matrix import ScoreMatrix

__all__ = [
    "ASSUMED_PRICES",
    "FORMATS",
    "LISTED_PRICES",
    "Prices",
    "estimate_tokens",
    "read_csv",
    "read_gsm8k",
    "read_llmrouter",
    "read_matrix",
    "read_pool",
    "read_routerbench",
    "read_scores_json",
]

Prices = Mapping[str, tuple[float, float]]
"""Member to (input, output) price in USD per million tokens."""

FORMATS = ("auto", "llmrouter", "scores", "routerbench", "csv", "gsm8k")

LISTED_PRICES: dict[str, tuple[float, float, str]] = {
    "gpt-4-1106-preview": (10.0, 30.0, "OpenAI's list price of November 2023"),
}
"""Prices that a provider has published, with their date."""

ASSUMED_PRICES: dict[str, tuple[float, float, str]] = {
    "mistralai/Mixtral-8x7B-Instruct-v0.1": (0.6, 0.6, "assumed: what the nine-LLM pool file charges for this model"),
    "6b_finetuning": (0.2, 0.2, "assumed: what the nine-LLM pool file charges for 7B to 9B"),
    "175b_finetuning": (1.8, 1.8, "assumed: what the nine-LLM pool file charges for 122B, its dearest"),
    "6b_verification": (0.2, 20.0, "assumed: as 6b_finetuning, 100 candidate solutions written for each answer"),
    "175b_verification": (1.8, 180.0, "assumed: as 175b_finetuning, 100 candidate solutions written for each answer"),
}
"""Prices nobody has published for these research models; replace them by passing ``prices``."""

_OUTAGES = ("API Error", "API Request Error", "ERROR")
_SHOWN = 5


class _Problems:
    """Collects what is wrong with a file, to be reported once."""

    def __init__(self, path: Path) -> None:
        self._path, self._found = path, list[str]()

    def add(self, row: int, field: str, why: str) -> None:
        self._found.append(f"row {row}, field {field!r}: {why}")

    def number(self, row: int, field: str, value: Any, *, least: float = -math.inf) -> float:
        """``value`` as a finite float, or NaN after noting what is wrong with it."""
        try:
            out = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            out = math.nan
        if not math.isfinite(out) or out < least:
            bound = "" if least == -math.inf else f" >= {least:g}"
            self.add(row, field, f"{_short(value)} is not a finite number{bound}")
            return math.nan
        return out

    def check(self) -> None:
        if self._found:
            more = len(self._found) - _SHOWN
            raise DataError(
                f"{self._path.name}: {'; '.join(self._found[:_SHOWN])}{f'; and {more} more' if more > 0 else ''}"
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def estimate_tokens(text: str) -> int:
    """Tokens of an English text where nobody counted them: one for every four characters, at least one."""
    return max(1, math.ceil(len(text) / 4))


def read_pool(path: str | Path) -> dict[str, dict[str, Any]]:
    """Read a candidate file: member to a record with ``input_price`` and ``output_price`` (USD per million).

    Prices come from these fields alone: a descriptor may name others. ``size`` (such as ``"7B"``) is added
    as ``size_b``.

    Raises:
        DataError: not such a file, or a price is missing or no finite number >= 0.
    """
    path = Path(path)
    raw = _json(path)
    if not isinstance(raw, dict) or not raw or not all(isinstance(v, dict) for v in raw.values()):
        raise DataError(f"{path.name} is no pool file: it must map member names to records")
    problems = _Problems(path)
    out = {}
    for row, (name, record) in enumerate(raw.items(), 1):
        prices = {}
        for which in ("input_price", "output_price"):
            if record.get(which) is None:
                problems.add(row, which, f"member {name!r} has no price; 0 must be written out")
            else:
                prices[which] = problems.number(row, which, record[which], least=0)
        size = re.fullmatch(r"\s*([\d.]+)\s*[Bb]\s*", str(record.get("size", "")))
        out[name] = {**record, **prices, "size_b": float(size[1]) if size else None}
    problems.check()
    return out


def read_matrix(
    path: str | Path,
    *,
    format: str = "auto",
    pool: str | Path | None = None,
    second: str | Path | None = None,
    prices: Prices | None = None,
) -> ScoreMatrix:
    """Read recorded outcomes in any known format.

    Args:
        path: the file.
        format: one of :data:`FORMATS`; ``"auto"`` looks at the file.
        pool: prices and sizes of the members, where the format has none.
        second: the solutions file of ``"gsm8k"``.
        prices: overrides what ``pool`` or the defaults say.

    Raises:
        ConfigError: unknown format, or a further file is needed.
        DataError: the file cannot be read; file, row and field are named.
    """
    path = Path(path)
    if format not in FORMATS:
        raise ConfigError(f"format {format!r} is unknown{nearest(format, FORMATS)}; choose from {', '.join(FORMATS)}")
    if format == "auto":
        format = detect(path)
    if format == "routerbench":
        return read_routerbench(path)
    if format == "csv":
        return read_csv(path)
    if format == "gsm8k":
        if second is None:
            raise ConfigError("format 'gsm8k' joins two files: give the solutions JSONL as second=")
        return read_gsm8k(path, second, prices=prices)
    records = read_pool(pool) if pool is not None else {}
    merged = {k: (r["input_price"], r["output_price"]) for k, r in records.items()} | dict(prices or {})
    if not merged:
        raise ConfigError(f"{path.name} holds no prices: give the members' as pool= (a JSON file) or prices=")
    sizes = {k: r["size_b"] for k, r in records.items() if r["size_b"] is not None}
    read = read_llmrouter if format == "llmrouter" else read_scores_json
    return read(path, merged, sizes=sizes)


def detect(path: Path) -> str:
    """Name the format of a file by its suffix and first line.

    Raises:
        DataError: it is a pickle, or nothing that is known.
    """
    suffix = path.suffix.lower()
    if suffix in (".pkl", ".pickle"):
        raise DataError(
            f"{path.name} is a pickle, and opening one can run any program; convert it where you trust it: "
            "pandas.read_pickle(PATH).to_csv(NEW, index=False)"
        )
    if suffix == ".json":
        return "scores"
    if suffix in (".jsonl", ".ndjson"):
        return "llmrouter"
    if suffix == ".csv":
        header = set(_csv_rows(path, header_only=True)[0])
        if any(h.endswith("|total_cost") for h in header):
            return "routerbench"
        if {"query", "member", "score", "cost"} <= header:
            return "csv"
        if "prompt" in header and any(h.endswith("_response") for h in header):
            return "gsm8k"
        raise DataError(f"{path.name}: no known format has the columns {', '.join(sorted(header)[:8])}")
    raise DataError(
        f"{path.name}: the suffix {suffix!r} belongs to no known format; name one of {', '.join(FORMATS[1:])}"
    )


def read_llmrouter(path: str | Path, prices: Prices, *, sizes: Mapping[str, float] | None = None) -> ScoreMatrix:
    """Read routing records, one JSON line per query and model, and price their tokens.

    A row whose response is an error text, or whose performance is null, is a failed call. Its tokens are
    still priced.

    Raises:
        DataError: a row cannot be read, is double, or names a model without a price.
    """
    path = Path(path)
    problems = _Problems(path)
    cells = []
    for row, record in _jsonl_rows(path, problems):
        query, member = record.get("query"), record.get("model_name")
        if not isinstance(query, str) or not query.strip():
            problems.add(row, "query", "is blank")
            continue
        if not isinstance(member, str) or member not in prices:
            problems.add(row, "model_name", f"{_short(member)} has no price" if member else "is blank")
            continue
        reply = record.get("response")
        outage = record.get("performance") is None or (isinstance(reply, str) and reply.startswith(_OUTAGES))
        # A call that never got an answer was not billed; any other call has been counted.
        tokens = [
            0.0 if outage and record.get(k) is None else problems.number(row, k, record.get(k), least=0)
            for k in ("input_tokens", "output_tokens")
        ]
        usd = sum(t * p for t, p in zip(tokens, prices[member], strict=True)) / 1e6
        score = math.nan if outage else problems.number(row, "performance", record.get("performance"))
        task = str(record.get("task_name") or "all")
        cells.append((row, (task, str(record.get("task_id")), query), member, score, usd, outage, reply))
    problems.check()
    return _assemble(path, cells, problems, sizes, ("cost: recorded tokens times list price",))


def read_scores_json(
    path: str | Path, prices: Prices, *, sizes: Mapping[str, float] | None = None, output_tokens: int = 256
) -> ScoreMatrix:
    """Read a JSON list of ``question``, ``scores`` (a mapping, or a Python dict as text) and ``cluster_id``.

    The source counts no tokens. Each call is priced at one input token for every four characters of the
    question and ``output_tokens`` output tokens, for all members alike: costs differ by list price only.

    Raises:
        DataError: a row cannot be read, or names a model without a price.
    """
    path = Path(path)
    raw = _json(path)
    if not isinstance(raw, list):
        raise DataError(f"{path.name} must hold a JSON list of records, got {type(raw).__name__}")
    problems = _Problems(path)
    cells = []
    for row, record in enumerate(raw, 1):
        if (
            not isinstance(record, dict)
            or not isinstance(record.get("question"), str)
            or not record["question"].strip()
        ):
            problems.add(row, "question", "is missing or blank")
            continue
        scores = record.get("scores")
        if isinstance(scores, str):
            try:
                scores = ast.literal_eval(scores)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                problems.add(row, "scores", f"{_short(record['scores'])} is no Python dict")
                continue
        if not isinstance(scores, dict) or not scores:
            problems.add(row, "scores", f"{_short(scores)} is no mapping of models to scores")
            continue
        for member, value in scores.items():
            if member not in prices:
                problems.add(row, "scores", f"model {_short(member)} has no price")
                continue
            if value is None:
                continue
            score = problems.number(row, f"scores[{member}]", value)
            price_in, price_out = prices[member]
            usd = (estimate_tokens(record["question"]) * price_in + output_tokens * price_out) / 1e6
            task = f"cluster {record['cluster_id']}" if "cluster_id" in record else "all"
            cells.append((row, (task, "", record["question"]), member, score, usd, False, None))
    problems.check()
    note = (
        "cost: list price times an estimate of tokens that is equal for all members "
        f"(question characters / 4 in, {output_tokens} out)"
    )
    return _assemble(path, cells, problems, sizes, (note,))


def read_routerbench(path: str | Path) -> ScoreMatrix:
    """Read a wide CSV: ``prompt``, ``eval_name`` and for each model ``M``, ``M|model_response``, ``M|total_cost``.

    Raises:
        DataError: it is a pickle, a model has no cost column, or a cell is no number.
    """
    path = Path(path)
    detect(path)
    rows = _csv_rows(path)
    header = list(rows[0]) if rows else []
    members = [h.removesuffix("|total_cost") for h in header if h.endswith("|total_cost")]
    bare = [h.removesuffix("|model_response") for h in header if h.endswith("|model_response")]
    unpriced = [m for m in bare if m not in members]
    if unpriced:
        raise DataError(f"{path.name}: model {unpriced[0]!r} has no column {unpriced[0] + '|total_cost'!r}")
    if not members or "prompt" not in header:
        raise DataError(f"{path.name}: RouterBench needs a column 'prompt' and 'MODEL|total_cost' columns")
    absent = [m for m in members if m not in header]
    if absent:
        raise DataError(f"{path.name}: model {absent[0]!r} has a cost but no column {absent[0]!r} with its score")
    problems = _Problems(path)
    cells = []
    for row, record in enumerate(rows, 2):
        if not (record["prompt"] or "").strip():
            problems.add(row, "prompt", "is blank")
            continue
        key = (record.get("eval_name") or "all", record.get("sample_id") or str(row), str(record["prompt"]))
        for member in members:
            if not (record[member] or "").strip() and not (record[f"{member}|total_cost"] or "").strip():
                continue
            score = problems.number(row, member, record[member])
            usd = problems.number(row, f"{member}|total_cost", record[f"{member}|total_cost"], least=0)
            cells.append((row, key, member, score, usd, False, record.get(f"{member}|model_response")))
    problems.check()
    return _assemble(path, cells, problems, None, ("cost: as recorded",))


def read_csv(path: str | Path) -> ScoreMatrix:
    """Read one row per query and member: ``query``, ``member``, ``score``, ``cost``; more columns are optional.

    They are ``task``, ``failed`` (true or false; its score is then not read) and ``reply``.

    Raises:
        DataError: a column is missing, a row is double or a cell is no number.
    """
    path = Path(path)
    rows = _csv_rows(path)
    need = ("query", "member", "score", "cost")
    lacking = [k for k in need if not rows or k not in rows[0]]
    if lacking:
        raise DataError(f"{path.name}: needs the columns {', '.join(need)}; {', '.join(lacking)} missing, or no rows")
    problems = _Problems(path)
    cells = []
    for row, record in enumerate(rows, 2):
        blank = [k for k in ("query", "member") if not (record[k] or "").strip()]
        if blank:
            problems.add(row, blank[0], "is blank")
            continue
        failed = (record.get("failed") or "").strip().lower()
        if failed not in ("", "0", "1", "true", "false"):
            problems.add(row, "failed", f"{_short(failed)} is not true or false")
        broke = failed in ("1", "true")
        score = math.nan if broke else problems.number(row, "score", record["score"])
        usd = problems.number(row, "cost", record["cost"], least=0)
        key = (record.get("task") or "all", "", str(record["query"]))
        cells.append((row, key, str(record["member"]), score, usd, broke, record.get("reply")))
    problems.check()
    return _assemble(path, cells, problems, None, ("cost: as recorded",))


def read_gsm8k(responses_csv: str | Path, solutions_jsonl: str | Path, *, prices: Prices | None = None) -> ScoreMatrix:
    """Join the recorded answers of six models to GSM8K's test problems: two from a CSV, four from a JSONL.

    Problems are matched by their text, blanks ignored. Tokens are estimated at four characters each.

    Args:
        responses_csv: ``prompt``, per model its correctness under its name and its text under ``NAME_response``.
        solutions_jsonl: ``question``, and per model ``is_correct`` and ``solution``.
        prices: overrides the defaults :data:`LISTED_PRICES` and :data:`ASSUMED_PRICES`, of which the
            latter are assumptions.

    Raises:
        DataError: a row cannot be read, a problem is in one file only, or a model has no price.
    """
    path, second = Path(responses_csv), Path(solutions_jsonl)
    rows = _csv_rows(path)
    members = [h.removesuffix("_response") for h in (rows[0] if rows else ()) if h.endswith("_response")]
    if not members or "prompt" not in rows[0] or any(m not in rows[0] for m in members):
        raise DataError(f"{path.name}: needs a column 'prompt' and, per model, 'NAME' and 'NAME_response'")
    defaults = {**ASSUMED_PRICES, **LISTED_PRICES}
    priced = {k: v[:2] for k, v in defaults.items()} | dict(prices or {})
    problems = _Problems(path)
    cells, questions = [], {}
    for row, record in enumerate(rows, 2):
        question = record["prompt"] or ""
        questions[" ".join(question.split())] = question
        for m in members:
            said = (record[m] or "").strip().lower()
            if said not in ("true", "false"):
                problems.add(row, m, f"{_short(record[m])} is not True or False")
            cells.append((row, question, m, float(said == "true"), record[f"{m}_response"] or ""))
    problems.check()
    problems = _Problems(second)
    seen = set()
    for row, record in _jsonl_rows(second, problems):
        key = " ".join(str(record.get("question", "")).split())
        if key not in questions:
            problems.add(row, "question", f"{_short(key)} is not in {path.name}")
            continue
        seen.add(key)
        for m, answer in record.items():
            if not isinstance(answer, dict):
                continue
            if not isinstance(answer.get("is_correct"), bool) or not isinstance(answer.get("solution"), str):
                problems.add(row, m, "needs is_correct (a boolean) and solution (a text)")
                continue
            cells.append((row, questions[key], m, float(answer["is_correct"]), answer["solution"]))
    if len(seen) < len(questions):
        problems.add(0, "question", f"{len(questions) - len(seen)} problems of {path.name} are missing")
    problems.check()
    names = dict.fromkeys(c[2] for c in cells)
    unpriced = [m for m in names if m not in priced]
    if unpriced:
        raise DataError(f"model {unpriced[0]!r} has no price; give prices={{{unpriced[0]!r}: (input, output)}}")
    full = []
    for row, question, m, score, reply in cells:
        usd = (estimate_tokens(question) * priced[m][0] + estimate_tokens(reply) * priced[m][1]) / 1e6
        full.append((row, ("gsm8k", "", question), m, score, usd, not reply.strip(), reply))
    notes = ["tokens: estimated at four characters each, for questions and replies"]
    for m in names:
        given = prices is not None and m in prices
        why = "given by the caller" if given else defaults[m][2]
        notes.append(f"price of {m}: {priced[m][0]:g} in, {priced[m][1]:g} out, USD per million tokens ({why})")
    sizes = {
        m: s
        for m, s in (
            ("6b_finetuning", 6.0),
            ("6b_verification", 6.0),
            ("175b_finetuning", 175.0),
            ("175b_verification", 175.0),
            ("mistralai/Mixtral-8x7B-Instruct-v0.1", 47.0),
        )
        if m in names
    }
    return _assemble(path, full, problems, sizes, notes, name="gsm8k")


def _assemble(
    path: Path,
    cells: Iterable[tuple[int, tuple[str, str, str], str, float, float, bool, str | None]],
    problems: _Problems,
    sizes: Mapping[str, float] | None,
    notes: Sequence[str],
    name: str | None = None,
) -> ScoreMatrix:
    cells = list(cells)
    if not cells:
        raise DataError(f"{path.name} holds no outcomes")
    keys = {k: i for i, k in enumerate(dict.fromkeys(c[1] for c in cells))}
    members = {m: j for j, m in enumerate(dict.fromkeys(c[2] for c in cells))}
    shape = (len(keys), len(members))
    scores, cost, failed = np.full(shape, np.nan), np.full(shape, np.nan), np.zeros(shape, bool)
    filled = np.zeros(shape, bool)
    replies: dict[str, list[str | None]] = {m: [None] * shape[0] for m in members}
    for row, key, member, score, usd, broke, reply in cells:
        i, j = keys[key], members[member]
        if filled[i, j]:
            problems.add(row, "query", f"is double for member {member!r}: {_short(key[2])}")
        filled[i, j] = True
        scores[i, j], cost[i, j], failed[i, j] = score, usd, broke
        replies[member][i] = reply
    problems.check()
    return ScoreMatrix(
        tuple(k[2] for k in keys),
        tuple(members),
        scores,
        cost,
        failed,
        tuple(k[0] for k in keys),
        {m: s for m, s in (sizes or {}).items() if m in members},
        replies if any(r is not None for texts in replies.values() for r in texts) else None,
        name or path.stem,
        tuple(notes),
    )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path.name} cannot be read as JSON: {error}") from error


def _jsonl_rows(path: Path, problems: _Problems) -> Iterable[tuple[int, dict[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path.name} cannot be read: {error}") from error
    for row, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            problems.add(row, "(line)", f"is no JSON ({error.msg})")
            continue
        if isinstance(record, dict):
            yield row, record
        else:
            problems.add(row, "(line)", "is no JSON object")


def _csv_rows(path: Path, *, header_only: bool = False) -> list[dict[str, str | None]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            if header_only:
                return [dict.fromkeys(reader.fieldnames or (), None)]
            return list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path.name} cannot be read as CSV: {error}") from error
