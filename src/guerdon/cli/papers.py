"""``guerdon papers`` and ``guerdon reproduce``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from guerdon.cli.common import emit, guarded, progress


@guarded
def papers_command(
    query: Annotated[list[str] | None, typer.Argument(help="Words that the recipe must contain.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the recipes: slug, title, step of the pipeline, public parts, last recorded verdict.

    Example: guerdon papers routing cost
    """
    from guerdon.papers import find, recorded

    rows = []
    for recipe in find(" ".join(query or [])):
        last = recorded(recipe.slug)
        verdict = "not recorded" if last is None else ("holds" if last.get("holds") else "does not hold")
        rows.append(
            {
                "slug": recipe.slug,
                "title": recipe.title,
                "step": recipe.step,
                "parts": list(recipe.parts),
                "verdict": verdict,
                "scale": None if last is None else last["scale"],
            }
        )
    if as_json:
        emit(rows, as_json=True)
        return
    if not rows:
        progress(f"no recipe contains {' '.join(query or [])!r}; guerdon papers lists them all")
        return
    from guerdon.report.table import plain_table

    print(
        plain_table(
            ["slug", "step", "verdict", "title"], [[r["slug"], r["step"], r["verdict"], r["title"]] for r in rows]
        )
    )


@guarded
def reproduce_command(
    slug: Annotated[str, typer.Argument(help="Which recipe; `guerdon papers` lists them.")],
    scale: Annotated[str, typer.Option(help="smoke (seconds, asserts nothing), cpu (minutes) or gpu.")] = "cpu",
    seeds: Annotated[int | None, typer.Option(help="Number of seeds; the recipe's own default otherwise.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for result.json; runs/<slug>-<scale> otherwise.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Run a paper's claim and print the verdict.

    Exits 0 when every claim holds, 1 when one does not, 2 on bad input.

    Example: guerdon reproduce router-r1 --scale cpu --seeds 3
    """
    from guerdon.cli.common import fresh_or_resumable
    from guerdon.errors import ConfigError
    from guerdon.papers import load
    from guerdon.papers.evidence import require_scale
    from guerdon.report.table import plain_table

    scale = require_scale(scale)
    if seeds is not None and seeds < 1:
        raise ConfigError(f"--seeds must be at least 1, got {seeds}")
    recipe = load(slug)
    folder = fresh_or_resumable(out or Path("runs") / f"{slug}-{scale}")
    result = recipe.reproduce(scale, tuple(range(seeds or (1 if scale == "smoke" else recipe.seeds))), folder)
    path = result.write(folder)
    progress(f"wrote {path}")
    if as_json:
        emit(result.to_dict(), as_json=True)
    else:
        rows = [
            [
                c.name,
                f"{c.estimate:+.4f}",
                f"[{c.ci_low:+.4f}, {c.ci_high:+.4f}]",
                f"{c.p_value:.4f}",
                _verdict(c.holds),
            ]
            for c in result.claims
        ]
        print(plain_table(["claim", "estimate", "95% interval", "p", "verdict"], rows))
        for claim in result.claims:
            print(f"  {claim.name}: {claim.statement}")
        if scale == "smoke":
            print("smoke only shows that it runs: no claim is asserted")
    raise typer.Exit(0 if result.holds else 1)


def _verdict(holds: bool | None) -> str:
    return "not asserted" if holds is None else ("holds" if holds else "DOES NOT HOLD")
