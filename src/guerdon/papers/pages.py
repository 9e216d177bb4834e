"""Docs pages of the recipes, generated from their metadata and recorded results: ``python -m guerdon.papers.pages docs``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from guerdon.papers.recipe import Recipe, find, recorded

__all__ = ["index", "page", "write_pages"]


def page(recipe: Recipe, last: dict[str, Any] | None) -> str:
    """Markdown of one recipe."""
    lines = [
        f"# {recipe.slug}",
        "",
        f"**{recipe.title}**  ",
        f"{recipe.reference}",
        "",
        recipe.summary,
        "",
        f"Step of the pipeline: **{recipe.step}**.",
        "",
        "## What it claims",
        "",
        *(f"- {claim}" for claim in recipe.claims),
        "",
        "## Run it",
        "",
        "```",
        f"guerdon reproduce {recipe.slug} --scale cpu",
        "```",
        "",
        "## Parts",
        "",
        *(f"- `{part}`" for part in recipe.parts),
        "",
    ]
    if last is None:
        return "\n".join([*lines, "No result is recorded yet.", ""])
    versions = ", ".join(f"{k} {v}" for k, v in last["environment"].get("versions", {}).items())
    lines += [
        "## Recorded result",
        "",
        f"Scale `{last['scale']}`, seeds {', '.join(map(str, last['seeds']))}, {last['duration_s'] / 60:.1f} minutes on "
        f"{last['environment'].get('cores', '?')} cores ({last['environment'].get('device', 'cpu')}; {versions}).",
        "",
        "| claim | statement | estimate | 95% interval | verdict |",
        "|---|---|---|---|---|",
        *(
            f"| {c['name']} | {c['statement']} | {_number(c['estimate'])} | [{_number(c['ci_low'])}, {_number(c['ci_high'])}] | "
            f"{'holds' if c['holds'] else 'not asserted' if c['holds'] is None else '**does not hold**'} |"
            for c in last["claims"]
        ),
        "",
    ]
    if last.get("notes"):
        lines += [last["notes"], ""]
    if last.get("paper_numbers"):
        lines += ["## The paper's numbers", "", "| what | value |", "|---|---|"]
        lines += [f"| {k} | {v} |" for k, v in last["paper_numbers"].items()]
        lines.append("")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:+.4g}"


def index(recipes: list[Recipe]) -> str:
    """Markdown of the list of all recipes."""
    rows = []
    for recipe in recipes:
        last = recorded(recipe.slug)
        verdict = "not recorded" if last is None else "holds" if last.get("holds") else "does not hold"
        rows.append(f"| [{recipe.slug}]({recipe.slug}.md) | {recipe.title} | {recipe.step} | {verdict} |")
    head = ["# Papers", "", "Every method is a recipe with its claim as a command and its last recorded verdict.", ""]
    return "\n".join([*head, "| slug | paper | step | verdict |", "|---|---|---|---|", *rows, ""])


def write_pages(docs: Path) -> list[Path]:
    """Write ``docs/papers/*.md``; returns what was written."""
    folder = docs / "papers"
    folder.mkdir(parents=True, exist_ok=True)
    recipes = find()
    written = []
    for name, text in [("index.md", index(recipes)), *((f"{r.slug}.md", page(r, recorded(r.slug))) for r in recipes)]:
        (folder / name).write_text(text, encoding="utf-8")
        written.append(folder / name)
    return written


if __name__ == "__main__":
    for path in write_pages(Path(sys.argv[1] if len(sys.argv) > 1 else "docs")):
        print(path)
