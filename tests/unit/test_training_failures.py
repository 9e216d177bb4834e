"""When a reward fails: counted by reward and reason, named with its task, handled as chosen. Never a silent number."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from guerdon.errors import BudgetExceeded, ConfigError, RewardError
from guerdon.policies import tiny_policy
from guerdon.rewards import Progress, Reward, Weighted, as_reward
from guerdon.rollout import TransformersEngine
from guerdon.training import OnlineConfig, OnlineTrainer
from guerdon.training.toys import SaidIt, Say, toy_tasks, toy_texts
from guerdon.types import Score, Span, StopReason, Task, Trajectory, Turn


def trajectory(k: int, length: int = 3) -> Trajectory:
    turn = Turn("policy", "abc"[:length], tuple(range(length)), logprobs=(0.0,) * length)
    return Trajectory(Task(f"task-{k}", "q"), (turn,), StopReason.DONE, prompt_ids=(1,))


BATCH = [trajectory(k) for k in range(4)]


class Fails(Reward):
    """Right for every task but one, for which it does what it is told."""

    def __init__(self, how, bad: int = 1, **options) -> None:
        super().__init__(**{"name": "fails", **options})
        self.how, self.bad = how, bad

    def score_one(self, one: Trajectory):
        if one.task.id != f"task-{self.bad}":
            return 1.0
        if isinstance(self.how, Exception):
            raise self.how
        return self.how() if callable(self.how) else self.how


class FailsAsBatch(Reward):
    def __init__(self, how, **options) -> None:
        super().__init__(**{"name": "batch", **options})
        self.how = how

    def score(self, trajectories: Sequence[Trajectory]):
        if isinstance(self.how, Exception):
            raise self.how
        return self.how


CASES = [
    (ValueError("boom"), "exception", "raised ValueError for task 'task-1': boom"),
    (KeyError("gold"), "exception", "raised KeyError"),
    (None, "none", "returned NoneType for task 'task-1'"),
    ("0.7", "type", "returned str for task 'task-1'"),
    ([1.0], "type", "returned list"),
    (math.nan, "non-finite", "non-finite value for task 'task-1'"),
    (math.inf, "non-finite", "non-finite"),
    (np.float32("nan"), "non-finite", "non-finite"),
    (torch.tensor(math.inf), "non-finite", "non-finite"),
    (Score(1.0, steps=(math.nan,), step_spans=(Span(0, 3),)), "non-finite", "non-finite"),
    (
        Score(1.0, steps=(1.0,), step_spans=(Span(0, 4),)),
        "span",
        "step 0 of task 'task-1' is [0, 4) of a response of 3 tokens",
    ),
    (Score(1.0, steps=(1.0,), step_spans=(Span(1, 1),)), "span", "at least one each"),
    (Score(1.0, steps=(1.0, 1.0), step_spans=(Span(0, 2), Span(1, 3))), "span", "without overlap"),
    (Score(1.0, tokens=(1.0,)), "span", "1 token values for the 3 response tokens"),
    (Score.invalid("the judge said nothing"), "invalid", "the judge said nothing"),
]


@pytest.mark.parametrize(("how", "reason", "words"), CASES)
def test_a_failure_is_named_counted_and_handled_as_chosen(how, reason: str, words: str) -> None:
    raising = Fails(how)
    with pytest.raises(RewardError) as caught:
        raising(BATCH)
    assert words in str(caught.value)
    assert raising.failures == {reason: 1} and raising.failure_counts() == {("fails", reason): 1}
    dropping = Fails(how, on_error="drop")
    scores = dropping(BATCH)
    assert [s.valid for s in scores] == [True, False, True, True] and words in scores[1].reason
    assert dropping.failures == {reason: 1}
    valued = Fails(how, on_error=-2.0)
    assert [s.value for s in valued(BATCH)] == [1.0, -2.0, 1.0, 1.0]
    assert valued(BATCH)[1].parts["fails/failed"] == 1.0 and valued.failures == {reason: 2}


def test_the_cause_of_an_exception_is_kept() -> None:
    with pytest.raises(RewardError) as caught:
        Fails(ValueError("boom"))(BATCH)
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize("number", [np.float32(0.5), torch.tensor(0.5), True, 1])
def test_numbers_of_other_libraries_are_numbers(number) -> None:
    assert Fails(number)(BATCH)[1].value == float(number)
    whole = FailsAsBatch(np.array([0.0, 1.0, 2.0, 3.0], dtype=np.float32))
    assert [s.value for s in whole(BATCH)] == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("how", "reason", "words"),
    [
        ("good", "type", "returned str, a sequence of scores is expected"),
        ({"a": 1}, "type", "returned dict"),
        (None, "type", "returned NoneType"),
        (3.0, "type", "returned float"),
        ([1.0], "length", "returned 1 scores for 4 trajectories"),
        (RuntimeError("server is down"), "exception", "raised RuntimeError for task 'task-0': server is down"),
    ],
)
def test_a_batch_that_fails_as_a_whole_loses_every_score_of_it(how, reason: str, words: str) -> None:
    with pytest.raises(RewardError) as caught:
        FailsAsBatch(how)(BATCH)
    assert words in str(caught.value)
    dropped = FailsAsBatch(how, on_error="drop")
    assert not any(s.valid for s in dropped(BATCH)) and dropped.failures == {reason: 4}


def test_set_up_mistakes_and_spent_money_are_no_failures_of_a_score() -> None:
    for error in (ConfigError("no such judge"), BudgetExceeded("cap reached")):
        for reward in (Fails(error, on_error="drop"), FailsAsBatch(error, on_error=0.0)):
            with pytest.raises(type(error)):
                reward(BATCH)


def test_on_error_timeout_and_workers_are_checked() -> None:
    for bad in ("ignore", math.nan, True):
        with pytest.raises(ConfigError, match="on_error must be"):
            Fails(1.0, on_error=bad)
    with pytest.raises(ConfigError, match="timeout must be"):
        Fails(1.0, timeout=0)
    with pytest.raises(ConfigError, match="workers must be"):
        Fails(1.0, workers=0)
    with pytest.raises(ConfigError, match="a callable on trajectories, got float"):
        as_reward(1.0)


# Sums -------------------------------------------------------------------------------------------------------------------


def test_several_failing_terms_are_each_counted_and_the_first_is_named() -> None:
    total = Fails(ValueError("a"), name="one") + 0.5 * Fails(None, bad=2, name="two") + Fails(1.0, name="three")
    with pytest.raises(RewardError, match=r"reward 'one' raised ValueError for task 'task-1'"):
        total(BATCH)
    assert total.failure_counts() == {("one", "exception"): 1, ("two", "none"): 1}
    scores, fatal = total.assess(BATCH)
    assert [s.valid for s in scores] == [True, False, False, True] and fatal == [False, True, True, False]
    assert scores[0].value == 2.5 and math.isnan(scores[1].parts["one"]) and scores[1].parts["two"] == 1.0


def test_a_sum_follows_the_term_that_failed() -> None:
    dropping = Fails(None, on_error="drop", name="soft")
    assert [s.valid for s in (dropping + Fails(1.0))(BATCH)] == [True, False, True, True]
    with pytest.raises(RewardError, match="'hard'"):
        (dropping + Fails(None, bad=2, name="hard"))(BATCH)
    both = Weighted([(Fails(None, name="hard"), 1.0)], on_error="drop")
    assert [s.valid for s in both(BATCH)] == [True, False, True, True]
    assert [s.value for s in Weighted([(Fails(None), 2.0)], on_error=-1.0)(BATCH)] == [2.0, -1.0, 2.0, 2.0]
    assert (Fails(None, on_error=0.25) * 4)(BATCH)[1].value == 1.0


def test_terms_that_disagree_about_steps_are_a_failure() -> None:
    one = Fails(Score(0.0, steps=(1.0,), step_spans=(Span(0, 3),)), bad=0)
    two = Fails(Score(0.0, steps=(1.0, 2.0), step_spans=(Span(0, 1), Span(1, 3))), bad=0)
    with pytest.raises(RewardError, match="disagree about the steps"):
        (one + two)(BATCH[:1])
    assert (one + 2 * one)(BATCH[:1])[0].steps == (3.0,)


# Waiting ----------------------------------------------------------------------------------------------------------------


def test_a_blocking_score_times_out_alone() -> None:
    reward = Fails(lambda: time.sleep(5) or 1.0, on_error="drop", timeout=0.1)
    start = time.perf_counter()
    scores = reward(BATCH)
    assert time.perf_counter() - start < 2
    assert [s.valid for s in scores] == [True, False, True, True] and reward.failures == {"timeout": 1}
    assert "timed out for task 'task-1': no score within 0.1 s" in scores[1].reason
    with pytest.raises(RewardError, match="timed out"):
        Fails(lambda: time.sleep(5), timeout=0.1)(BATCH)


def test_a_batch_times_out_as_a_whole_and_own_timeouts_are_exceptions() -> None:
    class Slow(Reward):
        def score(self, trajectories):
            time.sleep(5)

    slow = Slow(timeout=0.1, on_error="drop")
    assert not any(s.valid for s in slow(BATCH)) and slow.failures == {"timeout": 4}
    own = Fails(TimeoutError("server"), timeout=5.0, on_error="drop")
    own(BATCH)
    assert own.failures == {"exception": 1}


def test_coroutines_run_together_and_time_out_alone() -> None:
    class Remote(Reward):
        async def score_one(self, one: Trajectory) -> float:
            await asyncio.sleep(5 if one.task.id == "task-2" else 0.2)
            return 1.0

    reward = Remote(timeout=0.5, on_error="drop")
    start = time.perf_counter()
    scores = reward(BATCH)
    assert time.perf_counter() - start < 1.5
    assert [s.valid for s in scores] == [True, True, False, True]

    async def inside() -> list[Score]:
        return Remote(on_error="drop")(BATCH[:1])  # a notebook's loop is already running

    assert asyncio.run(inside())[0].value == 1.0


def test_a_session_outlives_a_call() -> None:
    class Session(Reward):
        loop = None

        async def score(self, trajectories):
            loop = asyncio.get_running_loop()
            assert self.loop in (None, loop)
            self.loop = loop
            return [0.0] * len(trajectories)

    reward = Session()
    assert [s.value for s in reward(BATCH)] == [s.value for s in reward(BATCH)]


def test_a_coroutine_may_call_another_reward_as_a_plain_function() -> None:
    class Inner(Reward):
        async def score_one(self, one: Trajectory) -> float:
            await asyncio.sleep(0.01)
            return 0.5

    class Outer(Reward):
        async def score(self, trajectories):
            await asyncio.sleep(0.01)
            return [2 * s.value for s in Inner(timeout=5.0)(trajectories)]

    assert [s.value for s in Outer(timeout=5.0)(BATCH)] == [1.0] * 4


def test_workers_score_blocking_calls_at_once() -> None:
    seen = set()

    def work() -> float:
        seen.add(threading.get_ident())
        time.sleep(0.2)
        return 1.0

    class Blocking(Reward):
        def score_one(self, one: Trajectory) -> float:
            return work()

    start = time.perf_counter()
    assert len(Blocking(workers=4)(BATCH)) == 4
    assert time.perf_counter() - start < 0.6 and len(seen) == 4


# In training ------------------------------------------------------------------------------------------------------------


def trainer(reward, **settings) -> OnlineTrainer:
    policy = tiny_policy(texts=toy_texts(), hidden=32, layers=1, heads=2, seed=0)
    config = OnlineConfig(
        **{"steps": 2, "prompts_per_step": 2, "group_size": 4, "max_tokens": 2, "optimiser": {"lr": 1e-3}, **settings}
    )
    return OnlineTrainer(policy, TransformersEngine(policy, max_slots=16), Say(), toy_tasks(4), reward, config)


class Sometimes(Reward):
    """Fails on every fourth trajectory; the others count up, so that groups have variance."""

    def __init__(self, how=None, **options) -> None:
        super().__init__(**{"name": "sometimes", **options})
        self.how = how

    def score(self, trajectories):
        return [self.how if k % 4 == 1 else float(k % 4) for k in range(len(trajectories))]


def test_raise_stops_before_any_weight_moves() -> None:
    run = trainer(Sometimes())
    before = [p.clone() for p in run.policy.model.parameters()]
    with pytest.raises(
        RewardError, match=r"step 1: 2 of 8 trajectories .* 'sometimes' returned NoneType for task 'say-"
    ):
        run.fit()
    assert all(torch.equal(a, b) for a, b in zip(before, run.policy.model.parameters(), strict=True))


@pytest.mark.parametrize("where", ["reward", "config"])
def test_drop_takes_the_trajectory_out_of_loss_and_statistics(where: str) -> None:
    reward = Sometimes(on_error="drop" if where == "reward" else "raise")
    run = trainer(reward, **({"on_reward_error": "drop"} if where == "config" else {}))
    row, detail = run.train_step()
    assert row["reward/failed/sometimes/none"] == 2 and row["reward/invalid"] == 2 and row["trajectories/kept"] == 6
    assert detail.failures == {("sometimes", "none"): 2}
    experience, streams = detail.experience, detail.streams
    values = np.array([0.0, 2.0, 3.0])
    want = (values - values.mean()) / values.std(ddof=1)
    got = [float(streams.advantage[experience.offsets[b]]) for b in (0, 2, 3)]
    assert got == pytest.approx(want.tolist(), rel=1e-4)
    lost = slice(int(experience.offsets[1]), int(experience.offsets[2]))
    assert not streams.policy[lost].any() and not experience.action[lost].any()


def test_a_value_stands_for_the_score() -> None:
    row, detail = trainer(Sometimes(), on_reward_error=-1.0).train_step()
    assert row["trajectories/kept"] == 8 and row["reward/failed/sometimes/none"] == 2 and row["reward/failed"] == 1.0
    assert [s.value for s in detail.scores[:4]] == [0.0, -1.0, 2.0, 3.0]
    # A reward that says what its own failure is worth is not overruled.
    row, detail = trainer(Sometimes(on_error="drop"), on_reward_error=-1.0).train_step()
    assert row["trajectories/kept"] == 6


def test_a_plain_function_may_time_out() -> None:
    def slow(trajectories):
        time.sleep(5)

    row, _ = trainer(slow, on_reward_error="drop", reward_timeout=0.1).train_step()
    assert row["reward/failed/slow/timeout"] == 8 and row["trajectories/kept"] == 0 and row["update/steps"] == 0


def test_a_failing_shape_is_named_and_invalid_scores_stay_invalid() -> None:
    def broken(trajectories, scores):
        raise ZeroDivisionError("by nothing")

    run = trainer(SaidIt(0.5))
    run._scorer.shape = broken
    with pytest.raises(RewardError, match=r"'broken' raised ZeroDivisionError for task 'say-\d': by nothing"):
        run.fit()

    def generous(trajectories, scores):
        return [Score(5.0) for _ in scores]

    run = trainer(Sometimes(on_error="drop"))
    run._scorer.shape = generous
    assert run.train_step()[0]["reward/invalid"] == 2


def test_rewards_and_shapes_may_read_the_progress() -> None:
    seen: list[tuple[str, int, int]] = []

    class Curriculum(Reward):
        def score_one(self, one: Trajectory, progress: Progress | None = None) -> float:
            if progress is not None:
                seen.append(("reward", progress.step, progress.total))
            return float(one.task.id == "say-0")

    def shape(trajectories, scores, progress):
        seen.append(("shape", progress.step, progress.total))
        return scores

    run = trainer(Curriculum() + 0.0 * SaidIt2(), no_signal_steps=None)
    run._scorer = type(run._scorer)(run.reward, shape)
    run.fit()
    assert {x for x in seen if x[0] == "reward"} == {("reward", 0, 2), ("reward", 1, 2)}
    assert [x for x in seen if x[0] == "shape"] == [("shape", 0, 2), ("shape", 1, 2)]
    assert [Progress(k, 3).fraction for k in range(4)] == [0.0, 0.5, 1.0, 1.0]
    assert Curriculum().text(completion="x").value == 0.0  # outside training there is no progress


class SaidIt2(Reward):
    def score_one(self, one: Trajectory) -> float:
        return 1.0


def test_the_overlong_shape_is_a_curriculum_of_lengths() -> None:
    from guerdon.training.shapes import Overlong

    shape = Overlong(max_len=10, buffer=4, weight=2.0, final_max_len=20)
    assert [shape.limit(Progress(k, 3)) for k in range(3)] == [10.0, 15.0, 20.0]
    scores = [Score(1.0), Score.invalid("x")]
    out = shape([trajectory(0, 3), trajectory(1, 3)], scores, Progress(0, 3))
    assert out[0].value == 1.0 and out[0].parts["overlong"] == 0.0 and not out[1].valid
    long = Trajectory(Task("t", "q"), (Turn("policy", "x" * 8, (1,) * 8, (0.0,) * 8),), StopReason.DONE)
    assert shape([long], [Score(1.0)], Progress(0, 3))[0].value == 1.0 - 2.0 * 0.5
    assert shape([long], [Score(1.0)], Progress(2, 3))[0].value == 1.0
