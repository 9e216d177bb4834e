"""Metrics for dashboards: TensorBoard, and wandb, trackio and mlflow where they are installed.

Each takes the rows that every run makes anyway, continues its own record when the run is resumed, and does nothing else.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guerdon.errors import ConfigError, MissingDependency, nearest
from guerdon.training.callbacks import Callback

if TYPE_CHECKING:
    from guerdon.training.loop import Run

__all__ = ["Mlflow", "TensorBoard", "Trackio", "Wandb", "tracker"]


class TensorBoard(Callback):
    """Event files for TensorBoard.

    Args:
        folder: default: ``tensorboard`` in the run folder.

    Raises:
        MissingDependency: the package tensorboard is not installed.
        ConfigError: neither a folder nor a run folder.
    """

    name = "tensorboard"

    def __init__(self, folder: str | Path | None = None) -> None:
        _need("tensorboard")
        self._folder = folder
        self._writer: Any = None

    def on_start(self, run: Run) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = self._folder or (None if run.out is None else run.out / "tensorboard")
        if folder is None:
            raise ConfigError("TensorBoard needs a folder: give folder=, or the run a run folder (out=)")
        # Steps after the checkpoint are done again; what was written of them is hidden.
        self._writer = SummaryWriter(str(folder), purge_step=run.step + 1 if run.step else None)

    def on_step(self, run: Run, row: Mapping[str, Any], detail: Any) -> None:
        for key, value in _numbers(row).items():
            self._writer.add_scalar(key, value, run.step)

    def on_checkpoint(self, run: Run) -> None:
        self._writer.flush()

    def on_end(self, run: Run) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class _Service(Callback):
    """A tracker with a run of its own, whose name is kept in checkpoints."""

    package = ""

    def __init__(self, project: str = "guerdon", **options: Any) -> None:
        self._module = _need(self.package)
        self.name = self.package
        self.project, self.options = project, options
        self._id: str | None = None
        self._run: Any = None

    def state_dict(self) -> dict[str, Any]:
        return {"id": self._id}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._id = state.get("id")


class Wandb(_Service):
    """Weights & Biases. ``options`` go to ``wandb.init``."""

    package = "wandb"

    def on_start(self, run: Run) -> None:
        more = {} if self._id is None else {"id": self._id, "resume": "allow"}
        config = run.config.flat()
        self._run = self._module.init(**{"project": self.project, "config": config, **more, **self.options})
        self._id = str(self._run.id)

    def on_step(self, run: Run, row: Mapping[str, Any], detail: Any) -> None:
        self._run.log(_numbers(row), step=run.step)

    def on_end(self, run: Run) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None


class Trackio(_Service):
    """Trackio. ``options`` go to ``trackio.init``."""

    package = "trackio"

    def on_start(self, run: Run) -> None:
        more = {} if self._id is None else {"name": self._id, "resume": "allow"}
        config = run.config.flat()
        self._run = self._module.init(**{"project": self.project, "config": config, **more, **self.options})
        self._id = str(self._run.name)

    def on_step(self, run: Run, row: Mapping[str, Any], detail: Any) -> None:
        self._run.log(_numbers(row), step=run.step)

    def on_end(self, run: Run) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None


class Mlflow(_Service):
    """MLflow. ``options`` go to ``mlflow.start_run``; the tracking server is what mlflow's own settings say."""

    package = "mlflow"

    def on_start(self, run: Run) -> None:
        self._module.set_experiment(self.project)
        more = {} if self._id is None else {"run_id": self._id}
        self._run = self._module.start_run(**{**more, **self.options})
        if self._id is None:
            # MLflow takes no parameter longer than this.
            self._module.log_params({key: str(value)[:500] for key, value in run.config.flat().items()})
        self._id = str(self._run.info.run_id)

    def on_step(self, run: Run, row: Mapping[str, Any], detail: Any) -> None:
        self._module.log_metrics(_numbers(row), step=run.step)

    def on_end(self, run: Run) -> None:
        if self._run is not None:
            self._module.end_run()
            self._run = None


_TRACKERS = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio, "mlflow": Mlflow}


def tracker(name: str, **options: Any) -> Callback:
    """A tracker by name.

    Raises:
        ConfigError: unknown name, or an option that it does not take.
        MissingDependency: its package is not installed.
    """
    if name not in _TRACKERS:
        raise ConfigError(f"unknown tracker {name!r}{nearest(name, _TRACKERS)}; known are {', '.join(_TRACKERS)}")
    try:
        return _TRACKERS[name](**options)
    except TypeError as error:
        raise ConfigError(f"tracker {name!r}: {error}") from None


def _need(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise MissingDependency(
            f"{package} is not installed; pip install {package}, or leave this tracker out"
        ) from None


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a row, without its step."""
    return {
        key: float(value)
        for key, value in row.items()
        if key != "step" and isinstance(value, int | float) and math.isfinite(value)
    }
