"""Puts the parts of a run together and refuses those that do not fit, all problems at once, before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from guerdon.errors import ConfigError
from guerdon.parts import Part, build, spec
from guerdon.training.config import OnlineConfig
from guerdon.training.losses import Objective
from guerdon.training.presets import CREDIT_OF, Traits
from guerdon.training.shapes import Shape, as_shape, name_of
from guerdon.training.streams import Experience, Streams, grpo_streams, ppo_streams, with_credit
from guerdon.types import Task

if TYPE_CHECKING:
    from guerdon.policies import Policy

__all__ = ["Parts", "assemble", "check_parts", "check_tasks"]

_NAMED = str | Mapping | Part


@dataclass(frozen=True)
class Parts:
    """The parts of a run, resolved.

    Args:
        config: with the parts that were given by name in it.
        algorithm: from an experience to streams.
        credit: the rule, where it is an object of its own (it may have state).
        shape: or None.
        objective: a callable in place of the configuration's, or None.
        traits: what the credit rule needs.
    """

    config: OnlineConfig
    algorithm: Callable[[Experience, OnlineConfig], Streams]
    credit: Any
    shape: Shape | None
    objective: Any
    traits: Traits

    @property
    def needs_reference(self) -> bool:
        """Whether a forward pass of the reference serves anything."""
        reads = Objective.of(self.config, self.objective).reads
        return self.config.kl_coef > 0 or "reference" in self.traits.needs or "reference_logprobs" in reads

    def identity(self) -> dict[str, str]:
        """Names of the parts that no configuration records, by which a resumed run knows them again."""
        given = {
            "credit": self.credit if self.config.credit is None and self.traits.part is not None else None,
            "shape": self.shape if self.config.shape is None else None,
            "objective": self.objective,
        }
        return {f"parts.{kind}": name_of(part) for kind, part in given.items() if part is not None}


def assemble(config: OnlineConfig, *, credit: Any = None, shape: Any = None, objective: Any = None) -> Parts:
    """Resolve parts that are given beside a configuration, as callables, names, mappings or bound functions.

    Raises:
        ConfigError: a part is given twice, is none, or does not fit the settings.
    """
    given = {"credit": credit, "shape": shape, "objective": objective}
    for kind, part in given.items():
        if part is not None and getattr(config, kind) is not None:
            raise ConfigError(f"{kind} is given twice, in the configuration and beside it; keep one")
    named = {kind: part for kind, part in given.items() if _is_named(part)}
    if named:
        config = config.with_parts(**named)
    credit, shape, objective = (None if kind in named else part for kind, part in given.items())
    if objective is not None and not callable(objective):
        raise ConfigError(f"an objective is a callable or a name, got {type(objective).__name__}")
    traits, rule = config.credit_traits(), credit
    if credit is not None:
        if not callable(credit):
            raise ConfigError(f"a credit rule is a callable or a name, got {type(credit).__name__}")
        traits = Traits.of(credit)
        problems = [*_rule_problems(config, traits), *traits.conflicts(config)]
        if problems:
            raise ConfigError("; ".join(problems))
    elif config.credit is not None or CREDIT_OF[config.algorithm] not in ("group_relative", "gae"):
        rule = build("credit", config.credit or CREDIT_OF[config.algorithm])
    # The two oldest algorithms need no rule object: their streams are functions of the configuration.
    plain = ppo_streams if config.algorithm == "ppo" else grpo_streams
    return Parts(
        config,
        plain if rule is None else with_credit(rule),
        rule,
        as_shape(shape if shape is not None else config.shape),
        objective,
        traits,
    )


def _is_named(part: Any) -> bool:
    if isinstance(part, list | tuple):
        return bool(part) and all(_is_named(p) for p in part)
    return isinstance(part, _NAMED) and spec(part) is not None


def _rule_problems(config: OnlineConfig, traits: Traits) -> Iterator[str]:
    """Problems of a rule object, of which only what it says of itself is known."""
    if "group" in traits.needs and config.group_size == 1:
        yield f"group_size=1 gives {traits.name} no group to compare with; use at least 2, or algorithm='ppo'"
    if "critic" in traits.needs and config.algorithm != "ppo":
        yield (
            f"credit {traits.name!r} needs a critic and algorithm={config.algorithm!r} trains none; "
            "choose algorithm='ppo'"
        )


def check_parts(
    parts: Parts,
    *,
    reward: Any,
    policy: Policy,
    engine: Any,
    tasks: Sequence[Task],
    critic: Any,
    reference: Any,
    token_weights: Mapping[str, Any] | None,
) -> None:
    """Refuse parts that do not fit together.

    Raises:
        ConfigError: lists every problem.
    """
    config = parts.config
    problems = [*check_tasks(parts, reward=reward, tasks=tasks)]
    if config.algorithm == "ppo":
        if critic is None:
            problems.append("algorithm='ppo' needs a critic: give critic='shared' or a policy with a value head")
        elif getattr(policy if critic == "shared" else critic, "value_head", None) is None:
            problems.append("the critic has no value head; load it with value_head=True")
    elif critic is not None:
        problems.append(f"algorithm={config.algorithm!r} uses no critic; leave critic out or choose 'ppo'")
    if config.kl_coef > 0 and reference is None:
        problems.append("kl_coef > 0 needs a reference: give reference='initial' or a policy, or set kl_coef=0")
    elif parts.needs_reference and reference is None:
        what = f"credit {parts.traits.name!r}" if "reference" in parts.traits.needs else "the objective"
        problems.append(f"{what} reads a reference's log-probabilities: give reference='initial' or a policy")
    if not engine.trainable:
        problems.append(
            f"{type(engine).__name__} records no token ids or log-probabilities, so its rollouts cannot be trained on"
        )
    unknown = set(token_weights or {}) - {"policy", "entropy"}
    if unknown:
        problems.append(f"token_weights knows the terms 'policy' and 'entropy', got {sorted(unknown)[0]!r}")
    elif "entropy" in (token_weights or {}) and config.entropy_coef == 0 and not config.entropy_final:
        problems.append("token_weights['entropy'] has no effect with entropy_coef=0; set entropy_coef")
    if problems:
        raise ConfigError("; ".join(problems))


def check_tasks(parts: Parts, *, reward: Any, tasks: Sequence[Task]) -> Iterator[str]:
    """Yield what is wrong with reward, shape and tasks, none of which needs a model."""
    config = parts.config
    gives = getattr(reward, "gives", None)
    if gives is not None:
        for what in ("steps", "tokens"):
            if what in parts.traits.needs and what not in gives:
                yield (
                    f"credit {parts.traits.name!r} reads {what}, and reward {name_of(reward)!r} gives "
                    f"{' and '.join(sorted(gives)) or 'none'} only; use a reward with {what[:-1]} values"
                    f"{' (give it a segmenter)' if what == 'steps' else ''}, or a credit rule for outcomes"
                )
    ids = [task.id for task in tasks]
    if len(set(ids)) < len(ids):
        seen: set[str] = set()
        twice = next(i for i in ids if i in seen or seen.add(i))  # type: ignore[func-returns-value]
        yield f"task id {twice!r} occurs twice; ids seed the sampling and must be unique"
    if len(ids) < config.prompts_per_step:
        yield f"prompts_per_step={config.prompts_per_step} exceeds the {len(ids)} tasks; give more or lower it"
    shape = parts.shape
    for one in getattr(shape, "shapes", [shape]):
        if hasattr(one, "check"):
            try:
                one.check(tasks)
            except ConfigError as error:
                yield str(error)
        elif "reference_rewards" in getattr(one, "needs", ()):
            bare = [t.id for t in tasks if not t.meta.get("reference_rewards")]
            if bare:
                yield (
                    f"shape {name_of(one)!r} needs reference rewards, and {len(bare)} task(s) have none "
                    f"({bare[0]!r}, ...); put rewards of the initial policy's answers into each task's "
                    "meta['reference_rewards']"
                )
