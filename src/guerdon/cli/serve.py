"""``guerdon serve`` and ``guerdon keys``."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from guerdon.cli.common import emit, guarded, progress

__all__ = ["keys_app", "serve_command"]

_KEYS = Path("keys.sqlite")
StoreOption = Annotated[Path, typer.Option("--keys", help="The key store, an SQLite file.")]


@guarded
def serve_command(
    router: Annotated[
        str,
        typer.Option(
            help="What answers: the folder of a trained Router-R1, the file of a saved router, member:NAME, or cheapest."
        ),
    ],
    pool: Annotated[Path, typer.Option(help="The pool: a YAML file.")],
    host: Annotated[str, typer.Option(help="Address to bind; other than loopback only with --keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8080,
    name: Annotated[
        str | None, typer.Option(help="Model name of the router; its file's or folder's by default.")
    ] = None,
    keys: Annotated[Path | None, typer.Option(help="Key store; without it everybody who can connect may ask.")] = None,
    max_cost_usd: Annotated[
        float | None, typer.Option(help="Most USD per request; a request can only lower it.")
    ] = None,
    max_calls: Annotated[int | None, typer.Option(min=0, help="Most calls of members per request; likewise.")] = None,
    deadline: Annotated[float | None, typer.Option(help="Seconds per request; likewise.")] = None,
    max_body: Annotated[int, typer.Option(help="Largest request body in bytes.")] = 4 * 2**20,
    max_in_flight: Annotated[int, typer.Option(help="Requests answered at once by one process; more get 503.")] = 2048,
    drain: Annotated[float, typer.Option(help="Seconds that a shutdown waits for running requests.")] = 30.0,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Processes; each loads the router.")] = 1,
    access_log: Annotated[bool, typer.Option(help="One JSON line per request on stderr: no texts, no keys.")] = False,
) -> None:
    """Answer OpenAI chat requests with a router, and with each member of its pool by name.

    Prints one JSON line with the URL when it is ready. SIGTERM finishes what is running.

    Example: guerdon serve --router runs/demo --pool pool.yaml --keys keys.sqlite --port 8080
    """
    from guerdon.errors import ConfigError
    from guerdon.serve.app import App, create_app
    from guerdon.serve.keys import KeyStore
    from guerdon.serve.metrics import Metrics
    from guerdon.serve.server import listen, require_keys, run, run_workers
    from guerdon.serve.settings import Settings

    settings = Settings(
        max_body_bytes=max_body,
        max_in_flight=max_in_flight,
        max_cost_usd=max_cost_usd,
        max_calls=max_calls,
        deadline_s=deadline,
        drain_s=drain,
        access_log=access_log,
    )
    require_keys(host, keys)
    if keys is not None and not keys.exists():
        raise ConfigError(f"--keys {keys} does not exist; `guerdon keys create NAME --keys {keys}` makes it")

    def make_app(folder: Path | None = None) -> App:
        from guerdon.routing.pool import Pool
        from guerdon.routing.pool_yaml import PoolConfig
        from guerdon.serve.routes import load_served
        from guerdon.serve.tally import TallyLedger

        book = PoolConfig.from_yaml(pool).ledger
        # A server runs for weeks: sums for ever, single entries in memory only for a while.
        ledger = TallyLedger(pool.parent / book if book else None, keep=1000, by_trajectory=False)
        members = Pool.from_yaml(pool, ledger=ledger)
        members.check()
        store = None if keys is None else KeyStore(keys)
        served = load_served(router, members, name=name, settings=settings)
        return create_app(served, members, store, settings, metrics=Metrics(folder))

    app = make_app() if workers == 1 else None
    sock = listen(host, port)
    address, bound = sock.getsockname()[:2]
    url = f"http://[{address}]:{bound}" if ":" in address else f"http://{address}:{bound}"

    def ready() -> None:
        emit(
            {"url": f"{url}/v1", "workers": workers}, as_json=False, text=f'{{"url": "{url}/v1", "workers": {workers}}}'
        )
        progress(f"serving {router} on {url}/v1; Ctrl-C or SIGTERM finishes what is running, then stops")

    if app is None:
        run_workers(make_app, sock, workers, ready)
    else:
        run(app, sock, on_ready=ready)


keys_app = typer.Typer(help="API keys of `guerdon serve`, with caps on money and rate.", no_args_is_help=True)


@keys_app.command("create")
@guarded
def create_command(
    name: Annotated[str, typer.Argument(help="Whose key it is; unique.")],
    keys: StoreOption = _KEYS,
    usd_day: Annotated[float | None, typer.Option(help="Most USD per UTC day.")] = None,
    usd_month: Annotated[float | None, typer.Option(help="Most USD per UTC month.")] = None,
    usd_total: Annotated[float | None, typer.Option(help="Most USD ever.")] = None,
    rpm: Annotated[int | None, typer.Option(help="Most requests per minute.")] = None,
    tpm: Annotated[int | None, typer.Option(help="Most tokens per minute, input and output together.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Make a key and print it. It is shown this once: only its hash is stored.

    Example: guerdon keys create team-a --usd-day 5 --rpm 600
    """
    from guerdon.serve.keys import create_key

    key = create_key(keys, name, usd_day=usd_day, usd_month=usd_month, usd_total=usd_total, rpm=rpm, tpm=tpm)
    progress(f"key {name!r} stored in {keys}; it is shown this once")
    emit({"name": name, "key": key}, as_json=as_json, text=key)


@keys_app.command("list")
@guarded
def list_command(
    keys: StoreOption = _KEYS,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the keys with their caps and what they have spent.

    Example: guerdon keys list --json
    """
    from guerdon.serve.keys import list_keys

    known = list_keys(keys)
    if as_json:
        emit([asdict(k) for k in known], as_json=True)
        return
    for k in known:
        caps = (
            ("today", k.spent_day, k.usd_day),
            ("month", k.spent_month, k.usd_month),
            ("ever", k.spent_total, k.usd_total),
        )
        money = ", ".join(
            f"{what} ${spent:.4f}" + (f" of ${cap:.2f}" if cap is not None else "") for what, spent, cap in caps
        )
        state = f"revoked {time.strftime('%Y-%m-%d', time.gmtime(k.revoked))}" if k.revoked else "active"
        print(
            f"{k.id}  {k.name}  {state}  {money}, {k.calls} requests, {k.rpm or 'any'}/min, {k.tpm or 'any'} tokens/min"
        )


@keys_app.command("revoke")
@guarded
def revoke_command(
    key: Annotated[str, typer.Argument(help="Name or id of the key.")],
    keys: StoreOption = _KEYS,
) -> None:
    """Refuse a key from now on; running servers notice within a second.

    Example: guerdon keys revoke team-a
    """
    from guerdon.serve.keys import revoke_key

    revoke_key(keys, key)
    progress(f"key {key!r} is revoked")
