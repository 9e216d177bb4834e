"""``gd.training.Online``: a policy, tasks and a reward, and whatever else is not the default."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from guerdon.errors import ConfigError
from guerdon.training.assemble import assemble, check_tasks
from guerdon.training.callbacks import Callback
from guerdon.training.config import OnlineConfig
from guerdon.training.data import read_tasks
from guerdon.types import Task

if TYPE_CHECKING:
    from guerdon.policies import Policy
    from guerdon.training.loop import RunResult
    from guerdon.training.online import OnlineTrainer

__all__ = ["Online"]

_UNKNOWN_LENGTH = 10**9


class Online:
    """Online reinforcement learning in one call.

    Everything that can be checked without a model is checked when the object is made; the model is loaded when it is
    first needed.

    Args:
        policy: a :class:`~guerdon.policies.Policy`, or what :func:`~guerdon.policies.load_policy` takes (a name, a folder,
            a hub id).
        tasks: tasks, or a JSONL file of them (see :func:`~guerdon.training.read_tasks`).
        reward: a reward, or a callable on trajectories.
        environment: what the policy acts in; default: one prompt, one answer.
        engine: samples; default: transformers in this process.
        shape, credit, objective: parts in place of the algorithm's; see :class:`OnlineTrainer`.
        critic: PPO only; default: the policy's own value head.
        reference, token_weights, evaluate, callbacks, rollout_options, out: see :class:`OnlineTrainer`.
        config: settings; or give them one by one.
        lora: adapters for a policy that is loaded here.
        settings: of :class:`OnlineConfig`, for example ``algorithm="dapo"``. ``steps`` may be left to :meth:`fit`.

    Raises:
        ConfigError: lists what does not fit, before a model loads.

    Example:
        >>> run = gd.training.Online("smollm2", tasks, reward, credit=gd.credit.group_relative()).fit(steps=100)
    """

    def __init__(
        self,
        policy: Policy | str | Path,
        tasks: Sequence[Task] | str | Path,
        reward: Any,
        *,
        environment: Any = None,
        engine: Any = None,
        shape: Any = None,
        credit: Any = None,
        objective: Any = None,
        critic: Literal["shared"] | Policy | None = None,
        reference: Literal["initial"] | Policy | None = "initial",
        token_weights: Mapping[str, Any] | None = None,
        evaluate: Callable[[OnlineTrainer], Mapping[str, float]] | None = None,
        rollout_options: Mapping[str, Any] | None = None,
        callbacks: Sequence[Callback] = (),
        out: str | Path | None = None,
        config: OnlineConfig | None = None,
        lora: Any = None,
        **settings: Any,
    ) -> None:
        if config is not None and settings:
            raise ConfigError(f"give config= or settings ({', '.join(sorted(settings))}), not both")
        self._open_ended = config is None and "steps" not in settings
        # A run whose length fit() will say: no check of a schedule against a default length.
        length: dict[str, Any] = {"steps": _UNKNOWN_LENGTH} if self._open_ended else {}
        self._given = dict(settings)
        self.config = config if config is not None else OnlineConfig(**settings, **length)
        self.tasks = read_tasks(tasks) if isinstance(tasks, str | Path) else list(tasks)
        self.reward = reward
        self._parts = {"shape": shape, "credit": credit, "objective": objective}
        self._policy = policy
        self._engine, self._environment, self._lora = engine, environment, lora
        self._options: dict[str, Any] = {
            "critic": critic,
            "reference": reference,
            "token_weights": token_weights,
            "evaluate": evaluate,
            "rollout_options": rollout_options,
            "callbacks": callbacks,
            "out": out,
        }
        self._trainer: OnlineTrainer | None = None
        if not callable(reward):
            raise ConfigError(
                f"a reward is a guerdon reward or a callable on trajectories, got {type(reward).__name__}"
            )
        parts = assemble(self.config, **self._parts)
        problems = list(check_tasks(parts, reward=reward, tasks=self.tasks))
        if problems:
            raise ConfigError("; ".join(problems))

    @property
    def policy(self) -> Policy:
        """The policy; loaded on first use."""
        if isinstance(self._policy, str | Path):
            from guerdon.policies import load_policy

            ppo = self.config.algorithm == "ppo"
            self._policy = load_policy(self._policy, lora=self._lora, value_head=ppo, seed=self.config.seed)
        return self._policy

    @property
    def trainer(self) -> OnlineTrainer:
        """The trainer; made by :meth:`fit`, or now with the length that the settings give."""
        if self._trainer is None:
            if self._open_ended:
                raise ConfigError("the run's length is open: give steps= here, or to fit(steps=...) first")
            self._trainer = self._make()
        return self._trainer

    def fit(self, steps: int | None = None) -> RunResult:
        """Train; resumes where the run folder was left.

        Args:
            steps: the run's length, where the settings do not give it (default 100); else where to pause.

        Raises:
            ConfigError: a schedule is longer than the run, or the folder belongs to another configuration.
        """
        if self._open_ended:
            self.config = OnlineConfig(**{**self._given, **({} if steps is None else {"steps": steps})})
            self._open_ended = False
        return self.trainer.fit(steps)

    def close(self) -> None:
        """Release what the trainer holds. Idempotent."""
        if self._trainer is not None:
            self._trainer.close()

    def _make(self) -> OnlineTrainer:
        from guerdon.environments import SingleTurn
        from guerdon.rollout import TransformersEngine
        from guerdon.training.online import OnlineTrainer

        policy = self.policy
        options = dict(self._options)
        if self.config.algorithm == "ppo" and options["critic"] is None:
            options["critic"] = "shared"
            policy.add_value_head()
        engine = self._engine if self._engine is not None else TransformersEngine(policy)
        environment = self._environment if self._environment is not None else SingleTurn()
        return OnlineTrainer(
            policy, engine, environment, self.tasks, self.reward, self.config, **self._parts, **options
        )
