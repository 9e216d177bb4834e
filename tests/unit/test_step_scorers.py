"""Step scorers: what they read, how they are trained, and the reward made of them."""

from __future__ import annotations

import math

import pytest
import torch

from guerdon.environments.arithmetic import LINES, ChainCorrect, Spec, Style, scripts, words
from guerdon.errors import CheckpointError, ConfigError, DataError, RewardError, TrainingError
from guerdon.policies import Policy, tiny_policy, train_bpe
from guerdon.reward_models import StepClassifier, StepReward, StepScorer, StepValue
from guerdon.reward_models.reader import Places, places_of_steps, read_states, step_texts
from guerdon.reward_models.steps import at_step_ends, reduce_scores
from guerdon.types import Segmenter, Span, StopReason, Task, Trajectory, Turn

SIZES = {"hidden": 32, "layers": 2, "heads": 2}


def make_policy(seed: int = 0, *, known: bool = True) -> Policy:
    atoms = words(Spec()) if known else ()
    return tiny_policy(train_bpe(("12+7=19 answer",), 600, atoms=(), words=atoms), seed=seed, max_context=128, **SIZES)


@pytest.fixture(scope="module")
def policy() -> Policy:
    torch.set_num_threads(1)
    return make_policy()


@pytest.fixture(scope="module")
def solutions(policy) -> list[Trajectory]:
    return scripts(policy, 24, Style(error=0.4, filler=0.2), seed=3)


class Fixed:
    """Scores that a test knows."""

    segmenter = LINES

    def __init__(self, *rows: list[float]) -> None:
        self.rows = rows

    def step_scores(self, trajectories, segmenter=None):
        return [torch.tensor(row, dtype=torch.float64) for row in self.rows]


def test_a_step_is_read_at_its_last_token_and_knows_nothing_of_what_follows(policy, solutions) -> None:
    scorer = StepValue.from_policy(policy, loss="mse")
    torch.nn.init.normal_(scorer.head.weight, generator=torch.Generator().manual_seed(1))
    t = next(t for t in solutions if len(t.info["labels"]) >= 4)
    whole = scorer.step_scores([t])[0]
    spans = LINES.spans(t)
    assert len(whole) == len(spans) == len(t.info["labels"])
    for k, span in enumerate(spans):
        ids = torch.tensor([[*t.prompt_ids, *t.turns[0].token_ids[: span.stop]]])
        with torch.no_grad():
            hidden = scorer.policy.model.model(input_ids=ids).last_hidden_state[0, -1]
            assert float(whole[k]) == pytest.approx(float(scorer.head(hidden)), abs=1e-5)
    with torch.no_grad():
        hidden = scorer.policy.model.model(input_ids=torch.tensor([t.prompt_ids])).last_hidden_state[0, -1]
    assert float(scorer.prefix_values([t])[0][0]) == pytest.approx(scorer.head(hidden).item(), abs=1e-5)
    assert torch.equal(scorer.prefix_values([t])[0][1:], whole)


def test_batches_do_not_change_scores(policy, solutions) -> None:
    wide, narrow = (StepValue.from_policy(policy, loss="mse", max_tokens_per_microbatch=m) for m in (100_000, 40))
    for scorer in (wide, narrow):
        torch.nn.init.normal_(scorer.head.weight, generator=torch.Generator().manual_seed(1))
    for a, b in zip(wide.step_scores(solutions), narrow.step_scores(solutions), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_untrained_scorers_say_nothing(policy, solutions) -> None:
    for scorer, value in (
        (StepClassifier.from_policy(policy), 0.5), (StepClassifier.from_policy(policy, output="signed"), 0.0),
        (StepClassifier.from_policy(policy, layers=2), 0.5), (StepValue.from_policy(policy), 0.5), (StepValue.from_policy(policy, loss="mse"), 0.0),
    ):  # fmt: skip
        assert isinstance(scorer, StepScorer)
        assert all(bool((s == value).all()) for s in scorer.step_scores(solutions))


def test_signed_scores_are_twice_the_probability_less_one(policy, solutions) -> None:
    plain, signed = StepClassifier.from_policy(policy), StepClassifier.from_policy(policy, output="signed")
    torch.nn.init.normal_(plain.head.weight, generator=torch.Generator().manual_seed(1))
    signed.load_state_dict(plain.state_dict())
    for p, s in zip(plain.step_scores(solutions), signed.step_scores(solutions), strict=True):
        torch.testing.assert_close(s, 2 * p - 1)
        assert bool(((p > 0) & (p < 1)).all())


def test_losses_have_the_values_of_their_formulas(policy) -> None:
    outputs = torch.tensor([[0.2, 1.1], [-0.3, 0.4]], dtype=torch.float64)
    targets = torch.tensor([1.0, 0.25], dtype=torch.float64)
    p = torch.exp(outputs[:, 1]) / torch.exp(outputs).sum(1)
    ce = -(targets * p.log() + (1 - targets) * (1 - p).log())
    torch.testing.assert_close(StepClassifier(policy)._loss(outputs, targets), ce)
    torch.testing.assert_close(StepClassifier(policy, loss="mse")._loss(outputs, targets), (p - targets) ** 2)
    value = outputs[:, :1]
    q = 1 / (1 + torch.exp(-value.squeeze(1)))
    soft = -(targets * q.log() + (1 - targets) * (1 - q).log())
    torch.testing.assert_close(StepValue(policy)._loss(value, targets), soft)
    torch.testing.assert_close(StepValue(policy, loss="mse")._loss(value, targets), (value.squeeze(1) - targets) ** 2)


def test_a_scorer_learns_labels_and_leaves_the_policy_alone(policy, solutions) -> None:
    before = {n: p.clone() for n, p in policy.model.named_parameters()}
    labels = [[float("=" in t.turns[0].text.splitlines()[k]) for k in range(len(t.info["labels"]))] for t in solutions]
    scorer = StepClassifier.from_policy(policy).fit(solutions, labels, lr=1e-2, epochs=12, batch_size=8)
    got = torch.cat(scorer.step_scores(solutions))
    assert bool(((got > 0.5) == torch.tensor([x for row in labels for x in row]).bool()).all())
    assert scorer.report is not None and scorer.report.losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert scorer.report.labelled == len(got)
    assert all(torch.equal(before[n], p) for n, p in policy.model.named_parameters())


def test_soft_labels_stay_soft_and_missing_ones_are_left_out(policy, solutions) -> None:
    labels = [[0.25 if k == 0 else None for k in range(len(t.info["labels"]))] for t in solutions]
    scorer = StepValue.from_policy(policy).fit(solutions, labels, lr=1e-2, epochs=30, batch_size=24)
    first = torch.stack([s[0] for s in scorer.step_scores(solutions)])
    assert scorer.report is not None and scorer.report.labelled == len(solutions)
    torch.testing.assert_close(first, torch.full_like(first, 0.25), atol=0.05, rtol=0)


def test_the_first_stage_trains_the_head_alone(policy, solutions) -> None:
    scorer = StepClassifier.from_policy(policy)
    trunk = {n: p.clone() for n, p in scorer.policy.model.named_parameters()}
    scorer.fit(solutions, [t.info["labels"] for t in solutions], lr=1e-2, head_only=True)
    assert all(torch.equal(trunk[n], p) for n, p in scorer.policy.model.named_parameters())
    assert bool(scorer.head.weight.any())


def test_training_repeats_and_its_batches_may_be_cut(policy, solutions) -> None:
    labels = [t.info["labels"] for t in solutions]
    runs = [
        StepClassifier.from_policy(policy, max_tokens_per_microbatch=m).fit(solutions, labels, lr=1e-3, batch_size=12)
        for m in (10_000, 10_000, 60)
    ]
    for name, value in runs[0].state_dict().items():
        assert torch.equal(value, runs[1].state_dict()[name])
        # AdamW divides by the gradient's own size, which turns rounding into steps where it is nearly 0.
        torch.testing.assert_close(value, runs[2].state_dict()[name], atol=3e-3, rtol=0)


def test_token_rewards_stand_on_step_ends(policy, solutions) -> None:
    scorer = StepValue.from_policy(policy)
    for row, t in zip(scorer.token_rewards(solutions), solutions, strict=True):
        ends = [s.stop - 1 for s in LINES.spans(t)]
        assert len(row) == len(t) and row.nonzero().flatten().tolist() == ends
    with pytest.raises(DataError, match="one segmenter"):
        at_step_ends([torch.zeros(1)], solutions[:1], LINES)


def test_another_tokenizer_is_refused_or_read_as_text(policy, solutions) -> None:
    other = make_policy(known=False)
    with pytest.raises(DataError, match=r"tokenizer.*by='text'"):
        StepClassifier(other).step_scores(solutions)
    scorer = StepClassifier(other, by="text")
    scores = scorer.step_scores(solutions)
    assert [len(s) for s in scores] == [len(t.info["labels"]) for t in solutions]
    places = places_of_steps(other, solutions[:1], LINES, by="text")[0]
    t = solutions[0]
    parts = [other.encode(line) + other.encode("\n") for line in t.turns[0].text.splitlines()]
    prompt = other.render(t.task.prompt)
    assert places.ids == (*prompt, *(i for part in parts for i in part))
    assert [places.ids[p] for p in places.at] == other.encode("\n") * len(parts)
    assert StepClassifier(other, by="text").prefix_values(solutions[:1])[0].shape == (len(parts) + 1,)


def test_step_texts_are_the_texts_of_the_spans(policy, solutions) -> None:
    for t in solutions:
        turn = t.turns[0]
        assert "".join(step_texts(turn, LINES)) == turn.text
        assert [x.rstrip("\n") for x in step_texts(turn, LINES)] == turn.text.split("\n")
    assert step_texts(Turn("policy", "a\nb"), LINES) == ["a\n", "b"]


def test_environment_tokens_are_context_and_no_steps(policy) -> None:
    ids = tuple(policy.encode("12+7=19\n"))
    ends = (2, 3, 4, 5, 7, 8)
    turns = (Turn("policy", "12+7=19\n", ids, token_ends=ends), Turn("environment", "check ok", tuple(policy.encode("check ok"))), Turn("policy", "19", tuple(policy.encode("19")), token_ends=(2,)))  # fmt: skip
    t = Trajectory(
        Task("t", "12+7"),
        turns,
        StopReason.DONE,
        prompt_ids=tuple(policy.render([{"role": "user", "content": "12+7"}])),
    )
    scorer = StepValue.from_policy(policy)
    assert len(scorer.step_scores([t])[0]) == 2
    row = scorer.token_rewards([t])[0]
    assert len(row) == len(t) == 8 and row.nonzero().flatten().tolist() == [5, 7]
    assert len(StepValue(policy, by="text").step_scores([t])[0]) == 2


def test_bad_input_names_the_fix(policy, solutions) -> None:
    scorer = StepClassifier.from_policy(policy)
    labels = [list(t.info["labels"]) for t in solutions]
    for bad, match in (
        (labels[:-1], "labels of 23 trajectories for 24"), ([labels[0][:-1], *labels[1:]], "None for a step without label"),
        ([[2.0] * len(row) for row in labels], "between 0 and 1"), ([[None] * len(row) for row in labels], "no step has a label"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=match):
            scorer.fit(solutions, bad)
    with pytest.raises(ConfigError, match="lr must be positive"):
        scorer.fit(solutions, labels, lr=0.0)
    with pytest.raises(ConfigError, match="tokenizer="):
        StepClassifier(policy.model)
    for settings, match in (
        ({"layers": 3}, "layers"),
        ({"by": "ids"}, "by"),
        ({"output": "logit"}, "output"),
        ({"loss": "bce"}, "loss"),
    ):
        with pytest.raises(ConfigError, match=match):
            StepClassifier(policy, **settings)
    bare = Trajectory(Task("t", "q"), (Turn("policy", "12"),), StopReason.DONE, prompt_ids=(1,))
    with pytest.raises(DataError, match="no token ids"):
        scorer.step_scores([bare])
    homeless = Trajectory(Task("t", "q"), (Turn("policy", "7", tuple(policy.encode("7"))),), StopReason.DONE)
    with pytest.raises(DataError, match="no prompt ids"):
        scorer.step_scores([homeless])
    long = Trajectory(
        Task("t", "q"), (Turn("policy", "7" * 200, tuple(policy.encode("7")) * 200),), StopReason.DONE, prompt_ids=(1,)
    )
    with pytest.raises(DataError, match="201 tokens"):
        scorer.step_scores([long])
    with pytest.raises(CheckpointError, match="do not fit"):
        StepValue.from_policy(policy).load_state_dict(scorer.state_dict())
    with pytest.raises(DataError, match="must lie in"):
        Places((1, 2), (2,))


def test_a_diverged_scorer_keeps_its_weights(policy, solutions) -> None:
    scorer = StepValue.from_policy(policy, loss="mse")
    before = scorer.state_dict()
    with pytest.raises(TrainingError, match="not finite"):
        scorer.fit_places([Places((1, 2, 3), (2,))], torch.tensor([1e200], dtype=torch.float64))
    assert all(torch.equal(v, before[n]) for n, v in scorer.state_dict().items())


def test_reading_nothing(policy) -> None:
    assert list(read_states(policy, [])) == [] and list(read_states(policy, [Places((1, 2), ())])) == []
    scorer = StepValue.from_policy(policy)
    assert scorer.step_scores([]) == []
    nothing = Trajectory(Task("t", "q"), (), StopReason.ABORTED, prompt_ids=(1,))
    assert [len(s) for s in scorer.step_scores([nothing])] == [0] and [
        len(v) for v in scorer.prefix_values([nothing])
    ] == [1]


def test_reductions() -> None:
    s = torch.tensor([0.5, 0.2, 0.9], dtype=torch.float64)
    assert [reduce_scores(s, how) for how in ("min", "last", "mean", "sum")] == pytest.approx([0.2, 0.9, 1.6 / 3, 1.6])
    assert reduce_scores(s, "product") == pytest.approx(0.09)
    assert reduce_scores(torch.tensor([-0.5, 0.5]), "product") == pytest.approx(-0.25)
    assert reduce_scores(torch.full((300,), 0.1), "product") == pytest.approx(1e-300, rel=1e-4)
    assert math.isnan(reduce_scores(torch.zeros(0), "min"))
    with pytest.raises(ConfigError, match="reduce"):
        reduce_scores(s, "max")  # type: ignore[arg-type]


def test_a_step_reward_gives_steps_spans_tokens_and_the_verified_outcome(policy, solutions) -> None:
    two = [t for t in solutions if len(t.info["labels"]) == 3][:2] or solutions[:2]
    rows = [[0.5, -0.2, 0.9][: len(t.info["labels"])] + [0.1] * (len(t.info["labels"]) - 3) for t in two]
    reward = StepReward(
        Fixed(*rows), tokens=True, verifier=ChainCorrect(), answered=lambda task: task.id == two[0].task.id
    )
    first, second = reward(two)
    assert (
        first.steps == pytest.approx(rows[0])
        and first.step_spans == tuple(LINES.spans(two[0]))
        and first.value == min(rows[0])
    )
    assert [first.tokens[s.stop - 1] for s in first.step_spans or ()] == pytest.approx(rows[0])  # type: ignore[index]
    assert sum(x != 0 for x in first.tokens or ()) == len(rows[0])
    assert first.parts["verified"] == ChainCorrect()(two)[0].value and ("verified" in second.parts) == (
        two[0].task.id == two[1].task.id
    )


def test_step_rewards_refuse_what_does_not_fit(policy, solutions) -> None:
    with pytest.raises(ConfigError, match="step_scores"):
        StepReward(lambda t: t)
    with pytest.raises(ConfigError, match="reduce"):
        StepReward(Fixed(), reduce="max")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="verifier="):
        StepReward(Fixed(), answered=lambda task: True)
    with pytest.raises(RewardError, match="segmenter that it is given"):
        StepReward(Fixed([0.1]))(solutions[:1])
    with pytest.raises(RewardError, match="0 rows for 1"):
        StepReward(Fixed())(solutions[:1])
    silent = Trajectory(Task("t", "q"), (), StopReason.ABORTED, prompt_ids=(1,))
    with pytest.raises(RewardError, match="has no step"):
        StepReward(Fixed())([silent])
    assert StepReward(Fixed(), on_error="drop")([silent])[0].valid is False
    nan = StepReward(Fixed([math.nan] * len(solutions[0].info["labels"])), on_error="drop")(solutions[:1])
    assert nan[0].valid is False

    class Bare:
        def step_scores(self, trajectories, segmenter=None):
            return []

    with pytest.raises(ConfigError, match="segmenter"):
        StepReward(Bare())
    assert StepReward(Bare(), segmenter=Segmenter("turns")).segmenter.by == "turns"
    assert Span(0, 1)
