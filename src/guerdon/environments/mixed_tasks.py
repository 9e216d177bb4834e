"""Vision as symbols: pictures given as tokens, with four types of question, each with a reward of its own.

A picture is an 8x8 grid with coloured rectangles, one token per property, or a bar chart. The types are those of Mixed-R1
(arXiv 2505.24164): ``matching`` (yes or no, and choices), ``chart`` (read or compute a number), ``iou`` (the box of a
region, ``x1 y1 x2 y2`` in cells) and ``open`` (a caption). A caption's reference is templated, with synonyms; what is
wanted of one, and never rewarded, is that it names the right shape, colour and place together (:func:`triple_f1`).

Sources differ in difficulty, and some golds are broken, as in real pools: ``meta["source"]`` says which.
Episodes are single turns (:class:`~guerdon.environments.single.SingleTurn`).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from guerdon.errors import ConfigError
from guerdon.types import Task

__all__ = [
    "TYPES",
    "Writer",
    "caption",
    "mixed_tasks",
    "mixed_words",
    "read_triples",
    "triple_f1",
    "write_response",
]

TYPES = ("matching", "chart", "iou", "open")
SIDE = 8
COLOURS = {"red": "crimson", "blue": "azure", "green": "emerald", "yellow": "golden", "black": "dark", "white": "pale"}
SHAPES = {"square": "box", "circle": "disc", "triangle": "wedge", "star": "asterisk"}
ROWS = {"top": "upper", "middle": "central", "bottom": "lower"}
COLUMNS = {"left": "lefthand", "centre": "mid", "right": "righthand"}
BARS = "PQRSTU"
HIGHEST = 20

_CANONICAL = {
    word: (kind, plain)
    for kind, table in (("colour", COLOURS), ("shape", SHAPES), ("row", ROWS), ("column", COLUMNS))
    for plain, other in table.items()
    for word in (plain, other)
}
_GLUE = ("a", "at", "the", "grid", "bars", "?", "is", "there", "which", "shape", "box", "of", "describe", "value", "sum",
         "and", "largest", "yes", "no", ",", ";", "+", "none", "A", "B", "C", "D")  # fmt: skip
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


@dataclass(frozen=True, slots=True)
class Thing:
    """A rectangle of cells ``[x, x + w) x [y, y + h)`` on the grid."""

    colour: str
    shape: str
    x: int
    y: int
    w: int
    h: int

    @property
    def triple(self) -> tuple[str, str, str]:
        """Shape, colour and place; the place is that of the upper left corner, on a board of three by three."""
        row, column = tuple(ROWS)[self.y * 3 // SIDE], tuple(COLUMNS)[self.x * 3 // SIDE]
        return self.shape, self.colour, f"{row} {column}"

    def __str__(self) -> str:
        return f"{self.colour} {self.shape} {self.x} {self.y} {self.w} {self.h}"


def mixed_words() -> list[str]:
    """Every word of prompts, captions and answers, with the blank before it: one token each in a small tokenizer."""
    words = dict.fromkeys([*_GLUE, *_CANONICAL, *BARS, *map(str, range(2 * HIGHEST + 1))])
    return [f" {w}" for w in words]


def mixed_tasks(
    n: int, *, types: Sequence[str] = TYPES, split: str = "train", seed: int = 0, broken: float = 0.0,
    sizes: Sequence[int] = (1, 2, 3, 4),
) -> list[Task]:  # fmt: skip
    """``n`` tasks, the types in turn.

    Args:
        n: tasks.
        types: of :data:`TYPES`.
        split: part of the ids and of the seed: pictures of different splits are drawn apart.
        seed: of pictures and questions.
        broken: share of tasks whose gold belongs to another picture: nobody can be right.
        sizes: numbers of things on a grid (and bars beyond one on a chart), drawn evenly: the difficulty.

    Returns:
        Tasks with ``meta``: ``type``, ``source`` (type and size, or ``"broken"``), and for captions ``triples``.

    Raises:
        ConfigError: an unknown type, or sizes out of 1 to 5.
    """
    unknown = [t for t in types if t not in TYPES]
    if unknown or not types:
        raise ConfigError(f"types must be of {', '.join(TYPES)}, got {unknown[0] if unknown else 'none'!r}")
    if not sizes or not all(1 <= s <= 5 for s in sizes):
        raise ConfigError(f"sizes must be numbers from 1 to 5, got {tuple(sizes)}")
    rng = random.Random(f"mixed-{split}-{seed}")
    out = []
    for k in range(n):
        kind, size = types[k % len(types)], rng.choice(list(sizes))
        prompt, gold, meta = _MAKE[kind](rng, size)
        source = f"{kind}-{size}"
        if rng.random() < broken:
            _, gold, other = _MAKE[kind](rng, size)
            source, meta = "broken", {**meta, **{key: other[key] for key in ("triples",) if key in other}}
        out.append(Task(f"{split}-{seed}-{k}", prompt, gold, {**meta, "type": kind, "source": source}))
    return out


def _grid(rng: random.Random, size: int) -> list[Thing]:
    out = []
    for colour in rng.sample(sorted(COLOURS), size):
        w, h = rng.randint(1, 3), rng.randint(1, 3)
        out.append(Thing(colour, rng.choice(sorted(SHAPES)), rng.randint(0, SIDE - w), rng.randint(0, SIDE - h), w, h))
    return out


def _picture(things: Sequence[Thing]) -> str:
    return " grid " + " ; ".join(map(str, things))


def _matching(rng: random.Random, size: int) -> tuple[str, str, dict[str, Any]]:
    things = _grid(rng, size)
    one = rng.choice(things)
    if rng.random() < 0.5:
        there = rng.random() < 0.5
        shape = one.shape if there else rng.choice([s for s in SHAPES if s != one.shape])
        thought = f"{one.colour} {one.shape}"
        return f"{_picture(things)} ? is there a {one.colour} {shape}", "yes" if there else "no", {"thought": thought}
    options = rng.sample(sorted(SHAPES), len(SHAPES))
    listed = " ".join(f"{letter} {shape}" for letter, shape in zip("ABCD", options, strict=True))
    prompt = f"{_picture(things)} ? which shape is {one.colour} {listed}"
    return prompt, "ABCD"[options.index(one.shape)], {"thought": one.shape, "options": options}


def _chart(rng: random.Random, size: int) -> tuple[str, str, dict[str, Any]]:
    heights = {bar: rng.randint(1, HIGHEST) for bar in rng.sample(BARS, size + 1)}
    picture = " bars " + " ; ".join(f"{bar} {value}" for bar, value in heights.items())
    bars = rng.sample(sorted(heights), 2)
    if rng.random() < 0.6:
        return f"{picture} ? value of {bars[0]}", str(heights[bars[0]]), {"thought": bars[0]}
    values = [heights[b] for b in bars]
    return f"{picture} ? sum of {bars[0]} and {bars[1]}", str(sum(values)), {"thought": f"{values[0]} + {values[1]}"}


def _iou(rng: random.Random, size: int) -> tuple[str, list[int], dict[str, Any]]:
    things = _grid(rng, size)
    one = rng.choice(things)
    box = [one.x, one.y, one.x + one.w, one.y + one.h]
    return f"{_picture(things)} ? box of the {one.colour} {one.shape}", box, {"thought": f"{one.x} + {one.w} , {one.y} + {one.h}"}  # fmt: skip


def _open(rng: random.Random, size: int) -> tuple[str, str, dict[str, Any]]:
    things = _grid(rng, size)
    triples = [t.triple for t in things]
    return f"{_picture(things)} ? describe", caption(triples, rng), {"triples": triples, "thought": str(size)}


_MAKE: Mapping[str, Any] = {"matching": _matching, "chart": _chart, "iou": _iou, "open": _open}


def caption(triples: Sequence[tuple[str, str, str]], rng: random.Random | None = None, synonyms: float = 0.3) -> str:
    """ "a red square at the top left , a ...": each word is replaced by its synonym with probability ``synonyms``.

    Args:
        triples: shape, colour and place of each thing.
        rng: of the synonyms; None uses none.
    """

    def say(table: Mapping[str, str], word: str) -> str:
        return table[word] if rng is not None and rng.random() < synonyms else word

    parts = []
    for shape, colour, place in triples:
        row, column = place.split()
        parts.append(f"a {say(COLOURS, colour)} {say(SHAPES, shape)} at the {say(ROWS, row)} {say(COLUMNS, column)}")
    return " , ".join(parts)


def read_triples(text: str) -> Counter[tuple[str, str, str]]:
    """Shape, colour and place of each part between commas that names one of each, synonyms resolved.

    A part that names two colours (or shapes, rows, columns) says nothing definite, and counts as a triple that is wrong.
    """
    found: Counter[tuple[str, str, str]] = Counter()
    for part in text.split(","):
        said: dict[str, list[str]] = {"colour": [], "shape": [], "row": [], "column": []}
        for word in part.split():
            if word in _CANONICAL:
                kind, plain = _CANONICAL[word]
                said[kind].append(plain)
        if any(said.values()):
            one = {kind: words[0] if len(words) == 1 else "?" for kind, words in said.items()}
            found[one["shape"], one["colour"], f"{one['row']} {one['column']}"] += 1
    return found


def triple_f1(text: str, triples: Sequence[Sequence[str]]) -> float:
    """F1 of the things that a caption names against those on the picture, in [0, 1]; both are multisets."""
    said, wanted = read_triples(text), Counter((shape, colour, place) for shape, colour, place in triples)
    both = (said & wanted).total()
    return 2 * both / (said.total() + wanted.total()) if both else 0.0


@dataclass(frozen=True, slots=True)
class Writer:
    """How often demonstrations are wrong.

    Args:
        wrong: chance that an answer (for captions: each thing's properties) is not the right one.
        dropped: chance that a caption leaves a thing out.
        added: chance that a caption names a thing that is not there.
        malformed: chance that the response lacks its thought or the end of its answer.
    """

    wrong: float = 0.5
    dropped: float = 0.25
    added: float = 0.2
    malformed: float = 0.15


def write_response(task: Task, rng: random.Random, writer: Writer | None = None) -> str:
    """``<think> ... </think><answer> ... </answer>`` as a demonstrator writes it, with faults as ``writer`` says."""
    writer = writer or Writer()
    kind, gold = task.meta["type"], task.reference
    if kind == "open":
        answer = caption(_faulty(task.meta["triples"], rng, writer), rng)
    elif rng.random() >= writer.wrong:
        answer = " ".join(map(str, gold)) if kind == "iou" else str(gold)
    elif kind == "iou":
        answer = " ".join(str(min(SIDE, max(0, v + rng.choice((-1, 0, 1))))) for v in gold)
    elif kind == "chart":
        answer = str(min(2 * HIGHEST, max(0, int(gold) + rng.choice((-3, -2, -1, 1, 2, 3)))))
    else:
        answer = rng.choice(("yes", "no") if gold in ("yes", "no") else "ABCD")
    thought = f"<think> {task.meta['thought']}</think>"
    if rng.random() < writer.malformed:
        return rng.choice((f"<answer> {answer}</answer>", f"{thought}<answer> {answer}"))
    return f"{thought}<answer> {answer}</answer>"


def _faulty(triples: Sequence[tuple[str, str, str]], rng: random.Random, writer: Writer) -> list[tuple[str, str, str]]:
    kept = [t for t in triples if rng.random() >= writer.dropped] or [rng.choice(list(triples))]
    out = []
    for shape, colour, place in kept:
        if rng.random() < writer.wrong:
            change = rng.randrange(3)
            shape = rng.choice(sorted(SHAPES)) if change == 0 else shape
            colour = rng.choice(sorted(COLOURS)) if change == 1 else colour
            place = f"{rng.choice(sorted(ROWS))} {rng.choice(sorted(COLUMNS))}" if change == 2 else place
        out.append((shape, colour, place))
    while rng.random() < writer.added:
        out.append((rng.choice(sorted(SHAPES)), rng.choice(sorted(COLOURS)), f"{rng.choice(sorted(ROWS))} {rng.choice(sorted(COLUMNS))}"))  # fmt: skip
    return out
