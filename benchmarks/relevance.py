"""How often does the regularized relevance reward agree with people, and which of its parts do?

Data that others made (not part of this project): human preference pairs over dialogues (hh-rlhf, harmless test split) and
the chat prompts of RM-Bench (people's verdict of three right and three wrong answers each, in a terse, a detailed and a
marked-up style). A part agrees on a pair where it is higher for the answer that people chose; ties count half. No part was
fitted to any of it, F included, which is fitted on answers of both sides of other prompts.

    python benchmarks/relevance.py --data ../shared/data --out results/bench/relevance.json

Where the data is absent, it says so and does nothing. HH pairs differ in harmlessness, not in relevance: agreement near one
half is what a relevance reward should show there. RM-Bench's wrong answers differ by a planted error in a few words, so there
the interest is in how much of a part is style: terse against detailed answers of one content.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from guerdon.errors import MissingDependency
from guerdon.evaluation.relevance import relevance_benchmark
from guerdon.papers._arms import one_thread
from guerdon.papers.evidence import bootstrap, environment
from guerdon.policies import load_encoder
from guerdon.reward_models import query_type
from guerdon.rewards.relevance import EmbeddingRelevance, length_incentive, ngram_uniqueness

STYLES = ("terse", "detailed", "markdown")
Pair = tuple[str, str, str]
"""A question, the answer that people chose, and the other one."""


def hh_pairs(path: Path, n: int) -> list[Pair]:
    """Pairs whose dialogues differ in the last turn alone: what the last human turn asks, and the two last answers."""
    out = []
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            pair = json.loads(line)
            sides = [pair[k].rpartition("\n\nAssistant:") for k in ("chosen", "rejected")]
            if sides[0][0] != sides[1][0] or not all(s[2].strip() for s in sides):
                continue
            question = sides[0][0].rpartition("\n\nHuman:")[2].strip()
            if question and sides[0][2].strip() != sides[1][2].strip():
                out.append((question, sides[0][2].strip(), sides[1][2].strip()))
            if len(out) == n:
                break
    return out


def rm_bench(path: Path) -> list[dict[str, Any]]:
    """Prompts with three chosen and three rejected answers each."""
    return [
        r for r in json.loads(path.read_text(encoding="utf-8")) if len(r["chosen"]) == len(r["rejected"]) == len(STYLES)
    ]


class Parts:
    """Every part of the reward as a function of questions and answers.

    Args:
        encode: texts to embeddings; each text is encoded once.
        cache: file in which embeddings are kept, so that a stopped run goes on.
    """

    def __init__(self, encode: Callable[[Sequence[str]], np.ndarray], cache: Path | None = None) -> None:
        self._encode, self._cache = encode, cache
        self._known: dict[str, np.ndarray] = {}
        if cache is not None and cache.is_file():
            saved = np.load(cache)
            self._known.update(zip(saved["keys"].tolist(), saved["rows"], strict=True))
        self.relevance = EmbeddingRelevance(self.encode)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings, remembered."""
        keys = [hashlib.sha256(t.encode()).hexdigest()[:24] for t in texts]
        new = [(k, t) for k, t in dict(zip(keys, texts, strict=True)).items() if k not in self._known]
        for start in range(0, len(new), 64):
            part = new[start : start + 64]
            self._known.update(zip([k for k, _ in part], self._encode([t for _, t in part]), strict=True))
            if self._cache is not None:
                np.savez(self._cache, keys=np.array(list(self._known)), rows=np.array(list(self._known.values())))
        return np.array([self._known[k] for k in keys])

    def functions(self) -> dict[str, Callable[[Sequence[str], Sequence[str]], np.ndarray]]:
        """By name. Those of open questions: people's data has no reference answers, so no closed branch."""

        def length(_: Sequence[str], answers: Sequence[str]) -> np.ndarray:
            return np.array([length_incentive(a) for a in answers])

        def unique(_: Sequence[str], answers: Sequence[str]) -> np.ndarray:
            return np.array([ngram_uniqueness(a) for a in answers])

        r = self.relevance
        return {
            "relevance": r,
            "length": length,
            "uniqueness": unique,
            "relevance * length": lambda x, y: r(x, y) * length(x, y),
            "relevance * length * uniqueness": lambda x, y: r(x, y) * length(x, y) * unique(x, y),
        }


def agreement(parts: Parts, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Agreement of every part with people's choice, with a 95% interval over pairs."""
    out: dict[str, Any] = {
        "pairs": len(pairs),
        "chosen is longer": float(np.mean([len(a.split()) > len(b.split()) for _, a, b in pairs])),
    }
    for name, function in parts.functions().items():
        found = relevance_benchmark(function, pairs)
        rate, low, high, _ = bootstrap([[found["wins"]]])
        out[name] = {"agreement": round(rate, 4), "interval": [round(low, 4), round(high, 4)]}
    return out


def main() -> int:
    """Run it."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", type=Path, default=Path("../shared/data"))
    arguments.add_argument("--out", type=Path, default=Path("results/bench/relevance.json"))
    arguments.add_argument("--pairs", type=int, default=400, help="most pairs of dialogues")
    arguments.add_argument("--prompts", type=int, default=129, help="most prompts of RM-Bench")
    arguments.add_argument("--cache", type=Path, help="keep embeddings in this .npz file, to go on after a stop")
    given = arguments.parse_args()
    hh, bench = (given.data / "preferences" / f for f in ("hh_harmless_test.jsonl.gz", "rm_bench_chat.json"))
    absent = [str(p) for p in (hh, bench) if not p.is_file()]
    if absent:
        print(f"skipped: no data at {', '.join(absent)}; give the folder with --data", file=sys.stderr)
        return 0
    try:
        encoder = load_encoder("minilm", device="cpu")
    except MissingDependency as error:
        print(f"skipped: {error}", file=sys.stderr)
        return 0
    with one_thread():
        parts = Parts(encoder.encode, given.cache)
        result: dict[str, Any] = {
            "what": "how often each part of the reward is higher for the answer that people chose"
        }
        pairs = hh_pairs(hh, given.pairs)
        print(f"{len(pairs)} pairs of dialogues", file=sys.stderr, flush=True)
        result["hh_harmless"] = agreement(parts, pairs)
        items = rm_bench(bench)[: given.prompts]
        print(f"{len(items)} prompts of RM-Bench", file=sys.stderr, flush=True)
        result["rm_bench_chat"] = {
            # As the benchmark does: same style (normal), chosen in the plainer style (hard), in the richer one (easy).
            name: agreement(parts, [(r["prompt"], r["chosen"][a], r["rejected"][b]) for r in items for a, b in places])
            for name, places in {
                "same style": [(0, 0), (1, 1), (2, 2)],
                "hard (chosen plainer)": [(0, 1), (0, 2), (1, 2)],
                "easy (chosen richer)": [(1, 0), (2, 0), (2, 1)],
            }.items()
        }
        # Off the topic, as in the paper's preliminary study: the answer to another prompt, one that is longer.
        others = [(r["prompt"], r["chosen"][0], items[k - 1]["chosen"][1]) for k, r in enumerate(items)]
        others = [(q, a, b) for q, a, b in others if len(b.split()) > len(a.split())]
        result["off topic and longer"] = agreement(parts, others)
        types = query_type().predict([r["prompt"] for r in items])
        result["query types"] = {"rm_bench_chat open": float(np.mean([t == "open" for t in types]))}
        gsm = given.data / "gsm8k" / "test.jsonl"
        if gsm.is_file():
            asked = [json.loads(line)["question"] for line in gsm.read_text(encoding="utf-8").splitlines()]
            found = query_type().predict(asked)
            result["query types"]["gsm8k closed"] = float(np.mean([t == "closed" for t in found]))
    result["environment"] = environment()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
