"""What a recipe is: metadata of a paper, its claim, and ``reproduce(scale, seeds, out)``.

A later method adds one file here: ``papers/<slug with underscores>.py`` that ends in
``RECIPE = Recipe(...)``. Nothing else has to be edited: recipes are found by their file names.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from guerdon.errors import ConfigError, UnknownName, nearest
from guerdon.papers.evidence import Result

__all__ = ["Recipe", "find", "load", "recorded", "slugs"]

STEPS = ("sample", "score", "shape", "assign", "optimise", "search", "route", "evaluate")
_HELPERS = frozenset({"evidence", "pages", "recipe"})


@dataclass(frozen=True, slots=True)
class Recipe:
    """One paper.

    Attributes:
        slug: name on the command line.
        title: of the paper.
        reference: authors, venue, arXiv number.
        step: which step of the pipeline it changes (one of :data:`STEPS`).
        summary: two or three sentences for the docs page.
        claims: the paper's claims that the recipe tests, in words.
        parts: importable dotted names of the public parts that implement the method.
        reproduce: ``reproduce(scale, seeds, out) -> Result``.
        paper_numbers: headline numbers of the paper.
        needs: extras that its ``cpu`` scale needs.
        seeds: default number of seeds.
    """

    slug: str
    title: str
    reference: str
    step: str
    summary: str
    claims: tuple[str, ...]
    parts: tuple[str, ...]
    reproduce: Callable[[str, Sequence[int], Path], Result]
    paper_numbers: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    seeds: int = 3

    def __post_init__(self) -> None:
        if self.step not in STEPS:
            raise ConfigError(f"step must be one of {', '.join(STEPS)}, got {self.step!r}")


def slugs() -> list[str]:
    """Slugs of all recipes, without importing them."""
    import guerdon.papers as package

    names = {
        info.name.replace("_", "-")
        for info in pkgutil.iter_modules(package.__path__)
        if info.name not in _HELPERS and not info.name.startswith("_")
    }
    return sorted(names | {point.name for point in entry_points(group="guerdon.paper")})


def load(slug: str) -> Recipe:
    """Import one recipe.

    Raises:
        UnknownName: there is none with this slug.
    """
    known = slugs()
    if slug not in known:
        raise UnknownName(f"unknown paper {slug!r}{nearest(slug, known)} (guerdon papers lists them all)")
    for point in entry_points(group="guerdon.paper"):
        if point.name == slug:
            return point.load()
    return importlib.import_module(f"guerdon.papers.{slug.replace('-', '_')}").RECIPE


def find(query: str = "") -> list[Recipe]:
    """Recipes whose metadata contain every word of ``query``, in the order of their slugs."""
    words = query.lower().split()
    found = []
    for slug in slugs():
        recipe = load(slug)
        text = " ".join(
            [recipe.slug, recipe.title, recipe.reference, recipe.step, recipe.summary, *recipe.claims, *recipe.parts]
        ).lower()
        if all(word in text for word in words):
            found.append(recipe)
    return found


def recorded(slug: str) -> dict[str, Any] | None:
    """The last recorded result of a recipe: from the source tree, or from the installed package's copy."""
    here = Path(__file__).resolve()
    for folder in (here.parents[3] / "results", here.parent / "_results"):
        path = folder / f"{slug}.json"
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
    return None
