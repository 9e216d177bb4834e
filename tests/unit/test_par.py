"""Preference As Reward and the shapers beside it, against hand computation and slow float64 loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

import guerdon as gd
from guerdon.errors import ConfigError, RewardError, UnknownName
from guerdon.shaping import (
    PreferenceAsReward,
    RewardShaper,
    RunningShaper,
    ShapeScores,
    par,
    penalise_length,
    reference_rewards,
    shape,
    shaped,
    shaper,
)
from guerdon.shaping.relative import fitted_sigmoid
from guerdon.shaping.shapers import SHAPERS
from guerdon.types import Group, Score, Span, StopReason, Task, Trajectory, Turn

torch.set_num_threads(1)


def sigma(z: float) -> float:
    return 1.0 / (1.0 + math.exp(-z))


REWARDS = [0.5, -2.0, 3.25, 0.0]
REFERENCES = [[0.0, 1.0], [-2.0], [3.0, -1.0, 4.0], [0.0] * 12]


def slow(function, rewards=REWARDS, references=REFERENCES, m=10):
    return [sum(function(r - x) for x in row[:m]) / len(row[:m]) for r, row in zip(rewards, references, strict=True)]


def close(tensor, expected, tol=1e-12):
    assert tensor.dtype == torch.float64
    np.testing.assert_allclose(tensor.numpy(), expected, rtol=0, atol=tol)


def test_par_is_the_mean_of_sigmoids_and_not_the_sigmoid_of_the_mean():
    out = PreferenceAsReward()(torch.tensor([1.0], dtype=torch.float64), [[0.0, 4.0]])
    close(out, [(sigma(1.0) + sigma(-3.0)) / 2])
    assert abs(float(out) - sigma(1.0 - 2.0)) > 0.1


@pytest.mark.parametrize("k", [1.0, 2.0, 3.0])
def test_par_with_ragged_references(k):
    out = PreferenceAsReward(k)(torch.tensor(REWARDS, dtype=torch.float64), REFERENCES)
    close(out, slow(lambda z: sigma(k * z)))


def test_only_the_first_max_refs_references_are_read():
    rewards, rows = torch.tensor([1.0], dtype=torch.float64), [[0.0, 5.0, float(9)]]
    close(PreferenceAsReward(max_refs=1)(rewards, rows), [sigma(1.0)])
    close(PreferenceAsReward(max_refs=2)(rewards, rows), [(sigma(1.0) + sigma(-4.0)) / 2])
    close(PreferenceAsReward()(torch.zeros(1, dtype=torch.float64), [[0.0] * 10 + [100.0]]), [0.5])


def test_a_matrix_of_references_and_a_list_agree():
    rewards = torch.tensor([0.3, -0.7], dtype=torch.float64)
    matrix = torch.tensor([[0.1, 0.2], [1.0, -1.0]], dtype=torch.float64)
    close(PreferenceAsReward()(rewards, matrix), PreferenceAsReward()(rewards, matrix.tolist()).numpy())
    close(PreferenceAsReward()(rewards, matrix.numpy()), PreferenceAsReward()(rewards, [*matrix]).numpy())


def test_parity_is_one_half_and_numbers_keep_their_type():
    assert PreferenceAsReward()(torch.ones(3), [[1.0]] * 3).tolist() == [0.5] * 3
    assert PreferenceAsReward()(torch.ones(3), [[1.0]] * 3).dtype == torch.float32
    assert PreferenceAsReward()(torch.ones(1, dtype=torch.float16), [[1.0]]).dtype == torch.float16
    assert PreferenceAsReward()(torch.tensor([1, 2]), [[1.0], [2.0]]).dtype == torch.float64
    assert PreferenceAsReward()(torch.zeros(0), []).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_huge_gaps_saturate_without_overflow(dtype):
    out = PreferenceAsReward()(torch.tensor([6e4, -6e4], dtype=dtype), [[0.0], [0.0]])
    assert out.tolist() == [1.0, 0.0]


def test_gradient_flows_into_the_reward_alone_and_is_at_most_a_quarter_of_k():
    r = torch.tensor([0.0], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([[0.0]], dtype=torch.float64, requires_grad=True)
    PreferenceAsReward(2.0)(r, ref).sum().backward()
    assert r.grad.item() == pytest.approx(0.5)
    assert ref.grad is None


@pytest.mark.parametrize("k", [0.0, -1.0, math.inf, math.nan, True])
def test_k_must_be_positive(k):
    with pytest.raises(ConfigError, match="k must be positive"):
        PreferenceAsReward(k)


@pytest.mark.parametrize("refs", [0, -1, 1.5, True])
def test_max_refs_must_be_a_count(refs):
    with pytest.raises(ConfigError, match="max_refs"):
        PreferenceAsReward(max_refs=refs)


@pytest.mark.parametrize("method", ["par", "lsc", "centred", "relative_tanh", "relative_poly", "sgfc"])
def test_missing_references_are_an_error_and_never_zero(method):
    with pytest.raises(ConfigError, match="reference"):
        shape(torch.zeros(2), method)
    with pytest.raises(ConfigError, match="row 1 has no reference"):
        shape(torch.zeros(2), method, [[0.0], []])
    with pytest.raises(ValueError, match="1 rows of reference rewards for 2"):
        shape(torch.zeros(2), method, [[0.0]])


def test_bad_numbers_are_named():
    with pytest.raises(ValueError, match="1 of 2 rewards are NaN or infinite"):
        shape(torch.tensor([0.0, math.inf]), "par", [[0.0], [0.0]])
    with pytest.raises(ValueError, match="row 1 must be finite"):
        shape(torch.zeros(2), "par", [[0.0], [math.nan]])
    with pytest.raises(ValueError, match="row 1 must be finite"):
        shape(torch.zeros(2), "par", torch.tensor([[0.0], [math.nan]]))
    with pytest.raises(ValueError, match=r"rewards must be \[B\]"):
        shape(torch.zeros(2, 2), "par", [[0.0], [0.0]])
    with pytest.raises(ValueError, match="give \\[B, M\\]"):
        shape(torch.zeros(2), "par", torch.zeros(2))


# The other shapers -------------------------------------------------------------------------------------------------


def test_relative_shapers_by_hand():
    r = torch.tensor(REWARDS, dtype=torch.float64)
    close(shape(r, "centred", REFERENCES), slow(lambda z: z))
    close(shape(r, "relative_tanh", REFERENCES), slow(math.tanh))
    close(shape(r, "sgfc", REFERENCES), slow(lambda z: sigma(3 * (z - 3))))
    close(shape(r, "sgfc", REFERENCES, k=1.0), slow(lambda z: sigma(z - 3)))


def test_uncentred_shapers_by_hand():
    r = torch.tensor(REWARDS, dtype=torch.float64)
    close(shape(r, "pure_sigmoid"), [sigma(x) for x in REWARDS])
    close(shape(r, "pure_tanh"), [math.tanh(x) for x in REWARDS])
    close(shape(r, "vanilla"), REWARDS)
    close(shape(r, "ceil", c=0.25), [0.25, -2.0, 0.25, 0.0])


def test_the_quintic_is_the_least_squares_fit_and_is_cut_at_five():
    z = np.linspace(-5, 5, 100)
    design = np.vander(z, 6)
    fit = np.linalg.lstsq(design, 1 / (1 + np.exp(-z)), rcond=None)[0]
    points = np.array([-4.9, -1.0, 0.0, 2.0, 4.99])
    close(fitted_sigmoid(torch.from_numpy(points)), np.vander(points, 6) @ fit, 1e-10)
    assert fitted_sigmoid(torch.tensor([-5.0, -9.0, 5.0, 1e9])).tolist() == [0.0, 0.0, 1.0, 1.0]


def test_lsc_is_the_log_sigmoid_over_the_gaussian_quantile():
    r = torch.tensor(REWARDS, dtype=torch.float64)
    expected = []
    for x, row in zip(REWARDS, REFERENCES, strict=True):
        row = row[:10]
        sd = np.std(row, ddof=1) if len(row) > 1 else 0.0
        expected.append(math.log(sigma(x - norm.ppf(0.85, loc=np.mean(row), scale=sd + 1e-5))))
    close(shape(r, "lsc", REFERENCES), expected, 1e-9)


@pytest.mark.parametrize("method", SHAPERS)
def test_every_shaper_keeps_number_type_and_bounds(method):
    references = [[0.0, 1.0], [0.5], [-1.0]]
    for dtype in (torch.float32, torch.float64):
        out = shape(torch.tensor([1.0, -2.0, 400.0], dtype=dtype), method, references)
        assert out.shape == (3,) and out.dtype == dtype and bool(torch.isfinite(out).all())
    assert shape(torch.zeros(0), method, []).shape == (0,)
    bounded = {"par", "pure_sigmoid", "sgfc", "relative_poly", "pure_poly", "minmax"}
    if method in bounded:
        assert bool(((out >= -0.01) & (out <= 1.01)).all())


def test_unknown_methods_and_settings_are_refused():
    with pytest.raises(UnknownName, match="did you mean meanstd"):
        shape(torch.zeros(1), "meanstt")
    with pytest.raises(ConfigError, match="'minmax' has no setting 'k'"):
        shaper("minmax", k=2)
    with pytest.raises(ConfigError, match="belong to the shaper"):
        shape(torch.zeros(1), RunningShaper("clip"), k=2)
    with pytest.raises(ConfigError, match="ceiling"):
        shaper("ceil", c=math.nan)


def test_order_is_ceiling_then_length_penalty_then_the_sigmoid():
    out = shape(torch.tensor([9.0], dtype=torch.float64), "par", [[1.0]], ceiling=4.0, lengths=torch.tensor([450]))
    close(out, [sigma(4.0 - 1.5 - 1.0)])


def test_length_penalty_starts_behind_its_free_tokens():
    close(penalise_length(torch.zeros(4, dtype=torch.float64), torch.tensor([0, 300, 301, 500])), [0, 0, -0.01, -2.0])
    with pytest.raises(ValueError, match="differ in shape"):
        penalise_length(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="at least 0"):
        penalise_length(torch.zeros(1), torch.tensor([-1.0]))


# Running statistics ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["meanstd", "clip", "minmax"])
def test_running_statistics_cover_everything_so_far_this_batch_included(mode):
    rng = np.random.default_rng(0)
    batches = [rng.normal(3, 2, size=n) for n in (4, 1, 7)]
    running, seen = RunningShaper(mode), []
    for batch in batches:
        seen = [*seen, *batch]
        mu, sd, low, high = np.mean(seen), np.std(seen), min(seen), max(seen)
        expected = {
            "meanstd": (batch - mu) / sd,
            "clip": np.clip(batch, mu - sd, mu + sd),
            "minmax": (batch - low) / (high - low),
        }[mode]
        close(running(torch.from_numpy(batch)), expected, 1e-10)


@pytest.mark.parametrize(("mode", "expected"), [("meanstd", 0.0), ("clip", 0.1), ("minmax", 0.0)])
def test_one_distinct_value_is_never_nan_nor_noise(mode, expected):
    running = RunningShaper(mode)
    for n in (1, 3, 7):
        out = running(torch.full((n,), 0.1, dtype=torch.float64))
        np.testing.assert_allclose(out.numpy(), expected, atol=1e-15)


def test_running_statistics_survive_a_restart():
    first, rest = torch.tensor([1.0, 5.0, -2.0]), torch.tensor([0.5, 9.0])
    whole, part = RunningShaper("meanstd"), RunningShaper("meanstd")
    whole(first), part(first)
    again = RunningShaper("meanstd")
    again.load_state_dict(part.state_dict())
    assert torch.equal(whole(rest), again(rest))
    with pytest.raises(ConfigError, match="mode='meanstd'"):
        RunningShaper("clip").load_state_dict(part.state_dict())


def test_a_bad_batch_leaves_the_statistics_alone():
    running = RunningShaper()
    running(torch.tensor([1.0, 2.0]))
    before = running.state_dict()
    with pytest.raises(ValueError, match="NaN or infinite"):
        running(torch.tensor([3.0, math.nan]))
    assert running(torch.zeros(0)).shape == (0,)
    assert running.state_dict() == before
    with pytest.raises(ConfigError, match="mode must be"):
        RunningShaper("median")


# As the shape of a run ---------------------------------------------------------------------------------------------


def trajectory(task: Task, n: int = 3) -> Trajectory:
    return Trajectory(task, (Turn("policy", "x " * n, tuple(range(n)), (0.0,) * n),), StopReason.EOS, prompt_ids=(1,))


TASKS = [Task("a", "?"), Task("b", "?", meta={"reference_rewards": [2.0]})]


def test_the_factory_shapes_scores_by_task_and_keeps_both_numbers():
    made = gd.shaping.par({"a": [0.0, 1.0], "b": [2.0]})
    trajectories = [trajectory(TASKS[0]), trajectory(TASKS[1]), trajectory(TASKS[0])]
    out = made(trajectories, [Score(1.0, parts={"x": 1.0}), Score(2.0), Score.invalid("no")])
    assert out[0].value == pytest.approx((sigma(1.0) + 0.5) / 2)
    assert out[0].parts == {"x": 1.0, "proxy_reward": out[0].value, "proxy_reward_origin": 1.0}
    assert out[1].value == 0.5
    assert not out[2].valid


def test_references_may_come_with_the_tasks():
    out = par()([trajectory(TASKS[1])], [Score(2.0)])
    assert out[0].value == 0.5
    par().check([TASKS[1]])
    with pytest.raises(ConfigError, match=r"needs reference rewards, and 1 task\(s\) have none \('a'"):
        par().check(TASKS)
    with pytest.raises(ConfigError, match="'a'"):
        par({"b": [1.0]})([trajectory(TASKS[0])], [Score(2.0)])
    shaped("minmax").check(TASKS)


def test_scores_finer_than_an_outcome_are_refused():
    score = Score(1.0, steps=(1.0,), step_spans=(Span(0, 3),))
    with pytest.raises(RewardError, match="outcomes only"):
        par()([trajectory(TASKS[1])], [score])


def test_ceiling_and_length_penalty_come_before_the_sigmoid():
    made = par({"a": [0.0]}, ceiling=1.0, length_penalty=(2, 0.5))
    out = made([trajectory(TASKS[0], 5)], [Score(9.0)])
    assert out[0].value == pytest.approx(sigma(1.0 - 1.5))
    assert out[0].parts["proxy_reward_origin"] == 9.0
    textual = Trajectory(TASKS[0], (Turn("policy", "words"),), StopReason.DONE)
    with pytest.raises(RewardError, match="no token ids"):
        made([textual], [Score(1.0)])


def test_invalid_scores_touch_no_statistic():
    made = shaped("meanstd")
    trajectories = [trajectory(TASKS[0])] * 3
    made(trajectories, [Score(1.0), Score.invalid("broken"), Score(3.0)])
    assert made.state_dict()["count"] == 2
    again = shaped("meanstd")
    again.load_state_dict(made.state_dict())
    assert again.shaper.mean == 2.0
    assert made([], []) == [] and made(trajectories[:1], [Score.invalid("x")])[0].reason == "x"


def test_reference_rewards_are_scored_once_per_task():
    groups = [Group(TASKS[0], (trajectory(TASKS[0]),) * 3), Group(TASKS[1], (trajectory(TASKS[1]),))]

    def reward(trajectories):
        return [Score(float(k)) if k != 1 else Score.invalid("cannot") for k in range(len(trajectories))]

    assert reference_rewards(groups, reward) == {"a": [0.0, 2.0], "b": [0.0]}
    with pytest.raises(RewardError, match="none of the 1 references of task 'b'"):
        reference_rewards(groups[1:], lambda ts: [Score.invalid("no")])
    with pytest.raises(RewardError, match="2 scores for the 3"):
        reference_rewards(groups[:1], lambda ts: [1.0, 2.0])


def test_the_base_class_says_what_to_do():
    with pytest.raises(TypeError, match="must override"):
        RewardShaper()(torch.zeros(1))
    assert isinstance(shaper("par"), PreferenceAsReward) and isinstance(
        ShapeScores(shaper("clip")).shaper, RunningShaper
    )
