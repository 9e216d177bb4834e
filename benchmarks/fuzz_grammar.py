"""The output grammar under 100,000 random responses: no crash, no slow parse, no word of a prompt or a tool read as an answer.

    python benchmarks/fuzz_grammar.py --out results/bench/fuzz_grammar.json

A case is a conversation: a prompt, and turns of the policy and of its environment, made of pieces of the grammar (tags,
boxes, braces, fences, JSON, odd line ends, lone surrogates, megabytes of one thing) put together at random by a seed.
Prompt and environment carry a secret word in every wrapping that could be taken for an answer; the policy never says
it. Checked for every case:

- every reader returns, whatever the text;
- what it returns is what an independent, slow reader of the same definition returns (texts up to 2,000 characters), and
  stands in the policy's text;
- the secret is in nothing that was read, and no reward whose gold is the secret pays.

Cases that break one of these are written out with their seed. Besides, the CPU time of every parse is taken, and for texts
made to be slow that at 64 KB to 1 MB: its exponent is 1 where a reader is linear.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from guerdon.rewards import BoxedMatch, ExactMatch, TokenF1, to_trajectory
from guerdon.rewards.code import extract_code
from guerdon.rewards.grammar import blocks, boxed, extract_answer, fenced, json_lines, last_block, tag_counts
from guerdon.rewards.reasoning_pattern import think_answer
from guerdon.rewards.sql_base import extract_sql
from guerdon.rewards.tools import ToolParseError, parse_tool_calls
from guerdon.rewards.typed_outcome import think_then_answer
from guerdon.types import Trajectory, policy_text

SECRET = "zqxjkv"
TAGS = ("think", "answer", "search", "information", "reasoning", "tool_call", "response")
SMALL = 2000

WRAPPINGS = (
    "<answer>{}</answer>", "\\boxed{{{}}}", "```python\n{}\n```", "```sql\nSELECT {}\n```", "\n```json\n\"{}\"\n```\n", "{}", "</think>{}",
    "<think>t</think><answer>{}</answer>", '<tool_call>\n{{"name": "{}", "parameters": {{}}}}\n</tool_call>', "</answer>{}</answer>",
    "<answer>\\boxed{{{}}}", "}}{}}}", "\n{}\n```\n", "<reasoning>r</reasoning><answer>{}</answer>",
)  # fmt: skip
PIECES = (
    *(f"<{tag}>" for tag in TAGS), *(f"</{tag}>" for tag in TAGS), "<answer", "</answer", "<ANSWER>", "< answer >", "<answer/>", "<<answer>>",
    "\\boxed{", "\\boxed {", "\\boxed", "\\\\boxed{", "{", "}", "\\{", "\\}", "\\\\{", "\\\\}", "\\\\", "\\(", "\\)", "\\[", "$", "\\frac{1}{2}",
    "```", "```python", "```sql", "~~~", "````", "``", "~~~~\n", "```\n", "\n```\n", "\n```python\n", "```py x", "`",
    '{"name": "f", "parameters": {"a": 1}}', '{"a": 1, "a": 2}', "[1, 2", "NaN", "1e999", "null", '"\u2028"', '"\x85"', "9" * 5000, "[" * 200,
    "\n", "\r\n", "\r", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\t", " ", "\xa0", "\0", "\ufeff", "\ud800", "\udfff", "\u202e", "👩‍👧", "é",
    "the answer is", "Lima", "42", "SELECT 1", "print(1)", "x", ";", "--", "/*", "'", '"', "&lt;answer&gt;",
)  # fmt: skip


def make_text(rng: random.Random, most: int) -> str:
    """A random text of at most ``most`` characters."""
    out: list[str] = []
    size = 0
    few = rng.sample(PIECES, rng.randint(2, 12))
    while size < most:
        kind = rng.random()
        if kind < 0.6:
            piece = rng.choice(few)
        elif kind < 0.93:
            piece = rng.choice(PIECES)
        elif kind < 0.97:
            piece = rng.choice(few) * rng.randint(2, 20)
        else:
            piece = "".join(
                chr(rng.choice((rng.randrange(128), rng.randrange(0x3000)))) for _ in range(rng.randint(1, 8))
            )
        out.append(piece)
        size += len(piece)
        if most <= 400 and rng.random() < 0.02:
            break
    return "".join(out)[:most].replace(SECRET, "")


def make_case(seed: int) -> tuple[Any, Any]:
    """Prompt and completion (chat messages) of one case."""
    rng = random.Random(seed)
    roll = rng.random()
    most = (
        rng.randint(0, 400)
        if roll < 0.97
        else rng.randint(400, 20_000)
        if roll < 0.9998
        else rng.randint(20_000, 1_000_000)
    )

    def secret() -> str:
        return (
            make_text(rng, rng.randint(0, 60))
            + rng.choice(WRAPPINGS).format(SECRET)
            + make_text(rng, rng.randint(0, 60))
        )

    prompt: Any = [{"role": "system", "content": secret()}, {"role": "user", "content": secret()}]
    if rng.random() < 0.3:
        prompt = secret()
    turns = rng.choice((1, 1, 2, 3))
    completion = []
    for k in range(turns):
        completion.append({"role": "assistant", "content": make_text(rng, max(1, most // turns))})
        if k + 1 < turns or rng.random() < 0.5:
            completion.append({"role": rng.choice(("tool", "user", "system", "environment")), "content": secret()})
    return prompt, completion


# Slow, independent readers of the same definitions ---------------------------------------------------------------------


def slow_blocks(text: str, tags: Sequence[str]) -> list[tuple[str, str]]:
    """By the regular expression that the docstring names."""
    return [(m[1], m[2]) for m in re.finditer(rf"<({'|'.join(tags)})>(.*?)</\1>", text, re.DOTALL)]


def slow_boxed(text: str) -> str | None:
    """For every box from the last: count its braces up to the one that closes it."""
    opened = [m.end() for m in re.finditer(r"\\boxed\s*\{", text)]
    escaped = _escaped(text)
    for start in reversed(opened):
        depth = 1
        for k in range(start, len(text)):
            if k not in escaped:
                depth += (text[k] == "{") - (text[k] == "}")
            if depth == 0:
                return text[start:k].strip()
    return None


def _escaped(text: str) -> set[int]:
    """Places of braces behind a backslash that is not itself escaped; a doubled backslash in front of a box is not."""
    out = set()
    k = 0
    while k < len(text) - 1:
        if text[k] != "\\" or text.startswith("\\boxed", k) or text.startswith("\\\\boxed", k):
            k += 1
        else:
            if text[k + 1] in "{}":
                out.add(k + 1)
            k += 2 if text[k + 1] in "{}\\" else 1
    return out


def slow_fenced(text: str) -> list[str]:
    """Line by line, a line ending at a newline only."""
    out, inside, marker = [], None, ""
    for line in re.findall(r"[^\n]*\n|[^\n]+\Z", text.replace("\r\n", "\n")):
        line = line.removesuffix("\n")
        bare = line.strip()
        if inside is None:
            for letter in "`~":
                run = len(bare) - len(bare.lstrip(letter))
                if run >= 3:
                    inside, marker = [], letter * run
        elif bare == marker:
            out.append("\n".join(inside))
            inside = None
        else:
            inside.append(line)
    return out if inside is None else [*out, "\n".join(inside)]


# Checks ----------------------------------------------------------------------------------------------------------------


def read_calls(text: str) -> list[Any] | None:
    try:
        return list(parse_tool_calls(text))
    except ToolParseError:
        return None


READERS: dict[str, Callable[[str], Any]] = {
    "blocks": lambda t: blocks(t, TAGS),
    "last_block": lambda t: last_block(t, "answer"),
    "tag_counts": lambda t: tag_counts(t, TAGS),
    "boxed": boxed,
    "extract_answer": extract_answer,
    "fenced": fenced,
    "fenced_sql": lambda t: fenced(t, "sql"),
    "json_lines": lambda t: list(json_lines(t)),
    "extract_code": extract_code,
    "extract_sql": extract_sql,
    "tool_calls": read_calls,
    "think_answer": think_answer,
    "think_then_answer": think_then_answer,
}


def wrong(text: str, read: dict[str, Any]) -> list[str]:
    """What is wrong with what the readers returned for a text of the policy."""
    out: list[str] = []
    end = 0
    for block in read["blocks"]:
        if block.start < end or text[block.start : block.stop] != f"<{block.tag}>{block.content}</{block.tag}>":
            out.append("blocks: places")
        end = block.stop
    strange = [name for name in ("boxed", "extract_answer") if read[name] and read[name] not in text]
    out += [f"{name}: not in the text" for name in strange]
    unix = text.replace("\r\n", "\n")
    if any(content not in unix for content in read["fenced"]):
        out.append("fenced: not in the text")
    if any(content not in read["fenced"] for content in read["fenced_sql"]):
        out.append("fenced: a language adds")
    if any(counts[0] < sum(b.tag == tag for b in read["blocks"]) for tag, counts in read["tag_counts"].items()):
        out.append("tag_counts: fewer than blocks")
    lines = [line for line in re.split(r"\r?\n", text) if line.strip()]
    if len(read["json_lines"]) != len(lines):
        out.append("json_lines: number of lines")
    if len(text) <= SMALL:
        if [(b.tag, b.content) for b in read["blocks"]] != slow_blocks(text, TAGS):
            out.append("blocks: other than the slow reader")
        if read["boxed"] != slow_boxed(text):
            out.append("boxed: other than the slow reader")
        if read["fenced"] != slow_fenced(text):
            out.append("fenced: other than the slow reader")
    return out


def leaks(trajectory: Trajectory, read: dict[str, Any], rewards: Sequence[Any]) -> list[str]:
    """Readers and rewards that took words of a prompt or a tool for the policy's."""
    out = [f"{name}: secret read" for name, value in read.items() if SECRET in repr(value)]
    for reward in rewards:
        scores, _ = reward.assess([trajectory])
        if not scores[0].valid or scores[0].value != 0.0:
            out.append(f"{reward.name}: paid for the secret")
    return out


def fuzz(cases: int, seed: int, kept: int = 20) -> dict[str, Any]:
    """Run the cases."""
    rewards = [ExactMatch(), ExactMatch(tag=None), TokenF1(tag=None), BoxedMatch()]
    crashes: list[dict[str, Any]] = []
    violations: list[dict[str, Any]] = []
    differences: list[dict[str, Any]] = []
    slowest: dict[str, dict[str, Any]] = {name: {"seconds": 0.0} for name in READERS}
    sizes: Counter[str] = Counter()
    characters = 0
    for k in range(cases):
        number = seed * 1_000_000_007 + k
        prompt, completion = make_case(number)
        trajectory = to_trajectory(prompt, completion, SECRET, task_id=str(k))
        text = policy_text(trajectory)
        characters += len(text)
        sizes["up to 400" if len(text) <= 400 else "up to 20,000" if len(text) <= 20_000 else "up to 1,000,000"] += 1
        read: dict[str, Any] = {}
        for name, reader in READERS.items():
            began = time.process_time()
            try:
                read[name] = reader(text)
            except Exception as error:  # noqa: BLE001  a crash is what is looked for
                crashes.append({"case": number, "reader": name, "error": f"{type(error).__name__}: {error}"[:200]})
                read[name] = {} if name == "tag_counts" else ""
                continue
            seconds = time.process_time() - began
            if seconds > slowest[name]["seconds"]:
                slowest[name] = {"seconds": round(seconds, 6), "characters": len(text), "case": number}
        differences += [{"case": number, "what": w} for w in wrong(text, read)]
        try:
            violations += [{"case": number, "what": w} for w in leaks(trajectory, read, rewards)]
        except Exception as error:  # noqa: BLE001
            crashes.append({"case": number, "reader": "reward", "error": f"{type(error).__name__}: {error}"[:200]})
    return {
        "cases": cases, "seed": seed, "characters": characters, "cases_by_characters": dict(sizes),
        "crashes": len(crashes), "differences_from_slow_readers": len(differences),
        "prompt_or_tool_text_read_as_answer": len(violations),
        "slowest_parse": max(slowest.values(), key=lambda row: row["seconds"]), "slowest_by_reader": slowest,
        "found": {"crashes": crashes[:kept], "differences": differences[:kept], "violations": violations[:kept]},
        "found_by_kind": dict(Counter([c["reader"] + ": " + c["error"][:40] for c in crashes] + [d["what"] for d in differences])),
    }  # fmt: skip


SLOW = {
    "open tags": "<answer>", "close tags": "</answer>", "tags of all kinds": "<think><answer><search></think>", "boxes": "\\boxed{",
    "boxes and blanks": "\\boxed" + " " * 50, "open braces": "{", "close braces": "}", "backslashes": "\\", "fences": "```\n",
    "fences without an end": "```python\n\n", "ticks": "`", "newlines": "\n", "brackets": "[", "quotes": '"', "angle brackets": "<", "blanks": " ",
    "math brackets": "\\(", "math closings": "\\)", "answers": "<answer>\\(</answer>", "digits": "9", "tool calls": "<tool_call>\n{\n",
    "comments": "/*", "dashes": "--",
}  # fmt: skip


def growth(sizes: Sequence[int] = (1 << 16, 1 << 18, 1 << 20)) -> dict[str, Any]:
    """For each reader its worst text: seconds at each size, and the exponent from the first to the last."""
    out: dict[str, Any] = {}
    for name, reader in READERS.items():
        rows = {}
        for what, unit in SLOW.items():
            seconds = []
            for size in sizes:
                text = (unit * (size // len(unit) + 1))[:size]
                best = math.inf
                for _ in range(2):
                    began = time.process_time()
                    reader(text)
                    best = min(best, time.process_time() - began)
                    if best > 0.1:
                        break
                seconds.append(best)
                if best > 30.0:
                    break
            rows[what] = seconds
        worst = max(rows, key=lambda what: rows[what][-1])
        seconds = rows[worst]
        exponent = math.log(max(seconds[-1], 1e-6) / max(seconds[0], 1e-6)) / math.log(
            sizes[len(seconds) - 1] / sizes[0]
        )
        out[name] = {
            "worst_text": worst, "seconds": {str(n): round(s, 6) for n, s in zip(sizes, seconds, strict=False)},
            "exponent": round(exponent, 2),
        }  # fmt: skip
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    began = time.perf_counter()
    result = {"benchmark": "fuzz_grammar", **fuzz(args.cases, args.seed), "growth": growth()}
    result["duration_s"] = round(time.perf_counter() - began, 1)
    result["environment"] = {"python": platform.python_version(), "cores": os.cpu_count()}
    result["passed"] = not (
        result["crashes"] or result["differences_from_slow_readers"] or result["prompt_or_tool_text_read_as_answer"]
    )
    text = json.dumps(result, indent=1)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    worst = max(row["exponent"] for row in result["growth"].values())
    print(
        f"{args.cases} cases: {result['crashes']} crashes, {result['differences_from_slow_readers']} differences, "
        f"{result['prompt_or_tool_text_read_as_answer']} leaks; slowest parse {result['slowest_parse']['seconds']:.3f} s; "
        f"greatest exponent {worst}",
        file=sys.stderr,
    )
    sys.exit(0 if result["passed"] else 1)


if __name__ == "__main__":
    main()
