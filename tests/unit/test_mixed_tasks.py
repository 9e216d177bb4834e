"""Pictures as symbols: what is asked has one right answer, demonstrations err as often as told, captions are read back."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guerdon.environments.mixed_tasks import (
    COLOURS,
    SHAPES,
    TYPES,
    Writer,
    caption,
    mixed_tasks,
    mixed_words,
    read_triples,
    triple_f1,
    write_response,
)
from guerdon.errors import ConfigError
from guerdon.rewards import BoxIoU, ChoiceMatch, RelaxedNumber, ThinkAnswerFormat, last_block

PERFECT = Writer(wrong=0, dropped=0, added=0, malformed=0)


def parse(question: str) -> tuple[list[tuple[str, str, list[int]]], str]:
    """Things on a grid and what is asked, read from the prompt alone."""
    picture, asked = question.split(" ? ")
    things = []
    for part in picture.removeprefix(" grid ").split(" ; "):
        colour, shape, *box = part.split()
        things.append((colour, shape, [int(x) for x in box]))
    return things, asked


def test_golds_follow_from_the_prompt_alone() -> None:
    for task in mixed_tasks(400, seed=3):
        if task.meta["type"] == "chart":
            picture, asked = task.question.split(" ? ")
            bars = {p.split()[0]: int(p.split()[1]) for p in picture.removeprefix(" bars ").split(" ; ")}
            names = [w for w in asked.split() if w in bars]
            assert task.reference == str(sum(bars[n] for n in names)) and len(names) == 1 + asked.startswith("sum")
            continue
        things, asked = parse(task.question)
        assert len({colour for colour, _, _ in things}) == len(things)
        words = asked.split()
        if task.meta["type"] == "iou":
            x, y, w, h = next(box for colour, shape, box in things if [colour, shape] == words[-2:])
            assert task.reference == [x, y, x + w, y + h] and max(x + w, y + h) <= 8
        elif words[0] == "is":
            there = any([colour, shape] == words[-2:] for colour, shape, _ in things)
            assert task.reference == ("yes" if there else "no")
        elif words[0] == "which":
            shape = next(shape for colour, shape, _ in things if colour == words[3])
            assert words[words.index(task.reference) + 1] == shape
        else:
            assert [t[:2] for t in task.meta["triples"]] == [(shape, colour) for colour, shape, _ in things]
            assert triple_f1(task.reference, task.meta["triples"]) == 1.0


def test_types_come_in_turn_and_sources_are_named() -> None:
    tasks = mixed_tasks(40, sizes=(2,))
    assert [t.meta["type"] for t in tasks] == list(TYPES) * 10
    assert {t.meta["source"] for t in tasks} == {f"{kind}-2" for kind in TYPES}
    assert [t.question for t in tasks] == [t.question for t in mixed_tasks(40, sizes=(2,))]
    assert not {t.question for t in tasks} & {t.question for t in mixed_tasks(40, sizes=(2,), split="test")}
    assert len({t.id for t in tasks}) == 40
    broken = mixed_tasks(2000, broken=0.3)
    assert sum(t.meta["source"] == "broken" for t in broken) / 2000 == pytest.approx(0.3, abs=0.04)
    assert sum(t.reference == "yes" for t in broken) == pytest.approx(sum(t.reference == "no" for t in broken), rel=0.3)


@pytest.mark.parametrize("options", [{"types": ()}, {"types": ("maths",)}, {"sizes": ()}, {"sizes": (0,)}, {"sizes": (6,)}])  # fmt: skip
def test_what_does_not_exist_is_refused(options) -> None:
    with pytest.raises(ConfigError):
        mixed_tasks(1, **options)


def test_every_word_is_one_token() -> None:
    known = {w.strip() for w in mixed_words()}
    rng = random.Random(0)
    for task in mixed_tasks(200, broken=0.2):
        said = write_response(task, rng)
        for tag in ("<think>", "</think>", "<answer>", "</answer>"):
            said = said.replace(tag, " ")
        assert set(task.question.split()) | set(said.split()) <= known


def test_a_perfect_writer_earns_everything() -> None:
    rng = random.Random(0)
    rewards = {"matching": ChoiceMatch(), "chart": RelaxedNumber(), "iou": BoxIoU()}
    for task in mixed_tasks(80):
        said = write_response(task, rng, PERFECT)
        assert ThinkAnswerFormat()([said])[0] == 1.0
        if task.meta["type"] == "open":
            assert triple_f1(str(last_block(said, "answer")), task.meta["triples"]) == 1.0
        else:
            assert rewards[task.meta["type"]]([said], [task.reference])[0] == 1.0


def test_a_poor_writer_errs_as_often_as_told() -> None:
    rng = random.Random(0)
    tasks = mixed_tasks(4000)
    said = [write_response(t, rng, Writer(wrong=0.5, malformed=0.2)) for t in tasks]
    assert ThinkAnswerFormat()(said).mean() == pytest.approx(0.8, abs=0.02)
    chart = [k for k, t in enumerate(tasks) if t.meta["type"] == "chart"]
    right = RelaxedNumber()([said[k] for k in chart], [tasks[k].reference for k in chart]).mean()
    assert right == pytest.approx(0.5, abs=0.06)
    f1 = np.mean(
        [
            triple_f1(last_block(s, "answer") or "", t.meta["triples"])
            for s, t in zip(said, tasks, strict=True)
            if "triples" in t.meta
        ]
    )
    assert 0.2 < f1 < 0.7


def test_triples_by_hand() -> None:
    text = "a crimson box at the upper left , a blue disc at the middle centre"
    wanted = [("square", "red", "top left"), ("circle", "blue", "bottom centre")]
    assert read_triples(text) == Counter({wanted[0]: 1, ("circle", "blue", "middle centre"): 1})
    assert triple_f1(text, wanted) == 0.5
    assert triple_f1(text, wanted[:1]) == pytest.approx(2 / 3)
    assert triple_f1("", wanted) == 0.0 and triple_f1("nothing here", wanted) == 0.0
    # an enumeration is no description, and neither is the same thing twice
    assert triple_f1("a red blue square at the top left", wanted) == 0.0
    assert triple_f1(f"{caption(wanted[:1])} , {caption(wanted[:1])}", wanted[:1]) == pytest.approx(2 / 3)


triples = st.lists(
    st.tuples(st.sampled_from(sorted(SHAPES)), st.sampled_from(sorted(COLOURS)), st.sampled_from(["top left", "middle right"])),
    min_size=1, max_size=5,
)  # fmt: skip


@given(triples, st.integers(0, 2**20))
@settings(max_examples=60, deadline=None)
def test_captions_are_read_back_whatever_the_synonyms(wanted, seed) -> None:
    assert read_triples(caption(wanted, random.Random(seed), synonyms=0.7)) == Counter(wanted)
    assert triple_f1(caption(wanted[::-1]), wanted) == 1.0


@given(st.text(max_size=80), triples)
@settings(max_examples=60, deadline=None)
def test_any_text_has_an_f1(text, wanted) -> None:
    assert 0.0 <= triple_f1(text, wanted) <= 1.0
