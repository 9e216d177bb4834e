"""The world of the relevance recipe: embedded sentences, and a small network that chooses one after the other.

The network starts as supervised training leaves it: it has seen demonstrations that state facts of the place (of an open
question) or the fact that was asked for (of a closed one) and err now and then, in every way there is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from guerdon.environments.topics import (
    COPY,
    FACTS,
    MOST,
    OTHER,
    REPEAT,
    STOP,
    Question,
    Topic,
    make_questions,
    make_topics,
)

__all__ = ["Chooser", "World", "encode_joined", "references", "respond"]

HIDDEN, SFT_STEPS, SFT_BATCH, SFT_LR, SLIP = 32, 150, 64, 0.01, 0.3
LABEL_ERROR = 0.17
"""Share of query types on which people and the paper's annotator disagree."""

Choose = Callable[[np.ndarray, int, np.ndarray], np.ndarray]
"""What was seen ``[B, 27, 21]``, the step, and counts of the actions so far ``[B, 27]``, to actions ``[B]``."""


class World:
    """Topics, questions, and embeddings of all sentences; kept in the run folder.

    Args:
        topics: how many places there are.
        test: how many of them are kept for measuring.
        out: folder.
    """

    def __init__(self, topics: int, test: int, out: Path) -> None:
        self.topics: list[Topic] = make_topics(topics)
        cut = topics - test
        self.train, self.test = (make_questions(self.topics, list(m)) for m in (range(cut), range(cut, topics)))
        asked = [*self.train, *self.test]
        self.types = dict(zip([q.text for q in asked], self._types([q.text for q in asked]), strict=True))
        self.sentences = list(dict.fromkeys(
            [f for t in self.topics for f in (*t.facts, *t.answers)] + [q.text for q in asked]
        ))  # fmt: skip
        self.vectors, self.tokens = self._embed(out / f"sentences-{topics}-{test}.npz")
        self._place = {s: k for k, s in enumerate(self.sentences)}
        self.starts: dict[tuple[int, int], Any] = {}

    def _types(self, queries: Sequence[str]) -> list[str]:
        """Types by a classifier of the training questions' labels, some of them wrong as an annotator's are."""
        from guerdon.reward_models import QueryTypeClassifier

        wrong = np.random.default_rng(40).random(len(self.train)) < LABEL_ERROR
        other = {"open": "closed", "closed": "open"}
        labels = [other[q.type] if w else q.type for q, w in zip(self.train, wrong, strict=True)]
        return list(QueryTypeClassifier(l2=1.0).fit([q.text for q in self.train], labels).predict(queries))

    def _embed(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        if path.is_file():
            saved = np.load(path)
            return saved["vectors"], saved["tokens"]
        encoder = encode_joined()
        vectors = encoder.encode(self.sentences)
        tokens = np.array([len(encoder.tokenizer(s)["input_ids"]) - 2 for s in self.sentences], dtype=np.float32)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, vectors=vectors, tokens=tokens)
        return vectors, tokens

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """``[B, D]`` embeddings of texts of known sentences, one a line; a blank text is a row of zeros."""
        out = np.zeros((len(texts), self.vectors.shape[1]))
        for row, text in zip(out, texts, strict=True):
            found = [self._place[line] for line in text.split("\n") if line]
            if found:
                row += self.tokens[found] @ self.vectors[found]
                row /= np.linalg.norm(row)
        return out

    def table(self, question: Question) -> np.ndarray:
        """``[27, 13]`` what the policy sees of each action before it begins."""
        said = question.sentences(self.topics)
        kind = np.zeros((STOP + 1, 5))
        places: tuple[int | slice, ...] = (COPY, FACTS, REPEAT, OTHER, STOP)
        for k, where in enumerate(places):
            kind[where, k] = 1.0
        near = np.zeros(STOP + 1)
        shown = [k for k, s in enumerate(said) if s]
        near[shown] = self.encode([said[k] for k in shown]) @ self.encode([question.text])[0]
        best = np.zeros(STOP + 1)
        best[FACTS] = near[FACTS] - near[FACTS].max()
        words = np.array([len(s.split()) / 20 for s in said])
        return np.column_stack([kind, kind * (self.types[question.text] == "open"), near, 5 * best, words])


def encode_joined() -> Any:
    """The encoder itself, for whole texts."""
    from guerdon.policies import load_encoder

    return load_encoder("minilm", device="cpu")


def respond(question: Question, topics: Sequence[Topic], actions: Sequence[int]) -> str:
    """The response that actions make, one sentence a line."""
    sentences, said = question.sentences(topics), list[str]()
    for action in actions:
        if action == STOP:
            break
        said += said[-1:] if action == REPEAT else [sentences[action]]
    return "\n".join(said)


class Chooser:
    """The policy: one small network scores every action by what it is and what was said so far.

    Args:
        world: for what it sees of the questions.
        seed: of weights and demonstrations.
        steps: of supervised training before it is returned; the same seed and steps give the same policy.
    """

    def __init__(self, world: World, seed: int, steps: int = SFT_STEPS) -> None:
        import torch

        self.world = world
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = torch.nn.Sequential(torch.nn.Linear(13 + 8, HIDDEN), torch.nn.Tanh(), torch.nn.Linear(HIDDEN, 1))
        self.tables: dict[str, np.ndarray] = {}
        if (seed, steps) not in world.starts:
            self._imitate(np.random.default_rng([seed, 46]), steps)
            world.starts[seed, steps] = {k: v.clone() for k, v in self.net.state_dict().items()}
        self.net.load_state_dict(world.starts[seed, steps])

    def logits(self, seen: Any, first: Any) -> Any:
        """``[N, 27]`` logits of ``[N, 27, 21]`` features; nothing can be repeated before anything was said."""
        out = self.net(seen)[..., 0].clone()
        out[..., REPEAT] = out[..., REPEAT].masked_fill(first, -30.0)
        return out

    def sample(
        self, questions: Sequence[Question], rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Actions ``[B, 12]``, what was seen ``[B, 12, 27, 21]``, and which steps were taken ``[B, 12]``."""
        import torch

        def choose(seen: np.ndarray, t: int, used: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                logits = self.logits(torch.from_numpy(seen), torch.full((len(seen),), t == 0))
            edges = logits.softmax(-1).double().numpy().cumsum(1)
            return np.minimum((rng.random((len(seen), 1)) * edges[:, -1:] > edges).sum(1), STOP)

        return self.roll(questions, choose)

    def demonstrate(
        self, questions: Sequence[Question], rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As :meth:`sample`, of demonstrators: 3 to 6 facts, or the fact asked for; any action at all at times."""
        many = rng.integers(3, 7, len(questions))
        asked = np.array([-1 if q.asked is None else FACTS.start + q.asked for q in questions])

        def choose(seen: np.ndarray, t: int, used: np.ndarray) -> np.ndarray:
            fresh = rng.random(used.shape)
            fresh[:, : FACTS.start] = fresh[:, FACTS.stop :] = -1.0
            fresh[used > 0] = -1.0
            wanted = np.where(fresh.max(1) > 0, fresh.argmax(1), STOP)
            enough = (used[:, FACTS] > 0).sum(1) >= many
            told = used[np.arange(len(used)), asked] > 0
            wanted = np.where(asked < 0, np.where(enough, STOP, wanted), np.where(told, STOP, asked))
            slips = rng.integers(0, STOP + 1, len(used))
            slips[(slips == REPEAT) & (t == 0)] = COPY
            return np.where(rng.random(len(used)) < SLIP, slips, wanted)

        return self.roll(questions, choose)

    def roll(self, questions: Sequence[Question], choose: Choose) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Actions, what was seen, and which steps were taken, where a function chooses."""
        for q in questions:
            if q.text not in self.tables:
                self.tables[q.text] = self.world.table(q)
        fixed = np.stack([self.tables[q.text] for q in questions])
        B, rows = len(questions), np.arange(len(questions))
        actions = np.full((B, MOST), STOP)
        seen = np.zeros((B, MOST, STOP + 1, 21), dtype=np.float32)
        taken = np.zeros((B, MOST), dtype=bool)
        alive = np.ones(B, dtype=bool)
        used = np.zeros((B, STOP + 1))
        last = np.full(B, STOP)
        for t in range(MOST):
            now = np.zeros((B, STOP + 1, 8))
            now[rows, last, 0] = 1.0
            now[..., 1] = np.minimum(used, 2)
            counts = (t, used[:, COPY], (used[:, FACTS] > 0).sum(1), used[:, REPEAT], used[:, OTHER].sum(1))
            now[..., 2:7] = np.column_stack([np.broadcast_to(c, B) / MOST for c in counts])[:, None]
            # How near the nearest fact that was said comes to the nearest there is.
            now[..., 7] = np.where(used[:, FACTS] > 0, fixed[:, FACTS, 11], -2.0).max(1)[:, None]
            seen[:, t] = np.concatenate([fixed, now], -1)
            taken[:, t] = alive
            chosen = choose(seen[:, t], t, used)
            actions[alive, t] = chosen[alive]
            used[rows[alive], chosen[alive]] += 1
            last = np.where(alive, chosen, last)
            alive = alive & (chosen != STOP)
            if not alive.any():
                break
        return actions, seen, taken

    def logprobs(self, seen: np.ndarray, taken: np.ndarray) -> Any:
        """``[N, 27]`` log-probabilities of all actions in the steps that were taken."""
        import torch

        steps = torch.from_numpy(taken)
        first = (torch.arange(MOST) == 0).expand(len(taken), -1)
        return self.logits(torch.from_numpy(seen)[steps], first[steps]).log_softmax(-1)

    def _imitate(self, rng: np.random.Generator, steps: int) -> None:
        import torch

        optimiser = torch.optim.Adam(self.net.parameters(), lr=SFT_LR)
        for _ in range(steps):
            asked = [self.world.train[int(k)] for k in rng.integers(0, len(self.world.train), SFT_BATCH)]
            actions, seen, taken = self.demonstrate(asked, rng)
            loss = torch.nn.functional.nll_loss(self.logprobs(seen, taken), torch.from_numpy(actions[taken]))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()


def references(question: Question, world: World) -> tuple[str, ...]:
    """Sentences of a reference answer."""
    answers = world.topics[question.topic].answers
    return answers[:4] if question.asked is None else (answers[question.asked],)
