"""PAV: best-of-K values, progress, effective rewards, the verifier, the credit rule, and the exact testbed."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

from guerdon.credit import (
    best_of_k_value,
    effective_reward,
    leave_one_out,
    progress,
    progress_weights,
    prover_terms,
    returns,
)
from guerdon.environments.arithmetic import LINES, ChainCorrect, Spec, check, make_tasks, scripts, words
from guerdon.environments.planted import PlantedSubsequence
from guerdon.errors import ConfigError, DataError, RewardError
from guerdon.policies import tiny_policy, train_bpe
from guerdon.reward_models import ProcessAdvantageVerifier, StepReward, StepScorer
from guerdon.search import prefixes_of
from guerdon.training import OnlineConfig, PavCredit
from guerdon.training.streams import collect
from guerdon.types import Group, Score, Span, StopReason, Task, Trajectory, Turn

NAN = math.nan
F = torch.float64
TASKS = make_tasks(8, spec=Spec(operations=(2, 3)))


@pytest.fixture(scope="module")
def policy():
    torch.set_num_threads(1)
    return tiny_policy(
        train_bpe(("0",), 512, atoms=(), words=words(Spec())), hidden=32, layers=1, heads=2, max_context=128
    )


# Pure functions --------------------------------------------------------------------------------------------------------


def test_best_of_k_values() -> None:
    q = torch.tensor([0.0, 0.1, 0.5, 1.0, NAN], dtype=F)
    got = best_of_k_value(q, 4)
    torch.testing.assert_close(got[:4], torch.tensor([0.0, 1 - 0.9**4, 1 - 0.5**4, 1.0], dtype=F))
    assert got.dtype == F and math.isnan(got[4])
    torch.testing.assert_close(best_of_k_value(q, 1), q, equal_nan=True)
    assert float(best_of_k_value(torch.tensor(1e-12, dtype=F), 3)) == pytest.approx(3e-12, rel=1e-9)
    assert float(best_of_k_value(0.5, 2)) == 0.75
    for bad in (0, 0.5, -1, NAN, math.inf):
        with pytest.raises(ValueError, match="k must be"):
            best_of_k_value(q, bad)
    for bad in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            best_of_k_value(torch.tensor([bad]), 2)


def test_progress_is_the_difference_along_the_steps() -> None:
    torch.testing.assert_close(progress(torch.tensor([0.5, 0.75, 0.25, 1.0])), torch.tensor([0.25, -0.5, 0.75]))
    assert progress(torch.tensor([0.5])).shape == (0,)
    values = torch.tensor([[0.5, 0.75, 1.0], [0.25, 0.0, 0.9]])
    m = torch.tensor([[True, True, True], [True, True, False]])
    torch.testing.assert_close(progress(values, m), torch.tensor([[0.25, 0.25], [-0.25, 0.0]]))
    got = progress(torch.tensor([0.5, NAN, 1.0]))
    assert got.isnan().all()
    with pytest.raises(ValueError, match="begin with the prompt's"):
        progress(torch.zeros(0))
    with pytest.raises(ValueError, match="gather them to the left"):
        progress(values, torch.tensor([[True, False, True], [True, True, True]]))
    with pytest.raises(ValueError, match="shape of values"):
        progress(values, m[:, :2])


def test_progress_telescopes_so_that_its_return_to_go_says_nothing_of_the_step() -> None:
    values = torch.tensor([0.3, 0.6, 0.1, 0.8, 1.0], dtype=F)
    a = progress(values)
    assert float(a.sum()) == pytest.approx(1.0 - 0.3)
    togo = returns(a[None], torch.ones(1, 4, dtype=torch.bool))[0]
    # What remains is the end's value less the state's: whatever is done there, the same.
    torch.testing.assert_close(togo, 1.0 - values[:-1])


def test_weights_hold_the_steps_own_advantage_only() -> None:
    outcome, a = torch.tensor([1.0, 0.0]), torch.tensor([[0.2, -0.1, NAN], [0.5, NAN, NAN]])
    m = torch.tensor([[True, True, True], [True, False, False]])
    got = progress_weights(outcome, a, torch.tensor([0.5, 0.25]), alpha=2.0, mask=m)
    torch.testing.assert_close(got, torch.tensor([[0.9, 0.3, 0.5], [0.75, 0.0, 0.0]]))
    assert progress_weights(torch.tensor(1.0), torch.tensor([0.5, 0.0]), 0.25, 1.0).tolist() == [1.25, 0.75]
    assert progress_weights(torch.tensor([1.0]), torch.tensor([[0.5]], dtype=F), 0, 0.0).dtype == F
    a = torch.tensor([0.5], requires_grad=True)
    assert not progress_weights(torch.tensor(1.0), a).requires_grad
    for bad in (-0.1, NAN, math.inf):
        with pytest.raises(ValueError, match="alpha"):
            progress_weights(outcome, torch.zeros(2, 3), 0.0, bad)
    with pytest.raises(ValueError, match="shape"):
        progress_weights(outcome, torch.zeros(3, 3))


def test_effective_rewards() -> None:
    got = effective_reward(torch.tensor([0.5, 0.25]), torch.tensor([0.1, -0.2]), 0.5)
    torch.testing.assert_close(got, torch.tensor([0.55, 0.15]))
    with pytest.raises(ValueError, match="alpha"):
        effective_reward(torch.zeros(1), torch.zeros(1), -1)
    with pytest.raises(ValueError, match="agree"):
        effective_reward(torch.zeros(1), torch.zeros(2), 1)


def test_a_provers_terms() -> None:
    pi = torch.tensor([0.5, 0.25, 0.25], dtype=F)
    mu, own = torch.tensor([0.4, 0.0, -0.8], dtype=F), torch.tensor([0.1, 0.1, -0.3], dtype=F)
    variance, alignment = prover_terms(pi, mu, own)
    assert float(variance) == pytest.approx(0.5 * 0.16 + 0.25 * 0.64 - 0.0) and float(alignment) == pytest.approx(
        0.02 + 0.06
    )
    # A perfect or a hopeless prover tells no action from another.
    assert [float(x) for x in prover_terms(pi, torch.zeros(3, dtype=F), own)] == [0.0, 0.0]


# The exact testbed -----------------------------------------------------------------------------------------------------


def problem(seed: int = 0, problems: int = 3) -> tuple[PlantedSubsequence, np.ndarray]:
    rng = np.random.default_rng(seed)
    made = PlantedSubsequence.draw(problems, 3, 5, 2, rng)
    logits = rng.normal(size=(problems, 5, 3, 3))
    policy = np.exp(logits)
    return made, policy / policy.sum(-1, keepdims=True)


def enumerate_values(made: PlantedSubsequence, policy: np.ndarray, p: int, t: int, j: int) -> float:
    """Chance of success from a state, by following every sequence."""
    if t == made.length:
        return float(j == made.patterns.shape[1])
    total = 0.0
    for a in range(made.vocabulary):
        hit = j < made.patterns.shape[1] and made.patterns[p, j] == a
        total += policy[p, t, j, a] * enumerate_values(made, policy, p, t + 1, j + hit)
    return total


def test_values_are_those_of_an_enumeration() -> None:
    made, policy = problem()
    value, action = made.values(policy)
    for p in range(3):
        for t in range(6):
            for j in range(3):
                assert value[p, t, j] == pytest.approx(enumerate_values(made, policy, p, t, j), abs=1e-12)
    np.testing.assert_allclose((policy * action).sum(-1), value[:, :-1])
    chance = made.occupancy(policy)
    np.testing.assert_allclose(chance.sum(-1), 1.0)
    np.testing.assert_allclose((chance[:, -1] * value[:, 4]).sum(-1), value[:, 0, 0])


def test_samples_have_the_chances_of_the_tables() -> None:
    made, policy = problem(1)
    actions, before, success = made.sample(policy, 20_000, np.random.default_rng(2))
    np.testing.assert_allclose(success.mean(1), made.values(policy)[0][:, 0, 0], atol=0.015)
    for t in range(5):
        np.testing.assert_allclose(
            [(before[0, :, t] == j).mean() for j in range(3)], made.occupancy(policy)[0, t], atol=0.015
        )
    rows = [[made.patterns[0].tolist(), actions[0, n].tolist()] for n in range(50)]
    for n, (pattern, sequence) in enumerate(rows):
        at = 0
        for a in sequence:
            at += at < len(pattern) and a == pattern[at]
        assert success[0, n] == (at == len(pattern))


def test_the_policy_as_its_own_prover_multiplies_the_gradient_by_one_plus_alpha() -> None:
    made, policy = problem(3)
    value, action = made.values(policy)
    chance = made.occupancy(policy)

    def gradient(effective: np.ndarray) -> np.ndarray:
        centred = effective - (policy * effective).sum(-1, keepdims=True)
        return chance[..., None] * policy * centred

    outcome = gradient(action)
    q = torch.from_numpy(action)
    for k, alpha in ((1, 0.5), (1, 3.0)):
        a = best_of_k_value(q, k) - best_of_k_value(torch.from_numpy(value[:, :-1, :, None]), k)
        np.testing.assert_allclose(gradient((q + alpha * a).numpy()), (1 + alpha) * outcome, atol=1e-14)
    four = best_of_k_value(q, 4) - best_of_k_value(torch.from_numpy(value[:, :-1, :, None]), 4)
    other = gradient((q + four).numpy())
    cosine = (other * outcome).sum() / np.sqrt((other**2).sum() * (outcome**2).sum())
    assert cosine < 0.999


def test_perfect_and_hopeless_provers_make_no_progress() -> None:
    made, policy = problem(4)
    _, action = made.values(policy)
    early = torch.from_numpy(action[:, 0, 0])
    far = best_of_k_value(early, 10_000)
    assert float((far - far.mean(-1, keepdim=True)).abs().max()) < 1e-6
    assert not best_of_k_value(torch.zeros(3), 8).any()


@pytest.mark.parametrize(
    "arguments",
    [
        (np.zeros((1, 3), int), 2, 2),
        (np.full((1, 2), 5), 3, 4),
        (np.zeros(3, int), 2, 4),
        (np.zeros((1, 1), int), 1, 2),
    ],
)
def test_problems_without_sense_are_refused(arguments) -> None:
    with pytest.raises(ConfigError):
        PlantedSubsequence(*arguments)


# The verifier ----------------------------------------------------------------------------------------------------------


def solutions(policy, n: int = 12):
    return scripts(policy, n, {"right": 0.5, "wrong": 0.5}, tasks=TASKS, seed=4)


def test_values_and_advantages_of_trajectories(policy) -> None:
    pav = ProcessAdvantageVerifier.from_policy(policy)
    torch.nn.init.normal_(pav.scorer.head.weight, generator=torch.Generator().manual_seed(1))
    made = solutions(policy)
    values = pav.values(made)
    assert [len(v) for v in values] == [len(LINES.spans(t)) + 1 for t in made]
    assert all(bool(((v > 0) & (v < 1)).all()) for v in values)
    for v, a, s, one in zip(
        values, pav.advantages(made), pav.step_scores(made), map(pav.advantages, made), strict=True
    ):
        torch.testing.assert_close(a, v[1:] - v[:-1])
        assert torch.equal(a, s) and torch.allclose(a, one, atol=1e-6)
    assert isinstance(pav, StepScorer)
    row = pav.token_rewards(made[:1])[0]
    assert row.nonzero().flatten().tolist() == [s.stop - 1 for s in LINES.spans(made[0])]
    ends = pav.values(made, [1.0 if k % 2 else None for k in range(len(made))])
    assert all(float(v[-1]) == 1.0 for v in ends[1::2]) and torch.equal(ends[0], values[0])
    torch.testing.assert_close(pav.prefix_values(prefixes_of(made[0], LINES)), values[0], atol=1e-6, rtol=0)


def test_values_of_texts_are_differences_of_their_own_prefixes(policy) -> None:
    pav = ProcessAdvantageVerifier.from_policy(policy)
    torch.nn.init.normal_(pav.scorer.head.weight, generator=torch.Generator().manual_seed(1))
    steps = ["12+7=19", "19-5=14", "answer 14"]
    values = pav.values(("12+7-5", steps))
    assert values.shape == (4,) and torch.equal(pav.advantages(("12+7-5", steps)), values[1:] - values[:-1])
    prefixes = [("12+7-5", "".join(f"{x}\n" for x in steps[:k])) for k in range(4)]
    torch.testing.assert_close(pav.prefix_values(prefixes), values, atol=1e-6, rtol=0)
    two = pav.values([("12+7-5", steps), ("1+1", [])])
    torch.testing.assert_close(two[0], values, atol=1e-6, rtol=0)
    assert two[1].shape == (1,) and pav.advantages([("1+1", [])])[0].shape == (0,)
    # A prefix with blanks at its end is the same prefix.
    assert float(pav.prefix_values([("1+1", "1+1=2")])[0]) == pytest.approx(
        float(pav.prefix_values([("1+1", "1+1=2\n\n")])[0])
    )


def test_best_of_k_is_applied_where_values_are_read(policy) -> None:
    one, four = (ProcessAdvantageVerifier.from_policy(policy, best_of=k) for k in (1, 4))
    torch.nn.init.normal_(one.scorer.head.weight, generator=torch.Generator().manual_seed(1))
    four.load_state_dict(one.state_dict())
    t = solutions(policy, 1)[0]
    torch.testing.assert_close(four.values(t), 1 - (1 - one.values(t)) ** 4, atol=1e-6, rtol=0)
    torch.testing.assert_close(four.step_scores([t])[0], progress(best_of_k_value(one.values(t), 4)), atol=1e-6, rtol=0)


def test_fitting_reproduces_soft_labels_and_leaves_missing_ones_out(policy) -> None:
    made = solutions(policy)
    prefixes = [p for t in made for p in prefixes_of(t, LINES)[:2]]
    # The prompt is worth 3/8; a step keeps its first number's parity.
    labels = [0.375 if len(p) == 0 else 0.125 if p.ids[0] % 2 else 0.875 for p in prefixes]
    labels[1] = NAN
    pav = ProcessAdvantageVerifier.from_policy(policy).fit(prefixes, labels, lr=5e-3, epochs=150, batch_size=24)
    got = pav.prefix_values(prefixes)
    known = torch.tensor(labels)
    kept = ~known.isnan()
    torch.testing.assert_close(got[kept], known[kept].to(got.dtype), atol=0.08, rtol=0)
    assert pav.report is not None and pav.report.labelled == len(prefixes) - 1
    # One forward pass reads all prefixes of a solution.
    entropy = -sum(q * math.log(q) + (1 - q) * math.log(1 - q) for q in labels if q == q) / (len(labels) - 1)
    assert pav.report.losses[0] == pytest.approx(math.log(2), abs=1e-6) and pav.report.losses[-1] >= entropy - 1e-6


def test_prefixes_that_begin_one_another_are_merged() -> None:
    from guerdon.reward_models.advantage_verifier import _merged

    rows = [(1, 2, 3), (1,), (1, 2, 4), (1, 2), (9,), (1, 2, 3)]
    places, order = _merged(rows)
    assert len(places) == 3 and sorted(order) == list(range(6))
    at = [(p.ids[: a + 1]) for p in places for a in p.at]
    assert at == [rows[k] for k in order]


def test_verifiers_refuse_what_does_not_fit(policy) -> None:
    pav = ProcessAdvantageVerifier.from_policy(policy)
    with pytest.raises(ConfigError, match="best_of"):
        ProcessAdvantageVerifier(policy, best_of=0.5)
    with pytest.raises(DataError, match="2 prefixes"):
        pav.fit(["a", "b"], [0.5])
    with pytest.raises(DataError, match="between 0 and 1"):
        pav.fit(["a"], [1.5])
    with pytest.raises(DataError, match="no prefix has a value"):
        pav.fit(["a"], [NAN])
    with pytest.raises(DataError, match="a prefix is"):
        pav.fit([3], [0.5])
    with pytest.raises(DataError, match="must be a trajectory or"):
        pav.values(["not a solution"])
    with pytest.raises(DataError, match="1 outcomes for 2"):
        pav.values([("1+1", ["x"]), ("1+1", ["y"])], [1.0])
    assert pav.values([]) == [] and pav.prefix_values([]).shape == (0,)


# The rule --------------------------------------------------------------------------------------------------------------


def experience(rows, outcomes, *, parts=None, valid=None):
    task = Task("t", "q")
    trajectories, scores = [], []
    for b, row in enumerate(rows):
        n = sum(length for length, _ in row)
        turn = Turn("policy", "x" * n, tuple(range(2, n + 2)), (-1.0,) * n)
        trajectories.append(Trajectory(task, (turn,), StopReason.DONE, prompt_ids=(1,)))
        ends = np.cumsum([length for length, _ in row]).tolist()
        spans = tuple(Span(e - length, e) for e, (length, _) in zip(ends, row, strict=True))
        score = Score(outcomes[b], tuple(a for _, a in row), spans, parts=(parts or {}).get(b, {}))
        scores.append(score if valid is None or valid[b] else Score.invalid("broken"))
    return collect([Group(task, tuple(trajectories))], scores)


ROWS = [[(2, 0.3), (1, -0.2)], [(1, 0.1)], [(3, -0.5), (1, 0.4)]]


def test_the_rule_weights_every_token_of_a_step_alike() -> None:
    got = PavCredit(alpha=2.0)(experience(ROWS, [1.0, 0.0, 1.0]), OnlineConfig())
    base = leave_one_out(torch.tensor([1.0, 0.0, 1.0], dtype=F), torch.zeros(3, dtype=torch.long)).tolist()
    want = [base[0] + 0.6] * 2 + [base[0] - 0.4] + [base[1] + 0.2] + [base[2] - 1.0] * 3 + [base[2] + 0.8]
    assert got.tolist() == pytest.approx(want)
    plain = PavCredit(alpha=0.0)(experience(ROWS, [1.0, 0.0, 1.0]), OnlineConfig())
    assert plain.tolist() == pytest.approx([base[0]] * 3 + [base[1]] + [base[2]] * 4)
    left = PavCredit(alpha=2.0)(experience(ROWS, [1.0, 0.0, 1.0], valid=[True, True, False]), OnlineConfig())
    assert left.tolist() == pytest.approx([1.6, 1.6, 0.6, -0.8, 0.0, 0.0, 0.0, 0.0])


def test_the_outcome_may_be_a_part_of_the_score() -> None:
    parts = {b: {"verified": v} for b, v in enumerate([0.0, 1.0, 0.0])}
    made = experience(ROWS, [0.7, 0.7, 0.7], parts=parts)
    assert PavCredit(outcome="verified", alpha=0.0)(made, OnlineConfig()).tolist() == pytest.approx(
        [-0.5] * 3 + [1.0] + [-0.5] * 4
    )
    with pytest.raises(RewardError, match="no part 'verified'"):
        PavCredit(outcome="verified")(experience(ROWS, [0.7] * 3, parts={0: parts[0]}), OnlineConfig())


def test_a_prover_gives_the_advantages_that_its_step_reward_would(policy) -> None:
    pav = ProcessAdvantageVerifier.from_policy(policy, best_of=4)
    torch.nn.init.normal_(pav.scorer.head.weight, generator=torch.Generator().manual_seed(1))
    made = [Trajectory(t.task, (Turn("policy", t.turns[0].text, t.turns[0].token_ids, (-1.0,) * len(t), t.turns[0].token_ends),), t.stop, prompt_ids=t.prompt_ids) for t in scripts(policy, 4, {"right": 0.5, "wrong": 0.5}, tasks=TASKS[:1], seed=1)]  # fmt: skip
    group = [Group(TASKS[0], tuple(made))]
    outcomes = [float(check(t.task, t.turns[0].text).right) for t in made]
    by_prover = PavCredit(pav, alpha=1.5)(collect(group, [Score(x) for x in outcomes]), OnlineConfig())
    scored = StepReward(pav, verifier=ChainCorrect())(made)
    by_score = PavCredit(alpha=1.5, outcome="verified")(collect(group, scored), OnlineConfig())
    torch.testing.assert_close(by_prover, by_score, atol=1e-6, rtol=0)


def test_rules_refuse_or_warn() -> None:
    for alpha in (-0.5, NAN, math.inf):
        with pytest.raises(ConfigError, match="alpha"):
            PavCredit(alpha=alpha)
    pi = object()

    class Own:
        policy, best_of = pi, 1

    with pytest.warns(UserWarning, match=r"1 \+ alpha"):
        PavCredit(pi, policy=pi)
    with pytest.warns(UserWarning, match=r"best_of=4"):
        PavCredit(Own(), policy=pi)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = Own()
        other.best_of = 4
        PavCredit(other, policy=pi)
    with pytest.raises(ConfigError, match="advantages"):
        PavCredit(object())(experience(ROWS, [1.0, 0.0, 1.0]), OnlineConfig())
    assert PavCredit().needs == {"group", "steps"} and PavCredit(Own()).needs == {"group"}
    assert PavCredit(alpha=2.0).step_weights(torch.tensor([1.0]), torch.tensor([[0.5]]), 0.5).tolist() == [[1.5]]


def test_the_rule_is_known_by_name() -> None:
    from guerdon.parts import build

    assert isinstance(build("credit", {"name": "pav", "alpha": 3.0}), PavCredit)
