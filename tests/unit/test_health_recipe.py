"""The recipe of health text simplification: its encoder by hand, its rewards, and that its claims can be won and lost."""

from __future__ import annotations

import numpy as np
import pytest

from guerdon.environments.simplification import make_pairs, rewriting_tasks
from guerdon.papers import health_text_simplification as recipe
from guerdon.types import StopReason, Trajectory, Turn

pytest.importorskip("pyphen", reason="syllables need pyphen")

VECTORS = {"liver": [1.0, 0.0], "organ": [0.0, 1.0]}


def encode(texts):
    return np.array([VECTORS.get(t, [1.0, 1.0]) for t in texts])


def test_words_are_weighted_by_their_rarity() -> None:
    seen: list[str] = []

    def counting(texts):
        seen.extend(texts)
        return encode(texts)

    vectors = recipe.WordVectors(counting, ["the liver", "the organ", "the liver"])
    rows = vectors(["the liver organ", "The Liver", "", "liver organ"])
    a, b = np.log(4 / 3), np.log(4 / 2)  # 'the' is in all three texts and weighs nothing
    assert rows[0] == pytest.approx(np.array([a, b]) / np.hypot(a, b))
    assert rows[1] == pytest.approx([1.0, 0.0]) and rows[2].tolist() == [0.0, 0.0] and rows[3] == pytest.approx(rows[0])
    vectors(["liver"])
    assert sorted(seen) == ["liver", "organ", "the"]
    squared = recipe.WordVectors(encode, ["the liver", "the organ", "the liver"], power=2.0)(["liver organ"])[0]
    assert squared == pytest.approx(np.array([a**2, b**2]) / np.hypot(a**2, b**2))


def test_what_is_measured_of_a_rewriting() -> None:
    pair = make_pairs(1, "B")[0]
    task = rewriting_tasks([pair])[0]
    outputs = (pair.simplified, pair.original, "")
    made = [Trajectory(task, (Turn("policy", f" {o}"),), StopReason.EOS) for o in outputs]
    row = recipe.rate(made, {pair.id: pair})
    assert row["gold"] == [1.0, 0.0, 0.0] and row["copied"] == [0.0, 1.0, 0.0] and row["deleted"][1:] == [0.0, 1.0]
    assert row["sari"][0] == pytest.approx(100.0) and row["sari"][1] < 60 and row["wordless"] == [0.0, 0.0, 1.0]
    assert row["fkgl"][2] == pytest.approx(recipe.EASIEST) and row["fkgl"][0] < row["fkgl"][1]


def results(values: dict[str, dict[str, float]]) -> dict:
    items = np.random.default_rng(0).normal(0, 0.01, 20)
    start = {"gold": 0.5, "facts": 0.9, "sari": 50.0, "fkgl": 7.0}
    return {
        (arm, seed): {k: ({**start, **values.get(arm, {})}[k] + items).tolist() for k in start}
        for arm in recipe.ARMS
        for seed in (0, 1)
    }


def test_claims_hold_where_they_should_and_fail_where_not() -> None:
    good = {
        "discriminator, guarded": {"gold": 0.8, "facts": 0.98, "sari": 60.0},
        "FKGL": {"fkgl": 3.0, "facts": 0.5},
        "discriminator": {"facts": 0.7},
    }
    right = {seed: {"auc": 0.99, "auc_length_matched": 0.95} for seed in (0, 1)}
    claims = recipe.judge(results(good), right, (0, 1), asserted=True)
    assert len(claims) == 8 and all(c.holds for c in claims), [c.name for c in claims if not c.holds]
    poor = {seed: {"auc": 0.85, "auc_length_matched": 0.7} for seed in (0, 1)}
    assert not any(c.holds for c in recipe.judge(results({}), poor, (0, 1), asserted=True))
    assert all(c.holds is None for c in recipe.judge(results({}), poor, (0, 1), asserted=False))
    # the reading grade must end below every other arm, not only below ours
    lower = {**good, "FKGL, words, relevance": {"fkgl": 2.0}}
    assert [c.name for c in recipe.judge(results(lower), right, (0, 1), asserted=True) if not c.holds] == [
        "4-lowest-grade"
    ]
