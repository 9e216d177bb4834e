"""Best-of-n, weighted votes, and the threshold of a first error: by hand, with ties and refusals."""

from __future__ import annotations

import math

import pytest
import torch

from guerdon.errors import ConfigError, DataError
from guerdon.policies import tiny_policy, train_bpe
from guerdon.reward_models import ImplicitPRM, first_error, fit_threshold, pick_best, process_f1, weighted_vote


def test_the_best_of_each_group():
    scores = torch.tensor([0.1, 0.9, 0.9, -1.0, -2.0])
    assert pick_best(scores, torch.tensor([4, 4, 4, 1, 1])).tolist() == [3, 1]
    assert pick_best(1e-3 * scores, torch.tensor([4, 4, 4, 1, 1])).tolist() == [3, 1]  # scale never matters
    assert pick_best(torch.zeros(0), torch.zeros(0)).tolist() == []
    with pytest.raises(DataError, match="not finite"):
        pick_best(torch.tensor([math.nan]), torch.tensor([0]))
    with pytest.raises(DataError, match=r"one \[B\] each"):
        pick_best(scores, torch.zeros(2))


def test_the_weighted_vote():
    assert weighted_vote([2.0, -3.0, -3.0], ["7", "8", "8"]) == "7"
    assert weighted_vote([0.1, 0.0, 0.0], ["7", "8", "8"]) == "8"  # here the scale matters
    assert weighted_vote([5.0, 0.0], [None, "8"]) == "8"
    assert weighted_vote([0.0, 0.0], ["a", "b"]) == "a"
    assert weighted_vote([1.0], [None]) is None and weighted_vote([], []) is None
    with pytest.raises(DataError, match="1 scores for 2"):
        weighted_vote([1.0], ["a", "b"])
    with pytest.raises(DataError, match="nan"):
        weighted_vote([math.nan], ["a"])


def test_first_error_and_f1():
    assert first_error([0.9, 0.4, 0.1], 0.5) == 1
    assert first_error([0.5, 0.5], 0.5) == -1 and first_error([], 0.5) == -1
    # Half of the errors found exactly, two of three right responses left alone.
    assert process_f1([0, 2, -1, 1, -1], [0, 1, -1, -1, -1]) == pytest.approx(2 * 0.5 * (2 / 3) / (0.5 + 2 / 3))
    assert process_f1([1, 0], [0, -1]) == 0.0 and math.isnan(process_f1([0], [0]))
    with pytest.raises(DataError):
        process_f1([0], [0, 1])


def test_the_threshold_is_chosen_on_a_grid():
    values = [[0.9, 0.3], [0.9, 0.8], [0.35]]
    assert fit_threshold(values, [1, -1, -1], [0.1, 0.32, 0.34, 0.5]) == (0.32, 1.0)
    threshold, f1 = fit_threshold(values, [1, -1, -1])
    assert 0.3 < threshold <= 0.35 and f1 == 1.0
    with pytest.raises(DataError, match="responses with an error and responses without"):
        fit_threshold(values, [1, 1, 0])
    with pytest.raises(DataError, match="3 responses for 1 labels"):
        fit_threshold(values, [1])
    with pytest.raises(ConfigError, match="grid"):
        fit_threshold(values, [1, -1, -1], [])


def test_the_model_says_where_the_first_error_is():
    words = train_bpe(["one two three"] * 3, 270, atoms=())
    make = lambda seed: tiny_policy(words, hidden=16, layers=1, heads=2, seed=seed)  # noqa: E731
    prm = ImplicitPRM(make(0), make(1), None, beta=0.5)
    steps = [["one two", "three", "one"], ["two"]]
    rows = [torch.sigmoid(q).tolist() for q in prm.step_rewards(["go", "go"], steps, "cumulative")]
    middle = sorted(rows[0])[1]
    want = [next((k for k, v in enumerate(row) if v < middle), -1) for row in rows]
    assert prm.first_errors(["go", "go"], steps, middle) == want
    assert prm.first_errors(["go"], steps[:1], 0.0) == [-1] and prm.first_errors(["go"], [[]]) == [-1]
