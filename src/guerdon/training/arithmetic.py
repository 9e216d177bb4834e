"""Tiny policies for the arithmetic chains: made, warmed up on a stated mix of styles, kept in a folder, and asked.

Arms of an experiment share one warm start: the first caller trains it (seconds on one core), the others load it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from guerdon.environments.arithmetic.chains import Spec, words
from guerdon.environments.arithmetic.oracle import Solve
from guerdon.environments.arithmetic.scripted import STYLES, Style, scripts
from guerdon.policies import Policy, tiny_policy, train_bpe
from guerdon.training.config import SftConfig
from guerdon.types import Group, Task

__all__ = ["arithmetic_policy", "locked", "solve", "warm_start"]


def arithmetic_policy(
    spec: Spec | None = None,
    *,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    max_context: int = 256,
    more_words: Sequence[str] = (),
    seed: int = 0,
) -> Policy:
    """An untrained tiny policy whose tokenizer holds the testbed's numbers and words as single tokens.

    Args:
        spec: whose words; give the same one (``choices`` included) to every model that shares a tokenizer.
        hidden, layers, heads, max_context: of the model; 64 and 2 make 0.15 million parameters.
        more_words: further single tokens.
        seed: of the weights.
    """
    known = words(spec, more=more_words)
    tokenizer = train_bpe(("0",), 512 + len(known), atoms=(), words=known)
    return tiny_policy(tokenizer, hidden=hidden, layers=layers, heads=heads, max_context=max_context, seed=seed)


def warm_start(
    mix: Mapping[Style | str, float] | Style | str,
    *,
    spec: Spec | None = None,
    folder: str | Path | None = None,
    examples: int = 8000,
    steps: int = 400,
    batch_size: int = 64,
    lr: float = 3e-3,
    max_tokens: int | None = None,
    tasks: Sequence[Task] | None = None,
    seed: int = 0,
    **model: Any,
) -> Policy:
    """A tiny policy after supervised training on scripts in a mix of styles.

    Args:
        mix: style (or its name) to its share; one style alone may be given by itself.
        spec: of the tasks; their split is ``train``.
        folder: where warm starts are kept, each under a name made of all settings; None keeps none.
        examples: scripts written. Fewer scripts or ``steps`` leave a weaker policy.
        steps, batch_size, lr: of the supervised training (cosine schedule with a short warm-up).
        max_tokens: scripts are cut there, as a rambling style needs.
        tasks: the scripts' tasks, in place of new ones of ``spec``.
        seed: of weights, scripts and the order of training.
        model: of :func:`arithmetic_policy`.
    """
    spec = spec or Spec()
    shares = dict(mix) if isinstance(mix, Mapping) else {mix: 1.0}
    named = [(s if isinstance(s, Style) else STYLES.get(s, s), share) for s, share in shares.items()]
    settings = {
        "mix": [[asdict(style) if isinstance(style, Style) else style, share] for style, share in named],
        "spec": asdict(spec),
        "tasks": None if tasks is None else [task.id for task in tasks],
        "training": [examples, steps, batch_size, lr, max_tokens, seed],
        "model": model,
    }  # fmt: skip
    name = hashlib.sha256(json.dumps(settings, sort_keys=True, default=list).encode()).hexdigest()[:16]
    if folder is not None:
        target = Path(folder) / f"arithmetic-{name}"
        with locked(target):
            if not target.is_dir():
                _trained(shares, spec, examples, steps, batch_size, lr, max_tokens, tasks, seed, model).save(target)
        return Policy.load(target, device="cpu")
    return _trained(shares, spec, examples, steps, batch_size, lr, max_tokens, tasks, seed, model)


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the lock file beside ``target``, so that of several processes one makes it and the others wait."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_name(target.name + ".lock"), "w") as file:
        try:
            import fcntl
        except ImportError:  # not a POSIX system: arms may then make the same thing twice
            yield
            return
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _trained(
    shares: Mapping[Style | str, float],
    spec: Spec,
    examples: int,
    steps: int,
    batch_size: int,
    lr: float,
    max_tokens: int | None,
    tasks: Sequence[Task] | None,
    seed: int,
    model: Mapping[str, Any],
) -> Policy:
    from guerdon.training.sft import SftTrainer

    policy = arithmetic_policy(spec, seed=seed, **model)
    data = scripts(policy, examples, shares, tasks=tasks, spec=spec, max_tokens=max_tokens, seed=seed)
    config = SftConfig(
        steps=steps,
        batch_size=batch_size,
        optimiser={"lr": lr, "schedule": "cosine", "warmup": min(20, steps - 1), "final": 0.05},  # type: ignore[arg-type]
        seed=seed,
    )
    SftTrainer(policy, data, config).fit()
    policy.model.eval()
    return policy


def solve(
    policy: Policy,
    tasks: Sequence[Task],
    *,
    group_size: int = 1,
    temperature: float = 1.0,
    max_tokens: int = 64,
    seed: int = 0,
    max_slots: int = 256,
) -> list[Group]:
    """Sample solutions of tasks from a policy; ``temperature=0`` is greedy. One group per task, in order."""
    from guerdon.rollout import Sampling, TransformersEngine, rollout_sync

    policy.model.eval()
    engine = TransformersEngine(policy, max_slots=max_slots)
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature)
    return rollout_sync(engine, Solve(), tasks, max_turns=1, group_size=group_size, sampling=sampling, seed=seed)
