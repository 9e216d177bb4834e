"""What watches a run: console, JSONL records, evaluation, early stop. All of it resumes with the run."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from guerdon.errors import CheckpointError, ConfigError, nearest
from guerdon.training.config import EarlyStopConfig
from guerdon.types import Trajectory

if TYPE_CHECKING:
    from guerdon.training.loop import Run

__all__ = ["Callback", "Console", "EarlyStop", "Evaluate", "JsonlWriter", "MetricsWriter", "TrajectoryWriter"]


class Callback:
    """Base of all callbacks; every method may be left out.

    ``measure`` of all callbacks runs before ``on_step`` of any: what it returns is in the row that the others see.
    """

    name: str = "callback"

    def on_start(self, run: Run) -> None:
        """Training begins or goes on."""

    def measure(self, run: Run, row: Mapping[str, Any], detail: Any) -> Mapping[str, Any] | None:
        """Return further entries for this step's metrics row."""

    def on_step(self, run: Run, row: Mapping[str, Any], detail: Any) -> None:
        """A step is done; ``run.stop()`` ends the run."""

    def on_checkpoint(self, run: Run) -> None:
        """A checkpoint is about to be written: flush."""

    def on_end(self, run: Run) -> None:
        """``fit`` returns or raises."""

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it; an empty state means that the run begins anew."""


class Console(Callback):
    """Progress on stderr: a live bar on a terminal, one plain line per ``every`` steps elsewhere.

    Args:
        keys: metrics shown (those absent from a row are left out).
        every: steps between lines where there is no terminal.
        format: text of one row instead of the default.
    """

    name = "console"

    def __init__(
        self,
        keys: Sequence[str] = ("loss", "reward/mean", "eval/reward/mean", "entropy", "kl", "time/step"),
        *,
        every: int = 10,
        format: Callable[[Mapping[str, Any]], str] | None = None,
    ) -> None:
        self._keys = tuple(keys)
        self._every = every
        self._format = format
        self._progress: Any = None
        self._bar: Any = None

    def on_start(self, run: Run) -> None:
        from rich.console import Console as Terminal
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        terminal = Terminal(stderr=True)
        if terminal.is_terminal:
            self._progress = Progress(
                TextColumn("train"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=terminal,
            )
            self._bar = self._progress.add_task("", total=run.total, completed=run.step)
            self._progress.start()

    def on_step(self, run: Run, row: Mapping[str, Any], detail: Any) -> None:
        text = self._format(row) if self._format else self._line(row)
        if self._progress is not None:
            self._progress.update(self._bar, completed=run.step, description=text)
        elif run.step % self._every == 0 or run.step in (1, run.total):
            print(f"step {run.step}/{run.total}  {text}", file=sys.stderr, flush=True)

    def on_end(self, run: Run) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _line(self, row: Mapping[str, Any]) -> str:
        return "  ".join(f"{key} {row[key]:.4g}" for key in self._keys if isinstance(row.get(key), int | float))


class JsonlWriter(Callback):
    """A JSONL file that after a restart holds each record once: it is cut back to the checkpoint's length.

    Args:
        path: the file; made with its folder.
        name: of this callback in checkpoints.
    """

    def __init__(self, path: str | Path, *, name: str) -> None:
        self.path = Path(path)
        self.name = name
        self._file: IO[bytes] | None = None
        self._length = 0

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record. Numbers that JSON lacks (NaN, infinities) become ``null``."""
        if self._file is None:
            self._open()
        assert self._file is not None
        line = json.dumps(_jsonable(record), ensure_ascii=False, allow_nan=False).encode() + b"\n"
        self._file.write(line)
        self._file.flush()
        self._length += len(line)

    def on_checkpoint(self, run: Run) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())

    def on_end(self, run: Run) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def state_dict(self) -> dict[str, Any]:
        return {"length": self._length}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._length = int(state.get("length", 0))
        size = self.path.stat().st_size if self.path.exists() else 0
        if size < self._length:
            raise CheckpointError(
                f"{self.path} has {size} bytes, the checkpoint was written with {self._length}: records are lost; "
                "restore the file, or start in another folder"
            )
        if size > self._length:
            os.truncate(self.path, self._length)

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "ab")  # noqa: SIM115 - closed in on_end


class MetricsWriter(JsonlWriter):
    """Every metrics row, one JSON object per line."""

    def __init__(self, path: str | Path, *, name: str = "metrics") -> None:
        super().__init__(path, name=name)

    def on_step(self, run: Run, row: Mapping[str, Any], detail: Any) -> None:
        self.append(row)


class TrajectoryWriter(JsonlWriter):
    """Sampled trajectories with their scores, one JSON object per line.

    Args:
        path: the file.
        every: steps between records.
        per_step: most trajectories recorded of a step (``None``: all), from the first group on.
        record: makes the object of one trajectory and its score, instead of the default.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        every: int = 1,
        per_step: int | None = None,
        record: Callable[[Trajectory, Any], Mapping[str, Any]] | None = None,
        name: str = "trajectories",
    ) -> None:
        super().__init__(path, name=name)
        self._every = every
        self._per_step = per_step
        self._record = record or trajectory_record

    def on_step(self, run: Run, row: Mapping[str, Any], detail: Any) -> None:
        if run.step % self._every:
            return
        for trajectory, score in list(zip(detail.trajectories, detail.scores, strict=True))[: self._per_step]:
            self.append({"step": run.step, **self._record(trajectory, score)})


def trajectory_record(trajectory: Trajectory, score: Any) -> dict[str, Any]:
    """Plain record of a trajectory: task, turns, why it stopped, what it used, how it scored."""
    return {
        "task": trajectory.task.id,
        "prompt": [dict(m) for m in trajectory.task.prompt],
        "turns": [{"speaker": t.speaker, "text": t.text, "tokens": len(t)} for t in trajectory.turns],
        "stop": trajectory.stop.value,
        "usage": {
            "calls": trajectory.usage.calls,
            "input_tokens": trajectory.usage.input_tokens,
            "output_tokens": trajectory.usage.output_tokens,
            "usd": trajectory.usage.usd,
        },
        "reward": score.value,
        "parts": dict(score.parts),
        "valid": score.valid,
        **({} if score.reason is None else {"reason": score.reason}),
    }


class Evaluate(Callback):
    """Measures something every few steps and after the last one.

    Args:
        measure: called with the run; returns numbers.
        every: steps between measurements (the last step is always measured).
        prefix: goes before each key.
    """

    def __init__(
        self,
        measure: Callable[[Run], Mapping[str, float]],
        *,
        every: int,
        prefix: str = "eval/",
        name: str = "evaluate",
    ) -> None:
        if every < 1:
            raise ConfigError(f"every must be at least 1, got {every}")
        self.name = name
        self._measure = measure
        self._every = every
        self._prefix = prefix

    def measure(self, run: Run, row: Mapping[str, Any], detail: Any) -> Mapping[str, Any] | None:
        if run.step % self._every and run.step != run.total:
            return None
        return {f"{self._prefix}{key}": value for key, value in self._measure(run).items()}


class EarlyStop(Callback):
    """Ends a run at a target, or when a metric has stopped improving."""

    name = "early_stop"

    def __init__(self, config: EarlyStopConfig) -> None:
        self._config = config
        self._best: float | None = None
        self._stale = 0
        self._seen = False
        self._known: set[str] = set()

    def on_step(self, run: Run, row: Mapping[str, Any], detail: Any) -> None:
        value = row.get(self._config.metric)
        if value is None:
            self._known |= row.keys()
            return
        self._seen = True
        sign = 1.0 if self._config.mode == "max" else -1.0
        if self._config.target is not None and sign * value >= sign * self._config.target:
            run.stop()
        if self._best is None or sign * value > sign * self._best:
            self._best, self._stale = float(value), 0
        else:
            self._stale += 1
            if self._config.patience is not None and self._stale >= self._config.patience:
                run.stop()

    def on_end(self, run: Run) -> None:
        if self._known and not self._seen:
            metric = self._config.metric
            run.warn(f"early_stop watched {metric!r}, which no metrics row had{nearest(metric, self._known)}")

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "stale": self._stale}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._best, self._stale = state.get("best"), state.get("stale", 0)


def _jsonable(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(v) for v in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if hasattr(value, "item"):
        return _jsonable(value.item())
    return str(value)
