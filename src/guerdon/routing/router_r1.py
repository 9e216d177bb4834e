"""Router-R1: a language model that answers by thinking and by asking members of a priced pool, over several rounds.

Source: Zhang, Feng and You, "Router-R1: Teaching LLMs Multi-Round Routing and Aggregation via Reinforcement
Learning" (arXiv 2506.09033), and its released code. The method is wired here from shared parts: the
environment (:mod:`guerdon.routing.env`), the reward (:mod:`guerdon.routing.reward`) and the online trainer.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from guerdon.errors import CheckpointError, ConfigError, DataError
from guerdon.policies import Policy, load_policy
from guerdon.rollout import Sampling, TransformersEngine
from guerdon.rollout.protocol import Engine
from guerdon.routing.env import RoutingEnv
from guerdon.routing.evaluate import Competence, RouterMetrics, measure
from guerdon.routing.pool import Pool
from guerdon.routing.prompt import HELPER_PROMPT, compact_prompt, router_prompt
from guerdon.routing.record import RouteRecord, record_of
from guerdon.routing.reward import HierarchicalReward
from guerdon.training import OnlineConfig, OnlineTrainer
from guerdon.types import Task, Trajectory, Usage

__all__ = [
    "RoutedAnswer",
    "RouterR1",
    "RouterSettings",
    "choice_weights",
    "evaluate_router",
    "paper_config",
    "router_r1_train",
]

PROMPTS: Mapping[str, Callable[..., str]] = {"full": router_prompt, "compact": compact_prompt}
_FILE = "router.json"


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """How a trained router is run; saved beside its policy, so that serving agrees with training.

    Args:
        prompt: ``"full"`` (real language models) or ``"compact"`` (tiny policies).
        helper_prompt: wrap sub-questions for members.
        max_turns: rounds with routing.
        max_turn_tokens: tokens of one policy turn.
        max_observation_tokens: tokens of one observation.
        max_reply_tokens: tokens of one member's reply.
        neutralise: make control tags in replies harmless.
        prices: show prices in the prompt.
        temperature: of the policy when it answers.
    """

    prompt: str = "full"
    helper_prompt: bool = True
    max_turns: int = 4
    max_turn_tokens: int = 1024
    max_observation_tokens: int = 600
    max_reply_tokens: int = 512
    neutralise: bool = True
    prices: bool = True
    temperature: float = 0.0

    def __post_init__(self) -> None:
        if self.prompt not in PROMPTS:
            raise ConfigError(f"prompt must be one of {', '.join(PROMPTS)}, got {self.prompt!r}")


@dataclass(frozen=True, slots=True)
class RoutedAnswer:
    """One answered question: the text, what it used, why it ended, and the whole record."""

    text: str
    reason: str
    usage: Usage
    policy_usage: Usage
    record: dict[str, Any]
    trajectory: Trajectory


class RouterR1:
    """A trained (or untrained) router over a pool.

    Args:
        policy: writes thoughts, route actions and answers.
        pool: the members it may ask; may be given later with :meth:`over`.
        settings: how it is run.
        engine: samples from ``policy``; one is made by default.
    """

    def __init__(
        self,
        policy: Policy,
        pool: Pool | None = None,
        *,
        settings: RouterSettings | None = None,
        engine: Engine | None = None,
    ) -> None:
        self.policy, self.pool = policy, pool
        self.settings = settings or RouterSettings()
        self.engine = engine or TransformersEngine(policy)
        self._asked = 0

    def env(self, pool: Pool | None = None, **options: Any) -> RoutingEnv:
        """The environment in which this router acts."""
        s = self.settings
        base: dict[str, Any] = {
            "pool": pool or self.pool,
            "max_turns": s.max_turns,
            "prompt": PROMPTS[s.prompt],
            "helper_prompt": HELPER_PROMPT if s.helper_prompt else None,
            "neutralise": s.neutralise,
            "control": self.policy.control_tokens,
            "max_reply_tokens": s.max_reply_tokens,
            "prices": s.prices,
        }
        return RoutingEnv(**(base | options))

    async def play(
        self, env: RoutingEnv, tasks: Sequence[Task], *, seed: int = 0, temperature: float | None = None, **options: Any
    ) -> list[Trajectory]:
        """One trajectory per task."""
        s = self.settings
        groups = await env.rollout(
            self.engine,
            tasks,
            sampling=Sampling(
                max_tokens=s.max_turn_tokens, temperature=s.temperature if temperature is None else temperature
            ),
            max_observation_tokens=s.max_observation_tokens,
            close_observation=True,
            seed=seed,
            **options,
        )
        return [t for g in groups for t in g.trajectories]

    async def answer(
        self,
        question: str,
        *,
        max_cost_usd: float | None = None,
        max_calls: int | None = None,
        deadline: float | None = None,
        golds: Sequence[str] | None = None,
        seed: int = 0,
    ) -> RoutedAnswer:
        """Answer one question.

        Args:
            question: in words.
            max_cost_usd: hard cap on the money of its calls.
            max_calls: hard cap on their number.
            deadline: point on the monotonic clock after which no call is begun.
            golds: accepted answers, for the record.
            seed: of sampling, where the temperature is positive.

        Raises:
            DataError: a blank question, or one that does not fit into the policy's context.
            ConfigError: the router has no pool.
        """
        if not question.strip():
            raise DataError("the question is blank")
        if self.pool is None:
            raise ConfigError("this router has no pool; give one when loading it")
        self._asked += 1
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        env = self.env(max_cost_usd=max_cost_usd, max_calls=max_calls, deadline_s=left)
        task = Task(f"ask-{self._asked}", question, list(golds) if golds else None)
        (trajectory,) = await self.play(env, [task], seed=seed, on_error="raise")
        record = record_of(trajectory)
        members = ", ".join(dict.fromkeys(s.answered_by for s in record.steps))
        reason = f"asked {members} in {record.calls} calls" if record.calls else "answered without asking"
        return RoutedAnswer(
            text=record.answer or "",
            reason=f"{reason}; ended: {trajectory.stop.value}",
            usage=trajectory.usage,
            policy_usage=trajectory.policy_usage,
            record=record.model_dump(mode="json"),
            trajectory=trajectory,
        )

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write policy and settings."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        self.policy.save(target / "policy")
        settings = {name: getattr(self.settings, name) for name in RouterSettings.__dataclass_fields__}
        temporary = target / f".{_FILE}.tmp"
        temporary.write_text(json.dumps({"format": 1, "settings": settings}, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, target / _FILE)
        return target

    @classmethod
    def load(cls, folder: str | os.PathLike[str], pool: Pool | None = None, *, device: str = "auto") -> RouterR1:
        """Read what :meth:`save` wrote (or the ``router`` folder inside a run's folder).

        Raises:
            CheckpointError: there is no whole router in the folder.
        """
        base = Path(folder)
        if not (base / _FILE).is_file() and (base / "router" / _FILE).is_file():
            base = base / "router"
        if not (base / _FILE).is_file():
            raise CheckpointError(
                f"{folder} holds no trained router ({_FILE} is missing); give a folder that guerdon route train wrote"
            )
        try:
            raw = json.loads((base / _FILE).read_text(encoding="utf-8"))
            settings = RouterSettings(**raw["settings"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{base / _FILE} is not a router's settings ({type(error).__name__}: {error})"
            ) from error
        return cls(load_policy(base / "policy", device=device), pool, settings=settings)

    async def aclose(self) -> None:
        """End the engine. The pool stays open."""
        await self.engine.aclose()


def paper_config(**changes: Any) -> OnlineConfig:
    """The paper's PPO: GAE with gamma = lambda = 1, clip 0.2, value clip 0.5, KL 0.001 in the reward, entropy 0.001.

    64 prompts a step, one trajectory each, mini-batches of 32, one epoch, learning rates 1e-6 and 1e-5, 225 steps,
    temperature 1. The released configuration samples with top_p = 0.95, for which ``old_logprobs="recomputed"``
    is set; advantages are whitened over the whole response as in the released code.
    """
    settings: dict[str, Any] = {
        "algorithm": "ppo",
        "steps": 225,
        "prompts_per_step": 64,
        "group_size": 1,
        "minibatch_size": 32,
        "epochs": 1,
        "max_tokens": 1024,
        "max_turns": 5,
        "max_observation_tokens": 600,
        "temperature": 1.0,
        "top_p": 0.95,
        "old_logprobs": "recomputed",
        "clip_low": 0.2,
        "clip_high": 0.2,
        "value_clip": 0.5,
        "gamma": 1.0,
        "lam": 1.0,
        "whiten": "response",
        "entropy_coef": 0.001,
        "kl_coef": 0.001,
        "kl_in": "reward",
        "kl_kind": "k1",
        "save_every": 15,
        "optimiser": {"lr": 1e-6, "critic_lr": 1e-5, "grad_clip": 1.0},
    }
    return OnlineConfig(**(settings | changes))


def choice_weights(trajectory: Trajectory, extra: float) -> list[float]:
    """Weight of each response token in the entropy bonus: ``1 + extra`` where a member is chosen, else 1.

    A choice is the thought before a call and the member's name, that is a policy turn up to the first colon of its
    search block. Queries and answers, which have to be copied exactly, get no more than the plain bonus, and
    environment tokens get 0.
    """
    weights: list[float] = []
    for turn in trajectory.turns:
        if turn.speaker != "policy":
            weights += [0.0] * len(turn.token_ids)
            continue
        block = turn.text.find("<search>")
        until = turn.text.find(":", block) if block >= 0 else -1
        ends = turn.token_ends or (until + 1,) * len(turn.token_ids)
        weights += [1.0 + extra * (end <= until) for end in ends]
    return weights


def router_r1_train(
    policy: Policy,
    env: RoutingEnv,
    reward: HierarchicalReward,
    data: Sequence[Task],
    config: OnlineConfig | None = None,
    *,
    engine: Engine | None = None,
    out: str | os.PathLike[str] | None = None,
    exploration: float = 0.0,
    **options: Any,
) -> OnlineTrainer:
    """Train ``policy`` in place and return the finished trainer.

    Args:
        policy: with a value head (or give ``critic=``) where the algorithm is PPO.
        env: over the pool.
        reward: see :func:`guerdon.routing.reward.router_reward`.
        data: questions with gold answers.
        config: :func:`paper_config` by default; the protocol's stop strings and turn limit are filled in.
        engine: samples from ``policy``.
        out: run folder; the same call with the same folder resumes.
        exploration: extra weight of the entropy bonus where a member is chosen; see :func:`choice_weights`.
        options: passed on to :class:`~guerdon.training.OnlineTrainer`.

    Raises:
        DataError: no questions, or one without gold answers.
    """
    from guerdon.rewards.answer import gold_answers

    if not data:
        raise DataError("there are no questions to train on")
    for task in data:
        gold_answers(task.reference, task.id)
    config = config or paper_config()
    stops = tuple(dict.fromkeys((*config.stop, *RoutingEnv.sampling().stop)))
    config = config.model_copy(update={"stop": stops, "max_turns": env.max_turns + 1})
    if config.algorithm == "ppo" and "critic" not in options:
        options["critic"] = "shared"
    if exploration < 0:
        raise ConfigError(f"exploration must be >= 0, got {exploration}")
    if exploration:
        weights = {"entropy": lambda trajectory: choice_weights(trajectory, exploration)}
        options["token_weights"] = weights | dict(options.get("token_weights") or {})
    trainer = OnlineTrainer(
        policy, engine or TransformersEngine(policy), replace(env), data, reward, config, out=out, **options
    )
    trainer.fit()
    return trainer


async def evaluate_router(
    router: RouterR1,
    env: RoutingEnv,
    data: Sequence[Task],
    *,
    name: str = "router-r1",
    competence: Competence | None = None,
    seed: int = 0,
    temperature: float | None = None,
) -> tuple[RouterMetrics, list[RouteRecord]]:
    """Measure a router on questions with gold answers.

    Returns:
        The row of the table, and one record per question.
    """
    trajectories = await router.play(env, data, seed=seed, temperature=temperature)
    return measure(name, trajectories, competence=competence), [record_of(t) for t in trajectories]
