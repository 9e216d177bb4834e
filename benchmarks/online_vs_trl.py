"""One step of group-relative RL: Guerdon's trainer beside TRL's GRPO, the same work on both sides.

    python -m venv trl && trl/bin/pip install torch==2.13.0 && trl/bin/pip install trl datasets
    python benchmarks/online_vs_trl.py --trl-python trl/bin/python --out benchmarks/results/online_vs_trl.json

Same model (``smollm2``, float32, CPU), same prompt tokens, groups of 8, completions forced to the same lengths, the
same rule as reward, AdamW at the same rate, clipping at 1, the token-normalised clipped loss of DAPO (TRL's default).
TRL runs in its own interpreter and is used as its users use it, once without gradient checkpointing (its faster way,
which the targets are held against) and once with it (its default, which is slower and takes less memory).

Each side runs in a process of its own that keeps its trainer; the parent lets them take turns, so that a slow spell of
the machine hits both. Reported: seconds of the best step and the median, steps per hour, where they go, the share of
decode slots that did nothing, peak resident memory of each process, and the ratios. Before that, losses and gradients
of both on the same given tokens, log-probabilities and advantages are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

GROUP = 8
LR = 1e-6
TARGETS = {"prompt 128": 2.0, "prompt 512": 4.0, "8 x 8, GSM8K lengths": 3.0}
MEMORY_TARGET = 0.5

# Tokens (of smollm2) of 64 solutions at evenly spaced quantiles of 5,276 recorded ones to GSM8K's test problems, in an
# order drawn once, and of 8 of its questions.
SOLUTIONS = (
    88, 126, 108, 73, 145, 101, 174, 64, 207, 163, 78, 57, 140, 122, 94, 154, 80, 197, 128, 96, 92, 242, 61, 53,
    114, 102, 90, 150, 97, 124, 110, 142, 48, 69, 99, 106, 167, 157, 269, 118, 104, 186, 76, 130, 215, 170,
    135, 83, 82, 71, 148, 132, 328, 66, 160, 85, 179, 112, 137, 227, 192, 120, 87, 116,
)  # fmt: skip
QUESTIONS = (35, 38, 66, 58, 66, 96, 51, 76)


def cases() -> dict[str, dict[str, Any]]:
    """Prompt lengths [P], completion lengths [P * 8] in order, and most tokens of one of our micro-batches."""
    return {
        "prompt 128": {"prompts": [128], "lengths": [64] * 8, "microbatch": 8192},
        "prompt 512": {"prompts": [512], "lengths": [64] * 8, "microbatch": 8192},
        "8 x 8, GSM8K lengths": {"prompts": list(QUESTIONS), "lengths": list(SOLUTIONS), "microbatch": 1536},
    }


def prompt_texts(tokenizer: Any, lengths: Sequence[int]) -> list[tuple[str, list[int]]]:
    """Texts of exactly so many tokens, each another one."""
    words = "A farmer has nine hens and sells the eggs of a week at two coins each on the market of the town ."
    filler = tokenizer(" ".join([words] * 40), add_special_tokens=False)["input_ids"]
    made = []
    for k, n in enumerate(lengths):
        text = tokenizer.decode(filler[3 * k : 3 * k + n])
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(ids) == n, (len(ids), n)
        made.append((text, ids))
    return made


def peak_mb() -> float:
    """Peak resident memory of this process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class ForcedLengths:
    """An engine whose streams, in the order of their start, sample exactly the given numbers of tokens."""

    def __init__(self, engine: Any, lengths: Sequence[int]) -> None:
        self._engine, self._lengths, self._started = engine, list(lengths), 0
        engine._batch._eos[:] = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def start(self, *args: Any, **kwargs: Any) -> Any:
        stream = self._engine.start(*args, **kwargs)
        length = self._lengths[self._started % len(self._lengths)]
        self._started += 1
        generate = stream.generate

        class Forced:
            """The stream with another limit."""

            def __getattr__(self, name: str) -> Any:
                return getattr(stream, name)

            async def generate(self, sampling: Any) -> Any:
                return await generate(replace(sampling, max_tokens=length))

        return Forced()


def our_side(job: dict[str, Any]) -> None:
    """Guerdon's trainer, told what to do by lines on stdin."""
    import torch

    from guerdon.policies import Policy
    from guerdon.rollout import TransformersEngine
    from guerdon.training import OnlineConfig, OnlineTrainer
    from guerdon.training.toys import Say
    from guerdon.types import Task, Trajectory

    torch.set_num_threads(job["threads"])
    policy = Policy.load(job["model"], device="cpu")
    tasks = [Task(f"task-{k}", text) for k, text in enumerate(job["prompts"])]
    ids_of = dict(zip(job["prompts"], job["prompt_ids"], strict=True))

    def reward(trajectories: Sequence[Trajectory]) -> list[float]:
        return [sum(i for turn in t.turns for i in turn.token_ids) % 97 / 97 for t in trajectories]

    config = OnlineConfig(
        steps=10_000, prompts_per_step=len(tasks), group_size=GROUP, max_tokens=max(job["lengths"]),
        max_tokens_per_microbatch=job["microbatch"], optimiser={"lr": LR, "grad_clip": 1.0},
    )  # fmt: skip
    engine = ForcedLengths(TransformersEngine(policy, max_slots=len(job["lengths"])), job["lengths"])
    trainer = OnlineTrainer(
        policy, engine, Say(), tasks, reward, config,
        rollout_options={"render": lambda messages: ids_of[messages[-1]["content"]]},
    )  # fmt: skip
    if job["check"]:
        say(our_check(policy, Path(job["check"])))
        return
    say({"ready": True, "loaded_mb": peak_mb()})
    while sys.stdin.readline().strip() == "step":
        began = time.perf_counter()
        row, detail = trainer.train_step()
        trainer.step += 1
        seconds = time.perf_counter() - began
        assert sorted(len(t) for t in detail.trajectories) == sorted(job["lengths"])
        phases = {name[5:]: value for name, value in row.items() if name.startswith("time/") and name != "time/step"}
        stats = engine.stats
        idle = 1 - stats.decode_tokens / max(1, stats.decode_steps * stats.largest_batch)
        say(
            {"seconds": seconds, "phases": phases, "peak_mb": peak_mb(), "idle": idle, "row_steps": stats.decode_tokens}
        )
    trainer.close()


def our_check(policy: Any, path: Path) -> dict[str, Any]:
    """Our loss and gradients on given tokens, log-probabilities and advantages."""
    import numpy as np
    import torch

    from guerdon.training import OnlineConfig
    from guerdon.training.learner import Learner
    from guerdon.training.streams import Streams, collect
    from guerdon.training.timing import Phases
    from guerdon.types import Group, Score, StopReason, Task, Trajectory, Turn

    given = torch.load(path, weights_only=True)
    config = OnlineConfig(optimiser={"lr": 1e-30, "grad_clip": None}, group_size=len(given["completions"]))
    parts = given["old"].split([len(c) for c in given["completions"]])
    trajectories = [
        Trajectory(
            Task(f"t{k}", "given"), (Turn("policy", "given", tuple(ids), tuple(old.tolist())),), StopReason.EOS,
            prompt_ids=tuple(prompt),
        )
        for k, (prompt, ids, old) in enumerate(zip(given["prompts"], given["completions"], parts, strict=True))
    ]  # fmt: skip
    experience = collect([Group(trajectories[0].task, tuple(trajectories))], [Score(0.0) for _ in trajectories])
    advantage = given["advantages"][torch.from_numpy(experience.trajectory)]
    ones = torch.ones_like(advantage)
    streams = Streams(advantage, ones, ones, ones, None, None, np.zeros(len(trajectories), dtype=bool))
    learner = Learner(policy, config)
    gradients: dict[str, Any] = {}

    def look(scale: float, *, where: str) -> dict[str, float]:
        """In place of the optimiser's step."""
        gradients.update({name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None})
        return {}

    learner.optimiser.step = look  # type: ignore[method-assign]
    phases = Phases()
    row = learner.update(experience, streams, learner.prepare(experience, phases), step=0, total=1, phases=phases)
    torch.save({name: gradients[name] for name in given["wanted"]}, path.with_suffix(".guerdon"))
    return {"loss": row["loss"], "norms": {name: float(gradient.norm()) for name, gradient in gradients.items()}}


def say(row: dict[str, Any]) -> None:
    """One JSON line to the parent."""
    print(json.dumps(row), flush=True)


class Side:
    """One process that keeps a trainer and does a step whenever it is told to."""

    def __init__(self, name: str, command: list[str], job: dict[str, Any]) -> None:
        self.name = name
        self.scratch = tempfile.mkdtemp()
        threads = str(job["threads"])
        self.errors = open(Path(self.scratch) / "stderr", "w+", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"},
        )  # fmt: skip
        self.tell(json.dumps({**job, "scratch": self.scratch}))

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """The next JSON line; whatever else a library prints is passed over."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                try:
                    return json.loads(line)
                except ValueError:
                    continue
        self.process.wait()
        self.errors.seek(0)
        raise SystemExit(f"{self.name} ended with code {self.process.returncode}:\n{self.errors.read()[-3000:]}")

    def step(self) -> dict[str, Any]:
        self.tell("step")
        return self.answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.errors.close()
        shutil.rmtree(self.scratch, ignore_errors=True)


def start(name: str, args: argparse.Namespace, job: dict[str, Any]) -> Side:
    if name == "guerdon":
        return Side(name, [sys.executable, __file__, "--side"], job)
    peer = str(Path(__file__).parent / "peers" / "trl_grpo.py")
    return Side(name, [args.trl_python, peer], {**job, "checkpointing": name == "trl, checkpointing"})


def job_of(case: dict[str, Any], args: argparse.Namespace, folder: Path, tokenizer: Any) -> dict[str, Any]:
    made = prompt_texts(tokenizer, case["prompts"])
    return {
        "model": str(folder), "prompts": [text for text, _ in made], "prompt_ids": [ids for _, ids in made],
        "lengths": case["lengths"], "microbatch": case["microbatch"], "group": GROUP, "lr": LR, "check": "",
        "threads": args.threads, "steps": 10_000, "checkpointing": False,
    }  # fmt: skip


def compare(args: argparse.Namespace, folder: Path, tokenizer: Any) -> dict[str, float]:
    """Largest relative differences of loss, gradient norms and some whole gradients between the two."""
    import torch

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "given.pt"
        generator = torch.Generator().manual_seed(0)
        completions = [
            torch.randint(100, 40_000, (n,), generator=generator).tolist() for n in (5, 9, 12, 3, 7, 9, 1, 4)
        ]
        prompt = prompt_texts(tokenizer, [24])[0][1]
        wanted = [
            "model.norm.weight", "model.layers.0.self_attn.q_proj.weight", "model.layers.14.mlp.down_proj.weight",
            "model.layers.29.mlp.gate_proj.weight", "model.layers.29.self_attn.k_proj.weight",
        ]  # fmt: skip
        # Near what such tokens have under the model, so that some ratios are clipped and others are not.
        old = -14 + 2 * torch.randn(sum(map(len, completions)), generator=generator)
        torch.save(
            {
                "prompts": [prompt] * 8, "completions": completions, "old": old, "wanted": wanted,
                "advantages": torch.randn(8, generator=generator),
            },
            path,
        )  # fmt: skip
        job = {**job_of(cases()["prompt 128"], args, folder, tokenizer), "check": str(path)}
        answers = {}
        for name in ("guerdon", "trl"):
            side = start(name, args, job)
            answers[name] = side.answer()
            side.close()
        ours, theirs = (torch.load(path.with_suffix(suffix), weights_only=True) for suffix in (".guerdon", ".trl"))
    norms, their_norms = answers["guerdon"]["norms"], answers["trl"]["norms"]
    assert norms.keys() == their_norms.keys()
    largest = max(their_norms.values())
    return {
        "loss": answers["guerdon"]["loss"],
        "loss_relative_difference": abs(answers["guerdon"]["loss"] / answers["trl"]["loss"] - 1),
        "gradient_norms_largest_difference": max(abs(norms[n] - their_norms[n]) for n in norms) / largest,
        "gradients_largest_relative_difference": max(
            float((ours[n] - theirs[n]).norm() / theirs[n].norm()) for n in wanted
        ),
    }


def summary(rows: list[dict[str, Any]], lengths: Sequence[int]) -> dict[str, Any]:
    best = min(rows, key=lambda row: row["seconds"])
    phases = {name: round(seconds, 2) for name, seconds in best["phases"].items() if seconds >= 0.005}
    phases["other"] = round(best["seconds"] - sum(v for k, v in best["phases"].items() if k != "other"), 2)
    return {
        "seconds": round(best["seconds"], 2),
        "seconds_median": round(statistics.median(row["seconds"] for row in rows), 2),
        "steps_per_hour": round(3600 / best["seconds"], 1),
        "phases_s": phases,
        # A static batch keeps a row's slot until the longest row ends.
        "idle_slots": round(best.get("idle", 1 - sum(lengths) / (len(lengths) * max(lengths))), 3),
        "peak_mb": round(max(row["peak_mb"] for row in rows)),
    }


def run_case(name: str, case: dict[str, Any], args: argparse.Namespace, folder: Path, tokenizer: Any) -> dict[str, Any]:
    job = job_of(case, args, folder, tokenizer)
    rounds = args.rounds if name != "8 x 8, GSM8K lengths" else max(1, args.rounds // 2)
    table: dict[str, Any] = {}
    # The default setting of TRL is timed against nothing else, so it runs apart and once.
    for together, times in ((("guerdon", "trl"), rounds), (("trl, checkpointing",), 1)):
        if together == ("trl, checkpointing",) and (args.no_default or name == "8 x 8, GSM8K lengths"):
            continue
        sides = {key: start(key, args, job) for key in together}
        rows: dict[str, list[dict[str, Any]]] = {key: [] for key in together}
        for side in sides.values():
            side.answer()
        for k in range(times):
            for key, side in sides.items():
                rows[key].append(side.step())
                print(
                    f"{name:22} round {k + 1}  {key:18} {rows[key][-1]['seconds']:7.1f} s", file=sys.stderr, flush=True
                )
        for key, side in sides.items():
            side.close()
            table[key] = summary(rows[key], case["lengths"])
    ours, theirs = table["guerdon"], table["trl"]
    ratios = {
        "speed": round(theirs["seconds"] / ours["seconds"], 2),
        "speed_of_medians": round(theirs["seconds_median"] / ours["seconds_median"], 2),
        "memory": round(ours["peak_mb"] / theirs["peak_mb"], 2),
    }
    default = table.get("trl, checkpointing")
    if default:
        ratios["speed_against_default"] = round(default["seconds"] / ours["seconds"], 2)
        ratios["memory_against_default"] = round(ours["peak_mb"] / default["peak_mb"], 2)
    reached = {"speed": ratios["speed"] >= TARGETS[name], "memory": ratios["memory"] <= MEMORY_TARGET}
    return {"sides": table, "ratios": ratios, "target_speed": TARGETS[name], "reached": reached}


def check_peer(python: str) -> dict[str, str]:
    """Versions on TRL's side; ends with what to do where it cannot run."""
    probe = "import json, torch, trl, datasets, transformers as t; print(json.dumps({'trl': trl.__version__, 'torch': torch.__version__, 'transformers': t.__version__}))"
    try:
        done = subprocess.run([python, "-c", probe], capture_output=True, text=True, check=False)
    except OSError as error:
        raise SystemExit(f"--trl-python {python!r} cannot be run ({error}); see the head of this file") from None
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise SystemExit(
            f"{python} has no working TRL ({last[0]}). Make an environment for it and pass its interpreter:\n"
            "  python -m venv trl && trl/bin/pip install torch==2.13.0 && trl/bin/pip install trl datasets\n"
            "  python benchmarks/online_vs_trl.py --trl-python trl/bin/python"
        )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", default=sys.executable, help="interpreter of an environment that has TRL")
    parser.add_argument("--case", action="append", choices=list(TARGETS), help="default: all three")
    parser.add_argument("--rounds", type=int, default=2, help="steps of each side; half as many of 8 x 8")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-default", action="store_true", help="leave TRL's checkpointing default out")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        our_side(json.loads(sys.stdin.readline()))
        return
    peer = check_peer(args.trl_python)

    from guerdon.policies.smollm2 import cache_folder, load_smollm2

    tokenizer = load_smollm2().tokenizer
    folder = cache_folder() / "smollm2-135m-instruct"
    equal = compare(args, folder, tokenizer)
    print(f"same loss and gradients: {equal}", file=sys.stderr, flush=True)
    result: dict[str, Any] = {
        "benchmark": "online_vs_trl",
        "settings": {"policy": "smollm2", "dtype": "float32", "group": GROUP, "threads": args.threads, "rounds": args.rounds},
        "equal": {name: float(f"{value:.3g}") for name, value in equal.items()},
        "cases": {},
        "environment": {
            "python": platform.python_version(), "cores": os.cpu_count(), "peer": peer,
            **{name: version(name) for name in ("guerdon", "torch", "transformers")},
        },
    }  # fmt: skip
    chosen = {name: case for name, case in cases().items() if not args.case or name in args.case}
    for name, case in chosen.items():
        result["cases"][name] = run_case(name, case, args, folder, tokenizer)
        report(name, result["cases"][name])
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


def report(name: str, case: dict[str, Any]) -> None:
    """A table of one case on stderr."""
    print(f"\n{name}", file=sys.stderr)
    for side, row in case["sides"].items():
        phases = "  ".join(f"{k} {v}" for k, v in row["phases_s"].items())
        print(
            f"  {side:18} {row['seconds']:7.1f} s a step, {row['steps_per_hour']:6.1f} an hour, {row['peak_mb']} MB, "
            f"{row['idle_slots']:.0%} of slots idle\n{'':21}{phases}",
            file=sys.stderr,
        )
    print(f"  ratios {case['ratios']}, reached {case['reached']}\n", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
