"""Health text simplification (arXiv 2401.15043): a small classifier of simplified against original text as the reward of RL.

Testbed: generated sentences about diseases and treatments (``guerdon.environments.simplification``) in two domains that
share half of their terms. All policies start from one that has read rough rewritings of both domains: it knows the words
as a pretrained model does, and uses them carelessly. It is then fine-tuned on 400 pairs of domain A and trained by GRPO on
originals of domain B without any reference. The discriminator is fitted to the pairs of A and 60 of B: a pairwise
logistic model on a sentence encoder, and its reward is guarded by relevance to the source and by a gate on numbers and
denials. What is wanted, and never rewarded, is that terms become the right plain words and that facts survive.
Run it with ``guerdon reproduce health-text-simplification``.

Choices where the paper's text leaves room: the pairwise loss, scores held within plus and minus 5, target grade 6, relevance
to the power 1. The sentence encoder is a mean of MiniLM's vectors of words, each weighted by its inverse document frequency
(squared for the discriminator): one look-up a word, so that RL does not wait for it; the ``gpu`` scale asks MiniLM itself.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from guerdon.environments.simplification import (
    Pair,
    complex_text,
    draw_facts,
    judge_rewriting,
    make_pairs,
    rewriting_tasks,
    rough_rewriting,
    simplification_words,
)
from guerdon.evaluation.simplification import sari_sentence
from guerdon.papers._arms import column, kept, measure, one_thread, run_arms, train
from guerdon.papers.evidence import Claim, Result, environment, paired_claim, require_scale, statistic_claim
from guerdon.papers.recipe import Recipe
from guerdon.reward_models import StyleDiscriminator
from guerdon.rewards import (
    EmbeddingRelevance,
    FKGLReward,
    GuardedProduct,
    PreservationGate,
    Reward,
    ZipfSimplicity,
    fkgl,
)
from guerdon.types import Trajectory, policy_text

SIZES: Mapping[str, Mapping[str, Any]] = {
    "smoke": {"hidden": 96, "rough": 100, "reading": 3, "sft": 3, "a": 40, "b": 16, "unlabelled": 40, "steps": 2, "prompts": 2, "test": 8},
    "cpu": {"hidden": 96, "rough": 10_000, "reading": 350, "sft": 60, "a": 400, "b": 60, "unlabelled": 2000, "steps": 60, "prompts": 16, "test": 100},
    "gpu": {"hidden": 288, "rough": 60_000, "reading": 1500, "sft": 150, "a": 400, "b": 60, "unlabelled": 2000, "steps": 150, "prompts": 32, "test": 500},
}  # fmt: skip
MAX_TOKENS = 56
GROUP = 4
LR = 1e-4
"""Of all arms of RL; of 1e-4 and 3e-4 (tried on another seed) and 5e-4 the only one under which gold did not fall."""
KL = 0.02
ARMS = ("SFT on A", "SFT on A and 60 of B", "FKGL", "FKGL, words, relevance", "discriminator", "discriminator, guarded")


class WordVectors:
    """Sentence embeddings as weighted means of an encoder's embeddings of single words.

    Args:
        encode: ``B`` texts to ``[B, D]``.
        texts: whose document frequencies are the weights, ``log((n + 1) / (df + 1))``; other words count as seen never.
        power: of the weights.
    """

    def __init__(self, encode: Callable[[Sequence[str]], Any], texts: Sequence[str], power: float = 1.0) -> None:
        self._encode, self.power, self._n = encode, power, len(texts)
        self._df = Counter(w for text in texts for w in set(self.words(text)))
        self._table: dict[str, np.ndarray] = {}

    @staticmethod
    def words(text: str) -> list[str]:
        """Words and numbers in lower case."""
        return re.findall(r"[a-z]+(?:-[a-z]+)?|\d+", text.lower())

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """``[B, D]`` of length 1; zeros for a text without words."""
        rows = [self.words(t) for t in texts]
        new = sorted({w for row in rows for w in row} - self._table.keys())
        if new:
            weights = [np.log((self._n + 1) / (self._df[w] + 1)) ** self.power for w in new]
            self._table |= {w: v * x for w, v, x in zip(new, np.asarray(self._encode(new)), weights, strict=True)}
        width = len(next(iter(self._table.values()))) if self._table else 1
        sums = np.array([sum((self._table[w] for w in row), np.zeros(width)) for row in rows])
        return sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)


def base_policy(scale: str, out: Path) -> Any:
    """The policy that every arm and seed starts from: it has read rough rewritings of both domains. Kept in a folder."""
    from guerdon.policies import Policy, tiny_policy, train_bpe

    size, folder = SIZES[scale], out / "base"
    if folder.is_dir():
        return Policy.load(folder, device="cpu")
    words = simplification_words()
    tokenizer = train_bpe(("a",), 266 + len(words), words=words)
    policy = tiny_policy(tokenizer, hidden=size["hidden"], layers=2, heads=2, max_context=160, init="recall")
    rng = random.Random("rough rewritings")
    facts = [draw_facts(rng.choice("AB"), rng) for _ in range(size["rough"])]  # type: ignore[arg-type]
    data = [(f" {complex_text(f)}", f" {rough_rewriting(f, rng)}") for f in facts]
    supervise(policy, data, size["reading"], 3e-3, 0)
    policy.save(folder)
    return policy


def supervise(policy: Any, data: Sequence[tuple[str, str]], steps: int, lr: float, seed: int) -> None:
    """Train on pairs of prompt and response; the loss is on the response alone."""
    from guerdon.training import SftConfig, SftTrainer
    from guerdon.types import Task

    rows = []
    for source, output in data:
        response = [*policy.encode(output), policy.tokenizer.eos_token_id]
        rows.append((policy.render(Task("pair", source).prompt), response, [1] * len(response)))
    optimiser: Any = {"lr": lr, "schedule": "cosine", "warmup": min(10, steps - 1), "final": 0.05}
    SftTrainer(policy, rows, SftConfig(steps=steps, batch_size=32, optimiser=optimiser, seed=seed)).fit()
    policy.model.eval()


class Corpus:
    """The texts of one seed, and what is fitted to them.

    Args:
        scale, seed: of the run.
    """

    def __init__(self, scale: str, seed: int) -> None:
        from guerdon.policies import load_encoder

        size = SIZES[scale]
        self.a, self.b = make_pairs(size["a"], "A", seed=seed), make_pairs(size["b"], "B", seed=seed)
        self.unlabelled = rewriting_tasks(make_pairs(size["unlabelled"], "B", split="unlabelled", seed=seed))
        self.test = {d: make_pairs(size["test"], d, split="test", seed=2) for d in ("A", "B")}  # type: ignore[arg-type]
        pairs = [*self.a, *self.b]
        originals, simplified = [p.original for p in pairs], [p.simplified for p in pairs]
        encode = load_encoder("minilm").encode
        seen = [*originals, *simplified, *(str(t.reference) for t in self.unlabelled)]
        self.sentence: Callable[[Sequence[str]], Any] = encode if scale == "gpu" else WordVectors(encode, seen)
        style = encode if scale == "gpu" else WordVectors(encode, seen, power=2.0)
        self.discriminator = StyleDiscriminator(style, l2=0.01)
        self.discriminator.fit(originals, simplified, groups=[p.page for p in pairs])

    def auc(self) -> dict[str, float]:
        """The discriminator on pages of both domains that it has not seen."""
        pairs = [*self.test["A"], *self.test["B"]]
        return self.discriminator.evaluate(
            [p.original for p in pairs], [p.simplified for p in pairs], [p.page for p in pairs]
        )

    def reward(self, arm: str) -> Reward:
        """The reward of an arm; none sees a reference."""
        relevance = EmbeddingRelevance(self.sentence, normalise=True)
        style = self.discriminator.score
        if arm == "FKGL":
            return FKGLReward()
        if arm == "FKGL, words, relevance":
            return (FKGLReward() + ZipfSimplicity() + relevance) * (1 / 3)
        if arm == "discriminator":
            return GuardedProduct(style, lambda sources, outputs: np.ones(len(outputs)), k=0.0)
        return GuardedProduct(style, relevance, gate=PreservationGate())


def tuned(scale: str, out: Path, corpus: Corpus, seed: int, *, further: bool) -> Any:
    """The base policy after fine-tuning on the pairs of A, and with ``further`` those of B. Kept in a folder."""
    from guerdon.policies import Policy
    from guerdon.training.arithmetic import locked

    size, folder = SIZES[scale], out / f"sft-{seed}{'-b' if further else ''}"
    with locked(folder):  # arms of one seed may run side by side
        if not folder.is_dir():
            policy = base_policy(scale, out)
            pairs = [*corpus.a, *(corpus.b if further else ())]
            supervise(policy, [(f" {p.original}", f" {p.simplified}") for p in pairs], size["sft"], 5e-4, seed)
            policy.save(folder)
    return Policy.load(folder, device="cpu")


def rate(trajectories: Sequence[Trajectory], pairs: Mapping[str, Pair]) -> dict[str, list[float]]:
    """What is measured of each rewriting of a held-out original."""
    outputs = [policy_text(t).strip() for t in trajectories]
    mine = [pairs[t.task.id] for t in trajectories]
    gold = [judge_rewriting(o, p.facts) for o, p in zip(outputs, mine, strict=True)]
    # A rewriting without words has no grade; it counts as the easiest text there is.
    grades = [fkgl(o) for o in outputs]
    return {
        "gold": [s.value for s in gold],
        "terms": [s.parts["terms"] for s in gold],
        "facts": [s.parts["facts"] for s in gold],
        "sari": [sari_sentence(p.original, o, [p.simplified]) for o, p in zip(outputs, mine, strict=True)],
        "fkgl": [EASIEST if np.isnan(g) else g for g in grades],
        "wordless": [float(np.isnan(g)) for g in grades],
        "length ratio": [len(o.split()) / len(p.original.split()) for o, p in zip(outputs, mine, strict=True)],
        "deleted": [_deleted(p.original, o) for o, p in zip(outputs, mine, strict=True)],
        "copied": [float(o == p.original) for o, p in zip(outputs, mine, strict=True)],
    }


def _deleted(original: str, output: str) -> float:
    """Share of the original's words that the output does not have, as often."""
    words = Counter(original.split())
    return (words - Counter(output.split())).total() / words.total()


EASIEST = 0.39 + 11.8 - 15.59
"""Flesch-Kincaid grade of one word of one syllable."""


def run(scale: str, out: Path, corpora: Mapping[int, Corpus], arm: str, seed: int) -> dict[str, Any]:
    """Train one arm and measure it on held-out originals of domain B."""
    size, corpus = SIZES[scale], corpora[seed]
    policy = tuned(scale, out, corpus, seed, further=arm == "SFT on A and 60 of B")
    if not arm.startswith("SFT"):
        settings = {
            "steps": size["steps"],
            "prompts_per_step": size["prompts"],
            "group_size": GROUP,
            "max_tokens": MAX_TOKENS,
            "optimiser": {"lr": LR, "schedule": "linear"},
            "kl_coef": KL,
            "seed": seed,
        }
        train(policy, corpus.unlabelled, corpus.reward(arm), settings=settings)
    pairs = {p.id: p for p in corpus.test["B"]}
    test = rewriting_tasks(corpus.test["B"])
    return measure(policy, test, partial(rate, pairs=pairs), samples=2, max_tokens=MAX_TOKENS, seed=seed)


def reproduce(scale: str, seeds: Sequence[int], out: Path) -> Result:
    """Fit the discriminators, train every arm for every seed, and test the claims.

    Args:
        scale: ``smoke``, ``cpu`` or ``gpu``.
        seeds: of the corpora, of fine-tuning and of RL; the base policy and the test texts are shared.
        out: run folder; finished arms are not run again.
    """
    scale, out = require_scale(scale), Path(out)

    def start() -> dict[str, Any]:
        base_policy(scale, out)
        return {}

    with one_thread():
        prepared = kept(out / "base.json", start)["seconds"]
        corpora = {seed: Corpus(scale, seed) for seed in seeds}
        found = {seed: kept(out / f"discriminator-{seed}.json", corpora[seed].auc) for seed in seeds}
        results = run_arms(out, ARMS, seeds, partial(run, scale, out, corpora))
    claims = judge(results, found, seeds, asserted=scale != "smoke")
    keys = ("gold", "terms", "facts", "sari", "fkgl", "wordless", "length ratio", "deleted", "copied")
    measured: dict[str, Any] = {arm: {k: float(column(results, arm, seeds, k).mean()) for k in keys} for arm in ARMS}
    measured["discriminator on unseen pages"] = {
        k: [found[s][k] for s in seeds] for k in ("auc", "auc_length_matched", "pairs")
    }
    seconds = prepared + sum(r["seconds"] for r in [*results.values(), *found.values()])
    return Result(
        "health-text-simplification", scale, tuple(seeds), tuple(claims), PAPER, measured, environment(), seconds, notes=NOTES
    )  # fmt: skip


def judge(
    results: Mapping[tuple[str, int], Any],
    found: Mapping[int, Mapping[str, float]],
    seeds: Sequence[int],
    *,
    asserted: bool,
) -> list[Claim]:
    """The claims, over seeds and held-out originals of domain B, each rewritten twice."""

    def of(arm: str, key: str) -> np.ndarray:
        return column(results, arm, seeds, key)

    def single(key: str) -> list[np.ndarray]:
        return [np.array([[found[s][key]] for s in seeds])]

    options: dict[str, Any] = {"asserted": asserted}
    ours, bare, grade, base = "discriminator, guarded", "discriminator", "FKGL", "SFT on A"
    others = [of(arm, "fkgl") for arm in ARMS if arm != grade]
    return [
        statistic_claim("1-auc", "on unseen pages, the discriminator's AUC exceeds 0.9", single("auc"), lambda x: x, margin=0.9, **options),
        statistic_claim("1-auc-matched", "and 0.8 between texts of like length", single("auc_length_matched"), lambda x: x, margin=0.8, **options),
        paired_claim("2-sft", "RL on unlabelled text with the guarded discriminator beats the fine-tuned policy on gold", of(ours, "gold"), of(base, "gold"), **options),
        paired_claim("3-fkgl", "and RL with the reading grade", of(ours, "gold"), of(grade, "gold"), **options),
        statistic_claim("4-lowest-grade", "RL with the reading grade ends at the lowest grade of all arms", [of(grade, "fkgl"), *others], lambda x, *y: np.minimum.reduce(y) - x, **options),
        paired_claim("4-grade-hacked", "and keeps fewer facts than the guarded discriminator", of(ours, "facts"), of(grade, "facts"), **options),
        paired_claim("5-guard", "without the guard, the discriminator keeps fewer facts", of(ours, "facts"), of(bare, "facts"), **options),
        paired_claim("6-sari", "SARI is at least that of the fine-tuned policy", of(ours, "sari"), of(base, "sari"), **options),
    ]  # fmt: skip


NOTES = (
    "gold is the harmonic mean of the share of terms put rightly and of facts kept, over two sampled rewritings of each "
    "held-out original of domain B; grades and SARI are means over sentences, SARI on lower-cased text; 'at least' is tested "
    "strictly: the lower bound of the difference must exceed 0. The earlier recipe (mean of grade, word frequency and "
    "relevance) and fine-tuning on B's own 60 pairs are reported beside; nothing is asserted of them"
    ". Tried before: a learning rate of 5e-4 on 8 prompts a step. There the grade was hacked (grade 6.1, facts 0.88, gold 0.29) "
    "and the guarded discriminator ended above it (0.41), but below the fine-tuned policy (0.50), as every reward did. At 1e-4 "
    "nothing is lost and little is learned"
)

PAPER = {
    "SimpleDC": "31 pages, 1,183 pairs (361 train, 294 development, 528 test)",
    "discriminator reward against earlier rewards": "better",
    "RL alone against fine-tuning": "comparable; on top of it RL improves",
    "a model of another domain adapted on unlabelled text": "better on the target",
}

RECIPE = Recipe(
    slug="health-text-simplification",
    title="Health Text Simplification: An Annotated Corpus for Digestive Cancer Education and Novel Strategies for Reinforcement Learning",
    reference="Rahman, Irbaz, North, Williams, Zampieri and Lybarger, 2024, arXiv 2401.15043",
    step="score",
    summary=(
        "A light classifier learns from a little parallel text to tell simplified from original sentences. Its score needs no "
        "reference, so RL can adapt a fine-tuned model on unlabelled documents; relevance to the source is the guard."
    ),
    claims=(
        "a small discriminator tells simplified from original text, and not by length",
        "as a reward on unlabelled text of another domain it improves a fine-tuned policy, more than the reading grade",
        "without a guard for the content, facts are lost",
    ),
    parts=(
        "guerdon.reward_models.StyleDiscriminator",
        "guerdon.rewards.GuardedProduct",
        "guerdon.rewards.PreservationGate",
        "guerdon.rewards.FKGLReward",
        "guerdon.rewards.ZipfSimplicity",
        "guerdon.rewards.EmbeddingRelevance",
        "guerdon.evaluation.simplification.sari",
    ),
    reproduce=reproduce,
    paper_numbers=PAPER,
    needs=("routers", "minilm", "text"),
    seeds=5,
)
