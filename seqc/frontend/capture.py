"""One run of torch.export with every symbolic size kept symbolic, loops unrolled at the traced size.

Method: the forward runs inside ``ShapeEnv.suppress_guards``, so Python sees numbers where it needs them (``range``,
``unbind``, ``if``) while tensor shapes stay symbolic; what Python asked for is logged with its source line.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
import torch.fx as fx
from torch import nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from seqc import _torch
from seqc.errors import UnsupportedModelError
from seqc.frontend.decompositions import table
from seqc.frontend.outputs import keep_tensors, output_names
from seqc.frontend.scan_functions import scans_as_loops
from seqc.frontend.script_interpreter import interpreted
from seqc.frontend.signature import Signature
from seqc.frontend.symbolic_spellings import SymbolicSpellings
from seqc.ops.recurrence import trust_values
from seqc.program import Dim, Port, Program


@dataclass
class _Outputs:
    """What the traced forward returned; kept outside the module, whose attributes torch.export restores."""

    spec: pytree.TreeSpec | None = None
    names: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    replaced: list[str] = field(default_factory=list)


@dataclass
class Capture:
    """A trace of a model at ``sizes`` with its loops unrolled, and what Python asked of the symbolic sizes."""

    exported: torch.export.ExportedProgram
    returned: _Outputs
    signature: Signature
    sizes: dict[str, int]
    log: list[_torch.Specialisation]

    @functools.cached_property
    def dims(self) -> tuple[Dim, ...]:
        by_name = {n.name: n for n in self.exported.graph.nodes if n.op == "placeholder"}
        return _dims([by_name[name] for name in self.exported.graph_signature.user_inputs], self.signature, self.sizes)

    @functools.cached_property
    def program(self) -> Program:
        """The trace in the operators of the IR. Two thirds of the cost of a capture: made when it is asked for."""
        env = _torch.shape_env_of(n.meta.get("val") for n in self.exported.graph.nodes)
        with _quiet(), _torch.no_guards(env):
            exported = _torch.without_effect_tokens(self.exported.run_decompositions(table()))
        return _program(exported, self.returned, self.signature, self.sizes)


class _Entry(nn.Module):
    """Calls the model by input name, flattens what it returns to tensors, and keeps sizes symbolic."""

    def __init__(self, model: nn.Module, signature: Signature, log: list[_torch.Specialisation]) -> None:
        super().__init__()
        self.model = model
        self.names = list(signature.examples)
        self.positional = signature.positional
        self.log = log
        self.outputs = _Outputs()

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with _torch.no_guards(_torch.shape_env_of(tensors), self.log), SymbolicSpellings():
            out = self.model(*tensors) if self.positional else self.model(**dict(zip(self.names, tensors, strict=True)))
        dropped: list[str] = []
        paths, self.outputs.spec = pytree.tree_flatten_with_path(keep_tensors(out, "output", dropped))
        self.outputs.names = output_names([path for path, _ in paths])
        self.outputs.dropped = tuple(dropped)
        return tuple(leaf for _, leaf in paths)


def capture(model: nn.Module, signature: Signature, sizes: dict[str, int]) -> Capture:
    """Trace ``model`` at ``sizes``; every named dimension stays symbolic outside Python's own loops and branches.

    Raises UnsupportedModelError naming the source line where control flow depends on the values of tensors.
    """
    log: list[_torch.Specialisation] = []
    entry = _Entry(model, signature, log).eval()
    tensors = tuple(signature.resized(sizes).values())
    dims = {n: torch.export.Dim(n, min=1, max=a.max) for n, a in signature.dims.items()}
    spec = tuple({a: dims[d] for a, d in signature.axes.get(n, {}).items()} for n in signature.examples)
    with _quiet(), interpreted(model), _restored(model), scans_as_loops(entry.outputs.replaced):
        exported = torch.export.export(entry, tensors, dynamic_shapes=(spec,), strict=False)
    return Capture(exported, entry.outputs, signature, sizes, log)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.export without gradients and warnings; its errors name the line of the user's model."""
    with (
        warnings.catch_warnings(),
        torch.no_grad(),
        _torch.without_fake_cache(),
        _torch.lazy_graph_modules(),
        _torch.quiet_export(),
    ):
        warnings.simplefilter("ignore")
        try:
            yield
        except Exception as error:
            raise _refusal(error) from error


@contextlib.contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Put back every attribute that a forward assigns to its modules: under tracing these are fake tensors."""
    saved = [(m, dict(vars(m)), dict(m._buffers)) for m in model.modules()]
    try:
        yield
    finally:
        for module, attributes, buffers in saved:
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)


def _refusal(error: Exception) -> UnsupportedModelError:
    frames = []
    tb = error.__traceback__
    while tb is not None:
        file = tb.tb_frame.f_code.co_filename
        if "/torch/" not in file and "/seqc/" not in file and not file.startswith("<"):
            frames.append(f"{file}:{tb.tb_lineno}")
        tb = tb.tb_next
    reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
    where = f" at {frames[-1]}" if frames else ""
    hint = ""
    if "data-dependent" in str(error) or "Unbacked" in str(error) or "unbacked" in str(error):
        hint = "; its control flow depends on the values of tensors, which no static graph can follow: make it a mask"
    return UnsupportedModelError(f"tracing failed{where}: {type(error).__name__}: {reason}{hint}")


def _merge_constant(node: fx.Node, tensor: torch.Tensor, seen: list[tuple[fx.Node, torch.Tensor]]) -> None:
    """Read the first of equal constants: ``torch.tensor([...])`` in a loop makes a new one in each step."""
    for other, value in seen:
        if value.dtype == tensor.dtype and value.shape == tensor.shape and torch.equal(value, tensor):
            node.replace_all_uses_with(other)
            return
    seen.append((node, tensor))


def _program(
    exported: torch.export.ExportedProgram, returned: _Outputs, signature: Signature, sizes: dict[str, int]
) -> Program:
    graph_signature = exported.graph_signature
    graph_module = _torch.lazy_graph_module(exported.graph_module, exported.graph)
    tensors = {**exported.state_dict, **exported.constants}
    by_name = {n.name: n for n in graph_module.graph.nodes if n.op == "placeholder"}
    weights, weight_names, inputs = {}, {}, []
    constants: list[tuple[fx.Node, torch.Tensor]] = []
    # A weight that the model writes to in place is copied: running the source model later must not change ours.
    written = {o.target for o in graph_signature.output_specs if o.kind is not OutputKind.USER_OUTPUT}
    notes = [*returned.dropped, *returned.replaced]
    for item in graph_signature.input_specs:
        node = by_name[item.arg.name]
        if item.kind is InputKind.USER_INPUT:
            inputs.append(node)
        elif item.target is not None and isinstance(tensors.get(item.target), torch.Tensor):
            if item.kind is InputKind.CONSTANT_TENSOR:
                _merge_constant(node, tensors[item.target], constants)
            if node.users:
                weight = tensors[item.target].detach()
                weights[node.name] = weight.clone() if item.target in written else weight
                weight_names[node.name] = item.target.removeprefix("model.")
            else:
                graph_module.graph.erase_node(node)
        else:
            raise UnsupportedModelError(f"the traced graph takes {item.arg.name}, a {item.kind.name} that is no tensor")
    outputs = []
    returned_values: Any = graph_module.graph.output_node().args[0]
    for item, value in zip(graph_signature.output_specs, returned_values, strict=True):
        if item.kind is OutputKind.USER_OUTPUT:
            outputs.append(value)
        else:
            notes.append(
                f"the model writes to its buffer {item.target!r}; the compiled model does not keep that change"
            )
    for value, name in zip(outputs, returned.names, strict=True):
        if not isinstance(value, fx.Node):
            raise UnsupportedModelError(f"{name} does not depend on the inputs: it is the constant {value!r}")
    graph_module.graph.output_node().args = (tuple(outputs),)
    trust_values(graph_module.graph)
    program = Program(
        graph_module,
        weights,
        inputs=(),
        outputs=(),
        dims=_dims(inputs, signature, sizes),
        weight_names=weight_names,
        out_spec=returned.spec,
        notes=notes,
    )
    program.inputs = tuple(
        Port(name, node.meta["val"].dtype, program.shape_of(node.meta["val"]))
        for name, node in zip(signature.examples, inputs, strict=True)
    )
    program.outputs = tuple(
        Port(name, node.meta["val"].dtype, program.shape_of(node.meta["val"]))
        for name, node in zip(returned.names, outputs, strict=True)
    )
    graph_module.recompile()
    return program


def _dims(inputs: list[fx.Node], signature: Signature, sizes: dict[str, int]) -> tuple[Dim, ...]:
    found: dict[str, Dim] = {}
    for node, name in zip(inputs, signature.examples, strict=True):
        for axis, dim in signature.axes.get(name, {}).items():
            symbol = _torch.size_expr(node.meta["val"].shape[axis])
            if dim not in found and isinstance(symbol, sympy.Symbol):
                declared = signature.dims[dim]
                found[dim] = Dim(dim, symbol, sizes[dim], declared.min, declared.max)
    return tuple(found.values())
