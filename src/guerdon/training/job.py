"""A whole run from one YAML file: policy, tasks, environment, reward, settings, trackers.

    policy: smollm2                     # or {base: ..., lora: {r: 16}, device: auto, dtype: auto}
    tasks: train.jsonl                  # one object a line: prompt, reference (id, meta)
    held_out: test.jsonl                # measured every eval_every steps
    reward:                             # a name, a mapping, or a weighted list
      - exact_match
      - {name: tag_format, tags: [think, answer], weight: 0.2}
    algorithm: dapo                     # and every other setting of OnlineConfig
    credit: {name: group_relative, scale: false}
    trackers: [tensorboard]

Relative paths count from the folder of the file.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field

from guerdon.errors import ConfigError, GuerdonError
from guerdon.parts import REWARDS, build
from guerdon.training.config import Config, Count, OnlineConfig, load_yaml
from guerdon.types import Segmenter, Task

__all__ = ["JobConfig", "LoraSettings", "PolicySettings", "make_environment", "make_reward"]

_COMMON = ("name", "weight", "on_error", "timeout", "workers", "label", "segmenter")


class LoraSettings(Config):
    """Adapters; see :class:`guerdon.policies.LoraSpec`."""

    r: Count = 16
    alpha: float = 32.0
    targets: str | tuple[str, ...] = "all-linear"


class PolicySettings(Config):
    """The language model.

    Args:
        base: a registered name (``tiny``, ``smollm2``), a folder, a ``.gguf`` file, or a hub id.
        lora: train adapters instead of all weights.
        device, dtype: ``auto`` (bfloat16 on a GPU, float32 on a CPU) or as torch names them.
    """

    base: str = "smollm2"
    lora: LoraSettings | None = None
    device: str = "auto"
    dtype: str = "auto"


def _policy(value: Any) -> Any:
    return {"base": value} if isinstance(value, str) else value


class JobConfig(OnlineConfig):
    """Everything that ``guerdon train`` needs; all settings of :class:`OnlineConfig` and these.

    Args:
        policy: name, folder, hub id, or :class:`PolicySettings`.
        tasks: JSONL file; see :func:`~guerdon.training.read_tasks`.
        held_out: another one, measured every ``eval_every`` steps and at the end.
        environment: name (and settings) of what the policy acts in.
        reward: see :func:`make_reward`.
        trackers: of ``tensorboard``, ``wandb``, ``trackio``, ``mlflow``, with options where given as mappings.
        record_every: steps between records of trajectories (0: none).
    """

    policy: Annotated[PolicySettings, BeforeValidator(_policy)] = PolicySettings()
    tasks: Path
    held_out: Path | None = None
    environment: str | dict[str, Any] = "single_turn"
    reward: str | dict[str, Any] | list[str | dict[str, Any]]
    trackers: list[str | dict[str, Any]] = []
    record_every: Annotated[int, Field(ge=0)] = 10

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a file; relative ``tasks`` and ``held_out`` are looked for beside it."""
        values = load_yaml(path, overrides)
        given = {override.partition("=")[0].strip() for override in overrides}
        for key in ("tasks", "held_out"):
            # What was typed at the prompt counts from where it was typed.
            if isinstance(values.get(key), str) and key not in given:
                values[key] = Path(path).parent / values[key]
        return cls.from_mapping(values, source=str(path))

    def conflicts(self) -> Iterator[str]:
        yield from super().conflicts()
        if (self.held_out is None) != (self.eval_every == 0):
            yield "held_out and eval_every belong together: give both or neither"
        for make in (lambda: make_reward(self.reward), lambda: make_environment(self.environment)):
            try:
                make()
            except (GuerdonError, ValueError) as error:
                yield str(error)

    def online(self) -> OnlineConfig:
        """The trainer's settings alone."""
        given = self.model_fields_set & OnlineConfig.model_fields.keys()
        return OnlineConfig(**{name: getattr(self, name) for name in given})

    def read(self) -> tuple[list[Task], list[Task]]:
        """Tasks to train on and to measure on.

        Raises:
            DataError: a file cannot be read.
            ConfigError: a task is in both files.
        """
        from guerdon.training.data import read_tasks

        tasks = read_tasks(self.tasks)
        held_out = [] if self.held_out is None else read_tasks(self.held_out)
        both = {t.id for t in tasks} & {t.id for t in held_out}
        if both and self.held_out != self.tasks:
            raise ConfigError(f"task {sorted(both)[0]!r} is in tasks and in held_out; give it another id, or remove it")
        return tasks, held_out


def make_reward(spec: Any) -> Any:
    """A reward from YAML.

    Args:
        spec: a name of the registry, a mapping with ``name`` and the reward's settings, or a list of these, which are
            added. Any of them may have ``weight``, ``on_error``, ``timeout``, ``workers``, ``label`` (its name in logs) and
            ``segmenter`` (``lines``, ``blank_lines``, ``turns``, or a mapping of :class:`~guerdon.types.Segmenter`).

    Raises:
        UnknownName, ConfigError: a name or a setting that does not exist, or one that is missing.
    """
    from guerdon.rewards.base import as_reward, check_on_error

    if isinstance(spec, list):
        if not spec:
            raise ConfigError("reward is an empty list; name at least one reward")
        terms = [make_reward(one) for one in spec]
        return sum(terms[1:], terms[0])
    settings: dict[str, Any] = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = settings.get("name")
    if not isinstance(name, str):
        raise ConfigError(f"a reward given as a mapping needs a name, got {spec!r}; known are {', '.join(REWARDS)}")
    accepted = _parameters(REWARDS[name])
    common = {key: settings.pop(key) for key in _COMMON if key != "name" and key in settings and key not in accepted}
    if "segmenter" in settings:
        settings["segmenter"] = _segmenter(settings["segmenter"])
    elif "segmenter" in common:
        raise ConfigError(f"reward {name!r} scores no steps, so it takes no segmenter; remove it")
    made = as_reward(build("reward", settings))
    if "on_error" in common:
        check_on_error(common["on_error"])
        made.on_error = common["on_error"]
    if "label" in common:
        made.name = str(common["label"])
    if "timeout" in common or "workers" in common:
        made.limit(timeout=common.get("timeout"), workers=common.get("workers"))
    return made * common["weight"] if "weight" in common else made


def make_environment(spec: Any) -> Any:
    """An environment from its name or a mapping with a name."""
    return build("environment", spec)


def _parameters(factory: Any) -> Mapping[str, Any]:
    try:
        return inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return {}


def _segmenter(value: Any) -> Any:
    if isinstance(value, str):
        return Segmenter(value)  # type: ignore[arg-type]
    return Segmenter(**value) if isinstance(value, Mapping) else value
