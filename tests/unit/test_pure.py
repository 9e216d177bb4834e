"""PURE: the soft-min transform, min-form returns, advantages against hand-computed values, and the credit rules."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from guerdon.credit import (
    length_baseline,
    min_form_returns,
    predicted_correct,
    pure_advantage,
    softmin_rewards,
    sum_form_returns,
    whiten,
)
from guerdon.errors import ConfigError, RewardError
from guerdon.training import MinFormCredit, OnlineConfig, SumCredit
from guerdon.training.streams import collect
from guerdon.types import Group, Score, Span, StopReason, Task, Trajectory, Turn, response_ids

NAN = math.nan
F = torch.float64


def t(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=F)


def mask(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.bool)


def slow_softmin(rewards: list[float], temperature: float) -> list[float]:
    weights = [math.exp(-r / temperature) for r in rewards]
    return [w * r / sum(weights) for w, r in zip(weights, rewards, strict=True)]


# The transform ---------------------------------------------------------------------------------------------------------


def test_the_transform_has_the_values_of_its_formula() -> None:
    # exp(0), exp(-1): weights 1 / (1 + 1/e) and the rest.
    got = softmin_rewards(t([0.0, 0.1]), mask([1, 1]), 0.1)
    w = 1 / (1 + math.exp(-1))
    torch.testing.assert_close(got, t([0.0, 0.1 * (1 - w)]))
    rows = [[0.9, -0.4, 0.3, 0.85], [-1.0, -0.9, 1.0, 0.2]]
    got = softmin_rewards(t(*rows), torch.ones(2, 4, dtype=torch.bool), 0.37)
    torch.testing.assert_close(got, t(*[slow_softmin(r, 0.37) for r in rows]))


def test_each_response_is_transformed_by_itself_and_padding_has_no_weight() -> None:
    rewards = t([0.9, 0.8, NAN, NAN], [-0.5, 0.5, 0.5, 0.7])
    m = mask([1, 1, 0, 0], [1, 1, 1, 1])
    got = softmin_rewards(rewards, m)
    torch.testing.assert_close(got[0, :2], t(*slow_softmin([0.9, 0.8], 0.1)).flatten())
    assert got[0, 2:].tolist() == [0.0, 0.0]
    # Positive rewards only: a 0 in place of padding would be the minimum.
    assert float(got[0].sum()) == pytest.approx(0.8 + 0.1 / (1 + math.exp(1)))
    for junk in (math.inf, -math.inf, 5.0, -5.0):
        torch.testing.assert_close(softmin_rewards(torch.where(m, rewards, junk), m), got)


def test_limits_of_the_temperature() -> None:
    rewards, m = t([0.3, -0.2, 0.8]), mask([1, 1, 1])
    assert float(softmin_rewards(rewards, m, 1e-3).sum()) == pytest.approx(-0.2, abs=1e-9)
    assert float(softmin_rewards(rewards, m, 1e9).sum()) == pytest.approx(0.9 / 3, abs=1e-6)
    assert softmin_rewards(rewards, m, math.inf).sum() == pytest.approx(0.3)
    assert softmin_rewards(rewards, m, 1e-320).tolist() == [[0.0, -0.2, 0.0]]


def test_one_step_equal_steps_and_no_step() -> None:
    assert softmin_rewards(t([0.7, NAN]), mask([1, 0])).tolist() == [[0.7, 0.0]]
    torch.testing.assert_close(softmin_rewards(t([-0.6] * 4), mask([1] * 4)), t([-0.15] * 4))
    assert softmin_rewards(t([NAN, NAN]), mask([0, 0])).tolist() == [[0.0, 0.0]]
    assert softmin_rewards(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.bool)).shape == (0, 3)
    assert softmin_rewards(torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool)).shape == (2, 0)
    assert softmin_rewards(torch.tensor([0.2, 0.4]), torch.tensor([True, True])).ndim == 1


def test_the_transform_is_constant_and_keeps_its_type() -> None:
    rewards = t([0.5, 0.1]).requires_grad_()
    assert not softmin_rewards(rewards, mask([1, 1])).requires_grad
    assert softmin_rewards(rewards, mask([1, 1])).dtype == F
    assert softmin_rewards(torch.tensor([[1, 0]]), mask([1, 1])).dtype == torch.float32


@pytest.mark.parametrize("temperature", [0.0, -0.1, NAN])
def test_temperatures_without_sense_are_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match=r"temperature must be positive.*strict"):
        softmin_rewards(t([0.1]), mask([1]), temperature)


def test_bad_rewards_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        softmin_rewards(t([0.1, 0.2]), mask([1]))
    with pytest.raises(ValueError, match="1 rewards inside the mask are not finite"):
        softmin_rewards(t([0.1, NAN]), mask([1, 1]))
    with pytest.raises(ValueError, match="one shape"):
        softmin_rewards(torch.tensor(0.1), torch.tensor(True))


# Returns ---------------------------------------------------------------------------------------------------------------


def test_returns_are_the_minimum_up_to_the_worst_step_and_nought_behind_it() -> None:
    rewards = t([0.9, 0.8, -0.7, 0.9, 0.95])
    soft = min_form_returns(rewards, torch.ones(1, 5, dtype=torch.bool), temperature=0.05)
    torch.testing.assert_close(soft[0, :3], torch.full((3,), -0.7, dtype=F), atol=1e-9, rtol=0)
    torch.testing.assert_close(soft[0, 3:], torch.zeros(2, dtype=F), atol=1e-9, rtol=0)
    star = slow_softmin(rewards[0].tolist(), 0.1)
    exact = [sum(star[k:]) for k in range(5)]
    torch.testing.assert_close(min_form_returns(rewards, torch.ones(1, 5, dtype=torch.bool)), t(exact))


def test_strict_returns_are_the_running_minimum_behind_the_worst_step_too() -> None:
    rewards = t([0.9, -0.7, 0.6, 0.8, NAN], [0.1, 0.2, NAN, NAN, NAN])
    m = mask([1, 1, 1, 1, 0], [1, 1, 0, 0, 0])
    assert min_form_returns(rewards, m, "strict").tolist() == [[-0.7, -0.7, 0.6, 0.8, 0.0], [0.1, 0.2, 0.0, 0.0, 0.0]]
    with pytest.raises(ValueError, match="mode"):
        min_form_returns(rewards, m, "soft")  # type: ignore[arg-type]
    assert min_form_returns(torch.zeros(1, 0), torch.zeros(1, 0, dtype=torch.bool), "strict").shape == (1, 0)


def test_sum_form_returns_are_discounted_per_step() -> None:
    rewards, m = t([1.0, 2.0, 4.0, NAN]), mask([1, 1, 1, 0])
    assert sum_form_returns(rewards, m, 0.5).tolist() == [[3.0, 4.0, 4.0, 0.0]]
    assert sum_form_returns(rewards, m).tolist() == [[7.0, 6.0, 4.0, 0.0]]
    assert sum_form_returns(rewards[0], m[0], 0.0).tolist() == [1.0, 2.0, 4.0, 0.0]
    with pytest.raises(ValueError, match="gamma"):
        sum_form_returns(rewards, m, 1.1)


def test_filler_raises_the_sum_and_not_the_minimum() -> None:
    honest, padded = t([0.9, 0.6, 0.9]), t([0.9, 0.6] + [0.95] * 6 + [0.9])
    ones = lambda x: torch.ones_like(x, dtype=torch.bool)  # noqa: E731
    assert float(sum_form_returns(padded, ones(padded))[0, 0]) > float(sum_form_returns(honest, ones(honest))[0, 0]) + 5
    for mode in ("softmin", "strict"):
        more, less = (float(min_form_returns(x, ones(x), mode)[0, 0]) for x in (padded, honest))
        assert more <= less + 0.05, mode


def test_agreement_with_a_verifier_is_the_sign_of_the_sum() -> None:
    got = predicted_correct(t([0.9, 0.8], [0.9, -0.8], [0.0, 0.0]), torch.ones(3, 2, dtype=torch.bool))
    assert got.tolist() == [True, False, False]


# Advantages ------------------------------------------------------------------------------------------------------------


def slow_advantage(token_rewards, m, group, outcome, coef, n) -> list[list[float]]:
    """The formula in plain Python, without whitening."""
    b, length = len(token_rewards), len(token_rewards[0])
    togo = [
        [sum(token_rewards[i][s] for s in range(u, length) if m[i][s]) if m[i][u] else 0.0 for u in range(length)]
        for i in range(b)
    ]
    out = []
    for i in range(b):
        others = [k for k in range(b) if group[k] == group[i] and k != i]
        base = sum(sum(togo[k]) / n for k in others) / len(others)
        known = [outcome[k] for k in others if not math.isnan(outcome[k])]
        verified = coef * (outcome[i] - sum(known) / len(known)) if known and not math.isnan(outcome[i]) else 0.0
        out.append([togo[i][u] - base + verified if m[i][u] else 0.0 for u in range(length)])
    return out


def test_advantages_by_hand() -> None:
    rewards = t([0.0, 0.5, 0.0, 0.2], [-0.4, 0.0, NAN, NAN])
    m = mask([1, 1, 1, 1], [1, 1, 0, 0])
    got = pure_advantage(rewards, m, torch.tensor([0, 0]), whiten=False)
    # Returns: [.7 .7 .2 .2] and [-.4 0]; their means over the 4 positions of the padded length are .45 and -.1.
    torch.testing.assert_close(got, t([0.8, 0.8, 0.3, 0.3], [-0.85, -0.45, 0.0, 0.0]))
    longer = pure_advantage(rewards, m, torch.tensor([0, 0]), whiten=False, length=8)
    torch.testing.assert_close(longer, t([0.75, 0.75, 0.25, 0.25], [-0.625, -0.225, 0.0, 0.0]))
    with_outcome = pure_advantage(rewards, m, torch.tensor([0, 0]), torch.tensor([0.0, -1.0]), 2.0, whiten=False)
    torch.testing.assert_close(with_outcome, t([2.8, 2.8, 2.3, 2.3], [-2.85, -2.45, 0.0, 0.0]))


@pytest.mark.parametrize("length", [None, 20])
def test_advantages_equal_a_slow_reference(length) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 7, 9)
    m = (np.arange(6) < lengths[:, None]).tolist()
    rewards = rng.normal(size=(9, 6)).tolist()
    group = [0, 1, 0, 1, 2, 2, 1, 2, 0]
    outcome = [1.0, 0.0, 0.0, NAN, NAN, NAN, 1.0, NAN, 1.0]
    got = pure_advantage(
        t(*rewards), mask(*m), torch.tensor(group), torch.tensor(outcome), 0.7, whiten=False, length=length
    )
    torch.testing.assert_close(got, t(*slow_advantage(rewards, m, group, outcome, 0.7, length or 6)))
    white = pure_advantage(t(*rewards), mask(*m), torch.tensor(group), torch.tensor(outcome), 0.7, length=length)
    torch.testing.assert_close(white, whiten(got, mask(*m)))


def test_the_offset_of_outcomes_and_the_order_of_rows_do_not_matter() -> None:
    rng = torch.Generator().manual_seed(1)
    rewards, m = torch.rand(6, 5, generator=rng, dtype=F), torch.ones(6, 5, dtype=torch.bool)
    group, outcome = torch.tensor([7, 7, 7, 2, 2, 2]), torch.tensor([1.0, 0, 0, 1, 1, 0])
    base = pure_advantage(rewards, m, group, outcome)
    torch.testing.assert_close(pure_advantage(rewards, m, group, outcome - 1), base)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(pure_advantage(rewards[order], m[order], group[order], outcome[order]), base[order])


def test_a_response_alone_in_its_group_gets_nothing_and_is_in_no_statistic() -> None:
    rewards, m = t([0.3, 0.1], [0.5, 0.2], [9.0, 9.0]), torch.ones(3, 2, dtype=torch.bool)
    got = pure_advantage(rewards, m, torch.tensor([0, 0, 1]), torch.tensor([1.0, 0.0, 1.0]))
    torch.testing.assert_close(
        got[:2], pure_advantage(rewards[:2], m[:2], torch.tensor([0, 0]), torch.tensor([1.0, 0.0]))
    )
    assert got[2].tolist() == [0.0, 0.0]


def test_advantages_without_variance_or_tokens_are_nought() -> None:
    m = torch.ones(2, 3, dtype=torch.bool)
    same = pure_advantage(torch.zeros(2, 3), m, torch.zeros(2, dtype=torch.long), torch.ones(2))
    assert not same.any() and not same.isnan().any()
    assert pure_advantage(
        torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.bool), torch.zeros(0, dtype=torch.long)
    ).shape == (0, 3)
    none = pure_advantage(
        torch.full((2, 3), NAN), torch.zeros(2, 3, dtype=torch.bool), torch.zeros(2, dtype=torch.long)
    )
    assert not none.any()


def test_bad_advantage_input_is_refused() -> None:
    m, g = torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, dtype=torch.long)
    for arguments, match in (
        ((torch.zeros(2, 3), m, torch.zeros(3, dtype=torch.long)), "group"), ((torch.zeros(2, 4), m, g), "one shape"),
        ((torch.zeros(2, 3), m, g, torch.zeros(3)), r"outcome \(3,\)"), ((torch.full((2, 3), NAN), m, g), "not finite"),
        ((torch.zeros(2, 3), m, g, torch.tensor([math.inf, 0.0])), "finite"), ((torch.zeros(2, 3), m, g, None, NAN), "outcome_coef"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            pure_advantage(*arguments)
    with pytest.raises(ValueError, match="shorter than the longest"):
        pure_advantage(torch.zeros(2, 3), m, g, length=2)


def test_the_main_branchs_baselines() -> None:
    rewards, m = t([0.2, 0.4], [0.9, NAN]), mask([1, 1], [1, 0])
    tokens, g = torch.tensor([[3, 5], [10, 0]]), torch.tensor([4, 4])
    # Per token: row 0 pays 0.9 / 10 a token, row 1 pays 0.6 / 8 a token.
    torch.testing.assert_close(length_baseline(rewards, m, tokens, g), t([0.27, 0.45], [0.75, 0.0]))
    # Per step it favours few long steps: row 1 pays for its ten tokens as for any step.
    torch.testing.assert_close(length_baseline(rewards, m, tokens, g, per="step"), t([0.9, 0.9], [0.3, 0.0]))
    assert not length_baseline(rewards[:1], m[:1], tokens[:1], g[:1]).any()
    with pytest.raises(ValueError, match="per"):
        length_baseline(rewards, m, tokens, g, per="word")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="step_tokens"):
        length_baseline(rewards, m, tokens[:, :1], g)


# The rules -------------------------------------------------------------------------------------------------------------


def experience(rows, *, invalid=(), parts=None, groups=None):
    """Trajectories of single-token words; each row is a list of (step length, step reward)."""
    groups = groups or [0] * len(rows)
    by_group: dict[int, list[int]] = {}
    for b, g in enumerate(groups):
        by_group.setdefault(g, []).append(b)
    order = [b for g in by_group for b in by_group[g]]
    made, scores = {}, {}
    for b, row in enumerate(rows):
        n = sum(length for length, _ in row)
        turn = Turn("policy", "x" * n, tuple(range(2, n + 2)), (-1.0,) * n)
        made[b] = Trajectory(Task(f"t{groups[b]}", "q"), (turn,), StopReason.DONE, prompt_ids=(1,))
        ends = np.cumsum([length for length, _ in row]).tolist()
        spans = tuple(Span(e - length, e) for e, (length, _) in zip(ends, row, strict=True))
        score = Score(0.0, tuple(r for _, r in row), spans, parts=(parts or {}).get(b, {}))
        scores[b] = Score.invalid("broken") if b in invalid else score
    listed = [Group(made[members[0]].task, tuple(made[b] for b in members)) for members in by_group.values()]
    return collect(listed, [scores[b] for b in order])


CONFIG = OnlineConfig()
ROWS = [[(3, 0.9), (2, -0.4), (1, 0.8)], [(2, 0.7), (2, 0.6)], [(4, 0.1)]]


def grid(values, lengths, width):
    rows = np.zeros((len(lengths), width))
    at = 0
    for b, n in enumerate(lengths):
        rows[b, :n] = values[at : at + n]
        at += n
    return torch.from_numpy(rows)


def by_formula(rows, transform, **options):
    """Advantages from the pure functions, laid out by hand."""
    lengths = [sum(n for n, _ in row) for row in rows]
    width = max(lengths)
    token, m = torch.zeros(len(rows), width, dtype=F), torch.zeros(len(rows), width, dtype=torch.bool)
    for b, row in enumerate(rows):
        values = t([r for _, r in row])
        made = transform(values, torch.ones_like(values, dtype=torch.bool))[0]
        end = 0
        for k, (n, _) in enumerate(row):
            end += n
            token[b, end - 1] = made[k]
        m[b, :end] = True
    return pure_advantage(token, m, torch.zeros(len(rows), dtype=torch.long), **options), m


def test_the_rule_puts_transformed_rewards_on_step_ends() -> None:
    got = MinFormCredit()(experience(ROWS), CONFIG)
    want, m = by_formula(ROWS, softmin_rewards)
    torch.testing.assert_close(got, want[m])
    # All tokens of a step have one advantage.
    assert got[0] == got[1] == got[2] and got[3] == got[4]


def test_strict_and_sum_rules_credit_each_token_with_its_steps_return() -> None:
    for rule, returns in (
        (MinFormCredit("strict", whiten=False), lambda v, m: min_form_returns(v, m, "strict")),
        (SumCredit(0.9, whiten=False), lambda v, m: sum_form_returns(v, m, 0.9)),
        (SumCredit(whiten=False), sum_form_returns),
    ):
        got = rule(experience(ROWS), CONFIG)
        step = torch.cat(
            [
                torch.repeat_interleave(
                    returns(t([r for _, r in row]), torch.ones(1, len(row), dtype=torch.bool))[0],
                    torch.tensor([n for n, _ in row]),
                )
                for row in ROWS
            ]
        )
        owner = torch.tensor([0] * 6 + [1] * 4 + [2] * 4)
        mean = torch.stack([step[owner == b].sum() / 6 for b in range(3)])
        others = (mean.sum() - mean) / 2
        torch.testing.assert_close(got, step - others[owner])


def test_verified_outcomes_count_where_a_prompt_has_an_answer() -> None:
    parts = {0: {"verified": 1.0}, 1: {"verified": 0.0}, 2: {"verified": 0.0}}
    rows = [*ROWS, [(2, 0.5)], [(2, 0.5)]]
    made = experience(rows, parts=parts, groups=[0, 0, 0, 1, 1])
    got = MinFormCredit(outcome="verified", outcome_coef=2.0, whiten=False)(made, CONFIG)
    alone = MinFormCredit(whiten=False)(made, CONFIG)
    torch.testing.assert_close(got[:6] - alone[:6], torch.full((6,), 2.0, dtype=F))
    torch.testing.assert_close(got[6:14] - alone[6:14], torch.full((8,), -1.0, dtype=F))
    assert torch.equal(got[14:], alone[14:])
    only = MinFormCredit(outcome="verified", process=False, whiten=False)(made, CONFIG)
    assert only.tolist() == [1.0] * 6 + [-0.5] * 8 + [0.0] * 4


def test_invalid_trajectories_are_outside_everything() -> None:
    with_bad = MinFormCredit()(experience([*ROWS, [(3, 9.0)]], invalid={3}), CONFIG)
    torch.testing.assert_close(with_bad[:14], MinFormCredit()(experience(ROWS), CONFIG))
    assert with_bad[14:].tolist() == [0.0] * 3
    nothing = MinFormCredit()(experience([[(2, 0.1)]], invalid={0}), CONFIG)
    assert nothing.tolist() == [0.0, 0.0]


def test_separators_may_go_without_credit() -> None:
    plain, without = (MinFormCredit(separators=s)(experience(ROWS), CONFIG) for s in (True, False))
    ends = [2, 4, 7]  # the last token of every step but the last of its response
    assert without[ends].tolist() == [0.0] * 3
    rest = [k for k in range(14) if k not in ends]
    assert torch.equal(without[rest], plain[rest])


def test_other_baselines_take_the_place_of_the_returns() -> None:
    got = MinFormCredit(baseline="token", whiten=False)(experience(ROWS), CONFIG)
    star = [slow_softmin([r for _, r in row], 0.1) for row in ROWS]
    total, size = [sum(s) for s in star], [6, 4, 4]
    rate = (total[1] + total[2]) / (size[1] + size[2])
    first = sum(s - rate * n for s, (n, _) in zip(star[0], ROWS[0], strict=True))
    assert float(got[0]) == pytest.approx(first)
    assert float(got[5]) == pytest.approx(star[0][2] - rate)


def test_rules_refuse_what_does_not_fit() -> None:
    for make, match in (
        (lambda: MinFormCredit("soft"), "mode"), (lambda: MinFormCredit(temperature=0.0), "strict"), (lambda: SumCredit(1.5), "gamma"),
        (lambda: MinFormCredit(baseline="mean"), "baseline"), (lambda: MinFormCredit(process=False), "outcome"), (lambda: MinFormCredit(outcome_coef=NAN), "outcome_coef"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=match):
            make()
    turn = Turn("policy", "x", (2,), (-1.0,))
    task = Task("t", "q")
    bare = collect(
        [Group(task, (Trajectory(task, (turn,), StopReason.DONE, prompt_ids=(1,)),) * 2)], [Score(1.0), Score(0.0)]
    )
    with pytest.raises(RewardError, match="no step values"):
        MinFormCredit()(bare, CONFIG)
    assert MinFormCredit(outcome="value", process=False, whiten=False)(bare, CONFIG).tolist() == [1.0, -1.0]
    assert MinFormCredit().needs == {"steps", "group"} and "min_form" in repr(MinFormCredit())


def test_rules_are_known_by_name() -> None:
    from guerdon.parts import build

    assert isinstance(build("credit", {"name": "min_form", "temperature": 0.2}), MinFormCredit)
    assert isinstance(build("credit", "sum_form"), SumCredit)


def test_the_exact_gradient_feeds_filler_under_the_sum_and_not_under_the_minimum() -> None:
    """A policy of three symbols (good step, bad step, filler) that stops by itself: the gradient, by enumeration."""
    from itertools import product

    rewards = {"good": 0.8, "bad": -0.8, "filler": 0.95}
    symbols = ("good", "bad", "filler", "stop")

    def gradient(returns) -> torch.Tensor:
        logits = torch.zeros(4, dtype=F, requires_grad=True)
        logp = logits.log_softmax(0)
        total = torch.zeros((), dtype=F)
        for word in product(range(4), repeat=4):
            steps = word[: word.index(3)] if 3 in word else word
            if 3 in word and any(x != 3 for x in word[word.index(3) :]):
                continue  # what follows a stop is no event of its own
            acts = [*steps, 3] if 3 in word else list(steps)
            # The stop is a step as well: an answer line that is right half of the time.
            values = t([rewards[symbols[x]] if x < 3 else 0.0 for x in acts])
            g = returns(values, torch.ones_like(values, dtype=torch.bool))[0]
            chance = logp[acts].sum().exp().detach()
            total = total + chance * sum(logp[x] * g[k] for k, x in enumerate(acts))
        return torch.autograd.grad(total, logits)[0]

    by_sum, by_min = gradient(sum_form_returns), gradient(lambda v, m: min_form_returns(v, m, "softmin", 0.02))
    filler, stop = 2, 3
    assert by_sum[filler] > 0 and by_sum[stop] < 0
    assert by_min[stop] > by_min[filler] and by_min[stop] > 0
    assert by_sum[1] < 0 and by_min[1] < 0


@pytest.mark.parametrize(
    "rule", [MinFormCredit(outcome="verified"), MinFormCredit("strict", separators=False), SumCredit(0.9)]
)
def test_rules_train_and_resume_exactly(tmp_path, rule) -> None:
    from guerdon.environments.arithmetic import LINES, ChainCorrect, Solve, Spec, make_tasks, words
    from guerdon.policies import tiny_policy, train_bpe
    from guerdon.reward_models import StepReward
    from guerdon.rollout import TransformersEngine
    from guerdon.training import OnlineTrainer

    torch.set_num_threads(1)
    spec = Spec(operations=(2, 2))
    tasks = make_tasks(6, spec=spec)
    tokenizer = train_bpe(("0",), 512, atoms=(), words=words(spec))

    class Parity:
        segmenter = LINES

        def step_scores(self, trajectories, segmenter=None):
            return [
                torch.tensor([sum(response_ids(t)[s.start : s.stop]) % 5 / 5 - 0.5 for s in LINES.spans(t)])
                for t in trajectories
            ]

    def run(out, steps=None):
        policy = tiny_policy(tokenizer, hidden=16, layers=1, heads=2, max_context=64)
        config = OnlineConfig(
            steps=3, prompts_per_step=2, group_size=3, max_tokens=10, optimiser={"lr": 1e-2}, save_every=1
        )
        reward = StepReward(Parity(), verifier=ChainCorrect(), answered=lambda task: task.id != tasks[0].id)
        trainer = OnlineTrainer(
            policy, TransformersEngine(policy), Solve(), tasks, reward, config, credit=rule, reference=None, out=out
        )
        before = [p.clone() for p in policy.model.parameters()]
        trainer.fit(steps)
        trainer.close()
        after = list(policy.model.parameters())
        assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        return after

    whole = run(tmp_path / "whole")
    run(tmp_path / "part", 2)
    for a, b in zip(run(tmp_path / "part"), whole, strict=True):
        assert torch.equal(a, b)
