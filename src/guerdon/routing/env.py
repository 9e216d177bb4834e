"""The environment that Router-R1 acts in: it executes route actions against a pool and keeps the books.

One episode is one question. Each policy turn is parsed (:mod:`guerdon.routing.protocol`), a valid
route action becomes one call of a pool member, and the reply comes back as an observation. After
``max_turns`` rounds there is one more turn in which routing is disabled.

Source: Router-R1 (arXiv 2506.09033), rollout of the released code; the money cap and the treatment of
replies as untrusted data are additions, each with a switch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from guerdon.errors import ConfigError, DataError
from guerdon.rollout.protocol import Engine, Observation, Sampling
from guerdon.routing import protocol
from guerdon.routing.budget import Budget
from guerdon.routing.member import Member, Outcome, Reply
from guerdon.routing.pool import Pool
from guerdon.routing.prompt import HELPER_PROMPT, router_prompt
from guerdon.types import Group, Message, StopReason, Task, Usage

__all__ = ["CallStep", "RoutingEnv", "RoutingEpisode"]

Prompt = Callable[..., str]
Resolver = Callable[[str, Sequence[Member]], str | None]


@dataclass(frozen=True, slots=True)
class CallStep:
    """One executed (or refused) route action.

    Attributes:
        round: which policy turn asked, from 0.
        thought: the policy's last thought before it.
        asked: the name as the policy wrote it.
        query: what it asked.
        reply: the pool's reply, whatever its outcome.
        shown: the observation that the policy saw.
    """

    round: int
    thought: str
    asked: str
    query: str
    reply: Reply
    shown: str


@dataclass(frozen=True, slots=True)
class RoutingEnv:
    """Makes routing episodes over a pool.

    Args:
        pool: the members. Ignored where ``pool_for`` is given.
        max_turns: rounds in which routing is possible (``T_max``); one forced final round follows.
        prompt: renders question and members into the user message.
        helper_prompt: wrapper around each sub-question (``{query}``); ``None`` sends it bare.
        resolver: maps what the policy wrote, and the pool's members, to a member name or ``None``. The
            default is the pool's own: case-insensitive exact match after stripping, and aliases.
        neutralise: make control tags in replies harmless. Off reproduces the paper.
        control: further strings that must not survive in a reply (the tokenizer's special tokens).
        whole_query: send everything after the first colon. Off reproduces the released code.
        max_reply_tokens: token limit of one member reply.
        failure_text: what the policy reads when a call failed or the name is unknown.
        prices: show prices in the prompt.
        max_cost_usd: hard cap on the money of one episode. The worst case of a call is reserved before
            it is made, what is left is told to the policy, and when it does not suffice for any member
            the answer is forced.
        max_calls: hard cap on calls of one episode.
        deadline_s: seconds after which no further call is made.
        pool_for: ``pool_for(task, group)`` returns the pool of one group of episodes, where names,
            prices or skills differ from episode to episode.
        question_word: a query that is exactly this word stands for the whole question, so that a policy need not
            spend tokens on copying it. ``None`` (the paper) sends every query as it is.
        on_invalid: ``"continue"`` lets the policy write on after a turn without a valid action (the
            paper); ``"stop"`` ends the episode there.
    """

    pool: Pool | None = None
    max_turns: int = 4
    prompt: Prompt = router_prompt
    helper_prompt: str | None = HELPER_PROMPT
    resolver: Resolver | None = None
    neutralise: bool = True
    control: tuple[str, ...] = ()
    whole_query: bool = False
    max_reply_tokens: int = 512
    failure_text: str = "None"
    prices: bool = True
    max_cost_usd: float | None = None
    max_calls: int | None = None
    deadline_s: float | None = None
    pool_for: Callable[[Task, int], Pool] | None = None
    on_invalid: str = "continue"
    question_word: str | None = None

    def __post_init__(self) -> None:
        if self.pool is None and self.pool_for is None:
            raise ConfigError("a routing environment needs pool= or pool_for=")
        if self.max_turns < 1:
            raise ConfigError(f"max_turns must be at least 1, got {self.max_turns}")
        if self.max_reply_tokens < 1:
            raise ConfigError(f"max_reply_tokens must be at least 1, got {self.max_reply_tokens}")
        if self.max_cost_usd is not None and not (math.isfinite(self.max_cost_usd) and self.max_cost_usd >= 0):
            raise ConfigError(f"max_cost_usd must be a finite amount >= 0, got {self.max_cost_usd}")
        if self.max_calls is not None and self.max_calls < 0:
            raise ConfigError(f"max_calls must be >= 0, got {self.max_calls}")
        if self.on_invalid not in ("continue", "stop"):
            raise ConfigError(f"on_invalid must be 'continue' or 'stop', got {self.on_invalid!r}")
        if self.helper_prompt is not None and "{query}" not in self.helper_prompt:
            raise ConfigError("helper_prompt must contain {query}")

    def start(self, task: Task, *, seed: int, group: int, member: int) -> RoutingEpisode:
        """Begin one question.

        Raises:
            DataError: the question is blank.
        """
        pool = self.pool_for(task, group) if self.pool_for is not None else self.pool
        assert pool is not None
        return RoutingEpisode(self, pool, task, seed=seed, member=member)

    async def rollout(
        self,
        engine: Engine,
        tasks: Sequence[Task],
        *,
        group_size: int = 1,
        sampling: Sampling | None = None,
        max_observation_tokens: int | None = 600,
        close_observation: bool = False,
        seed: int = 0,
        **options: Any,
    ) -> list[Group]:
        """Play ``tasks`` with the policy behind ``engine``.

        Args:
            sampling: per policy turn; the protocol's stop strings are added.
            max_observation_tokens: longer observations are cut on the right.
            close_observation: re-append ``</information>`` to an observation that was cut, within the
                limit. Off reproduces the paper, where a cut observation breaks the format.
            options: passed on to :func:`guerdon.rollout.loop.rollout`.
        """
        from guerdon.rollout.loop import rollout

        return await rollout(
            engine,
            self,
            tasks,
            group_size=group_size,
            sampling=self.sampling(sampling),
            max_turns=self.max_turns + 1,
            max_observation_tokens=max_observation_tokens,
            close_observation="</information>\n\n" if close_observation else None,
            seed=seed,
            **options,
        )

    @staticmethod
    def sampling(base: Sampling | None = None) -> Sampling:
        """``base`` (default: 1,024 tokens at temperature 1) with the protocol's stop strings."""
        from dataclasses import replace

        base = base or Sampling(max_tokens=1024)
        return replace(base, stop=tuple(dict.fromkeys((*base.stop, *protocol.STOP_STRINGS))))


@dataclass(slots=True)
class RoutingEpisode:
    """One question being answered; see :class:`RoutingEnv`."""

    env: RoutingEnv
    pool: Pool
    task: Task
    seed: int = 0
    member: int = 0
    calls: list[CallStep] = field(default_factory=list)
    rounds: int = 0
    valid_actions: int = 0
    invalid: list[str] = field(default_factory=list)
    answer: str | None = None
    budget: Budget | None = None
    _usage: Usage = Usage()
    _started: float = field(default_factory=time.monotonic)
    _forced: StopReason | None = None

    def __post_init__(self) -> None:
        if not self.task.question.strip():
            raise DataError(f"task {self.task.id!r} has a blank question")
        env = self.env
        if env.max_cost_usd is not None or env.max_calls is not None or env.deadline_s is not None:
            self.budget = Budget(max_usd=env.max_cost_usd, max_calls=env.max_calls, deadline_s=env.deadline_s)

    @property
    def prompt(self) -> Sequence[Message]:
        """The task's earlier messages, and the router prompt in place of its last user message."""
        text = self.env.prompt(
            self.task.question, self.pool.values(), prices=self.env.prices, budget_usd=self.env.max_cost_usd
        )
        before = [m for m in self.task.prompt if m["role"] == "system"]
        return [*before, {"role": "user", "content": text}]

    async def step(self, action: str) -> Observation:
        """Execute one policy turn."""
        turn, self.rounds = self.rounds, self.rounds + 1
        last = turn >= self.env.max_turns or self._forced is not None
        act = protocol.parse_action(action, whole_query=self.env.whole_query)
        if act.kind is protocol.ActionKind.ANSWER:
            self.valid_actions += 1
            self.answer = act.answer
            return Observation(done=True, stop=StopReason.DONE)
        if last:
            return Observation(done=True, stop=self._forced or StopReason.MAX_TURNS)
        if act.kind is not protocol.ActionKind.ROUTE:
            self.invalid.append(act.error or act.kind.value)
            if self.env.on_invalid == "stop":
                return Observation(done=True, stop=StopReason.DONE)
            return Observation(final=self._is_final())
        return await self._route(turn, act)

    async def _route(self, turn: int, act: protocol.Action) -> Observation:
        env = self.env
        name = env.resolver(act.name, list(self.pool.values())) if env.resolver else self.pool.resolve(act.name)
        query = self.task.question if env.question_word is not None and act.query == env.question_word else act.query
        content = query if env.helper_prompt is None else env.helper_prompt.replace("{query}", query)
        messages = [{"role": "user", "content": content}]
        reply = await self.pool.call(
            # No member's name holds a colon, so what the resolver refused stays unknown to the pool.
            name if name is not None else f":{act.name}",
            messages,
            max_tokens=env.max_reply_tokens,
            trajectory_id=self.trajectory_id,
            budget=self.budget,
        )
        if reply.outcome is Outcome.BUDGET:
            self._forced = StopReason.BUDGET
            shown = self._observe(f"This call could cost more than what is left.{self._left()} Answer now.")
        elif reply.ok:
            self.valid_actions += 1
            shown = self._observe(self._safe(reply.text or "") + self._left())
        else:
            shown = self._observe(env.failure_text + self._left())
        self._usage = self._usage + Usage(
            calls=int(reply.outcome is not Outcome.BUDGET),
            input_tokens=reply.input_tokens,
            output_tokens=reply.output_tokens,
            usd=reply.usd,
            seconds=reply.latency_s,
        )
        self.calls.append(CallStep(turn, act.thought, act.name, query, reply, shown))
        if self._forced is None and self.budget is not None and not self._affordable(messages):
            self._forced = StopReason.BUDGET
        return Observation(
            text=shown,
            final=self._is_final(),
            meta={
                "member": reply.member,
                "answered_by": reply.answered_by,
                "outcome": reply.outcome.value,
                "usd": reply.usd,
            },
        )

    def _is_final(self) -> bool:
        return self.rounds >= self.env.max_turns or self._forced is not None

    def _observe(self, text: str) -> str:
        return protocol.observation(text)

    def _safe(self, reply: str) -> str:
        return protocol.neutralise(reply, self.env.control) if self.env.neutralise else reply

    def _left(self) -> str:
        if self.budget is None or self.env.max_cost_usd is None:
            return ""
        return f" (budget left: ${max(self.budget.remaining_usd, 0.0):.6f})"

    def _affordable(self, messages: Sequence[Message]) -> bool:
        """Whether the cheapest worst case of a call like the last one still fits into the budget."""
        budget = self.budget
        assert budget is not None
        cheapest = min(self.pool.worst_case_usd(n, messages, self.env.max_reply_tokens) for n in self.pool)
        return budget.can_reserve(cheapest)

    @property
    def trajectory_id(self) -> str:
        """Identifies this episode in the ledger."""
        return f"{self.task.id}/{self.member}/{self.seed & 0xFFFFFFFF:08x}"

    @property
    def raw_cost(self) -> float:
        """The spec's ``u``: completion tokens times price per million, summed over calls, cached or not."""
        return float(sum(c.reply.output_tokens * c.reply.output_price for c in self.calls))

    def result(self) -> tuple[Usage, Mapping[str, Any]]:
        """What was spent, and the episode's counts for ``Trajectory.info``."""
        executed = [c for c in self.calls if c.reply.outcome is not Outcome.BUDGET]
        return self._usage, {
            "trajectory_id": self.trajectory_id,
            "answer": self.answer,
            "rounds": self.rounds,
            "routes": len(executed),
            "valid_routes": sum(c.reply.ok for c in executed),
            "valid_actions": self.valid_actions,
            "invalid_actions": tuple(self.invalid),
            "raw_cost": self.raw_cost,
            "calls": tuple(self.calls),
            "members": tuple(self.pool),
            "roster": tuple(self.pool.values()),
        }
