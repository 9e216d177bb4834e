"""Members of a pool: what they are, what they are asked through, and what comes back."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple, Protocol

from guerdon.errors import ConfigError, PoolError
from guerdon.types import Message

__all__ = ["Backend", "BackendError", "Charge", "Member", "Outcome", "PoolConfigError", "RawReply", "Reply"]


class PoolConfigError(PoolError, ConfigError):
    """A pool or one of its members is wrongly described; ``problems`` holds one line per mistake."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("; ".join(self.problems))


class Outcome(str, Enum):
    """How a call ended."""

    OK = "ok"
    TIMEOUT = "timeout"
    RATE_LIMITED = "rate_limited"
    SERVER_ERROR = "server_error"
    CLIENT_ERROR = "client_error"
    """The endpoint refused the request (bad key, unknown model, too long): asking again cannot help."""
    BAD_REPLY = "bad_reply"
    """Something came back that is no chat completion."""
    EMPTY = "empty"
    """A completion without text (a refusal, a tool call); billed as what it is."""
    CONNECTION = "connection"
    BREAKER_OPEN = "breaker_open"
    BUDGET = "budget"
    """The worst case of the call did not fit into what was left; it was not made."""
    MISS = "miss"
    """A recorded member has no reply to this question."""
    UNKNOWN_MEMBER = "unknown_member"
    CANCELLED = "cancelled"

    @property
    def retryable(self) -> bool:
        """Whether asking the same endpoint again may help."""
        return self in (Outcome.TIMEOUT, Outcome.RATE_LIMITED, Outcome.SERVER_ERROR, Outcome.CONNECTION)


@dataclass(frozen=True, slots=True)
class Member:
    """One model of the pool, as the router and the ledger see it.

    Args:
        name: unique in its pool; no colon, no line break, no blanks around it.
        descriptor: what the router is told about it.
        input_price, output_price: USD per million tokens.
        price_date: when the prices were valid, for the record.
        latency_s: typical seconds per call, for the prompt.
        example_scores: benchmark name to score, for the prompt.
        size_b: billions of parameters, for the largest-model baseline.
        max_concurrency: most calls at once.
        timeout_s: per attempt.
        max_tokens: token limit of a reply where a call names none.
        temperature, top_p: likewise.
        fallback: name of the member that is asked when this one fails.
        aliases: further names by which the router may ask for it.
        served_prices: (input, output) prices of other models that the endpoint is known to answer with; a reply
            that names one of them is billed by these.

    Raises:
        PoolConfigError: what is not usable, all of it.
    """

    name: str
    descriptor: str = ""
    input_price: float = math.nan
    output_price: float = math.nan
    price_date: str | None = None
    latency_s: float | None = None
    example_scores: Mapping[str, float] = field(default_factory=dict)
    size_b: float | None = None
    max_concurrency: int = 8
    timeout_s: float = 60.0
    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    fallback: str | None = None
    aliases: tuple[str, ...] = ()
    served_prices: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "aliases", tuple(self.aliases))
        problems = list(self._problems())
        if problems:
            raise PoolConfigError(problems)

    def _problems(self) -> Iterator[str]:
        yield from _name_problems("name", self.name)
        for alias in self.aliases:
            yield from _name_problems("alias", alias)
        me = f"member {self.name!r}"
        for which in ("input_price", "output_price"):
            price = getattr(self, which)
            if not _number(price) or math.isnan(price):
                yield f"{me} has no {which}; give USD per million tokens (0 if it is free)"
            elif not 0 <= price < math.inf:
                yield f"{me} has {which}={price}; it must be a finite number >= 0"
        for model, prices in self.served_prices.items():
            if len(prices) != 2 or not all(_number(p) and 0 <= p < math.inf for p in prices):
                yield f"{me} has served_prices {model!r}={prices}; give two finite numbers >= 0, input and output"
        for which in ("max_concurrency", "max_tokens"):
            count = getattr(self, which)
            if not isinstance(count, int) or count < 1:
                yield f"{me} has {which}={count!r}; it must be a whole number of at least 1"
        if not (_number(self.timeout_s) and 0 < self.timeout_s < math.inf):
            yield f"{me} has timeout_s={self.timeout_s}; it must be a positive number of seconds"
        if not (_number(self.temperature) and 0 <= self.temperature < math.inf):
            yield f"{me} has temperature={self.temperature}; it must be >= 0"
        if not (_number(self.top_p) and 0 < self.top_p <= 1):
            yield f"{me} has top_p={self.top_p}; it must be in (0, 1]"
        if self.fallback == self.name:
            yield f"{me} cannot fall back to itself"


def _name_problems(label: str, name: Any) -> Iterator[str]:
    if not isinstance(name, str) or not name.strip():
        yield f"a member's {label} is blank; give it one"
    elif name != name.strip() or not name.isprintable() or any(c in name for c in ":<>"):
        yield (
            f"member {label} {name!r} must not hold ':', '<', '>' or line breaks, nor blanks around it: "
            "the router writes NAME:QUERY between tags"
        )


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True, slots=True)
class RawReply:
    """What a backend got: text and usage as the endpoint reported them; ``None`` where it did not."""

    text: str | None
    input_tokens: int | None = None
    output_tokens: int | None = None
    model: str | None = None
    finish_reason: str | None = None


class Charge(NamedTuple):
    """What one member is paid for its part in a call."""

    member: str
    model: str | None
    input_tokens: int
    output_tokens: int
    nano_usd: int


@dataclass(frozen=True, slots=True)
class Reply:
    """One finished call, failed or not.

    Attributes:
        member: the member that was asked.
        answered_by: the member whose reply this is; another one after a fallback.
        model: what the endpoint said it was.
        text: the reply; ``None`` on failure.
        input_tokens, output_tokens: tokens of all billed attempts, and of a cached reply.
        usage_estimated: True where the endpoint reported none and they were counted by us.
        usd: what the call cost, fallback included, in whole billionths; a reply from the cache is free.
        input_price, output_price, price_date: prices of what answered.
        latency_s: from the first attempt to the end, waits included.
        attempts: requests that were sent.
        cached: it came from the reply cache.
        outcome: how it ended.
        error: one line about a failure, free of keys.
        retry_after: seconds for which the endpoint asked to be left alone.
        finish_reason: the endpoint's own word.
        model_mismatch: the endpoint answered with another model than was asked for.
        charges: who was paid what, where more than one member or model was; empty otherwise.
    """

    member: str
    answered_by: str
    model: str | None
    text: str | None
    input_tokens: int
    output_tokens: int
    usage_estimated: bool
    usd: float
    input_price: float
    output_price: float
    price_date: str | None
    latency_s: float
    attempts: int
    cached: bool
    outcome: Outcome
    error: str | None = None
    retry_after: float | None = None
    finish_reason: str | None = None
    model_mismatch: bool = False
    charges: tuple[Charge, ...] = ()

    @property
    def ok(self) -> bool:
        """True where there is a text to use."""
        return self.outcome is Outcome.OK


class BackendError(Exception):
    """A backend's attempt failed.

    Args:
        outcome: how.
        message: one line without secrets.
        retry_after: seconds, where the endpoint said so.
        billed: what must be paid all the same; counts that are ``None`` are estimated.
    """

    def __init__(
        self, outcome: Outcome, message: str, *, retry_after: float | None = None, billed: RawReply | None = None
    ) -> None:
        super().__init__(message)
        self.outcome, self.retry_after, self.billed = outcome, retry_after, billed


class Backend(Protocol):
    """A way to ask one model. Implementations raise :class:`BackendError`; retries are the pool's business.

    Attributes:
        identity: what a cached reply depends on besides the request (base URL and model, or a version);
            ``None`` where that cannot be told, and replies are not cached then.
        model: the model asked for, where the endpoint reports one.
        bills_failures: whether an attempt that failed may be billed all the same.
    """

    identity: str | None
    model: str | None
    bills_failures: bool

    def check(self) -> None:
        """Raise :class:`~guerdon.errors.PoolError` where something that a call needs is missing."""
        ...

    async def complete(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int,
        temperature: float,
        top_p: float,
        seed: int | None,
        timeout: float,
    ) -> RawReply:
        """One attempt."""
        ...

    def stream(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int,
        temperature: float,
        top_p: float,
        seed: int | None,
        timeout: float,
    ) -> AsyncGenerator[str | RawReply, None]:
        """One attempt, in pieces of text followed by a :class:`RawReply` with the usage."""
        ...

    async def aclose(self) -> None:
        """Release what it holds."""
        ...
