"""``seqc targets``: what can be compiled for."""

from __future__ import annotations

import click

from seqc.cli.console import State, common_options, print_json, table


@click.command("targets")
@common_options
@click.pass_obj
def command(state: State) -> None:
    """List the targets, the opsets they take, and the forms in which recurrences can be written."""
    from seqc.lowerings import FORMS
    from seqc.target import TARGETS

    rows = [(t.name, t.summary, [int(n) for n in t.opsets]) for t in TARGETS.values()]
    if state.json:
        targets = [{"name": n, "summary": s, "opsets": o} for n, s, o in rows]
        print_json({"targets": targets, "lowerings": {op: list(names) for op, names in FORMS.items()}})
    else:
        click.echo(table([[n, f"opset {min(o)} to {max(o)}" if o else "", s] for n, s, o in rows], indent=""))
        click.echo("\nforms, in the order in which they are tried (force one with --opt lowering.OP=FORM):")
        click.echo(table([[op, ", ".join(names)] for op, names in FORMS.items()]))
