"""One process of a distributed run, as ``torchrun`` or ``accelerate launch`` starts it; see test_training_distributed.py.

torchrun --nproc_per_node 2 distributed_worker.py RUN.yaml OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch


def train(path: Path, out: Path, strategy: str, *, folder: Path | None = None, steps: int | None = None) -> Any:
    """Train the run of a YAML file; the first process writes its rows and its weights to ``out``."""
    from guerdon.policies import load_policy
    from guerdon.rollout import TransformersEngine
    from guerdon.training import OnlineTrainer
    from guerdon.training.job import JobConfig, make_environment, make_reward

    job = JobConfig.from_yaml(path, [f"distributed.strategy={strategy}"])
    tasks, _ = job.read()
    policy = load_policy(job.policy.base, seed=job.seed, value_head=job.algorithm == "ppo")
    trainer = OnlineTrainer(
        policy,
        TransformersEngine(policy),
        make_environment(job.environment),
        tasks,
        make_reward(job.reward),
        job.online(),
        critic="shared" if job.algorithm == "ppo" else None,
        out=folder,
    )
    result = trainer.fit(steps)
    if trainer.world.main:
        weights = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
        torch.save({"weights": weights, "size": trainer.world.size}, out.with_suffix(".pt"))
        out.with_suffix(".json").write_text(json.dumps(result.history), encoding="utf-8")
    trainer.world.wait()
    return trainer


def talk(out: Path) -> None:
    """What the processes of a group tell each other, errors included; each writes down what it got."""
    from guerdon.errors import RewardError
    from guerdon.training.config import DistributedConfig
    from guerdon.training.distributed import make_world

    world = make_world(DistributedConfig())
    gradients = [torch.nn.Parameter(torch.zeros(3)) for _ in range(3)]
    gradients[0].grad = torch.full((3,), float(world.rank + 1))
    if world.rank == 1:
        gradients[1].grad = torch.ones(3)
    world.add_gradients(gradients)

    def broken() -> None:
        raise RewardError("only the first process calls this")

    seen: dict[str, Any] = {
        "gradients": [None if p.grad is None else p.grad.tolist() for p in gradients],
        "each": world.each([1, 2, 3, 4, 5], lambda part: [10 * x for x in part]),
        "numbers": world.add_numbers({"both": 1.0, f"only {world.rank}": 2.0}),
        "joined": world.join(torch.arange(world.rank + 1)).tolist(),
    }
    for name, attempt in (("once", lambda: world.once(broken)), ("together", lambda: fail_in_one(world))):
        try:
            attempt()
        except Exception as error:  # noqa: BLE001 - the kind of error is what is written down
            seen[name] = f"{type(error).__name__}: {error}"
    (out / f"talk-{world.rank}.json").write_text(json.dumps(seen), encoding="utf-8")


def fail_in_one(world: Any) -> None:
    with world.together():
        if world.rank == 1:
            raise ValueError("out of luck")


def main() -> None:
    torch.set_num_threads(1)
    path, out = Path(sys.argv[1]), Path(sys.argv[2])
    talk(out)
    train(path, out / "replicate", "replicate")
    # Interrupted and resumed, where everything has to be gathered and divided again.
    train(path, out / "shard", "shard", folder=out / "run", steps=2)
    train(path, out / "shard", "shard", folder=out / "run")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
