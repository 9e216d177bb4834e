"""Every legal combination of reward granularity, shape, credit and objective: two updates on a tiny policy.

Trajectories are recorded once and scored, credited and learned from again and again: what is tested is what happens
between a score and the weights, and that does not sample. One test at the end samples, for every algorithm.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from guerdon.parts import CREDIT, OBJECTIVES, Part, build
from guerdon.policies import tiny_policy
from guerdon.rewards import Progress, Reward
from guerdon.rollout import TransformersEngine
from guerdon.training import OnlineConfig, OnlineTrainer
from guerdon.training.assemble import assemble
from guerdon.training.learner import Learner
from guerdon.training.presets import PRESETS
from guerdon.training.scoring import Scorer
from guerdon.training.streams import collect
from guerdon.training.timing import Phases
from guerdon.training.toys import Echo, toy_tasks, toy_texts
from guerdon.types import Group, Score, Span, StopReason, Task, Trajectory, Turn

torch.set_num_threads(1)

GRANULARITY = {
    "outcome": frozenset({"outcome"}),
    "steps": frozenset({"outcome", "steps"}),
    "tokens": frozenset({"outcome", "tokens"}),
}

SHAPES = {
    "none": None,
    "clip": {"name": "clip", "low": -1.0, "high": 1.0},
    "overlong": {"name": "overlong", "max_len": 8, "buffer": 3},
    "two": [{"name": "affine", "scale": 0.5, "shift": 0.1}, {"name": "quantile_rescale", "low": 0.1, "high": 0.9}],
}

VARIANTS: dict[str, dict] = {
    "per_channel": {"weights": {"value": 1.0, "length": 0.1}},
    "gae/steps": {"name": "gae", "rewards": ["outcome", "steps"]},
    "gae/tokens": {"name": "gae", "rewards": ["tokens"], "gamma": 0.9, "lam": 0.9},
    "process_relative/unscaled": {"name": "process_relative", "scale": False},
    "reinforce/running": {"name": "reinforce", "baseline": "running"},
    "reinforce_plus_plus/group": {"name": "reinforce_plus_plus", "baseline": "group"},
    "step_leave_one_out/outcome": {"name": "step_leave_one_out", "rewards": ["steps", "outcome"]},
    "token_returns/outcome": {"name": "token_returns", "rewards": ["outcome"], "baseline": "total"},
    "token_returns/steps": {"name": "token_returns", "rewards": ["steps", "outcome"], "gamma": 0.9},
}


def rules() -> dict[str, dict]:
    """Every registered rule that can be made without further settings, and the variants above."""
    found = {}
    for name in CREDIT:
        try:
            rule = build("credit", {"name": name, **VARIANTS.get(name, {})})
        except Exception:  # noqa: BLE001 - a rule of another room that needs more than settings
            continue
        if hasattr(rule, "needs"):
            found[name] = {"name": name, **VARIANTS.get(name, {})}
    return {**found, **{key: value for key, value in VARIANTS.items() if "name" in value}}


RULES = rules()
GENERAL = ("outcome", "stepwise", "critic")
"""Modules of rules that credit every response."""


class Recorded(Reward):
    """Values from the tokens alone, so that every copy of a trajectory scores the same."""

    def __init__(self, granularity: str, shift: dict[str, float] | None = None) -> None:
        super().__init__(name="recorded")
        self.granularity, self.shift = granularity, shift or {}
        self.gives = GRANULARITY[granularity]

    def score_one(self, trajectory: Trajectory) -> Score:
        ids = [i for turn in trajectory.turns for i in turn.token_ids]
        rng = np.random.default_rng([len(ids), *ids])
        shift = self.shift.get(trajectory.task.id, 0.0)
        value, spans, at = float(rng.normal()) + shift, [], 0
        for turn in trajectory.turns:
            if turn.speaker == "policy":
                middle = at + max(1, len(turn) // 2)
                spans += [Span(at, middle)] + ([Span(middle, at + len(turn))] if middle < at + len(turn) else [])
            at += len(turn)
        parts = {"length": float(len(ids))}
        if self.granularity == "steps":
            return Score(value, tuple(float(x) + shift for x in rng.normal(size=len(spans))), tuple(spans), parts=parts)
        if self.granularity == "tokens":
            return Score(value, tokens=tuple(float(x) for x in rng.normal(size=len(ids))), parts=parts)
        return Score(value, parts=parts)


@cache
def policy():
    return tiny_policy(texts=toy_texts(), hidden=16, layers=1, heads=2, intermediate=32, seed=0, value_head=True)


@cache
def recorded() -> tuple[Group, ...]:
    """Two groups: policy, environment, policy, environment, with ids nobody chose and log-probabilities to match."""
    rng = np.random.default_rng(0)
    vocabulary = policy().model.config.vocab_size
    out = []
    for g in range(2):
        prompt = tuple(int(i) for i in rng.integers(0, vocabulary, 3 + g))
        rows = []
        for _ in range(3):
            turns = []
            for speaker in ("policy", "environment", "policy", "environment"):
                ids = tuple(int(i) for i in rng.integers(0, vocabulary, rng.integers(1, 4)))
                logprobs = tuple(-5.6 + 0.2 * rng.normal(size=len(ids))) if speaker == "policy" else None
                turns.append(Turn(speaker, "x", ids, logprobs))
            rows.append(Trajectory(Task(f"t{g}", "q"), tuple(turns), StopReason.DONE, prompt_ids=prompt))
        out.append(Group(rows[0].task, tuple(rows)))
    return tuple(out)


def config_of(rule: dict, objective: str, shape: str) -> OnlineConfig:
    critic = "critic" in build("credit", rule).needs
    return OnlineConfig(
        algorithm="ppo" if critic else "grpo", credit=rule, objective=objective, shape=SHAPES[shape], group_size=3,
        prompts_per_step=2, optimiser={"lr": 1e-2}, entropy_coef=0.01, steps=2,
    )  # fmt: skip


def legal(granularity: str, rule: dict) -> bool:
    return build("credit", rule).needs & {"steps", "tokens"} <= GRANULARITY[granularity]


def credited(config: OnlineConfig, groups, granularity: str, learner: Learner, shift=None):
    """Score, shape, collect, prepare, credit: the streams of one step."""
    parts = assemble(config)
    scorer = Scorer(Recorded(granularity, shift), parts.shape)
    scores, failures = scorer([t for g in groups for t in g.trajectories], Progress(0, 2), where="test")
    assert not failures
    experience = collect(groups, scores)
    learner.prepare(experience, Phases())
    return experience, parts.algorithm(experience, config)


def learner_of(config: OnlineConfig) -> Learner:
    return Learner(policy(), config, critic=policy() if config.algorithm == "ppo" else None)


@pytest.fixture
def weights():
    """The shared policy is as it was, whatever a test did to it."""
    modules = policy().model, policy().value_head
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in modules]
    yield
    for module, state in zip(modules, before, strict=True):
        module.load_state_dict(state)


@pytest.mark.parametrize("name", RULES)
def test_every_legal_combination_learns_for_two_steps(name: str, weights) -> None:
    rule = RULES[name]
    before = {k: v.clone() for k, v in policy().model.state_dict().items()}
    tried = 0
    for granularity, shape, objective in itertools.product(GRANULARITY, SHAPES, sorted(OBJECTIVES)):
        if not isinstance(OBJECTIVES[objective](), Part) or not legal(granularity, rule):
            continue
        tried += 1
        config = config_of(rule, objective, shape)
        learner = learner_of(config)
        experience, streams = credited(config, list(recorded()), granularity, learner)
        action = torch.from_numpy(experience.action)
        assert streams.advantage.shape == action.shape and torch.isfinite(streams.advantage).all()
        # A rule that credits a part of the response only (a segment, a forced answer) may find nothing here.
        silent = not streams.advantage[action].any()
        assert not silent or type(build("credit", rule)).__module__.rsplit(".", 1)[1] not in GENERAL
        for stream in (streams.policy, streams.entropy, streams.kl):
            assert not stream[~action].any()
        for step in range(2):
            row = learner.update(experience, streams, {}, step=step, total=2, phases=Phases())
            if silent:
                continue
            assert np.isfinite(row["loss"]), (granularity, shape, objective)
            assert row["update/tokens"] == int(streams.policy.ne(0).sum()) > 0, (granularity, shape, objective)
        moved = policy().model.state_dict()
        assert all(torch.isfinite(v).all() for v in moved.values())
        assert silent or any(not torch.equal(v, before[k]) for k, v in moved.items())
        policy().model.load_state_dict(before)
    assert tried >= len(SHAPES) * 4


@pytest.mark.parametrize("name", RULES)
def test_the_order_of_groups_and_members_does_not_matter(name: str) -> None:
    for granularity in GRANULARITY:
        if not legal(granularity, RULES[name]):
            continue
        config = config_of(RULES[name], "ppo_clip", "none")
        learner = learner_of(config)
        one, straight = credited(config, list(recorded()), granularity, learner)
        turned = [replace(g, trajectories=g.trajectories[::-1]) for g in reversed(recorded())]
        other, mirrored = credited(config, turned, granularity, learner)
        for b in range(len(one)):
            c = len(one) - 1 - b
            mine = straight.advantage[one.offsets[b] : one.offsets[b + 1]]
            theirs = mirrored.advantage[other.offsets[c] : other.offsets[c + 1]]
            assert torch.allclose(mine, theirs, atol=1e-5), granularity


@pytest.mark.parametrize(
    ("name", "granularity"),
    [
        ("group_relative", "outcome"), ("leave_one_out", "outcome"), ("per_channel", "outcome"),
        ("reinforce_plus_plus/group", "outcome"), ("token_returns/outcome", "outcome"),
        ("process_relative", "steps"), ("process_relative/unscaled", "steps"),
    ],
)  # fmt: skip
def test_a_constant_on_all_rewards_of_a_group_changes_nothing_where_theory_says_so(name: str, granularity: str) -> None:
    config = config_of(RULES[name], "ppo_clip", "none")
    learner = learner_of(config)
    plain = credited(config, list(recorded()), granularity, learner)[1].advantage
    moved = credited(config, list(recorded()), granularity, learner, {"t0": 7.0, "t1": -2.0})[1].advantage
    assert torch.allclose(plain, moved, atol=1e-4)


def test_a_constant_matters_where_nothing_is_compared() -> None:
    for name in ("reinforce", "gae"):
        config = config_of(RULES[name], "ppo_clip", "none")
        learner = learner_of(config)
        plain = credited(config, list(recorded()), "outcome", learner)[1].advantage
        moved = credited(config, list(recorded()), "outcome", learner, {"t0": 7.0})[1].advantage
        assert not torch.allclose(plain, moved, atol=1e-2)


def gradients(config: OnlineConfig, groups, granularity: str, tempt: bool = False) -> dict[str, torch.Tensor]:
    learner = learner_of(config)
    experience, streams = credited(config, groups, granularity, learner)
    if tempt:
        streams.advantage[~torch.from_numpy(experience.action)] = 1e6
    found = {}

    def look(scale: float, *, where: str) -> dict[str, float]:
        found.update({n: p.grad.clone() for n, p in policy().model.named_parameters() if p.grad is not None})
        return {}

    learner.optimiser.step = look  # type: ignore[method-assign]
    learner.update(experience, streams, {}, step=0, total=2, phases=Phases())
    learner.optimiser.zero_grad()
    return found


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
@pytest.mark.parametrize("name", ["group_relative", "gae/steps", "process_relative", "token_returns"])
def test_tokens_of_the_environment_get_no_gradient(name: str, objective: str) -> None:
    granularity = next(g for g in GRANULARITY if legal(g, RULES[name]))
    config = config_of(RULES[name], objective, "none")
    plain = gradients(config, list(recorded()), granularity)
    tempted = gradients(config, list(recorded()), granularity, tempt=True)
    assert plain and all(torch.equal(plain[k], tempted[k]) for k in plain)


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_the_cut_into_micro_batches_changes_no_objective(objective: str) -> None:
    """A response is never cut, so that a ratio of whole responses sees all of it."""
    config = config_of(RULES["group_relative"], objective, "none")
    whole = gradients(config, list(recorded()), "outcome")
    for change in ({"max_tokens_per_microbatch": 1, "share_prompt": False}, {"share_prompt": False}):
        pieces = gradients(config.model_copy(update=change), list(recorded()), "outcome")
        for name, gradient in whole.items():
            assert torch.allclose(gradient, pieces[name], atol=1e-5 * float(gradient.abs().max()) + 1e-8), name


def test_a_dropped_trajectory_changes_nothing_for_the_others() -> None:
    """Its group is credited as if it had never been sampled, by every rule."""
    for name, rule in RULES.items():
        for granularity in GRANULARITY:
            if not legal(granularity, rule):
                continue
            config = config_of(rule, "ppo_clip", "none")
            learner = learner_of(config)
            broken = [
                replace(g, trajectories=(*g.trajectories, replace(g.trajectories[0], stop=StopReason.ERROR)))
                for g in recorded()
            ]
            one, plain = credited(config, list(recorded()), granularity, learner)
            other, spoilt = credited(config, broken, granularity, learner)
            rows = [b for b in range(len(other)) if other.kept[b]]
            for b, c in enumerate(rows):
                mine = plain.advantage[one.offsets[b] : one.offsets[b + 1]]
                theirs = spoilt.advantage[other.offsets[c] : other.offsets[c + 1]]
                assert torch.allclose(mine, theirs, atol=1e-5), (name, granularity)


@pytest.mark.parametrize("algorithm", sorted(PRESETS))
def test_every_algorithm_samples_and_learns_for_two_steps(algorithm: str, weights) -> None:
    config = OnlineConfig(
        algorithm=algorithm, steps=2, prompts_per_step=2, group_size=4, max_tokens=3, max_turns=2,
        kl_coef=0.01, entropy_coef=0.01, optimiser={"lr": 1e-2},
    )  # fmt: skip
    run = OnlineTrainer(
        policy(), TransformersEngine(policy(), max_slots=16), Echo(), toy_tasks(8), Recorded("outcome"), config,
        critic="shared" if algorithm == "ppo" else None,
    )  # fmt: skip
    for row in run.fit().history:
        assert np.isfinite(row["loss"]) and row["update/steps"] == 1 and row["mismatch/max"] < 1e-3
        assert ("kl" in row) == (config.kl_in == "loss")
