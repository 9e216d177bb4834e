"""Rewards of a server (``guerdon serve-rewards``) inside a trainer: the trainer's machines need none of the rewards'
packages, and its rewards share one pool of processes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from guerdon.errors import ConfigError, RewardError
from guerdon.integrations.trainers import with_parts

__all__ = ["verl_remote"]

_AGAIN = frozenset({429, 502, 503, 504})
_MOST_S = 30.0


def verl_remote(
    url: str, *, key: str | None = None, parts: Sequence[str] = (), timeout: float = 180.0, retries: int = 5
) -> Callable[..., Any]:
    """A ``compute_score`` for verl's ``custom_reward_function`` that asks a reward server.

    verl (0.8.0.dev) has no HTTP convention of its own for rewards; its reward loop awaits a coroutine function for every
    sample, all at once, which this is.

    Args:
        url: of the server, as ``guerdon serve-rewards`` prints it.
        key: API key.
        parts: which parts of the score verl logs, the same for all samples; NaN where one lacks it.
        timeout: seconds per try.
        retries: further tries where the server is busy, restarts, or cannot be reached; the wait between them doubles.

    Returns:
        ``async f(data_source, solution_str, ground_truth, extra_info=None) -> {"score": ..., parts...}``.

    Raises:
        ConfigError: no http(s) address, or a limit out of range.
        RewardError: (when called) the reward gives no value, or the server none in time.
    """
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"url must begin with http:// or https://, got {url!r}")
    if timeout <= 0 or retries < 0:
        raise ConfigError(f"timeout must be above 0 and retries at least 0, got {timeout} and {retries}")
    target = url.rstrip("/") + "/v1/score"

    async def compute_score(
        data_source: Any, solution_str: Any, ground_truth: Any, extra_info: Mapping[str, Any] | None = None, **more: Any
    ) -> dict[str, float]:
        extra = dict(extra_info or {})
        record = {
            **{key: plain for key, value in extra.items() if _is_json(plain := _plain(value))},
            "id": str(extra.get("index", data_source)), "data_source": str(data_source),
            "prompt": extra.get("question") or extra.get("prompt") or "", "completion": solution_str,
            "reference": _plain(ground_truth),
        }  # fmt: skip
        row = await _ask(target, record, key, timeout, retries)
        if not row["valid"]:
            raise RewardError(f"{row['reason']}; verl has no missing rewards: set on_error to a number or 'raise'")
        return with_parts(float(row["value"]), row["parts"], parts)

    return compute_score


def _plain(value: Any) -> Any:
    """What an array holds (verl reads its lists from Parquet as arrays); anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def _is_json(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and _is_json(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(_is_json(v) for v in value)
    return value is None or isinstance(value, str | bool | int | float)


async def _ask(
    target: str, record: Mapping[str, Any], key: str | None, timeout: float, retries: int
) -> Mapping[str, Any]:
    import aiohttp

    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    wait, problem = 1.0, ""
    for attempt in range(retries + 1):
        if attempt:
            await asyncio.sleep(wait)
            wait = min(2 * wait, _MOST_S)
        try:
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=timeout)) as session,
                session.post(target, json={"records": [record]}, headers=headers) as reply,
            ):
                if reply.status == 200:
                    row: Mapping[str, Any] = (await reply.json())["scores"][0]
                    return row
                problem = f"{target} answers {reply.status}: {await _message(reply)}"
                if reply.status not in _AGAIN:
                    raise RewardError(problem)
        except (aiohttp.ClientError, TimeoutError) as error:
            problem = f"{target} cannot be reached: {str(error) or type(error).__name__}"
    raise RewardError(problem)


async def _message(reply: Any) -> str:
    try:
        return str((await reply.json())["error"]["message"])
    except (ValueError, KeyError, TypeError, OSError):
        return str(reply.reason)
