"""``seqc passes``: the rewrites that the compiler applies."""

from __future__ import annotations

import inspect
from typing import Any

import click

from seqc.cli.console import State, common_options, print_json, table


@click.command("passes")
@common_options
@click.pass_obj
def command(state: State) -> None:
    """List the passes in the order in which they run, with the error each may cause."""
    from seqc.passes import DEFAULT

    rows: list[tuple[Any, str]] = [(p, (inspect.getdoc(type(p)) or "").partition("\n")[0]) for p in DEFAULT]
    if state.json:
        print_json({"passes": [{"name": p.name, "tolerance": p.tolerance, "summary": text} for p, text in rows]})
    else:
        lines = [[p.name, "bitwise" if p.tolerance == 0 else f"within {p.tolerance:g}", text] for p, text in rows]
        click.echo(table(lines, indent=""))
