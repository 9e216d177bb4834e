"""Rewards in the calling conventions of TRL, verl and OpenRLHF; :mod:`guerdon.integrations.rubrics` has verifiers'.

Each function takes any Guerdon reward and returns a plain function; none of these projects is needed to make it. What
the reward says about failures holds there too: ``on_error="raise"`` stops the run, ``"drop"`` becomes what the project
takes for a missing value (TRL: ``None``), and where it has no such thing the failure is raised.

Conventions as of TRL 1.16 (before it took out rows without any reward, such a row's reward was 0 there), verl 0.8.0.dev
(``verl/experimental/reward_loop``) and OpenRLHF 0.11.0 (``openrlhf/utils/agent.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from guerdon.errors import ConfigError, RewardError
from guerdon.rewards.base import Progress, Reward, Weighted, as_reward, unique_names
from guerdon.rewards.conversation import after_prompt, score_all, to_trajectory
from guerdon.types import Score, Trajectory

__all__ = ["function_name", "openrlhf", "score_one", "trl", "verl", "with_parts"]

_COLUMNS = ("reference", "answer", "solution", "ground_truth", "golds", "label")


def function_name(reward: Reward) -> str:
    """A reward's name as an identifier: under it trainers log the function."""
    return "".join(c if c.isalnum() else "_" for c in reward.name).strip("_") or "reward"


def trl(reward: Any, *, reference: str | None = None) -> Callable[..., list[float | None]]:
    """A reward function for ``GRPOTrainer(reward_funcs=[...])`` and its relatives.

    Args:
        reward: any reward.
        reference: column of the dataset that holds the reference; by default the first present of ``reference``,
            ``answer``, ``solution``, ``ground_truth``, ``golds``, ``label``.

    Returns:
        ``f(prompts, completions, **columns) -> list of floats``; conversational and plain formats are understood, tool
        results inside a completion are no words of the policy, and ``None`` stands where the reward gives no value. The
        token ids that TRL passes beside a completion of one turn are the turn's, so that lengths count real tokens. All
        other columns are in ``task.meta``; training progress is passed on.
    """
    scorer = as_reward(reward)

    def function(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        n = len(completions)
        state = columns.pop("trainer_state", None)
        rows = {k: v for k, v in columns.items() if isinstance(v, list | tuple) and len(v) == n}
        key = reference if reference is not None else next((c for c in _COLUMNS if c in rows), None)
        if reference is not None and reference not in rows:
            raise ConfigError(f"the dataset has no column {reference!r}; its columns are {', '.join(sorted(rows))}")
        ids = rows.get("completion_ids")
        trajectories = [
            _with_ids(
                to_trajectory(
                    prompts[k],
                    completions[k],
                    rows[key][k] if key is not None else None,
                    task_id=f"completion {k}",
                    meta={c: v[k] for c, v in rows.items() if c not in (key, "completion_ids")},
                ),
                None if ids is None else ids[k],
            )
            for k in range(n)
        ]
        progress = None
        if state is not None:
            progress = Progress(int(getattr(state, "global_step", 0)), int(getattr(state, "max_steps", 0) or 1))
        return score_all(scorer, trajectories, progress=progress)

    function.__name__ = function_name(scorer)
    return function


def _with_ids(trajectory: Trajectory, ids: Any) -> Trajectory:
    """The sampled token ids, where the whole completion is one turn of the policy."""
    if ids is None or len(trajectory.turns) != 1 or trajectory.turns[0].speaker != "policy":
        return trajectory
    return replace(trajectory, turns=(replace(trajectory.turns[0], token_ids=tuple(int(i) for i in ids)),))


def score_one(scorer: Reward, trajectory: Any) -> Score:
    """The score of one trajectory.

    Raises:
        RewardError: the reward gives no value.
    """
    score = scorer([trajectory])[0]
    if not score.valid:
        raise RewardError(f"{score.reason}; this trainer has no missing rewards: set on_error to a number or 'raise'")
    return score


def verl(reward: Any, *, parts: Sequence[str] | None = None) -> Callable[..., dict[str, float]]:
    """A ``compute_score`` for verl's ``custom_reward_function``.

    Args:
        reward: any reward.
        parts: which parts of the score verl logs; by default the terms of a sum. All samples get the same names, NaN
            where one lacks the part: verl takes the names from the first sample of a batch, and fails where another lacks
            one.

    Returns:
        ``f(data_source, solution_str, ground_truth, extra_info=None) -> {"score": ..., parts...}``.

    Raises (when called):
        RewardError: the reward gives no value.
    """
    scorer = as_reward(reward)
    names = tuple(parts) if parts is not None else _term_names(scorer)

    def compute_score(
        data_source: Any, solution_str: Any, ground_truth: Any, extra_info: Mapping[str, Any] | None = None, **more: Any
    ) -> dict[str, float]:
        extra = dict(extra_info or {})
        trajectory = to_trajectory(
            extra.get("question") or extra.get("prompt") or "",
            solution_str,
            ground_truth,
            task_id=str(extra.get("index", data_source)),
            meta={**extra, "data_source": data_source},
        )
        score = score_one(scorer, trajectory)
        return with_parts(float(score.value), score.parts, names)

    return compute_score


def with_parts(value: float, parts: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """verl's result: the score and exactly the named parts."""
    return {"score": value, **{n: float(parts.get(n, math.nan)) for n in names if n != "score"}}


def _term_names(scorer: Reward) -> tuple[str, ...]:
    if not isinstance(scorer, Weighted):
        return ()
    return tuple(unique_names([reward.name for reward, _ in scorer.terms]))


def openrlhf(reward: Any, *, strip: Sequence[str] = ()) -> Callable[..., dict[str, Any]]:
    """A ``reward_func`` for OpenRLHF's ``--reward.remote_url FILE.py``.

    Args:
        reward: any reward.
        strip: texts that end the policy's turn (``"<|im_end|>"``), taken off the end: OpenRLHF decodes queries with their
            special tokens.

    Returns:
        ``f(queries, prompts, labels) -> {"rewards", "scores", "extra_logs"}`` with ``[B]`` float32 tensors; a query is its
        prompt and what the policy wrote behind it. The server of ``guerdon serve-rewards`` answers the same over HTTP.

    Raises (when called):
        RewardError: the reward gives no value, or a query does not begin with its prompt.
    """
    scorer = as_reward(reward)

    def reward_func(
        queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any] | None = None, **more: Any
    ) -> dict[str, Any]:
        import torch

        trajectories = [
            to_trajectory(p, after_prompt(q, p, strip), None if labels is None else labels[k], task_id=f"query {k}")
            for k, (q, p) in enumerate(zip(queries, prompts, strict=True))
        ]
        scores = scorer(trajectories)
        bad = next((s for s in scores if not s.valid), None)
        if bad is not None:
            raise RewardError(f"{bad.reason}; this trainer has no missing rewards: set on_error to a number or 'raise'")
        values = torch.tensor([s.value for s in scores], dtype=torch.float32)
        names = sorted({k for s in scores for k in s.parts})
        logs = {k: torch.tensor([s.parts.get(k, float("nan")) for s in scores], dtype=torch.float32) for k in names}
        return {"rewards": values, "scores": values.clone(), "extra_logs": logs}

    return reward_func
