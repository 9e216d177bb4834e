"""TRL's GRPO trainer as one side of ``online_vs_trl.py``; runs in an interpreter that has TRL, and imports nothing of ours.

It is told what to do by lines on stdin (``step``, ``check FILE``, ``quit``) and answers with one JSON line each, so
that the parent can let the two sides take turns. TRL is used as its users use it; what is added is a processor that
ends every completion at a given length (in ``generate``, where TRL has no setting for it) and clocks around its own
methods.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, LogitsProcessor, LogitsProcessorList, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

clock: dict[str, float] = {}


def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, its seconds added up under ``name``."""

    def call(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            clock[name] = clock.get(name, 0.0) + time.perf_counter() - began

    return call


class EndAt(LogitsProcessor):
    """Rows end at their lengths and not before: as long as nothing else decides when to stop, both sides do equal work."""

    def __init__(self, lengths: list[int], prompt: int, eos: int) -> None:
        self.lengths, self.prompt, self.eos = torch.tensor(lengths), prompt, eos

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        done = input_ids.shape[1] - self.prompt + 1
        scores[:, self.eos] = -torch.inf
        for row in torch.nonzero(self.lengths == done)[:, 0].tolist():
            scores[row] = -torch.inf
            scores[row, self.eos] = 0.0
        return scores


class Turns(TrainerCallback):
    """Waits for the parent before each step, and reports after it."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if sys.stdin.readline().strip() != "step":
            raise SystemExit(0)
        clock.clear()
        self.began = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.optimising = time.perf_counter()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        clock["optimiser"] = time.perf_counter() - self.optimising

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seconds = time.perf_counter() - self.began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        say({"seconds": seconds, "phases": dict(clock), "peak_mb": peak})


def say(row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)


def make_trainer(job: dict[str, Any]) -> GRPOTrainer:
    prompts, lengths = job["prompts"], job["lengths"]
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    for text, ids in zip(prompts, job["prompt_ids"], strict=True):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids, "both sides must see the same prompts"
    rows = len(prompts) * job["group"]
    micro = min(rows, job["group"])
    config = GRPOConfig(
        output_dir=job["scratch"],
        model_init_kwargs={"dtype": "float32"},
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=job["checkpointing"],
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=rows // micro,
        num_generations=job["group"],
        max_completion_length=max(lengths),
        max_steps=job["steps"],
        learning_rate=job["lr"],
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        shuffle_dataset=False,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [sum(ids) % 97 / 97 for ids in completion_ids]

    trainer = GRPOTrainer(
        model=job["model"],
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        callbacks=[Turns()],
    )
    model, eos = trainer.model, tokenizer.eos_token_id
    plain = model.generate

    def generate(*args: Any, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        ends = LogitsProcessorList([EndAt(lengths, input_ids.shape[1], eos)])
        return plain(*args, input_ids=input_ids, logits_processor=ends, **kwargs)

    model.generate = timed("sampling", generate)
    trainer._calculate_rewards = timed("scoring", trainer._calculate_rewards)
    trainer.compute_loss = timed("forward", trainer.compute_loss)
    trainer.accelerator.backward = timed("backward", trainer.accelerator.backward)
    return trainer


def check(trainer: GRPOTrainer, path: Path) -> dict[str, Any]:
    """TRL's loss and gradients on given tokens, log-probabilities and advantages."""
    given = torch.load(path, weights_only=True)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    prompts, completions = given["prompts"], given["completions"]
    width, longest = max(map(len, prompts)), max(map(len, completions))
    pad = trainer.processing_class.pad_token_id

    def padded(rows: list[list[int]], size: int, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask = torch.full((len(rows), size), pad), torch.zeros(len(rows), size, dtype=torch.long)
        for row, values in enumerate(rows):
            at = slice(size - len(values), size) if left else slice(0, len(values))
            ids[row, at], mask[row, at] = torch.tensor(values), 1
        return ids, mask

    prompt_ids, prompt_mask = padded(prompts, width, True)
    completion_ids, completion_mask = padded(completions, longest, False)
    old = torch.zeros(completion_ids.shape)
    old[completion_mask.bool()] = given["old"]
    inputs = {
        "prompt_ids": prompt_ids, "prompt_mask": prompt_mask, "completion_ids": completion_ids,
        "completion_mask": completion_mask, "advantages": given["advantages"], "old_per_token_logps": old,
        "num_items_in_batch": completion_mask.sum() * trainer.args.steps_per_generation
        / trainer.current_gradient_accumulation_steps,
    }  # fmt: skip
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    torch.save({name: gradients[name] for name in given["wanted"]}, path.with_suffix(".trl"))
    norms = {name: float(gradient.norm()) for name, gradient in gradients.items()}
    trainer.model.zero_grad()
    return {"loss": float(loss), "norms": norms}


def main() -> None:
    job = json.loads(sys.stdin.readline())
    torch.set_num_threads(job["threads"])
    trainer = make_trainer(job)
    if job["check"]:
        say(check(trainer, Path(job["check"])))
        return
    say({"ready": True, "loaded_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024})
    trainer.train()


if __name__ == "__main__":
    main()
