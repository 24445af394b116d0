"""``seqc targets``: what can be compiled for."""

from __future__ import annotations

import click

from seqc.cli.console import State, common_options, print_json, table


@click.command("targets")
@common_options
@click.pass_obj
def command(state: State) -> None:
    """List the targets and the opsets they take."""
    from seqc.target import TARGETS

    rows = [(t.name, t.summary, [int(n) for n in t.opsets]) for t in TARGETS.values()]
    if state.json:
        print_json({"targets": [{"name": n, "summary": s, "opsets": o} for n, s, o in rows]})
    else:
        click.echo(table([[n, f"opset {min(o)} to {max(o)}" if o else "", s] for n, s, o in rows], indent=""))
