"""Router-R1 over the recorded answers of real models: the multi-round policy beside the single-round rows.

A policy of about a million parameters reads a GSM8K question, asks one of six real models whose answers were
recorded, sees the number at which that answer arrived, may ask others, and answers. It is warm-started on scripts
with uniformly random members and a random number of calls, and trained by RL on the same training questions as the
single-round routers; the test questions are theirs too. Nothing is made up: what was not recorded is a miss, and the
share of calls that hit is reported.

Two things are smaller than with a real language model, and stated in the result: the query is one word that stands
for the question, and a reply is shown as its final number (all of its tokens are paid for).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from guerdon.errors import DataError
from guerdon.routing import protocol
from guerdon.routing.bench.formats import estimate_tokens, read_gsm8k
from guerdon.routing.bench.matrix import ScoreMatrix
from guerdon.routing.bench.metrics import arena_score, bootstrap
from guerdon.routing.bench.recorded import gsm8k_members
from guerdon.routing.env import RoutingEnv
from guerdon.routing.member import Member
from guerdon.routing.pool import Pool
from guerdon.routing.recorded import RecordedBackend
from guerdon.types import StopReason, Task, Trajectory, Turn

__all__ = ["RecordedTestbed", "final_number", "gsm8k_golds", "rounds_table", "run_multi_round"]

_NUMBER = re.compile(r"-?\$?\s?\d[\d,]*(?:\.\d+)?|-?\.\d+")
WORD = "question"
"""The query that stands for the whole question."""


def final_number(text: str) -> str | None:
    """The last number of a solution, without thousands separators and trailing zeros; None where there is none."""
    found = _NUMBER.findall(text)
    if not found:
        return None
    plain = re.sub(r"[,$\s]", "", found[-1])
    return f"{float(plain):.10g}" if "." in plain else str(int(plain))


def gsm8k_golds(solutions_jsonl: str | Path) -> dict[str, str]:
    """Gold answers of the recorded problems, by their question with blanks squashed.

    Raises:
        DataError: a line without ``question`` or without a number in ``ground_truth``.
    """
    out: dict[str, str] = {}
    for number, line in enumerate(Path(solutions_jsonl).read_text(encoding="utf-8").splitlines(), 1):
        row = json.loads(line)
        gold = final_number(str(row.get("ground_truth", "")))
        if gold is None or not row.get("question"):
            raise DataError(
                f"{Path(solutions_jsonl).name}, line {number}: needs a question and a number in ground_truth"
            )
        out[" ".join(str(row["question"]).split())] = gold
    return out


class RecordedTestbed:
    """Questions, golds and a pool of recorded members, in the parts of the single-round benchmark.

    Args:
        matrix: recorded outcomes with replies.
        golds: question (blanks squashed) to gold answer.
        members: descriptors and prices.
        seed, shares: of the split; the same as :func:`~guerdon.routing.bench.run.run_bench`.

    Raises:
        DataError: the matrix has no replies, or a question has no gold answer.
    """

    def __init__(
        self,
        matrix: ScoreMatrix,
        golds: Mapping[str, str],
        members: Sequence[Member],
        *,
        seed: int = 0,
        shares: tuple[float, float, float] = (0.6, 0.2, 0.2),
    ) -> None:
        if matrix.replies is None:
            raise DataError("multi-round routing replays replies, and this matrix has scores only")
        self.matrix = matrix
        self.short = {m.name: m.name.rpartition("/")[2] for m in members}
        self.members = [replace(m, name=self.short[m.name]) for m in members]
        keys = [" ".join(q.split()) for q in matrix.queries]
        absent = next((k for k in keys if k not in golds), None)
        if absent is not None:
            raise DataError(f"no gold answer for the question {absent[:60]!r}")
        parts = matrix.split(shares, seed)
        self.train, self.validation, self.test = (
            [Task(f"q{i}", matrix.queries[i], [golds[keys[i]]]) for i in rows] for rows in parts
        )
        self.rows = parts
        self.replies = {
            self.short[m]: {
                q: (f"= {number}", estimate_tokens(text))
                for q, text in zip(matrix.queries, texts, strict=True)
                if text and (number := final_number(text)) is not None
            }
            for m, texts in matrix.replies.items()
        }

    def pool(self) -> Pool:
        """The six members; every call is looked up and billed as the recorded reply that it was."""
        return Pool([(m, RecordedBackend(self.replies[m.name], identity=f"recorded:{m.name}")) for m in self.members])

    def prompt(self, question: str, members: Any, *, prices: bool = True, budget_usd: float | None = None) -> str:
        """A line per member with its price, then the question."""
        lines = [f"{m.name} $ {m.output_price:g}" for m in members]
        return "\n".join([*lines, f"Question: {question.strip()}"])

    @property
    def words(self) -> tuple[str, ...]:
        """Single tokens of the policy: member names and every number of a recorded reply to a training question."""
        seen = {t.question for t in self.train}
        numbers = {text[2:] for r in self.replies.values() for q, (text, _) in r.items() if q in seen}
        return (*self.short.values(), *(f" {n}" for n in sorted(numbers)), *(str(k) for k in range(10)))

    def policy(self, *, hidden: int = 144, layers: int = 3, seed: int = 0) -> Any:
        """An untrained policy that knows the words of the training questions and can already look back."""
        from guerdon.policies import tiny_policy, train_bpe

        words = self.words
        texts = [t.question for t in self.train]
        tokenizer = train_bpe(texts, 256 + 16 + len(words) + 1200, words=words)
        return tiny_policy(
            tokenizer,
            hidden=hidden,
            intermediate=512,
            layers=layers,
            heads=2,
            init="recall",
            max_context=768,
            seed=seed,
        )

    def scripts(self, policy: Any, n: int, *, per_prompt: int = 4, seed: int = 0) -> list[Trajectory]:
        """Valid in form, random in choice: 1 to 3 calls of random members, the answer of a random call.

        In half of them the replies are random numbers, so that copying does not depend on the question. Each question
        drawn has ``per_prompt`` scripts, which share its computation in training.
        """
        rng = np.random.default_rng([seed, 31])
        names = [m.name for m in self.members]
        numbers = [w.strip() for w in self.words if w.startswith(" ")]
        out: list[Trajectory] = []
        for k in range(n):
            if k % per_prompt == 0:
                task = self.train[int(rng.integers(len(self.train)))]
                shown = self.prompt(task.question, self.members)
                prompt_ids = tuple(policy.render([{"role": "user", "content": shown}]))
            practice = rng.random() < 0.5
            turns: list[Turn] = []
            said: list[str] = []
            for _ in range(int(rng.integers(1, 4))):
                name = names[int(rng.integers(len(names)))]
                known = self.replies[name].get(task.question)
                number = numbers[int(rng.integers(len(numbers)))] if practice or known is None else known[0][2:]
                said.append(number)
                turns.append(_turn(policy, "policy", f"<think> ask </think><search> {name} : {WORD} </search>"))
                turns.append(_turn(policy, "environment", protocol.observation(f"= {number}")))
            answer = said[int(rng.integers(len(said)))]
            turns.append(_turn(policy, "policy", f"<think> done </think><answer> {answer} </answer>"))
            out.append(Trajectory(task, tuple(turns), StopReason.DONE, prompt_ids=prompt_ids))
        return out

    def env(self, policy: Any, pool: Pool | None = None) -> RoutingEnv:
        """The routing environment over the recorded pool."""
        return RoutingEnv(
            pool=pool or self.pool(),
            max_turns=4,
            prompt=self.prompt,
            helper_prompt=None,
            control=policy.control_tokens,
            question_word=WORD,
        )


def _turn(policy: Any, speaker: Any, text: str) -> Turn:
    return Turn(speaker, text, tuple(policy.encode(text)))


def run_multi_round(
    path: str | Path,
    second: str | Path,
    *,
    alphas: Sequence[float] = (0.0, 0.6, 0.9),
    seed: int = 0,
    rollouts: int = 6000,
    sft_steps: int = 125,
    steps: int = 40,
    prompts: int = 16,
    group: int = 8,
    say: Any = lambda line: None,
) -> dict[str, Any]:
    """Train Router-R1 at each cost coefficient on recorded answers and measure it on the held-out questions.

    Args:
        path, second: the two files of the recorded GSM8K answers, as ``format="gsm8k"`` reads them.
        alphas: cost coefficients, one policy each, all from one warm start.
        seed: of the split (shared with the single-round benchmark), the scripts, the weights and RL.
        rollouts, sft_steps: of the warm start.
        steps, prompts, group: of RL.
        say: told about progress.

    Returns:
        Rows ``{"name", "em", "ci", "usd_per_1000", "arena", "calls", "shares", "coverage", ...}``, the single
        members first.
    """
    import asyncio

    from guerdon.policies import Policy
    from guerdon.routing.evaluate import measure
    from guerdon.routing.reward import router_reward
    from guerdon.routing.router_r1 import RouterR1, RouterSettings, router_r1_train
    from guerdon.training import Console, OnlineConfig, SftConfig, SftTrainer

    testbed = RecordedTestbed(read_gsm8k(path, second), gsm8k_golds(second), gsm8k_members(), seed=seed)
    policy: Policy = testbed.policy(seed=seed)
    say(f"warm start: {rollouts} scripts, {sft_steps} steps")
    sft = SftConfig(
        steps=sft_steps, batch_size=48, max_tokens_per_microbatch=12_000, seed=seed,
        optimiser={"lr": 2e-3, "schedule": "cosine", "warmup": min(30, sft_steps - 1), "final": 0.05, "betas": (0.9, 0.98)},
    )  # fmt: skip
    SftTrainer(
        policy, testbed.scripts(policy, rollouts, seed=seed), sft, callbacks=[Console(("loss", "time/step"), every=50)]
    ).fit()
    start = {k: v.clone() for k, v in policy.model.state_dict().items()}
    settings = RouterSettings(
        prompt="compact", helper_prompt=False, max_turn_tokens=24, max_observation_tokens=40, temperature=0.0
    )

    def played(name: str) -> dict[str, Any]:
        router = RouterR1(policy, settings=settings)
        pool = testbed.pool()

        async def play() -> Any:
            try:
                return await router.play(testbed.env(policy, pool), testbed.test, seed=seed + 1)
            finally:
                await router.aclose()

        trajectories = asyncio.run(play())
        row = measure(name, trajectories)
        calls = [c for t in trajectories for c in t.info["calls"]]
        hits = sum(c.reply.ok for c in calls)
        asked: dict[str, int] = {}
        for c in calls:
            asked[c.reply.member or c.asked] = asked.get(c.reply.member or c.asked, 0) + 1
        return _row(name, row.items["em"], row.items["usd"]) | {
            "calls": row.calls,
            "format_error_rate": row.format_error_rate,
            "shares": {k: v / max(len(calls), 1) for k, v in sorted(asked.items())},
            "coverage": hits / max(len(calls), 1),
            "policy_tokens": row.policy_tokens,
            "policy_seconds": row.policy_seconds,
        }

    rows = [_constant(testbed, m.name) for m in testbed.members]
    rows.append(played("Router-R1, warm start only"))
    for alpha in alphas:
        policy.model.load_state_dict(start)
        config = OnlineConfig(
            algorithm="grpo", steps=steps, prompts_per_step=prompts, group_size=group, max_tokens=24, max_observation_tokens=40,
            max_tokens_per_microbatch=12_000, clip_high=0.28, scale="none", top_p=0.95, old_logprobs="recomputed",
            entropy_coef=0.003, seed=seed,
            optimiser={"lr": 3e-4, "warmup": min(3, steps - 1), "betas": (0.9, 0.95)},
        )  # fmt: skip
        say(f"reinforcement learning at alpha = {alpha:g}")
        router_r1_train(
            policy, testbed.env(policy), router_reward(alpha=alpha), testbed.train, config,
            callbacks=[Console(("reward/mean", "reward/outcome", "reward/raw_cost", "entropy", "time/step"), every=20)],
            rollout_options={"close_observation": "</information>\n\n"},
        ).close()  # fmt: skip
        rows.append(played(f"Router-R1, alpha = {alpha:g}"))
    return {
        "dataset": {"name": "gsm8k", "train": len(testbed.train), "test": len(testbed.test), "notes": list(testbed.matrix.notes)},
        "settings": {
            "seed": seed, "alphas": list(alphas), "rollouts": rollouts, "sft_steps": sft_steps, "steps": steps,
            "prompts": prompts, "group": group, "parameters": sum(p.numel() for p in policy.model.parameters()),
            "reply": "final number of the recorded reply; all its tokens are billed",
            "query": f"the word {WORD!r} stands for the question",
        },
        "rows": rows,
    }  # fmt: skip


def rounds_table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headers and cells of the rows that :func:`run_multi_round` returns."""
    headers = ["router", "EM", "95% interval", "USD per 1,000", "arena", "calls", "recorded", "mostly asked"]
    cells = []
    for row in result["rows"]:
        low, high = row["ci"]
        asked = max(row["shares"].items(), key=lambda kv: kv[1], default=("nobody", 0.0))
        covered = f"{row['coverage']:.0%}" if "coverage" in row else "-"
        cells.append([
            row["name"], f"{row['em']:.3f}", f"{low:.3f} to {high:.3f}", f"{row['usd_per_1000']:.3f}", f"{row['arena']:.3f}",
            f"{row['calls']:.2f}", covered, f"{asked[0]} {asked[1]:.0%}",
        ])  # fmt: skip
    return headers, cells


def _constant(testbed: RecordedTestbed, name: str) -> dict[str, Any]:
    member = next(m for m in testbed.members if m.name == name)
    em, usd = [], []
    for task in testbed.test:
        reply = testbed.replies[name].get(task.question)
        em.append(float(reply is not None and reply[0][2:] == task.reference[0]))
        tokens = 0 if reply is None else reply[1]
        usd.append((estimate_tokens(task.question) * member.input_price + tokens * member.output_price) / 1e6)
    return _row(f"constant: {name}", em, usd) | {"calls": 1.0, "shares": {name: 1.0}}


def _row(name: str, em: Any, usd: Any) -> dict[str, Any]:
    figure = bootstrap(np.asarray(em), lambda s: s[..., 0])
    money = float(np.mean(usd) * 1000)
    return {
        "name": name,
        "n": len(em),
        "em": figure.value,
        "ci": [figure.ci_low, figure.ci_high],
        "usd_per_1000": money,
        "arena": arena_score(figure.value, money),
    }
