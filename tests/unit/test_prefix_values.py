"""Prefixes, their Monte Carlo values, the tree of prefixes, the first error, and beam search over steps."""

from __future__ import annotations

import math

import pytest
import torch

from guerdon.environments.arithmetic import LINES, ChainCorrect, Spec, check, make_tasks, scripts, words
from guerdon.errors import ConfigError, DataError
from guerdon.policies import tiny_policy, train_bpe
from guerdon.rollout import Sampling, TransformersEngine
from guerdon.search import (
    EffectiveReward,
    EngineSampler,
    Estimate,
    Prefix,
    PrefixTree,
    PrefixValues,
    beam_search,
    beam_searches,
    locate_first_error,
    mc_values,
    prefixes_of,
    step_estimates,
)
from guerdon.training.arithmetic import solve
from guerdon.types import Segmenter, StopReason, Task, Trajectory, Turn, response_logprobs

TASKS = make_tasks(6, spec=Spec(operations=(2, 3)))


@pytest.fixture(scope="module")
def policy():
    torch.set_num_threads(1)
    tokenizer = train_bpe(("0",), 512, atoms=(), words=words(Spec()))
    return tiny_policy(tokenizer, hidden=32, layers=1, heads=2, max_context=128)


def sampler(policy, **settings) -> EngineSampler:
    return EngineSampler(TransformersEngine(policy, max_slots=64), Sampling(max_tokens=24), **settings)


class Coin:
    """A plain sampler over texts, whose rollouts from "p" succeed with the share p (exactly)."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def __call__(self, prefix: str, n: int) -> list[bool]:
        self.calls.append((prefix, n))
        return [k < round(float(prefix) * n) for k in range(n)]


# Prefixes --------------------------------------------------------------------------------------------------------------


def test_prefixes_are_cut_where_steps_end(policy) -> None:
    t = scripts(policy, 1, tasks=TASKS)[0]
    made = prefixes_of(t, LINES)
    lines = t.turns[0].text.split("\n")
    assert [p.text for p in made] == [
        "",
        *("".join(f"{x}\n" for x in lines[: k + 1]) for k in range(len(lines) - 1)),
        t.turns[0].text,
    ]
    assert made[-1].ids == t.turns[0].token_ids and [p.ended for p in made] == [False] * len(lines) + [True]
    assert all(p.ids == t.turns[0].token_ids[: len(p)] and p.prompt_ids == t.prompt_ids for p in made)
    assert made[-1].trajectory().stop is StopReason.DONE and made[1].trajectory().turns[0].text == made[1].text
    cut = Trajectory(t.task, t.turns, StopReason.LENGTH, prompt_ids=t.prompt_ids)
    assert not prefixes_of(cut, LINES)[-1].ended


def test_prefixes_of_what_has_none(policy) -> None:
    empty = Trajectory(Task("t", "q"), (), StopReason.ABORTED, prompt_ids=(1,))
    assert len(prefixes_of(empty, LINES)) == 1
    two = Trajectory(
        Task("t", "q"), (Turn("policy", "7", (3,)), Turn("environment", "x", (4,))), StopReason.DONE, prompt_ids=(1,)
    )
    with pytest.raises(DataError, match="2 turns"):
        prefixes_of(two, LINES)
    with pytest.raises(DataError, match="no prompt ids"):
        prefixes_of(Trajectory(Task("t", "q"), (), StopReason.DONE), LINES)
    bare = Trajectory(Task("t", "q"), (Turn("policy", "7"),), StopReason.DONE, prompt_ids=(1,))
    with pytest.raises(DataError, match="no token ids"):
        prefixes_of(bare, LINES)
    with pytest.raises(DataError, match="nothing can follow"):
        Prefix(Task("t", "q"), (1,), ended=True).extended(None)  # type: ignore[arg-type]


def test_going_on_from_a_prefix_draws_what_the_policy_would_have_drawn(policy) -> None:
    """The log-probabilities of a continuation are those of the whole sequence under the policy, ids as they were."""
    from guerdon.policies import make_batches, token_logprobs

    whole = solve(policy, TASKS[:2], max_tokens=24, seed=1)
    prefixes = [prefixes_of(g.trajectories[0], Segmenter("turns"))[0] for g in whole]
    half = [Prefix(g.task, g.trajectories[0].prompt_ids, t.token_ids[:5], policy.decode(t.token_ids[:5]), None, (t.logprobs or ())[:5])
            for g in whole for t in g.trajectories[0].turns]  # fmt: skip
    rows = sampler(policy)([*prefixes, *half], [1, 1, 2, 2], [7, 8, 9, 10])
    assert [len(r) for r in rows] == [1, 1, 2, 2]
    for prefix, row in zip([*prefixes, *half], rows, strict=True):
        for t in row:
            assert t.turns[0].token_ids[: len(prefix)] == prefix.ids and len(t) <= 24
            batch = make_batches([(t.prompt_ids, t.turns[0].token_ids)], groups=None, max_tokens=1000)[0]
            with torch.no_grad():
                known = token_logprobs(policy, batch).logprobs
            torch.testing.assert_close(torch.tensor(response_logprobs(t)), known, atol=1e-4, rtol=1e-4)
    assert rows[2][0] != rows[2][1]


def test_rollouts_of_a_prefix_do_not_depend_on_the_others(policy) -> None:
    roots = [sampler(policy).root(t) for t in TASKS]
    made = sampler(policy)
    together = made(roots, [2] * 6, list(range(6)))
    alone = [sampler(policy)([r], [2], [k])[0] for k, r in enumerate(roots)]
    assert [[t.turns[0].token_ids for t in row] for row in together] == [
        [t.turns[0].token_ids for t in row] for row in alone
    ]
    assert made.tokens == sum(len(t) for row in together for t in row)


def test_steps_end_at_their_stop(policy) -> None:
    made = sampler(policy, step_tokens=6)
    root = made.root(TASKS[0])
    for p in made.steps([root], [20], [3])[0]:
        assert len(p) <= 6 and (p.ended or len(p) == 6 or p.text.endswith("\n") or "\n" in p.text[-2:])
    ended = Prefix(TASKS[0], root.prompt_ids, (1,), "", ended=True)
    assert made.steps([ended], [2], [0])[0] == [ended, ended]
    full = Prefix(TASKS[0], root.prompt_ids, (30,) * 24, "=" * 24)
    assert made([full], [1], [0])[0][0].stop is StopReason.LENGTH


def test_samplers_refuse_what_does_not_fit(policy) -> None:
    with pytest.raises(ConfigError, match="step_stop"):
        EngineSampler(TransformersEngine(policy), Sampling(stop=("\n",)))
    with pytest.raises(DataError, match="counts"):
        sampler(policy)([sampler(policy).root(TASKS[0])], [1, 2], [0])

    class Closed:
        trainable = False

    with pytest.raises(ConfigError, match="token ids"):
        EngineSampler(Closed())  # type: ignore[arg-type]


# Values ----------------------------------------------------------------------------------------------------------------


def test_mc_values_are_shares_of_successes() -> None:
    coin = Coin()
    values = mc_values(coin, ["0.0", "0.25", "1.0"], bool, n=8)
    assert values.dtype == torch.float64 and values.tolist() == [0.0, 0.25, 1.0]
    assert mc_values(coin, [], bool).shape == (0,)
    assert mc_values(
        lambda prefix, n: [prefix] * n, ["ab", "b"], lambda prefix, rollout: prefix[0] == "a"
    ).tolist() == [1.0, 0.0]
    assert mc_values(lambda prefix, n: [0.5] * n, ["x"], float, n=3).tolist() == [0.5]


def test_a_cache_asks_only_for_what_is_missing() -> None:
    coin = Coin()
    values = PrefixValues(coin, bool, n=4)
    assert values.values(["0.5", "0.25", "0.5"]).tolist() == [0.5, 0.25, 0.5]
    assert coin.calls == [("0.5", 4), ("0.25", 4)] and values.rollouts == 8 and len(values) == 2
    assert values.estimate(["0.5"])[0] == Estimate(2.0, 4)
    assert values.estimate(["0.5"], n=8)[0].n == 8 and coin.calls[-1] == ("0.5", 4)
    assert values.known("0.25") == Estimate(1.0, 4) and values.known("0.75") is None


def test_a_budget_leaves_values_missing_and_missing_is_not_nought() -> None:
    values = PrefixValues(Coin(), bool, n=4, budget=6)
    got = values.values(["1.0", "1", "0.5"])
    assert got[:2].tolist() == [1.0, 1.0] and math.isnan(got[2])
    assert [e.n for e in values.estimate(["1.0", "1", "0.5"])] == [4, 2, 0] and values.left == 0
    assert Estimate().hard() is None and math.isnan(Estimate().value)
    assert PrefixValues(Coin(), bool, budget=0).values(["1.0"]).isnan().all()


def test_labels_hard_and_soft() -> None:
    assert Estimate(1, 8).hard() is True and Estimate(0, 8).hard() is False and Estimate(1, 8).value == 0.125
    assert Estimate(4, 8).hard(0.5) is False and Estimate(5, 8).hard(0.5) is True


def test_verifiers_that_fail_are_named_and_counted() -> None:
    def broken(rollout):
        raise OSError("no checker")

    values = PrefixValues(Coin(), broken)
    with pytest.raises(DataError, match=r"OSError: no checker.*on_error='wrong'"):
        values.values(["1.0"])
    lenient = PrefixValues(Coin(), broken, n=3, on_error="wrong")
    assert lenient.values(["1.0"]).tolist() == [0.0] and lenient.failures["OSError"] == 3
    for bad in (lambda r: "yes", lambda r: 2.0, lambda r: math.nan, lambda r: None):
        with pytest.raises(DataError, match=r"number in \[0, 1\]"):
            mc_values(Coin(), ["1.0"], bad)
    with pytest.raises(DataError, match="2 rollouts of a prefix, 8"):
        mc_values(lambda p, n: [True, False], ["1.0"], bool)


@pytest.mark.parametrize(
    ("settings", "match"), [({"n": 0}, "n must"), ({"budget": -1}, "budget"), ({"on_error": "zero"}, "on_error")]
)
def test_settings_without_sense_are_refused(settings, match) -> None:
    with pytest.raises(ConfigError, match=match):
        PrefixValues(Coin(), bool, **settings)
    with pytest.raises(ConfigError, match="n must"):
        PrefixValues(Coin(), bool).values(["1.0"], n=0)


def test_values_on_the_engine_repeat_whatever_the_order(policy) -> None:
    trajectories = scripts(policy, 4, tasks=TASKS, seed=2)
    prefixes = [p for t in trajectories for p in prefixes_of(t, LINES)[:2]]
    values = PrefixValues(sampler(policy), ChainCorrect(), n=3, keep_samples=True)
    first = values.estimate(prefixes)
    again = PrefixValues(sampler(policy), ChainCorrect(), n=3, keep_samples=True)
    reverse = again.estimate(prefixes[::-1])[::-1]
    for a, b in zip(first, reverse, strict=True):
        assert (a.successes, a.n) == (b.successes, b.n)
        assert [t.turns[0].token_ids for t in a.samples] == [t.turns[0].token_ids for t in b.samples]
    for e in first:
        assert e.successes == sum(check(t.task, t.turns[0].text).right for t in e.samples) and e.n == 3


def test_an_ended_solution_is_verified_and_costs_nothing(policy) -> None:
    right, wrong = (scripts(policy, 1, style, tasks=TASKS[:1])[0] for style in ("right", "wrong"))
    values = PrefixValues(sampler(policy), ChainCorrect(), n=8)
    ends = [prefixes_of(t, LINES)[-1] for t in (right, wrong)]
    assert [(e.value, e.exact) for e in values.estimate(ends)] == [(1.0, True), (0.0, True)] and values.rollouts == 0


def test_the_first_pit_ends_the_rollouts_of_a_solution(policy) -> None:
    t = scripts(policy, 1, tasks=TASKS)[0]
    steps = prefixes_of(t, LINES)
    shares = {p.key: share for p, share in zip(steps, [1.0, 0.5, 0.0, 1.0, 1.0, 1.0], strict=False)}

    def continues(prefixes, counts, seeds):
        return [[k < shares[p.key] * c for k in range(c)] for p, c in zip(prefixes, counts, strict=True)]

    values = PrefixValues(continues, lambda r: r if isinstance(r, bool) else True, n=4)
    row = step_estimates(values, [t], LINES, first_pit=True)[0]
    assert [e.value for e in row] == [1.0, 0.5, 0.0] + [0.0] * (len(steps) - 3) and values.rollouts == 12
    full = step_estimates(PrefixValues(continues, lambda r: r if isinstance(r, bool) else True, n=4), [t], LINES)[0]
    assert [e.value for e in full][:3] == [1.0, 0.5, 0.0] and full[-1].exact and full[-1].value == 1.0
    assert step_estimates(values, [], LINES, first_pit=True) == []


# Tree and first error --------------------------------------------------------------------------------------------------


def grown() -> tuple[PrefixTree, list]:
    task = Task("t", "q")
    root = Prefix(task, (1,))
    tree = PrefixTree(root)
    a = tree.add(tree.root, Prefix(task, (1,), (5, 6), "a\n"))
    b = tree.add(a, Prefix(task, (1,), (5, 6, 7), "a\nb"))
    c = tree.add(a, Prefix(task, (1,), (5, 6, 8), "a\nc", ended=True))
    return tree, [a, b, c]


def test_a_tree_knows_paths_statistics_and_examples() -> None:
    tree, (a, b, c) = grown()
    assert len(tree) == 4 and [n.depth for n in tree] == [0, 1, 2, 2] and b.step == "b" and tree.root.step == ""
    assert c.path == [tree.root, a, c] and c.ended and tree.leaves() == [b, c] and c.prefix in tree
    tree.backpropagate(b, 1.0)
    tree.backpropagate(c, 0.0)
    assert (
        (tree.root.visits, a.visits, b.visits) == (2, 2, 1)
        and a.mean == 0.5
        and math.isnan(tree.add(b, Prefix(b.prefix.task, (1,), (5, 6, 7, 9), "a\nbx")).mean)
    )
    b.estimate, c.estimate = Estimate(3, 8), Estimate(0, 1, True)
    assert [(e.step, e.value, e.n, e.hard) for e in tree.examples()] == [("b", 0.375, 8, True), ("c", 0.0, 1, False)]
    assert tree.best_child(a, lambda n: n.mean) is b and tree.best_child(a, lambda n: 0.0) is b


def test_a_prefix_is_in_a_tree_once() -> None:
    tree, (a, b, c) = grown()
    assert tree.add(a, Prefix(a.prefix.task, (1,), (5, 6, 7), "a\nb")) is b and len(tree) == 4
    # An end token that has no text makes another prefix.
    assert tree.add(b, Prefix(a.prefix.task, (1,), (5, 6, 7), "a\nb", ended=True)) is not b
    with pytest.raises(DataError, match="extend"):
        tree.add(b, Prefix(a.prefix.task, (1,), (5, 9, 7, 7), "a"))
    other, (x, _, _) = grown()
    with pytest.raises(DataError, match="no node of this tree"):
        tree.add(x, Prefix(a.prefix.task, (1,), (5, 6, 99), "a"))
    with pytest.raises(DataError, match="no child"):
        tree.best_child(c, lambda n: 0.0)
    assert other.get(Prefix(a.prefix.task, (1,))) is other.root


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 33])
def test_binary_search_finds_the_first_error_in_few_estimates(n: int) -> None:
    for error in [*range(1, n + 1), None]:
        asked: list[int] = []

        def mc(m: int, error=error, asked=asked) -> float:
            asked.append(m)
            return 0.0 if error is not None and m >= error else 0.5

        assert locate_first_error(mc, n) == error
        assert len(asked) <= math.floor(math.log2(n)) + 1 and len(set(asked)) == len(asked)


def test_a_first_error_of_nothing() -> None:
    assert locate_first_error(lambda m: 1.0, 0) is None
    with pytest.raises(ConfigError, match="n_steps"):
        locate_first_error(lambda m: 1.0, -1)
    with pytest.raises(DataError, match="missing"):
        locate_first_error(lambda m: math.nan, 3)


# Beam search -----------------------------------------------------------------------------------------------------------


class Word:
    """A state of a search over words of three letters."""

    def __init__(self, text: str) -> None:
        self.text, self.key, self.ended = text, text, len(text) == 3

    def __repr__(self) -> str:
        return self.text


def letters(state: Word, n: int) -> list[Word]:
    return [Word(state.text + x) for x in "abcab"[:n]]


def test_a_beam_keeps_the_best_over_all_candidates() -> None:
    value = {"a": 0.5, "b": 0.4, "c": 0.1}
    result = beam_search(letters, lambda states: [sum(value[x] for x in s.text) for s in states], 2, 3, root=Word(""))
    assert result.best.text == "aaa" and result.score == pytest.approx(1.5) and not result.cut
    assert (
        [b.state.text for b in result.beams] == ["aaa", "aab"] and result.steps == 3 and result.candidates == 3 + 6 + 6
    )
    # The best of one round need not lead to the best of all.
    trap = {"a": 0.9, "b": 0.8, "aa": 0.1, "ab": 0.1, "ac": 0.1, "ba": 0.7, "bb": 0.2, "bc": 0.1}
    greedy, wide = (
        beam_search(letters, lambda states: [trap.get(s.text[:2], 0.0) for s in states], k, 3, root=Word(""))
        for k in (1, 2)
    )
    assert greedy.best.text[0] == "a" and wide.best.text[:2] == "ba"


def test_ties_go_by_the_second_number_then_by_order_and_duplicates_count_once() -> None:
    tied = beam_search(letters, lambda states: [(1.0, float(s.text[-1] == "c")) for s in states], 1, 3, root=Word(""))
    assert tied.best.text == "ccc"
    assert beam_search(letters, lambda states: [1.0] * len(states), 1, 3, root=Word("")).best.text == "aaa"
    seen: list[int] = []

    def count(states):
        seen.append(len(states))
        return [0.0] * len(states)

    beam_search(letters, count, 4, 5, root=Word(""))
    assert seen[0] == 3
    seen.clear()
    beam_search(letters, count, 4, 5, root=Word(""), dedup=False)
    assert seen[0] == 5


def test_the_final_score_chooses_among_what_has_ended() -> None:
    result = beam_search(letters, lambda s: [1.0] * len(s), 3, 3, lambda s: float(s.text.endswith("c")), root=Word(""))
    assert result.best.text == "aac" and result.score == 1.0
    cut = beam_search(letters, lambda s: [1.0] * len(s), 3, 3, root=Word(""), max_steps=2)
    assert cut.best is None and math.isnan(cut.score) and cut.cut and cut.steps == 2 and len(cut.beams) == 3


def test_finished_solutions_compete_and_may_be_displaced() -> None:
    class Any(Word):
        def __init__(self, text: str) -> None:
            super().__init__(text)
            self.ended = text.endswith("b") or len(text) == 3

    def grow(state, n):
        return [Any(state.text + x) for x in "ab"]

    low_end = beam_search(
        grow, lambda states: [0.3 if s.text.endswith("b") else 0.5 for s in states], 1, 2, root=Any("")
    )
    high_end = beam_search(grow, lambda states: [0.9 if s.text == "b" else 0.5 for s in states], 1, 2, root=Any(""))
    assert low_end.best.text == "aaa" and high_end.best.text == "b" and high_end.steps == 1


def test_a_state_from_which_nothing_follows_is_a_solution() -> None:
    result = beam_search(
        lambda s, n: [] if len(s) == 2 else [s + "x"] * n, lambda states: [float(len(s)) for s in states], 2, 3
    )
    assert result.best == "xx" and result.score == 2.0 and result.candidates == 6


def test_searches_side_by_side_are_searches_alone(policy) -> None:
    made = sampler(policy, step_tokens=6)
    roots = [made.root(t) for t in TASKS[:3]]
    score = lambda states: [float(sum(s.ids) % 7) for s in states]  # noqa: E731
    together = beam_searches(made, score, 2, 3, roots=roots, seed=5, max_steps=3)
    alone = [beam_search(made, score, 2, 3, root=r, seed=5, max_steps=3) for r in roots]
    for a, b in zip(together, alone, strict=True):
        assert (a.candidates, a.steps, a.cut) == (b.candidates, b.steps, b.cut)
        assert [(x.state.key, x.score) for x in a.beams] == [(x.state.key, x.score) for x in b.beams]


def test_effective_rewards_add_progress_and_break_ties_by_the_policys_value() -> None:
    asked: list[list[str]] = []

    def base(states):
        asked.append([s.text for s in states])
        return torch.tensor([0.2 * len(s.text) for s in states])

    score = EffectiveReward(base, lambda states: [0.5 if s.text else 0.3 for s in states], alpha=2.0)
    a, root = Word("a"), Word("")
    assert score([a, a], [root, root]) == [(pytest.approx(0.2 + 2.0 * 0.2), pytest.approx(0.2))] * 2
    assert score([Word("ab")], [a]) == [(pytest.approx(0.4), pytest.approx(0.4))] and asked == [["a"], ["ab"]]
    assert EffectiveReward(base)([a], [root]) == [(pytest.approx(0.2),) * 2]
    with pytest.raises(ConfigError, match="alpha"):
        EffectiveReward(base, base, alpha=-1.0)


def test_searches_refuse_what_does_not_fit() -> None:
    for beam, expand, steps, match in ((0, 1, 1, "beam"), (1, 0, 1, "expand"), (1, 1, 0, "max_steps")):
        with pytest.raises(ConfigError, match=match):
            beam_search(letters, lambda s: [0.0] * len(s), beam, expand, root=Word(""), max_steps=steps)
    with pytest.raises(DataError, match="NaN"):
        beam_search(letters, lambda s: [math.nan] * len(s), 1, 1, root=Word(""))
    with pytest.raises(DataError, match="1 scores for 3"):
        beam_search(letters, lambda s: [0.0], 1, 3, root=Word(""))
