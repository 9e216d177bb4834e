"""Health text in two styles: pairs carry the same facts, domains share half of their terms, the hidden gold by hand."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guerdon.environments.simplification import (
    ADVICE,
    CONDITIONS,
    FRAMES,
    NUMBERS,
    ORGANS,
    TERMS,
    TREATMENTS,
    Facts,
    Habits,
    complex_text,
    domain_terms,
    judge_rewriting,
    make_pairs,
    plain_text,
    rewriting_tasks,
    rough_rewriting,
    simplification_words,
    summary,
)
from guerdon.errors import ConfigError
from guerdon.rewards import PreservationGate

FACTS = Facts("hypertension", "biopsy", "liver", "5", "adequate repose is to be ensured", True, 0)


def test_two_domains_share_half_of_their_terms() -> None:
    a, b = set(domain_terms("A")), set(domain_terms("B"))
    assert len(TERMS) == 80 and len(set(TERMS.values())) == 80 and not set(TERMS) & set(TERMS.values())
    assert a | b == set(TERMS) and len(a & b) == 27 and abs(len(a) - len(b)) <= 1
    assert len(FRAMES) == 12
    with pytest.raises(ConfigError, match="'A' or 'B'"):
        domain_terms("C")  # type: ignore[arg-type]


def test_a_pair_by_hand() -> None:
    assert complex_text(FACTS) == (
        "The hypertension , which was identified in the liver , is not managed by biopsy over a period of 5 days , and "
        "adequate repose is to be ensured ."
    )
    assert plain_text(FACTS) == (
        "The doctor found that you have high blood pressure in your liver . It is not going to be treated with a tissue test "
        "in the next 5 days , and make sure that you are resting enough every day ."
    )
    short = complex_text(replace(FACTS, short=True))
    assert short == plain_text(FACTS).replace("high blood pressure", "hypertension").replace("a tissue test", "biopsy")


facts = st.builds(
    Facts, st.sampled_from(sorted(CONDITIONS)), st.sampled_from(sorted(TREATMENTS)), st.sampled_from(ORGANS),
    st.sampled_from(NUMBERS), st.sampled_from(sorted(ADVICE)), st.booleans(), st.integers(0, 11), st.booleans(),
)  # fmt: skip


@given(facts)
@settings(max_examples=200, deadline=None)
def test_a_simplification_keeps_every_fact_and_an_original_has_no_plain_term(one: Facts) -> None:
    assert judge_rewriting(plain_text(one), one).value == 1.0
    copied = judge_rewriting(complex_text(one), one)
    assert copied.parts == {"terms": 0.0, "facts": 1.0} and copied.value == 0.0
    assert PreservationGate()([complex_text(one)], [plain_text(one)])[0] == 1.0


def test_every_word_is_one_token_and_a_plain_term_too() -> None:
    from guerdon.policies import train_bpe

    words = simplification_words()
    tokenizer = train_bpe(("a",), 266 + len(words), words=words)
    for pair in make_pairs(60, "A"):
        for text, terms in ((pair.original, 0), (pair.simplified, 2)):
            tokens = len(tokenizer.encode(f" {text}", add_special_tokens=False))
            assert tokens <= len(text.split()) and (tokens < len(text.split())) <= bool(terms)


def test_no_fact_hides_in_a_term() -> None:
    said = {w for pair in TERMS.items() for text in pair for w in text.split()}
    assert not said & {*ORGANS, *NUMBERS, "not"}


@given(st.text(max_size=100), facts)
@settings(max_examples=60, deadline=None)
def test_any_text_can_be_judged(text: str, one: Facts) -> None:
    score = judge_rewriting(text, one)
    assert 0.0 <= score.value <= 1.0 and score.parts["terms"] == 0.0


@pytest.mark.parametrize(
    ("change", "terms", "kept"),
    [
        (("liver", "lung"), 1.0, 0.75),
        (("5", "6"), 1.0, 0.75),
        (("not ", ""), 1.0, 0.75),
        (("a tissue test", "biopsy"), 0.5, 1.0),
        (("a tissue test", "a blood test"), 0.5, 1.0),
        (("liver", "liver and lung"), 1.0, 0.75),
        (("make sure that you are resting enough every day", "try very hard to give up smoking altogether"), 1.0, 0.75),
        (("high blood pressure", "high blood pressure ( hypertension )"), 0.5, 1.0),
    ],
)
def test_what_is_altered_is_seen(change: tuple[str, str], terms: float, kept: float) -> None:
    score = judge_rewriting(plain_text(FACTS).replace(*change), FACTS)
    assert score.parts == {"terms": terms, "facts": kept}
    assert score.value == pytest.approx(2 * terms * kept / (terms + kept))


def test_pages_divide_the_splits() -> None:
    train, test = make_pairs(40, "A"), make_pairs(40, "A", split="test")
    assert not {p.page for p in train} & {p.page for p in test} and len({p.page for p in train}) == 5
    assert train == make_pairs(40, "A") and train != make_pairs(40, "A", seed=1)
    assert {p.facts.condition for p in make_pairs(300, "B")} <= set(domain_terms("B"))
    found = summary(make_pairs(400, "A"))
    assert found["pages"] == 50 and 0.7 < found["words of originals"] / found["words of simplifications"] < 1.1
    assert summary([])["pairs"] == 0


def test_tasks_show_the_original_and_no_reference_rewriting() -> None:
    pair = make_pairs(1, "B")[0]
    task = rewriting_tasks([pair])[0]
    assert task.question == f" {pair.original}" and task.reference == pair.original
    assert task.meta["source"] == pair.original and pair.simplified not in str(task)


def test_rough_rewritings_are_as_rough_as_told() -> None:
    rng = random.Random(0)
    perfect = Habits(copied=0, kept=0, wrong=0, dropped=0, chopped=0)
    pairs = make_pairs(300, "B")
    assert np.mean([judge_rewriting(rough_rewriting(p.facts, rng, perfect), p.facts).value for p in pairs]) == 1.0
    rough = [judge_rewriting(rough_rewriting(p.facts, rng), p.facts) for p in pairs]
    assert 0.15 < np.mean([s.parts["terms"] for s in rough]) < 0.45
    assert 0.7 < np.mean([s.parts["facts"] for s in rough]) < 0.97
    copied = Habits(copied=1)
    assert rough_rewriting(FACTS, rng, copied) == complex_text(FACTS)
