"""Health text in two styles: sentences full of medical terms, and the same facts in plain words; generated, with gold.

80 pairs of a term and its plain word, twelve frames. A complex text has jargon, a relative clause and the passive; its
plain form has plain words and split sentences. Half of the originals have short sentences already and only the jargon, as
in real corpora, where a style cannot be told by its sentences alone. Both carry the same facts: an organ, a number, a piece of advice, and
whether something is denied. Two domains share the frames and half of each one's terms. What is wanted of a rewriting,
and never rewarded, is the share of terms that became the right plain word and the share of facts that survived
(:func:`judge_rewriting`).

After the testbed of the corpus SimpleDC: Rahman et al. 2024, "Health Text Simplification" (arXiv 2401.15043).
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from guerdon.errors import ConfigError
from guerdon.types import Score, Task

__all__ = [
    "TERMS",
    "Facts",
    "Habits",
    "Pair",
    "complex_text",
    "domain_terms",
    "judge_rewriting",
    "make_pairs",
    "plain_text",
    "rewriting_tasks",
    "rough_rewriting",
    "simplification_words",
]

CONDITIONS = {
    "hypertension": "high blood pressure", "malignancy": "cancer", "metastasis": "cancer spread", "pyrexia": "fever",
    "dyspepsia": "upset tummy", "dysphagia": "trouble swallowing", "jaundice": "yellow eyes", "ascites": "belly fluid",
    "haemorrhage": "heavy bleeding", "emesis": "throwing up", "myalgia": "muscle pain", "pruritus": "itching",
    "oedema": "swelling", "fatigue": "tiredness", "anaemia": "low iron", "dyspnoea": "short breath",
    "constipation": "hard stools", "cephalalgia": "headache", "vertigo": "dizziness", "alopecia": "hair loss",
    "anorexia": "poor appetite", "insomnia": "bad sleep", "hyperglycaemia": "high blood sugar", "sepsis": "blood poisoning",
    "thrombosis": "blood clot", "nausea": "feeling sick", "neuropathy": "nerve pain", "arthralgia": "joint pain",
    "dermatitis": "red rash", "pneumonia": "chest infection", "cachexia": "weight loss", "lesion": "sore",
    "neoplasm": "growth", "calculus": "stone", "stenosis": "narrow passage", "obstruction": "blockage",
    "perforation": "hole", "laceration": "cut", "contusion": "bruise", "fracture": "broken bone",
}  # fmt: skip
TREATMENTS = {
    "analgesics": "painkillers", "antibiotics": "germ killers", "chemotherapy": "cancer drugs", "resection": "cutting it out",
    "radiotherapy": "x-ray treatment", "anticoagulants": "blood thinners", "antiemetics": "sickness pills",
    "diuretics": "water pills", "laxatives": "toilet pills", "antipyretics": "fever pills", "sedatives": "sleep pills",
    "immunotherapy": "immune drugs", "transfusion": "new blood", "dialysis": "blood cleaning", "endoscopy": "a camera test",
    "biopsy": "a tissue test", "venepuncture": "a blood test", "radiography": "an x-ray", "ultrasonography": "a sound scan",
    "tomography": "a body scan", "catheterisation": "a thin tube", "intubation": "a breathing tube",
    "infusion": "a drip", "injection": "a shot", "inoculation": "a vaccine", "suturing": "stitches",
    "anaesthesia": "numbing", "physiotherapy": "exercise", "hydration": "more fluids", "supplementation": "extra vitamins",
    "corticosteroids": "swelling drugs", "antacids": "acid pills", "antihistamines": "allergy pills",
    "insulin": "sugar shots", "transplantation": "a new organ", "excision": "cutting", "irrigation": "washing",
    "palliation": "comfort care", "surveillance": "regular checks", "rehabilitation": "recovery training",
}  # fmt: skip
TERMS = {**CONDITIONS, **TREATMENTS}
"""Term to plain word: 40 conditions, then 40 treatments."""

ORGANS = ("liver", "colon", "stomach", "kidney", "pancreas", "bladder", "throat", "bowel", "lung", "skin")
NUMBERS = tuple(str(n) for n in range(2, 31))
ADVICE = {
    "the consumption of alcohol is to be avoided": "please avoid drinking any alcohol during this time",
    "immediate consultation of a physician is recommended": "please call your family doctor about it very soon",
    "adequate repose is to be ensured": "make sure that you are resting enough every day",
    "the ingestion of solid nutrition is to be postponed": "wait a little longer before you are eating solid food",
    "cessation of tobacco use is strongly encouraged": "try very hard to give up smoking altogether",
    "regular physical activity is to be maintained": "keep your body moving a little every single day",
}
"""Advice to its plain form."""

_COMPLEX = (
    "The {c} , which was identified in the {o} , is {not}managed by {t} over a period of {n} days , and {a} .",
    "Although {c} was observed in the {o} , {t} is {not}administered for {n} days , and {a} .",
    "In patients whose {o} is affected by {c} , {t} is {not}indicated for {n} days , and {a} .",
    "The {c} , by which the {o} is compromised , is {not}alleviated through {t} within {n} days , and {a} .",
    "Following the detection of {c} in the {o} , {t} is {not}prescribed for {n} days , and {a} .",
    "Since the {o} has been impaired by {c} , {t} is {not}required for {n} days , and {a} .",
)
_PLAIN = (
    "The doctor found that you have {c} in your {o} . It is {not}going to be treated with {t} in the next {n} days , and {a} .",
    "The pictures show that there is {c} in your {o} . You will {not}be given {t} during the next {n} days , and {a} .",
    "People who have {c} in the {o} are seen very often . You should {not}receive {t} for the next {n} days , and {a} .",
    "The doctor thinks that {c} has hurt your {o} already . It will {not}get better with {t} within {n} days , and {a} .",
    "After looking very closely we found {c} in your {o} . You are {not}going to get {t} for about {n} days , and {a} .",
    "Your doctor believes that your {o} is hurting because of {c} . You do {not}need any {t} for the next {n} days , and {a} .",
)
# The same six with the advice in front make twelve frames.
_SWAPPED_COMPLEX = tuple(
    f"It is to be noted that {{a}} ; {f[0].lower()}{f[1:].replace(' , and {a} .', ' .')}" for f in _COMPLEX
)
_SWAPPED_PLAIN = tuple(
    f"From now on {{a}} , because {f[0].lower()}{f[1:].replace(' , and {a} .', ' .')}" for f in _PLAIN
)
FRAMES = tuple(zip((*_COMPLEX, *_SWAPPED_COMPLEX), (*_PLAIN, *_SWAPPED_PLAIN), strict=True))
"""Twelve pairs of a complex frame and its plain form."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a text says: two terms, an organ, a number of days, a piece of advice (its complex form), and a denial.

    ``frame`` is how it is said, ``short`` whether the original is in plain sentences (its words are not).
    """

    condition: str
    treatment: str
    organ: str
    number: str
    advice: str
    denied: bool
    frame: int
    short: bool = False


@dataclass(frozen=True, slots=True)
class Pair:
    """An original with its simplification, on a page; pages, never sentences, are divided into splits."""

    id: str
    domain: str
    page: str
    split: str
    original: str
    simplified: str
    facts: Facts


def domain_terms(domain: Literal["A", "B"]) -> list[str]:
    """53 or 54 terms of a domain; 27 are in both, of 80 in all.

    Raises:
        ConfigError: another domain.
    """
    if domain not in ("A", "B"):
        raise ConfigError(f"domain must be 'A' or 'B', got {domain!r}")
    # Every third term is common, so that both domains have conditions and treatments of each kind.
    own = 1 if domain == "A" else 2
    return [t for k, t in enumerate(TERMS) if k % 3 in (0, own)]


def complex_text(facts: Facts) -> str:
    """The original."""
    advice = ADVICE[facts.advice] if facts.short else facts.advice
    return _fill(FRAMES[facts.frame][facts.short], facts, facts.condition, facts.treatment, advice)


def plain_text(facts: Facts) -> str:
    """Its simplification."""
    return _fill(FRAMES[facts.frame][1], facts, TERMS[facts.condition], TERMS[facts.treatment], ADVICE[facts.advice])


def _fill(frame: str, facts: Facts, condition: str, treatment: str, advice: str) -> str:
    return frame.format(
        c=condition, t=treatment, o=facts.organ, n=facts.number, a=advice, **{"not": "not " if facts.denied else ""}
    )


def draw_facts(domain: Literal["A", "B"], rng: random.Random) -> Facts:
    """Facts with terms of a domain."""
    known = domain_terms(domain)
    return Facts(
        rng.choice([t for t in known if t in CONDITIONS]), rng.choice([t for t in known if t in TREATMENTS]),
        rng.choice(ORGANS), rng.choice(NUMBERS), rng.choice(list(ADVICE)), rng.random() < 0.4, rng.randrange(len(FRAMES)), rng.random() < 0.5,
    )  # fmt: skip


def make_pairs(
    n: int, domain: Literal["A", "B"], *, split: str = "train", seed: int = 0, per_page: int = 8
) -> list[Pair]:
    """``n`` pairs.

    Args:
        n: pairs.
        domain: see :func:`domain_terms`.
        split: part of the pages' names and of the draw: no page is in two splits.
        seed: of the facts.
        per_page: pairs of a page.
    """
    rng = random.Random(f"simplification-{domain}-{split}-{seed}")
    out = []
    for k in range(n):
        facts = draw_facts(domain, rng)
        name = f"{domain}-{split}-{seed}"
        out.append(Pair(f"{name}-{k}", domain, f"{name}/page-{k // per_page}", split, complex_text(facts), plain_text(facts), facts))  # fmt: skip
    return out


def rewriting_tasks(pairs: Sequence[Pair]) -> list[Task]:
    """Tasks that show the original alone: no reference, no gold that a reward could read but for ``meta["facts"]``."""
    return [Task(p.id, f" {p.original}", p.original, {"source": p.original, "facts": p.facts}) for p in pairs]


def simplification_words() -> list[str]:
    """Every word, number and mark of the testbed with the blank before it, and whole plain words of several words."""
    text = " ".join(f"{a} {b}" for a, b in FRAMES).replace("{not}", "not ")
    words = re.sub(r"\{\w+\}", " ", text).split()
    advice = " ".join([*ADVICE, *ADVICE.values()]).split()
    return [f" {w}" for w in dict.fromkeys([*TERMS, *TERMS.values(), *ORGANS, *NUMBERS, *words, *advice])]


_CLAIM_NOT = re.compile(r"\bnot\b")


def judge_rewriting(output: str, facts: Facts) -> Score:
    """Harmonic mean of the two hidden measures, in [0, 1].

    Parts:
        ``terms``: share of the two terms whose right plain word is there and which are gone themselves.
        ``facts``: share of the four facts that are recovered exactly: the organ (and no other), the number (and no other),
        the advice in plain or complex form (and no other), and a denial if and only if there was one.
    """
    padded = f" {' '.join(output.split())} "
    terms = sum(f" {TERMS[t]} " in padded and f" {t} " not in padded for t in (facts.condition, facts.treatment)) / 2
    words = padded.split()
    advice = {c for c, p in ADVICE.items() if c in padded or p in padded}
    kept = (
        {w for w in words if w in ORGANS} == {facts.organ},
        {w for w in words if w.isdigit()} == {facts.number},
        advice == {facts.advice},
        bool(_CLAIM_NOT.search(padded)) == facts.denied,
    )
    preserved = sum(kept) / len(kept)
    value = 2 * terms * preserved / (terms + preserved) if terms + preserved else 0.0
    return Score(value, parts={"terms": terms, "facts": preserved})


@dataclass(frozen=True, slots=True)
class Habits:
    """How a rough rewriter works; chances per text, but for terms (each).

    Args:
        copied: the original is copied as it stands.
        kept, wrong: a term is left as it is; it becomes the plain word of another term of its kind.
        dropped: a fact (organ, number, advice, denial) is left out or altered.
        chopped: sentences are broken up into fragments, without some of their words.
    """

    copied: float = 0.1
    kept: float = 0.35
    wrong: float = 0.3
    dropped: float = 0.15
    chopped: float = 0.15


def rough_rewriting(facts: Facts, rng: random.Random, habits: Habits | None = None) -> str:
    """A rewriting by somebody who has read much and understood some of it: what a pretrained model knows of the words."""
    habits = habits or Habits()
    if rng.random() < habits.copied:
        return complex_text(facts)

    def say(term: str, table: dict[str, str]) -> str:
        chance = rng.random()
        if chance < habits.kept:
            return term
        return table[rng.choice(list(table))] if chance < habits.kept + habits.wrong else table[term]

    changed = replace(
        facts,
        organ=rng.choice(ORGANS) if rng.random() < habits.dropped else facts.organ,
        number=rng.choice(NUMBERS) if rng.random() < habits.dropped else facts.number,
        advice=rng.choice(list(ADVICE)) if rng.random() < habits.dropped else facts.advice,
        denied=rng.random() < 0.5 if rng.random() < habits.dropped else facts.denied,
        frame=rng.randrange(len(FRAMES)) if rng.random() < 0.3 else facts.frame,
    )
    text = _fill(
        FRAMES[changed.frame][1], changed, say(facts.condition, CONDITIONS), say(facts.treatment, TREATMENTS),
        ADVICE[changed.advice],
    )  # fmt: skip
    return _chopped(text, rng) if rng.random() < habits.chopped else text


def _chopped(text: str, rng: random.Random) -> str:
    out: list[str] = []
    for sentence in text.split(" . "):
        words = [w for w in sentence.split() if w != "."]
        keep = [w for w in words if rng.random() > 0.25] or words[:1]
        cut = rng.randrange(1, len(keep)) if len(keep) > 3 else len(keep)
        out += [" ".join(part) for part in (keep[:cut], keep[cut:]) if part]
    return " . ".join(out) + " ."


def summary(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Numbers of a corpus: pairs, pages, and words of originals and simplifications on average."""
    n = max(1, len(pairs))
    return {
        "pairs": len(pairs),
        "pages": len({p.page for p in pairs}),
        "words of originals": sum(len(p.original.split()) for p in pairs) / n,
        "words of simplifications": sum(len(p.simplified.split()) for p in pairs) / n,
    }
