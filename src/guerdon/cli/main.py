"""``guerdon``: the command line's entry point; each group of commands lives in a file of its own."""

from __future__ import annotations

from typing import Annotated

import typer

from guerdon import __version__
from guerdon.cli.common import STATE
from guerdon.cli.papers import papers_command, reproduce_command
from guerdon.cli.route import app as route_app
from guerdon.cli.score import score_command
from guerdon.cli.serve import keys_app, serve_command
from guerdon.cli.serve_rewards import serve_rewards_command
from guerdon.cli.train import train_command

app = typer.Typer(
    name="guerdon",
    help="Reward: define it, learn it, optimise against it, route with it, and check that it means what you meant.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(show: bool) -> None:
    if show:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option(help="Show tracebacks of user errors too.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    STATE.debug = debug


app.command("papers")(papers_command)
app.command("reproduce")(reproduce_command)
app.command("score")(score_command)
app.command("serve")(serve_command)
app.command("serve-rewards")(serve_rewards_command)
app.command("train")(train_command)
app.add_typer(keys_app, name="keys")
app.add_typer(route_app, name="route")


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
