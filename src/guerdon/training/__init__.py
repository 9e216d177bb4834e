"""Training loops: supervised fine-tuning and online reinforcement learning, with checkpoints that resume exactly."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "Callback": "callbacks",
    "Checkpoint": "checkpoint",
    "Checkpoints": "checkpoint",
    "Config": "config",
    "Console": "callbacks",
    "DistributedConfig": "config",
    "EarlyStop": "callbacks",
    "EarlyStopConfig": "config",
    "Evaluate": "callbacks",
    "Example": "sft",
    "FilterConfig": "config",
    "HeldOut": "evaluate",
    "JobConfig": "job",
    "JsonlWriter": "callbacks",
    "MetricsWriter": "callbacks",
    "MinFormCredit": "rules.minform",
    "Mlflow": "trackers",
    "Online": "facade",
    "OnlineConfig": "config",
    "OnlineTrainer": "online",
    "OptimiserConfig": "config",
    "Overlong": "shapes",
    "PavCredit": "rules.progress_weight",
    "RunResult": "loop",
    "SftConfig": "config",
    "SftTrainer": "sft",
    "StepDetail": "online",
    "SumCredit": "rules.minform",
    "TensorBoard": "trackers",
    "Trackio": "trackers",
    "TrainingError": "optimise",
    "TrajectoryWriter": "callbacks",
    "Wandb": "trackers",
    "load_yaml": "config",
    "read_tasks": "data",
}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"guerdon.training.{_HOME[name]}"), name)
    raise AttributeError(f"module 'guerdon.training' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
