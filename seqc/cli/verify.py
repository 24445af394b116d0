"""``seqc verify``: compare an artifact with the model it was, or should have been, compiled from."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from seqc.cli.compile import vocabulary
from seqc.cli.console import State, common_options, note, print_json
from seqc.cli.inputs import Dimension, InputSpec, draw
from seqc.cli.providers import provider_option
from seqc.compare import Array
from seqc.errors import UsageError, VerificationError
from seqc.runtime import Manifest, Port
from seqc.runtime.manifest import MODEL_FILE
from seqc.runtime.ort import Provider

if TYPE_CHECKING:
    import torch
    from torch import nn

    from seqc.frontend.load import Loaded
    from seqc.frontend.signature import Signature

_DRIFT_ROOM = 2.0
"""Other inputs than those it was measured with may be off by so many times more."""


@click.command("verify")
@click.argument("directory", metavar="DIR")
@click.option("--against", "source", required=True, metavar="SRC", help="The model, as for `seqc compile`.")
@click.option("--entry", metavar="PKG.MOD:FACTORY", help="Builds the module that a weights file belongs to.")
@click.option("--tolerance", type=float, metavar="T", help="Largest error relative to an output's scale.")
@click.option("--length", "lengths", type=click.IntRange(min=1), multiple=True, metavar="N", help="Check N as well.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random inputs.")
@provider_option
@click.option("--allow-pickle", is_flag=True, help="Load files that execute code when they are loaded.")
@common_options
@click.pass_obj
def command(
    state: State,
    directory: str,
    source: str,
    entry: str | None,
    tolerance: float | None,
    lengths: tuple[int, ...],
    seed: int,
    provider: tuple[Provider, ...],
    allow_pickle: bool,
) -> int:
    """Run the artifact DIR and the model SRC on the same inputs, of many sizes, and compare; exit 1 if they differ.

    Of an artifact with int8 or int4 weights SRC gets the same weights, after each was shown to be SRC's own, rounded. Where
    that cannot be done, and with int8 caches, what the rounding was measured to change when it was compiled decides. With
    --tolerance SRC is compared as it is.
    """
    if tolerance is not None and not tolerance >= 0:
        raise UsageError(f"--tolerance must be at least 0, not {tolerance}")

    from seqc.check import check
    from seqc.exact import in_float64
    from seqc.frontend.load import load as load_source
    from seqc.frontend.load import quiet
    from seqc.runtime import load as load_artifact

    session = load_artifact(directory, providers=list(provider) or None)
    loaded = load_source(source, entry=entry, allow_pickle=allow_pickle)
    for text in loaded.notes:
        note(text)
    examples = _examples(loaded, session.manifest)
    limits: dict[str, float] | float = dict(session.manifest.tolerances) if tolerance is None else tolerance
    with quiet():
        model = loaded.module(examples)
        criterion = Criterion(limits, "the source")
        if tolerance is None and session.manifest.quantization is not None:
            criterion = _of_quantized(directory, session.manifest, model)
        signature = _signature(model, examples, session.manifest)
        reference = _function(model, signature, session.outputs)
        reference(signature.examples)
        report = check(
            reference,
            session.run,
            signature,
            lengths,
            criterion.limits,
            seed,
            in_float64(model, lambda wide: _function(wide, signature, session.outputs)),
        )
    if state.json:
        print_json({**report.to_json(), "against": criterion.against})
    else:
        for line in report.lines():
            click.echo(line)
        if criterion.against != "the source":
            click.echo(f"compared with {criterion.against}")
    report.raise_if_failed()
    return 0


@dataclass(frozen=True)
class Criterion:
    """The largest errors accepted, of all outputs or by name, and ``against`` what."""

    limits: dict[str, float] | float
    against: str


def _of_quantized(directory: str, manifest: Manifest, model: nn.Module) -> Criterion:
    """How a quantised artifact is to be compared with ``model``, which gets the artifact's weights where that can be done."""
    import onnx_ir as ir

    from seqc.backends.onnx.quantize import dequantizes, stored_matrices
    from seqc.rounded_source import round_weights

    told = manifest.quantization
    assert told is not None, "asked before"
    off = "not measured" if told.drift is None else f"up to {told.drift:.2g} of an output's scale"
    artifact = ir.load(Path(directory) / MODEL_FILE)
    # what is rounded while it runs cannot be put into the source
    why = f"its caches are {told.cache}" if told.cache else ""
    matrices = list(stored_matrices(artifact))
    parts = {value.name for node in artifact.graph.all_nodes() for value in node.inputs if dequantizes(node) and value}
    why = why or round_weights(model, matrices, [name for name in artifact.graph.initializers if name not in parts])
    if not why:
        return Criterion(
            dict(manifest.tolerances),
            f"the source with its {len(matrices)} matrices rounded as in the artifact; off from the source as it is, when it "
            f"was compiled: {off}",
        )
    if told.drift is None:
        raise UsageError(
            f"{why}, and the artifact was compiled without a check: say the --tolerance to compare it with"
        )
    most = {name: max(limit, _DRIFT_ROOM * told.drift) for name, limit in manifest.tolerances.items()}
    return Criterion(
        most, f"the source as it is ({why}), within {_DRIFT_ROOM:g} times what it was off when it was compiled: {off}"
    )


def _examples(loaded: Loaded, manifest: Manifest) -> dict[str, torch.Tensor]:
    """The source's own example inputs where it has them under the artifact's names, else random ones."""
    names = [port.name for port in manifest.inputs]
    if loaded.example_inputs is not None:
        if set(loaded.example_inputs) != set(names):
            raise UsageError(
                f"{loaded.path} takes {', '.join(loaded.example_inputs)}, the artifact takes {', '.join(names)}"
            )
        return {name: loaded.example_inputs[name] for name in names}
    return draw([_spec(port, manifest) for port in manifest.inputs], vocabulary(loaded))


def _spec(port: Port, manifest: Manifest) -> InputSpec:
    return InputSpec(port.name, port.dtype, tuple(_size(size, port, manifest) for size in port.shape))


def _size(size: int | str, port: Port, manifest: Manifest) -> int | Dimension:
    if isinstance(size, int):
        return size
    if size not in manifest.dims:
        raise UsageError(f"input {port.name!r} has the size {size}, for which seqc verify cannot make up inputs")
    return Dimension(size, max(manifest.dims[size].min, 1), manifest.dims[size].max)


def _signature(model: nn.Module, examples: dict[str, torch.Tensor], manifest: Manifest) -> Signature:
    from seqc.frontend.signature import bind

    return bind(model, examples, {port.name: _spec(port, manifest).dynamic for port in manifest.inputs})


def _function(
    model: nn.Module, signature: Signature, ports: tuple[Port, ...]
) -> Callable[[dict[str, torch.Tensor]], dict[str, Array]]:
    """The source model as a function from tensors by input name to arrays by the artifact's output names."""
    import torch
    from torch.utils import _pytree as pytree

    from seqc.check import to_numpy
    from seqc.frontend.outputs import keep_tensors

    try:
        inspect.signature(model.forward).bind(**signature.examples)
        by_name = True
    except TypeError:
        by_name = False

    def reference(inputs: dict[str, torch.Tensor]) -> dict[str, Array]:
        with torch.no_grad():
            out = model(**inputs) if by_name else model(*inputs.values())
        leaves = pytree.tree_leaves(keep_tensors(out, "output", []))
        if len(leaves) != len(ports):
            raise VerificationError(f"the model returns {len(leaves)} tensors, the artifact {len(ports)}")
        return {
            port.name: to_numpy(torch.view_as_real(x.resolve_conj()) if x.is_complex() and port.dtype[0] == "f" else x)
            for port, x in zip(ports, leaves, strict=True)
        }

    return reference
