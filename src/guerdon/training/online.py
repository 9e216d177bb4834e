"""Online reinforcement learning: sample, score, assign, optimise, one step after the other.

The loop knows no algorithm. An algorithm (``streams.py``) turns scored trajectories into per-token streams;
the objective (``losses.py``) consumes them. What is here: drawing tasks, sampling on an engine, scoring with
counted failures, forward passes for what the streams need, minibatches, and the record of every step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from guerdon.errors import ConfigError, GuerdonError, RewardError
from guerdon.training.callbacks import Callback, EarlyStop, Evaluate
from guerdon.training.config import OnlineConfig
from guerdon.training.data import batch_indices, digest
from guerdon.training.events import EventLoop
from guerdon.training.learner import Learner
from guerdon.training.loop import Run
from guerdon.training.metrics import sampling_row
from guerdon.training.optimise import TrainingError
from guerdon.training.streams import ALGORITHMS, Experience, Streams, TokenWeights, collect, weigh
from guerdon.training.timing import Phases
from guerdon.types import Group, Score, StopReason, Task, Trajectory, validate_score

if TYPE_CHECKING:
    from guerdon.policies import Policy
    from guerdon.rollout import Engine, Environment

__all__ = ["OnlineTrainer", "StepDetail"]

RewardLike = Callable[[Sequence[Trajectory]], Sequence[Score | float]]
Shape = Callable[[Sequence[Trajectory], Sequence[Score]], Sequence[Score]]


@dataclass(frozen=True)
class StepDetail:
    """What a step made, for callbacks.

    Args:
        groups: as sampled.
        trajectories, scores: flat, in the order of the groups.
        experience, streams: what the update was computed from.
    """

    groups: list[Group]
    trajectories: list[Trajectory]
    scores: list[Score]
    experience: Experience
    streams: Streams


class OnlineTrainer(Run):
    """Trains a policy on the rewards of its own trajectories.

    Args:
        policy: trained in place.
        engine: samples from that policy; it must record ids and log-probabilities.
        environment: what the policy acts in.
        tasks: drawn in an order that depends on ``config.seed`` alone; ids must be unique.
        reward: trajectories to scores; if it has ``state_dict``, the state is part of every checkpoint.
        config: settings.
        critic: ``"shared"`` (the policy's value head) or another policy with a value head; PPO only.
        reference: ``"initial"`` (a frozen copy of the policy as given), another policy, or None.
        shape: maps trajectories and scores to scores before credit; may have ``state_dict``.
        token_weights: for the terms ``"policy"`` and ``"entropy"``, a function from a trajectory to relative
            weights of its response tokens (for example: more entropy bonus on the tokens that name a choice).
        evaluate: measured every ``config.eval_every`` steps under ``eval/``, for example a :class:`HeldOut`.
        rollout_options: further keyword arguments of :func:`guerdon.rollout.rollout`.
        callbacks: see :mod:`guerdon.training.callbacks`.
        out: run folder; a second start with the same folder resumes.

    Raises:
        ConfigError: parts that do not fit together (no critic for PPO, an engine without log-probabilities,
            fewer tasks than ``prompts_per_step``, ...).
    """

    def __init__(
        self,
        policy: Policy,
        engine: Engine,
        environment: Environment,
        tasks: Sequence[Task],
        reward: RewardLike,
        config: OnlineConfig,
        *,
        critic: Literal["shared"] | Policy | None = None,
        reference: Literal["initial"] | Policy | None = "initial",
        shape: Shape | None = None,
        token_weights: Mapping[str, TokenWeights] | None = None,
        evaluate: Callable[[OnlineTrainer], Mapping[str, float]] | None = None,
        rollout_options: Mapping[str, Any] | None = None,
        callbacks: Sequence[Callback] = (),
        out: str | Path | None = None,
    ) -> None:
        _check_parts(policy, engine, tasks, config, critic, reference, token_weights)
        self.policy = policy
        self.engine = engine
        self.environment = environment
        self.tasks = list(tasks)
        self.reward = reward
        self.shape = shape
        self._settings = config
        self._token_weights = dict(token_weights or {})
        self._rollout_options = dict(rollout_options or {})
        if config.kl_coef == 0:
            reference = None  # not even loaded: its forward pass would serve only a log line
        self.learner = Learner(
            policy,
            config,
            critic=policy if critic == "shared" else critic,
            reference=_initial(policy) if reference == "initial" else reference,
        )
        self._algorithm = ALGORITHMS[config.algorithm]
        self._events = EventLoop()
        self._failure_reported = False
        if (config.eval_every > 0) != (evaluate is not None):
            raise ConfigError(
                f"eval_every={config.eval_every} and evaluate={evaluate!r} belong together: give both or neither"
            )
        if evaluate is not None:
            callbacks = [*callbacks, Evaluate(evaluate, every=config.eval_every)]  # type: ignore[arg-type]
        if config.early_stop is not None:
            callbacks = [*callbacks, EarlyStop(config.early_stop)]
        super().__init__(
            config,
            total=config.steps,
            out=out,
            callbacks=callbacks,
            identity={"tasks": digest(task.id for task in self.tasks)},
            save_every=config.save_every,
            keep_last=config.keep_last,
        )

    def close(self) -> None:
        """Close the event loop on which environments ran. Idempotent."""
        self._events.close()

    def run_async(self, coroutine: Any) -> Any:
        """Run a coroutine on the trainer's event loop, the one on which its environments hold connections."""
        return self._events.run(coroutine)

    def sample(
        self,
        tasks: Sequence[Task],
        *,
        seed: int,
        group_size: int | None = None,
        environment: Environment | None = None,
        temperature: float | None = None,
        **options: Any,
    ) -> list[Group]:
        """Sample groups from the present policy, with the run's sampling settings unless arguments say otherwise."""
        from guerdon.rollout import Sampling, rollout

        config = self._settings
        sampling = Sampling(
            max_tokens=config.max_tokens,
            temperature=config.temperature if temperature is None else temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            stop=config.stop,
        )
        arguments: dict[str, Any] = {
            "sampling": sampling,
            "max_turns": config.max_turns,
            "max_observation_tokens": config.max_observation_tokens,
            "concurrency": config.concurrency,
            **self._rollout_options,
            **options,
        }
        # Dropout would make the recorded log-probabilities those of another policy.
        self.policy.model.eval()
        return self.run_async(
            rollout(
                self.engine,
                environment or self.environment,
                tasks,
                group_size=group_size or config.group_size,
                seed=seed,
                **arguments,
            )
        )

    def train_step(self) -> tuple[dict[str, Any], StepDetail]:
        config = self._settings
        phases = Phases(self.policy.device)
        chosen = batch_indices(len(self.tasks), config.prompts_per_step, self.step, seed=config.seed, drop_last=True)
        seed = int(np.random.SeedSequence([config.seed & 0xFFFFFFFF, self.step]).generate_state(1)[0])
        with phases("sampling"):
            groups = self.sample([self.tasks[i] for i in chosen], seed=seed)
        trajectories = [t for group in groups for t in group.trajectories]
        self._report_failures(trajectories)
        with phases("scoring"):
            scores = self._score(trajectories)
        with phases("streams"):
            experience = collect(
                groups, scores, mask_truncated=config.mask_truncated, credit_all=config.whiten == "response"
            )
        mismatch = self.learner.prepare(experience, phases)
        with phases("streams"):
            streams = self._algorithm(experience, config)
            for term, weights in self._token_weights.items():
                weigh(getattr(streams, term), experience, weights, term)
        update = self.learner.update(experience, streams, mismatch, step=self.step, total=self.total, phases=phases)
        if update["update/steps"]:
            self._sync(phases)
        with phases("metrics"):
            row = {**sampling_row(experience, streams), **update}
        learned = update["update/tokens"]
        row.update(phases.row({"sampling": int(experience.action.sum()), "forward": learned, "backward": learned}))
        return row, StepDetail(groups, trajectories, scores, experience, streams)

    def _report_failures(self, trajectories: list[Trajectory]) -> None:
        """Say once why trajectories fail; stop where none is left. They are counted in every row."""
        failed = [t for t in trajectories if t.stop is StopReason.ERROR]
        if not failed:
            return
        text = (
            f"step {self.step + 1}: {len(failed)} of {len(trajectories)} trajectories failed, the first (task "
            f"{failed[0].task.id!r}) with {failed[0].info.get('error', 'no reason given')}"
        )
        if len(failed) == len(trajectories):
            raise TrainingError(f"{text}; nothing is left to learn from")
        if not self._failure_reported:
            self._failure_reported = True
            self.warn(f"{text}; they are left out, see trajectories/failed in the metrics")

    def _sync(self, phases: Phases) -> None:
        """Hand new weights to an engine that keeps its own copy."""
        sync = getattr(self.engine, "update_weights", None)
        if sync is not None:
            with phases("sync"):
                done = sync(self.policy)
                if inspect.isawaitable(done):
                    self.run_async(done)

    def _score(self, trajectories: list[Trajectory]) -> list[Score]:
        """Score, shape, validate; what is not a finite score is counted and handled as the settings say."""
        where = f"step {self.step + 1}"
        scores = _checked(self.reward, (trajectories,), trajectories, where)
        if self.shape is not None:
            scores = _checked(self.shape, (trajectories, scores), trajectories, where)
        invalid = [s for s in scores if not s.valid]
        dropping = "drop" in (self._settings.on_reward_error, getattr(self.reward, "on_error", None))
        if invalid and not dropping:
            raise RewardError(
                f"{where}: {len(invalid)} of {len(scores)} trajectories have no valid score; the first: "
                f"{invalid[0].reason}. Mend the reward, or leave such trajectories out with on_reward_error='drop'"
            )
        return scores

    def _stateful(self) -> list[tuple[str, Any]]:
        parts: list[tuple[str, Any]] = [("reward", self.reward), ("shape", self.shape)]
        return [(name, part) for name, part in parts if hasattr(part, "state_dict")]

    def write(self, folder: Path) -> dict[str, Any]:
        state = self.learner.write(folder)
        for name, part in self._stateful():
            state[name] = part.state_dict()
        return {**state, "torch": torch.get_rng_state()}

    def restore(self, folder: Path, state: Mapping[str, Any]) -> None:
        self.learner.restore(folder, state)
        for name, part in self._stateful():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["torch"])
        self._sync(Phases())


def _initial(policy: Policy) -> Policy:
    """A frozen copy of the policy as given, adapters that already say something included."""
    if policy.adapted and any(bool(p.any()) for n, p in policy.model.named_parameters() if "lora_B" in n):
        frozen = policy.merged()
        frozen.value_head = None
        frozen.model.requires_grad_(False)
        return frozen
    return policy.reference()


def _checked(function: Any, arguments: tuple[Any, ...], trajectories: list[Trajectory], where: str) -> list[Score]:
    name = str(getattr(function, "name", None) or getattr(function, "__name__", type(function).__name__))
    try:
        raw = list(function(*arguments))
    except GuerdonError:
        raise
    except Exception as error:  # a stranger's code may raise anything; it is named and goes on
        some = ", ".join(sorted({repr(t.task.id) for t in trajectories})[:3])
        raise RewardError(f"{where}: {name!r} raised {type(error).__name__}: {error} (tasks {some}, ...)") from error
    if len(raw) != len(trajectories):
        raise RewardError(f"{where}: {name!r} returned {len(raw)} scores for {len(trajectories)} trajectories")
    return [validate_score(s, reward=name, task_id=t.task.id) for s, t in zip(raw, trajectories, strict=True)]


def _check_parts(
    policy: Policy,
    engine: Engine,
    tasks: Sequence[Task],
    config: OnlineConfig,
    critic: Any,
    reference: Any,
    token_weights: Mapping[str, Any] | None,
) -> None:
    """Refuse parts that do not fit the settings, all at once."""
    problems: list[str] = []
    if config.algorithm == "ppo":
        if critic is None:
            problems.append("algorithm='ppo' needs a critic: give critic='shared' or a policy with a value head")
        elif getattr(policy if critic == "shared" else critic, "value_head", None) is None:
            problems.append("the critic has no value head; load it with value_head=True")
    elif critic is not None:
        problems.append(f"algorithm={config.algorithm!r} uses no critic; leave critic out or choose 'ppo'")
    if config.kl_coef > 0 and reference is None:
        problems.append("kl_coef > 0 needs a reference: give reference='initial' or a policy, or set kl_coef=0")
    if not engine.trainable:
        problems.append(
            f"{type(engine).__name__} records no token ids or log-probabilities, so its rollouts cannot be trained on"
        )
    ids = [task.id for task in tasks]
    if len(set(ids)) < len(ids):
        twice = next(i for i in ids if ids.count(i) > 1)
        problems.append(f"task id {twice!r} occurs twice; ids seed the sampling and must be unique")
    if len(ids) < config.prompts_per_step:
        problems.append(
            f"prompts_per_step={config.prompts_per_step} exceeds the {len(ids)} tasks; give more or lower it"
        )
    unknown = set(token_weights or {}) - {"policy", "entropy"}
    if unknown:
        problems.append(f"token_weights knows the terms 'policy' and 'entropy', got {sorted(unknown)[0]!r}")
    elif "entropy" in (token_weights or {}) and config.entropy_coef == 0 and not config.entropy_final:
        problems.append("token_weights['entropy'] has no effect with entropy_coef=0; set entropy_coef")
    if problems:
        raise ConfigError("; ".join(problems))
