"""Word n-grams: repetition and copying, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from guerdon.errors import ConfigError
from guerdon.rewards.repetition import RepetitionRatio, copied_share, repeated_share, repetition_ratio, word_ngrams
from guerdon.types import StopReason, Task, Trajectory, Turn


def test_ngrams_keep_order_and_repeats():
    assert word_ngrams("a b  a\nb", 2) == [("a", "b"), ("b", "a"), ("a", "b")]
    assert word_ngrams("a b", 3) == [] and word_ngrams("", 1) == []


@pytest.mark.parametrize("n", [0, -1, 1.0, True])
def test_n_is_a_count(n):
    with pytest.raises(ConfigError, match="n must be an integer"):
        word_ngrams("a", n)
    with pytest.raises(ConfigError):
        RepetitionRatio(n)


def test_the_published_ratio_counts_each_repeated_ngram_once():
    # bigrams: ab ba ab bc cd: one distinct repeated of five
    assert repetition_ratio("a b a b c d", 2) == 1 / 5
    assert repetition_ratio("a a", 1) == 0.5
    assert repetition_ratio("a b c", 1) == 0.0
    assert repetition_ratio("a b", 3) == 0.0


def test_saying_it_very_often_lowers_the_published_ratio_but_not_the_share():
    little, much = "x y x y", "x y " * 50
    assert repetition_ratio(much, 2) < repetition_ratio(little, 2)
    assert repeated_share(much, 2) > repeated_share(little, 2)
    assert repeated_share("a b a b c d", 2) == pytest.approx(1 - 4 / 5)
    assert repeated_share("a", 2) == 0.0


def test_twenty_words_are_the_default_window():
    words = " ".join(map(str, range(20)))
    assert repetition_ratio(words) == 0.0
    assert repetition_ratio(f"{words} {words}") == 1 / 21


def test_copied_share_is_over_the_texts_own_ngrams():
    assert copied_share("name the letters now", "please name the letters", 2) == pytest.approx(2 / 3)
    assert copied_share("a b", "a b", 3) == 0.0
    assert copied_share("a b c", "", 2) == 0.0
    assert copied_share("a b a b", "a b", 2) == pytest.approx(2 / 3)


def test_as_a_reward_it_reads_what_the_policy_wrote():
    reward = RepetitionRatio(1)
    turns = (Turn("policy", "a b "), Turn("environment", "b b b "), Turn("policy", "a"))
    score = reward([Trajectory(Task("t", "a a a a"), turns, StopReason.DONE)])[0]
    assert score.value == 1 / 3
    out = reward(["a a", "a b"])
    assert isinstance(out, np.ndarray) and out.dtype == np.float64 and out.tolist() == [0.5, 0.0]
