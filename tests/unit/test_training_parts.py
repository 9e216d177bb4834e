"""Parts by name, bound, and in presets; senseless combinations are refused before a model loads."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import guerdon as gd
from guerdon.errors import ConfigError, UnknownName
from guerdon.parts import CREDIT, OBJECTIVES, SHAPES, Part, build, spec
from guerdon.training import OnlineConfig
from guerdon.training.assemble import assemble
from guerdon.training.presets import CREDIT_OF, PRESETS, TRAITS, Traits
from guerdon.training.rules.outcome import GroupRelative, Reinforce
from guerdon.training.rules.stepwise import TokenReturns
from guerdon.training.toys import SaidIt, toy_tasks
from guerdon.types import Score


def refused(**values: object) -> str:
    with pytest.raises(ConfigError) as caught:
        OnlineConfig(**values)
    return str(caught.value)


# Binding ----------------------------------------------------------------------------------------------------------------


def test_a_pure_function_without_tensors_is_a_part() -> None:
    part = gd.credit.group_relative(scale=False)
    assert isinstance(part, Part) and repr(part) == "group_relative(scale=False)"
    assert part == gd.credit.group_relative(scale=False) != gd.credit.group_relative()
    rewards, ids = torch.tensor([1.0, 3.0]), torch.tensor([0, 0])
    assert part(rewards, ids).tolist() == [-1.0, 1.0] == gd.credit.group_relative(rewards, ids, scale=False).tolist()
    assert part(rewards, ids, scale=True).tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5], rel=1e-5)
    assert gd.credit.group_relative(rewards_B=rewards, group_ids_B=ids, scale=False).tolist() == [-1.0, 1.0]


def test_a_part_is_written_as_yaml_writes_it() -> None:
    assert spec(gd.objectives.ppo_clip()) == "ppo_clip"
    assert spec(gd.objectives.ppo_clip(clip_high=0.28)) == {"name": "ppo_clip", "clip_high": 0.28}
    config = OnlineConfig(credit=gd.credit.group_relative(scale=False), shape=[gd.shaping.clip(low=-1, high=1)])
    assert config.credit == {"name": "group_relative", "scale": False}
    assert config.shape == [{"name": "clip", "low": -1, "high": 1}]
    again = OnlineConfig(**{"credit": config.credit, "shape": config.shape})
    assert again.fingerprint() == config.fingerprint()
    assert "credit.scale" in config.flat()


def test_wrong_settings_are_refused_where_they_are_written() -> None:
    with pytest.raises(ConfigError, match="ppo_clip has no setting 'clip_hi'; did you mean clip_high"):
        gd.objectives.ppo_clip(clip_hi=0.3)
    with pytest.raises(ConfigError, match="clip needs high"):
        gd.shaping.clip(low=0)
    with pytest.raises(ConfigError, match=r"is a part of kind objective, a credit is expected"):
        build("credit", gd.objectives.ppo_clip())
    with pytest.raises(UnknownName, match="unknown credit 'group_relativ'; did you mean group_relative"):
        build("credit", "group_relativ")
    with pytest.raises(ConfigError, match="needs a name"):
        build("credit", {"scale": True})
    # A rule may have settings that its mathematics has not.
    assert build("credit", gd.credit.reinforce(baseline="running", decay=0.5)).decay == 0.5


def test_every_name_leads_to_something() -> None:
    for table in (CREDIT, OBJECTIVES, SHAPES):
        for name in table:
            assert callable(table[name]), name


def test_names_can_be_read_without_torch() -> None:
    code = "import sys, guerdon.parts, guerdon.names, guerdon.training.presets; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# Presets ----------------------------------------------------------------------------------------------------------------


def test_the_table_of_traits_agrees_with_the_parts() -> None:
    for name, listed in TRAITS["credit"].items():
        rule = build("credit", name)
        assert listed.needs == rule.needs and listed.kl_in_reward == rule.kl_in_reward, name
    for name, listed in TRAITS["objective"].items():
        assert listed.settings == OBJECTIVES[name]().parameters.keys() - {"logprobs", "old_logprobs", "advantages"}
    assert set(CREDIT_OF) == set(PRESETS)


def test_presets_fill_in_and_what_is_given_stays() -> None:
    assert OnlineConfig(algorithm="dapo").clip_high == 0.28
    assert OnlineConfig(algorithm="dapo", clip_high=0.3).clip_high == 0.3
    dapo = OnlineConfig(algorithm="dapo", max_tokens=100, max_turns=2)
    assert dapo.shape == {"name": "overlong", "max_len": 200, "buffer": 40} and dapo.dynamic_sampling == 3
    assert OnlineConfig(algorithm="dapo", shape=None).shape is None
    dr = OnlineConfig(algorithm="dr_grpo", max_tokens=100, max_turns=2)
    assert (dr.scale, dr.aggregation, dr.aggregation_length) == ("none", "constant", 200)
    assert OnlineConfig(algorithm="dr_grpo", aggregation="token").aggregation_length is None
    gspo = OnlineConfig(algorithm="gspo")
    assert (gspo.objective, gspo.clip_low, gspo.clip_high, gspo.aggregation) == ("gspo", 3e-4, 4e-4, "sequence")
    assert OnlineConfig(algorithm="gspo", objective="ppo_clip").clip_low == 0.2
    assert OnlineConfig(algorithm="reinforce++", kl_coef=0.1).kl_in == "reward"
    assert OnlineConfig(algorithm="reinforce++", kl_coef=0.1).kl_kind == "k1"
    assert OnlineConfig(algorithm="rloo", kl_coef=0.1, kl_in="loss").kl_kind == "k3"
    assert OnlineConfig(algorithm="rloo").kl_coef == 0
    assert OnlineConfig(algorithm="cispo").clip_high == 4.0


def test_a_run_is_assembled_from_names_objects_and_bound_parts() -> None:
    config = OnlineConfig()
    assert assemble(config).credit is None  # the two oldest algorithms are functions of the configuration
    assert isinstance(assemble(config, credit=gd.credit.group_relative(scale=False)).credit, GroupRelative)
    assert isinstance(assemble(config, credit="token_returns").credit, TokenReturns)
    assert isinstance(assemble(OnlineConfig(algorithm="reinforce")).credit, Reinforce)
    rule = lambda experience, config: torch.zeros(len(experience.action))  # noqa: E731
    parts = assemble(config, credit=rule)
    assert parts.credit is rule and parts.identity() == {"parts.credit": "<lambda>"}
    with pytest.raises(ConfigError, match="credit is given twice"):
        assemble(OnlineConfig(credit="group_relative"), credit=rule)
    with pytest.raises(ConfigError, match="a credit rule is a callable or a name"):
        assemble(config, credit=3)


# Combinations that make no sense ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"credit": "step_leave_one_out", "group_size": 1}, "group_size=1 gives step_leave_one_out no group"),
        ({"algorithm": "rloo", "group_size": 1}, "group_size=1 gives rloo no group"),
        ({"credit": "gae"}, "credit 'gae' needs a critic and algorithm='grpo' trains none; choose algorithm='ppo'"),
        ({"algorithm": "ppo", "credit": "group_relative"}, "trains a critic that credit 'group_relative' does not read"),
        ({"credit": "group_relative", "kl_coef": 0.1, "kl_in": "reward"}, "needs per-token credit"),
        ({"algorithm": "dapo", "kl_coef": 0.1, "kl_in": "reward"}, "algorithm='dapo' has not"),
        ({"credit": {"name": "group_relative", "scal": 1}}, "credit 'group_relative' has no setting 'scal'"),
        ({"credit": "per_channel"}, "credit 'per_channel' needs weights"),
        ({"credit": {"name": "per_channel", "weights": {}}}, "weights must map names of parts to numbers"),
        ({"credit": {"name": "per_channel", "weights": {"a": 1}, "whiten_batch": True}, "whiten": "action"}, "has whitened"),
        ({"credit": {"name": "reinforce", "decay": 1.0}}, "decay must be in"),
        ({"credit": {"name": "token_returns", "rewards": ["outcomes"]}}, "rewards must be of outcome, steps, tokens"),
        ({"credit": "grup_relative"}, "unknown credit 'grup_relative'; did you mean group_relative"),
        ({"credit": len}, "a name, a mapping with a name, or a part"),
        ({"credit": "group_relative", "scale": "none"}, "with credit='group_relative' give it there"),
        ({"algorithm": "rloo", "scale": "none"}, "scale belongs to group-relative"),
        ({"objective": "reinforce", "epochs": 2}, "objective='reinforce' has no ratio"),
        ({"objective": "reinforce", "minibatch_size": 8}, "objective='reinforce' has no ratio"),
        ({"objective": "reinforce", "clip_low": 0.1}, "clip_low has no meaning for objective='reinforce'"),
        ({"objective": {"name": "gspo", "clip_low": 0.1}, "clip_low": 0.2}, "clip_low is given twice"),
        ({"objective": "ppo"}, "unknown objective 'ppo'"),
        ({"shape": ["clip"]}, "clip needs low and high"),
        ({"shape": "overlog"}, "unknown shape 'overlog'; did you mean overlong"),
        ({"shape": {"name": "overlong", "max_len": 10, "buffer": 11}}, r"buffer must be in (0, 10]"),
        ({"importance_cap": 2.0}, "set old_logprobs='recomputed'"),
        ({"importance_cap": -1.0, "old_logprobs": "recomputed"}, "importance_cap"),
        ({"dynamic_sampling": 2, "algorithm": "ppo"}, "credit 'gae' learns from those too"),
        ({"dynamic_sampling": 2, "credit": {"name": "token_returns", "baseline": "none"}}, "learns from those too"),
        ({"filter": {}}, "filter needs accuracy or min_std"),
        ({"filter": {"accuracy": [0.8, 0.2]}}, "two increasing numbers"),
        ({"filter": {"min_std": 0.1, "part": "x"}}, "part has no meaning without accuracy"),
        ({"filter": {"min_std": 0.1}, "algorithm": "ppo", "group_size": 1}, "filter.min_std compares members"),
        ({"on_reward_error": "ignore"}, "'raise', 'drop' or a finite number"),
        ({"on_reward_error": float("nan")}, "'raise', 'drop' or a finite number"),
        ({"no_signal_steps": 0}, "no_signal_steps"),
        ({"optimiser": {"lr": 1e-3, "schedule": "linear", "warmup": 100}}, "must be shorter than the run"),
    ],
)  # fmt: skip
def test_senseless_combinations_are_refused_with_reason_and_fix(values: dict[str, object], words: str) -> None:
    assert words in refused(**values)


def test_rule_objects_are_held_to_what_they_say_of_themselves() -> None:
    class Fussy:
        needs = frozenset({"critic"})

        def __call__(self, experience, config):
            return torch.zeros(len(experience.action))

    with pytest.raises(ConfigError, match=r"credit 'Fussy' needs a critic and algorithm='grpo' trains none"):
        assemble(OnlineConfig(), credit=Fussy())
    assert Traits.of(Fussy()).known and not Traits.of(len).known


# The facade -------------------------------------------------------------------------------------------------------------


def unloaded(**more):
    """A run of a policy that does not exist: whatever is checked is checked before it would be loaded."""
    return gd.training.Online(policy="no-such-policy", tasks=toy_tasks(8), reward=SaidIt(), **more)


class Steps:
    gives = frozenset({"outcome"})
    name = "outcomes"

    def __call__(self, trajectories):
        return [Score(0.0) for _ in trajectories]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"grup_size": 2}, "unknown setting; did you mean group_size"),
        ({"credit": gd.credit.gae()}, "needs a critic"),
        ({"reward": Steps(), "credit": "process_relative"},
         r"credit 'process_relative' reads steps, and reward 'outcomes' gives outcome only.*give it a segmenter"),
        ({"reward": Steps(), "credit": "token_returns"}, "reads tokens"),
        ({"reward": "exact"}, "a reward is a guerdon reward or a callable on trajectories, got str"),
        ({"tasks": toy_tasks(2)}, "exceeds the 2 tasks"),
        ({"tasks": toy_tasks(8) + toy_tasks(1)}, "'say-0' occurs twice"),
        ({"shape": gd.shaping.par()}, "needs reference rewards, and 8 task"),
        ({"config": OnlineConfig(), "group_size": 2}, "give config= or settings"),
        ({"objective": 3}, "an objective is a callable or a name"),
    ],
)  # fmt: skip
def test_everything_is_checked_before_a_model_loads(more: dict, words: str) -> None:
    tasks, reward = more.pop("tasks", toy_tasks(8)), more.pop("reward", SaidIt())
    with pytest.raises(ConfigError, match=words):
        gd.training.Online("no-such-policy", tasks, reward, **more)


def test_the_length_may_be_left_to_fit_and_schedules_are_held_against_it() -> None:
    run = unloaded(optimiser={"lr": 1e-3, "schedule": "linear", "warmup": 200})
    with pytest.raises(ConfigError, match=r"warmup \(200\) must be shorter than the run \(steps=10\)"):
        run.fit(steps=10)
    with pytest.raises(ConfigError, match="length is open"):
        _ = unloaded().trainer
    with pytest.raises(ConfigError, match="must be shorter"):
        unloaded(steps=10, optimiser={"lr": 1e-3, "schedule": "linear", "warmup": 10})


def test_the_call_of_the_design_trains() -> None:
    policy = gd.policies.tiny_policy(hidden=32, layers=1, heads=2, seed=0)
    run = gd.training.Online(
        policy=policy, tasks=toy_tasks(4), reward=SaidIt(0.5),
        shape=gd.shaping.clip(low=0.0, high=0.9), credit=gd.credit.group_relative(), objective=gd.objectives.ppo_clip(),
        prompts_per_step=2, group_size=4, max_tokens=3, optimiser={"lr": 1e-3},
    )  # fmt: skip
    result = run.fit(steps=2)
    assert result.step == 2 and result.stopped == "done" and run.policy is policy
    assert "reward/unshaped" in result.history[0]
    ppo = gd.training.Online(
        policy, toy_tasks(4), SaidIt(0.5), algorithm="ppo", prompts_per_step=2, group_size=2, max_tokens=3, steps=1
    )
    assert "loss/value" in ppo.fit().history[0]
    ppo.close()
