"""A run that can be stopped at any moment and goes on as if it never had been.

:class:`Run` owns what every training loop shares: the run folder, its checkpoints, callbacks, Ctrl-C and
the rule that a folder belongs to one configuration. A loop adds one step and its state.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guerdon.errors import CheckpointError, ConfigError
from guerdon.training.callbacks import Callback, MetricsWriter
from guerdon.training.checkpoint import Checkpoint, Checkpoints, load_state, save_state
from guerdon.training.config import Config
from guerdon.training.distributed import ALONE, World

__all__ = ["Run", "RunResult", "check_folder"]


@dataclass(frozen=True)
class RunResult:
    """How a call of ``fit`` ended.

    Args:
        step: steps done since the beginning of the run.
        stopped: ``"done"``, ``"early"``, ``"interrupted"`` or ``"no_signal"`` (nothing to learn from; see
            ``no_signal_steps``).
        history: one metrics row per step of this call.
        checkpoint: where the final state lies, if the run has a folder.
    """

    step: int
    stopped: str
    history: list[dict[str, Any]] = field(default_factory=list)
    checkpoint: Path | None = None


class Run(ABC):
    """Base of the training loops.

    Args:
        config: settings; recorded in the run folder, and another configuration is refused there.
        total: steps of the whole run.
        out: run folder; ``None`` keeps nothing on disk.
        callbacks: see :mod:`guerdon.training.callbacks`.
        identity: further facts that must not change between start and resume (for example a digest of the data).
        world: the processes of the run; callbacks and files are the first one's.
    """

    def __init__(
        self,
        config: Config,
        *,
        total: int,
        out: str | Path | None,
        callbacks: Sequence[Callback],
        identity: Mapping[str, Any],
        save_every: int,
        keep_last: int,
        world: World = ALONE,
    ) -> None:
        self.config = config
        self.world = world
        self.total = total
        self.step = 0
        self.stopping: str | None = None
        self.out = None if out is None else Path(out)
        self.callbacks = list(callbacks)
        self._identity = {**config.flat(), **identity}
        self._save_every = save_every
        self._opened = False
        self._saved_at: int | None = None
        self.checkpoints: Checkpoints | None = None
        if self.out is not None:
            self.checkpoints = Checkpoints(self.out / "checkpoints", keep_last=keep_last, report=self.warn)
            self.callbacks.append(MetricsWriter(self.out / "metrics.jsonl"))

    @abstractmethod
    def train_step(self) -> tuple[dict[str, Any], Any]:
        """Do step ``self.step``; return its metrics row and whatever detail callbacks may want."""

    @abstractmethod
    def write(self, folder: Path) -> dict[str, Any]:
        """Put weights into ``folder`` and return the rest of the state."""

    @abstractmethod
    def restore(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`write` wrote."""

    def before_save(self) -> None:  # noqa: B027  most runs have nothing to do here
        """Called in every process before the first one writes a checkpoint."""

    def warn(self, message: str) -> None:
        """Say one line to the user, on stderr."""
        if self.world.main:
            print(message, file=sys.stderr, flush=True)

    def stop(self, reason: str = "early") -> None:
        """End the run after the present step; a restart with the same folder does not continue it."""
        self.stopping = reason

    def fit(self, steps: int | None = None) -> RunResult:
        """Train until ``steps`` steps are done in all (default: the whole run), resuming from the run folder.

        Ctrl-C finishes the present step, saves and returns ``stopped="interrupted"``; a second one stops at once.

        Raises:
            ConfigError: ``steps`` exceeds the run, or the folder belongs to another configuration.
            CheckpointError: a checkpoint cannot be written, or does not fit this run.
        """
        target = self.total if steps is None else steps
        if not 0 <= target <= self.total:
            raise ConfigError(
                f"fit(steps={steps}) exceeds the run of {self.total} steps; schedules need its true length: "
                "set steps in the configuration"
            )
        with self._alone():
            return self._fit(target)

    def _fit(self, target: int) -> RunResult:
        self._open()
        history: list[dict[str, Any]] = []
        callbacks = self.callbacks if self.world.main else []
        for callback in callbacks:
            callback.on_start(self)
        try:
            with _interruptible(self.warn) as interrupted:
                while self.step < target and self.stopping is None and not interrupted.is_set():
                    row, detail = self.train_step()
                    self.step += 1
                    row = self._report({"step": self.step, **row}, detail, interrupted)
                    history.append(row)
                    if self._save_every and self.step % self._save_every == 0:
                        self.save()
                self.save()
                stopped = self.stopping or ("interrupted" if interrupted.is_set() and self.step < target else "done")
        except KeyboardInterrupt:
            kept = self.checkpoints.latest() if self.checkpoints else None
            self.warn(
                f"stopped inside step {self.step + 1}; " + (f"resume from {kept.path}" if kept else "nothing saved")
            )
            raise
        finally:
            for callback in callbacks:
                callback.on_end(self)
        last = self.checkpoints.paths()[-1] if self.checkpoints else None
        return RunResult(self.step, stopped, history, last)

    def _report(self, row: dict[str, Any], detail: Any, interrupted: threading.Event) -> dict[str, Any]:
        """Let the callbacks see a step; all processes then agree on its row and on whether to go on."""

        def report() -> tuple[dict[str, Any], str | None, bool]:
            for callback in self.callbacks:
                row.update(callback.measure(self, row, detail) or {})
            for callback in self.callbacks:
                callback.on_step(self, row, detail)
            return row, self.stopping, interrupted.is_set()

        row, self.stopping, stop = self.world.once(report)
        if stop:
            interrupted.set()
        elif self.world.size > 1:
            # The first process has not seen the signal yet; it will within the next step.
            interrupted.clear()
        return row

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the run folder, so that two processes never write into it; a killed process lets go by itself."""
        if self.out is None or not self.world.main:
            yield
            return
        self.out.mkdir(parents=True, exist_ok=True)
        with open(self.out / ".lock", "w", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckpointError(f"{self.out}: another process trains in this folder; use another one") from None
            yield

    def save(self) -> Checkpoint | None:
        """Write a checkpoint of the present step, unless the folder has it already or the run has no folder."""
        if self.checkpoints is None or self._saved_at == self.step:
            return None
        self.before_save()
        made = self.world.once(self._save)
        self._saved_at = self.step
        return made

    def _save(self) -> Checkpoint:
        assert self.checkpoints is not None
        for callback in self.callbacks:
            callback.on_checkpoint(self)

        def write(folder: Path) -> None:
            state = self.write(folder)
            states = {cb.name: cb.state_dict() for cb in self.callbacks}
            save_state(
                folder / "state.pt", {"loop": state, "callbacks": states, "step": self.step, "stopping": self.stopping}
            )

        return self.checkpoints.save(self.step, write, meta={"run": type(self).__name__, "settings": self._identity})

    def _open(self) -> None:
        """Resume from the folder's newest valid checkpoint, once."""
        if self._opened:
            return
        names = [callback.name for callback in self.callbacks]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ConfigError(f"two callbacks are called {repeated[0]!r}; give one of them another name=")
        if self.out is not None and self.checkpoints is not None:
            out, checkpoints = self.out, self.checkpoints

            def take() -> None:
                self._claim(out)
                checkpoints.clean()

            self.world.once(take)
            found = self.world.once(checkpoints.latest)
            if found is not None:
                self._resume(found)
            else:
                for callback in self.callbacks if self.world.main else []:
                    callback.load_state_dict({})
        self._opened = True

    def _resume(self, found: Checkpoint) -> None:
        self._refuse_other(found.meta.get("settings", {}), found.path)
        state = load_state(found.path / "state.pt")
        saved = state["callbacks"]
        for callback in self.callbacks if self.world.main else []:
            callback.load_state_dict(saved.get(callback.name, {}))
        try:
            self.restore(found.path, state["loop"])
        except (KeyError, ValueError, RuntimeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{found.path}: does not fit this run: {error}") from error
        self.step = self._saved_at = state["step"]
        self.stopping = state["stopping"]

    def _claim(self, out: Path) -> None:
        """Record the configuration in a fresh folder; refuse a folder of another one."""
        check_folder(out, self._identity, self.config.free_on_resume())
        record = out / "run.json"
        out.mkdir(parents=True, exist_ok=True)
        partial = record.with_suffix(f".partial-{os.getpid()}")
        partial.write_text(json.dumps(self._identity, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, record)

    def _refuse_other(self, settings: Mapping[str, Any], where: Path) -> None:
        _refuse_other(settings, self._identity, self.config.free_on_resume(), where)


def check_folder(out: Path, identity: Mapping[str, Any], free: frozenset[str]) -> None:
    """Refuse a run folder that belongs to another configuration; needs no model.

    Args:
        out: the folder; it need not exist.
        identity: dotted settings and whatever else must agree. Keys that the folder's record lacks are compared too.
        free: keys that may differ.

    Raises:
        ConfigError: names the settings that differ.
        CheckpointError: the record cannot be read.
    """
    record = out / "run.json"
    if not record.exists():
        return
    try:
        settings = json.loads(record.read_text(encoding="utf-8"))
    except ValueError:
        raise CheckpointError(f"{record}: is not JSON; use another run folder") from None
    _refuse_other(settings, identity, free, out)


def _refuse_other(settings: Mapping[str, Any], identity: Mapping[str, Any], free: frozenset[str], where: Path) -> None:
    now = json.loads(json.dumps(identity))
    differing = sorted(key for key in (settings.keys() | now.keys()) - free if settings.get(key) != now.get(key))
    if differing:
        shown = ", ".join(f"{k} (was {settings.get(k)!r}, is {now.get(k)!r})" for k in differing[:6])
        raise ConfigError(
            f"{where} belongs to a run with other settings: {shown}; use another folder or the old settings"
        )


@contextmanager
def _interruptible(warn: Any) -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into a flag; the second raises KeyboardInterrupt. Only in the main thread."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def handler(signum: int, frame: Any) -> None:
        if flag.is_set():
            raise KeyboardInterrupt
        flag.set()
        warn("interrupted: finishing this step, then saving; press Ctrl-C again to stop at once")

    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, previous)
