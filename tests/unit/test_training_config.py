"""Settings: everything wrong is reported at once, by name, before torch is needed."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from guerdon.errors import ConfigError
from guerdon.training.config import EarlyStopConfig, OnlineConfig, OptimiserConfig, SftConfig, load_yaml


def refused(**values: object) -> str:
    with pytest.raises(ConfigError) as caught:
        OnlineConfig(**values)
    return str(caught.value)


def test_unknown_keys_are_refused_with_the_nearest_known_one() -> None:
    assert "grup_size: unknown setting; did you mean group_size?" in refused(grup_size=4)
    assert "lr: unknown setting; did you mean optimiser.lr?" in refused(lr=1e-5)


def test_all_mistakes_are_reported_together_with_dotted_keys() -> None:
    text = refused(grup_size=4, steps=0, optimiser={"lr": -1.0, "warmp": 3})
    for expected in (
        "grup_size",
        "steps: must be greater than or equal to 1, got 0",
        "optimiser.lr",
        "optimiser.warmp",
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"gamma": 0.9}, "gamma belongs to a critic"),
        ({"value_clip": 0.5}, "value_clip belongs to a critic"),
        ({"optimiser": {"critic_lr": 1e-5}}, "optimiser.critic_lr belongs to a critic"),
        ({"group_size": 1}, "group_size=1 gives grpo no group"),
        ({"algorithm": "ppo", "scale": "none"}, "scale belongs to group-relative"),
        ({"top_p": 0.9}, "top_p=0.9 with old_logprobs='sampled'"),
        ({"top_k": 5}, "top_k=5 with old_logprobs='sampled'"),
        ({"kl_kind": "k1"}, "kl_kind has no effect with kl_coef=0"),
        ({"kl_coef": 0.1, "kl_in": "reward"}, "kl_in='reward' needs per-token credit"),
        ({"aggregation": "constant"}, "needs aggregation_length"),
        ({"aggregation_length": 64}, "only read with aggregation='constant'"),
        ({"minibatch_size": 65}, "exceeds the 64 trajectories"),
        ({"steps": 10, "optimiser": {"lr": 1e-4, "warmup": 10}}, "must be shorter than the run"),
        ({"temperature": 0.0}, "temperature: must be greater than 0"),
        ({"clip_low": 1.5}, "clip_low"),
        ({"kl_coef": math.nan}, "kl_coef"),
    ],
)
def test_senseless_settings_are_refused_with_the_reason(values: dict[str, object], words: str) -> None:
    assert words in refused(**values)


def test_conflicts_are_reported_together() -> None:
    text = refused(group_size=1, gamma=0.9, top_p=0.5)
    assert text.count(";") >= 3
    assert all(word in text for word in ("gamma", "group_size", "top_p"))


def test_legal_variants_pass() -> None:
    OnlineConfig(top_p=0.9, old_logprobs="recomputed")
    OnlineConfig(algorithm="ppo", group_size=1, prompts_per_step=64, minibatch_size=32, kl_coef=1e-3, kl_in="reward")
    OnlineConfig(aggregation="constant", aggregation_length=128, scale="none", clip_high=0.28)


def test_schedules_have_the_stated_shape() -> None:
    linear = OptimiserConfig(lr=1.0, schedule="linear", warmup=4, final=0.1)
    assert [linear.scale(s, 14) for s in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert linear.scale(4, 14) == 1.0
    assert linear.scale(9, 14) == pytest.approx(0.1 + 0.9 * 0.5)
    assert linear.scale(14, 14) == pytest.approx(0.1)
    cosine = OptimiserConfig(lr=1.0, schedule="cosine")
    assert cosine.scale(5, 10) == pytest.approx(0.5)
    assert cosine.scale(2, 8) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert OptimiserConfig(lr=1.0).scale(99, 100) == 1.0


def test_entropy_coefficient_is_annealed_from_first_to_last_step() -> None:
    config = OnlineConfig(steps=11, entropy_coef=0.1, entropy_final=0.0)
    assert [config.entropy_at(s) for s in (0, 5, 10)] == pytest.approx([0.1, 0.05, 0.0])
    assert OnlineConfig(entropy_coef=0.1).entropy_at(50) == 0.1


def test_sft_needs_exactly_one_length() -> None:
    for values in ({}, {"steps": 3, "epochs": 1}):
        with pytest.raises(ConfigError, match="either steps or epochs"):
            SftConfig(**values)
    with pytest.raises(ConfigError, match="critic_lr has no meaning"):
        SftConfig(steps=3, optimiser={"critic_lr": 1e-4})


def test_early_stop_needs_a_condition() -> None:
    with pytest.raises(ConfigError, match="target or patience"):
        EarlyStopConfig(metric="reward/mean")


def test_yaml_reads_scientific_numbers_overrides_and_refuses_repeats(tmp_path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("steps: 7\noptimiser:\n  lr: 1e-5\n")
    assert load_yaml(path) == {"steps": 7, "optimiser": {"lr": 1e-5}}
    assert load_yaml(path, ["optimiser.lr=3e-4", "stop=[a, b]", "kl.x.y=true"]) == {
        "steps": 7,
        "optimiser": {"lr": 3e-4},
        "stop": ["a", "b"],
        "kl": {"x": {"y": True}},
    }
    config = OnlineConfig.from_yaml(path, ["optimiser.warmup=2"])
    assert (config.optimiser.lr, config.optimiser.warmup, config.steps) == (1e-5, 2, 7)
    path.write_text("steps: 7\nsteps: 8\n")
    with pytest.raises(ConfigError, match=r"run.yaml.*line 2.*'steps' is given twice"):
        load_yaml(path)


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        ("a: [1", [], "run.yaml: not valid YAML at line"),
        ("- 1", [], "a mapping of settings is expected, got list"),
        ("steps: 7", ["steps"], "write key=value"),
        ("steps: 7", ["steps.x=1"], "'steps' in"),
        ("stepz: 7", [], "run.yaml: stepz: unknown setting; did you mean steps"),
    ],
)
def test_yaml_errors_name_file_and_key(tmp_path, text: str, overrides: list[str], words: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        OnlineConfig.from_yaml(path, overrides)
    assert words in str(caught.value)


def test_missing_yaml_is_one_clear_line(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"absent.yaml: cannot be read \(No such file"):
        load_yaml(tmp_path / "absent.yaml")


def test_fingerprint_depends_on_values_alone() -> None:
    a = OnlineConfig(steps=5, optimiser={"lr": 1e-4})
    assert a.fingerprint() == OnlineConfig(optimiser=OptimiserConfig(lr=1e-4), steps=5).fingerprint()
    assert a.fingerprint() != OnlineConfig(steps=6, optimiser={"lr": 1e-4}).fingerprint()


@pytest.mark.integration
def test_reading_settings_needs_no_torch() -> None:
    code = (
        "import sys, guerdon.training.config; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_nested_setting_changes_the_default_there_and_leaves_its_neighbours():
    from guerdon.routing.run import RunConfig

    usual = RunConfig()
    changed = RunConfig.from_mapping(
        load_yaml(None, ["online.steps=20", "online.optimiser.lr=1e-4", "warm_start.sft.optimiser.warmup=2"])
    )
    assert changed.online == usual.online.model_copy(
        update={"steps": 20, "optimiser": usual.online.optimiser.model_copy(update={"lr": 1e-4})}
    )
    assert changed.warm_start.rollouts == usual.warm_start.rollouts
    assert changed.warm_start.sft.optimiser == usual.warm_start.sft.optimiser.model_copy(update={"warmup": 2})


def test_a_nested_default_can_still_be_switched_off():
    from guerdon.routing.run import RunConfig

    given = {"warm_start": None, "data": {"world": None, "train": "a.jsonl", "test": "b.jsonl"}, "pool": "pool.yaml"}
    assert RunConfig.from_mapping(given).warm_start is None


def test_an_unknown_nested_key_is_still_refused():
    from guerdon.routing.run import RunConfig

    with pytest.raises(ConfigError, match=r"online\.stepps"):
        RunConfig.from_mapping(load_yaml(None, ["online.stepps=20"]))


def test_wsd_is_constant_and_then_falls_over_the_last_quarter():
    rate = OptimiserConfig(schedule="wsd", warmup=4, final=0.2)
    found = [round(rate.scale(step, 84), 6) for step in (0, 3, 4, 40, 64, 74, 84)]
    assert found == [0.2, 0.8, 1.0, 1.0, 1.0, 0.6, 0.2]
