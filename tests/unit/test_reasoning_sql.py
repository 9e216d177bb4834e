"""The recipe of Reasoning-SQL: which terms an arm has, what is measured, and how verdicts follow from measurements."""

from __future__ import annotations

import numpy as np
import pytest

from guerdon.papers import load
from guerdon.papers import reasoning_sql as recipe
from guerdon.rewards import SQLExecutor

pytest.importorskip("sqlglot", reason="SQL rewards need sqlglot")

WEIGHTS = {"execution": 3.0, "judge": 2.0, "syntax": 1.0, "schema": 1.0, "ngram": 1.0, "format": 1.0}


@pytest.mark.parametrize("arm", recipe.TERMS)
def test_an_arm_has_its_terms_with_the_published_weights(arm: str) -> None:
    terms = recipe.reward_of(arm, SQLExecutor()).terms
    assert {key: weight for key, (_, weight) in terms.items()} == {key: WEIGHTS[key] for key in recipe.TERMS[arm]}


def test_arms_are_measured_on_rows_that_no_reward_has_seen() -> None:
    bed = recipe.testbed("smoke")
    tasks = bed.tasks("test", 4)
    for before, after in zip(tasks, recipe.on_second_fill(tasks), strict=True):
        assert after.reference["db"] == before.reference["fresh"] != before.reference["db"]
        assert after.prompt == before.prompt and after.reference["sql"] == before.reference["sql"]


def results(gap: float, ngram: float) -> dict[tuple[str, int], dict]:
    """Rows in which "all" is ahead by ``gap`` and the arm without execution copies at ``ngram``."""
    rng = np.random.default_rng(0)
    out = {}
    for seed in (0, 1):
        for arm in recipe.CORE:
            level = 0.5 + gap * (arm == "all")
            copied = ngram if arm == "all without ex" else 0.6
            items = (level + rng.normal(0, 0.02, 50)).tolist()
            split = {"execution": items, "ngram": (copied + rng.normal(0, 0.02, 50)).tolist()}
            out[arm, seed] = {
                "test": split,
                "unseen": split,
                "curve": [{"execution": items}] * 3,
                "zero_variance": [0.5 - gap * (arm == "all")] * 40,
                "seconds": 1.0,
            }
    return out


def test_verdicts_follow_the_direction_of_the_difference() -> None:
    names = ["1a-all-beats-ex", "1b-all-learns-faster", "2-fewer-flat-groups", "3-beats-sft-unseen", "4a-proxies-copy",
             "4b-proxies-hack"]  # fmt: skip
    good = recipe.judge(results(0.2, 0.8), [0, 1], asserted=True)
    assert [c.name for c in good] == names and all(c.holds for c in good)
    bad = recipe.judge(results(-0.2, 0.4), [0, 1], asserted=True)
    assert not any(c.holds for c in bad)
    assert all(c.holds is None for c in recipe.judge(results(0.2, 0.8), [0, 1], asserted=False))


def test_it_is_found_by_its_slug_and_its_parts_can_be_imported() -> None:
    import importlib

    found = load("reasoning-sql")
    assert found.slug == "reasoning-sql" and len(found.claims) == 4
    for part in found.parts:
        module, _, name = part.rpartition(".")
        assert getattr(importlib.import_module(module), name) is not None
