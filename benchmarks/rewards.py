"""Rewards beside their peers: TRL's reward functions, math-verify called directly, verifiers' rubrics, a subprocess per program.

    python -m venv peers && peers/bin/pip install torch==2.13.0 && peers/bin/pip install trl verifiers math-verify
    python benchmarks/rewards.py --peer-python peers/bin/python --out benchmarks/results/rewards.json

Same completions on both sides, in the same process arrangement: each side keeps a process, and they take turns, so that a
slow spell of the machine hits both; the best round counts, and the verdicts are compared. Ours run as TRL would call them
(``guerdon.integrations.trl(reward)`` on chat completions), reading of the conversation included.

Then: 100,000 completions with five rewards as ``guerdon score`` runs them (seconds, peak memory), and how time grows with the
number of completions and with their length (a figure). Targets: no slower than the leanest peer that does the same check;
10 times the programs per second of a subprocess each; under 60 s and 500 MB.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

FIVE: list[Any] = [
    "exact_match",
    {"name": "tag_format", "tags": ["think", "answer"], "weight": 0.2},
    "token_f1",
    {"name": "trigram_uniqueness", "weight": 0.1},
    {"name": "length_incentive", "weight": 0.1},
]
WORDS = [
    "the",
    "number",
    "of",
    "each",
    "then",
    "because",
    "so",
    "we",
    "find",
    "that",
    "two",
    "trains",
    "leave",
    "from",
    "a",
    "city",
    "and",
    "every",
    "hour",
    "there",
    "are",
    "more",
    "than",
    "half",
    "left",
    "which",
    "gives",
    "together",
    "with",
    "what",
    "was",
    "said",
    "before",
    "an",
    "answer",
    "that",
    "can",
    "be",
    "checked",
    "by",
    "hand",
    "if",
    "one",
    "adds",
    "them",
    "up",
    "again",
]
TARGETS = {"rule_ratio": 1.0, "code_ratio": 10.0, "scale_s": 60.0, "scale_mb": 500.0}
PATTERN = r"^<think>(?!.*<think>)(.*?)</think>.*$"


def thought(rng: random.Random, low: int = 40, high: int = 250) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


def chat(texts: Sequence[str]) -> list[list[dict[str, str]]]:
    return [[{"role": "assistant", "content": text}] for text in texts]


def short_answers(n: int, seed: int) -> dict[str, list[Any]]:
    """Thoughts with tagged answers, a third of them malformed or wrong."""
    rng = random.Random(seed)
    texts, golds = [], []
    for _ in range(n):
        gold = rng.choice(("Lima", "Oslo", "42", "a red square"))
        said = gold if rng.random() < 0.6 else rng.choice(("Rome", "41"))
        body = f"<think>{thought(rng)}</think>\n<answer>{said}</answer>"
        if rng.random() < 0.2:
            body = body.replace("</think>", "") if rng.random() < 0.5 else f"<think>{thought(rng, 3, 9)} {body}"
        texts.append(body)
        golds.append(gold)
    return _items(texts, golds, rng)


def whole_numbers(n: int, seed: int) -> dict[str, list[Any]]:
    """Boxed whole numbers, as in most grade-school problems."""
    rng = random.Random(seed)
    pairs = [(x, x if rng.random() < 0.6 else x + rng.randint(1, 9)) for x in (rng.randint(0, 5000) for _ in range(n))]
    return _items(
        [f"<think>{thought(rng)}</think>\nSo it is \\boxed{{{b}}}." for _, b in pairs], [str(a) for a, _ in pairs], rng
    )


def expressions(n: int, seed: int) -> dict[str, list[Any]]:
    """Boxed fractions, roots, polynomials, sets and intervals in another spelling than the gold's, or wrong."""
    rng = random.Random(seed)
    texts, golds = [], []
    for _ in range(n):
        a, b, c = (rng.randint(2, 97) for _ in range(3))
        gold, same = rng.choice(
            (
                (f"\\frac{{{a}}}{{{b}}}", f"\\frac{{{2 * a}}}{{{2 * b}}}"), (f"{a}x+{b}", f"{b}+{a}x"), (f"\\sqrt{{{a * a * b}}}", f"{a}\\sqrt{{{b}}}"),
                (f"\\{{{a},{b + 100}\\}}", f"\\{{{b + 100}, {a}\\}}"), (f"({a},{a + b})", f"\\left({a},{a + b}\\right)"), (f"{a}^{{2}}+{c}", str(a * a + c)),
                (f"(x+{a})^2", f"x^2+{2 * a}x+{a * a}"), (f"{a}.5", f"\\frac{{{2 * a + 1}}}{{2}}"),
            )
        )  # fmt: skip
        said = same if rng.random() < 0.7 else f"{a}x^2+{c}"
        texts.append(f"<think>{thought(rng)}</think>\nSo it is $\\boxed{{{said}}}$.")
        golds.append(gold)
    return _items(texts, golds, rng)


def _items(texts: list[str], golds: list[str], rng: random.Random) -> dict[str, list[Any]]:
    ids = [[1] * rng.randint(50, 300) for _ in texts]
    prompts = [[{"role": "user", "content": "What is it?"}] for _ in texts]
    return {"prompts": prompts, "completions": chat(texts), "golds": golds, "completion_ids": ids}


def ours() -> dict[str, Callable[[dict[str, list[Any]]], list[Any]]]:
    """Our side of each check."""
    from guerdon.integrations import trl
    from guerdon.rewards import ExactMatch, MathEquality, OverlongPenalty, RegexMatch, TagFormat, to_trajectory

    def plain(reward: Any) -> Callable[[dict[str, list[Any]]], list[Any]]:
        function = trl(reward)
        return lambda items: function(items["prompts"], items["completions"], answer=items["golds"])

    def alone(reward: Any) -> Callable[[dict[str, list[Any]]], list[Any]]:
        # On trajectories, as our own trainer has them; they are made once, when a round's completions come for the first time.
        made: dict[int, list[Any]] = {}

        def run(items: dict[str, list[Any]]) -> list[Any]:
            return [score.value for score in reward(made[id(items)])]

        def ready(items: dict[str, list[Any]]) -> None:
            rows = zip(items["prompts"], items["completions"], items["golds"], strict=True)
            made[id(items)] = [to_trajectory(p, c, g) for p, c, g in rows]

        run.ready = ready  # type: ignore[attr-defined]
        return run

    overlong = OverlongPenalty(256, 64)
    return {
        "RegexMatch": plain(RegexMatch(PATTERN, mode="match")),
        "TagFormat": plain(TagFormat("think")),
        "TagFormat, on trajectories": alone(TagFormat("think")),
        "ExactMatch": plain(ExactMatch()),
        "ExactMatch, on trajectories": alone(ExactMatch()),
        "OverlongPenalty": lambda items: overlong(np.fromiter(map(len, items["completion_ids"]), np.int64)).tolist(),
        "MathEquality": plain(MathEquality()),
    }


COMPARISONS: tuple[tuple[str, str, Callable[[int, int], dict[str, list[Any]]], int, tuple[str, ...], tuple[str, ...]], ...] = (
    ("think_format", "one thought at the beginning", short_answers, 2000, ("TagFormat", "TagFormat, on trajectories", "RegexMatch"),
     ("trl.think_format_reward", "verifiers.ThinkParser")),
    ("exact_answer", "the tagged answer is the gold", short_answers, 2000, ("ExactMatch", "ExactMatch, on trajectories"), ("verifiers.XMLParser",)),
    ("overlong", "soft penalty of long completions", short_answers, 20_000, ("OverlongPenalty",), ("trl.soft_overlong_punishment",)),
    ("maths_whole_numbers", "the boxed answer equals the gold", whole_numbers, 100, ("MathEquality",),
     ("trl.accuracy_reward", "math_verify", "verifiers.MathRubric")),
    ("maths_expressions", "the boxed answer equals the gold", expressions, 60, ("MathEquality",),
     ("trl.accuracy_reward", "math_verify", "verifiers.MathRubric")),
)  # fmt: skip


class Peer:
    """The other side's process."""

    def __init__(self, python: str) -> None:
        script = Path(__file__).with_name("peers") / "rewards.py"
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [python, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=environment,
        )  # fmt: skip

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("the peers' process ended; run benchmarks/peers/rewards.py in that interpreter to see why")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


def compare(peer: Peer | None, rounds: int, folder: Path) -> dict[str, Any]:
    """Seconds per completion of every side of every check, best of the rounds, and whether the verdicts agree."""
    sides = ours()
    out: dict[str, Any] = {}
    for name, what, make, n, own, others in COMPARISONS:
        print(f"{name} ...", file=sys.stderr, flush=True)
        files = []
        for k in range(rounds + 1):  # other completions in every round, so that no cache of answers helps
            file = folder / f"{name}-{k}.json"
            file.write_text(json.dumps(make(n, k)), encoding="utf-8")
            files.append((file, json.loads(file.read_text(encoding="utf-8"))))
        wall: dict[str, list[float]] = {}
        cpu: dict[str, list[float]] = {}
        values: dict[str, list[Any]] = {}
        for k, (file, items) in enumerate(files):
            for side in own:
                getattr(sides[side], "ready", lambda items: None)(items)
                began, used = time.perf_counter(), time.process_time()
                found = sides[side](items)
                seconds, spent = time.perf_counter() - began, time.process_time() - used
                if k:
                    wall.setdefault(side, []).append(seconds)
                    cpu.setdefault(side, []).append(spent)
                values.setdefault(side, []).extend(found)
            for side in others if peer is not None else ():
                answer = peer.ask({"check": side, "file": str(file)})
                if "error" in answer:
                    values[side] = []
                    out.setdefault("errors", {})[f"{name}: {side}"] = answer["error"]
                    continue
                if k:
                    wall.setdefault(side, []).append(answer["wall_s"])
                    cpu.setdefault(side, []).append(answer["cpu_s"])
                values.setdefault(side, []).extend(answer["values"])
        best = {side: min(seconds) / n for side, seconds in wall.items()}
        leanest = min((s for s in best if s in others), key=best.__getitem__, default=None)
        first = values[own[0]]
        out[name] = {
            "what": what, "completions": n, "microseconds": {s: round(1e6 * v, 3) for s, v in best.items()},
            "cpu_microseconds": {s: round(1e6 * min(v) / n, 3) for s, v in cpu.items()},
            "median_microseconds": {s: round(1e6 * statistics.median(v) / n, 3) for s, v in wall.items()},
            "agreement": {
                s: round(sum(abs((a or 0.0) - (b or 0.0)) < 1e-6 for a, b in zip(first, v, strict=True)) / len(first), 4)
                for s, v in values.items() if s != own[0] and v
            },
            "leanest_peer": leanest,
            # Called as the peer is called: what only runs on trajectories is shown, and does not count.
            "ratio": None if leanest is None else round(best[leanest] / min(best[s] for s in own if "trajectories" not in s), 2),
            "ratio_cpu": None if leanest is None else round(
                min(cpu[leanest]) / min(min(v) for s, v in cpu.items() if s in own and "trajectories" not in s), 2
            ),
        }  # fmt: skip
    return out


def programs(n: int) -> list[tuple[str, str, str]]:
    """Small programs over standard input, each with an input and what it must write; a quarter is wrong."""
    rng = random.Random(0)
    out = []
    for k in range(n):
        a = rng.randint(1, 999)
        code = f"import sys\nvalues = [int(x) for x in sys.stdin.read().split()]\nprint(sum(v * {a} for v in values), len(values))\n"
        values = [rng.randint(1, 99) for _ in range(20)]
        out.append((code, " ".join(map(str, values)), f"{sum(v * a for v in values) + (k % 4 == 0)} {len(values)}\n"))
    return out


def naive(job: tuple[str, str, str]) -> float:
    """What rewards that are copied around do: write the program to a file, run an interpreter, compare."""
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(job[0])
        file.flush()
        try:
            made = subprocess.run(
                [sys.executable, file.name], input=job[1], capture_output=True, text=True, timeout=10, check=False
            )
        except subprocess.TimeoutExpired:
            return 0.0
    return float(made.returncode == 0 and made.stdout.strip() == job[2].strip())


def family_cpu() -> float:
    """CPU seconds of this process, of the children that it waits for (Linux) and of all that ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = time.process_time() + ended.ru_utime + ended.ru_stime
    tick = os.sysconf("SC_CLK_TCK")
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if int(fields[1]) == os.getpid():
            seconds += sum(map(int, fields[11:15])) / tick
    return seconds


def code(rounds: int, n: int) -> dict[str, Any]:
    """Programs per second: the sandbox, a subprocess each, and as many of these at once as there are cores."""
    from guerdon.rewards import CodeTests, to_trajectory

    jobs = programs(n)
    reward = CodeTests()
    made = [
        to_trajectory("q", f"```python\n{c}```", [{"input": given, "output": wanted}], task_id=str(k))
        for k, (c, given, wanted) in enumerate(jobs)
    ]
    reward(made[:8])
    few = jobs[: max(20, n // 10)]
    rates: dict[str, list[float]] = {"CodeTests": [], "subprocess": [], "subprocess, all cores": []}
    cpu: dict[str, list[float]] = {"CodeTests": [], "subprocess": []}
    values: dict[str, list[float]] = {}
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for _ in range(rounds):
            used, began = family_cpu(), time.perf_counter()
            values["CodeTests"] = [s.value for s in reward(made)]
            rates["CodeTests"].append(n / (time.perf_counter() - began))
            cpu["CodeTests"].append((family_cpu() - used) / n)
            used, began = family_cpu(), time.perf_counter()
            values["subprocess"] = [naive(job) for job in few]
            rates["subprocess"].append(len(few) / (time.perf_counter() - began))
            cpu["subprocess"].append((family_cpu() - used) / len(few))
            began = time.perf_counter()
            list(pool.map(naive, few))
            rates["subprocess, all cores"].append(len(few) / (time.perf_counter() - began))
    best = {side: max(rows) for side, rows in rates.items()}
    return {
        "programs": n, "programs_per_second": {s: round(v, 1) for s, v in best.items()},
        "median_programs_per_second": {s: round(statistics.median(v), 1) for s, v in rates.items()},
        "cpu_ms_per_program": {s: round(1e3 * min(v), 2) for s, v in cpu.items()},
        "agreement": values["CodeTests"][: len(few)] == values["subprocess"],
        "ratio": round(best["CodeTests"] / best["subprocess"], 2),
        # On idle cores, of which the sandbox uses all: what a loaded machine hides.
        "ratio_cpu_times_cores": round(min(cpu["subprocess"]) / min(cpu["CodeTests"]) * (os.cpu_count() or 1), 2),
        "ratio_all_cores": round(best["CodeTests"] / best["subprocess, all cores"], 2),
    }  # fmt: skip


def write_records(path: Path, n: int) -> None:
    """Completions as JSON lines."""
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for k in range(n):
            said = rng.choice(("Lima", "Oslo"))
            row = {"id": k, "prompt": "Capital of Peru?", "reference": ["Lima"]}
            row["completion"] = f"<think>{thought(rng)}</think>\n<answer>{said}</answer>"
            file.write(json.dumps(row) + "\n")


def peak_mb() -> float:
    """Peak resident memory of this process in MB; not that of the process which forked it, as ``ru_maxrss`` may be."""
    status = Path("/proc/self/status")
    if status.exists():
        return round(int(status.read_text().partition("VmHWM:")[2].split()[0]) / 1024, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def scale_child(source: Path) -> None:
    """Score a file as ``guerdon score`` does, and say what it took."""
    from guerdon.evaluation.score_stream import Summary, read_records, score_records

    found = Summary()
    wall, cpu = time.perf_counter(), time.process_time()
    with open(os.devnull, "w", encoding="utf-8") as sink:
        for row in score_records(read_records(source), FIVE):
            sink.write(json.dumps(row) + "\n")
            found.add(row)
    print(
        json.dumps(
            {
                "completions": found.n, "valid": found.valid, "wall_s": round(time.perf_counter() - wall, 2),
                "cpu_s": round(time.process_time() - cpu, 2),
                "peak_mb": peak_mb(),
            }
        )
    )  # fmt: skip


def scale(n: int, folder: Path) -> dict[str, Any]:
    """The five rewards over ``n`` completions, in a process of its own."""
    source = folder / "records.jsonl"
    write_records(source, n)
    child = subprocess.run(
        [sys.executable, __file__, "--scale-child", str(source)],
        capture_output=True,
        text=True,
        check=True,
        timeout=1800,
    )
    return {"rewards": [s if isinstance(s, str) else s["name"] for s in FIVE], **json.loads(child.stdout)}


def growth() -> dict[str, Any]:
    """CPU seconds of the five rewards by the number of completions and by their length, with the exponents."""
    from guerdon.rewards import to_trajectory
    from guerdon.training.job import make_reward

    reward = make_reward(FIVE)
    rng = random.Random(1)

    def cpu(made: list[Any]) -> float:
        best = math.inf
        for _ in range(3):
            began = time.process_time()
            reward(made)
            best = min(best, time.process_time() - began)
        return best

    text = f"<think>{thought(rng, 145, 145)}</think>\n<answer>Lima</answer>"
    many = {
        n: cpu([to_trajectory("q", text, "Lima", task_id=str(k)) for k in range(n)])
        for n in (300, 1000, 3000, 10_000, 30_000)
    }
    long = {}
    for size in (1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20):
        body = " ".join(f"{rng.choice(WORDS)}{rng.randrange(1000)}" for _ in range(size // 8))[:size]
        reps = max(1, (1 << 18) // size)
        made = [
            to_trajectory("q", f"<think>{body}</think>\n<answer>Lima</answer>", "Lima", task_id=str(k))
            for k in range(reps)
        ]
        long[size] = cpu(made) / reps
    return {
        "by_completions": {"seconds": {str(k): round(v, 6) for k, v in many.items()}, "exponent": _exponent(many)},
        "by_characters": {"seconds": {str(k): round(v, 8) for k, v in long.items()}, "exponent": _exponent(dict(list(long.items())[2:]))},
    }  # fmt: skip


def _exponent(seconds: dict[int, float]) -> float:
    """Slope of the least-squares line through the logarithms."""
    x, y = [math.log(k) for k in seconds], [math.log(v) for v in seconds.values()]
    mx, my = statistics.mean(x), statistics.mean(y)
    return round(sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x), 3)


def draw(found: dict[str, Any], path: Path) -> None:
    """The figure of both growths."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, key, label in zip(
        figure.subplots(1, 2),
        ("by_completions", "by_characters"),
        ("completions of 1 kB", "characters of one completion"),
        strict=True,
    ):
        xs = [int(k) for k in found[key]["seconds"]]
        ys = list(found[key]["seconds"].values())
        axes.loglog(xs, ys, "o-", color="#3b6ea5", label=f"measured, exponent {found[key]['exponent']}")
        axes.loglog(xs, [ys[-1] * x / xs[-1] for x in xs], "--", color="#999999", label="linear")
        axes.set_xlabel(label)
        axes.set_ylabel("CPU seconds, five rewards")
        axes.legend(frameon=False, fontsize=8)
        axes.grid(alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def verdicts(result: dict[str, Any]) -> dict[str, bool]:
    """Which targets are met."""
    rules = {
        f"{name}: no slower than {row['leanest_peer']}": row["ratio"] >= TARGETS["rule_ratio"]
        for name, row in result["checks"].items()
        if name != "errors" and row["ratio"] is not None
    }
    return {
        **rules,
        "code: 10 times a subprocess each": result["code"]["ratio"] >= TARGETS["code_ratio"],
        "100,000 completions under 60 s": result["scale"]["wall_s"] < TARGETS["scale_s"],
        "100,000 completions under 500 MB": result["scale"]["peak_mb"] < TARGETS["scale_mb"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peer-python", help="interpreter that has trl, math-verify and verifiers; without it, ours alone"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--programs", type=int, default=400)
    parser.add_argument("--completions", type=int, default=100_000, help="of the five rewards")
    parser.add_argument("--figure", type=Path, help="PNG of the growth")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--scale-child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.scale_child is not None:
        scale_child(args.scale_child)
        return
    peer = Peer(args.peer_python) if args.peer_python else None
    environment = {
        "python": platform.python_version(), "cores": os.cpu_count(), "load_1min": round(os.getloadavg()[0], 2),
        "guerdon": version("guerdon"), "math-verify": version("math-verify"),
    }  # fmt: skip
    if peer is not None:
        environment["peers"] = peer.ask({"versions": True})
    with tempfile.TemporaryDirectory() as folder:
        result: dict[str, Any] = {"benchmark": "rewards", "checks": compare(peer, args.rounds, Path(folder))}
        if peer is not None:
            peer.close()
        print("programs ...", file=sys.stderr, flush=True)
        result["code"] = code(args.rounds, args.programs)
        print(f"{args.completions} completions ...", file=sys.stderr, flush=True)
        result["scale"] = scale(args.completions, Path(folder))
    result["growth"] = growth()
    if args.figure is not None:
        draw(result["growth"], args.figure)
    result |= {"targets": TARGETS, "reached": verdicts(result), "rounds": args.rounds, "environment": environment}
    text = json.dumps(result, indent=1)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    for what, met in result["reached"].items():
        print(f"{'met   ' if met else 'MISSED'} {what}", file=sys.stderr)


if __name__ == "__main__":
    main()
