"""One whole update of a small policy: 64 trajectories of 48 new tokens, sampled, scored and learned from.

    python benchmarks/tiny_update.py --out benchmarks/results/tiny_update.json

A Llama of about a million parameters answers 8 prompts 8 times each with exactly 48 tokens (end-of-text is switched
off, so that every update is the same work); a rule scores the texts; one optimiser step follows. The claims of the
recipes are made of thousands of such updates, so what is measured here is what they cost: seconds by phase, best and
median over the updates. The target is 0.25 s on two quiet cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

TARGET_S = 0.25


def make_trainer(args: argparse.Namespace) -> Any:
    """The trainer of one update, from the public parts."""
    from guerdon.policies import tiny_policy
    from guerdon.rollout import TransformersEngine
    from guerdon.training import OnlineConfig, OnlineTrainer
    from guerdon.training.toys import Say
    from guerdon.types import Task, Trajectory

    words = ("red", "green", "blue", "black", "white", "grey", "pink", "brown")
    texts = [f"say {a} and then {b} and go on until the line is full" for a in words for b in words]
    policy = tiny_policy(texts=texts, hidden=args.hidden, layers=args.layers, heads=args.heads)
    tasks = [Task(f"say-{k}", texts[(k * 11) % len(texts)], words[k % len(words)]) for k in range(args.prompts)]

    def share_of_letters(trajectories: Sequence[Trajectory]) -> list[float]:
        return [sum(turn.text.count("e") for turn in t.turns) / max(1, len(t)) for t in trajectories]

    config = OnlineConfig(
        prompts_per_step=args.prompts,
        group_size=args.group,
        max_tokens=args.tokens,
        steps=10_000,
        optimiser={"lr": 1e-6},
    )
    engine = TransformersEngine(policy, max_slots=args.prompts * args.group)
    engine._batch._eos[:] = False
    return OnlineTrainer(policy, engine, Say(), tasks, share_of_letters, config)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each update, by phase."""
    trainer = make_trainer(args)
    rows: list[dict[str, float]] = []
    for k in range(args.warm + args.updates):
        began = time.perf_counter()
        row, detail = trainer.train_step()
        trainer.step += 1
        seconds = time.perf_counter() - began
        assert all(len(t) == args.tokens for t in detail.trajectories)
        if k >= args.warm:
            phases = {
                name[5:]: value for name, value in row.items() if name.startswith("time/") and name != "time/step"
            }
            rows.append({"update": seconds, **phases})
    trainer.close()
    names = list(rows[0])
    return {
        "parameters": sum(p.numel() for p in trainer.policy.model.parameters()),
        "prompt_tokens": round(statistics.mean(len(t.prompt_ids) for t in detail.trajectories), 1),
        "best_s": {name: round(min(row[name] for row in rows), 4) for name in names},
        "median_s": {name: round(statistics.median(row[name] for row in rows), 4) for name in names},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48, help="sampled in every trajectory")
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--warm", type=int, default=3, help="updates before the clock counts")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    import torch

    torch.set_num_threads(args.threads)
    result: dict[str, Any] = {
        "benchmark": "tiny_update",
        "settings": {key: value for key, value in vars(args).items() if key != "out"},
        **measure(args),
        "target_s": TARGET_S,
        "environment": {
            "python": platform.python_version(), "cores": os.cpu_count(), "threads": args.threads,
            "load_1min": round(os.getloadavg()[0], 2),
            **{name: version(name) for name in ("guerdon", "torch", "transformers")},
        },
    }  # fmt: skip
    result["reached"] = result["best_s"]["update"] <= TARGET_S
    text = json.dumps(result, indent=1)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    print("phase          best  median", file=sys.stderr)
    for name, best in sorted(result["best_s"].items(), key=lambda item: -item[1]):
        print(f"{name:12} {best:6.3f}  {result['median_s'][name]:6.3f}", file=sys.stderr)


if __name__ == "__main__":
    main()
