"""The recipe of Mixed-R1: which arm sees which samples and is paid how, and that its claims can be won and lost."""

from __future__ import annotations

import numpy as np
import pytest

from guerdon.environments.mixed_tasks import TYPES, mixed_tasks
from guerdon.papers import mixed_r1
from guerdon.types import StopReason, Task, Trajectory, Turn


def wrap(answer: str) -> str:
    return f"<think> t</think><answer> {answer}</answer>"


def test_a_specialist_sees_its_type_and_the_mixed_arms_all() -> None:
    everything = mixed_r1.pool("smoke", "mixed", 0)
    assert {t.meta["type"] for t in everything} == set(TYPES)
    for arm in ("matching", "chart", "iou", "open", *mixed_r1.CAPTIONS):
        kind = arm.split(",")[0]
        ours = [t.id for t in mixed_r1.pool("smoke", arm, 0)]
        assert ours == [t.id for t in everything if t.meta["type"] == kind]
    assert [t.id for t in mixed_r1.pool("smoke", "mixed, exact match", 0)] == [t.id for t in everything]


def test_rewards_of_the_compared_arms() -> None:
    same, rouge = mixed_r1.Same(), mixed_r1.RougeL()
    assert same([wrap("1 2 3 4"), wrap("1 2 3 5"), wrap("Yes")], [[1, 2, 3, 4], [1, 2, 3, 4], "yes"]).tolist() == [
        1,
        0,
        1,
    ]
    assert rouge([wrap("a b c"), wrap("a c")], ["a b d", "x"]).tolist() == pytest.approx([2 / 3, 0.0])


def test_what_is_measured_of_a_caption_is_its_triples() -> None:
    from guerdon.rewards import RoutedReward

    task = next(t for t in mixed_tasks(8) if t.meta["type"] == "open")
    said = [Trajectory(task, (Turn("policy", wrap(text)),), StopReason.EOS) for text in (task.reference, "a red")]
    routed = RoutedReward({"open": mixed_r1.RougeL()})
    assert mixed_r1.rate(said, routed)["gold"] == [1.0, 0.0]


def test_every_step_is_watched_by_source() -> None:
    class Detail:
        trajectories = [
            Trajectory(Task(str(k // 2), "q", "a", {"type": "chart"}), (Turn("policy", "x"),), StopReason.EOS)
            for k in range(4)
        ]
        scores = mixed_r1.Same(tag=None)(trajectories)

    watch = mixed_r1.BySource()
    watch.on_step(None, {}, Detail)
    assert watch.rows == [{"chart": {"mean": 0.0, "zero_variance": 1.0, "prompts": 2.0, "invalid": 0.0}}]


def results(values: dict[str, float], lengths: dict[str, float]) -> dict:
    rng = np.random.default_rng(0)
    items = rng.normal(0, 0.02, 20)
    return {
        (arm, seed): {
            kind: {"gold": (values.get(f"{arm}/{kind}", values.get(arm, 0.3)) + items).tolist(), "length": (lengths.get(arm, 20.0) + items).tolist()}
            for kind in TYPES
        }
        for arm in mixed_r1.ARMS
        for seed in (0, 1)
    }  # fmt: skip


def test_claims_hold_where_they_should_and_fail_where_not() -> None:
    good = {"mixed": 0.8, "mixed, filtered": 0.85, "open/open": 0.8}
    good |= {f"{k}/{k}": 0.8 for k in TYPES}
    lengths = {"open, Q only": 60.0, "open": 30.0, "open, P only": 12.0}
    claims = mixed_r1.judge(results(good, lengths), (0, 1), asserted=True)
    assert len(claims) == 15 and all(c.holds for c in claims), [c.name for c in claims if not c.holds]
    claims = mixed_r1.judge(results({}, {}), (0, 1), asserted=True)
    assert {c.name for c in claims if c.holds} == {f"2-own-{k}" for k in TYPES}
    assert all(c.holds is None for c in mixed_r1.judge(results({}, {}), (0, 1), asserted=False))
