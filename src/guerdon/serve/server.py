"""Running the application on uvicorn: limits on request heads, graceful shutdown, several workers.

On SIGTERM or SIGINT the server keeps its socket open but refuses new chat requests with 503 and reports
"draining" on ``/healthz``; when the last running request is done, or ``drain_s`` is over, it stops. A
second signal stops it at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

from guerdon.errors import ConfigError, MissingDependency

if TYPE_CHECKING:
    from guerdon.serve.keys import KeyStore

__all__ = ["Application", "Bounds", "is_loopback", "listen", "require_keys", "run", "run_workers"]


class Bounds(Protocol):
    """What the server itself needs to know of an application's settings."""

    @property
    def max_head_bytes(self) -> int:
        """Most bytes of a request's line and headers."""
        ...

    @property
    def read_s(self) -> float:
        """Seconds within which they must arrive."""
        ...

    @property
    def drain_s(self) -> float:
        """Seconds that a shutdown waits for running requests."""
        ...


class Application(Protocol):
    """An ASGI application that can be drained: told to take nothing new while it finishes what is running."""

    draining: bool
    in_flight: int

    @property
    def keys(self) -> KeyStore | None:
        """Who may use it."""
        ...

    @property
    def settings(self) -> Bounds:
        """Its limits."""
        ...

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI entry point."""
        ...


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to ``host``."""
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    return False


def require_keys(host: str, keys: object | None, risk: str = "everybody could spend the pool's money") -> None:
    """Refuse to offer other machines' users what ``risk`` says without keys.

    Raises:
        ConfigError: ``host`` is not loopback and there are no keys.
    """
    if keys is None and not is_loopback(host):
        raise ConfigError(
            f"--host {host} can be reached from other machines, and {risk}: "
            "give --keys FILE (`guerdon keys create` makes one), or bind to 127.0.0.1"
        )


def listen(host: str, port: int) -> socket.socket:
    """A bound, listening socket.

    Raises:
        ConfigError: the address cannot be bound.
    """
    try:
        family = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0][0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host.strip("[]"), port))
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port} ({error.strerror or error}); choose another --port"
        ) from error
    sock.listen(2048)
    sock.setblocking(False)
    sock.set_inheritable(True)
    return sock


def run(app: Application, sock: socket.socket, *, on_ready: Callable[[], None] | None = None) -> None:
    """Serve until a signal asks to stop. Returns when everything is finished and booked.

    Raises:
        MissingDependency: uvicorn is not installed.
        ConfigError: startup failed.
    """
    server = make_server(app, on_ready)
    # What is loaded by now stays: taking it out of the garbage collector's sight halves the 99th percentile.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)
    if app.keys is not None:
        app.keys.start()  # a file that cannot be used is reported before anything listens
    server.run(sockets=[sock])
    if not server.started:
        raise ConfigError("the server could not start; the lines above say why")


def make_server(app: Application, on_ready: Callable[[], None] | None = None) -> Any:
    """A uvicorn server that drains before it stops."""
    try:
        import uvicorn
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    except ImportError:
        raise MissingDependency("serving needs uvicorn and httptools: pip install 'guerdon[serve]'") from None

    settings = app.settings

    class BoundedProtocol(HttpToolsProtocol):
        """Refuses a request whose line and headers are too large, or do not arrive in time."""

        _in_head = False
        _head_bytes = 0
        _head_timer: asyncio.TimerHandle | None = None

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._in_head:
                self._head_bytes += len(data)
                if self._head_bytes > settings.max_head_bytes:
                    self._refuse(
                        b"431 Request Header Fields Too Large", b"headers_too_large", b"the headers are too large"
                    )
                elif self._head_timer is None:
                    self._head_timer = self.loop.call_later(settings.read_s, self._too_slow)

        def on_message_begin(self) -> None:
            self._in_head = True
            self._head_bytes = 0
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._in_head = False
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None
            if sum(len(n) + len(v) for n, v in self.headers) > settings.max_head_bytes:
                self._refuse(b"431 Request Header Fields Too Large", b"headers_too_large", b"the headers are too large")
                return
            super().on_headers_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            self._refuse(b"400 Bad Request", b"invalid_http", b"this is not an HTTP request")

        def _too_slow(self) -> None:
            self._refuse(b"408 Request Timeout", b"headers_timeout", b"the headers did not arrive in time")

        def _refuse(self, status: bytes, code: bytes, message: bytes) -> None:
            if self.transport.is_closing():
                return
            body = (
                b'{"error":{"message":"'
                + message
                + b'","type":"invalid_request_error","param":null,"code":"'
                + code
                + b'"}}'
            )
            self.transport.write(
                b"HTTP/1.1 " + status + b"\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: "
                + str(len(body)).encode() + b"\r\n\r\n" + body
            )  # fmt: skip
            self.transport.close()

    class DrainingServer(uvicorn.Server):
        _drain_until = 0.0

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if app.draining:
                self.should_exit = self.force_exit = True
            app.draining = True
            self._drain_until = time.monotonic() + settings.drain_s

        async def on_tick(self, counter: int) -> bool:
            if app.draining and (app.in_flight == 0 or time.monotonic() > self._drain_until):
                self.should_exit = True
            return await super().on_tick(counter)

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started and on_ready is not None:
                on_ready()

    config = uvicorn.Config(
        app,  # type: ignore[arg-type]
        http=BoundedProtocol,
        loop="auto",
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=2048,
        timeout_graceful_shutdown=1,
    )
    return DrainingServer(config)


def run_workers(
    make_app: Callable[[Path], Application], sock: socket.socket, workers: int, on_ready: Callable[[], None]
) -> None:
    """Serve with several processes that share one socket, one key store and one set of counters.

    They are forked before anything heavy is loaded, so each makes its own application. When one dies
    the others are asked to stop: a supervisor outside restarts the whole.

    Args:
        make_app: builds the application; gets the folder through which counters are shared.
        sock: a listening socket.
        workers: how many.
        on_ready: called once all were started.
    """
    if not hasattr(os, "fork"):
        raise ConfigError(f"--workers {workers} needs fork, which this system lacks; use --workers 1")
    with tempfile.TemporaryDirectory(prefix="guerdon-serve-") as name:
        children = [_spawn(make_app, sock, Path(name)) for _ in range(workers)]
        stopping = threading.Event()

        def stop(sig: int, frame: FrameType | None) -> None:
            stopping.set()
            for pid in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, sig)

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        on_ready()
        failed = 0
        while children:
            pid, status = os.wait()
            if pid in children:
                children.remove(pid)
                failed = failed or os.waitstatus_to_exitcode(status)
                if not stopping.is_set():
                    stop(signal.SIGTERM, None)
    if failed:
        raise ConfigError(f"a worker process ended with exit code {failed}; the lines above say why")


def _spawn(make_app: Callable[[Path], Application], sock: socket.socket, folder: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        run(make_app(folder), sock)
        code = 0
    except ConfigError as error:
        print(f"guerdon: {error}", file=sys.stderr)
    except Exception:  # noqa: BLE001 - this process ends here, and must say why
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)  # never return into the parent's stack
    raise AssertionError("unreachable")
