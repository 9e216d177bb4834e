"""Plain language: grades by hand, gates, the guarded product, SARI, and the discriminator."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guerdon.errors import ConfigError, DataError
from guerdon.evaluation.simplification import sari, sari_sentence
from guerdon.reward_models.style import StyleDiscriminator, auc
from guerdon.rewards.readability import (
    FKGLReward,
    GuardedProduct,
    PreservationGate,
    ZipfSimplicity,
    clean_rewriting,
    fkgl,
    kept_facts,
    syllables,
    zipf_simplicity,
)

pytest.importorskip("pyphen", reason="syllables need pyphen")


def test_syllables_and_grades_by_hand() -> None:
    assert [syllables(w) for w in ("cat", "doctor", "medicine", "table", "make", "area", "rhythm")] == [
        1,
        2,
        3,
        2,
        1,
        2,
        1,
    ]
    # 6 words, 2 sentences, 6 syllables
    assert fkgl("The cat sat. The dog ran.") == pytest.approx(0.39 * 3 + 11.8 - 15.59)
    assert fkgl("The cat sat") == pytest.approx(0.39 * 3 + 11.8 - 15.59)
    assert math.isnan(fkgl("")) and math.isnan(fkgl("123 ."))


def test_the_grade_reward() -> None:
    hard = "Gastrointestinal malignancies necessitate multidisciplinary therapeutic intervention."
    easy = "The cat sat."
    reward = FKGLReward()
    before, after = fkgl(hard), fkgl("Doctors treat bowel cancer.")
    got = reward([hard, hard, hard, hard], ["Doctors treat bowel cancer.", easy, hard, ""])
    assert got[0] == pytest.approx(min(1.0, (before - after) / (before - 6))) and got[1] == 1.0
    assert got[2] == 0.0 and got[3] == 0.0
    # an easy source is not divided by a small number
    assert reward([easy], ["A cat sat here with me."])[0] == 0.0


def test_frequent_words_are_simple() -> None:
    pytest.importorskip("wordfreq", reason="word frequencies need wordfreq")
    assert zipf_simplicity("people have water") > zipf_simplicity("haematochezia") >= 0.0
    assert zipf_simplicity("a be") == 0.0 and ZipfSimplicity()(["people"])[0] == zipf_simplicity("people")


@pytest.mark.parametrize(
    ("source", "output", "kept"),
    [
        ("Take 2 pills, not 3.", "Do not take 3 pills; take 2.", True),
        ("Take 2 pills.", "Take pills.", False),
        ("Take 2 and 2.", "Take 2.", False),
        ("Take 1,000 mg.", "Take 1000 mg.", True),
        ("Do not stop.", "Stop.", False),
        ("Stop.", "Don't stop.", False),
        ("Take it without food.", "Take it with no food.", True),
        ("", "", True),
        ("Take 1,5 mg.", "Take 15 mg.", False),
        ("Take 1,234,567.", "Take 1234567.", True),
        ("Never take 2.5 mg.", "Do not take 2.5 mg.", True),
    ],
)
def test_numbers_and_negations_must_survive(source: str, output: str, kept: bool) -> None:
    assert kept_facts(source, output) == kept
    assert PreservationGate()([source], [output])[0] == float(kept)


def test_gates_can_be_chosen() -> None:
    assert PreservationGate(numbers=False)(["Take 2."], ["Take."])[0] == 1.0
    assert PreservationGate(negation=False)(["Do not."], ["Do."])[0] == 1.0
    assert PreservationGate(further=lambda s, o: "liver" in o)(["liver"], ["organ"])[0] == 0.0


def test_the_guarded_product_by_hand() -> None:
    style = lambda outputs: [0.0, 9.0, 0.0, 0.0]  # noqa: E731
    relevance = lambda sources, outputs: [0.5, 1.0, -0.5, 1.0]  # noqa: E731
    guarded = GuardedProduct(style, relevance)
    batch = guarded(["s"] * 4, ["a", "b", "c", " "])
    assert batch.total == pytest.approx([0.25, 1 / (1 + math.exp(-5)), 0.0, 0.0])
    assert GuardedProduct(style, relevance, k=2)(["s"] * 4, list("abcd")).total[0] == pytest.approx(0.125)
    assert GuardedProduct(style, relevance, k=0)(["s"] * 4, list("abcd")).total[2] == 0.5
    gated = GuardedProduct(style, relevance, gate=PreservationGate())(["take 2"] * 4, ["take 2", "take", "2", "2"])
    assert gated.total[1] == 0.0 and gated.total[0] == 0.25
    summed = GuardedProduct(style, relevance, combine="sum", weights=(1.0, 2.0))(["s"] * 4, list("abcd"))
    assert summed.total[0] == pytest.approx(1.5)
    from guerdon.types import StopReason, Task, Trajectory, Turn

    one = GuardedProduct(lambda o: [0.0], lambda s, o: [0.5])(
        [Trajectory(Task("t", "s"), (Turn("policy", "a"),), StopReason.EOS)]
    )
    assert one[0].value == 0.25 and set(one[0].parts) == {"style", "relevance", "gate"}
    for bad in ({"k": -1}, {"combine": "x"}, {"clip": 0}):
        with pytest.raises(ConfigError):
            GuardedProduct(style, relevance, **bad)
    with pytest.raises(ConfigError, match="two lists"):
        guarded(["a"], [])
    with pytest.raises(ConfigError, match="squash"):
        GuardedProduct(style, relevance, improvement=True, squash=False)


def test_improvement_is_style_gained() -> None:
    words = lambda texts: [float(len(t)) for t in texts]  # noqa: E731
    gained = GuardedProduct(words, lambda sources, outputs: [1.0] * len(sources), improvement=True)
    batch = gained(["aaa", "a"], ["a", "aaa"])
    assert batch.parts["style"].tolist() == [-2.0, 2.0]
    assert batch.total == pytest.approx([1 / (1 + math.exp(2)), 1 / (1 + math.exp(-2))])


@pytest.mark.parametrize(
    ("output", "clean"),
    [
        ("Simplify this: The cat sat.", "The cat sat."),
        ("<|im_start|>assistant\nThe cat sat.<|im_end|>", "The cat sat."),
        ("Output: The cat sat.\n\nI made it shorter.", "The cat sat."),
        ("[INST] [/INST] The cat sat.</s>", "The cat sat."),
        ("The cat\nsat.", "The cat\nsat."),
        ("  ", ""),
        ("Not output: it stays.", "Not output: it stays."),
    ],
)
def test_what_is_written_around_a_rewriting_is_removed(output: str, clean: str) -> None:
    assert clean_rewriting(output, "Simplify this:") == clean


def test_sari() -> None:
    # the example that the metric's common implementations print
    kept = (
        "About 95 species are currently known .",
        "About 95 species are now accepted .",
        "95 species are now accepted .",
    )
    published = sari_sentence("About 95 species are currently accepted .", "About 95 you now get in .", kept)
    assert published == pytest.approx(26.953601953601954)
    source, reference = "about 95 species are currently accepted", "about 95 species are now accepted"
    assert sari_sentence(reference, reference, [reference]) == pytest.approx(100.0)
    assert sari_sentence(source, reference, [reference]) == pytest.approx(100.0)
    copied = sari_sentence(source, source, [reference])
    assert copied < 60
    # one word by hand: keep 0, deletion 1, addition 1
    assert sari_sentence("a", "b", ["b"]) == pytest.approx(100.0)
    # nothing kept that should be: keep F1 0 for n = 1; deletion precision 0; nothing to add: 1, as for n > 1 in all three
    assert sari_sentence("a", "", ["a"]) == pytest.approx(100 * ((0 + 3) / 4 + (0 + 3) / 4 + 1) / 3)
    assert sari([source, "a"], [reference, "b"], [reference, ["b", "c"]]) == pytest.approx(
        (100 + sari_sentence("a", "b", ["b", "c"])) / 2
    )
    with pytest.raises(DataError):
        sari_sentence("a", "b", [])
    with pytest.raises(ConfigError):
        sari([], [], [])


HARD = ["metastasis", "malignancy", "lesion", "prognosis", "etiology", "haematoma"]
EASY = ["spread", "cancer", "sore", "outlook", "cause", "bruise"]


def pairs(n: int, seed: int) -> tuple[list[str], list[str]]:
    rng = np.random.default_rng(seed)
    a, b = [], []
    for _ in range(n):
        k, pad = int(rng.integers(len(HARD))), " patient" * int(rng.integers(1, 9))
        a.append(f"the {HARD[k]} of the{pad}")
        b.append(f"the {EASY[k]} of the{pad}")
    return a, b


@pytest.mark.parametrize("loss", ["pairwise", "bce"])
def test_the_discriminator_learns_words_and_not_length(loss: str) -> None:
    a, b = pairs(60, 0)
    model = StyleDiscriminator(loss=loss).fit(a, b, groups=["p1"] * 60)  # type: ignore[arg-type]
    held = model.evaluate(*pairs(40, 1), groups=["p2"] * 40)
    assert held["auc"] > 0.95 and held["auc_length_matched"] > 0.95 and held["pairs"] > 0.95
    with pytest.raises(DataError, match="p1"):
        model.evaluate(a, b, groups=["p1"] * 60)
    assert np.abs(model.score(b)).max() <= 5 and model.score([]).shape == (0,)


def test_a_discriminator_of_length_is_seen_through() -> None:
    rng = np.random.default_rng(0)
    long = ["word " * int(n) for n in rng.integers(20, 60, 50)]
    short = ["word " * int(n) for n in rng.integers(5, 45, 50)]
    features = lambda texts: [[len(t.split())] for t in texts]  # noqa: E731
    plain = StyleDiscriminator(features).fit(long, short)
    debiased = StyleDiscriminator(features, length_debias=True).fit(long, short)
    assert plain.evaluate(long, short)["auc"] > 0.7
    assert abs(plain.evaluate(long, short)["auc_length_matched"] - 0.5) < 0.1
    assert debiased.evaluate(long, short)["auc"] < plain.evaluate(long, short)["auc"]


@pytest.mark.parametrize("debias", [False, True])
def test_pairwise_scores_are_centred_so_that_a_sigmoid_does_not_saturate(debias: bool) -> None:
    # all texts share a large feature; pairs differ in a small one, and say nothing about the level
    features = lambda texts: [[10.0 + len(t.split()) % 3, float("easy" in t)] for t in texts]  # noqa: E731
    hard = [f"hard {'x ' * (k % 5)}" for k in range(40)]
    easy = [f"easy {'x ' * (k % 7)}" for k in range(40)]
    model = StyleDiscriminator(features, l2=0.01, length_debias=debias).fit(hard, easy)
    assert abs(model.score([*hard, *easy]).mean()) < 1e-6
    assert model.score(easy).min() > 0 > model.score(hard).max()


def test_pairwise_weights_are_those_of_bradley_terry() -> None:
    from scipy.optimize import minimize

    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(30, 3)), rng.normal(size=(30, 3)) + np.array([0.5, 0, 0])
    table = {f"a{k}": a[k] for k in range(30)} | {f"b{k}": b[k] for k in range(30)}
    encoder = lambda texts: np.array([table[t] for t in texts])  # noqa: E731
    names = [f"a{k}" for k in range(30)], [f"b{k}" for k in range(30)]
    model = StyleDiscriminator(encoder, l2=2.0).fit(*names)
    # a pair and its mirror are both in the fit: twice the loss for once the penalty
    slow = minimize(lambda w: 2 * np.logaddexp(0, -(b - a) @ w).sum() + 0.5 * 2.0 * w @ w, np.zeros(3)).x
    gaps = model.score(names[1]) - model.score(names[0])
    assert gaps == pytest.approx((b - a) @ slow, abs=1e-3)


def test_auc_by_hand() -> None:
    assert auc([1, 2], [0, 1]) == (2 + 1.5) / 4 and math.isnan(auc([], [1]))
    for bad in ({"encoder": 3}, {"loss": "x"}, {"l2": 0}, {"clip": 0}):
        with pytest.raises(ConfigError):
            StyleDiscriminator(**bad)
    with pytest.raises(ConfigError, match="not fitted"):
        StyleDiscriminator().score(["a"])
    with pytest.raises(DataError, match="two pairs"):
        StyleDiscriminator().fit(["a"], [])


@given(st.text(max_size=60), st.text(max_size=60))
@settings(max_examples=60, deadline=None)
def test_any_text_has_a_score(a: str, b: str) -> None:
    assert 0 <= FKGLReward()([a], [b])[0] <= 1
    assert 0 <= sari_sentence(a, b, [a]) <= 100 + 1e-9
    assert kept_facts(a, a)
