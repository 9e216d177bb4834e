"""Mixed-R1's rewards: choices, numbers, boxes and two-way similarity, each by hand, and the router over them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guerdon.errors import ConfigError, RewardError
from guerdon.rewards.choice import ChoiceMatch, RelaxedNumber, choice_letter, read_number
from guerdon.rewards.routed import RoutedReward, ThinkAnswerFormat, select_by_rollouts, source_statistics
from guerdon.rewards.token_similarity import BMAS, max_average_similarity
from guerdon.rewards.vision import BoxIoU, box_iou, read_boxes


@pytest.mark.parametrize(
    ("answer", "gold", "value"),
    [
        ("B", "B", 1), ("(B)", "B", 1), ("B.", "B", 1), ("b: a red square", "B", 1), ("option B", "B", 1), ("[B]", "(B)", 1),
        ("A", "B", 0), ("a cat", "A", 0), ("", "B", 0), ("Yes.", "yes", 1), ("y", "yes", 1), ("true", "yes", 0),
        ("yes", "True", 1), ("no", "true", 0), ("Red Square!", "red  square", 1), ("no", "yes", 0), ("BB", "B", 0),
    ],
)  # fmt: skip
def test_choices(answer: str, gold: str, value: float) -> None:
    assert ChoiceMatch()([answer], [gold])[0] == value


def test_options_stand_for_their_letters() -> None:
    match = ChoiceMatch(["a dog", "a cat"])
    assert match(["a cat", "A cat.", "a dog", "B"], ["B"] * 4).tolist() == [1, 1, 0, 1]
    assert match(["B", "(A)"], ["a cat"] * 2).tolist() == [1, 0]
    assert ChoiceMatch()(["x"], ["A"], [{"options": {"A": "x", "B": "y"}}])[0] == 1
    assert choice_letter("B) it is") == "B" and choice_letter("because") is None
    with pytest.raises(RewardError, match="gold answer as text"):
        ChoiceMatch()(["A"], [None])


@pytest.mark.parametrize(
    ("text", "value"),
    [("$1,234.5", 1234.5), ("12 %", 12.0), ("about 7 apples", 7.0), ("3,5", 3.5), ("-.5", -0.5), ("1e3", 1000.0), ("1e999", None), ("NaN", None), ("12 of 20", None), ("", None), ("1,000,000", 1e6), ("−4", -4.0)],
)  # fmt: skip
def test_numbers_are_read_with_their_signs_and_units(text: str, value: float | None) -> None:
    assert read_number(text) == value


def test_relaxed_numbers() -> None:
    near = RelaxedNumber()
    assert near(["104.9", "105", "105.1", "95", "$100"], ["100"] * 5).tolist() == [1, 1, 0, 1, 1]
    assert near(["0", "1e-8", "1e-10"], ["0"] * 3).tolist() == [1, 0, 1]
    assert near(["12%"], ["0.12"])[0] == 0 and RelaxedNumber(percent=True)(["12%"], ["0.12"])[0] == 1
    assert near(["Blue.", "red"], ["blue"] * 2).tolist() == [1, 0]
    assert near(["10, 20, 35"], [[10, 20, 30]])[0] == pytest.approx(2 / 3)
    assert near(["[10, 20]"], [[10, 20, 30]])[0] == pytest.approx(2 / 3)
    assert near(["-95"], ["-100"])[0] == 1 and RelaxedNumber(0)(["100.0"], [100])[0] == 1
    for bad in (None, "", []):
        with pytest.raises(RewardError):
            near(["1"], [bad])
    with pytest.raises(ConfigError, match="rel_tol"):
        RelaxedNumber(-1)


def test_boxes() -> None:
    assert box_iou([[0, 0, 2, 2]], [[1, 1, 3, 3], [0, 0, 2, 2], [5, 5, 6, 6]])[0].tolist() == [1 / 7, 1.0, 0.0]
    iou = BoxIoU()
    gold = [0, 0, 2, 2]
    texts = [
        "[1, 1, 3, 3]",
        '{"bbox_2d": [0, 0, 2, 2]}',
        "0 0 2 2",
        "[2, 2, 0, 0]",
        "none",
        "[0, 0, 2]",
        '```json\n[{"bbox_2d": [0,0,2,2]}]\n```',
    ]
    assert np.allclose(iou(texts, [gold] * 7), [1 / 7, 1, 1, 0, 0, 0, 1])
    assert BoxIoU(0.5)(["[0,0,2,1]", "[0,0,2,0.9]"], [gold] * 2).tolist() == [1.0, 0.0]
    two = [[0, 0, 2, 2], [4, 4, 6, 6]]
    # one of two found, then both in another order, then one box too many
    assert np.allclose(
        iou(["[0,0,2,2]", "[[4,4,6,6],[0,0,2,2]]", "[[4,4,6,6],[0,0,2,2],[8,8,9,9]]"], [two] * 3), [0.5, 1, 2 / 3]
    )
    with pytest.raises(RewardError, match="no box"):
        iou(["[0,0,1,1]"], [[1, 1, 0, 0]])
    assert read_boxes("[1e999, 0, 1, 1]") is None and read_boxes([True, 0, 1, 1]) is None


def test_both_directions_by_hand() -> None:
    u = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    v = torch.tensor([[2.0, 0.0], [0.0, 3.0], [0.0, -1.0]])
    root = math.sqrt(0.5)
    p, q = max_average_similarity(u, v)
    assert p == pytest.approx((1 + root) / 2) and q == pytest.approx((1 + root + 0) / 3, abs=1e-6)
    assert max_average_similarity(u[:0], v) == (0.0, 0.0)
    assert max_average_similarity(torch.zeros(1, 2), v) == (0.0, 0.0)


WORDS = {w: k for k, w in enumerate(["red", "green", "blue", "square", "circle", "a", "the"])}


def bmas(**options) -> BMAS:
    table = torch.eye(7) if "embedding" not in options else options.pop("embedding")
    return BMAS(table, lambda text: [WORDS[w] for w in text.split() if w in WORDS], **options)


def test_bmas() -> None:
    score = bmas()
    texts = ["red square", "red", "red green blue square circle", "", "red red red"]
    assert np.allclose(score(texts, ["red square"] * 5), [1.0, (1 + 0.5) / 2, (0.4 + 1) / 2, 0.0, (1 + 0.5) / 2])
    assert score(["red"], [""])[0] == 0.0
    assert np.allclose(bmas(directions="p")(texts[:3], ["red square"] * 3), [1.0, 1.0, 0.4])
    assert np.allclose(bmas(directions="q")(texts[:3], ["red square"] * 3), [1.0, 0.5, 1.0])
    assert bmas(mean="harmonic")(["red"], ["red square"])[0] == pytest.approx(2 * 0.5 / 1.5)
    assert (
        bmas(mask=[5, 6])(["the red a"], ["red"])[0] == 1.0 and bmas(mask=lambda i: i > 4)(["the"], ["red"])[0] == 0.0
    )
    assert bmas(rescale=(0.5, 1.0))(["red"], ["red square"])[0] == pytest.approx(0.5)
    opposed = torch.cat([torch.eye(7)[:1], -torch.eye(7)[:1], torch.eye(7)[2:]])
    assert bmas(embedding=opposed)(["red"], ["green"])[0] == 0.0
    assert bmas(embedding=opposed, clip=False)(["red"], ["green"])[0] == -1.0
    assert bmas(max_tokens=1)(["red square"], ["red circle"])[0] == 1.0


def test_the_table_does_not_move_with_the_policy() -> None:
    table = torch.eye(7)
    score = bmas(embedding=table)
    table.zero_()
    assert score(["red"], ["red"])[0] == 1.0
    from guerdon.policies import tiny_policy

    policy = tiny_policy(hidden=16, heads=2)
    own = BMAS.from_policy(policy)
    with torch.no_grad():
        policy.model.get_input_embeddings().weight.zero_()
    assert own(["What is it?"], ["What is it?"])[0] == pytest.approx(1.0, abs=1e-6)


def test_bmas_refuses_what_does_not_fit() -> None:
    with pytest.raises(RewardError, match="id 9"):
        BMAS(torch.eye(3), lambda text: [9])(["a"], ["b"])
    with pytest.raises(RewardError, match="reference text"):
        bmas()(["a"], [3])
    for bad in ({"mean": "x"}, {"rescale": (1, 0)}, {"max_tokens": 0}, {"directions": "r"}):
        with pytest.raises(ConfigError):
            bmas(**bad)
    with pytest.raises(ConfigError, match="table"):
        BMAS(torch.zeros(3), lambda text: [])


@given(st.lists(st.sampled_from(sorted(WORDS)), max_size=8), st.lists(st.sampled_from(sorted(WORDS)), max_size=8))
@settings(max_examples=60, deadline=None)
def test_bmas_is_symmetric_bounded_and_blind_to_order(a: list[str], b: list[str]) -> None:
    table = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    score = bmas(embedding=table, clip=False)
    one, two, turned = score(
        [" ".join(a), " ".join(b), " ".join(a[::-1])], [" ".join(b), " ".join(a), " ".join(b[::-1])]
    )
    assert (
        one == pytest.approx(two, abs=1e-6) and one == pytest.approx(turned, abs=1e-6) and -1 - 1e-6 <= one <= 1 + 1e-6
    )


def wrap(answer: str) -> str:
    return f"<think>t</think><answer>{answer}</answer>"


def test_the_router_sends_each_sample_to_its_type() -> None:
    routed = RoutedReward({"matching": ChoiceMatch(), "chart": RelaxedNumber(), "iou": BoxIoU(), "open": bmas()})
    batch = routed(
        [wrap("B"), wrap("104"), wrap("[0,0,2,1]"), wrap("red"), "B", wrap("B") + "x"],
        ["B", "100", [0, 0, 2, 2], "red square", "B", "B"],
        ["matching", "chart", "iou", "open", "matching", "matching"],
    )
    assert np.allclose(batch.parts["accuracy"], [1, 1, 0.5, 0.75, 0, 1])
    assert np.allclose(batch.parts["format"], [1, 1, 1, 1, 0, 0])
    assert np.allclose(batch.total, [2, 2, 1.5, 1.75, 0, 1])
    assert routed.range == (0.0, 2.0) and RoutedReward({"m": ChoiceMatch()}, format_weight=0.1).range == (0.0, 1.1)
    with pytest.raises(ConfigError, match="unknown type 'charts'; did you mean chart"):
        routed([wrap("1")], ["1"], ["charts"])
    with pytest.raises(ConfigError, match="has type None"):
        routed.text(completion=wrap("1"), reference="1")
    with pytest.raises(ConfigError, match="has type None"):  # no default score hides it
        RoutedReward({"m": ChoiceMatch()}, on_error=0.0).text(completion=wrap("1"), reference="1")
    with pytest.raises(ConfigError, match="give one of each"):
        routed([wrap("1")], ["1"])


@pytest.mark.parametrize(
    ("text", "value"),
    [(wrap("x"), 1), (f" {wrap('')}\n", 1), ("<think>a</think>\n\n<answer>b</answer>", 1), ("<think>a</think> so <answer>b</answer>", 0), (wrap("x") * 2, 0), ("<answer>b</answer><think>a</think>", 0), ("", 0), (wrap("<answer>"), 0)],
)  # fmt: skip
def test_the_form(text: str, value: float) -> None:
    assert ThinkAnswerFormat()([text])[0] == value


def test_samples_that_teach_are_chosen_and_balanced() -> None:
    mean = [0.0, 0.5, 0.1, 0.9, 0.95, float("nan"), 0.5, 0.5, 0.5]
    var = [0.0, 0.25, 0.1, 0.1, 0.01, 0.1, 0.0, 0.2, 0.2]
    source = list("aaabbbabb")
    assert select_by_rollouts(mean, var, source).tolist() == [1, 2, 3, 7, 8]
    balanced = select_by_rollouts(mean, var, source, per_source=1, seed=3)
    assert len(balanced) == 2 and len({source[k] for k in balanced}) == 2
    assert balanced.tolist() == select_by_rollouts(mean, var, source, per_source=1, seed=3).tolist()
    assert select_by_rollouts(mean, var, source, per_source={"b": 2}).tolist()[:2] == [1, 2]
    # continuous rewards: a high mean is no sign of agreement, a gold that cannot be read still is none
    assert select_by_rollouts(mean, var, source, continuous="b").tolist() == [1, 2, 3, 4, 7, 8]
    assert select_by_rollouts([], [], []).tolist() == []
    for wrong in (([0.1], [], []), ([0.1], [0.1], ["a"], 0.9, 0.1), ([0.1], [0.1], ["a"], 0.1, 0.9, -1)):
        with pytest.raises(ConfigError):
            select_by_rollouts(*wrong)


def test_sources_are_watched_one_by_one() -> None:
    found = source_statistics([1, 1, 0, 1, float("nan"), 0.5], list("aaaabb"), [0, 0, 1, 1, 2, 2])
    assert found["a"] == {"mean": 0.75, "zero_variance": 0.5, "prompts": 2.0, "invalid": 0.0}
    assert found["b"] == {"mean": 0.5, "zero_variance": 1.0, "prompts": 1.0, "invalid": 1.0}
    assert math.isnan(source_statistics([float("nan")], ["a"], [0])["a"]["mean"])
    with pytest.raises(ConfigError, match="one of each"):
        source_statistics([1], [], [0])


def test_the_form_can_be_left_out_or_be_another_one() -> None:
    plain = RoutedReward({"m": ChoiceMatch()}, format=None)
    batch = plain([wrap("B"), "B"], ["B", "B"], ["m", "m"])
    assert batch.total.tolist() == [1.0, 0.0] and set(batch.parts) == {"accuracy"} and plain.range == (0.0, 1.0)
    with pytest.raises(ConfigError, match="format must be"):
        RoutedReward({"m": ChoiceMatch()}, format="tags")  # type: ignore[arg-type]


def test_an_invalid_score_of_a_route_makes_the_whole_invalid() -> None:
    routed = RoutedReward({"m": ChoiceMatch(on_error="drop")}, on_error="drop", key=lambda trajectory: "m")
    score = routed.text(completion=wrap("B"), reference=None)
    assert not score.valid and score.parts["format"] == 1.0 and "gold answer" in str(score.reason)


@pytest.mark.parametrize(
    ("answer", "gold", "value"),
    [("B", "option B", 1), ("B", "B: a red square", 1), ("a red square", "B. a red square", 1), ("A", "B) a red square", 0),
     ("yes", "y", 1), ("no", "n", 1), ("no", "y", 0), ("a dog", "a cat", 0), ("A", "a cat", 0), ("C", "(c)", 1)],
)  # fmt: skip
def test_golds_are_normalised_like_answers(answer: str, gold: str, value: float) -> None:
    assert ChoiceMatch()([answer], [gold])[0] == value


def test_lists_as_golds_may_be_written_as_json() -> None:
    assert RelaxedNumber()(["10, 20", "[10, 30]"], ["[10, 20]"] * 2).tolist() == [1.0, 0.5]
    assert RelaxedNumber()(["[draft", "12"], ["[draft"] * 2).tolist() == [1.0, 0.0]


def test_matching_of_boxes_is_the_best_one() -> None:
    from itertools import permutations

    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = (np.sort(rng.random((3, 2, 2)), axis=1).reshape(3, 4) for _ in range(2))
        slow = max(sum(box_iou(a, b)[k, p[k]] for k in range(3)) for p in permutations(range(3))) / 3
        assert BoxIoU(tag=None)([str(a.tolist())], [b.tolist()])[0] == pytest.approx(slow)


def test_huge_boxes_overlap_nothing() -> None:
    assert BoxIoU(tag=None)(["[0, 0, 1e308, 1e308]"], [[0, 0, 1, 1]])[0] == 0.0


def test_similarity_agrees_with_a_slow_reference() -> None:
    generator = torch.Generator().manual_seed(1)
    u, v = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (600, 9))
    cosine = [[float(x @ y / x.norm() / y.norm()) for y in v] for x in u]
    p = sum(max(row) for row in cosine) / len(u)
    q = sum(max(row[j] for row in cosine) for j in range(len(v))) / len(v)
    assert max_average_similarity(u, v) == pytest.approx((p, q), abs=1e-12)


@pytest.mark.parametrize(
    "text", ["\0", "9" * 5000, "[" * 3000, "1," * 5000, "<answer>" * 5000, "\ud800", "(((B", "🙂", "٣"]
)
def test_hostile_answers_get_a_score(text: str) -> None:
    assert ChoiceMatch()([text], ["B"])[0] == 0.0
    assert RelaxedNumber()([text], ["3"])[0] in (0.0, 1.0)
    assert BoxIoU()([text], [[0, 0, 1, 1]])[0] == 0.0
    assert 0.0 <= bmas()([text], ["red"])[0] <= 1.0


def test_a_missing_answer_block_earns_nothing_on_trajectories() -> None:
    assert ChoiceMatch().text(completion="B", reference="B").value == 0.0
    assert ChoiceMatch(tag=None).text(completion="B", reference="B").value == 1.0
    with pytest.raises(ConfigError, match="write \\[text\\]"):
        ChoiceMatch()("B", "B")
    with pytest.raises(ConfigError):
        RoutedReward({"m": ChoiceMatch()}).type_of(__import__("guerdon").rewards.plain.plain_trajectories(["x"])[0])
