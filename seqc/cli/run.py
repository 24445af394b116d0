"""``seqc run``: run an artifact on given or random inputs. Needs numpy and onnxruntime, not torch."""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from seqc.cli.console import State, common_options, human_bytes, note, print_json, table
from seqc.cli.inputs import read_npz
from seqc.cli.providers import provider_option
from seqc.errors import UsageError
from seqc.runtime import Manifest, Session
from seqc.runtime.ort import Provider
from seqc.runtime.pieces import in_pieces
from seqc.runtime.shapes import evaluate

Arrays = dict[str, np.ndarray[Any, Any]]


@click.command("run")
@click.argument("directory", metavar="DIR")
@click.option("--inputs", "inputs_file", metavar="F.npz", help="The inputs, one array per input.")
@click.option("--random", "sizes", metavar="DIM=N,...", help="Random inputs of these sizes (others: as traced).")
@click.option(
    "--high", type=click.IntRange(min=1), default=2, show_default=True, help="Random integers are below this."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random inputs.")
@click.option(
    "--stream",
    "piece",
    type=click.IntRange(min=1),
    metavar="N",
    help="Take the sequence N steps at a time, with states.",
)
@click.option("--load-state", metavar="FILE", help="With --stream: go on from a saved state.")
@click.option("--save-state", metavar="FILE", help="With --stream: save the state at the end.")
@click.option("-o", "--output", metavar="OUT.npz", help="Write the outputs here.")
@provider_option
@common_options
@click.pass_obj
def command(
    state: State,
    directory: str,
    inputs_file: str | None,
    sizes: str | None,
    high: int,
    seed: int,
    piece: int | None,
    load_state: str | None,
    save_state: str | None,
    output: str | None,
    provider: tuple[Provider, ...],
) -> None:
    """Run the artifact DIR once, or as a stream, and print what comes out."""
    if piece is None and (load_state or save_state):
        raise UsageError("--load-state and --save-state go with --stream N")
    if (inputs_file is None) == (sizes is None):
        raise UsageError("give either --inputs F.npz or --random DIM=N,... (--random '' takes the traced sizes)")
    if output is not None:
        _check_writable(Path(output))

    from seqc.runtime import load

    session = load(directory, providers=list(provider) or None)
    if inputs_file is not None:
        inputs = read_npz(inputs_file)
    else:
        inputs = random_inputs(session.manifest, parse_sizes(sizes or ""), high, seed)
    start = time.perf_counter()
    outputs = session.run(inputs) if piece is None else streamed(session, inputs, piece, load_state, save_state)
    seconds = time.perf_counter() - start
    if output is not None:
        write_npz(Path(output), outputs)
    if state.json:
        rows = [{"name": n, "dtype": str(a.dtype), "shape": list(a.shape), **statistics(a)} for n, a in outputs.items()]
        print_json({"outputs": rows, "seconds": seconds, "providers": list(session.providers), "written": output})
        return
    lines = [[n, f"{a.dtype}[{', '.join(map(str, a.shape))}]", _spell(statistics(a))] for n, a in outputs.items()]
    click.echo(table(lines, indent=""))
    click.echo(f"{seconds * 1000:.1f} ms on {session.providers[0]}" + (f", written to {output}" if output else ""))


def streamed(session: Session, inputs: Arrays, piece: int, load_from: str | None, save_to: str | None) -> Arrays:
    """The outputs of a stream that takes ``piece`` steps at a time, from a saved state to one that is saved."""
    stream = session.stream(session.rows_in(inputs))
    if load_from is not None:
        stream.load(load_from)
    outputs = in_pieces(session, stream, inputs, itertools.repeat(piece))
    if save_to is not None:
        stream.save(save_to)
    seen = ", ".join(map(str, sorted(set(stream.positions))))
    note(f"{seen} steps were seen in all; the state is {human_bytes(stream.memory())}")
    return outputs


def parse_sizes(text: str) -> dict[str, int]:
    """Read ``seq=300,batch=2``. Raises UsageError, one line."""
    sizes = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, equals, number = item.partition("=")
        if not equals or not number.strip().isdecimal():
            raise UsageError(f"--random takes DIM=N,..., not {item!r}")
        sizes[name.strip()] = int(number)
    return sizes


def random_inputs(manifest: Manifest, sizes: dict[str, int], high: int, seed: int) -> Arrays:
    """Inputs for a manifest: normal floats, integers in [0, high), booleans; dimensions not in ``sizes`` as traced."""
    for name in sizes:
        if name not in manifest.dims:
            known = ", ".join(manifest.dims) or "none: every size is fixed"
            raise UsageError(f"--random names dimension {name!r}; the artifact's dimensions are {known}")
    all_sizes = {name: sizes.get(name, dim.traced) for name, dim in manifest.dims.items()}
    generator = np.random.default_rng(seed)
    arrays: Arrays = {}
    for port in manifest.inputs:
        shape: list[int] = []
        for size in port.shape:
            known_size = size if isinstance(size, int) else evaluate(size, all_sizes)
            if known_size is None:
                raise UsageError(f"input {port.name!r} has a size that cannot be worked out; use --inputs")
            shape.append(known_size)
        dtype = np.dtype(port.dtype)
        if dtype.kind in "fc":
            value = generator.standard_normal(shape)
            arrays[port.name] = (value + 1j * generator.standard_normal(shape) if dtype.kind == "c" else value).astype(
                dtype
            )
        else:
            arrays[port.name] = generator.integers(0, 2 if dtype.kind == "b" else high, shape).astype(dtype)
    return arrays


def statistics(array: np.ndarray[Any, Any]) -> dict[str, Any]:
    """What a person wants to see of an array: its range and mean, and how much of it is not finite."""
    if array.size == 0:
        return {"empty": True}
    values = np.abs(array) if array.dtype.kind == "c" else array
    finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values.astype(np.float64)
    result: dict[str, Any] = {}
    if finite.size:
        wide = finite.astype(np.float64)
        result = {"min": float(wide.min()), "max": float(wide.max()), "mean": float(wide.mean())}
    if finite.size != array.size:
        result["not_finite"] = int(array.size - finite.size)
    return result


def _spell(numbers: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v:.6g}" if isinstance(v, float) else f"{k} {v}" for k, v in numbers.items())


def _check_writable(path: Path) -> None:
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UsageError(f"{path}: not a file that can be written")


def write_npz(path: Path, arrays: Arrays) -> None:
    """Write an .npz file that appears complete or not at all. Raises UsageError, one line."""
    try:
        handle, name = tempfile.mkstemp(prefix=".seqc-", suffix=".npz", dir=path.absolute().parent)
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, allow_pickle=False, **arrays)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
