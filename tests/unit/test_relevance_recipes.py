"""The recipes of the relevance and the reflection reward: verdicts on made-up rows, and their small parts."""

from __future__ import annotations

import numpy as np
import pytest

from guerdon.environments.topics import COPY, FACTS, MOST, REPEAT, STOP, make_questions, make_topics
from guerdon.papers import _sentences, dro_r3
from guerdon.papers import regularized_relevance_reward as relevance
from guerdon.types import StopReason, Trajectory, Turn


class Words:
    """A world whose encoder needs no weights: one dimension per sentence, and one for its topic's name."""

    def __init__(self) -> None:
        self.topics = make_topics(8)
        self.train, self.test = make_questions(self.topics, range(5)), make_questions(self.topics, range(5, 8))
        self.types = {q.text: q.type for q in (*self.train, *self.test)}
        self.starts: dict = {}

    def encode(self, texts):
        out = np.zeros((len(texts), 64))
        for row, text in zip(out, texts, strict=True):
            for word in text.replace("?", "").replace(".", "").split():
                row[sum(map(ord, word)) % 64] += 1.0
        return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-9)

    table = _sentences.World.table


@pytest.fixture(scope="module")
def world() -> Words:
    return Words()


def test_responses_are_what_the_actions_say(world) -> None:
    q = world.train[0]
    said = q.sentences(world.topics)
    assert _sentences.respond(q, world.topics, [FACTS.start, REPEAT, COPY, STOP, COPY]) == "\n".join(
        [said[1], said[1], q.text]
    )
    assert _sentences.respond(q, world.topics, [STOP]) == "" == _sentences.respond(q, world.topics, [REPEAT])
    closed = next(q for q in world.train if q.asked is not None)
    assert _sentences.references(closed, world) == (closed.reference,)


def test_the_start_imitates_and_a_seed_says_it_all(world) -> None:
    start, again = (_sentences.Chooser(world, 3, steps=40) for _ in range(2))
    rng = np.random.default_rng(0)
    actions, seen, taken = start.sample(world.train, rng)
    assert actions.shape == (10, MOST) and seen.shape == (10, MOST, STOP + 1, 21) and taken[:, 0].all()
    assert (actions[:, 0] != REPEAT).all()
    assert np.array_equal(again.sample(world.train, np.random.default_rng(0))[0], actions)
    logp = start.logprobs(seen, taken)
    assert logp.shape == (taken.sum(), STOP + 1)
    assert np.allclose(logp.exp().sum(1).detach().numpy(), 1, atol=1e-5)
    shown, *_ = start.demonstrate(world.train * 20, rng)
    facts = ((shown >= FACTS.start) & (shown < FACTS.stop)).mean()
    assert facts > 0.1


def test_rewards_of_all_arms_are_finite_and_none_sees_gold(world) -> None:
    size = {"calibrate": 2}
    texts = [_sentences.respond(q, world.topics, [COPY, FACTS.start]) for q in world.test]
    for arm in relevance.ARMS[1:]:
        values = relevance.reward_of(arm, world, 0, size)(world.test, texts)
        assert values.shape == (len(texts),) and np.isfinite(values).all()
    li = relevance.reward_of("LI", world, 0, size)(world.test, texts)
    rp = relevance.reward_of("r_x * LI", world, 0, size)(world.test, texts)
    r = relevance.reward_of("r_x", world, 0, size)(world.test, texts)
    assert rp == pytest.approx(r * li)


def test_verdicts_of_the_relevance_recipe() -> None:
    n = {"gold open": 6, "gold closed": 6, "copy": 12, "repeat": 12}

    def row(**values: float) -> dict:
        return {k: [values.get(k.replace(" ", "_"), 0.0)] * m for k, m in n.items()}

    rows = {
        "r_x": row(copy=1.0), "r_x * LI": row(copy=1.0, repeat=0.9), "r_x * LI * RP": row(gold_open=0.7, gold_closed=-0.1),
        "R3": row(gold_open=0.7, gold_closed=0.9),
    }  # fmt: skip
    results = {(arm, s): rows[arm] for arm in rows for s in (0, 1)}
    bench = {"encoder": [1.0] * 9, "preference model": [0.0] * 9}
    claims = relevance.judge(results, bench, (0, 1), asserted=True)
    assert all(c.holds for c in claims) and len(claims) == 7
    assert all(c.holds is None for c in relevance.judge(results, bench, (0, 1), asserted=False))
    worse = {**results, ("R3", 0): row(copy=1.0), ("R3", 1): row(copy=1.0)}
    assert [c.holds for c in relevance.judge(worse, bench, (0, 1), asserted=True)] == [True, False, True, False, False, True, True]  # fmt: skip


def test_verdicts_of_the_reflection_recipe() -> None:
    def row(right: float, gap: float = 1.0, rollouts: int = 100) -> dict:
        return {"right": [right] * 8, "gap": [gap] * 8, "ends": [1.0] * 8, "rollouts": rollouts}

    rows = {
        "base": row(0.3), "aggregate": row(0.4), "R3": row(0.8), "R3 without length": row(0.8, 6.0), "ROUGE-1": row(0.4),
        "correctness": row(0.85), "mixed pool": row(0.7), "mixed pool, filtered": row(0.69, 1.0, 70),
    }  # fmt: skip
    results = {(arm, 0): rows[arm] for arm in dro_r3.ARMS}
    table = {"R3": [0.9] * 20, "aggregate": [0.7] * 20}
    claims = dro_r3.judge(table, results, (0,), asserted=True)
    assert all(c.holds for c in claims), [c.name for c in claims if not c.holds]
    spent = {**results, ("mixed pool, filtered", 0): row(0.6, 1.0, 71)}
    assert [c.name for c in dro_r3.judge(table, spent, (0,), asserted=True) if not c.holds] == ["6-filter", "7-cheaper"]


def test_tasks_and_measures_of_the_reflection_recipe() -> None:
    from guerdon.policies import tiny_policy

    kinds = [t.meta["kind"] for t in dro_r3.mixed(20, 0)]
    assert {k: kinds.count(k) for k in set(kinds)} == {"learnable": 10, "easy": 5, "hard": 5}
    task = next(t for t in dro_r3.mixed(20, 0) if t.meta["kind"] == "learnable")
    texts = (f"<think>x</think>{task.reference}", f"<think>x</think>{task.reference} now", "<think>x", "</think> 3")
    stops = (StopReason.EOS, StopReason.EOS, StopReason.LENGTH, StopReason.LENGTH)
    group = [Trajectory(task, (Turn("policy", x),), stop) for x, stop in zip(texts, stops, strict=True)]
    policy = tiny_policy(hidden=16, heads=2, layers=1)
    found = dro_r3.rate(policy, group)
    assert found["right"] == [1.0, 1.0, 0.0, 0.0] and found["ends"] == [1.0, 1.0, 0.0, 0.0]
    assert found["gap"] == [0.0, float(len(policy.encode(f"{task.reference} now")) - len(policy.encode(task.reference))), 0.0, 0.0]  # fmt: skip
    rouge = dro_r3.reward_of("ROUGE-1", policy)(group[:1])[0].value
    assert rouge == 1.0 and dro_r3.reward_of("correctness", policy)(group[:1])[0].value == 1.0
