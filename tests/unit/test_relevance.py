"""Regularized relevance: every factor by hand, the two branches, the fitted scale, and the ways round it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guerdon.errors import ConfigError, DataError, RewardError
from guerdon.rewards.relevance import (
    EmbeddingRelevance,
    LengthIncentive,
    Product,
    QuantileAffine,
    RegularizedRelevance,
    Routed,
    TrigramUniqueness,
    length_incentive,
    ngram_uniqueness,
)
from guerdon.types import StopReason, Task, Trajectory, Turn

AXES = {"peru": (1.0, 0.0), "lima": (2.0, 1.0), "chess": (0.0, 1.0)}


def encode(texts):
    """Sum of the words' vectors."""
    return np.array(
        [np.sum([AXES.get(w, (0.0, 0.0)) for w in t.lower().split()] or [(0.0, 0.0)], axis=0) for t in texts]
    )


def kind(query: str) -> str:
    return "closed" if query.startswith("what") else "open"


def test_the_terms() -> None:
    assert length_incentive("a b c") == 0.03 and length_incentive("a b", 4) == 0.5 and length_incentive(" ") == 0.0
    assert ngram_uniqueness("a b c a b c") == 3 / 4  # abc bca cab abc
    assert ngram_uniqueness("a b") == 1.0 and ngram_uniqueness("") == 0.0
    assert ngram_uniqueness("A b c a b c") == 1.0 and ngram_uniqueness("A b c a b c", lowercase=True) == 3 / 4
    assert ngram_uniqueness("a a a", 1) == pytest.approx(1 / 3)
    assert LengthIncentive(10)(["a b"])[0] == 0.2 and TrigramUniqueness()(["x x x x"])[0] == 0.5


def test_relevance_is_a_dot_product() -> None:
    assert EmbeddingRelevance(encode)(["peru", "peru", "chess"], ["lima peru", "chess", ""]).tolist() == [3.0, 0.0, 0.0]
    cosine = EmbeddingRelevance(encode, normalize=True)(["peru"], ["lima"])
    assert cosine[0] == pytest.approx(2 / 5**0.5)
    task = Task("t", "peru", "lima")
    said = [Trajectory(task, (Turn("policy", "lima"),), StopReason.EOS)]
    assert EmbeddingRelevance(encode)(said)[0].value == 2.0
    assert EmbeddingRelevance(encode, to="reference")(said)[0].value == 5.0


def test_each_distinct_text_is_encoded_once() -> None:
    seen: list[str] = []

    def counting(texts):
        seen.extend(texts)
        return encode(texts)

    EmbeddingRelevance(counting)(["peru"] * 5, ["lima", "lima", "chess", "chess", "lima"])
    assert sorted(seen) == ["chess", "lima", "peru"]


def test_the_two_branches() -> None:
    reward = RegularizedRelevance(encode, kind, "identity")
    batch = reward(
        ["tell peru", "what peru", "tell peru", "what peru"],
        [None, "lima", None, "lima"],
        ["lima lima lima lima", "lima", "", ""],
    )
    # open: r_x = 8, LI = 4/100, RP = 1/2; closed: r_y = 5, RP = 1; blank responses 0
    assert batch.total == pytest.approx([8 * 0.04 * 0.5, 5.0, 0.0, 0.0])
    assert batch.parts["closed"].tolist() == [0, 1, 0, 1] and batch.parts["r_y"].tolist() == [0, 5, 0, 0]
    ladder = {(): 8.0, ("length",): 0.32, ("length", "repetition"): 0.16}
    for terms, value in ladder.items():
        got = RegularizedRelevance(encode, kind, terms=terms)(["tell peru"], [None], ["lima lima lima lima"])
        assert got.total[0] == pytest.approx(value)


def test_a_blank_closed_answer_is_0_whatever_the_scale() -> None:
    reward = RegularizedRelevance(encode, kind, lambda r: r + 7)
    assert reward(["what peru"], ["lima"], ["  "]).total[0] == 0.0


def test_negative_relevance_stays_negative() -> None:
    negative = lambda texts: np.array([[-1.0] if "off" in t else [1.0] for t in texts])  # noqa: E731
    long, short = ("off " * 50).strip(), "off topic"
    total = RegularizedRelevance(negative, kind, terms=("length",))(["q", "q"], [None] * 2, [long, short]).total
    assert total[0] < total[1] < 0


def test_the_scale_is_fitted_once_and_increasing() -> None:
    fitted = QuantileAffine((0.0, 1.0)).fit([0, 10], [1, 2])
    assert fitted([0, 5, 10]).tolist() == [1.0, 1.5, 2.0]
    for src, dst in (([1, 1], [0, 1]), ([0, 1], [3, 3]), ([0], [1]), ([0, float("nan")], [0, 1])):
        with pytest.raises(DataError):
            QuantileAffine().fit(src, dst)
    with pytest.raises(ConfigError, match="not fitted"):
        QuantileAffine()([1])
    reward = RegularizedRelevance(encode, kind)
    with pytest.raises(ConfigError, match="F is missing"):
        reward(["what peru"], ["lima"], ["lima"])
    x, y = ["peru", "peru", "chess"], ["lima", "peru", "chess"]
    answers = ["lima a b", "peru", "chess c"]
    scale = reward.fit_scale(x, y, answers)
    r_y, opened = EmbeddingRelevance(encode)(y, answers), reward(["tell " + q for q in x], [None] * 3, answers).total
    assert np.allclose(np.quantile(scale(r_y), [0.05, 0.95]), np.quantile(opened, [0.05, 0.95]))
    again = RegularizedRelevance(encode, kind)
    again.load_state_dict(reward.state_dict())
    assert again(["what peru"], ["lima"], ["lima"]).total[0] == reward(["what peru"], ["lima"], ["lima"]).total[0]


def test_a_closed_question_needs_its_reference() -> None:
    with pytest.raises(DataError, match="no reference"):
        RegularizedRelevance(encode, kind, "identity")(["what peru"], [None], ["lima"])
    opened = RegularizedRelevance(encode, kind, "identity", missing="open")(["what peru"], [None], ["lima"])
    assert opened.total[0] == pytest.approx(2 * 0.01) and opened.parts["closed"][0] == 0
    with pytest.raises(DataError, match="'open' or 'closed'"):
        RegularizedRelevance(encode, lambda q: "maybe", "identity")(["q"], [None], ["lima"])


def test_marks_of_a_chat_format_are_no_words() -> None:
    reward = RegularizedRelevance(encode, kind, "identity")
    plain, marked = "lima lima", "<|im_start|>assistant lima lima<|im_end|>"
    batch = reward(["tell peru"] * 2, [None] * 2, [plain, marked])
    assert batch.total[0] == batch.total[1] and batch.parts["length"].tolist() == [0.02, 0.02]
    assert reward(["what peru"], ["lima"], ["<eos>"]).total[0] == 0.0
    own = RegularizedRelevance(encode, kind, markers=["##"])(["tell peru"], [None], ["lima ##<eos>"])
    assert own.parts["length"][0] == 0.02
    x, y = ["peru", "peru", "chess"], ["lima", "peru", "chess"]
    answers = ["lima a b", "peru", "chess c"]
    scales = [RegularizedRelevance(encode, kind).fit_scale(x, y, [a + end for a in answers]) for end in ("", "<eos>")]
    assert scales[0].state_dict() == scales[1].state_dict()


def test_words_are_counted_before_the_encoder_cuts() -> None:
    cut = lambda texts: encode([" ".join(t.split()[:2]) for t in texts])  # noqa: E731
    batch = RegularizedRelevance(cut, kind)(["tell peru"], [None], ["lima lima lima lima lima"])
    assert batch.parts["r_x"][0] == 0.0 + np.dot(encode(["tell peru"])[0], encode(["lima lima"])[0])
    assert batch.parts["length"][0] == 0.05 and batch.parts["repetition"][0] == pytest.approx(1 / 3)


def test_a_scale_that_falls_is_refused() -> None:
    with pytest.raises(ConfigError, match="increasing"):
        RegularizedRelevance(encode, kind, lambda r: -r)(["what peru"] * 2, ["lima"] * 2, ["lima", "peru"])
    with pytest.raises(ConfigError, match="one by one"):
        RegularizedRelevance(encode, kind, lambda r: 1.0)(["what peru"], ["lima"], ["lima"])


def test_the_reference_does_not_leak_into_open_questions() -> None:
    reward = RegularizedRelevance(encode, kind, "identity")
    with_reference, without = (reward(["tell peru"], [y], ["lima"]).total[0] for y in ("lima", None))
    assert with_reference == without


def test_on_trajectories_the_type_may_come_with_the_task() -> None:
    reward = RegularizedRelevance(encode, F="identity")
    tasks = [Task("a", "peru", None, {"type": "open"}), Task("b", "peru", "lima", {"type": "closed"})]
    scores = reward([Trajectory(t, (Turn("policy", "lima"),), StopReason.EOS) for t in tasks])
    assert [s.value for s in scores] == pytest.approx([0.02, 5.0])
    with pytest.raises(RewardError, match="'open' or 'closed'"):
        reward.text(completion="lima", prompt="peru")


def test_products_and_routes() -> None:
    product = Product(LengthIncentive(1), TrigramUniqueness())
    score = product.text(completion="x x x x")
    assert score.value == 2.0 and score.parts == {"LengthIncentive": 4.0, "TrigramUniqueness": 0.5}
    routed = Routed(lambda task: task.question, {"a": LengthIncentive(1), "b": TrigramUniqueness()})
    assert (
        routed.text(completion="x x x x", prompt="a").value == 4.0
        and routed.text(completion="x x x x", prompt="b").value == 0.5
    )
    with pytest.raises(RewardError, match="leads nowhere"):
        routed.text(completion="x", prompt="c")


def test_what_does_not_fit_is_refused() -> None:
    for bad in (
        lambda: LengthIncentive(0),
        lambda: TrigramUniqueness(0),
        lambda: EmbeddingRelevance(3),  # type: ignore[arg-type]
        lambda: RegularizedRelevance(encode, terms=("x",)),
        lambda: RegularizedRelevance(encode, F=3),  # type: ignore[arg-type]
        lambda: RegularizedRelevance(encode, unit=0),
        lambda: RegularizedRelevance(encode, n=0),
        lambda: RegularizedRelevance(encode, markers="x"),
        lambda: QuantileAffine((1, 0)),
        lambda: Product(),
        lambda: EmbeddingRelevance(encode)(["a"], []),
        lambda: RegularizedRelevance(encode, kind, "identity")(["a"], [], ["b"]),
    ):
        with pytest.raises(ConfigError):
            bad()
    with pytest.raises(DataError, match="shape"):
        EmbeddingRelevance(lambda texts: np.zeros((1, 2)))(["a", "b"], ["c", "d"])
    with pytest.raises(DataError, match="finite"):
        EmbeddingRelevance(lambda texts: np.full((len(texts), 2), np.nan))(["a"], ["b"])


words = st.lists(st.sampled_from(["peru", "lima", "chess", "x"]), min_size=1, max_size=12).map(" ".join)


@given(st.lists(st.tuples(words, words), min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_the_parts_multiply_to_the_total(items: list[tuple[str, str]]) -> None:
    x, yhat = ["tell " + q for q, _ in items], [r for _, r in items]
    batch = RegularizedRelevance(encode, kind)(x, [None] * len(x), yhat)
    slow = [
        float(encode([q])[0] @ encode([r])[0]) * (len(r.split()) / 100) * ngram_uniqueness(r)
        for q, r in zip(x, yhat, strict=True)
    ]
    assert batch.total == pytest.approx(slow)
    assert batch.total == pytest.approx(batch.parts["r_x"] * batch.parts["length"] * batch.parts["repetition"])


@given(st.text(max_size=50))
@settings(max_examples=60, deadline=None)
def test_terms_stay_in_their_range(text: str) -> None:
    assert 0 <= ngram_uniqueness(text) <= 1 and length_incentive(text) >= 0
    assert ngram_uniqueness(f"{text} {text} {text} end") <= 1
