"""Is a query open-ended or closed-ended? A light classifier, run once over the training prompts.

Open-ended: many different answers are good and a long, varied one is welcome (explain, write, suggest, tell me about).
Closed-ended: one short answer, or one form of it, is right (a fact, a sum, a choice, a translation, an extraction). The
type is a property of the query alone; it is never read off a response.

Source: the query types of Kim and Seo 2024, "Regularized Relevance Reward" (arXiv 2402.03469), who let GPT-4 label prompts
(some 83% agreement with people) and distil it into a language model. Here the labels may come from any judge
(:data:`QUERY_TYPE_PROMPT`, :func:`parse_query_type`), and the classifier is logistic regression on words; a small set of
labelled queries of our own comes with it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from guerdon.errors import ConfigError, DataError, MissingDependency
from guerdon.rewards.grammar import last_block

__all__ = [
    "CLOSED_QUERIES",
    "OPEN_QUERIES",
    "QUERY_TYPE_PROMPT",
    "QueryTypeClassifier",
    "parse_query_type",
    "query_type",
]

QueryType = Literal["open", "closed"]

QUERY_TYPE_PROMPT = """Decide whether a query is open-ended or closed-ended.

Open-ended: many different answers would be good, and a longer, richer answer is welcome.
Closed-ended: there is one right answer, or a narrow set of them; a short answer, or one of a fixed form, is wanted.

Examples
- "Tell me about the history of glass." open
- "Give me ideas for a birthday party." open
- "In which year was the telephone patented?" closed
- "Translate 'good morning' into Spanish." closed

Query:
{query}

Reply with one word, open or closed, as <answer>word</answer>."""
"""A template for a judge that labels queries."""

OPEN_QUERIES: tuple[str, ...] = (
    "Tell me about the city of Lisbon.", "Please tell me about Marie Curie.", "Can you tell me more about volcanoes?",
    "Explain how photosynthesis works.", "Explain the causes of the French Revolution.", "Write a short story about a fox.",
    "Write a poem about autumn leaves.", "Write an essay on the benefits of reading.", "Write an email to my landlord about noise.",
    "Give me some ideas for a birthday party.", "Suggest a few names for my bakery.", "Suggest ways to save energy at home.",
    "What are some good ways to learn a language?", "What are the advantages and disadvantages of remote work?",
    "What do you think about modern art?", "What should I pack for a trip to the mountains?", "How can I sleep better?",
    "How do I improve my essay writing?", "How can I make new friends in a new city?", "How do people usually train for a marathon?",
    "Describe your ideal weekend.", "Describe the landscape of Iceland.", "Describe how a computer works to a child.",
    "Compare cats and dogs as pets.", "Discuss the ethics of animal testing.", "Discuss the impact of social media on teenagers.",
    "Help me plan a week in Rome.", "Help me write a cover letter for a teaching job.", "Plan a dinner menu for six guests.",
    "Create a workout routine for beginners.", "Create a marketing slogan and campaign for a bicycle shop.",
    "Brainstorm topics for a science fair project.", "Imagine life on Mars and tell me what a day would be like.",
    "Why do people enjoy horror films?", "Why is exercise good for health?", "Why did the Roman Empire fall?",
    "Give me advice on dealing with stress at work.", "Give an overview of renewable energy.", "Talk to me about jazz music.",
    "Share some tips for growing tomatoes.", "I feel lonely lately, what can I do?", "I want to start running, where do I begin?",
    "I would like to learn more about whales.", "Could you recommend some books on ancient history?",
    "Could you walk me through making sourdough bread?", "Could you introduce me to the philosophy of Kant?",
    "Outline a business plan for a small cafe.", "Make up a dialogue between a king and a farmer.", "Propose a title and plot for a film.",
    "Explain the theory of relativity in simple terms.", "What is it like to live in Tokyo?", "What can I do with leftover rice?",
    "Tell me a bedtime story.", "Tell me everything you know about bees.", "Let us talk about the future of cities.",
    "How would you describe the taste of coffee?", "How has music changed over the last century?",
    "Please write a few sentences about dolphins for me.", "I want to hear everything about the sea, please tell me about it.",
    "Can you tell me what makes a city nice to live in?", "Could you help me with ideas for my garden?",
    "I am going on a trip to Japan and wonder what I should see there.", "Do you know why cats purr, and can you explain it?",
    "I have a dinner with my boss next week, how should I prepare?", "Hi, can you give me a recipe for pumpkin pie?",
    "Please answer in detail: how do vaccines work?", "Which hobbies would you suggest for a shy person, and why?",
    "What makes a good leader?", "What are the main themes of Hamlet?", "Review the arguments for and against nuclear power.",
)  # fmt: skip
"""Queries that welcome long and varied answers."""

CLOSED_QUERIES: tuple[str, ...] = (
    "What is the capital of Peru?", "Who wrote Don Quixote?", "In which year did the war end?", "When was the bridge built?",
    "Where is Mount Kenya?", "How many legs does a spider have?", "How old was Mozart when he died?", "How tall is the tower?",
    "What is 17 times 24?", "Solve for x: 3x + 5 = 20.", "Calculate the area of a circle with radius 3.",
    "Is a tomato a fruit, yes or no?", "Is 91 a prime number?", "Does the word appear in the passage? Answer yes or no.",
    "Translate 'good morning' into Spanish.", "Translate the following sentence to French: I am hungry.",
    "Which of these is a mammal: shark, whale, tuna?", "Which planet is closest to the sun?", "Which river flows through Cairo?",
    "Name the author of Emma.", "Name the chemical symbol of gold.", "What colour is the flag of Japan?",
    "What is the population of Norway?", "What is the boiling point of water in Celsius?", "What is the past tense of go?",
    "What is the area code of Boston?", "What is the birthplace of Frida Kahlo?", "What is the currency of Brazil?",
    "Classify the sentiment of this review as positive or negative: I loved it.", "Identify the odd one out: apple, pear, hammer.",
    "Extract the date from this sentence: We met on 3 May 1999.", "Correct the grammar of this sentence: He go to school.",
    "Fix the spelling: recieve.", "Convert 5 miles to kilometres.", "Convert this list to JSON: red, green, blue.",
    "Sort these numbers in ascending order: 4, 1, 9.", "Count the vowels in the word banana.", "Give the antonym of hot.",
    "Give me the synonym of quick in one word.", "Find the mean of 2, 4 and 9.", "Find the largest number in the list: 3, 8, 5.",
    "Who is the president of the club according to the text?", "Who painted the Mona Lisa?", "Who was the first person on the moon?",
    "Who discovered penicillin?", "What does the abbreviation CPU stand for?", "What day comes after Tuesday?",
    "What year was the company founded?", "What is the name of the longest river in Asia?", "True or false: the sun is a star.",
    "Choose the correct option: A) run B) ran C) runs.", "Rewrite the sentence in the passive voice: The cat ate the fish.",
    "Fill in the blank: The sky is ____.", "If a train goes 60 miles in 2 hours, what is its speed?",
    "A shop sells 3 apples for 2 dollars each. How much is the total?", "John has 5 marbles and gives away 2. How many are left?",
    "How much does she earn per week?", "Does this sentence contain a metaphor?", "At what temperature does iron melt?",
    "From the passage, what is the name of the king?", "Could you tell me what the capital of Peru is, please?",
    "Please answer this question for me: who wrote Emma?", "I have a short question, what is the highest mountain of Spain?",
    "Can you tell me who the mayor of London is?", "Tell me the year in which the ship sank.",
    "Could you look up the population of Oslo for me?", "Please tell me which river flows through Rome.",
    "I would like to know when the museum opens.", "Do you know how many strings a violin has?",
    "Can you give me the exact date of the moon landing?",
)  # fmt: skip
"""Queries with one short answer, or one form of it."""


def parse_query_type(reply: str) -> QueryType:
    """The type in a judge's reply: in its answer block, or the only word of the two that it holds.

    Raises:
        DataError: neither word, or both.
    """
    found = last_block(reply, "answer")
    text = reply if found is None else found
    words = {w for w in re.findall(r"[a-z]+", text.lower()) if w in ("open", "closed")}
    if len(words) != 1:
        raise DataError(f"the reply must say open or closed, got {reply[:80]!r}")
    return "open" if words == {"open"} else "closed"


class QueryTypeClassifier:
    """Logistic regression on a query's words, pairs of words and first words.

    ``classifier(query)`` is the type of one query, as :class:`~guerdon.rewards.RegularizedRelevance` takes it.

    Args:
        l2: strength of the penalty on the weights.
        words: only so many words from each end of a query are read, since the instruction stands there; None reads all.
    """

    def __init__(self, l2: float = 0.1, *, words: int | None = 40) -> None:
        if not l2 > 0 or (words is not None and words < 1):
            raise ConfigError(f"l2 must be positive and words at least 1 or None, got {l2!r} and {words!r}")
        self.l2, self.words = l2, words
        self._vectoriser: Any = None
        self._model: Any = None

    def fit(self, queries: Sequence[str], types: Sequence[str]) -> QueryTypeClassifier:
        """Learn from labelled queries.

        Args:
            queries: ``n`` queries.
            types: ``"open"`` or ``"closed"`` for each.

        Raises:
            DataError: lists of different lengths, another label, or only one of the types.
            MissingDependency: scikit-learn is not installed.
        """
        if len(queries) != len(types) or set(types) != {"open", "closed"}:
            raise DataError(
                f"types must be 'open' or 'closed' for each of {len(queries)} queries, and both must occur; "
                f"got {len(types)} of {sorted(map(str, set(types)))}"
            )
        try:
            from sklearn.feature_extraction.text import TfidfVectorizer
            from sklearn.linear_model import LogisticRegression
        except ImportError as error:
            raise MissingDependency(
                "the query type classifier needs scikit-learn: pip install 'guerdon[routers]'"
            ) from error
        read = [self._read(q) for q in queries]
        self._vectoriser = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\S+").fit(read)
        y = np.array([t == "open" for t in types], dtype=int)
        self._model = LogisticRegression(C=1.0 / self.l2, max_iter=1000).fit(self._vectoriser.transform(read), y)
        return self

    def probabilities(self, queries: Sequence[str]) -> np.ndarray:
        """``[B]`` float64, how likely each query is open-ended.

        Raises:
            ConfigError: not fitted, or a single string was given.
        """
        if self._model is None:
            raise ConfigError("the classifier is not fitted; call fit, or use query_type()")
        if isinstance(queries, str):
            raise ConfigError("queries must be a list of strings, got one string; write [query]")
        if not len(queries):
            return np.zeros(0)
        return np.asarray(self._model.predict_proba(self._vectoriser.transform([self._read(q) for q in queries]))[:, 1])

    def predict(self, queries: Sequence[str]) -> list[QueryType]:
        """The type of each query."""
        return ["open" if p >= 0.5 else "closed" for p in self.probabilities(queries)]

    def __call__(self, query: str) -> QueryType:
        """The type of one query."""
        return self.predict([query])[0]

    def score(self, queries: Sequence[str], types: Sequence[str]) -> float:
        """Share of queries whose type is right."""
        return float(np.mean([a == b for a, b in zip(self.predict(queries), types, strict=True)]))

    def _read(self, query: str) -> str:
        words = [w if w.isalpha() else "#" if w.replace(".", "").isdigit() else w for w in _WORD.findall(query.lower())]
        if self.words is not None and len(words) > 2 * self.words:
            words = [*words[: self.words], *words[-self.words :]]
        # How a query opens says most, so its first words count once more, as words of their own.
        return " ".join([*(f"^{w}" for w in words[:1]), "^" + "_".join(words[:2]), *words])


_WORD = re.compile(r"[a-z]+|[0-9][0-9.,]*|_{2,}|[^\sa-z0-9]")


@functools.cache
def query_type() -> QueryTypeClassifier:
    """The classifier of the queries that come with it; fitted on first use (a tenth of a second).

    Raises:
        MissingDependency: scikit-learn is not installed.
    """
    queries = [*OPEN_QUERIES, *CLOSED_QUERIES]
    return QueryTypeClassifier().fit(queries, ["open"] * len(OPEN_QUERIES) + ["closed"] * len(CLOSED_QUERIES))
