"""``seqc inspect``: what an artifact holds. Needs neither torch nor onnxruntime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from seqc.cli.console import State, common_options, engine_line, human_bytes, peak_line, print_json, table
from seqc.errors import ArtifactError, UsageError
from seqc.runtime import manifest as manifests
from seqc.runtime.files import check_files
from seqc.runtime.manifest import Manifest, Port
from seqc.runtime.states import memory, state_port


@click.command("inspect")
@click.argument("artifact", metavar="DIR")
@click.option("--text", is_flag=True, help="Print the program instead: its nodes, one per line.")
@click.option("--engine", is_flag=True, help="Print the kernels of the engines instead, and the lines they come from.")
@common_options
@click.pass_obj
def command(state: State, artifact: str, text: bool, engine: bool) -> None:
    """Show the inputs, outputs, dimensions, passes, files and notes of the artifact DIR (or of a file in it)."""
    path = Path(artifact)
    directory = path.parent if path.is_file() else path
    manifest = manifests.read(directory)
    check_files(directory, manifest)
    if text and engine:
        raise UsageError("--text and --engine exclude each other")
    program = _read(directory, manifest, "program.txt") if text or state.json else ""
    engines = _engines(directory, manifest) if engine else []
    if state.json:
        raw = json.loads((directory / manifests.MANIFEST_FILE).read_text("utf-8"))
        more = {"text": program} if text else {"engines": engines} if engine else {}
        print_json({"artifact": str(directory), "manifest": raw, **more})
    elif text:
        click.echo(program.rstrip("\n"))
    elif engine:
        told = {entry["file"]: engine_line(entry) for entry in manifest.engines}
        click.echo("\n".join(f"{e['file']}: {told[e['file']]}\n{table(kernel_rows(e['kernels']))}" for e in engines))
    else:
        click.echo(describe(directory, manifest))


def _read(directory: Path, manifest: Manifest, name: str) -> str:
    if name not in manifest.files:
        raise ArtifactError(f"{directory}: the artifact has no {name}")
    return (directory / name).read_text("utf-8")


def _engines(directory: Path, manifest: Manifest) -> list[dict[str, Any]]:
    """What the report says of the engines."""
    if not manifest.engines:
        raise ArtifactError(f"{directory} holds no engines: compile it with --target tensorrt-rtx")
    engines: list[dict[str, Any]] = json.loads(_read(directory, manifest, "report.json"))["engines"]
    return engines


def kernel_rows(kernels: list[dict[str, Any]]) -> list[list[str]]:
    """A row for each kernel: its number, kind, ONNX operators, modules and source lines; those in a loop are marked."""
    rows = []
    for number, kernel in enumerate(kernels, 1):
        operators = [node.partition("_")[0] for node in kernel["nodes"]]
        counted = [f"{n} {name}" if (n := operators.count(name)) > 1 else name for name in dict.fromkeys(operators)]
        places = [*kernel["modules"], *kernel["source"]]
        mark = "each step" if kernel["in_loop"] else ""
        rows.append([str(number), kernel["kind"], mark, ", ".join(counted) or kernel["name"], "; ".join(places)])
    return rows


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
        ("engines", [[str(e["file"]), engine_line(e)] for e in manifest.engines]),
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
