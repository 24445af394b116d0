"""``seqc inspect``: what an artifact holds. Needs neither torch nor onnxruntime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from seqc.cli.console import State, common_options, human_bytes, peak_line, print_json, table
from seqc.errors import ArtifactError
from seqc.runtime import manifest as manifests
from seqc.runtime.files import check_files
from seqc.runtime.manifest import Manifest, Port
from seqc.runtime.states import memory, state_port


@click.command("inspect")
@click.argument("artifact", metavar="DIR")
@click.option("--text", is_flag=True, help="Print the program instead: its nodes, one per line.")
@common_options
@click.pass_obj
def command(state: State, artifact: str, text: bool) -> None:
    """Show the inputs, outputs, dimensions, passes, files and notes of the artifact DIR (or of a file in it)."""
    path = Path(artifact)
    directory = path.parent if path.is_file() else path
    manifest = manifests.read(directory)
    check_files(directory, manifest)
    program = _read(directory, manifest, "program.txt") if text or state.json else ""
    if state.json:
        raw = json.loads((directory / manifests.MANIFEST_FILE).read_text("utf-8"))
        print_json({"artifact": str(directory), "manifest": raw, **({"text": program} if text else {})})
    elif text:
        click.echo(program.rstrip("\n"))
    else:
        click.echo(describe(directory, manifest))


def _read(directory: Path, manifest: Manifest, name: str) -> str:
    if name not in manifest.files:
        raise ArtifactError(f"{directory}: the artifact has no {name}")
    return (directory / name).read_text("utf-8")


def describe(directory: Path, manifest: Manifest) -> str:
    """The whole manifest for people, one section per kind of fact; empty sections are left out."""
    source = ", ".join(f"{key} {value}" for key, value in manifest.source.items() if value)
    tools = ", ".join(f"{name} {version}" for name, version in manifest.tools.items())
    peak = manifest.peak_activations
    head = [
        ["source", source],
        ["target", f"{manifest.target}, opset {manifest.opset}"],
        ["made with", tools],
        ["memory", peak_line(vars(peak)) if peak else ""],
    ]
    sections = [
        ("inputs", [[p.name, _type(p)] for p in manifest.inputs]),
        ("outputs", [[p.name, _type(p), _tolerance(manifest, p)] for p in manifest.outputs]),
        ("states", _states(manifest)),
        ("dimensions", [[name, str(dim), f"traced at {dim.traced}"] for name, dim in manifest.dims.items()]),
        ("passes", _passes(manifest)),
        ("engines", [[str(e.get("file", "?")), f"sm {e.get('sm', '?')}"] for e in manifest.engines]),
        ("files", [[name, human_bytes(f.bytes), f"sha256 {f.sha256[:12]}"] for name, f in manifest.files.items()]),
        ("notes", [[text] for text in manifest.notes]),
    ]
    parts = [f"{directory}\n{table([row for row in head if row[1]])}"]
    parts += [f"{title}\n{table(rows)}" for title, rows in sections if rows]
    return "\n".join(parts)


def _type(port: Port) -> str:
    return f"{port.dtype}[{', '.join(map(str, port.shape))}]"


def _states(manifest: Manifest) -> list[list[str]]:
    if not manifest.states:
        return []
    taken = memory(state_port(s, manifest.dims) for s in manifest.states)
    more = f", and {human_bytes(taken.per_step)} for each step" if taken.per_step else ""
    return [
        *([s.port.name, _type(s.port)] for s in manifest.states),
        ["in all", f"{human_bytes(taken.fixed)} a row{more}"],
    ]


def _tolerance(manifest: Manifest, port: Port) -> str:
    value: Any = manifest.tolerances.get(port.name)
    return "" if value is None else f"tolerance {value:g}"


def _passes(manifest: Manifest) -> list[list[str]]:
    rows = []
    for applied in manifest.passes:
        first, *rest = applied.reasons or ("",)
        rows.append([applied.name, f"{applied.changes} change{'' if applied.changes == 1 else 's'}", first])
        rows += [["", "", reason] for reason in rest]
    return rows
