"""Trackers: TensorBoard for real; wandb, trackio and mlflow against stand-ins that remember how they were called."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from guerdon.errors import ConfigError, MissingDependency
from guerdon.training import OnlineConfig
from guerdon.training.trackers import Mlflow, TensorBoard, Trackio, Wandb, tracker

ROW = {"step": 1, "reward/mean": 0.5, "stop": "done", "odd": float("nan"), "update/steps": 2}
WANTED = {"reward/mean": 0.5, "update/steps": 2.0}


def fake_run(out=None, step=0) -> SimpleNamespace:
    return SimpleNamespace(out=out, step=step, config=OnlineConfig(), total=3)


def test_tensorboard_writes_numbers_and_hides_steps_that_are_done_again(tmp_path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for begin, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        board = TensorBoard()
        board.on_start(fake_run(tmp_path, begin))
        for step in steps:
            board.on_step(fake_run(tmp_path, step), {**ROW, "reward/mean": begin + step}, None)
        board.on_checkpoint(fake_run())
        board.on_end(fake_run())
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(WANTED)
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(1, 1.0), (2, 2.0), (3, 5.0), (4, 6.0)]
    with pytest.raises(ConfigError, match="needs a folder"):
        TensorBoard().on_start(fake_run())


def module(monkeypatch, name: str, **functions) -> list:
    """Put a stand-in in place of a package; returns the list of calls to it."""
    calls: list = []

    def recorded(key, value):
        def call(*args, **kwargs):
            calls.append((key, args, kwargs))
            return value

        return call

    fake = ModuleType(name)
    for key, value in functions.items():
        setattr(fake, key, recorded(key, value))
    monkeypatch.setitem(sys.modules, name, fake)
    return calls


@pytest.mark.parametrize(("kind", "name", "resumed"), [(Wandb, "wandb", "id"), (Trackio, "trackio", "name")])
def test_services_log_rows_and_resume_their_own_run(monkeypatch, kind, name: str, resumed: str) -> None:
    logged: list = []
    handle = SimpleNamespace(
        id="r1", name="r1", log=lambda row, step: logged.append((row, step)), finish=lambda: logged.append("end")
    )
    calls = module(monkeypatch, name, init=handle)
    first = kind(project="p", tags=["a"])
    first.on_start(fake_run())
    first.on_step(fake_run(step=1), ROW, None)
    first.on_end(fake_run())
    assert logged == [(WANTED, 1), "end"] and first.state_dict() == {"id": "r1"}
    assert calls[0][2]["project"] == "p" and calls[0][2]["tags"] == ["a"] and resumed not in calls[0][2]
    assert calls[0][2]["config"]["group_size"] == 8
    second = kind(project="p")
    second.load_state_dict(first.state_dict())
    second.on_start(fake_run(step=1))
    assert calls[1][2][resumed] == "r1" and calls[1][2]["resume"] == "allow"


def test_mlflow_logs_rows_and_resumes_its_run(monkeypatch) -> None:
    handle = SimpleNamespace(info=SimpleNamespace(run_id="m1"))
    calls = module(
        monkeypatch, "mlflow", set_experiment=None, start_run=handle, log_params=None, log_metrics=None, end_run=None
    )
    first = Mlflow()
    first.on_start(fake_run())
    first.on_step(fake_run(step=1), ROW, None)
    first.on_end(fake_run())
    assert [c[0] for c in calls] == ["set_experiment", "start_run", "log_params", "log_metrics", "end_run"]
    assert calls[3][1] == (WANTED,) and calls[3][2] == {"step": 1}
    second = Mlflow()
    second.load_state_dict(first.state_dict())
    second.on_start(fake_run(step=1))
    assert calls[6] == ("start_run", (), {"run_id": "m1"}) and calls[-1][0] == "start_run"


def test_what_is_not_installed_is_named(monkeypatch) -> None:
    for name in ("wandb", "trackio", "mlflow", "tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(MissingDependency, match=f"{name} is not installed; pip install {name}"):
            tracker(name)
    with pytest.raises(ConfigError, match="unknown tracker 'wandd'; did you mean wandb"):
        tracker("wandd")
