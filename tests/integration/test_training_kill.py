"""A training process is killed at random moments, saving included, and started again until it is done."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from guerdon.training.checkpoint import Checkpoints

SCRIPT = """
import sys
from guerdon.policies import tiny_policy
from guerdon.rollout import TransformersEngine
from guerdon.training import OnlineConfig, OnlineTrainer, TrajectoryWriter
from guerdon.training.toys import Echo, SaidIt, toy_tasks, toy_texts

out, algorithm = sys.argv[1:3]
ppo = algorithm == "ppo"
config = OnlineConfig(
    algorithm=algorithm, steps=int(sys.argv[3]), save_every=1,
    prompts_per_step=2, group_size=4, max_tokens=2, max_turns=2,
    optimiser={"lr": 1e-3, "schedule": "cosine", "warmup": 2},
    **({"minibatch_size": 4, "kl_coef": 0.01, "kl_in": "reward"} if ppo else {}),
)
policy = tiny_policy(texts=toy_texts(), hidden=32, layers=2, heads=2, seed=0, value_head=ppo)
print("ready", flush=True)
OnlineTrainer(
    policy, TransformersEngine(policy), Echo(), toy_tasks(6), SaidIt(0.5), config, critic="shared" if ppo else None,
    callbacks=[TrajectoryWriter(out + "/trajectories.jsonl")], out=out,
).fit()
"""


def start(out: Path, algorithm: str, steps: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(out), algorithm, str(steps)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def final_state(out: Path) -> dict:
    found = Checkpoints(out / "checkpoints").latest()
    assert found is not None
    files = {
        p.relative_to(found.path).as_posix(): p.read_bytes() for p in (found.path / "policy").rglob("*.safetensors")
    }
    state = torch.load(found.path / "state.pt", weights_only=True)
    return {
        "step": found.step,
        "files": files,
        "optimiser": state["loop"]["optimiser"]["state"],
        "reward": state["loop"]["reward"],
    }


def rows(out: Path, name: str) -> list[dict]:
    lines = [json.loads(line) for line in (out / name).read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "tokens_per_s/"))} for row in lines]


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_killed_at_random_moments_a_run_ends_as_if_it_never_had_been(tmp_path: Path, algorithm: str) -> None:
    steps = 25
    whole = start(tmp_path / "whole", algorithm, steps)
    assert whole.stdout is not None
    whole.stdout.readline()
    began = time.monotonic()
    assert whole.wait() == 0, whole.stderr.read()  # type: ignore[union-attr]
    duration = time.monotonic() - began

    rng = random.Random(algorithm)
    log = tmp_path / "part" / "metrics.jsonl"
    kills = 0
    while True:
        part = start(tmp_path / "part", algorithm, steps)
        assert part.stdout is not None and part.stderr is not None
        part.stdout.readline()
        # some steps further, then anywhere within a step, whatever the speed of this machine
        target = (len(log.read_bytes().splitlines()) if log.exists() else 0) + rng.randrange(1, 6)
        while kills < 6 and part.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < target):
            time.sleep(0.001)
        try:
            part.wait(timeout=rng.random() * duration / steps if kills < 6 else None)
        except subprocess.TimeoutExpired:
            part.send_signal(signal.SIGKILL)
            part.wait()
            kills += 1
            continue
        assert part.returncode == 0, part.stderr.read()
        break
    assert kills >= 2, "the run was never interrupted"

    left, right = final_state(tmp_path / "part"), final_state(tmp_path / "whole")
    assert left["step"] == right["step"] == steps
    assert left["files"] == right["files"] and left["files"]
    assert left["reward"] == right["reward"]
    for key, moments in right["optimiser"].items():
        for name, value in moments.items():
            assert torch.equal(torch.as_tensor(left["optimiser"][key][name]), torch.as_tensor(value))
    assert rows(tmp_path / "part", "metrics.jsonl") == rows(tmp_path / "whole", "metrics.jsonl")
    assert rows(tmp_path / "part", "trajectories.jsonl") == rows(tmp_path / "whole", "trajectories.jsonl")
    assert not [p for p in (tmp_path / "part" / "checkpoints").iterdir() if p.name.startswith(".partial")]


@pytest.mark.integration
def test_ctrl_c_finishes_the_step_saves_and_says_so(tmp_path: Path) -> None:
    process = start(tmp_path / "run", "grpo", 100_000)
    assert process.stdout is not None
    process.stdout.readline()
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "checkpoints").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "interrupted: finishing this step, then saving" in errors
    found = Checkpoints(tmp_path / "run" / "checkpoints").latest()
    assert found is not None and found.step == len(rows(tmp_path / "run", "metrics.jsonl"))
