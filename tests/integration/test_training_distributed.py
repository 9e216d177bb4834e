"""Two gloo processes, started for real, learn what one process learns from the same file."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

WORKER = Path(__file__).with_name("distributed_worker.py")
RUN = """
policy: tiny
tasks: tasks.jsonl
reward: {name: linear_length, max_len: 10}
steps: 3
prompts_per_step: 3
group_size: 4
max_tokens: 10
stop: [e, a, o]
kl_coef: 0.1
entropy_coef: 0.01
minibatch_size: 8
# Near-zero gradients would be steps of full length in either direction.
optimiser: {lr: 0.003, eps: 0.0001}
"""


def worker_module() -> Any:
    spec = importlib.util.spec_from_file_location("distributed_worker", WORKER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with what one process and two processes made of the same file."""
    folder = tmp_path_factory.mktemp("distributed")
    words = ("red", "green", "blue", "black", "white")
    tasks = [{"id": f"t{k}", "prompt": f"say {w} and more" * (1 + k % 2), "reference": w} for k, w in enumerate(words)]
    (folder / "tasks.jsonl").write_text("\n".join(map(json.dumps, tasks)), encoding="utf-8")
    (folder / "run.yaml").write_text(RUN, encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    process = subprocess.Popen(
        [*launch, str(WORKER), str(folder / "run.yaml"), str(folder)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        worker_module().train(folder / "run.yaml", folder / "one", "replicate").close()
        printed, _ = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 0, printed[-3000:]
    return folder


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["replicate", "shard"])
def test_two_processes_learn_what_one_learns(outputs: Path, strategy: str) -> None:
    one, two = (torch.load(outputs / f"{name}.pt") for name in ("one", strategy))
    assert (one["size"], two["size"]) == (1, 2)
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=0, atol=1e-5, msg=name)
    rows = {row["step"]: row for row in json.loads((outputs / "one.json").read_text())}
    history = json.loads((outputs / f"{strategy}.json").read_text())
    assert history[-1]["step"] == 3
    for row in history:
        for key in ("loss", "kl", "grad_norm/policy", "reward/mean", "update/tokens", "update/steps", "clip_fraction"):
            assert row[key] == pytest.approx(rows[row["step"]][key], rel=1e-4, abs=1e-6), key


@pytest.mark.integration
@pytest.mark.slow
def test_processes_share_results_and_errors(outputs: Path) -> None:
    first, second = (json.loads((outputs / f"talk-{rank}.json").read_text()) for rank in range(2))
    for seen in (first, second):
        assert seen["gradients"] == [[3.0] * 3, [1.0] * 3, None]  # one that nobody has stays away
        assert seen["each"] == [10, 20, 30, 40, 50]
        assert seen["numbers"] == {"both": 2.0, "only 0": 2.0, "only 1": 2.0}
        assert seen["joined"] == [0, 0, 1]
        assert seen["once"] == "RewardError: only the first process calls this"
    assert first["together"] == "TrainingError: process 1 of 2 failed: out of luck"
    assert second["together"] == "ValueError: out of luck"
