"""Regularized relevance (arXiv 2402.03469): each term of the reward blocks the way round it that the one before opens.

Testbed: questions about invented places, open ("tell me about it") and closed ("what is the river of it?"), answered in up
to twelve sentences that a small network chooses one by one: the question again, a fact of the place, the last sentence
again, a fact of another place, or the end. So copying, repeating, padding and drifting off are actions, and gold is exact
(:mod:`guerdon.environments.topics`). Every arm trains the same network by REINFORCE with a leave-one-out baseline, from the
same start, on the same questions, with the same settings; no reward knows gold. Query types come from a classifier
that sees the question alone, trained as in the paper on labels of which 17% are wrong. Run it with
``guerdon reproduce regularized-relevance-reward``.

Choices where the paper or the machine leaves some. Encoder: minilm in place of Contriever. The embedding of a response is the
mean of its sentences' embeddings weighted by their tokens, brought to length 1, since encoding every joined text of
half a million episodes takes hours on a core; ``measured`` says how well its relevance agrees with that of the joined texts, and the
benchmark of triplets encodes joined texts. F: the default affine map, fitted on responses of the initial policy. A
response counts as a copy where at least half of its sentences are the question. Gold of open questions is cut at 0. The
policy starts as supervised training on demonstrations with slips leaves it, as the paper's does; the KL penalty towards that
start is 0.1 a nat, advantages having deviation 1. (From random weights, all arms ran into responses of twelve sentences, to
closed questions too: stopping was never tried again.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from guerdon.environments.topics import MOST, Question, gold
from guerdon.papers._arms import column, one_thread, run_arms
from guerdon.papers._sentences import Chooser, World, encode_joined, references, respond
from guerdon.papers.evidence import Claim, Result, Timer, environment, paired_claim, require_scale
from guerdon.papers.recipe import Recipe
from guerdon.rewards.relevance import RegularizedRelevance, length_incentive, ngram_uniqueness

SIZES: Mapping[str, Mapping[str, int]] = {
    "smoke": {"topics": 10, "test": 4, "steps": 2, "questions": 4, "triplets": 4, "joined": 4, "calibrate": 1},
    "cpu": {"topics": 200, "test": 40, "steps": 300, "questions": 16, "triplets": 100, "joined": 60, "calibrate": 2},
    "gpu": {"topics": 280, "test": 80, "steps": 1500, "questions": 64, "triplets": 1000, "joined": 600, "calibrate": 4},
}  # fmt: skip
SAMPLES = 4
"""Responses to each question, in training and in measuring."""
LR, KL = 0.01, 0.1
TERMS = {"r_x": (), "r_x * LI": ("length",), "r_x * LI * RP": ("length", "repetition"), "R3": ("length", "repetition", "reference")}  # fmt: skip
ARMS = ("start", *TERMS, "LI", "preference model")


Score = Callable[[Sequence[Question], Sequence[str]], np.ndarray]


def reward_of(arm: str, world: World, seed: int, size: Mapping[str, int]) -> Score:
    """The reward of an arm; what is fitted is fitted on responses of the initial policy to training questions."""
    if arm == "LI":
        return lambda questions, texts: np.array([length_incentive(t) for t in texts])
    if arm == "preference model":
        return partial(preferred, world, preference_model(world, seed, size))
    reward = RegularizedRelevance(world.encode, world.types.__getitem__, terms=TERMS[arm])
    if arm == "R3":
        asked, said = initial_responses(world, seed, size["calibrate"])
        reward.fit_scale([q.text for q in asked], ["\n".join(references(q, world)) for q in asked], said)
    return lambda questions, texts: (
        reward.values([q.text for q in questions], ["\n".join(references(q, world)) for q in questions], texts).total
    )


def initial_responses(world: World, seed: int, each: int) -> tuple[list[Question], list[str]]:
    """Responses of the initial policy."""
    asked = [q for q in world.train for _ in range(each)]
    actions, _, _ = Chooser(world, seed).sample(asked, np.random.default_rng([seed, 41]))
    return asked, [respond(q, world.topics, a) for q, a in zip(asked, actions, strict=True)]


def features(world: World, questions: Sequence[Question], texts: Sequence[str]) -> np.ndarray:
    """``[B, 3]`` relevance, length incentive and trigram uniqueness."""
    near = (world.encode([q.text for q in questions]) * world.encode(texts)).sum(1)
    return np.column_stack([near, [length_incentive(t) for t in texts], [ngram_uniqueness(t) for t in texts]])


def preference_model(world: World, seed: int, size: Mapping[str, int]) -> np.ndarray:
    """Weights of a logistic preference model whose annotators take the longer response four times of five."""
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng([seed, 42])
    asked, said = initial_responses(world, seed, 2 * size["calibrate"])
    x = features(world, asked, said).reshape(-1, 2, 3)
    gap = x[:, 0] - x[:, 1]
    gap = gap[gap[:, 1] != 0]
    longer = gap * np.sign(gap[:, 1:2])
    signs = np.where(rng.random(len(longer)) < 0.8, 1, -1)
    return LogisticRegression(fit_intercept=False).fit(np.r_[longer, -longer], np.r_[signs, -signs] > 0).coef_[0]


def preferred(world: World, weights: np.ndarray, questions: Sequence[Question], texts: Sequence[str]) -> np.ndarray:
    """Scores of the preference model."""
    return features(world, questions, texts) @ weights


def run(scale: str, world: World, arm: str, seed: int) -> dict[str, Any]:
    """Train one arm and measure it on questions about other places."""
    import torch

    from guerdon.credit import leave_one_out

    size, policy, initial = SIZES[scale], Chooser(world, seed), Chooser(world, seed)
    rng = np.random.default_rng([seed, 43])
    rewards: list[float] = []
    if arm != "start":
        score = reward_of(arm, world, seed, size)
        optimiser = torch.optim.Adam(policy.net.parameters(), lr=LR)
        ids = torch.arange(size["questions"]).repeat_interleave(SAMPLES)
        for _ in range(size["steps"]):
            asked = [world.train[int(k)] for k in rng.choice(len(world.train), size["questions"], replace=False)]
            asked = [q for q in asked for _ in range(SAMPLES)]
            actions, seen, taken = policy.sample(asked, rng)
            r = torch.from_numpy(
                score(asked, [respond(q, world.topics, a) for q, a in zip(asked, actions, strict=True)])
            )
            rewards.append(float(r.mean()))
            advantage = leave_one_out(r, ids)
            # Over both types of questions together: done for each apart, it would hide their scales.
            advantage = advantage / advantage.std().clamp(min=1e-6)
            logp = policy.logprobs(seen, taken)
            with torch.no_grad():
                start = initial.logprobs(seen, taken)
            chosen = logp.gather(1, torch.from_numpy(actions[taken])[:, None])[:, 0]
            gain = chosen * advantage[:, None].expand(-1, MOST)[torch.from_numpy(taken)].float()
            loss = (KL * (logp.exp() * (logp - start)).sum() - gain.sum()) / len(asked)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    asked = [q for q in world.test for _ in range(SAMPLES)]
    actions, _, _ = policy.sample(asked, np.random.default_rng([seed, 44]))
    found = [gold(q, a.tolist()) for q, a in zip(asked, actions, strict=True)]
    row: dict[str, Any] = {"reward": [float(np.mean(rewards[:10])), float(np.mean(rewards[-10:]))] if rewards else []}
    for key in found[0]:
        values = np.array([f[key] for f in found]).reshape(len(world.test), SAMPLES).mean(1)
        row[key] = values.tolist()
        for kind in ("open", "closed"):
            row[f"{key} {kind}"] = values[[q.type == kind for q in world.test]].tolist()
    row["said"] = [respond(q, world.topics, a) for q, a in zip(asked[:8:4], actions[:8:4], strict=True)]
    return row


def benchmark(scale: str, world: World, seed: int) -> dict[str, Any]:
    """Triplets of an open question, two facts of its place, and five of another: encoder and preference model.

    Also how well the relevance of averaged sentences agrees with that of joined texts.
    """
    from guerdon.evaluation.relevance import Triplet, relevance_benchmark
    from guerdon.rewards import EmbeddingRelevance

    size, rng = SIZES[scale], np.random.default_rng([seed, 45])
    encoder = encode_joined()
    asked = [q for q in (*world.test, *world.train) if q.asked is None]
    of = {q.text: q for q in asked}
    triplets = []
    for k in range(size["triplets"]):
        q = asked[k % len(asked)]
        mine, others = world.topics[q.topic].facts, world.topics[q.other].facts
        texts = ["\n".join(facts[int(j)] for j in rng.permutation(MOST)[:n]) for facts, n in ((mine, 2), (others, 5))]
        triplets.append(Triplet(q.text, *texts))
    weights = preference_model(world, seed, size)
    found = relevance_benchmark(EmbeddingRelevance(encoder.encode), triplets)
    model = relevance_benchmark(lambda qs, texts: preferred(world, weights, [of[q] for q in qs], texts), triplets)
    questions, texts = initial_responses(world, seed, 1)
    kept = [int(k) for k in rng.permutation(len(texts)) if texts[int(k)]][: size["joined"]]
    xs, said = [questions[k].text for k in kept], [texts[k] for k in kept]
    joined, mean = (EmbeddingRelevance(e)(xs, said) for e in (encoder.encode, world.encode))
    return {
        "encoder": found["wins"],
        "preference model": model["wins"],
        "weights": weights.tolist(),
        "correlation": float(np.corrcoef(joined, mean)[0, 1]),
        "difference": float(np.abs(joined - mean).mean()),
    }


def reproduce(scale: str, seeds: Sequence[int], out: Path) -> Result:
    """Train every arm for every seed from the same start, run the benchmark, and test the claims."""
    scale, out = require_scale(scale), Path(out)
    timer = Timer()
    with one_thread():
        world = World(SIZES[scale]["topics"], SIZES[scale]["test"], out)
        prepared = timer()
        results = run_arms(out, ARMS, seeds, lambda arm, seed: run(scale, world, arm, seed))
        bench = run_arms(out, ("triplets",), seeds[:1], lambda arm, seed: benchmark(scale, world, seed))
    claims = judge(results, bench["triplets", seeds[0]], seeds, asserted=scale != "smoke")
    keys = ("gold open", "gold closed", "copy", "repeat", "sentences open", "sentences closed")
    measured: dict[str, Any] = {arm: {k: float(column(results, arm, seeds, k).mean()) for k in keys} for arm in ARMS}
    table = bench["triplets", seeds[0]]
    measured["triplets"] = {k: float(np.mean(table[k])) for k in ("encoder", "preference model")}
    measured["preference model weights of relevance, length, uniqueness"] = table["weights"]
    measured["averaged against joined embeddings"] = {k: table[k] for k in ("correlation", "difference")}
    measured["query types right"] = float(np.mean([world.types[q.text] == q.type for q in (*world.train, *world.test)]))
    seconds = prepared + sum(row["seconds"] for row in (*results.values(), *bench.values()))
    return Result("regularized-relevance-reward", scale, tuple(seeds), tuple(claims), PAPER, measured, environment(),
                  seconds, notes=NOTES)  # fmt: skip


def judge(
    results: Mapping[tuple[str, int], Any], bench: Mapping[str, Any], seeds: Sequence[int], *, asserted: bool
) -> list[Claim]:
    """The claims, on the same held-out questions for every arm."""

    def of(arm: str, key: str) -> np.ndarray:
        return column(results, arm, seeds, key)

    copies = of("r_x", "copy")
    more: dict[str, Any] = {"asserted": asserted}
    return [
        paired_claim("1-copies", "relevance alone makes more than 0.3 of the responses copies of the question", copies, np.zeros_like(copies), margin=0.3, **more),
        paired_claim("2-fewer-copies", "and more of them than the full reward does", copies, of("R3", "copy"), **more),
        paired_claim("3-repeats", "with the length incentive alone sentences are repeated more than with the repetition term", of("r_x * LI", "repeat"), of("r_x * LI * RP", "repeat"), **more),
        paired_claim("4-open-copying", "on open questions the full reward yields more gold than relevance alone", of("R3", "gold open"), of("r_x", "gold open"), **more),
        paired_claim("5-open-repeating", "and more than relevance times length", of("R3", "gold open"), of("r_x * LI", "gold open"), **more),
        paired_claim("6-closed", "on closed questions it yields more gold than the open branch used for all", of("R3", "gold closed"), of("r_x * LI * RP", "gold closed"), **more),
        paired_claim("7-triplets", "the encoder prefers short on-topic responses to long off-topic ones more often than a preference model with a length bias", [bench["encoder"]], [bench["preference model"]], **more),
    ]  # fmt: skip


NOTES = (
    "copy: share of responses of which at least half of the sentences are the question; repeat: share of sentences that were "
    "said before; four samples of each held-out question"
)

PAPER = {
    "relevance on AlpacaEval judged by GPT-4, same policy: UltraRM, R3": [83.1, 85.1],
    "responses that copy the query under r_x alone": "about 0.4",
    "Vicuna-Bench, MT-Bench, AlpacaEval": "R3 above SFT and above open preference models of its time, with less alignment tax",
}

RECIPE = Recipe(
    slug="regularized-relevance-reward",
    title="Preference-free Alignment Learning with Regularized Relevance Reward",
    reference="Kim and Seo, 2024, arXiv 2402.03469",
    step="score",
    summary=(
        "A reward without preferences: relevance of the response to the query by an unsupervised retriever, times a length "
        "incentive and a repetition term; for closed questions relevance to a reference answer instead, on the same scale."
    ),
    claims=(
        "relevance alone makes the policy copy the query, relevance times length makes it repeat sentences",
        "the full reward keeps quality on open and on closed questions",
        "a retriever tells relevant from longer irrelevant responses where a preference model with a length bias fails",
    ),
    parts=(
        "guerdon.rewards.RegularizedRelevance",
        "guerdon.rewards.EmbeddingRelevance",
        "guerdon.rewards.LengthIncentive",
        "guerdon.rewards.TrigramUniqueness",
        "guerdon.rewards.QuantileAffine",
        "guerdon.reward_models.QueryTypeClassifier",
        "guerdon.evaluation.relevance_benchmark",
    ),
    reproduce=reproduce,
    paper_numbers=PAPER,
    needs=("minilm", "routers"),
    seeds=5,
)
