"""Checkpoints are whole or absent, and damage is noticed."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from guerdon.errors import CheckpointError
from guerdon.training.checkpoint import Checkpoint, Checkpoints, load_state, save_state


def writer(text: str):
    def write(folder: Path) -> None:
        (folder / "sub").mkdir()
        (folder / "sub" / "weights.bin").write_text(text)
        (folder / "state.txt").write_text(text * 2)

    return write


def test_a_saved_checkpoint_verifies_and_carries_its_meta(tmp_path) -> None:
    store = Checkpoints(tmp_path)
    assert store.latest() is None
    store.save(3, writer("abc"), meta={"who": "me"})
    found = store.latest()
    assert found is not None
    assert (found.step, found.meta, found.path.name) == (3, {"who": "me"}, "step-00000003")
    assert (found.path / "sub" / "weights.bin").read_text() == "abc"


def test_only_the_newest_stay(tmp_path) -> None:
    store = Checkpoints(tmp_path, keep_last=2)
    for step in (1, 2, 10, 9):
        store.save(step, writer(str(step)))
    assert [p.name for p in store.paths()] == ["step-00000009", "step-00000010"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "no manifest", "bad manifest"])
def test_damage_is_reported_and_the_previous_checkpoint_used(tmp_path, damage: str) -> None:
    lines: list[str] = []
    store = Checkpoints(tmp_path, report=lines.append)
    store.save(1, writer("one"))
    newest = store.save(2, writer("two")).path
    file = newest / "sub" / "weights.bin"
    match damage:
        case "flip":
            file.write_text("twO")
        case "truncate":
            file.write_text("tw")
        case "remove":
            file.unlink()
        case "no manifest":
            (newest / "manifest.json").unlink()
        case "bad manifest":
            text = (newest / "manifest.json").read_text()
            (newest / "manifest.json").write_text(text[: len(text) // 2])
    found = store.latest()
    assert found is not None and found.step == 1
    assert len(lines) == 1 and "step-00000002" in lines[0]
    with pytest.raises(CheckpointError, match="step-00000002"):
        Checkpoint.open(newest)


def test_a_missing_folder_is_an_error(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        Checkpoint.open(tmp_path / "step-00000001")


def test_full_disk_leaves_the_older_checkpoint_and_no_debris(tmp_path, monkeypatch) -> None:
    store = Checkpoints(tmp_path)
    store.save(1, writer("one"))

    def full(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CheckpointError, match=r"step-00000002: could not be written: the disk is full"):
        store.save(2, full)
    # The same when the disk fills while the manifest is flushed.
    real = os.fsync
    calls = {"n": 0}

    def fsync(handle: int) -> None:
        calls["n"] += 1
        if calls["n"] > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(CheckpointError, match="the disk is full"):
        store.save(2, writer("two"))
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert store.latest().step == 1  # type: ignore[union-attr]


def test_an_error_of_the_writer_passes_through_and_cleans_up(tmp_path) -> None:
    def broken(folder: Path) -> None:
        (folder / "x").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Checkpoints(tmp_path).save(1, broken)
    assert list(tmp_path.iterdir()) == []


def test_clean_removes_what_a_killed_writer_left(tmp_path) -> None:
    store = Checkpoints(tmp_path)
    store.save(1, writer("one"))
    (tmp_path / ".partial-step-00000002-123").mkdir()
    (tmp_path / ".partial-step-00000002-123" / "manifest.json").write_text("{}")
    assert store.latest().step == 1  # type: ignore[union-attr]
    store.clean()
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.integration
def test_killed_at_every_point_of_a_save_there_is_a_whole_checkpoint(tmp_path) -> None:
    """A child kills itself at the n-th flush or rename of a save, for every n."""
    script = """
import os, signal, sys
from pathlib import Path
from guerdon.training.checkpoint import Checkpoints
store = Checkpoints(sys.argv[1], keep_last=1)
def write(text):
    def inner(folder):
        (folder / "sub").mkdir()
        (folder / "sub" / "weights.bin").write_text(text)
    return inner
last = int(sys.argv[2])
store.save(1, write("one"))
count = 0
def deadly(name):
    real = getattr(os, name)
    def call(*args, **kwargs):
        global count
        count += 1
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(os, name, call)
for name in ("fsync", "rename", "rmdir", "unlink", "mkdir"):
    deadly(name)
store.save(2, write("two"))
print(count)
"""
    steps = set()
    for n in range(1, 100):
        folder = tmp_path / str(n)
        child = subprocess.run([sys.executable, "-c", script, str(folder), str(n)], capture_output=True, text=True)
        store = Checkpoints(folder, report=lambda line: None)
        found = store.latest()
        assert found is not None
        assert (found.path / "sub" / "weights.bin").read_text() == {1: "one", 2: "two"}[found.step]
        steps.add(found.step)
        store.save(3, writer("three"))
        if child.returncode == 0:
            break
        assert child.returncode == -signal.SIGKILL, child.stderr
    assert n > 8 and steps == {1, 2}


def test_an_unverified_checkpoint_of_the_same_step_is_replaced(tmp_path) -> None:
    store = Checkpoints(tmp_path, report=lambda line: None)
    path = store.save(2, writer("two")).path
    (path / "state.txt").write_text("?")
    store.save(2, writer("new"))
    assert (Checkpoint.open(path).path / "sub" / "weights.bin").read_text() == "new"


def test_manifest_lists_every_file(tmp_path) -> None:
    path = Checkpoints(tmp_path).save(1, writer("one")).path
    manifest = json.loads((path / "manifest.json").read_text())
    assert sorted(manifest["files"]) == ["state.txt", "sub/weights.bin"]
    assert manifest["files"]["sub/weights.bin"]["bytes"] == 3


def test_states_round_trip_bit_for_bit(tmp_path) -> None:
    rng = np.random.default_rng(3)
    state = {
        "t": torch.randn(5, dtype=torch.float64),
        "rng": rng.bit_generator.state,
        "nested": [1, 2.5, None, True, {"x": ("a", "b")}],
        7: "int key",
    }
    save_state(tmp_path / "s.pt", state)
    back = load_state(tmp_path / "s.pt")
    assert torch.equal(back["t"], state["t"])
    assert back["rng"] == state["rng"]
    assert back["nested"] == state["nested"] and back[7] == "int key"


@pytest.mark.parametrize("value", [np.float64(1.0), object(), {1, 2}, np.zeros(2)])
def test_a_state_that_could_not_be_read_again_is_refused_when_written(tmp_path, value: object) -> None:
    with pytest.raises(CheckpointError, match=r"state\['reward'\]\[0\] holds a "):
        save_state(tmp_path / "s.pt", {"reward": [value]})
