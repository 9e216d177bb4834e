"""Rewards in the calling conventions of TRL, verl, OpenRLHF and verifiers.

Each function takes any Guerdon reward and returns a plain function; none of these projects is needed to make it. What
the reward says about failures holds there too: ``on_error="raise"`` stops the run, ``"drop"`` becomes what the project
takes for a missing value (TRL: ``None``), and where it has no such thing the failure is raised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from guerdon.errors import ConfigError, RewardError
from guerdon.rewards.base import Progress, Reward, as_reward
from guerdon.rewards.conversation import score_all, to_trajectory
from guerdon.types import Score

__all__ = ["openrlhf", "trl", "verifiers", "verifiers_rubric", "verl"]

_COLUMNS = ("reference", "answer", "solution", "ground_truth", "golds", "label")


def _name(reward: Reward) -> str:
    return "".join(c if c.isalnum() else "_" for c in reward.name).strip("_") or "reward"


def trl(reward: Any, *, reference: str | None = None) -> Callable[..., list[float | None]]:
    """A reward function for ``GRPOTrainer(reward_funcs=[...])`` and its relatives.

    Args:
        reward: any reward.
        reference: column of the dataset that holds the reference; by default the first present of ``reference``,
            ``answer``, ``solution``, ``ground_truth``, ``golds``, ``label``.

    Returns:
        ``f(prompts, completions, **columns) -> list of floats``; conversational and plain formats are understood, tool
        results inside a completion are no words of the policy, and ``None`` stands where the reward gives no value. All
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
        trajectories = [
            to_trajectory(
                prompts[k],
                completions[k],
                rows[key][k] if key is not None else None,
                task_id=f"completion {k}",
                meta={c: v[k] for c, v in rows.items() if c not in (key, "completion_ids")},
            )
            for k in range(n)
        ]
        progress = None
        if state is not None:
            progress = Progress(int(getattr(state, "global_step", 0)), int(getattr(state, "max_steps", 0) or 1))
        return score_all(scorer, trajectories, progress=progress)

    function.__name__ = _name(scorer)
    return function


def _one(scorer: Reward, trajectory: Any) -> Score:
    score = scorer([trajectory])[0]
    if not score.valid:
        raise RewardError(f"{score.reason}; this trainer has no missing rewards: set on_error to a number or 'raise'")
    return score


def verl(reward: Any) -> Callable[..., dict[str, float]]:
    """A ``compute_score`` for verl's ``custom_reward_function``.

    Returns:
        ``f(data_source, solution_str, ground_truth, extra_info=None) -> {"score": ..., parts...}``.

    Raises (when called):
        RewardError: the reward gives no value.
    """
    scorer = as_reward(reward)

    def compute_score(
        data_source: Any, solution_str: str, ground_truth: Any, extra_info: Mapping[str, Any] | None = None, **more: Any
    ) -> dict[str, float]:
        extra = dict(extra_info or {})
        trajectory = to_trajectory(
            extra.get("question") or extra.get("prompt") or "",
            solution_str,
            ground_truth,
            task_id=str(extra.get("index", data_source)),
            meta={**extra, "data_source": data_source},
        )
        score = _one(scorer, trajectory)
        return {"score": float(score.value), **{k: float(v) for k, v in score.parts.items() if k != "score"}}

    return compute_score


def openrlhf(reward: Any) -> Callable[..., dict[str, Any]]:
    """A ``reward_func`` for OpenRLHF's ``--reward.remote_url FILE.py``.

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
            to_trajectory(p, after_prompt(q, p), None if labels is None else labels[k], task_id=f"query {k}")
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


def after_prompt(query: str, prompt: str) -> str:
    """What stands behind the prompt in a query: only that is the policy's.

    Raises:
        RewardError: the query does not begin with the prompt.
    """
    if not query.startswith(prompt):
        raise RewardError("a query must begin with its prompt; the completion cannot be told from it otherwise")
    return query[len(prompt) :]


def verifiers(reward: Any) -> Callable[..., Any]:
    """A reward function for a ``verifiers`` Rubric: ``Rubric(funcs=[gd.integrations.verifiers(reward)])``.

    Returns:
        An asynchronous ``f(prompt, completion, answer, state) -> float``.

    Raises (when called):
        RewardError: the reward gives no value.
    """
    scorer = as_reward(reward)

    async def function(prompt: Any, completion: Any, answer: Any = None, state: Any = None, **more: Any) -> float:
        import asyncio

        info = state.get("info") if isinstance(state, Mapping) else None
        trajectory = to_trajectory(prompt, completion, answer, meta=info if isinstance(info, Mapping) else None)
        return float((await asyncio.to_thread(_one, scorer, trajectory)).value)

    function.__name__ = _name(scorer)
    return function


def verifiers_rubric(rewards: Mapping[str, Any] | Sequence[tuple[Any, float]]) -> Any:
    """A ``verifiers.Rubric`` of rewards with weights.

    Args:
        rewards: ``(reward, weight)`` pairs, or name to reward (weight 1).

    Raises:
        MissingDependency: verifiers is not installed.
    """
    from guerdon.errors import MissingDependency

    try:
        import verifiers as vf
    except ImportError as error:
        raise MissingDependency("a Rubric needs the package verifiers: pip install verifiers") from error
    pairs = [(r, 1.0) for r in rewards.values()] if isinstance(rewards, Mapping) else list(rewards)
    return vf.Rubric(funcs=[verifiers(r) for r, _ in pairs], weights=[float(w) for _, w in pairs])
