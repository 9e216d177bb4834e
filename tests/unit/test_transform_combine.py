"""Log-sigmoid centred rewards and their conjunction, against hand computation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from guerdon.errors import ConfigError, DataError, RewardError
from guerdon.shaping import (
    AllGood,
    AllGoodScores,
    LogSigmoidCentered,
    RewardCombiner,
    RewardTransform,
    all_good,
    best_of_k_kl,
    log_sigmoid_centred,
    shape,
    shaped,
)
from guerdon.types import Score, Span, StopReason, Task, Trajectory, Turn

torch.set_num_threads(1)

F64 = torch.float64


def lsc(r: float, ref: float, k: float = 1.0) -> float:
    return -math.log1p(math.exp(-k * (r - ref)))


def fitted(**settings) -> LogSigmoidCentered:
    return LogSigmoidCentered(**settings).fit(["x", "y"], {"x": [0.0, 1.0, 2.0, 3.0], "y": [5.0, 5.5]})


def test_values_sign_and_slope():
    z = torch.tensor([-3.0, 0.0, 2.0], dtype=F64, requires_grad=True)
    out = log_sigmoid_centred(z, 1.0)
    np.testing.assert_allclose(out.detach(), [lsc(r, 1.0) for r in (-3.0, 0.0, 2.0)], atol=1e-15)
    assert bool((out < 0).all()) and out[2] > out[1] > out[0]
    out.sum().backward()
    np.testing.assert_allclose(z.grad, [1 / (1 + math.exp(r - 1.0)) for r in (-3.0, 0.0, 2.0)], atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_extreme_differences_are_exact(dtype):
    out = log_sigmoid_centred(torch.tensor([-1e4, 1e4], dtype=dtype), 0.0)
    assert out[0].item() == -1e4 and abs(out[1].item()) == 0.0 and out.dtype == dtype


def test_reference_is_a_constant():
    ref = torch.zeros(1, dtype=F64, requires_grad=True)
    r = torch.zeros(1, dtype=F64, requires_grad=True)
    log_sigmoid_centred(r, ref).sum().backward()
    assert ref.grad is None and r.grad.item() == 0.5


def test_the_reference_is_each_prompts_own_linear_quantile():
    made = fitted()
    assert made.references["x"] == pytest.approx(2.55)  # position 0.85 * 3
    assert made.references["y"] == pytest.approx(5.425)
    out = made.transform(torch.tensor([1.0, 1.0], dtype=F64), ["y", "x"])
    np.testing.assert_allclose(out, [lsc(1.0, 5.425), lsc(1.0, 2.55)], atol=1e-12)


def test_the_gaussian_estimator_and_a_single_sample():
    made = LogSigmoidCentered(estimator="gaussian", q=0.85).fit(["x", "y"], {"x": [0.0, 1.0, 5.0], "y": [4.0]})
    assert made.references["x"] == pytest.approx(2.0 + norm.ppf(0.85) * np.std([0, 1, 5], ddof=1))
    assert made.references["y"] == 4.0
    assert LogSigmoidCentered().fit(["y"], {"y": [4.0]}).references["y"] == 4.0


def test_mean_and_canned_references():
    assert LogSigmoidCentered("mean").fit(["x"], {"x": [0.5, 2.0]}).references["x"] == 1.25
    canned = LogSigmoidCentered("value").fit(["x", "y"], {"x": -1.5, "y": [0.25]})
    assert canned.references == {"x": -1.5, "y": 0.25}
    with pytest.raises(DataError, match="one reward per prompt, got 2"):
        LogSigmoidCentered("value").fit(["x"], {"x": [1.0, 2.5]})


def test_a_matrix_is_read_in_the_order_of_the_prompts():
    matrix = torch.tensor([[0.5, 1.5], [2.5, 4.5]], dtype=F64)
    made = LogSigmoidCentered("mean").fit(["b", "a"], matrix)
    assert made.references == {"b": 1.0, "a": 3.5}
    with pytest.raises(DataError, match="2 rows of base rewards for 1 prompts"):
        LogSigmoidCentered().fit(["a"], matrix)


def test_scale_is_a_steepness():
    out = LogSigmoidCentered(scale=4.0).transform(torch.tensor([1.0], dtype=F64), reference=0.5)
    assert out.item() == pytest.approx(lsc(1.0, 0.5, 4.0))


def test_prompts_without_samples_need_an_explicit_fallback():
    with pytest.raises(DataError, match=r"1 prompt\(s\) have no base-policy rewards, the first 'y'"):
        LogSigmoidCentered().fit(["x", "y"], {"x": [1.5], "y": []})
    with pytest.raises(DataError, match="no reference was fitted for prompt 'z'"):
        fitted().transform(torch.zeros(1), ["z"])
    number = LogSigmoidCentered(fallback=0.25).fit(["x", "y"], {"x": [1.5]})
    assert number.reference_of("y") == number.reference_of("never seen") == 0.25
    pooled = LogSigmoidCentered("mean", fallback="pooled").fit(["x", "y"], {"x": [1.5, 0.0], "y": [3.0]})
    assert pooled.reference_of("z") == 1.5


def test_prompts_or_reference_but_not_both():
    made = fitted()
    for arguments in ({}, {"prompts": ["x"], "reference": 0.0}):
        with pytest.raises(ConfigError, match="exactly one"):
            made.transform(torch.zeros(1), **arguments)
    with pytest.raises(ConfigError, match="call fit"):
        LogSigmoidCentered().transform(torch.zeros(1), ["x"])
    with pytest.raises(ValueError, match="1 prompts for rewards"):
        made.transform(torch.zeros(2), ["x"])
    with pytest.raises(ValueError, match="does not broadcast"):
        made.transform(torch.zeros(2), reference=torch.zeros(3))


def test_many_samples_of_one_prompt_are_transformed_together():
    out = fitted().transform(torch.zeros(2, 3, dtype=F64), ["x", "y"])
    assert out.shape == (2, 3) and out[1, 0].item() == pytest.approx(lsc(0.0, 5.425))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_bad_rewards_are_refused(value):
    with pytest.raises(ValueError, match="NaN or infinite"):
        fitted().transform(torch.tensor([value]), ["x"])
    with pytest.raises(ValueError, match="reference rewards are NaN"):
        log_sigmoid_centred(torch.zeros(1), value)
    with pytest.raises(DataError, match="must be finite"):
        LogSigmoidCentered().fit(["x"], {"x": [0.0, value]})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"q": 0.0}, "q must be"),
        ({"q": 1.0}, "q must be"),
        ({"q": math.nan}, "q must be"),
        ({"scale": 0.0}, "scale must be"),
        ({"scale": -1.0}, "scale must be"),
        ({"reference": "median"}, "reference must be"),
        ({"estimator": "kde"}, "estimator must be"),
        ({"fallback": "mean"}, "fallback must be"),
        ({"fallback": math.inf}, "fallback must be"),
        ({"reference": "value", "fallback": "pooled"}, "no meaning"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ConfigError, match=message):
        LogSigmoidCentered(**settings)


def test_a_prompt_twice_is_refused():
    with pytest.raises(DataError, match="twice"):
        LogSigmoidCentered().fit(["x", "x"], [[1.0], [2.0]])


def test_rewards_that_are_no_logits_draw_a_warning_until_a_scale_is_given():
    with pytest.warns(UserWarning, match="give scale="):
        LogSigmoidCentered(bradley_terry=False)
    with pytest.warns(UserWarning, match="whole numbers"):
        LogSigmoidCentered().fit(["x"], {"x": list(range(8))})
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LogSigmoidCentered(bradley_terry=False, scale=0.3).fit(["x"], {"x": list(range(9))})
        LogSigmoidCentered(scale=2.0).fit(["x"], {"x": list(range(9))})
        fitted()


def test_state_survives_and_references_do_not_move():
    again = LogSigmoidCentered()
    again.load_state_dict(fitted().state_dict())
    assert again.references == fitted().references
    before = dict(again.references)
    again.transform(torch.tensor([100.0]), ["x"])
    assert again.references == before


# The conjunction -----------------------------------------------------------------------------------------------------


def combiner(**options) -> AllGood:
    second = LogSigmoidCentered("value").fit(["x", "y"], {"x": 0.5, "y": -0.5})
    return AllGood({"help": fitted(), "harm": second}, **options)


def test_the_sum_of_terms_is_the_log_probability_of_all():
    rewards = {"harm": torch.tensor([1.0, 2.0], dtype=F64), "help": torch.tensor([3.0, -1.0], dtype=F64)}
    made = combiner()
    expected = [lsc(3.0, 2.55) + lsc(1.0, 0.5), lsc(-1.0, 5.425) + lsc(2.0, -0.5)]
    np.testing.assert_allclose(made(rewards, ["x", "y"]), expected, atol=1e-12)
    np.testing.assert_allclose(made.log_prob(rewards, ["x", "y"]), expected, atol=1e-12)
    np.testing.assert_allclose(made.prob(rewards, ["x", "y"]), np.exp(expected), atol=1e-12)
    product = 1 / (1 + math.exp(2.55 - 3.0)) / (1 + math.exp(0.5 - 1.0))
    assert made.prob(rewards, ["x", "y"])[0].item() == pytest.approx(product)
    terms = made.terms(rewards, ["x", "y"])
    assert list(terms) == ["help", "harm"] and terms["harm"][1].item() == pytest.approx(lsc(2.0, -0.5))


def test_it_is_not_the_transform_of_the_sum():
    r = torch.tensor([[2.0, -3.0]], dtype=F64)
    assert all_good(r, 0.0).item() == pytest.approx(lsc(2.0, 0.0) + lsc(-3.0, 0.0))
    assert abs(all_good(r, 0.0).item() - lsc(-1.0, 0.0)) > 1.0


def test_weights_are_exponents():
    rewards = {"help": torch.tensor([3.0], dtype=F64), "harm": torch.tensor([1.0], dtype=F64)}
    out = combiner(weights={"harm": 2.0})(rewards, ["x"])
    assert out.item() == pytest.approx(lsc(3.0, 2.55) + 2 * lsc(1.0, 0.5))
    assert all_good(torch.zeros(1, 2, dtype=F64), 0.0, [0.5, 0.0]).item() == pytest.approx(0.5 * math.log(0.5))
    for weights in ({"other": 1.0}, {"harm": -1.0}, {"harm": math.nan}):
        with pytest.raises(ConfigError):
            combiner(weights=weights)


def test_names_and_shapes_must_agree():
    with pytest.raises(ConfigError, match="at least one"):
        AllGood({})
    with pytest.raises(ValueError, match="rewards are named"):
        combiner()({"help": torch.zeros(1)}, ["x"])
    with pytest.raises(ValueError, match="differ in shape"):
        combiner()({"help": torch.zeros(1), "harm": torch.zeros(1, 2)}, ["x"])
    with pytest.raises(TypeError, match="must override"):
        RewardCombiner()({}, [])
    with pytest.raises(TypeError, match="must override"):
        RewardTransform().fit([], {})
    with pytest.raises(TypeError, match="must override"):
        RewardTransform().transform([])


def test_best_of_k_takes_the_first_of_equals_and_one_reward_keeps_its_order():
    rewards = {"help": torch.tensor([[0.0, 2.0, 2.0]]), "harm": torch.tensor([[0.0, 2.0, 2.0]])}
    assert combiner().best_of(rewards, ["x"]).tolist() == [1]
    single = torch.randn(5, 16, generator=torch.Generator().manual_seed(0), dtype=F64)
    one = AllGood({"r": LogSigmoidCentered("value").fit(range(5), [0.3] * 5)})
    assert one.best_of({"r": single}, range(5)).tolist() == single.argmax(1).tolist()
    with pytest.raises(ValueError, match="k of at least 1"):
        one.best_of({"r": single[:, :0]}, range(5))


def test_a_sum_may_choose_another_sample_than_raw_rewards_do():
    both = {"a": torch.tensor([[9.0, 2.0]], dtype=F64), "b": torch.tensor([[-3.0, 2.0]], dtype=F64)}
    canned = {name: LogSigmoidCentered("value").fit(["x"], {"x": 0.0}) for name in both}
    assert (both["a"] + both["b"]).argmax(1).item() == 0
    assert AllGood(canned).best_of(both, ["x"]).item() == 1


def test_kl_of_best_of_k():
    assert best_of_k_kl(1) == 0.0
    assert best_of_k_kl(16) == pytest.approx(math.log(16) - 15 / 16)
    for k in (0, 1.5, True):
        with pytest.raises(ConfigError):
            best_of_k_kl(k)


def test_empty_batches():
    assert fitted().transform(torch.zeros(0), []).shape == (0,)
    assert combiner()({"help": torch.zeros(0), "harm": torch.zeros(0)}, []).shape == (0,)


# As the shape of a run ----------------------------------------------------------------------------------------------


def trajectory(task: str) -> Trajectory:
    return Trajectory(Task(task, "?"), (Turn("policy", "a", (1,), (0.0,)),), StopReason.EOS)


def test_parts_of_a_score_are_combined_by_task():
    made = AllGoodScores(combiner())
    scores = [Score(9.0, parts={"help": 3.0, "harm": 1.0}), Score.invalid("no")]
    out = made([trajectory("x"), trajectory("y")], scores)
    expected = lsc(3.0, 2.55) + lsc(1.0, 0.5)
    assert out[0].value == pytest.approx(expected) and not out[1].valid
    assert out[0].parts["prob_good"] == pytest.approx(math.exp(expected))
    assert out[0].parts["log_good/harm"] == pytest.approx(lsc(1.0, 0.5))
    assert out[0].parts["proxy_reward_origin"] == 9.0
    with pytest.raises(RewardError, match="no part 'harm'"):
        made([trajectory("x")], [Score(1.0, parts={"help": 1.0})])
    with pytest.raises(RewardError, match="outcomes only"):
        made([trajectory("x")], [Score(1.0, steps=(1.0,), step_spans=(Span(0, 1),))])
    made.check([Task("x", "?")])
    with pytest.raises(ConfigError, match="'z'"):
        made.check([Task("z", "?")])
    again = AllGoodScores(combiner())
    again.load_state_dict(made.state_dict())
    assert again.combiner.transforms["harm"].references == {"x": 0.5, "y": -0.5}
    assert made([], []) == []


def test_a_single_reward_is_the_outcome_itself():
    made = AllGoodScores(AllGood({"r": fitted()}))
    assert made([trajectory("x")], [Score(3.0)])[0].value == pytest.approx(lsc(3.0, 2.55))


def test_by_name_with_references_of_each_row():
    out = shape(torch.tensor([1.0], dtype=F64), "log_sigmoid", [[0.0, 1.0, 2.0, 3.0]])
    assert out.item() == pytest.approx(lsc(1.0, 2.55))
    made = shaped("log_sigmoid", {"x": [0.0, 1.0, 2.0, 3.0]}, q=0.5)
    assert made([trajectory("x")], [Score(1.0)])[0].value == pytest.approx(lsc(1.0, 1.5))
    with pytest.raises(ConfigError, match="needs reference rewards"):
        shape(torch.zeros(1), "log_sigmoid")
    with pytest.raises(DataError, match="row of base-policy rewards"):
        shape(torch.zeros(2), "log_sigmoid", [[0.5], []])


# The recipe's exact optima ---------------------------------------------------------------------------------------------


def test_tilts_have_the_kl_they_were_asked_for_and_are_the_best_at_it():
    from guerdon.papers.transform_combine import make_world, mcnemar, tilt, weighted_quantile, weighted_sum

    world = make_world(np.random.default_rng(0), prompts=5, candidates=12, samples=8)
    utility = weighted_sum(world, 0.5)
    policy = tilt(world, utility, 0.7)
    kl = (policy * np.log(policy / world.base)).sum(1)
    assert kl.mean() == pytest.approx(0.7, abs=1e-6)
    np.testing.assert_allclose(policy.sum(1), 1.0)
    # log pi / pi0 is affine in the utility, with one slope for all prompts
    slopes = [np.polyfit(u, np.log(p / b), 1)[0] for u, p, b in zip(utility, policy, world.base, strict=True)]
    np.testing.assert_allclose(slopes, slopes[0], rtol=1e-6)
    other = tilt(world, world.good, 0.7)
    assert (policy * utility).sum() > (other * utility).sum()
    assert weighted_quantile(np.array([[3.0, 1.0, 2.0]]), np.array([[0.2, 0.5, 0.3]]), 0.6).tolist() == [2.0]
    a, b = np.array([1, 1, 1, 0, 0.0]), np.array([0, 0, 0, 1, 0.0])
    assert mcnemar(a, b) == {"only_first": 3, "only_second": 1, "p_value": pytest.approx(5 / 16)}
    assert mcnemar(a, a)["p_value"] == 1.0
