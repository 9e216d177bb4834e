"""A whole Router-R1 run from one configuration: data, warm start, RL, evaluation beside the baselines.

Every phase has its own folder and resumes: the same command goes on where it was stopped.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from guerdon.errors import ConfigError, DataError
from guerdon.routing.evaluate import RouterMetrics
from guerdon.training.config import Config, Count, Fraction, NonNegative, OnlineConfig, OptimiserConfig, SftConfig
from guerdon.types import Task

__all__ = ["PolicyConfig", "RewardConfig", "RouteRun", "RunConfig", "WarmStartConfig", "read_questions"]

Say = Callable[[str], None]


class LoraConfig(Config):
    """Adapters; see :class:`guerdon.policies.LoraSpec`."""

    r: Count = 16
    alpha: float = 32.0
    targets: str | tuple[str, ...] = "all-linear"


class PolicyConfig(Config):
    """The language model.

    Args:
        base: ``tiny`` (made here), ``smollm2``, a hub id, a folder, a ``.gguf`` file.
        lora: train adapters instead of all weights.
        device, dtype: ``auto`` or as torch names them.
        hidden, layers, heads, intermediate, init_std, init: of ``tiny``; see :func:`guerdon.policies.tiny_policy`.
        max_context: of ``tiny``.
    """

    base: str = "tiny"
    lora: LoraConfig | None = None
    device: str = "auto"
    dtype: str = "auto"
    hidden: Count = 144
    layers: Count = 3
    heads: Count = 2
    intermediate: Count = 512
    init_std: float = 0.06
    init: Literal["random", "recall"] = "recall"
    max_context: Count = 512


class DataConfig(Config):
    """The questions.

    Args:
        world: ``compact`` or ``natural`` world facts over simulated specialists; ``None`` with ``train``.
        shuffled: another pool, with other names, for every question of the world; else one pool for all.
        train, test: JSONL files with ``question`` and ``golds`` (and ``id``) on each line.
        questions: how many training questions are drawn from the world.
    """

    world: Literal["compact", "natural"] | None = "compact"
    shuffled: bool = True
    train: Path | None = None
    test: Path | None = None
    questions: Count = 4000

    def conflicts(self) -> Any:
        if (self.world is None) == (self.train is None):
            yield "give either world (the testbed) or train (a JSONL file)"
        if self.train is not None and self.test is None:
            yield "test is required with train: a router is measured on questions that it was not trained on"


class RewardConfig(Config):
    """The reward; see :func:`guerdon.routing.reward.router_reward`.

    Args:
        alpha: weight of the cost term.
        metric: of the outcome.
        gate_format, gate_wrong: the hierarchy; off for ablations.
        alpha_after, alpha_ramp: training steps at alpha 0, and steps over which it then rises to ``alpha``.
    """

    alpha: Fraction = 0.0
    metric: Literal["em", "f1"] = "em"
    gate_format: bool = True
    gate_wrong: bool = True
    alpha_after: Annotated[int, Field(ge=0)] = 0
    alpha_ramp: Annotated[int, Field(ge=0)] = 0


class RouterConfig(Config):
    """How the router is run; see :class:`guerdon.routing.router_r1.RouterSettings`."""

    prompt: Literal["full", "compact"] = "compact"
    helper_prompt: bool = False
    max_turns: Count = 4
    max_turn_tokens: Count = 40
    max_observation_tokens: Count = 60
    max_reply_tokens: Count = 512
    neutralise: bool = True
    prices: bool = True
    temperature: NonNegative = 0.0


class WarmStartConfig(Config):
    """Supervised fine-tuning on scripted rollouts (world facts only)."""

    rollouts: Count = 12_000
    per_prompt: Count = 4
    practice: Fraction = 0.4
    drills: Fraction = 0.15
    sft: SftConfig = SftConfig(
        steps=200,
        batch_size=48,
        max_tokens_per_microbatch=6000,
        optimiser=OptimiserConfig(lr=3e-3, schedule="cosine", warmup=40, final=0.05, betas=(0.9, 0.95)),
    )


class EvaluationConfig(Config):
    """Final measurement: ``questions`` held-out questions, answered greedily."""

    questions: Count = 500
    seed: int = 1


class RunConfig(Config):
    """Everything that a run depends on.

    Args:
        policy, data, router, reward, online, evaluation: see their classes.
        warm_start: ``None`` starts RL from the policy as it is.
        pool: YAML file of a pool; required with ``data.train``.
        exploration: extra weight of the entropy bonus where a member is chosen; see
            :func:`guerdon.routing.router_r1.choice_weights`.
        seed: of data, pools, scripts and weights, and of RL where ``online.seed`` is not given.
    """

    policy: PolicyConfig = PolicyConfig()
    data: DataConfig = DataConfig()
    router: RouterConfig = RouterConfig()
    reward: RewardConfig = RewardConfig()
    warm_start: WarmStartConfig | None = WarmStartConfig()
    online: OnlineConfig = OnlineConfig(
        algorithm="grpo",
        steps=80,
        prompts_per_step=16,
        group_size=12,
        max_tokens=40,
        max_tokens_per_microbatch=6000,
        clip_low=0.2,
        clip_high=0.28,
        scale="none",
        top_p=0.95,
        old_logprobs="recomputed",
        entropy_coef=0.003,
        entropy_final=0.001,
        save_every=10,
        optimiser=OptimiserConfig(lr=5e-4, warmup=3, schedule="wsd", final=0.05, betas=(0.9, 0.95)),
    )
    exploration: NonNegative = 9.0
    pool: Path | None = None
    evaluation: EvaluationConfig = EvaluationConfig()
    seed: int = 0

    def conflicts(self) -> Any:
        if self.data.train is not None and self.pool is None:
            yield "pool is required with data.train: name the YAML file of the members"
        if self.data.world is not None and self.pool is not None:
            yield "pool has no meaning with data.world, whose members are simulated; remove it"
        if self.data.world is None and self.warm_start is not None:
            yield "warm_start needs the scripts of data.world; set warm_start: null"


def read_questions(path: str | Path) -> list[Task]:
    """Read ``{"question": ..., "golds": [...]}`` lines (``answers`` or ``answer`` in place of ``golds`` is understood).

    Raises:
        DataError: unreadable, empty, or lines without a question or gold answers; the first few are named.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    tasks: list[Task] = []
    bad: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            bad.append(f"line {number} is not JSON ({error.msg})")
            continue
        question = row.get("question") if isinstance(row, dict) else None
        golds = next((row[k] for k in ("golds", "answers", "answer") if isinstance(row, dict) and row.get(k)), None)
        if not isinstance(question, str) or not question.strip():
            bad.append(f"line {number} has no question")
        elif not golds:
            bad.append(f"line {number} has no gold answers")
        else:
            golds = [golds] if isinstance(golds, str | int | float) else golds
            tasks.append(Task(str(row.get("id", f"{path.stem}:{number}")), question, [str(g) for g in golds]))
    if bad:
        raise DataError(f"{path}: {'; '.join(bad[:3])}{f'; and {len(bad) - 3} more' if len(bad) > 3 else ''}")
    if not tasks:
        raise DataError(f"{path} holds no questions")
    return tasks


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a run works with."""

    policy: Any
    env: Any
    train: list[Task]
    test: list[Task]
    competence: Any
    testbed: Any
    settings: Any


class RouteRun:
    """One run in one folder.

    Args:
        config: settings.
        out: run folder.
        say: told about progress, a line at a time.
    """

    def __init__(self, config: RunConfig, out: str | Path, *, say: Say = lambda line: None) -> None:
        self.config, self.out, self.say = config, Path(out), say

    def prepare(self) -> Prepared:
        """Load policy, data and pool.

        Raises:
            ConfigError, DataError, ModelNotFound, PoolError: each naming what is wrong.
        """
        from guerdon.routing.router_r1 import RouterSettings

        config = self.config
        settings = RouterSettings(**config.router.model_dump())
        testbed = None
        if config.data.world is not None:
            from guerdon.routing.testbed import WorldFactsTestbed

            testbed = WorldFactsTestbed(config.data.world, shuffled=config.data.shuffled, seed=config.seed)
            train = testbed.balanced("train", config.data.questions, seed=config.seed)
            test = testbed.balanced("test", config.evaluation.questions, seed=config.evaluation.seed)
        else:
            assert config.data.train is not None and config.data.test is not None
            train, test = (
                read_questions(config.data.train),
                read_questions(config.data.test)[: config.evaluation.questions],
            )
        policy = self._policy(testbed)
        if testbed is not None:
            # The same environment as the trained router's, over pools that change from question to question.
            env = _env(policy, settings, pool_for=testbed.pool_for)
            return Prepared(policy, env, train, test, testbed.competence, testbed, settings)
        from guerdon.routing.pool import Pool

        assert config.pool is not None
        pool = Pool.from_yaml(config.pool)
        pool.check()
        return Prepared(policy, _env(policy, settings, pool=pool), train, test, None, None, settings)

    def _policy(self, testbed: Any) -> Any:
        from guerdon.policies import LoraSpec, load_policy, tiny_policy, train_bpe

        spec = self.config.policy
        if spec.base == "tiny":
            if testbed is None or testbed.register != "compact":
                raise ConfigError("policy.base=tiny knows the words of data.world=compact only; choose another base")
            tokenizer = train_bpe(["a b"], 8192, words=testbed.words)
            return tiny_policy(
                tokenizer, hidden=spec.hidden, layers=spec.layers, heads=spec.heads, intermediate=spec.intermediate,
                init_std=spec.init_std, init=spec.init, max_context=spec.max_context, seed=self.config.seed,
                value_head=self.config.online.algorithm == "ppo",
            )  # fmt: skip
        lora = None if spec.lora is None else LoraSpec(spec.lora.r, spec.lora.alpha, 0.0, spec.lora.targets)
        return load_policy(
            spec.base, lora=lora, value_head=self.config.online.algorithm == "ppo", device=spec.device, dtype=spec.dtype,
            seed=self.config.seed,
        )  # fmt: skip

    def train(self, prepared: Prepared | None = None) -> tuple[Prepared, Any]:
        """Warm start and RL; returns what was prepared and the trained router, which is saved in ``out/router``."""
        from guerdon.routing.router_r1 import RouterR1

        self.out.mkdir(parents=True, exist_ok=True)
        prepared = prepared or self.prepare()
        self.warm_start(prepared)
        self.online(prepared)
        router = RouterR1(prepared.policy, settings=prepared.settings)
        router.save(self.out / "router")
        return prepared, router

    def warm_start(self, prepared: Prepared) -> None:
        """Supervised fine-tuning on scripts, if the configuration wants it."""
        from guerdon.training import Console, SftTrainer

        warm = self.config.warm_start
        if warm is None:
            return
        self.say(f"writing {warm.rollouts:,} scripted rollouts (valid in form, random in choice)")
        data = prepared.testbed.scripts(
            prepared.policy,
            warm.rollouts,
            per_prompt=warm.per_prompt,
            practice=warm.practice,
            drills=warm.drills,
            prices=self.config.router.prices,
            seed=self.config.seed,
        )
        sft = warm.sft.model_copy(update={"seed": self.config.seed})
        self.say(f"warm start: {sft.steps or 'all'} supervised steps")
        trainer = SftTrainer(
            prepared.policy,
            data,
            sft,
            out=self.out / "warm_start",
            callbacks=[Console(("loss", "time/step"), every=50)],
        )
        _whole(trainer.fit())

    def online(self, prepared: Prepared) -> None:
        """Reinforcement learning."""
        from guerdon.routing.reward import router_reward
        from guerdon.routing.router_r1 import router_r1_train
        from guerdon.training import Console, TrajectoryWriter

        config = self.config.online.model_copy(
            update={
                "seed": self.config.online.seed if "seed" in self.config.online.model_fields_set else self.config.seed,
                "max_observation_tokens": self.config.router.max_observation_tokens,
                "max_tokens": self.config.router.max_turn_tokens,
            }
        )
        reward = router_reward(**self.config.reward.model_dump())
        self.say(
            f"reinforcement learning: {config.steps} steps of {config.prompts_per_step} questions x {config.group_size}"
        )
        keys = ("reward/mean", "reward/outcome", "reward/format", "reward/raw_cost", "entropy", "time/step")
        trainer = router_r1_train(
            prepared.policy, prepared.env, reward, prepared.train, config, out=self.out / "online",
            exploration=self.config.exploration,
            callbacks=[Console(keys, every=5), TrajectoryWriter(self.out / "online" / "trajectories.jsonl", every=10)],
            rollout_options={"close_observation": "</information>\n\n"},
        )  # fmt: skip
        trainer.close()

    def evaluate(self, prepared: Prepared, router: Any, *, name: str = "Router-R1") -> tuple[RouterMetrics, list[Any]]:
        """Measure the router on the held-out questions."""
        from guerdon.routing.router_r1 import evaluate_router

        env = replace(prepared.env, pool_for=_view_for(prepared)) if prepared.testbed is not None else prepared.env
        return asyncio.run(
            evaluate_router(
                router, env, prepared.test, name=name, competence=prepared.competence, seed=self.config.evaluation.seed
            )
        )


def _view_for(prepared: Prepared) -> Any:
    """Pools of the evaluation: they depend on the question alone, so that every router meets the same ones."""
    return lambda task, group: prepared.testbed.pool_for(task, 0)


def _env(policy: Any, settings: Any, **where: Any) -> Any:
    from guerdon.routing.env import RoutingEnv
    from guerdon.routing.prompt import HELPER_PROMPT
    from guerdon.routing.router_r1 import PROMPTS

    return RoutingEnv(
        **where,
        max_turns=settings.max_turns,
        prompt=PROMPTS[settings.prompt],
        helper_prompt=HELPER_PROMPT if settings.helper_prompt else None,
        neutralise=settings.neutralise,
        control=policy.control_tokens,
        max_reply_tokens=settings.max_reply_tokens,
        prices=settings.prices,
    )


def _whole(result: Any) -> None:
    if result.stopped == "interrupted":
        raise KeyboardInterrupt


def write_rows(path: Path, rows: Sequence[RouterMetrics], extra: Mapping[str, Any] | None = None) -> None:
    """Write the table as JSON."""
    value = {"rows": [r.to_dict() for r in rows], **(extra or {})}
    path.write_text(json.dumps(value, indent=1, default=float) + "\n", encoding="utf-8")
