"""Solvers with wrong habits: which sums, how often, and that labels are the checker's."""

from __future__ import annotations

import numpy as np
import pytest

from guerdon.environments.arithmetic import Spec, check, make_tasks
from guerdon.environments.arithmetic.chains import apply
from guerdon.environments.arithmetic.habits import Habits, first_slip
from guerdon.errors import ConfigError
from guerdon.training.arithmetic import arithmetic_policy

SPEC = Spec(operations=(2, 4))


def test_a_habit_is_a_property_of_the_sum():
    habits = Habits(share=0.4)
    sums = [(v, s, n) for v in range(21) for s in "+-" for n in range(1, 10) if apply(v, s, n) >= 0]
    wrong = [habits.wrong(*x) for x in sums]
    assert wrong == [habits.wrong(*x) for x in sums]
    kept = [(w, apply(*x)) for w, x in zip(wrong, sums, strict=True) if w is not None]
    assert 0.3 < len(kept) / len(sums) < 0.5
    assert all(abs(w - right) == 1 and w >= 0 for w, right in kept)
    assert [Habits(seed=1).wrong(*x) for x in sums] != wrong
    assert all(Habits(share=0.0).wrong(*x) is None for x in sums)


def test_chance_and_labels():
    rng = np.random.default_rng(0)
    tasks = make_tasks(60, spec=SPEC)
    for task in tasks:
        right = Habits(chance=0.0).write(task, rng)
        assert all(right.labels) and check(task, right.text).right and first_slip(check(task, right.text)) is None
        script = Habits(share=1.0, chance=1.0).write(task, rng)
        assert not any(script.labels[:-1]) and check(task, script.text).labels == script.labels
        assert first_slip(check(task, script.text)) == 0
    with pytest.raises(ConfigError, match="share and chance"):
        Habits(share=1.5)


def test_a_true_line_off_the_chain_is_a_slip():
    report = check("5+2+3", "5+2=7\n7+4=11\nanswer 11")
    assert report.lines[1].correct and first_slip(report) == 1


def test_scripts_are_trajectories_with_labels():
    policy = arithmetic_policy(SPEC, hidden=16, heads=2, layers=1)
    tasks = make_tasks(5, spec=SPEC)
    made = Habits().scripts(policy, tasks)
    assert [t.task for t in made] == tasks
    for t in made:
        turn = t.turns[0]
        assert policy.decode(turn.token_ids) == turn.text + "<eos>" and turn.token_ends[-1] == len(turn.text)
        assert check(t.task, turn.text).labels == t.info["labels"]
    assert [t.turns for t in Habits().scripts(policy, tasks)] == [t.turns for t in made]
