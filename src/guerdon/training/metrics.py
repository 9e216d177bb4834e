"""What one step sampled, as a row of numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from guerdon.training.streams import Experience, Streams, zero_variance
from guerdon.types import StopReason

__all__ = ["failure_row", "sampling_row"]


def sampling_row(experience: Experience, streams: Streams) -> dict[str, Any]:
    """Rewards and their parts, lengths, entropy estimate, stops, what was left out, and what was spent.

    Reward means are over valid scores. ``entropy`` is the mean of minus the sampled log-probability over
    policy tokens: an unbiased estimate that costs nothing.
    """
    trajectories, scores = experience.trajectories, experience.scores
    n = len(trajectories)
    valid = [s for s in scores if s.valid]
    values = np.array([s.value for s in valid])
    row: dict[str, Any] = {
        "reward/mean": _mean(values),
        "reward/std": float(values.std()) if len(values) else float("nan"),
    }
    for part in sorted({key for s in valid for key in s.parts}):
        row[f"reward/{part}"] = _mean(np.array([s.parts[part] for s in valid if part in s.parts]))
    counts = experience.action_counts
    flat = zero_variance(experience)
    row |= {
        "reward/invalid": n - len(valid),
        "trajectories": n,
        "trajectories/failed": sum(t.stop in (StopReason.ERROR, StopReason.ABORTED) for t in trajectories),
        "trajectories/kept": int(experience.kept.sum()),
        "trajectories/skipped": int(streams.skip.sum()),
        "groups/zero_variance": len(np.unique(experience.group[flat])) / max(1, len(np.unique(experience.group))),
        "length/policy_mean": _mean(counts[experience.kept]),
        "length/policy_max": int(counts.max(initial=0)),
        "length/response_mean": _mean(np.diff(experience.offsets)),
        "turns/mean": _mean(np.array([sum(t.speaker == "policy" for t in x.turns) for x in trajectories])),
        "truncated": _mean(np.array([x.stop.truncated for x in trajectories])),
        "entropy": -_mean(experience.sampled.numpy()[experience.action]),
        "usage/calls": sum(x.usage.calls for x in trajectories),
        "usage/output_tokens": sum(x.usage.output_tokens for x in trajectories),
        "usage/usd": sum(x.usage.usd for x in trajectories),
    }
    if experience.excluded is not None:
        row["groups/sampled"] = len(np.unique(experience.group))
        row["groups/excluded"] = len(np.unique(experience.group[experience.excluded]))
    row |= {f"stop/{stop.value}": count / n for stop, count in sorted(Counter(x.stop for x in trajectories).items())}
    if streams.target is not None and experience.values is not None:
        row["value/explained_variance"] = _explained(
            experience.values.numpy()[experience.action], streams.target.numpy()[experience.action]
        )
    return row


def failure_row(failures: Mapping[tuple[str, str], int]) -> dict[str, int]:
    """Failed scores, ``reward/failed/<reward>/<reason>``; empty where none failed."""
    return {f"reward/failed/{name}/{reason}": count for (name, reason), count in sorted(failures.items())}


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _explained(values: np.ndarray, targets: np.ndarray) -> float:
    variance = float(targets.var()) if len(targets) else 0.0
    return float("nan") if variance == 0 else 1.0 - float((targets - values).var()) / variance
