"""The cost of one update against the number of trajectories and of tokens: three sizes of each.

    python benchmarks/scaling.py --out benchmarks/results/scaling.json --figure docs/assets/scaling.png

The update of ``tiny_update.py`` (a Llama of about a million parameters on the CPU) at a half, one and two times its 64
trajectories of 48 tokens. Sizes take turns, so that a slow spell of the machine hits all. Reported: seconds of the best
update by phase, and the exponent of a power law through the three sizes: 1 is linear. Attention alone grows with the
square of a response's length, which at these lengths is a small part; batches of few rows use the processor worse, so
exponents below 1 are usual.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tiny_update

SIZES = {"trajectories": (32, 64, 128), "tokens": (24, 48, 96)}
LIMIT = 1.15


def settings(kind: str, size: int, args: argparse.Namespace) -> argparse.Namespace:
    """The benchmark's settings at one size."""
    prompts = size // 8 if kind == "trajectories" else 8
    tokens = size if kind == "tokens" else 48
    return argparse.Namespace(
        hidden=192, layers=2, heads=4, prompts=prompts, group=8, tokens=tokens, threads=args.threads
    )


def measure(args: argparse.Namespace) -> dict[str, dict[int, dict[str, float]]]:
    """Best seconds by kind, size and phase."""
    trainers = {
        (kind, size): tiny_update.make_trainer(settings(kind, size, args))
        for kind, sizes in SIZES.items()
        for size in sizes
    }
    best: dict[str, dict[int, dict[str, float]]] = {kind: {} for kind in SIZES}
    for k in range(1 + args.updates):
        for (kind, size), trainer in trainers.items():
            began = time.perf_counter()
            row, _ = trainer.train_step()
            trainer.step += 1
            seconds = {"update": time.perf_counter() - began}
            seconds |= {name: row[f"time/{name}"] for name in ("sampling", "forward", "backward")}
            if k:
                known = best[kind].setdefault(size, seconds)
                best[kind][size] = {name: min(value, known[name]) for name, value in seconds.items()}
    for trainer in trainers.values():
        trainer.close()
    return best


def exponent(points: dict[int, float]) -> float:
    """Slope of log seconds over log size, by least squares."""
    x = [math.log(size) for size in points]
    y = [math.log(seconds) for seconds in points.values()]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def draw(table: dict[str, Any], path: Path) -> None:
    """Seconds over size, with the straight line through the middle size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for axis, (kind, rows) in zip(axes, table.items(), strict=True):
        sizes = [int(size) for size in rows["seconds"]]
        for phase in ("update", "sampling", "backward", "forward"):
            axis.plot(sizes, [rows["seconds"][str(size)][phase] for size in sizes], marker="o", label=phase)
        middle = rows["seconds"][str(sizes[1])]["update"]
        axis.plot([0, sizes[-1]], [0, middle * sizes[-1] / sizes[1]], color="grey", linestyle=":", label="linear")
        axis.set(xlabel=kind if kind == "trajectories" else "tokens per trajectory", ylabel="seconds", xlim=0, ylim=0)
    axes[0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=6, help="of each size, after one that does not count")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    import torch

    torch.set_num_threads(args.threads)
    best = measure(args)
    table = {
        kind: {
            "seconds": {str(size): {k: round(v, 4) for k, v in row.items()} for size, row in rows.items()},
            "exponent": {
                name: round(exponent({size: row[name] for size, row in rows.items()}), 2)
                for name in next(iter(rows.values()))
            },
        }
        for kind, rows in best.items()
    }
    result = {
        "benchmark": "scaling",
        "settings": {"threads": args.threads, "updates": args.updates, "sizes": SIZES},
        "table": table,
        "target": {"exponent": LIMIT},
        "reached": all(rows["exponent"]["update"] <= LIMIT for rows in table.values()),
        "environment": {
            "python": platform.python_version(), "cores": os.cpu_count(), "load_1min": round(os.getloadavg()[0], 2),
            **{name: version(name) for name in ("guerdon", "torch", "transformers")},
        },
    }  # fmt: skip
    text = json.dumps(result, indent=1)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n", encoding="utf-8")
    if args.figure:
        draw(table, args.figure)
    print(text)
    for kind, rows in table.items():
        for size, row in rows["seconds"].items():
            print(f"{size:>5} {kind:13} {row['update']:.3f} s", file=sys.stderr)
        print(f"      exponent {rows['exponent']['update']}", file=sys.stderr)


if __name__ == "__main__":
    main()
