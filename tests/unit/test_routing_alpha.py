"""The schedule of Router-R1's cost coefficient."""

import pytest

from guerdon.errors import ConfigError
from guerdon.rewards.base import Progress
from guerdon.routing.reward import router_reward
from guerdon.types import StopReason, Task, Trajectory, Turn


def answered(text: str, cost: float) -> Trajectory:
    turn = Turn("policy", f"<think> x </think><answer> {text} </answer>", (1,))
    return Trajectory(Task("t", "q", ["Lima"]), (turn,), StopReason.DONE, info={"raw_cost": cost, "members": ()})


def test_alpha_is_zero_then_rises_linearly_and_stays():
    reward = router_reward(alpha=0.6, alpha_after=3, alpha_ramp=2)
    found = [reward.alpha_at(Progress(step, 10)) for step in range(7)]
    assert found == pytest.approx([0.0, 0.0, 0.0, 0.3, 0.6, 0.6, 0.6])


def test_without_a_schedule_alpha_is_constant_in_and_outside_training():
    reward = router_reward(alpha=0.6)
    assert [reward.alpha_at(p) for p in (None, Progress(0, 5), Progress(4, 5))] == [0.6, 0.6, 0.6]


def test_a_step_down_without_a_ramp():
    reward = router_reward(alpha=0.6, alpha_after=2)
    assert [reward.alpha_at(Progress(s, 5)) for s in range(4)] == [0.0, 0.0, 0.6, 0.6]


def test_scores_follow_the_schedule():
    # Two right answers, one free and one dear: cost terms 1 and 0 (5th and 95th percentile of two values clip both).
    batch = [answered("Lima", 0.0), answered("Lima", 100.0)]
    before, after = (router_reward(alpha=0.6, alpha_after=5)(batch, progress=Progress(step, 10)) for step in (0, 9))
    assert [s.value for s in before] == [1.0, 1.0]
    # The window holds [0] when the first comes (0.5 where nothing differs), or both when scored together.
    assert after[0].value >= after[1].value
    assert after[1].value == pytest.approx(0.4 * 1.0 + 0.6 * after[1].parts["cost"])


@pytest.mark.parametrize("wrong", [{"alpha_after": -1}, {"alpha_ramp": -1}])
def test_a_negative_number_of_steps_is_refused(wrong):
    with pytest.raises(ConfigError, match="alpha_after and alpha_ramp"):
        router_reward(alpha=0.5, **wrong)
