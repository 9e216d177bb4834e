"""The progress estimator and the rewards made of it: sums match returns, nothing is read too late, failures speak."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from guerdon.errors import ConfigError, DataError, RewardError, TrainingError
from guerdon.policies import tiny_policy
from guerdon.reward_models import PAPER_FIT, FitSettings, ProgressEstimator, ProgressReward, SentencePairs, TurnReward
from guerdon.types import Score, Segmenter, StopReason, Task, Trajectory, Turn

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:.*(outside|succeed)")

POLICY = tiny_policy(hidden=16, layers=1, heads=2, max_context=128)
QUICK = FitSettings(epochs=40, lr=1e-2, batch_size=16)


def agent(*said: str, task: str = "t", observations: str = "ok", tokens: bool = True, **info) -> Trajectory:
    """Policy turns with an observation behind each."""
    turns = []
    for text in said:
        ids = tuple(POLICY.encode(text)) if tokens else ()
        turns.append(Turn("policy", text, ids, (0.0,) * len(ids) if tokens else None))
        ids = tuple(POLICY.encode(observations)) if tokens else ()
        turns.append(Turn("environment", observations, ids))
    prompt = tuple(POLICY.encode("go: ")) if tokens else ()
    return Trajectory(Task(task, "go: "), tuple(turns), StopReason.DONE, prompt_ids=prompt, info=info)


class Letters:
    """Embeds a text by which of a few words it holds."""

    WORDS = ("good", "bad", "none", "seen", "go")

    def __init__(self):
        self.texts: list[str] = []

    def encode(self, texts):
        self.texts += list(texts)
        return np.array([[float(w in t) for w in self.WORDS] for t in texts], dtype=np.float32)


def additive(n: int, seed: int = 0) -> tuple[list[torch.Tensor], list[float]]:
    """Feature trajectories whose return is a sum over turns: 0.3 per turn with feature 0, -0.2 with feature 1."""
    rng = np.random.default_rng(seed)
    rows, returns = [], []
    for _ in range(n):
        turns = int(rng.integers(1, 6))
        x = np.zeros((turns, 3), dtype=np.float32)
        x[np.arange(turns), rng.integers(0, 3, turns)] = 1.0
        rows.append(torch.from_numpy(x))
        returns.append(float(0.3 * x[:, 0].sum() - 0.2 * x[:, 1].sum()))
    return rows, returns


def test_the_sum_of_contributions_learns_the_return_and_recovers_an_additive_truth():
    rows, returns = additive(200)
    estimator = ProgressEstimator(3, memory="none").fit(rows, returns, QUICK)
    assert estimator.report.heldout_mse < 1e-3 < estimator.report.variance
    assert estimator.predict(rows[0]) == pytest.approx(returns[0], abs=0.05)
    made = estimator.contributions(torch.eye(3))
    assert made.tolist() == pytest.approx([0.3, -0.2, 0.0], abs=0.05), "negative contributions are legal"


def test_the_prediction_is_the_sum_and_not_the_mean():
    """Twice the turns, twice the return: a mean could not tell them apart."""
    rows = [torch.ones(n, 1) for n in (1, 2, 3, 4) for _ in range(5)]
    estimator = ProgressEstimator(1, memory="none").fit(rows, [0.1 * len(r) for r in rows], QUICK)
    assert estimator.predict(torch.ones(4, 1)) == pytest.approx(0.4, abs=0.03)
    assert estimator.predict(torch.ones(1, 1)) == pytest.approx(0.1, abs=0.03)


def test_an_untrained_estimator_credits_nobody():
    assert ProgressEstimator(3).contributions(torch.randn(4, 3)).tolist() == [0.0] * 4
    assert ProgressEstimator(POLICY).contributions(agent("a", "b")).tolist() == [0.0, 0.0]
    assert ProgressEstimator(3).contributions([torch.ones(3)] * 2).shape == (2,), "a list of rows will do"
    assert ProgressEstimator(3).contributions(np.ones((2, 3))).shape == (2,)


def randomised(source, **options) -> ProgressEstimator:
    """An estimator whose last layer is not zero, so that values depend on what is read."""
    estimator = ProgressEstimator(source, **options)
    with torch.no_grad():
        torch.nn.init.normal_(estimator.head[-1].weight, generator=torch.Generator().manual_seed(1))
    return estimator


@pytest.mark.parametrize("memory", ["gru", "none"])
def test_contributions_of_features_depend_on_the_past_only(memory):
    estimator = randomised(3, memory=memory)
    x = torch.randn(5, 3)
    changed = x.clone()
    changed[3] += 1.0
    a, b = estimator.contributions(x), estimator.contributions(changed)
    assert torch.equal(a[:3], b[:3]) and a[3] != b[3]
    assert (a[4] != b[4]) == (memory == "gru")
    alone = [estimator.contributions(y) for y in (x, changed[:2])]
    batch = estimator([x, changed[:2], torch.zeros(0, 3)])
    for one, many in zip(alone, batch, strict=False):
        assert torch.allclose(one, many, atol=1e-6)
    assert batch[2].shape == (0,)


def reference_values(estimator: ProgressEstimator, trajectory: Trajectory) -> list[float]:
    """One forward pass without batching, read at the last token of each policy turn."""
    ids, ends = list(trajectory.prompt_ids), []
    for turn in trajectory.turns:
        ids += turn.token_ids
        if turn.speaker == "policy":
            ends.append(len(ids) - 1)
    with torch.no_grad():
        states = estimator.turns.trunk(input_ids=torch.tensor([ids])).last_hidden_state[0]
        if estimator.turns.vocabulary is not None:
            states = estimator.turns.vocabulary(states)
        return [float(estimator.head(states[e])) for e in ends]


@pytest.mark.parametrize("head", ["mlp", "linear", "logits"])
def test_a_policys_values_are_read_at_the_last_token_of_each_turn(head):
    estimator = randomised(POLICY, head=head)
    trajectories = [agent("take the key", "go"), agent("x"), agent("one two three four", "five", "six seven")]
    for trajectory, values in zip(trajectories, estimator(trajectories), strict=True):
        assert values.tolist() == pytest.approx(reference_values(estimator, trajectory), abs=1e-5)
        assert estimator.contributions(trajectory).tolist() == pytest.approx(values.tolist(), abs=1e-5)


def test_the_observation_behind_a_turn_is_not_seen_by_it_but_by_the_next():
    estimator = randomised(POLICY)
    a = estimator.contributions(agent("go", "stay", observations="you win"))
    b = estimator.contributions(agent("go", "stay", observations="you lose"))
    assert float(a[0]) == pytest.approx(float(b[0]), abs=1e-6)
    assert float(a[1]) != pytest.approx(float(b[1]), abs=1e-6)
    last = agent("go")
    without = replace(last, turns=last.turns[:1])
    assert torch.allclose(estimator.contributions(last), estimator.contributions(without))


def test_the_policy_is_copied_and_stays_as_it_is():
    before = {k: v.clone() for k, v in POLICY.model.state_dict().items()}
    trajectories = [agent("good move"), agent("bad idea")] * 3
    estimator = ProgressEstimator(POLICY)
    start = estimator.turns.trunk.embed_tokens.weight.clone()
    estimator.fit(trajectories, [1.0, 0.0] * 3, FitSettings(epochs=3, lr=1e-2))
    assert not torch.equal(start, estimator.turns.trunk.embed_tokens.weight)
    assert all(torch.equal(before[k], v) for k, v in POLICY.model.state_dict().items())
    frozen = ProgressEstimator(POLICY, train_trunk=False)
    frozen.fit(trajectories, [1.0, 0.0] * 3, FitSettings(epochs=3, lr=1e-2))
    assert torch.equal(start, frozen.turns.trunk.embed_tokens.weight)
    assert frozen.report.losses[-1] < frozen.report.losses[0]


def test_a_fitted_estimator_is_frozen():
    estimator = ProgressEstimator(3).fit(*additive(30), FitSettings(epochs=1))
    assert not any(p.requires_grad for p in estimator.parameters()) and not estimator.training


def test_an_encoder_sees_the_observation_before_each_turn_and_the_turn():
    encoder = Letters()
    estimator = ProgressEstimator(encoder, memory="none")
    encoder.texts.clear()
    estimator.contributions(agent("good", "bad", observations="seen it", tokens=False))
    assert encoder.texts == ["go:\ngood", "seen it\nbad"], "the last observation is never seen"
    first = Trajectory(
        Task("t", "go"), (Turn("environment", " Welcome."), Turn("policy", "hi"), Turn("policy", "ho")), StopReason.DONE
    )
    encoder.texts.clear()
    estimator.contributions(first)
    assert encoder.texts == ["go Welcome.\nhi", "\nho"]


def test_an_encoder_learns_which_turns_earn():
    said = [agent(*words, tokens=False) for words in (("good", "none"), ("none", "bad"), ("none",), ("good",))] * 5
    returns = [1.0, 0.0, 0.0, 1.0] * 5
    estimator = ProgressEstimator(Letters(), memory="none").fit(said, returns, QUICK)
    good, none = estimator.contributions(agent("good", "none", tokens=False)).tolist()
    assert good > 0.8 and abs(none) < 0.2


def test_sentence_pairs_count_sentences_the_turn_and_both_together():
    encoder = SentencePairs(100_003)
    both, turn, other = encoder.encode(["key here. door east.\ntake key", "take key", "door east. key here.\ntake key"])
    assert both.sum() == 5 and turn.sum() == 1, "two sentences, the turn, two pairs"
    assert (both * turn).sum() == 1 and np.array_equal(both, other), "the order of sentences does not matter"
    said, heard = encoder.encode(["go\nx", "x\ngo"])
    assert (said * heard).sum() == 0, "what is said and what is heard are different features"
    assert encoder.encode([]).shape == (0, 100_003)
    with pytest.raises(ConfigError, match="width"):
        SentencePairs(0)


def test_what_cannot_be_trained_on_is_left_out_and_reported():
    empty = Trajectory(Task("e", "go"), (Turn("environment", "hello", (3,)),), StopReason.DONE, prompt_ids=(1,))
    unreadable = agent("good", tokens=False)
    long = agent(*["go"] * 4)
    estimator = ProgressEstimator(POLICY, max_turns=3)
    with pytest.warns(UserWarning, match="3 trajectories were left out"):
        estimator.fit([agent("good"), agent("bad"), empty, unreadable, long], [1, 0, 1, 1, 1], FitSettings(epochs=1))
    report = estimator.report
    assert report.trained == 2 and report.heldout == 0 and math.isnan(report.heldout_mse)
    assert report.excluded["no turn of the policy"] == 1 and report.excluded["more than 3 turns"] == 1
    assert any("token ids" in reason for reason in report.excluded)
    assert estimator.contributions(empty).shape == (0,) and estimator.predict(empty) == 0.0


def test_held_out_trajectories_are_not_trained_on():
    rows, returns = additive(40)
    report = ProgressEstimator(3).fit(rows, returns, FitSettings(epochs=1, heldout=0.25)).report
    assert (report.trained, report.heldout) == (30, 10) and report.heldout_mse >= 0
    assert ProgressEstimator(3).fit(rows, returns, FitSettings(epochs=1, heldout=0)).report.heldout == 0
    assert ProgressEstimator(3).fit(rows[:19], returns[:19], FitSettings(epochs=1)).report.heldout == 0


def test_one_outcome_alone_warns_and_so_do_returns_outside_the_unit_interval():
    rows = [torch.ones(2, 1)] * 30
    with pytest.warns(UserWarning, match="100% of the trajectories succeed"):
        ProgressEstimator(1).fit(rows, [1.0] * 30, FitSettings(epochs=1))
    with pytest.warns(UserWarning, match="0% of the trajectories"):
        ProgressEstimator(1).fit(rows, [0.0] * 30, FitSettings(epochs=1))
    with pytest.warns(UserWarning, match="15 of 30 returns lie outside"):
        ProgressEstimator(1).fit(rows, [-1.0, 1.0] * 15, FitSettings(epochs=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ProgressEstimator(1).fit(rows, [0.0, 1.0] * 15, FitSettings(epochs=1))


def test_fit_refuses():
    estimator, rows = ProgressEstimator(1), [torch.ones(2, 1)] * 2
    for bad in (math.nan, math.inf):
        with pytest.raises(DataError, match="return of trajectory 1"):
            estimator.fit(rows, [1.0, bad])
    with pytest.raises(DataError, match="1 returns for 2"):
        estimator.fit(rows, [1.0])
    with pytest.raises(DataError, match="nothing to learn from"):
        estimator.fit([], [])
    with pytest.raises(DataError, match="nothing to learn from"):
        estimator.fit([torch.zeros(0, 1)], [1.0])
    with pytest.raises(DataError, match=r"\[T, 1\]"):
        estimator.fit([torch.ones(2, 3)], [1.0])
    with pytest.raises(DataError, match="NaN"):
        estimator.contributions(torch.tensor([[math.nan]]))
    with pytest.raises(DataError, match="expected"):
        estimator.contributions(agent("go"))
    with pytest.raises(TrainingError, match="loss is"):
        estimator.fit([torch.full((2, 1), 1e30)] * 2, [1e30, 0.0], FitSettings(epochs=3, lr=1e9, grad_clip=None))


def test_a_policy_refuses_what_it_cannot_read():
    estimator = ProgressEstimator(POLICY, max_tokens=12)
    with pytest.raises(DataError, match="no token ids"):
        estimator.contributions(agent("go", tokens=False))
    with pytest.raises(DataError, match="prompt_ids"):
        estimator.contributions(replace(agent("go"), prompt_ids=()))
    with pytest.raises(DataError, match="max_tokens=12"):
        estimator.contributions(agent("go " * 20))
    odd = Trajectory(Task("t", "x"), (Turn("policy", "?", (10**6,), (0.0,)),), StopReason.DONE, prompt_ids=(1,))
    with pytest.raises(DataError, match="another tokenizer"):
        estimator.contributions(odd)
    with pytest.raises(DataError, match="list"):
        estimator.contributions([1.0])


def test_a_long_prompt_loses_its_beginning():
    estimator = randomised(POLICY, max_tokens=12)
    base = agent("go", "on")
    long = replace(base, prompt_ids=tuple(POLICY.encode("a b c d e f g h i j k")) + base.prompt_ids)
    room = 12 - (len(long) - len(long.turns[-1]))
    cut = replace(base, prompt_ids=long.prompt_ids[-room:])
    assert torch.allclose(estimator.contributions(long), estimator.contributions(cut), atol=1e-6)


@pytest.mark.parametrize(
    "source, options, said",
    [
        ("minilm", {}, "source"),
        (True, {}, "source"),
        (3, {"head": "logits"}, "policy"),
        (3, {"head": "tree"}, "head"),
        (3, {"memory": "lstm"}, "memory"),
        (3, {"hidden": 0}, "hidden"),
        (3, {"max_turns": 0}, "max_turns"),
    ],
)
def test_a_wrong_setting_is_named(source, options, said):
    with pytest.raises(ConfigError, match=said):
        ProgressEstimator(source, **options)


@pytest.mark.parametrize(
    "name, value",
    [("epochs", 0), ("lr", 0.0), ("lr", math.nan), ("batch_size", 0), ("accumulation", 0), ("warmup", -1),
     ("weight_decay", -0.1), ("heldout", 1.0), ("grad_clip", 0.0)],
)  # fmt: skip
def test_fit_settings_refuse(name, value):
    with pytest.raises(ConfigError, match=name):
        FitSettings(**{name: value})


def test_the_papers_settings():
    assert (PAPER_FIT.lr, PAPER_FIT.weight_decay, PAPER_FIT.warmup, PAPER_FIT.grad_clip) == (3e-6, 0.01, 500, 1.0)
    assert (PAPER_FIT.epochs, PAPER_FIT.batch_size, PAPER_FIT.accumulation, PAPER_FIT.bf16) == (1, 2, 2, True)
    estimator = ProgressEstimator(POLICY).fit([agent("good"), agent("bad")] * 2, [1.0, 0.0] * 2, PAPER_FIT)
    assert math.isfinite(estimator.report.mse)


def test_accumulated_gradients_are_those_of_one_batch():
    rows, returns = additive(24)
    made = []
    for batch, accumulation in ((8, 1), (2, 4)):
        estimator = ProgressEstimator(3, seed=5)
        estimator.fit(rows, returns, FitSettings(epochs=2, batch_size=batch, accumulation=accumulation, heldout=0))
        made.append(estimator.contributions(rows[0]))
    assert torch.allclose(*made, atol=1e-5)


def test_the_same_seed_gives_the_same_estimator():
    rows, returns = additive(30)
    state = torch.random.get_rng_state()
    a, b = (ProgressEstimator(3, seed=2).fit(rows, returns, FitSettings(epochs=2)) for _ in range(2))
    assert torch.equal(a.contributions(rows[0]), b.contributions(rows[0]))
    assert torch.equal(state, torch.random.get_rng_state()), "the global random state is left alone"


def test_step_scores_and_token_rewards():
    estimator = randomised(POLICY)
    trajectories = [agent("take key", "go on now"), agent("x")]
    for trajectory, steps, row in zip(
        trajectories, estimator.step_scores(trajectories), estimator.token_rewards(trajectories), strict=True
    ):
        spans = Segmenter("turns").spans(trajectory)
        assert len(row) == len(trajectory)
        assert [float(row[s.stop - 1]) for s in spans] == pytest.approx(steps.tolist())
        assert float(row.sum()) == pytest.approx(float(steps.sum()), abs=1e-5)
    features = ProgressEstimator(3)
    with pytest.raises(DataError, match="whole turns"):
        features.step_scores([torch.ones(2, 3)], Segmenter("lines"))
    lines = Segmenter("callable", cut=lambda text: [2])
    cut = replace(agent("abcd"), turns=(Turn("policy", "abcd", (70, 71, 72, 73), (0.0,) * 4, (1, 2, 3, 4)),))
    assert [len(s) for s in estimator.step_scores([cut], lines)] == [2]


# Rewards --------------------------------------------------------------------------------------------------------------


def win(trajectories):
    return [Score(float(t.info.get("win", 0)), parts={"seen": 1.0}) for t in trajectories]


class Split:
    """Stands for a fitted estimator: 0.6 on the first turn, 0.1 on all others."""

    def __init__(self):
        self.fitted = []

    def contributions(self, trajectory):
        n = sum(t.speaker == "policy" for t in trajectory.turns)
        return torch.tensor([0.6, *[0.1] * (n - 1)][:n])

    def step_scores(self, trajectories):
        return [self.contributions(t) for t in trajectories]

    def predict(self, trajectory):
        return float(self.contributions(trajectory).sum())

    def fit(self, trajectories, returns, settings=None):
        self.fitted.append((list(trajectories), list(returns)))

    def state_dict(self):
        return {"w": torch.ones(1)}

    def load_state_dict(self, state):
        assert torch.equal(state["w"], torch.ones(1))


def test_step_rewards_are_fused_and_the_outcome_is_not_paid_again():
    trajectory = agent("a", "b", "c", observations="Nothing happens.", win=1)
    score = ProgressReward(Split(), win)([trajectory])[0]
    assert score.value == 1.0
    assert score.steps == pytest.approx((0.6, 0.1, 0.1 + 0.5)), "rejected, rejected, and the last counts as executed"
    assert score.step_spans == tuple(Segmenter("turns").spans(trajectory))
    assert score.parts == pytest.approx({"seen": 1.0, "contribution": 0.8, "grounding": 0.0})
    plain = ProgressReward(Split(), win, beta=0.0, alpha=2.0)([trajectory])[0]
    assert plain.steps == pytest.approx((1.2, 0.2, 0.2))


def test_exact_makes_the_contributions_sum_to_the_outcome():
    for won in (0, 1):
        score = ProgressReward(Split(), win, exact=True, beta=0.0)([agent("a", "b", win=won)])[0]
        assert sum(score.steps) == pytest.approx(won, abs=1e-6)
        assert score.steps[0] - score.steps[1] == pytest.approx(0.5)


def test_a_table_tells_what_each_turn_was_paid():
    rows = ProgressReward(Split(), win).table(agent("a", "b", observations="Nothing happens.", win=1))
    assert [(r.turn, r.text, r.grounding) for r in rows] == [(0, "a", 0.0), (2, "b", 1.0)]
    assert [r.reward for r in rows] == pytest.approx([0.6, 0.6])
    assert [r.contribution for r in rows] == pytest.approx([0.6, 0.1])


def test_any_contributions_can_be_paid():
    terminal = TurnReward(win, lambda t, r: [0.0] * (len(t.turns) // 2 - 1) + [r], beta=0.0)
    assert terminal([agent("a", "b", win=1)])[0].steps == (0.0, 1.0)
    assert terminal.gives == {"outcome", "steps"}


def test_a_failure_is_an_invalid_score_with_a_reason():
    wrong = TurnReward(win, lambda t, r: [1.0], on_error="drop")
    scores = wrong([agent("a", "b"), agent("a")])
    assert not scores[0].valid and "1 contributions for 2 turns" in scores[0].reason and scores[1].valid
    with pytest.raises(RewardError, match="1 contributions for 2 turns"):
        TurnReward(win, lambda t, r: [1.0])([agent("a", "b")])
    nan = TurnReward(win, lambda t, r: [math.nan], on_error="drop")([agent("a")])[0]
    assert not nan.valid and "NaN" in nan.reason
    text = ProgressReward(Split(), win, on_error="drop")([agent("a", tokens=False)])[0]
    assert not text.valid and "token ids" in text.reason
    invalid = ProgressReward(Split(), lambda ts: [Score.invalid("no")] * len(ts), on_error="drop")([agent("a")])[0]
    assert not invalid.valid and invalid.reason == "no"
    with pytest.raises(ConfigError, match="beta"):
        ProgressReward(Split(), win, beta=math.nan)
    with pytest.raises(ConfigError, match="refit_every"):
        ProgressReward(Split(), win, refit_every=0)


def test_a_trajectory_that_cannot_be_read_does_not_take_the_others_with_it():
    estimator = randomised(POLICY)
    reward = ProgressReward(estimator, win, on_error="drop")
    good, bad = agent("a", "b"), agent("a", tokens=False)
    scores = reward([good, bad])
    assert scores[0].valid and not scores[1].valid
    assert scores[0].steps == pytest.approx(reward([good])[0].steps, abs=1e-5)


def test_a_trajectory_without_a_turn_has_no_steps():
    empty = Trajectory(Task("e", "go"), (), StopReason.DONE, prompt_ids=(1,), info={"win": 1})
    score = ProgressReward(Split(), win)([empty])[0]
    assert score.steps == () and score.value == 1.0 and "grounding" not in score.parts


def test_refits_happen_on_the_declared_schedule_only_and_survive_a_restart():
    estimator = Split()
    never = ProgressReward(estimator, win)
    for _ in range(3):
        never([agent("a", win=1)])
    assert estimator.fitted == [] and never.state_dict() == {}
    reward = ProgressReward(estimator, win, refit_every=2, refit_on=3)
    reward([agent("a", win=1), agent("b")])
    assert estimator.fitted == []
    state = reward.state_dict()
    resumed = ProgressReward(estimator, win, refit_every=2, refit_on=3)
    resumed.load_state_dict(state)
    resumed([agent("c", "d", win=1), agent("e")])
    ((trajectories, returns),) = estimator.fitted
    assert [t.turns[0].text for t in trajectories] == ["b", "c", "e"] and returns == [0.0, 1.0, 0.0]
    assert trajectories[0].turns[0].token_ids == agent("b").turns[0].token_ids
    assert trajectories[0].prompt_ids == agent("b").prompt_ids


def test_the_state_of_a_refitted_reward_can_be_saved(tmp_path):
    from guerdon.training.checkpoint import load_state, save_state

    reward = ProgressReward(ProgressEstimator(POLICY), win, refit_every=5)
    reward([agent("a", win=1)])
    save_state(tmp_path / "state", reward.state_dict())
    other = ProgressReward(ProgressEstimator(POLICY, seed=3), win, refit_every=5)
    other.load_state_dict(load_state(tmp_path / "state"))
    assert torch.equal(other.estimator.head[0].weight, reward.estimator.head[0].weight)
