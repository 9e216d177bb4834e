"""Rewards inside verifiers: as functions of a Rubric (0.2 and 0.3), and as rewards of a ``verifiers.v1`` task (0.3, 0.4).

A Rubric logs an exception of a reward function and goes on with 0.0. So the functions here never raise: where there is no
honest value they return NaN, which no mean or advantage hides, and leave the reason in ``state["guerdon_failures"]``. The
Rubric that :func:`verifiers_rubric` makes then raises, where the reward says so. A task of ``verifiers.v1`` records an
exception as the error of the rollout, so :func:`verifiers_task_reward` raises.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

from guerdon.errors import GuerdonError, MissingDependency, RewardError
from guerdon.integrations.trainers import function_name, score_one
from guerdon.rewards.base import Reward, as_reward, unique_names
from guerdon.rewards.conversation import to_trajectory
from guerdon.types import Trajectory

__all__ = ["verifiers", "verifiers_rubric", "verifiers_task_reward"]

_FAILURES = "guerdon_failures"


def verifiers(reward: Any) -> Callable[..., Any]:
    """A reward function for a Rubric: ``vf.Rubric(funcs=[gd.integrations.verifiers(reward)])``.

    Returns:
        An asynchronous ``f(prompt, completion, answer, state) -> float``; NaN where the reward gives no value, with the
        reason in ``state["guerdon_failures"]`` under the function's name.
    """
    return _function(as_reward(reward))


def _function(scorer: Reward, name: str | None = None) -> Callable[..., Any]:
    label = name or function_name(scorer)

    async def function(prompt: Any, completion: Any, answer: Any = None, state: Any = None, **more: Any) -> float:
        info = state.get("info") if isinstance(state, Mapping) else None
        try:
            trajectory = to_trajectory(prompt, completion, answer, meta=info if isinstance(info, Mapping) else None)
            scores, fatal = await asyncio.to_thread(scorer.assess, [trajectory])
        except GuerdonError as error:
            return _failed(state, label, str(error), True)
        if not scores[0].valid:
            return _failed(state, label, scores[0].reason or "no value", fatal[0])
        return float(scores[0].value)

    function.__name__ = label
    return function


def _failed(state: Any, name: str, reason: str, fatal: bool) -> float:
    if isinstance(state, MutableMapping):
        state.setdefault(_FAILURES, {})[name] = {"reason": reason, "fatal": fatal}
    return math.nan


def verifiers_rubric(rewards: Mapping[str, Any] | Sequence[tuple[Any, float]]) -> Any:
    """A ``verifiers.Rubric`` of rewards with weights, which does not hide failures.

    Args:
        rewards: ``(reward, weight)`` pairs, or name to reward (weight 1).

    Returns:
        A Rubric. Scoring a rollout raises a :class:`~guerdon.errors.RewardError` where a reward failed and its
        ``on_error`` is ``"raise"``; with ``"drop"`` the rollout's reward is NaN.

    Raises:
        MissingDependency: verifiers is not installed, or has no Rubric any more (from 0.4 on).
    """
    try:
        import verifiers as vf
    except ImportError as error:
        raise MissingDependency("a Rubric needs the package verifiers: pip install 'verifiers<0.4'") from error
    if not hasattr(vf, "Rubric"):
        raise MissingDependency(
            f"verifiers {vf.__version__} has no Rubric: install 'verifiers<0.4', or use "
            "guerdon.integrations.verifiers_task_reward in a Task of verifiers.v1"
        )

    class Rubric(vf.Rubric):  # type: ignore[misc, name-defined]
        """Raises what its functions could not."""

        async def score_rollout(self, state: Any) -> None:
            """Score one rollout."""
            await super().score_rollout(state)
            _check([state])

        async def score_group(self, states: list[Any]) -> None:
            """Score a group of rollouts."""
            await super().score_group(states)
            _check(states)

    if isinstance(rewards, Mapping):
        scorers, names, weights = [as_reward(r) for r in rewards.values()], list(rewards), [1.0] * len(rewards)
    else:
        scorers, weights = [as_reward(r) for r, _ in rewards], [float(w) for _, w in rewards]
        names = unique_names([function_name(s) for s in scorers])
    return Rubric(funcs=[_function(s, n) for s, n in zip(scorers, names, strict=True)], weights=weights)


def _check(states: Sequence[Any]) -> None:
    for state in states:
        for name, failure in state.get(_FAILURES, {}).items():
            if failure["fatal"]:
                raise RewardError(f"{name}: {failure['reason']}")


def verifiers_task_reward(reward: Any, *, reference: str = "answer", weight: float = 1.0) -> Any:
    """A reward of a ``verifiers.v1`` task.

    Args:
        reward: any reward.
        reference: field of the task's data that holds the reference.
        weight: of this reward among the task's.

    Returns:
        What to put into the class of the task::

            class MyTask(vf.Task[MyData]):
                correct = gd.integrations.verifiers_task_reward(reward)

        Only messages that the model sampled are the policy's; what else stands in the trace behind the prompt is not. Parts
        of the score are recorded as metrics ``name/part``.

    Raises:
        MissingDependency: verifiers is not installed, or is older than 0.3.
    """
    try:
        from verifiers.v1 import reward as mark
    except ImportError as error:
        raise MissingDependency("a task's reward needs verifiers.v1: pip install 'verifiers>=0.3'") from error
    scorer = as_reward(reward)
    label = function_name(scorer)

    async def score(self: Any, task: Any, trace: Any) -> float:
        trajectory = _of_trace(task, trace, reference)
        found = await asyncio.to_thread(score_one, scorer, trajectory)
        for part, value in found.parts.items():
            trace.record_metric(f"{label}/{part}", float(value))
        return float(found.value)

    score.__name__ = label
    return mark(score, weight=weight)


def _of_trace(task: Any, trace: Any, reference: str) -> Trajectory:
    branches = trace.branches
    nodes = branches[-1].nodes if branches else []
    first = next((k for k, node in enumerate(nodes) if node.sampled), len(nodes))
    said = [
        node.message if node.sampled else {"role": "environment", "content": getattr(node.message, "content", None)}
        for node in nodes[first:]
    ]
    prompt = [node.message for node in nodes[:first]] or task.prompt
    data = task.model_dump()
    meta = {key: value for key, value in data.items() if value is not None and key not in ("prompt", reference)}
    name = next((str(data[key]) for key in ("id", "name", "idx") if data.get(key) is not None), "task")
    return to_trajectory(prompt, said, data.get(reference), task_id=name, meta=meta)
