"""Checkpoints that are either whole or not there.

A checkpoint is a folder ``step-00000012`` with a ``manifest.json`` that lists size and SHA-256 of every other
file. It is written under a temporary name in the same folder, flushed to disk, and renamed: a process killed
at any moment leaves either the old state or the new one. Readers verify the manifest before they believe it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guerdon.errors import CheckpointError

__all__ = ["Checkpoint", "Checkpoints", "load_state", "save_state"]

FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk.

    Args:
        path: its folder.
        step: how many steps of the run it contains.
        meta: what its writer recorded beside the files (configuration, kind of run).
    """

    path: Path
    step: int
    meta: Mapping[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Verify every file of a checkpoint against its manifest.

        Raises:
            CheckpointError: the folder is absent, has no readable manifest, or a file is missing, has
                another size, or has another content than was written.
        """
        path = Path(path)
        if not path.is_dir():
            raise CheckpointError(f"{path}: no such checkpoint folder; give a folder named step-NNNNNNNN")
        try:
            manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
            step, files = int(manifest["step"]), dict(manifest["files"])
            version = manifest["format"]
        except FileNotFoundError:
            raise CheckpointError(
                f"{path}: has no manifest.json, so it was not written to the end; {_ADVICE}"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: manifest.json is corrupt ({error}); {_ADVICE}") from None
        if version != FORMAT:
            raise CheckpointError(f"{path}: has format {version!r}, this version reads {FORMAT}")
        for name, entry in files.items():
            file = path / name
            try:
                size = file.stat().st_size
                if size != entry["bytes"]:
                    raise CheckpointError(f"{path}: {name} has {size} bytes, {entry['bytes']} expected; {_ADVICE}")
                if _sha256(file) != entry["sha256"]:
                    raise CheckpointError(f"{path}: {name} is corrupt (SHA-256 differs); {_ADVICE}")
            except FileNotFoundError:
                raise CheckpointError(f"{path}: {name} is missing; {_ADVICE}") from None
        return cls(path, step, manifest.get("meta", {}))


_ADVICE = "use an older checkpoint, or remove this one"


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where they live; made when the first one is saved.
        keep_last: how many stay on disk.
        report: called with one line for each checkpoint that had to be passed over (default: a warning).
    """

    def __init__(
        self, folder: str | Path, *, keep_last: int = 2, report: Callable[[str], object] = warnings.warn
    ) -> None:
        self.folder = Path(folder)
        self.keep_last = keep_last
        self._report = report

    def paths(self) -> list[Path]:
        """Folders named like checkpoints, oldest first, verified or not."""
        if not self.folder.is_dir():
            return []
        found = [(int(m[1]), p) for p in self.folder.iterdir() if (m := _NAME.fullmatch(p.name))]
        return [path for _, path in sorted(found)]

    def latest(self) -> Checkpoint | None:
        """Newest checkpoint that verifies, or ``None``; those passed over are reported."""
        for path in reversed(self.paths()):
            try:
                return Checkpoint.open(path)
            except CheckpointError as error:
                self._report(f"checkpoint passed over: {error}")
        return None

    def save(self, step: int, write: Callable[[Path], None], *, meta: Mapping[str, Any] | None = None) -> Checkpoint:
        """Write a checkpoint of ``step`` steps.

        Args:
            step: steps of the run that it contains.
            write: puts its files (sub-folders allowed) into the folder it is given.
            meta: JSON values recorded in the manifest.

        Raises:
            CheckpointError: it could not be written (for example a full disk); nothing of it is left
                and earlier checkpoints are as they were.
        """
        final = self.folder / f"step-{step:08d}"
        partial = self.folder / f".partial-{final.name}-{os.getpid()}"
        meta = dict(meta or {})
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            write(partial)
            _seal(partial, {"format": FORMAT, "step": step, "meta": meta})
            if final.exists():
                # Only a checkpoint that did not verify, or an equal one, can be in the way.
                _remove(final)
            os.rename(partial, final)
            _fsync(self.folder)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            # torch reports a failed write as a RuntimeError.
            if isinstance(error, CheckpointError) or not isinstance(error, OSError | RuntimeError):
                raise
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            why = "the disk is full; free space and start again" if full else str(error)
            raise CheckpointError(f"{final}: could not be written: {why}; earlier checkpoints are intact") from error
        self._prune()
        return Checkpoint(final, step, meta)

    def clean(self) -> None:
        """Remove what a killed writer left behind. Only the run that owns the folder may call this."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if path.name.startswith(".partial-"):
                    shutil.rmtree(path, ignore_errors=True)

    def _prune(self) -> None:
        for path in self.paths()[: -self.keep_last]:
            _remove(path)


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write nested dictionaries and lists of tensors, numbers, strings, booleans and ``None``.

    Raises:
        CheckpointError: something else is inside; the message says where.
    """
    import torch

    _check_plain(state, "state")
    with open(path, "wb") as file:
        torch.save(dict(state), file)


def load_state(path: Path) -> dict[str, Any]:
    """Read what :func:`save_state` wrote, onto the CPU; no code in the file can run."""
    import torch

    return torch.load(path, map_location="cpu", weights_only=True)


def _check_plain(value: Any, where: str) -> None:
    import torch

    # bool, int, float, str by exact type: a numpy scalar is a float by inheritance but is not readable again.
    if value is None or type(value) in (bool, int, float, str) or isinstance(value, torch.Tensor):
        return
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for k, item in enumerate(value):
            _check_plain(item, f"{where}[{k}]")
    else:
        raise CheckpointError(
            f"{where} holds a {type(value).__name__}; only tensors, numbers, strings, lists and dicts can be saved"
        )


def _seal(folder: Path, manifest: dict[str, Any]) -> None:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    manifest["files"] = {
        p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in files
    }
    target = folder / "manifest.json"
    target.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    for path in [*files, target, *(p for p in folder.rglob("*") if p.is_dir()), folder]:
        _fsync(path)


def _remove(path: Path) -> None:
    # The manifest goes first: a removal that is cut short leaves nothing that looks whole.
    (path / "manifest.json").unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
