"""A process that scores records with one reward: ``python -m guerdon.serve.scorer_process``, started by the server.

It reads from the socket that is its standard input: first the reward as YAML spells it, then batches of records. What a
reward prints goes to standard error, so that it cannot disturb the conversation. The process ends when the socket closes.
"""

from __future__ import annotations

import os
import signal
import socket
import traceback
from typing import Any

from guerdon.errors import GuerdonError
from guerdon.sandbox.zygote import receive, send

__all__ = ["main"]


def main() -> None:
    """Serve until the socket closes."""
    # Ending is the server's business: a signal to the whole group must not cut off what is being scored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    channel = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    from guerdon.evaluation import score_stream

    opening = receive(channel)
    if opening is None:
        return
    try:
        reward = score_stream.open_reward(opening["spec"])
    except GuerdonError as error:
        send(channel, {"error": _plain(str(error))})
        return
    send(channel, {"name": _plain(str(reward.name))})
    while (records := receive(channel)) is not None:
        send(channel, _answer(score_stream, records))


def _answer(score_stream: Any, records: list[dict[str, Any]]) -> dict[str, Any]:
    try:
        rows = score_stream.score_chunk(list(enumerate(records)))
    except GuerdonError as error:
        return {"error": _plain(str(error))}
    except Exception as error:  # noqa: BLE001  a bug of the reward: the server says so, the log where it was
        frames = "".join(traceback.format_tb(error.__traceback__))
        os.write(2, f"guerdon: a reward met a bug: {type(error).__name__}\n{frames}".encode(errors="replace"))
        return {"bug": type(error).__name__}
    for row in rows:
        row["reason"] = None if row["reason"] is None else _plain(row["reason"])
    return {"rows": rows}


def _plain(text: str) -> str:
    """Text that can be sent on: a message may quote lone surrogates of a completion."""
    return text.encode("utf-8", "replace").decode()


if __name__ == "__main__":
    main()
