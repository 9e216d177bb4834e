"""Rewards inside verifiers, for real: a Rubric that scores rollouts, and a task of verifiers.v1."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest

import guerdon as gd
from guerdon.errors import MissingDependency, RewardError

vf = pytest.importorskip("verifiers", reason="verifiers is not installed: pip install 'guerdon[integrations]'")

pytestmark = pytest.mark.integration

GOOD = "<think>x</think><answer>Lima</answer>"
rubrics = pytest.mark.skipif(not hasattr(vf, "Rubric"), reason="this verifiers has no Rubric (from 0.4 on)")


def state(completion: Any, answer: Any = "Lima", **more: Any) -> Any:
    """A rollout as an environment leaves it to its rubric."""
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    made = {
        "prompt": [{"role": "user", "content": "Capital of Peru?"}], "completion": completion, "answer": answer,
        "info": {}, "task": "default", "trajectory": [], "timing": {"scoring_ms": 0.0, "total_ms": 0.0}, **more,
    }  # fmt: skip
    return vf.State(made)


def reward() -> Any:
    return gd.rewards.ExactMatch() + 0.2 * gd.rewards.TagFormat("think", "answer")


@rubrics
def test_a_rubric_scores_a_rollout() -> None:
    rubric = gd.integrations.verifiers_rubric([(reward(), 1.0), (gd.rewards.TokenF1(), 0.5)])
    assert isinstance(rubric, vf.Rubric)
    one = state(GOOD)
    asyncio.run(rubric.score_rollout(one))
    assert one["reward"] == pytest.approx(1.2 + 0.5) and one["metrics"] == {
        "ExactMatch___TagFormat": 1.2,
        "TokenF1": 1.0,
    }
    group = [state(GOOD), state("no")]
    asyncio.run(rubric.score_group(group))
    assert [s["reward"] for s in group] == [pytest.approx(1.7), 0.0]
    assert [s["advantage"] for s in group] == [pytest.approx(0.85), pytest.approx(-0.85)]


@rubrics
def test_tool_messages_of_a_rollout_are_no_answer() -> None:
    rubric = gd.integrations.verifiers_rubric({"exact": gd.rewards.ExactMatch()})
    turns = [
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {}}]},
        {"role": "tool", "tool_call_id": "1", "content": "<answer>Lima</answer>"},
        {"role": "assistant", "content": "I do not know."},
    ]
    one = state(turns)
    asyncio.run(rubric.score_rollout(one))
    assert one["reward"] == 0.0 and one["metrics"] == {"exact": 0.0}


@rubrics
def test_a_plain_rubric_never_shows_a_failure_as_zero() -> None:
    """An exception of a function would become 0.0 there, so the function gives NaN and a reason."""
    for on_error in ("raise", "drop"):
        function = gd.integrations.verifiers(gd.rewards.ExactMatch(on_error=on_error))
        one = state(GOOD, None)
        asyncio.run(vf.Rubric(funcs=[function]).score_rollout(one))
        assert math.isnan(one["reward"]) and "NoneType" in one["guerdon_failures"]["ExactMatch"]["reason"]


@rubrics
def test_our_rubric_raises_where_the_reward_says_so() -> None:
    raising = gd.integrations.verifiers_rubric([(gd.rewards.ExactMatch(), 1.0)])
    with pytest.raises(RewardError, match=r"ExactMatch: .*NoneType"):
        asyncio.run(raising.score_rollout(state(GOOD, None)))
    with pytest.raises(RewardError, match="NoneType"):
        asyncio.run(raising.score_group([state(GOOD), state(GOOD, None)]))
    dropping = gd.integrations.verifiers_rubric([(gd.rewards.ExactMatch(on_error="drop"), 1.0)])
    one = state(GOOD, None)
    asyncio.run(dropping.score_rollout(one))
    assert math.isnan(one["reward"])


@rubrics
def test_an_environment_scores_its_rollouts_with_it() -> None:
    """The whole way: an environment, a fake model, a rollout, the rubric."""
    pytest.importorskip("datasets")
    from datasets import Dataset

    rubric = gd.integrations.verifiers_rubric([(reward(), 1.0)])
    env = vf.SingleTurnEnv(
        dataset=Dataset.from_list([{"question": "Capital of Peru?", "answer": "Lima"}]), rubric=rubric
    )
    assert env.rubric is not None
    funcs = [f.__name__ for f in rubric.funcs]
    assert funcs == ["ExactMatch___TagFormat"]


@pytest.mark.skipif(hasattr(vf, "Rubric"), reason="this verifiers has a Rubric")
def test_without_a_rubric_the_error_says_what_to_do() -> None:
    with pytest.raises(MissingDependency, match=r"verifiers<0.4"):
        gd.integrations.verifiers_rubric([(reward(), 1.0)])


def test_a_task_of_v1_records_reward_and_parts() -> None:
    v1 = pytest.importorskip("verifiers.v1", reason="this verifiers has no v1")
    from verifiers.v1.graph import MessageNode
    from verifiers.v1.trace import AgentInfo, TraceTask

    class Data(v1.TaskData):
        answer: str | None = None

    class Capital(v1.Task[Data]):
        correct = gd.integrations.verifiers_task_reward(reward(), weight=2.0)

    def trace(data: Any, *said: tuple[str, bool]) -> Any:
        nodes = [MessageNode(message=v1.UserMessage(content="Capital of Peru?"))]
        for k, (text, sampled) in enumerate(said):
            nodes.append(MessageNode(parent=k, message=v1.AssistantMessage(content=text), sampled=sampled))
        return v1.Trace(
            task=TraceTask(type="Capital", data=data), agent=AgentInfo.model_construct(config=None), nodes=nodes
        )

    task = Capital(Data(prompt="Capital of Peru?", answer="Lima"))
    good = trace(task.data, (GOOD, True))
    asyncio.run(task.score(good))
    assert good.rewards["ExactMatch___TagFormat"].score == pytest.approx(1.2)
    assert good.reward == pytest.approx(2.4) and good.metrics["ExactMatch___TagFormat/TagFormat"] == 1.0
    # what the model did not sample is not its answer, whatever its role
    planted = trace(task.data, ("no", True), (GOOD, False))
    asyncio.run(task.score(planted))
    assert planted.reward == 0.0
    failing = Capital(Data(prompt="q"))
    with pytest.raises(v1.TaskError, match="NoneType"):
        asyncio.run(failing.score(trace(failing.data, (GOOD, True))))
