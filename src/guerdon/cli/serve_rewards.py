"""``guerdon serve-rewards``: the rewards of a YAML file over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from guerdon.cli.common import emit, guarded, progress

__all__ = ["serve_rewards_command"]


@guarded
def serve_rewards_command(
    rewards: Annotated[Path, typer.Argument(help="YAML with the key reward, as `guerdon score` reads it.")],
    host: Annotated[str, typer.Option(help="Address to bind; other than loopback only with --keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8090,
    keys: Annotated[Path | None, typer.Option(help="Key store; without it everybody who can connect may ask.")] = None,
    workers: Annotated[int, typer.Option(min=1, max=256, help="Scoring processes; each makes the reward anew.")] = 1,
    timeout: Annotated[float, typer.Option(help="Seconds per request; then its scoring is ended.")] = 120.0,
    max_batch: Annotated[int, typer.Option(min=1, help="Records per request.")] = 4096,
    max_body: Annotated[int, typer.Option(help="Largest request body in bytes.")] = 64 * 2**20,
    max_in_flight: Annotated[int, typer.Option(help="Requests scored or waiting at once; more get 503.")] = 256,
    strip: Annotated[
        list[str] | None,
        typer.Option(help="Text that ends the policy's turn ('<|im_end|>'), taken off OpenRLHF's queries; repeatable."),
    ] = None,
    drain: Annotated[float, typer.Option(help="Seconds that a shutdown waits for running requests.")] = 30.0,
    access_log: Annotated[bool, typer.Option(help="One JSON line per request on stderr: no texts, no keys.")] = False,
) -> None:
    """Answer reward requests: POST /v1/score (batches), POST /get_reward (OpenRLHF's remote reward).

    Prints one JSON line with the URL when it is ready. SIGTERM finishes what is running. A reward that fails is a row
    with "valid": false, or an error for OpenRLHF, never a 0.

    Example: guerdon serve-rewards rewards.yaml --keys keys.sqlite --port 8090 --workers 4
    """
    from guerdon.cli.score import read_spec
    from guerdon.errors import ConfigError
    from guerdon.evaluation.score_stream import check_workers
    from guerdon.serve.keys import KeyStore
    from guerdon.serve.rewards_app import RewardsApp, RewardSettings
    from guerdon.serve.server import listen, require_keys, run

    settings = RewardSettings(
        workers=workers,
        max_body_bytes=max_body,
        max_batch=max_batch,
        max_in_flight=max_in_flight,
        timeout_s=timeout,
        drain_s=drain,
        strip=tuple(strip or ()),
        access_log=access_log,
    )
    require_keys(host, keys, "everybody could run the rewards")
    if keys is not None and not keys.exists():
        raise ConfigError(f"--keys {keys} does not exist; `guerdon keys create NAME --keys {keys}` makes it")
    spec = read_spec(rewards)
    check_workers(spec, workers)
    app = RewardsApp(spec, None if keys is None else KeyStore(keys), settings)
    sock = listen(host, port)
    address, bound = sock.getsockname()[:2]
    url = f"http://[{address}]:{bound}" if ":" in address else f"http://{address}:{bound}"

    def ready() -> None:
        emit({"url": url, "workers": workers}, as_json=False, text=f'{{"url": "{url}", "workers": {workers}}}')
        progress(f"scoring with {rewards} on {url}; Ctrl-C or SIGTERM finishes what is running, then stops")

    run(app, sock, on_ready=ready)
