"""``seqc compile``: a model file to an artifact directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from seqc.cli.console import Progress, State, common_options, engine_line, human_bytes, peak_line, print_json, table
from seqc.cli.inputs import draw, fixed_sizes, parse_dynamic, parse_input, read_npz
from seqc.errors import UsageError
from seqc.options import FAMILIES, OPTIONS, Option, parse_options

if TYPE_CHECKING:
    import torch
    from torch import nn

    from seqc.frontend.load import Loaded


def _told(option: Option) -> str:
    default = "" if option.default is None else f"={'all' if option.default == () else option.default}"
    return f"{option.name}{default} ({option.help}; {option.allowed})"


_EPILOG = "Options for --opt: " + "; ".join(map(_told, (*OPTIONS.values(), *FAMILIES.values())))


@click.command("compile", epilog=_EPILOG)
@click.argument("source", metavar="SRC")
@click.option("-o", "--output", required=True, metavar="DIR", help="Where the artifact is written.")
@click.option("--target", default="onnx", show_default=True, help="What to compile for; see `seqc targets`.")
@click.option("--entry", metavar="PKG.MOD:FACTORY", help="Builds the module that a weights file belongs to.")
@click.option(
    "--input",
    "specs",
    multiple=True,
    metavar="NAME=DTYPE[SIZES]",
    help="An input, such as x=float32[batch,seq,4]. Names are dynamic (NAME:MIN:MAX limits them), numbers are fixed. "
    "int64<N>[...] draws example values from [0, N).",
)
@click.option("--inputs", "inputs_file", metavar="F.npz", help="Example inputs, one array per input.")
@click.option("--dynamic", multiple=True, metavar="NAME:AXIS=DIM", help="Make an axis of an input dynamic.")
@click.option("--stateful", is_flag=True, help="Take sequences piece by piece: derive the step form and its states.")
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    help="What the model computes in, but for states, decays, norms and softmax; the same as --opt dtype=...",
)
@click.option("--opset", type=int, metavar="N", help="ONNX opset of the result.")
@click.option("--passes", metavar="+A,-B", help="Passes to add or leave out; see `seqc passes`.")
@click.option("--opt", "options", multiple=True, metavar="KEY=VALUE", help="An option of the compiler.")
@click.option("--allow-pickle", is_flag=True, help="Load files that execute code when they are loaded.")
@click.option("--no-check", is_flag=True, help="Do not compare the result with the source model.")
@common_options
@click.pass_obj
def command(
    state: State,
    source: str,
    output: str,
    target: str,
    entry: str | None,
    specs: tuple[str, ...],
    inputs_file: str | None,
    dynamic: tuple[str, ...],
    stateful: bool,
    dtype: str | None,
    opset: int | None,
    passes: str | None,
    options: tuple[str, ...],
    allow_pickle: bool,
    no_check: bool,
) -> None:
    """Compile SRC to an artifact directory and check it against SRC.

    SRC is a torch.export archive, a TorchScript archive, a pickled module (--allow-pickle), weights (--entry), or a
    Hugging Face model directory. Without --input, --inputs or what SRC implies, seqc cannot know the inputs.
    """
    parsed = [parse_input(text) for text in specs]
    dynamic_axes = parse_dynamic(dynamic)
    chosen = parse_options([*options, *([f"dtype={dtype}"] if dtype else [])])
    if parsed and inputs_file:
        raise UsageError("--input and --inputs exclude each other")
    arrays = read_npz(inputs_file) if inputs_file else None

    import seqc
    from seqc.artifact import check_destination
    from seqc.frontend.load import load, quiet

    check_destination(output)
    with Progress(f"compiling {source}") as progress:
        loaded = load(source, entry=entry, allow_pickle=allow_pickle)
        examples, shapes = _inputs(loaded, parsed, arrays, dynamic_axes)
        for text in loaded.notes:
            progress.note(text)
        for name, tensor in examples.items():
            text_or_none = fixed_sizes(name, tensor.dim(), (shapes or {}).get(name, {}), tensor.shape)
            if shapes is not None and text_or_none and (parsed or arrays):
                progress.note(text_or_none)
        with quiet():
            compiled = seqc.compile(
                loaded.module(examples),
                examples,
                dynamic_shapes=shapes,
                target=target,
                stateful=stateful,
                passes=[p.strip() for p in passes.split(",") if p.strip()] if passes is not None else None,
                options=chosen,
                opset=opset,
                check=not no_check,
                progress=progress,
            )
        compiled.manifest["source"] = {**compiled.manifest["source"], "kind": loaded.kind, "path": source}
        compiled.manifest["notes"] = [*loaded.notes, *compiled.manifest["notes"]]
        compiled.save(output)
    manifest = json.loads((Path(output) / "manifest.json").read_text("utf-8"))
    if state.json:
        print_json({"artifact": output, "manifest": manifest, "report": compiled.report, "stages": progress.stages})
    else:
        click.echo(summary(output, manifest))
        click.echo(_check_line(compiled.report.get("check")))
        if "check_in_chunks" in compiled.report:
            click.echo(_check_line(compiled.report["check_in_chunks"]) + ", taken in random pieces")


def _inputs(
    loaded: Loaded, specs: list[Any], arrays: dict[str, Any] | None, dynamic: dict[str, dict[int, Any]]
) -> tuple[dict[str, torch.Tensor], dict[str, dict[int, Any]] | None]:
    """Example tensors and dynamic axes: what the user gave first, then what the source implies."""
    import torch

    shapes: dict[str, dict[int, Any]] | None = None
    if specs:
        examples = draw(specs, vocabulary(loaded))
        shapes = {spec.name: spec.dynamic for spec in specs}
    elif arrays is not None:
        try:
            examples = {name: torch.from_numpy(array) for name, array in arrays.items()}
        except TypeError as error:
            raise UsageError(f"--inputs: {error}") from error
        known = loaded.dynamic_shapes
        shapes = dict(known) if known is not None and set(known) >= set(examples) else None
    elif loaded.example_inputs is not None:
        examples, shapes = loaded.example_inputs, loaded.dynamic_shapes
    else:
        raise UsageError(
            f"{loaded.path} does not say what its inputs are; give them, such as --input 'x=float32[batch,seq,4]', "
            "or a file --inputs F.npz"
        )
    for name in dynamic:
        if name not in examples:
            raise UsageError(f"--dynamic names {name!r}, the inputs are {', '.join(examples)}")
    if dynamic:
        shapes = {name: {**(shapes or {}).get(name, {}), **dynamic.get(name, {})} for name in examples}
    return examples, shapes


def vocabulary(loaded: Loaded) -> int:
    """How many values integer inputs may take: the source's vocabulary, else its smallest embedding table, else 2."""
    from torch import nn

    if loaded.vocabulary is not None:
        return loaded.vocabulary
    model: nn.Module = loaded.model
    return min((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), default=2)


def summary(output: str, manifest: dict[str, Any]) -> str:
    """The artifact in a few lines: what goes in and out, the range of each dimension, the files."""

    def ports(key: str) -> list[list[str]]:
        word = key.removesuffix("s")
        return [[word, p["name"], f"{p['dtype']}[{', '.join(map(str, p['shape']))}]"] for p in manifest[key]]

    rows = [*ports("inputs"), *ports("outputs"), *ports("states")]
    for name, dim in manifest["dims"].items():
        top = f"to {dim['max']}" if dim["max"] is not None else "or more"
        rows.append(["dim", name, f"{dim['min']} {top}, traced at {dim['traced']}"])
    size = sum(file["bytes"] for file in manifest["files"].values())
    rows += [["engine", e["file"], engine_line(e)] for e in manifest["engines"]]
    peak = manifest.get("peak_activations")
    notes = f"\n  {peak_line(peak)}" if peak else ""
    notes += "".join(f"\n  note: {text}" for text in manifest.get("notes", []))
    head = f"{output}: {manifest['target']}, opset {manifest['opset']}, {human_bytes(size)}"
    return f"{head}\n{table(rows)}{notes}"


def _check_line(check: dict[str, Any] | None) -> str:
    if not check:
        return "  not checked against the source model"
    return f"  checked at {len(check['cases'])} sizes: largest error {check['error']:.2g} of an output's scale"
