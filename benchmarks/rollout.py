"""Multi-turn sampling: Guerdon's engine beside ``model.generate`` called anew at every turn.

    python benchmarks/rollout.py --out benchmarks/results/rollout.json

Same model (``smollm2``, float32), same prompts (Router-R1's, over a pool of six), same observations, same number of
sampled tokens in every turn, temperature 1. ``generate`` is given all rows of a step as one left-padded batch and uses
its own key-value cache within a turn; between turns the whole conversation is computed again, as trainers that wrap
``generate`` do. Each side runs in a process of its own, sides interleaved over the rounds, so that the peak resident
memory is its own and a slow spell of the machine hits both. Reported: sampled tokens per second of the best round
and the median, their ratio, and peak memory over that of the loaded model.

The end-of-text token is switched off on both sides, or both would sample different amounts of text.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

SIDES = ("guerdon", "generate")
OBSERVATION = (
    "\n<information> The capital of the country is a city on the river; no other facts are known. </information>\n"
)


def peak_mb() -> float:
    """Peak resident memory of this process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def prompts(policy: Any, count: int, length: int) -> list[list[int]]:
    """Router prompts over the embedded pool, cut or filled to ``length`` tokens so that both sides pad nothing."""
    from guerdon.routing import Member
    from guerdon.routing.prompt import router_prompt

    skills = ("capitals", "currencies", "languages", "continents", "neighbours", "chemical elements")
    members = [
        Member(f"terra-{k}", f"answers questions about {skill}", input_price=0.1 * k, output_price=0.4 * k)
        for k, skill in enumerate(skills, start=1)
    ]
    out = []
    for k in range(count):
        text = router_prompt(f"What is the capital of country number {k + 1}?", members)
        ids = policy.render([{"role": "user", "content": text}])
        filler = policy.encode(" Think about what is needed before you ask.") * length
        out.append((filler[: max(0, length - len(ids))] + ids)[-length:])
    return out


def run_guerdon(policy: Any, args: argparse.Namespace, rows: list[list[int]]) -> tuple[float, int]:
    """Seconds and sampled tokens of one step on the engine."""
    from guerdon.rollout import Sampling, TransformersEngine

    engine = TransformersEngine(policy, max_slots=args.prompts * args.group)
    engine._batch._eos[:] = False
    observation = policy.encode(OBSERVATION)

    async def row(ids: list[int], k: int, member: int) -> int:
        stream = engine.start([], ids, group=k)
        sampled = 0
        for turn in range(args.turns):
            done = await stream.generate(Sampling(max_tokens=args.tokens, seed=1000 * k + member))
            sampled += len(done.token_ids)
            if turn + 1 < args.turns:
                stream.extend(observation, OBSERVATION)
        stream.close()
        return sampled

    async def step() -> int:
        counts = await asyncio.gather(*(row(ids, k, j) for k, ids in enumerate(rows) for j in range(args.group)))
        await engine.aclose()
        return sum(counts)

    began = time.perf_counter()
    sampled = asyncio.run(step())
    return time.perf_counter() - began, sampled


def run_generate(policy: Any, args: argparse.Namespace, rows: list[list[int]]) -> tuple[float, int]:
    """Seconds and sampled tokens of one step with ``model.generate`` at every turn."""
    import torch

    observation = policy.encode(OBSERVATION)
    texts = [list(ids) for ids in rows for _ in range(args.group)]
    torch.manual_seed(0)
    began = time.perf_counter()
    sampled = 0
    with torch.inference_mode():
        for turn in range(args.turns):
            ids = torch.tensor(texts)  # equal lengths: nothing is padded
            out = policy.model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                max_new_tokens=args.tokens, min_new_tokens=args.tokens, pad_token_id=0,
            )  # fmt: skip
            fresh = out[:, ids.shape[1] :].tolist()
            sampled += sum(map(len, fresh))
            texts = [
                text + new + (observation if turn + 1 < args.turns else [])
                for text, new in zip(texts, fresh, strict=True)
            ]
    return time.perf_counter() - began, sampled


def side(args: argparse.Namespace) -> dict[str, float]:
    """One round of one side, in this process."""
    import torch

    from guerdon.policies import load_policy

    torch.set_num_threads(args.threads)
    policy = load_policy(args.policy)
    policy.model.eval()
    rows = prompts(policy, args.prompts, args.prompt_tokens)
    run = run_guerdon if args.side == "guerdon" else run_generate
    warm = argparse.Namespace(**{**vars(args), "turns": 1, "tokens": 2})
    run(policy, warm, rows[:1])
    loaded = peak_mb()
    seconds, sampled = run(policy, args, rows)
    return {"seconds": seconds, "tokens": sampled, "loaded_mb": loaded, "peak_mb": peak_mb()}


def measure(args: argparse.Namespace, name: str) -> dict[str, float]:
    """One round of one side, in a process of its own."""
    own = [sys.executable, __file__, "--side", name]
    for key in ("policy", "prompts", "group", "turns", "tokens", "prompt_tokens", "threads"):
        own += [f"--{key.replace('_', '-')}", str(getattr(args, key))]
    done = subprocess.run(
        own, check=False, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    )
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="smollm2")
    parser.add_argument("--prompts", type=int, default=2, help="prompts of a step")
    parser.add_argument("--group", type=int, default=8, help="rows of one prompt")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32, help="sampled in every turn")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(side(args)))
        return
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
    for k in range(args.rounds):
        for name in SIDES:
            row = measure(args, name)
            rounds[name].append(row)
            print(
                f"round {k + 1}  {name:9}  {row['tokens'] / row['seconds']:7.1f} tokens/s  peak {row['peak_mb']:.0f} MB",
                file=sys.stderr,
            )
    table = {
        name: {
            "tokens_per_s": round(max(r["tokens"] / r["seconds"] for r in rows), 1),
            "tokens_per_s_median": round(statistics.median(r["tokens"] / r["seconds"] for r in rows), 1),
            "peak_mb": round(max(r["peak_mb"] for r in rows), 1),
            "loaded_mb": round(max(r["loaded_mb"] for r in rows), 1),
        }
        for name, rows in rounds.items()
    }  # fmt: skip
    ours, theirs = (table[name] for name in SIDES)
    result: dict[str, Any] = {
        "benchmark": "rollout",
        "settings": {k: getattr(args, k) for k in ("policy", "prompts", "group", "turns", "tokens", "prompt_tokens", "threads", "rounds")},
        "table": table,
        "ratio": round(ours["tokens_per_s"] / theirs["tokens_per_s"], 2),
        "ratio_of_medians": round(ours["tokens_per_s_median"] / theirs["tokens_per_s_median"], 2),
        "peak_memory_ratio": round(ours["peak_mb"] / theirs["peak_mb"], 2),
        "target": {"ratio": 3.0, "peak_memory_ratio": 1.0},
        "environment": {
            "python": platform.python_version(), "cores": os.cpu_count(),
            **{name: version(name) for name in ("guerdon", "torch", "transformers")},
        },
    }  # fmt: skip
    result["reached"] = result["ratio"] >= 3.0 and result["peak_memory_ratio"] <= 1.0
    text = json.dumps(result, indent=1)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    print(
        f"{result['ratio']} times the tokens per second of generate, {result['peak_memory_ratio']} of its memory",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
