"""A pool described in YAML: members, endpoints, limits. Everything wrong with it is reported together, by line.

members:
  - name: qwen2.5-7b
    descriptor: A 7B model, strong at arithmetic and code.
    input_price: 0.3          # USD per million tokens
    output_price: 0.3
    price_date: 2026-01-15
    endpoint: {base_url: "http://127.0.0.1:8000/v1", model: qwen2.5-7b-instruct, api_key_env: QWEN_KEY}
    fallback: recorded-gpt
  - name: recorded-gpt
    input_price: 10
    output_price: 30
    recorded: {path: replies.jsonl, member: gpt-4}
cache: replies.sqlite
ledger: ledger.jsonl
retry: {attempts: 3}
breaker: {cooldown_s: 5}      # or false
"""

from __future__ import annotations

import datetime
import importlib
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, field_validator

from guerdon.errors import ConfigError, DataError
from guerdon.routing.backends import CallableBackend, PolicyBackend, RecordedBackend, read_recorded
from guerdon.routing.breaker import BreakerPolicy
from guerdon.routing.cache import ReplyCache
from guerdon.routing.http_client import HttpBackend
from guerdon.routing.ledger import Ledger
from guerdon.routing.member import Backend, Member, PoolConfigError
from guerdon.routing.pool import Pool
from guerdon.routing.retry import RetryPolicy
from guerdon.routing.secrets import Secret
from guerdon.training.settings import Config, Count, NonNegative, Positive, load_yaml

__all__ = ["PoolConfig", "read_pool"]


class EndpointConfig(Config):
    """An OpenAI-compatible endpoint; see :class:`guerdon.routing.http_client.HttpBackend`.

    ``api_key_env`` names the environment variable that holds the key; keys are never written in the file.
    """

    base_url: str
    model: str
    api_key_env: str | None = None
    headers: dict[str, str] = Field(default_factory=dict)
    extra_body: dict[str, Any] = Field(default_factory=dict)
    max_tokens_field: str = "max_tokens"

    def conflicts(self) -> Iterator[str]:
        if self.api_key_env is not None and not re.fullmatch(r"[A-Za-z_]\w*", self.api_key_env):
            # Not shown: it may be the key itself.
            yield "api_key_env must be the name of an environment variable, not a key"
            return
        try:
            self.backend()
        except PoolConfigError as error:
            yield str(error)

    def backend(self) -> HttpBackend:
        """The described client."""
        return HttpBackend(
            self.base_url,
            self.model,
            api_key=Secret(self.api_key_env) if self.api_key_env else None,
            headers=self.headers,
            extra_body=self.extra_body,
            max_tokens_field=self.max_tokens_field,
        )


class RecordedConfig(Config):
    """Recorded replies, a row each in JSONL or CSV.

    With ``encoder`` (``minilm`` or a folder) the nearest question above ``threshold`` counts too. ``query`` and
    ``reply`` name the columns; ``member`` says whose rows are meant, by default this member's.
    """

    path: Path
    member: str | None = None
    query: str = "query"
    reply: str = "reply"
    encoder: str | None = None
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.9


class LocalConfig(Config):
    """A policy in this process."""

    policy: str
    device: str = "auto"
    dtype: str = "auto"


class SpecialistConfig(Config):
    """A simulated specialist of the world-facts testbed; see :class:`guerdon.environments.worldfacts.Skill`."""

    domains: tuple[str, ...]
    accuracy: float = 0.95
    outside: float = 0.05
    verbosity: int = 8
    register_: Literal["compact", "natural"] = Field("compact", alias="register")
    seed: int = 0


_WAYS = ("endpoint", "recorded", "local", "specialist", "callable")


class MemberConfig(Config):
    """One member; exactly one of ``endpoint``, ``recorded``, ``local``, ``specialist`` and ``callable``."""

    name: str
    descriptor: str = ""
    input_price: float
    output_price: float
    price_date: str | None = None
    latency_s: float | None = None
    example_scores: dict[str, float] = Field(default_factory=dict)
    size_b: float | None = None
    max_concurrency: int = 8
    timeout_s: float = 60.0
    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    fallback: str | None = None
    aliases: tuple[str, ...] = ()
    served_prices: dict[str, tuple[float, float]] = Field(default_factory=dict)
    endpoint: EndpointConfig | None = None
    recorded: RecordedConfig | None = None
    local: LocalConfig | None = None
    specialist: SpecialistConfig | None = None
    callable: str | None = Field(None, description="module:function, run in a thread")

    @field_validator("price_date", mode="before")
    @classmethod
    def _date(cls, value: Any) -> Any:
        return value.isoformat() if isinstance(value, datetime.date) else value

    def conflicts(self) -> Iterator[str]:
        ways = [w for w in _WAYS if getattr(self, w) is not None]
        if len(ways) != 1:
            yield f"member {self.name!r} needs exactly one of {', '.join(_WAYS)}, got {', '.join(ways) or 'none'}"
        try:
            self.member()
        except PoolConfigError as error:
            yield from error.problems

    def member(self) -> Member:
        """The described member."""
        return Member(**{f.name: getattr(self, f.name) for f in fields(Member)})


class RetryConfig(Config):
    """See :class:`guerdon.routing.retry.RetryPolicy`."""

    attempts: Count = 3
    base_s: NonNegative = 0.5
    max_s: NonNegative = 8.0
    max_retry_after_s: NonNegative = 30.0
    total_s: NonNegative = 120.0


class BreakerConfig(Config):
    """See :class:`guerdon.routing.breaker.BreakerPolicy`."""

    window_s: Positive = 60.0
    min_calls: Count = 5
    failure_rate: Annotated[float, Field(gt=0, le=1)] = 0.5
    consecutive: Count = 10
    cooldown_s: Positive = 5.0
    max_cooldown_s: Positive = 120.0


class PoolConfig(Config):
    """A whole pool."""

    members: tuple[MemberConfig, ...]
    cache: Path | None = None
    ledger: Path | None = None
    retry: RetryConfig = RetryConfig()
    breaker: BreakerConfig | Literal[False] = BreakerConfig()

    def conflicts(self) -> Iterator[str]:
        try:
            Pool([(m.member(), _unused) for m in self.members])
        except PoolConfigError as error:
            yield from error.problems


def read_pool(path: Path, *, ledger: Ledger | None = None, **options: Any) -> Pool:
    """Read and build a pool; relative paths in the file are relative to it.

    Args:
        path: of the YAML file.
        ledger: in place of the file's own.
        options: passed on to :class:`Pool`, over what the file says.

    Raises:
        ConfigError: the file is unreadable or has unknown, missing or impossible settings, all listed, with
            their lines.
    """
    values = load_yaml(path)
    try:
        config = PoolConfig(**values)
    except ConfigError as error:
        found = list(getattr(error, "problems", (("", str(error)),)))
        found += [extra for extra in _hidden(values) if extra not in found]
        lines = _Lines(path)
        raise PoolConfigError([lines.locate(key, text) for key, text in found]) from None
    base = path.parent
    members = [(m.member(), _backend(m, base)) for m in config.members]
    parts: dict[str, Any] = {
        "ledger": ledger if ledger is not None else Ledger(base / config.ledger if config.ledger else None),
        "cache": ReplyCache(base / config.cache) if config.cache else None,
        "retry": RetryPolicy(**config.retry.model_dump()),
        "breaker": BreakerPolicy(**config.breaker.model_dump()) if config.breaker else None,
    }
    return Pool(members, **(parts | options))


def _hidden(values: Any) -> Iterator[tuple[str, str]]:
    """What is wrong with members beyond types and unknown keys, which alone are found in the first pass."""
    rows = values.get("members")
    seen: set[Any] = set()
    for number, row in enumerate(rows if isinstance(rows, list) else ()):
        if not isinstance(row, dict):
            continue
        name = row.get("name")
        if isinstance(name, str) and name in seen:
            yield f"members.{number}.name", f"member name {name!r} is given twice; names must be unique"
        seen.add(name if isinstance(name, str) else None)
        # Prices that are absent were reported as such.
        given = {"input_price": 0.0, "output_price": 0.0} | {
            k: row[k] for k in ("name", "input_price", "output_price", "fallback") if k in row
        }
        try:
            Member(**given)
        except PoolConfigError as error:
            for text in error.problems:
                yield f"members.{number}", text
        except TypeError:
            continue


class _Lines:
    """Finds the line of a setting in a YAML file, and the name of the member it belongs to."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)

    def locate(self, key: str, text: str) -> str:
        """``text`` with file, line, member and setting before it; an absent setting has its parent's line."""
        node, line, name = self._root, 1, ""
        for piece in filter(None, key.split(".")):
            found = None
            if isinstance(node, yaml.MappingNode):
                found = next(((k, v) for k, v in node.value if str(k.value) == piece), None)
            elif isinstance(node, yaml.SequenceNode) and piece.isdigit() and int(piece) < len(node.value):
                found = (node.value[int(piece)], node.value[int(piece)])
                name = _scalar(found[1], "name")
            if found is None:
                break
            line, node = found[0].start_mark.line + 1, found[1]
        where = re.sub(r"\.(\d+)", r"[\1]", key)
        member = f" ({name})" if name and repr(name) not in text else ""
        return f"{self._path}, line {line}: {where}{member}{': ' if where else ''}{text}"


def _scalar(node: Any, key: str) -> str:
    if isinstance(node, yaml.MappingNode):
        return next((str(v.value) for k, v in node.value if k.value == key and isinstance(v, yaml.ScalarNode)), "")
    return ""


def _unused(query: str) -> str:
    raise AssertionError("stands in for a backend while names are checked")


def _backend(config: MemberConfig, base: Path) -> Backend:
    if config.endpoint is not None:
        return config.endpoint.backend()
    if config.recorded is not None:
        return _recorded(config, config.recorded, base)
    if config.local is not None:
        local = config.local

        def load() -> Any:
            from guerdon.policies import load_policy
            from guerdon.rollout import TransformersEngine

            return TransformersEngine(load_policy(local.policy, device=local.device, dtype=local.dtype))

        return PolicyBackend(load, identity=f"local:{local.policy}:{local.dtype}")
    if config.specialist is not None:
        from guerdon.environments.worldfacts import Skill, Specialist, load_world

        p = config.specialist
        skill = Skill(p.domains, p.accuracy, p.outside, config.output_price, p.verbosity)
        return CallableBackend(
            Specialist(skill, load_world(), p.register_, p.seed), identity=f"specialist:{skill}:{p.seed}"
        )
    assert config.callable is not None
    module, _, name = config.callable.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"member {config.name!r}: callable {config.callable!r} cannot be imported ({error}); write module:function"
        ) from error
    return CallableBackend(function, blocking=True, identity=f"callable:{config.callable}")


def _recorded(config: MemberConfig, recorded: RecordedConfig, base: Path) -> RecordedBackend:
    path = base / recorded.path
    try:
        replies = read_recorded(path, query=recorded.query, reply=recorded.reply)
    except DataError as error:
        raise ConfigError(f"member {config.name!r}: {error}") from error
    wanted = recorded.member or config.name
    if "" not in replies and wanted not in replies:
        raise ConfigError(
            f"member {config.name!r}: {path} has no replies of {wanted!r}; it has {', '.join(sorted(replies)[:8])}"
        )
    encoder = None
    if recorded.encoder is not None:
        from guerdon.policies import load_encoder

        encoder = load_encoder(recorded.encoder)
    identity = f"recorded:{path.resolve()}:{wanted}:{recorded.reply}"
    return RecordedBackend(
        replies[wanted] if wanted in replies else replies[""],
        encoder=encoder,
        threshold=recorded.threshold,
        identity=identity,
    )
