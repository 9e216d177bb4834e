"""Scalar reward models: losses by hand, fits with known answers, reading, saving."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from guerdon.errors import CheckpointError, ConfigError, DataError, RewardError, TrainingError
from guerdon.policies import tiny_policy, train_bpe
from guerdon.reward_models import (
    BradleyTerry,
    EncoderFeatures,
    FeatureTrunk,
    GruTrunk,
    PolicyTrunk,
    Preference,
    ScalarRewardModel,
    bt_loss,
    masked_regression_loss,
    preference_loss,
)
from guerdon.types import StopReason, Task, Trajectory, Turn

torch.set_num_threads(1)


def ls(z: float) -> float:
    return -math.log1p(math.exp(-z))


RC, RR = [1.0, -0.5, 2.0], [0.0, 0.5, 2.0]
GAPS = [1.0, -1.0, 0.0]


def tensors(*rows):
    return [torch.tensor(row, dtype=torch.float64) for row in rows]


# Losses --------------------------------------------------------------------------------------------------------------


def test_plain_soft_and_margin_losses_by_hand():
    rc, rr = tensors(RC, RR)
    assert preference_loss(rc, rr).item() == pytest.approx(-np.mean([ls(g) for g in GAPS]))
    p, m = [1.0, 0.25, 0.5], [0.5, -1.0, 0.0]
    expected = -np.mean([q * ls(g - x) + (1 - q) * ls(x - g) for g, q, x in zip(GAPS, p, m, strict=True)])
    assert preference_loss(rc, rr, p=tensors(p)[0], margin=tensors(m)[0]).item() == pytest.approx(expected)
    assert preference_loss(rc, rr, p=0.5).item() == pytest.approx(-np.mean([0.5 * (ls(g) + ls(-g)) for g in GAPS]))
    assert preference_loss(*tensors([], [])).item() == 0.0


def test_strengths_by_hand_and_nothing_is_divided_by_their_sum():
    rc, rr = tensors(RC, RR)
    m = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    pairs = list(zip(GAPS, [1, 2, 3], strict=True))
    assert bt_loss(rc, rr, m).item() == pytest.approx(-np.mean([s * ls(g) for g, s in pairs]))
    assert bt_loss(rc, rr, -m).item() == bt_loss(rc, rr, m).item()
    assert bt_loss(rc, rr, m, "margin").item() == pytest.approx(-np.mean([ls(g - s) for g, s in pairs]))
    assert bt_loss(rc, rr, m, "regular").item() == bt_loss(rc, rr).item() == preference_loss(rc, rr).item()
    repeated = bt_loss(rc.repeat_interleave(m.long()), rr.repeat_interleave(m.long()), kind="regular")
    assert bt_loss(rc, rr, m).item() == pytest.approx(repeated.item() * 6 / 3)


def test_gradient_of_the_scaled_loss():
    rc, rr = torch.tensor([0.3], requires_grad=True), torch.tensor([0.1])
    bt_loss(rc, rr, torch.tensor([3.0])).backward()
    assert rc.grad.item() == pytest.approx(-3 / (1 + math.exp(0.2)))


def test_losses_are_finite_however_far_scores_lie_apart():
    rc, rr = torch.tensor([1e4, -1e4]), torch.tensor([-1e4, 1e4])
    assert bt_loss(rc, rr).item() == pytest.approx(1e4)
    assert preference_loss(rc, rr, p=0.5).item() == pytest.approx(1e4)


def test_losses_refuse_what_does_not_fit():
    rc, rr = tensors(RC, RR)
    with pytest.raises(ConfigError, match="needs strength"):
        bt_loss(rc, rr, kind="margin")
    with pytest.raises(ConfigError, match="kind must be"):
        bt_loss(rc, rr, kind="hinge")
    with pytest.raises(ValueError, match=r"one \[N\] each"):
        preference_loss(rc, rr[:2])
    with pytest.raises(ValueError, match="differ in shape"):
        preference_loss(rc, rr, margin=torch.zeros(2))
    with pytest.raises(ValueError, match="probability"):
        preference_loss(rc, rr, p=1.5)


def test_absent_labels_are_never_numbers():
    pred = torch.tensor([[1.0, 9.0], [3.0, 5.0]], requires_grad=True)
    label = torch.tensor([[2.0, -100.0], [float("nan"), 4.0]])
    loss = masked_regression_loss(pred, label)
    assert loss.item() == pytest.approx((1 + 1) / 2)
    loss.backward()
    assert pred.grad[0, 1] == 0 and pred.grad[1, 0] == 0
    with pytest.raises(DataError, match="nothing to fit"):
        masked_regression_loss(pred, torch.full((2, 2), -100.0))
    with pytest.raises(ValueError, match="differ in shape"):
        masked_regression_loss(pred, torch.zeros(2))


# Fits with known answers ----------------------------------------------------------------------------------------------


def columns(items):
    return np.asarray(items, dtype=np.float32)


def linear(**options) -> BradleyTerry:
    return BradleyTerry(FeatureTrunk(columns, 2, hidden=()), **options)


def test_a_linear_model_finds_the_logit_of_the_win_rate():
    # One feature wins three times in four: its weight is log 3.
    a, b = (1.0, 0.0), (0.0, 0.0)
    pairs = [(a, b)] * 3 + [(b, a)]
    model = linear().fit(pairs, epochs=120, batch_size=4, lr=0.2)
    gap = model.score([a]) - model.score([b])
    assert gap.item() == pytest.approx(math.log(3), abs=1e-2)
    assert model.probability([a], [b]).item() == pytest.approx(0.75, abs=1e-2)
    assert len(model.history) == 120


def test_soft_labels_and_ties_have_the_same_answer():
    a, b = (1.0, 0.0), (0.0, 0.0)
    soft = linear().fit([Preference(a, b, label=0.75)], epochs=120, lr=0.2)
    assert soft.probability([a], [b]).item() == pytest.approx(0.75, abs=1e-2)
    tied = linear().fit([Preference(a, b), Preference(a, b, label=0.5)], epochs=120, lr=0.2)
    assert tied.probability([a], [b]).item() == pytest.approx(0.75, abs=1e-2)
    assert linear(ties="drop").fit([Preference(a, b, label=0.5), (a, b)], epochs=2, batch_size=1).history.__len__() == 2
    with pytest.raises(DataError, match="nothing to fit"):
        linear(ties="drop").fit([Preference(a, b, label=0.5)])


def test_smoothing_margin_and_strength_move_the_answer_as_they_should():
    a, b = (1.0, 0.0), (0.0, 0.0)
    smooth = linear(smoothing=0.1).fit([(a, b)], epochs=150, lr=0.2)
    assert smooth.probability([a], [b]).item() == pytest.approx(0.9, abs=1e-2)
    # p log s(g - m) + (1 - p) log s(m - g) is best at g = m + logit p
    margin = linear().fit([Preference(a, b, label=0.75, margin=2.0)], epochs=150, lr=0.2)
    assert (margin.score([a]) - margin.score([b])).item() == pytest.approx(2 + math.log(3), abs=2e-2)
    scaled = linear(kind="scaled").fit([Preference(a, b, strength=3.0), Preference(b, a)], epochs=150, lr=0.2)
    assert scaled.probability([a], [b]).item() == pytest.approx(0.75, abs=1e-2)
    added = linear(kind="margin").fit([Preference(a, b, label=0.5, strength=2.0)], epochs=150, lr=0.2)
    assert (added.score([a]) - added.score([b])).item() == pytest.approx(2.0, abs=2e-2)


def test_regularisation_pulls_scores_to_zero():
    a, b = (1.0, 0.0), (0.0, 1.0)
    free = linear().fit([(a, b)], epochs=60, lr=0.1).score([a])
    held = linear(regularisation=0.1).fit([(a, b)], epochs=60, lr=0.1).score([a])
    assert 0 < held.item() < free.item()


def test_ratings_are_fitted_by_least_squares_and_the_head_is_kept():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 2)).astype(np.float32)
    y = 2 * x[:, 0] - x[:, 1] + 0.5
    model = linear().fit_ratings(list(x), y, epochs=150, batch_size=60, lr=0.2)
    np.testing.assert_allclose(model.score([(1, 0), (0, 1), (0, 0)]), [2.5, -0.5, 0.5], atol=1e-2)
    before = model.model.head.weight.detach().clone()
    model.fit([((1, 0), (0, 1))], lr=1e-4)
    assert float((model.model.head.weight.detach() - before).abs().max()) < 1e-3


def test_several_attributes_with_absent_labels():
    model = BradleyTerry(ScalarRewardModel(FeatureTrunk(columns, 2, hidden=()), 3), output=1)
    x = [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0)]
    labels = [[1.0, 4.0, -100.0], [2.0, -100.0, -100.0], [0.0, 1.0, math.nan]]
    model.fit_ratings(x, labels, epochs=200, lr=0.2)
    made = model.attributes(x)
    np.testing.assert_allclose(made[:, 0], [1.0, 2.0, 0.0], atol=0.02)
    assert model.score(x)[[0, 2]] == pytest.approx([4.0, 1.0], abs=0.02)
    with pytest.raises(DataError, match="nothing to fit"):
        model.fit_ratings(x, [[-100.0] * 3] * 3)
    with pytest.raises(DataError, match="labels have shape"):
        model.fit_ratings(x, [[1.0, 2.0]] * 3)


def test_micro_batches_change_nothing_but_memory():
    rng = np.random.default_rng(1)
    pairs = [(tuple(rng.normal(size=2)), tuple(rng.normal(size=2))) for _ in range(12)]
    whole, parts = linear(), linear(max_tokens=4)
    whole.fit(pairs, batch_size=6, epochs=2)
    parts.fit(pairs, batch_size=6, epochs=2)
    np.testing.assert_allclose(whole.history, parts.history, rtol=1e-5)
    np.testing.assert_allclose(whole.score([(1, 1)]), parts.score([(1, 1)]), rtol=1e-4)


def test_the_same_seed_gives_the_same_model_and_the_global_generator_is_left_alone():
    pairs = [((1, 0), (0, 1)), ((1, 1), (0, 0)), ((0, 0), (0, 1))]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    a, b = (linear().fit(pairs, batch_size=1, epochs=3, seed=7) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert a.history == b.history and a.score([(1, 0)]) == b.score([(1, 0)])


def test_accuracy_is_strict_and_leaves_ties_out():
    model = linear()
    with torch.no_grad():
        model.model.head.weight.copy_(torch.tensor([[1.0, 0.0]]))
    pairs = [((1, 0), (0, 0)), ((0, 0), (1, 0)), ((1, 0), (1, 5)), Preference((0, 0), (1, 0), label=0.1)]
    assert model.accuracy([*pairs, Preference((1, 0), (0, 0), label=0.5)]) == 0.5
    assert math.isnan(model.accuracy([]))


def test_calibration_standardises():
    model = linear()
    with torch.no_grad():
        model.model.head.weight.copy_(torch.tensor([[2.0, 0.0]]))
    model.calibrate([(0, 0), (1, 0), (2, 0)])
    out = model.score([(0, 0), (1, 0), (2, 0)])
    assert out.mean() == pytest.approx(0) and out.std() == pytest.approx(1)
    with pytest.raises(DataError, match="two items"):
        model.calibrate([(0, 0)])


@pytest.mark.parametrize(
    "options",
    [{"kind": "hinge"}, {"ties": "both"}, {"smoothing": 0.5}, {"regularisation": -1}, {"output": 1}, {"max_tokens": 0}],
)
def test_settings_out_of_range(options):
    with pytest.raises(ConfigError):
        linear(**options)


def test_preferences_and_fits_refuse_nonsense():
    for values in ({"label": 1.5}, {"margin": math.nan}, {"strength": -1.0}):
        with pytest.raises(DataError):
            Preference((0, 0), (0, 0), **values)
    with pytest.raises(DataError, match="no pairs"):
        linear().fit([])
    with pytest.raises(ConfigError, match="must be positive"):
        linear().fit([((0, 0), (1, 1))], epochs=0)
    with pytest.raises(DataError, match="features returned shape"):
        linear().score([(1.0, 2.0, 3.0)])
    with pytest.raises(DataError, match="NaN or infinite"):
        linear().score([(1.0, math.nan)])
    model = linear()
    with torch.no_grad():
        model.model.head.weight.fill_(math.nan)
    with pytest.raises(TrainingError, match="no weight was changed"):
        model.fit([((0, 0), (1, 1))])


# Reading tokens ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy():
    words = [" good", " bad", " so"]
    return tiny_policy(train_bpe(["say"], 300, atoms=(), words=words), hidden=16, layers=1, heads=2, max_context=48)


def trajectory(policy, text: str, prompt: str = "say") -> Trajectory:
    task = Task("t", prompt)
    ids = (*policy.encode(text), policy.tokenizer.eos_token_id)
    turn = Turn("policy", text, ids, (0.0,) * len(ids))
    return Trajectory(task, (turn,), StopReason.EOS, prompt_ids=tuple(policy.render(task.prompt)))


@pytest.mark.parametrize("trunk", [PolicyTrunk, lambda p: GruTrunk(p, width=16)])
def test_a_token_trunk_reads_the_last_token_whatever_stands_beside_it(policy, trunk):
    model = BradleyTerry(trunk(policy))
    items = [trajectory(policy, t) for t in (" good", " bad so so so so", " so")]
    together, alone = model.score(items), [model.score([i]).item() for i in items]
    np.testing.assert_allclose(together, alone, atol=1e-6)
    np.testing.assert_allclose(model.score(items[::-1]), together[::-1], atol=1e-6)
    np.testing.assert_allclose(model.score([("say", " good")]), together[:1], atol=1e-6)
    assert model.score([]).shape == (0,)


@pytest.mark.parametrize("trunk", [PolicyTrunk, lambda p: GruTrunk(p, width=16)])
def test_it_learns_which_word_is_preferred(policy, trunk):
    pairs = [(trajectory(policy, " good" + s), trajectory(policy, " bad" + s)) for s in ("", " so", " so so")]
    model = BradleyTerry(trunk(policy)).fit(pairs * 4, epochs=6, batch_size=4, lr=5e-3)
    assert model.accuracy(pairs) == 1.0 and model.history[-1] < model.history[0]
    assert model.accuracy([(("say", " good so so so"), ("say", " bad so so so"))]) == 1.0


def test_the_policy_is_left_alone_and_may_be_frozen(policy):
    before = {k: v.clone() for k, v in policy.model.state_dict().items()}
    pairs = [(("say", " good"), ("say", " bad"))]
    BradleyTerry(policy).fit(pairs, lr=1e-2)
    assert all(torch.equal(v, before[k]) for k, v in policy.model.state_dict().items())
    frozen = BradleyTerry(PolicyTrunk(policy, train=False))
    trunk = {k: v.clone() for k, v in frozen.model.trunk.state_dict().items()}
    head = frozen.model.head.weight.clone()
    frozen.fit(pairs, lr=1e-2)
    assert all(torch.equal(v, trunk[k]) for k, v in frozen.model.trunk.state_dict().items())
    assert not torch.equal(head, frozen.model.head.weight)
    only = BradleyTerry(policy).fit(pairs, lr=1e-2, head_only=True)
    assert all(torch.equal(v, trunk[k]) for k, v in only.model.trunk.state_dict().items())


def test_what_cannot_be_read_is_named(policy):
    model = BradleyTerry(policy)
    empty = Trajectory(Task("blank", "say"), (), StopReason.EOS, prompt_ids=(1,))
    with pytest.raises(DataError, match="response to task 'blank' is empty"):
        model.score([empty])
    with pytest.raises(DataError, match="outside the vocabulary"):
        model.score([Trajectory(Task("x", "say"), (Turn("policy", "?", (10**6,)),), StopReason.EOS, prompt_ids=(1,))])
    with pytest.raises(DataError, match="more than the 48"):
        model.score([("say", " so" * 60)])
    with pytest.raises(DataError, match="no token ids"):
        model.score([Trajectory(Task("x", "say"), (Turn("policy", "words"),), StopReason.EOS, prompt_ids=(1,))])
    with pytest.raises(DataError, match="trajectory or a pair"):
        model.score(["words"])
    with pytest.raises(ConfigError, match="by must be"):
        PolicyTrunk(policy, by="bytes")


def test_text_is_read_where_the_ids_are_another_tokenizers(policy):
    model = BradleyTerry(PolicyTrunk(policy, by="text"))
    foreign = Trajectory(Task("t", "say"), (Turn("policy", " good", (10**6,)),), StopReason.EOS, prompt_ids=(7,))
    np.testing.assert_allclose(model.score([foreign]), model.score([("say", " good")]))


class Letters:
    """Stands in for a sentence encoder: counts of a and b."""

    def encode(self, texts):
        return np.array([[t.count("a"), t.count("b")] for t in texts], dtype=np.float32)


def test_a_frozen_encoder_serves_as_trunk():
    features = EncoderFeatures(Letters(), width=2)
    model = BradleyTerry(FeatureTrunk(features, features.inputs, hidden=()))
    pairs = [(("p", "aa"), ("p", "bb")), (("pa", "a"), ("pa", "b"))]
    model.fit(pairs, epochs=40, lr=0.1)
    item = Trajectory(Task("t", "pa"), (Turn("policy", "aab"),), StopReason.DONE)
    assert features([item, ("x", "b")]).tolist() == [[1, 0, 2, 1], [0, 0, 0, 1]]
    assert model.accuracy(pairs) == 1.0 and model.score([item]) > model.score([("pa", "b")])
    for bad in (("p", " "), ("p", 3)):
        with pytest.raises(DataError):
            model.score([bad])


# As a reward, and on disk ------------------------------------------------------------------------------------------------


def test_the_reward_scores_trajectories_and_names_what_it_cannot_read(policy):
    model = BradleyTerry(policy)
    items = [trajectory(policy, " good"), trajectory(policy, " bad")]
    assert [s.value for s in model.reward()(items)] == pytest.approx(model.score(items).tolist())
    empty = Trajectory(Task("blank", "say"), (), StopReason.EOS, prompt_ids=(1,))
    with pytest.raises(RewardError, match="blank"):
        model.reward()([*items, empty])
    out = model.reward(on_error="drop")([items[0], empty])
    assert out[0].valid and not out[1].valid and "'blank' is empty" in out[1].reason
    assert model.reward()([]) == []


@pytest.mark.parametrize("kind", ["policy", "gru", "features", "linear"])
def test_a_saved_model_says_the_same(policy, tmp_path, kind):
    trunk = {
        "policy": lambda: PolicyTrunk(policy),
        "gru": lambda: GruTrunk(policy, width=8, seed=3),
        "features": lambda: FeatureTrunk(columns, 2, hidden=(4,), seed=3),
        "linear": lambda: FeatureTrunk(columns, 2, hidden=()),
    }[kind]()
    pairs = [((1, 0), (0, 1))] if kind in ("features", "linear") else [(("say", " good"), ("say", " bad"))]
    items = [pairs[0][0], pairs[0][1]]
    model = BradleyTerry(trunk, kind="scaled", smoothing=0.05).fit(pairs, lr=1e-2).calibrate(items)
    for _ in range(2):
        model.save(tmp_path / "rm")
    again = BradleyTerry.load(tmp_path / "rm", policy=policy, features=columns)
    np.testing.assert_allclose(again.score(items), model.score(items), atol=1e-6)
    assert (again.kind, again.smoothing, again.std) == ("scaled", 0.05, model.std)
    assert [p.name for p in tmp_path.iterdir()] == ["rm"]
    if kind in ("gru", "features"):
        with pytest.raises(ConfigError, match="give"):
            BradleyTerry.load(tmp_path / "rm")


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="holds no reward model"):
        BradleyTerry.load(tmp_path)
    (tmp_path / "reward_model.json").write_text(json.dumps({"trunk": {}}))
    with pytest.raises(CheckpointError, match="holds no reward model"):
        BradleyTerry.load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        linear().save(tmp_path / "file" / "rm")
