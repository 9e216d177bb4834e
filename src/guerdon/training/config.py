"""Settings of the training loops: typed, read without torch, every mistake reported before a model loads.

A setting that is unknown, of the wrong type, out of range, or senseless beside another one raises one
:class:`~guerdon.errors.ConfigError` that lists all problems of that kind together, each with its fix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from guerdon.errors import ConfigError
from guerdon.parts import Part, build
from guerdon.parts import spec as part_spec
from guerdon.training.presets import CREDIT_OF, TRAITS, Traits, fill
from guerdon.training.settings import Config, Count, Fraction, NonNegative, Positive, load_yaml

__all__ = [
    "Config",
    "DistributedConfig",
    "EarlyStopConfig",
    "FilterConfig",
    "OnlineConfig",
    "OptimiserConfig",
    "SftConfig",
    "load_yaml",
]


def _spelled(value: Any) -> Any:
    """A part as YAML spells it; a list of parts where several are allowed."""
    if isinstance(value, list | tuple):
        return [_spelled(item) for item in value]
    spelled = part_spec(value)
    if value is not None and (
        not isinstance(spelled, str | dict) or (isinstance(spelled, dict) and "name" not in spelled)
    ):
        raise ValueError("a name, a mapping with a name, or a part such as gd.credit.group_relative() is expected")
    return spelled


def _on_error(value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number and value not in ("raise", "drop"):
        raise ValueError("'raise', 'drop' or a finite number that stands for the score is expected")
    return float(value) if number else value


OnRewardError = Annotated[str | float, BeforeValidator(_on_error)]
PartName = Annotated[str | dict[str, Any] | None, BeforeValidator(_spelled)]
PartNames = Annotated[str | dict[str, Any] | list[str | dict[str, Any]] | None, BeforeValidator(_spelled)]


class OptimiserConfig(Config):
    """AdamW and its learning rate.

    Args:
        lr: peak learning rate of the policy.
        critic_lr: of the critic or value head; default: ``lr``.
        schedule: what follows the warm-up: ``"constant"``, ``"linear"`` or ``"cosine"`` down to ``final * lr``, or ``"wsd"``
            (warm-up, stable, decay: constant, and linear down over the last quarter of the run).
        warmup: steps of linear warm-up.
        final: fraction of ``lr`` at the end of a decaying schedule.
        weight_decay: decoupled; applied to matrices only, not to gains and biases.
        betas, eps: of AdamW.
        grad_clip: largest gradient norm (per optimiser); ``None`` leaves gradients as they are.
    """

    lr: Positive = 1e-5
    critic_lr: Positive | None = None
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    warmup: Annotated[int, Field(ge=0)] = 0
    final: Fraction = 0.0
    weight_decay: NonNegative = 0.0
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: Positive = 1e-8
    grad_clip: Positive | None = 1.0

    def conflicts(self) -> Iterator[str]:
        if self.schedule == "constant" and "final" in self.model_fields_set:
            yield "final has no meaning with schedule='constant'; choose 'linear', 'cosine' or 'wsd', or leave final out"

    def scale(self, step: int, steps: int) -> float:
        """Factor on the learning rate at ``step`` (from 0) of ``steps``; a pure function, so a resumed run agrees."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        if self.schedule == "constant":
            return 1.0
        done = min(1.0, (step - self.warmup) / max(1, steps - self.warmup))
        if self.schedule == "wsd":
            shape = min(1.0, 4.0 * (1.0 - done))
        else:
            shape = 1.0 - done if self.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return self.final + (1.0 - self.final) * shape


class EarlyStopConfig(Config):
    """End a run before its last step.

    Args:
        metric: key of the metrics row to watch, for example ``"reward/mean"`` or ``"eval/em"``.
        target: stop as soon as the metric reaches this.
        patience: stop after so many readings without a new best.
        mode: whether larger (``"max"``) or smaller (``"min"``) is better.
    """

    metric: str
    target: float | None = None
    patience: Count | None = None
    mode: Literal["max", "min"] = "max"

    def conflicts(self) -> Iterator[str]:
        if self.target is None and self.patience is None:
            yield "early_stop needs target or patience"


class DistributedConfig(Config):
    """Where a run's work is done; it changes where, not what, so one file serves one process and many.

    Args:
        strategy: of the processes that ``torchrun`` or ``accelerate launch`` start. ``"replicate"``: each holds the
            whole model and takes a share of the trajectories. ``"shard"``: the weights that are trained, their gradients
            and moments are divided among them (FSDP), and each samples from a whole copy.
        samplers: Ray actors that sample, each with a copy of the policy; 0 samples in the trainer's process.
        staleness: updates by which the weights that sample a step may lag behind the ones that learn from it, so that
            sampling and learning overlap; needs samplers.
        reward_workers: Ray actors among which a step's trajectories are divided for scoring; 0 scores in the
            trainer's process.
        sampler_resources, reward_resources: what each actor reserves, as Ray takes it, for example
            ``{num_cpus: 2, num_gpus: 1}``.
        engine: what samples: ``"transformers"``, or ``"vllm"`` (which keeps a copy of its own).
    """

    strategy: Literal["replicate", "shard"] = "replicate"
    samplers: Annotated[int, Field(ge=0)] = 0
    staleness: Annotated[int, Field(ge=0)] = 0
    reward_workers: Annotated[int, Field(ge=0)] = 0
    sampler_resources: dict[str, float] = {}
    reward_resources: dict[str, float] = {}
    engine: Literal["transformers", "vllm"] = "transformers"

    def conflicts(self) -> Iterator[str]:
        if self.staleness > 0 and self.samplers == 0:
            yield "staleness has no effect without samplers; set samplers, or remove staleness"
        if self.sampler_resources and self.samplers == 0:
            yield "sampler_resources has no effect without samplers; set samplers, or remove it"
        if self.reward_resources and self.reward_workers == 0:
            yield "reward_resources has no effect without reward_workers; set reward_workers, or remove it"
        if self.strategy == "shard" and self.samplers > 0:
            yield "strategy='shard' samples in the processes that train; remove samplers, or choose 'replicate'"


class SftConfig(Config):
    """Supervised fine-tuning on given responses.

    Args:
        steps: optimiser steps in all; give this or ``epochs``.
        epochs: passes over the data.
        batch_size: examples per optimiser step.
        max_tokens_per_microbatch: tokens held in one forward pass; changes memory and speed only.
        share_prompt: put responses to one prompt into one row that holds it once, as many as save work.
        optimiser: learning rate and friends.
        seed: order of the examples.
        save_every: steps between checkpoints (0: only at the end).
        keep_last: how many checkpoints stay on disk.
    """

    steps: Count | None = None
    epochs: Count | None = None
    batch_size: Count = 32
    max_tokens_per_microbatch: Count = 8192
    share_prompt: bool = True
    optimiser: OptimiserConfig = OptimiserConfig(lr=1e-5, schedule="cosine")
    seed: int = 0
    save_every: Annotated[int, Field(ge=0)] = 0
    keep_last: Count = 2

    def free_on_resume(self) -> frozenset[str]:
        lengths = {"steps", "epochs"} if self.optimiser.schedule == "constant" else set()
        return super().free_on_resume() | lengths

    def conflicts(self) -> Iterator[str]:
        if (self.steps is None) == (self.epochs is None):
            yield "give either steps or epochs"
        if self.steps is not None and self.optimiser.warmup >= self.steps:
            yield f"optimiser.warmup ({self.optimiser.warmup}) must be shorter than the run (steps={self.steps})"
        if self.optimiser.critic_lr is not None:
            yield "optimiser.critic_lr has no meaning in supervised fine-tuning; remove it"


class FilterConfig(Config):
    """Which groups are learned from. The others are left out of loss and statistics, and counted.

    Args:
        accuracy: lowest and highest mean of the group's rewards (or of ``part``), both allowed: prompts that the
            policy solves nearly always or nearly never teach little.
        part: named part of the scores whose mean counts as accuracy; the outcome by default.
        min_std: least standard deviation of the group's outcomes.

    Source: accuracy band, PRIME (arXiv 2502.01456), 0.2 to 0.8; deviation, DAPO (arXiv 2503.14476) with any above 0.
    """

    accuracy: tuple[float, float] | None = None
    part: str | None = None
    min_std: NonNegative = 0.0

    def conflicts(self) -> Iterator[str]:
        if self.accuracy is None and self.min_std == 0:
            yield "filter needs accuracy or min_std"
        if self.accuracy is not None and not self.accuracy[0] < self.accuracy[1]:
            yield f"accuracy must be two increasing numbers, got {list(self.accuracy)}"
        if self.part is not None and self.accuracy is None:
            yield "part has no meaning without accuracy; remove it"


_CRITIC_ONLY = ("gamma", "lam", "value_coef", "value_clip")
_GROUP_ONLY = ("scale", "skip_zero_variance")


class OnlineConfig(Config):
    """Online reinforcement learning: sample, score, assign, optimise.

    Sampling:
        algorithm: a preset of what is below, see :mod:`guerdon.training.presets`: ``"grpo"`` (advantages relative to the
            group) and its variants ``"dr_grpo"``, ``"dapo"``, ``"gspo"``, ``"cispo"``; ``"rloo"``, ``"reinforce"``,
            ``"reinforce++"``; ``"ppo"`` (a critic and GAE). Whatever is given beside it is kept.
        steps: sampling steps of the run.
        prompts_per_step, group_size: tasks per step and trajectories per task.
        temperature, top_p, top_k, max_tokens, stop: of each policy turn.
        max_turns: policy turns before the trajectory is cut (or its final turn asked for).
        max_observation_tokens: longest environment turn; longer ones are cut on the right.
        concurrency: most trajectories alive at once (default: all of the step).
        filter: which groups are learned from; see :class:`FilterConfig`.
        dynamic_sampling: further rounds of sampling in which groups that teach nothing (no variance, or filtered out)
            are replaced by groups of other tasks; at most so many a step.
    Update:
        minibatch_size: trajectories per optimiser step (default: all of the step).
        epochs: passes over the step's trajectories.
        max_tokens_per_microbatch: tokens held in one forward pass; changes memory and speed only.
        share_prompt: put responses to one prompt into one row that holds it once, as many as save work.
        optimiser: learning rates, schedule, clipping of gradients.
        old_logprobs: the ratio's denominator: ``"sampled"`` (recorded by the engine) or ``"recomputed"``
            (one more forward pass by the trainer).
        importance_cap: with ``"recomputed"``, weigh each token by the trainer's over the sampler's probability, at
            most this.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
    Objective:
        objective: name (and settings) of the loss per token; ``clip_low`` and ``clip_high`` are its where it has them.
        clip_low, clip_high: the ratio is clipped to ``[1 - clip_low, 1 + clip_high]``.
        aggregation: ``"token"`` (mean over the minibatch's action tokens), ``"sequence"`` (mean over
            trajectories of their token means), ``"constant"`` (sum over tokens, divided by trajectories times
            ``aggregation_length``).
        entropy_coef, entropy_final: entropy bonus, linear from the first to the second over the run.
        kl_coef, kl_in, kl_kind: penalty towards the reference, in the reward (per token, no gradient of
            its own) or in the loss, with the k1, k2 or k3 estimator.
    Advantages:
        shape: name (and settings) of what maps scores to scores before credit; a list is applied in order.
        credit: name (and settings) of the credit rule; the algorithm's own by default.
        scale: divide group-relative advantages by the group's standard deviation (``"std"``) or not (``"none"``).
        skip_zero_variance: leave groups whose rewards are all equal out of forward and backward passes.
        whiten: of the advantages over the step: ``"none"``, ``"action"`` (policy tokens) or ``"response"``
            (environment tokens included, as released Router-R1 code does).
        gamma, lam, value_coef, value_clip: of the critic (PPO only).
        mask_truncated: leave trajectories that were cut off out of the loss and out of the statistics.
        on_reward_error: what a failed score means: ``"raise"``, ``"drop"`` the trajectory from loss and statistics, or
            a number that stands for it. Each is counted. A reward's own ``"drop"`` or number comes first.
        reward_timeout: seconds for one scoring of a step by a reward that is a plain callable (a
            :class:`~guerdon.rewards.Reward` has its own ``timeout``).
    Run:
        no_signal_steps: with group-relative credit, end the run after so many steps in a row in which no group had any
            variance (a warning comes at half of them); ``None`` never.
        seed, eval_every, save_every, keep_last, early_stop, distributed.
    """

    algorithm: Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce", "reinforce++", "ppo"] = "grpo"
    steps: Count = 100
    prompts_per_step: Count = 8
    group_size: Count = 8
    temperature: Positive = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    max_tokens: Count = 256
    stop: tuple[str, ...] = ()
    max_turns: Count = 1
    max_observation_tokens: Count | None = None
    concurrency: Count | None = None
    filter: FilterConfig | None = None
    dynamic_sampling: Annotated[int, Field(ge=0)] = 0

    minibatch_size: Count | None = None
    epochs: Count = 1
    max_tokens_per_microbatch: Count = 8192
    share_prompt: bool = True
    optimiser: OptimiserConfig = OptimiserConfig(lr=1e-6)
    old_logprobs: Literal["sampled", "recomputed"] = "sampled"
    importance_cap: Positive | None = None
    gradient_checkpointing: bool = False

    objective: PartName = None
    clip_low: Annotated[float, Field(gt=0, le=1)] = 0.2
    clip_high: Positive = 0.2
    aggregation: Literal["token", "sequence", "constant"] = "token"
    aggregation_length: Count | None = None
    entropy_coef: NonNegative = 0.0
    entropy_final: NonNegative | None = None
    kl_coef: NonNegative = 0.0
    kl_in: Literal["reward", "loss"] = "loss"
    kl_kind: Literal["k1", "k2", "k3"] = "k3"

    shape: PartNames = None
    credit: PartName = None
    scale: Literal["std", "none"] = "std"
    skip_zero_variance: bool = True
    whiten: Literal["none", "action", "response"] = "none"
    gamma: Fraction = 1.0
    lam: Fraction = 1.0
    value_coef: Positive = 0.5
    value_clip: Positive | None = 0.5
    mask_truncated: bool = False
    on_reward_error: OnRewardError = "raise"
    reward_timeout: Positive | None = None

    no_signal_steps: Count | None = 50
    seed: int = 0
    eval_every: Annotated[int, Field(ge=0)] = 0
    save_every: Annotated[int, Field(ge=0)] = 0
    keep_last: Count = 2
    early_stop: EarlyStopConfig | None = None
    distributed: DistributedConfig = DistributedConfig()

    @property
    def trajectories_per_step(self) -> int:
        """How many trajectories are sampled per step."""
        return self.prompts_per_step * self.group_size

    def free_on_resume(self) -> frozenset[str]:
        # A longer run is the same run so far, unless a schedule depends on the length.
        lengths = {"steps"} if self.optimiser.schedule == "constant" and self.entropy_final is None else set()
        where = {key for key in self.flat() if key.startswith("distributed.")}
        return super().free_on_resume() | lengths | where | {"no_signal_steps"}

    def entropy_at(self, step: int) -> float:
        """Entropy coefficient at ``step`` (from 0)."""
        if self.entropy_final is None or self.steps == 1:
            return self.entropy_coef
        done = min(1.0, step / (self.steps - 1))
        return self.entropy_coef + (self.entropy_final - self.entropy_coef) * done

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        return fill(values) if isinstance(values, dict) else values

    def with_parts(self, **parts: Any) -> Self:
        """The same settings with other parts (``credit``, ``objective``, ``shape``), checked again together."""
        given = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self)(**{**given, **parts})

    def credit_traits(self) -> Traits:
        """What the credit rule reads. A rule with settings is made for that, which imports torch but loads no model."""
        return _traits("credit", self.credit if self.credit is not None else CREDIT_OF[self.algorithm])

    def objective_traits(self) -> Traits:
        """What the objective reads."""
        return _traits("objective", self.objective or "ppo_clip")

    def credit_problems(self, traits: Traits) -> Iterator[str]:
        """Why a credit rule cannot work with these settings, one sentence each."""
        name, needs = traits.name, traits.needs
        if "group" in needs and self.group_size == 1:
            who = self.algorithm if self.credit is None else name
            yield f"group_size=1 gives {who} no group to compare with; use at least 2, or algorithm='ppo'"
        if "critic" in needs and self.algorithm != "ppo":
            yield f"credit {name!r} needs a critic and algorithm={self.algorithm!r} trains none; choose algorithm='ppo'"
        if self.algorithm == "ppo" and traits.known and "critic" not in needs:
            yield (
                f"algorithm='ppo' trains a critic that credit {name!r} does not read; choose algorithm='grpo', "
                "or a credit rule with a critic (gae)"
            )
        if self.kl_coef > 0 and self.kl_in == "reward" and traits.known and not traits.kl_in_reward:
            yield (
                f"kl_in='reward' needs per-token credit, which {'algorithm' if self.credit is None else 'credit'}="
                f"{(self.algorithm if self.credit is None else name)!r} has not; use kl_in='loss' or 'ppo'"
            )

    def conflicts(self) -> Iterator[str]:
        given = self.model_fields_set
        try:
            credit, objective = self.credit_traits(), self.objective_traits()
            for shape in self.shape if isinstance(self.shape, list) else [self.shape]:
                build("shape", shape)
        except (ConfigError, KeyError, ImportError) as error:
            yield str(error)
            return
        yield from self.credit_problems(credit)
        yield from credit.conflicts(self)
        yield from objective.conflicts(self)
        if self.algorithm != "ppo":
            for name in _CRITIC_ONLY:
                if name in given:
                    yield f"{name} belongs to a critic and algorithm={self.algorithm!r} has none; remove it or choose 'ppo'"
            if self.optimiser.critic_lr is not None:
                yield (
                    f"optimiser.critic_lr belongs to a critic and algorithm={self.algorithm!r} has none; remove it or "
                    "choose 'ppo'"
                )
        if "scale" in given and (self.credit is not None or CREDIT_OF[self.algorithm] != "group_relative"):
            yield (
                "scale belongs to group-relative advantages; remove it or choose algorithm='grpo'"
                if self.credit is None
                else f"scale is the algorithm's; with credit={credit.name!r} give it there: credit: {{name: {credit.name}, scale: ...}}"
            )
        if "skip_zero_variance" in given and self.algorithm == "ppo":
            yield "skip_zero_variance belongs to group-relative advantages; remove it or choose algorithm='grpo'"
        for name in ("clip_low", "clip_high"):
            if name in given and name not in objective.settings:
                yield f"{name} has no meaning for objective={objective.name!r}; remove it"
            elif name in given and isinstance(self.objective, dict) and name in self.objective:
                yield f"{name} is given twice, beside objective and in it; keep one"
        if objective.name == "reinforce" and (
            self.epochs > 1 or (self.minibatch_size or self.trajectories_per_step) < self.trajectories_per_step
        ):
            yield (
                "objective='reinforce' has no ratio, so it is wrong after the first optimiser step of a batch; use "
                "epochs=1 without minibatch_size, or objective='ppo_clip'"
            )
        if self.importance_cap is not None and self.old_logprobs == "sampled":
            yield (
                "importance_cap corrects the trainer's log-probabilities towards the sampler's; set "
                "old_logprobs='recomputed' (with 'sampled' the ratio itself does that), or remove it"
            )
        if self.filter is not None and self.group_size == 1 and self.filter.min_std > 0:
            yield "filter.min_std compares members of a group and group_size=1; raise group_size or remove it"
        if (
            self.dynamic_sampling
            and self.filter is None
            and (self.group_size == 1 or (credit.known and "group" not in credit.needs))
        ):
            yield (
                f"dynamic_sampling replaces groups without variance, and credit {credit.name!r} learns from those too; "
                "give filter to say which groups to replace, or remove it"
            )
        if self.old_logprobs == "sampled" and (self.top_p < 1 or self.top_k > 0):
            cut = f"top_p={self.top_p}" if self.top_p < 1 else f"top_k={self.top_k}"
            yield (
                f"{cut} with old_logprobs='sampled' scales every ratio by the kept probability mass; "
                "set old_logprobs='recomputed', or keep the whole vocabulary (top_p=1, top_k=0)"
            )
        if self.kl_coef == 0:
            for name in ("kl_in", "kl_kind"):
                if name in given:
                    yield f"{name} has no effect with kl_coef=0; set kl_coef or remove {name}"
        if self.aggregation == "constant" and self.aggregation_length is None:
            yield "aggregation='constant' needs aggregation_length (tokens), usually the longest response"
        if self.aggregation != "constant" and self.aggregation_length is not None:
            yield "aggregation_length is only read with aggregation='constant'; remove it"
        if self.minibatch_size is not None and self.minibatch_size > self.trajectories_per_step:
            yield (
                f"minibatch_size={self.minibatch_size} exceeds the {self.trajectories_per_step} trajectories of a "
                f"step (prompts_per_step * group_size)"
            )
        if self.entropy_final is not None and self.entropy_coef == 0 and self.entropy_final == 0:
            yield "entropy_final=0 has no effect with entropy_coef=0; remove it"
        if self.optimiser.warmup >= self.steps:
            yield f"optimiser.warmup ({self.optimiser.warmup}) must be shorter than the run (steps={self.steps})"


def _traits(kind: Literal["credit", "objective"], value: Any) -> Traits:
    """Traits of a part from the table, or from the part itself."""
    if isinstance(value, str) and value in TRAITS[kind]:
        return TRAITS[kind][value]
    name = value if isinstance(value, str) else value["name"]
    made = build(kind, value)
    if isinstance(made, Part):
        if kind == "credit":
            raise ConfigError(f"credit {name!r} is a pure function that no rule is registered for; see guerdon.names")
        return Traits(name, settings=frozenset(made.parameters))
    return Traits.of(made, name)
