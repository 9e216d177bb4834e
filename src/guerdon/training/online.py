"""Online reinforcement learning: sample, score, assign, optimise, one step after the other.

The loop knows no algorithm. An algorithm (``streams.py``) turns scored trajectories into per-token streams;
the objective (``losses.py``) consumes them. What is here: drawing tasks, sampling on an engine, scoring with
counted failures, forward passes for what the streams need, minibatches, and the record of every step.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from guerdon.errors import ConfigError
from guerdon.objectives import truncated_importance_weight
from guerdon.rewards.base import Progress
from guerdon.training.assemble import assemble, check_parts
from guerdon.training.callbacks import Callback, EarlyStop, Evaluate
from guerdon.training.config import OnlineConfig
from guerdon.training.data import batch_indices, further_indices, tasks_digest
from guerdon.training.distributed import make_world
from guerdon.training.events import EventLoop
from guerdon.training.generators import generator_states, restore_generators
from guerdon.training.groups import informative
from guerdon.training.learner import Learner
from guerdon.training.loop import Run
from guerdon.training.metrics import failure_row, sampling_row
from guerdon.training.optimise import TrainingError
from guerdon.training.scoring import Scorer
from guerdon.training.streams import Credit, Experience, Streams, TokenWeights, collect, weigh
from guerdon.training.timing import Phases
from guerdon.types import Group, Score, StopReason, Task, Trajectory

if TYPE_CHECKING:
    from guerdon.parts import Part
    from guerdon.policies import Policy
    from guerdon.rollout import Engine, Environment
    from guerdon.training.ahead import Ahead
    from guerdon.training.ray_workers import RayReward

__all__ = ["OnlineTrainer", "StepDetail"]

RewardLike = Callable[[Sequence[Trajectory]], Sequence[Score | float]]
Shape = Callable[[Sequence[Trajectory], Sequence[Score]], Sequence[Score]]


@dataclass(frozen=True)
class StepDetail:
    """What a step made, for callbacks.

    Args:
        groups: as sampled, those included that were filtered out (``experience.excluded``).
        trajectories, scores: flat, in the order of the groups.
        experience, streams: what the update was computed from.
        failures: failed scores by ``(name of the reward or shape, reason)``.
    """

    groups: list[Group]
    trajectories: list[Trajectory]
    scores: list[Score]
    experience: Experience
    streams: Streams
    failures: Mapping[tuple[str, str], int] = field(default_factory=dict)


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
        credit: in place of what the configuration names: a bound function (``gd.credit.group_relative(scale=False)``),
            a name, or a function from (experience, config) to advantages ``[N]`` or whole :class:`Streams`, which may
            have ``needs`` and ``state_dict``.
        shape: likewise: maps trajectories and scores to scores before credit; a list is applied in order.
        objective: likewise: maps (logprobs, old_logprobs, advantages) to a loss per token.
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
        credit: Credit | Part | str | Mapping[str, Any] | None = None,
        shape: Shape | Part | str | Mapping[str, Any] | Sequence[Any] | None = None,
        objective: Callable[..., Any] | Part | str | Mapping[str, Any] | None = None,
        token_weights: Mapping[str, TokenWeights] | None = None,
        evaluate: Callable[[OnlineTrainer], Mapping[str, float]] | None = None,
        rollout_options: Mapping[str, Any] | None = None,
        callbacks: Sequence[Callback] = (),
        out: str | Path | None = None,
    ) -> None:
        parts = assemble(config, credit=credit, shape=shape, objective=objective)
        check_parts(
            parts,
            reward=reward,
            policy=policy,
            engine=engine,
            tasks=tasks,
            critic=critic,
            reference=reference,
            token_weights=token_weights,
        )
        config = parts.config
        self._workers: RayReward | None = None
        if config.distributed.reward_workers:
            from guerdon.training.ray_workers import RayReward

            settings = config.distributed
            reward = self._workers = RayReward(reward, settings.reward_workers, resources=settings.reward_resources)
        self.policy = policy
        self.engine = engine
        self.environment = environment
        self.tasks = list(tasks)
        self.reward = reward
        self.shape = parts.shape
        self.credit = parts.credit
        self._settings = config
        world = make_world(config.distributed)
        self._token_weights = dict(token_weights or {})
        self._rollout_options = dict(rollout_options or {})
        if not parts.needs_reference:
            reference = None  # not even loaded: its forward pass would serve only a log line
        self.learner = Learner(
            policy,
            config,
            critic=policy if critic == "shared" else critic,
            reference=_initial(policy) if reference == "initial" else reference,
            objective=parts.objective,
            world=world,
        )
        self._algorithm = parts.algorithm
        self._compares = "group" in parts.traits.needs
        self._scorer = Scorer(reward, parts.shape, on_error=config.on_reward_error, timeout=config.reward_timeout)
        self._ahead: Ahead | None = None
        self._events = EventLoop()
        self._failure_reported = False
        self._without_signal = 0
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
            identity={"tasks": tasks_digest(self.tasks), **parts.identity()},
            save_every=config.save_every,
            keep_last=config.keep_last,
            world=world,
        )

    def close(self) -> None:
        """Close the event loop on which environments ran, end the actors, leave the group of processes. Idempotent."""
        self._events.close()
        if self._ahead is not None:
            self._ahead.fleet.close()
            self._ahead = None
        if self._workers is not None:
            self._workers.close()
        self.world.close()

    def before_save(self) -> None:
        self.learner.gather()

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
        from guerdon.rollout import rollout

        arguments = {**self._rollout_arguments(temperature), **options}
        # Dropout would make the recorded log-probabilities those of another policy.
        self.policy.model.eval()
        return self.run_async(
            rollout(
                self.engine,
                environment or self.environment,
                tasks,
                group_size=group_size or self._settings.group_size,
                seed=seed,
                **arguments,
            )
        )

    def _rollout_arguments(self, temperature: float | None = None) -> dict[str, Any]:
        from guerdon.rollout import Sampling

        config = self._settings
        sampling = Sampling(
            max_tokens=config.max_tokens,
            temperature=config.temperature if temperature is None else temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            stop=config.stop,
        )
        return {
            "sampling": sampling,
            "max_turns": config.max_turns,
            "max_observation_tokens": config.max_observation_tokens,
            "concurrency": config.concurrency,
            **self._rollout_options,
        }

    def train_step(self) -> tuple[dict[str, Any], StepDetail]:
        config = self._settings
        phases = Phases(self.policy.device)
        groups, scores, excluded, failures = self._gather(phases)
        with phases("streams"):
            experience = collect(
                groups,
                scores,
                mask_truncated=config.mask_truncated,
                credit_all=config.whiten == "response",
                excluded=excluded,
            )
        mismatch = self.learner.prepare(experience, phases)
        with phases("streams"):
            streams = self._algorithm(experience, config)
            for term, weights in self._token_weights.items():
                weigh(getattr(streams, term), experience, weights, term)
            corrected = self._correct(experience, streams)
        update = self.learner.update(experience, streams, mismatch, step=self.step, total=self.total, phases=phases)
        if update["update/steps"]:
            self._sync(phases)
        with phases("metrics"):
            behind = self._ahead.row() if self._ahead is not None else {}
            row = {**sampling_row(experience, streams), **failure_row(failures), **update, **corrected, **behind}
        self._watch_signal(experience, streams)
        learned = update["update/tokens"]
        row.update(phases.row({"sampling": int(experience.action.sum()), "forward": learned, "backward": learned}))
        return row, StepDetail(groups, experience.trajectories, scores, experience, streams, failures)

    def _gather(self, phases: Phases) -> tuple[list[Group], list[Score], np.ndarray | None, Counter[tuple[str, str]]]:
        """Sample and score the groups of a step; replace those that teach nothing, as far as the settings allow.

        What is drawn depends on the seed, the step and the round alone, so that nothing is queued between steps and a
        resumed run draws the same.

        Returns:
            Groups, their scores (flat), which trajectories are excluded (None: no group was judged), failures.
        """
        config = self._settings
        judged = config.filter is not None or config.dynamic_sampling > 0
        groups: list[Group] = []
        scores: list[Score] = []
        useful: list[bool] = []
        failures: Counter[tuple[str, str]] = Counter()
        taken: list[int] = []
        for turn in range(1 + config.dynamic_sampling):
            missing = config.prompts_per_step - sum(useful)
            if turn == 0:
                chosen = self._drawn(self.step)
            else:
                chosen = further_indices(len(self.tasks), missing, taken, seed=(config.seed, self.step, turn))
            if not missing or not chosen:
                break
            taken += chosen
            seed = self._seed(self.step, turn)
            with phases("sampling"):
                new = self._play(chosen, seed, turn)
            trajectories = [t for group in new for t in group.trajectories]
            self._report_failures([t for group in [*groups, *new] for t in group.trajectories])
            with phases("scoring"):
                progress = Progress(self.step, self.total)
                made, failed = self.world.once(
                    partial(self._scorer, trajectories, progress, where=f"step {self.step + 1}")
                )
            groups += new
            scores += made
            failures += failed
            if not judged:
                return groups, scores, None, failures
            useful += informative(new, made, config.filter, variance=config.dynamic_sampling > 0)
        flat = [not use for use, group in zip(useful, groups, strict=True) for _ in group.trajectories]
        return groups, scores, np.array(flat, dtype=bool), failures

    def _seed(self, step: int, turn: int) -> int:
        key = [self._settings.seed & 0xFFFFFFFF, step, *([turn] if turn else [])]
        return int(np.random.SeedSequence(key).generate_state(1)[0])

    def _drawn(self, step: int) -> list[int]:
        """Numbers of the tasks that a step begins with."""
        n, size = len(self.tasks), self._settings.prompts_per_step
        return batch_indices(n, size, step, seed=self._settings.seed, drop_last=True).tolist()

    def _play(self, chosen: Sequence[int], seed: int, turn: int) -> list[Group]:
        """Sample the chosen tasks: here, in all processes of the run, or in actors that may have begun before."""
        if self._settings.distributed.samplers == 0:
            return self.world.each([self.tasks[i] for i in chosen], lambda part: self.sample(part, seed=seed))
        if self._ahead is None:
            from guerdon.training.ahead import start_ahead

            self._ahead = start_ahead(self, self._rollout_arguments(), drawn=self._drawn, seed=self._seed)
        return self._ahead.groups(self.step, chosen if turn else None, turn)

    def _correct(self, experience: Experience, streams: Streams) -> dict[str, float]:
        """Weigh policy tokens by the trainer's over the sampler's probability, truncated."""
        cap = self._settings.importance_cap
        if cap is None:
            return {}
        assert experience.old is not None
        weight = truncated_importance_weight(experience.old, experience.sampled, cap)
        action = torch.from_numpy(experience.action)
        streams.policy *= torch.where(action, weight, 0.0)
        chosen = weight[action]
        if not len(chosen):
            return {}
        return {
            "mismatch/weight_mean": float(chosen.mean()),
            "mismatch/weight_capped": float((chosen >= cap).float().mean()),
        }

    def _watch_signal(self, experience: Experience, streams: Streams) -> None:
        """Warn, then end the run, where groups that are compared have had nothing to compare for many steps."""
        limit = self._settings.no_signal_steps
        if not self._compares or limit is None:
            return
        action = torch.from_numpy(experience.action)
        if bool(streams.advantage[action].any()):
            self._without_signal = 0
            return
        self._without_signal += 1
        seen, advice = _no_signal(experience)
        if self._without_signal == limit:
            self.warn(
                f"stopped: no group had any variance for {limit} steps ({seen}), so nothing was learned; {advice}"
            )
            self.stop("no_signal")
        elif self._without_signal == max(1, limit // 2):
            self.warn(
                f"step {self.step + 1}: no group had any variance for {self._without_signal} steps ({seen}); the run "
                f"ends after {limit} such steps (no_signal_steps). {advice[0].upper()}{advice[1:]}"
            )

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
        self.learner.publish()
        if self._ahead is not None:
            with phases("sync"):
                self._ahead.fleet.update(self.policy)
        sync = getattr(self.engine, "update_weights", None)
        if sync is not None:
            with phases("sync"):
                done = sync(self.policy)
                if inspect.isawaitable(done):
                    self.run_async(done)

    def _stateful(self) -> list[tuple[str, Any]]:
        parts: list[tuple[str, Any]] = [("reward", self.reward), ("shape", self.shape), ("credit", self.credit)]
        return [(name, part) for name, part in parts if hasattr(part, "state_dict")]

    def write(self, folder: Path) -> dict[str, Any]:
        state = self.learner.write(folder)
        for name, part in self._stateful():
            state[name] = part.state_dict()
        return {**state, "generators": generator_states(), "without_signal": self._without_signal}

    def restore(self, folder: Path, state: Mapping[str, Any]) -> None:
        self.learner.restore(folder, state)
        for name, part in self._stateful():
            part.load_state_dict(state[name])
        restore_generators(state["generators"])
        self._without_signal = int(state["without_signal"])
        self._sync(Phases())


def _no_signal(experience: Experience) -> tuple[str, str]:
    """What the rewards of a step without any difference look like, and what to do about it."""
    values = {s.value for s in experience.scores if s.valid}
    if not values:
        return "no trajectory had a valid score", "see reward/failed and trajectories/failed in the metrics"
    seen = f"all rewards of the last step are {min(values):g}" if len(values) == 1 else "within groups they are equal"
    return seen, (
        "where they are all high, the task is solved: stop, or take harder tasks; else take easier tasks, a reward with "
        "partial credit, a larger group_size or a higher temperature"
    )


def _initial(policy: Policy) -> Policy:
    """A frozen copy of the policy as given, adapters that already say something included."""
    if policy.adapted and any(bool(p.any()) for n, p in policy.model.named_parameters() if "lora_B" in n):
        frozen = policy.merged()
        frozen.value_head = None
        frozen.model.requires_grad_(False)
        return frozen
    return policy.reference()
