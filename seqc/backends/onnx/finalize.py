"""Everything after translation: opset, optimisation, names, metadata."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import onnxscript.version_converter

from seqc import _torch
from seqc.backends.onnx.invariants import hoist
from seqc.backends.onnx.left_padded_conv import hold_biases
from seqc.backends.onnx.optimize import optimize
from seqc.errors import UnsupportedOpError
from seqc.program import Program

# Constants of more elements are computed at run time rather than stored: a folded mask of [n, n] costs n*n in the file.
_FOLD_LIMIT = 4096

# The newest opset that onnxscript (0.7) converts to.
_CONVERTED_TO = 25

# Operators redefined since, of which all that was valid before means the same: Range takes more types.
_WIDENED = frozenset({"Range"})


def finalize(model: ir.Model, program: Program, opset: int) -> ir.Model:
    """Optimise ``model`` in place, declare ``opset``, give every value a unique name, keep only our metadata."""
    with _torch.quiet_onnx():
        _convert(model, opset)
        _name(model, program)  # the optimiser's shape inference goes by names and must not meet one twice
        optimize(model, _FOLD_LIMIT, _should_fold)
    hoist(model.graph)
    hold_biases(model.graph)
    _name(model, program)
    _clean(model.graph, {})
    model.ir_version = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])
    return model


def _convert(model: ir.Model, opset: int) -> None:
    """Convert to ``opset``. Raises UnsupportedOpError where an operator became another one in an opset not converted to."""
    onnxscript.version_converter.convert_version(model, min(opset, _CONVERTED_TO))
    if opset <= _CONVERTED_TO:
        return
    for node in model.graph.all_nodes():
        if node.domain == "":
            if node.op_type not in _WIDENED and _redefined(node.op_type, opset):
                raise UnsupportedOpError(f"{node.op_type} was redefined between opsets {_CONVERTED_TO} and {opset}")
            node.version = opset
    model.graph.opset_imports[""] = opset


def _redefined(operator: str, opset: int) -> bool:
    """Whether the operator existed where conversion ends, and is another one in ``opset``."""
    try:
        before = onnx.defs.get_schema(operator, _CONVERTED_TO)
    except onnx.defs.SchemaError:
        return False
    return bool(before.since_version != onnx.defs.get_schema(operator, opset).since_version)


def _should_fold(node: ir.Node) -> bool | None:
    """A weight that is transposed, or a kernel that is unsqueezed, keeps its name, bytes and sharing: runtimes fold that."""
    is_kernel = node.op_type == "Unsqueeze" and any(use.node.op_type == "Conv" for use in node.outputs[0].uses())
    return False if node.op_type == "Transpose" or is_kernel else None


def _name(model: ir.Model, program: Program) -> None:
    """Ports by their names, weights by theirs; every other value once in the whole model, bodies included."""
    graph = model.graph
    ports = [
        *zip(graph.inputs, program.inputs, strict=True),
        *zip(graph.outputs, program.outputs, strict=True),
    ]
    used = {port.name for _, port in ports}
    named = {id(value) for value, _ in ports}

    def claim(value: ir.Value, scope: str) -> None:
        if id(value) in named:
            return
        own = value.name or "value"
        base = name = own if own.startswith(scope) else f"{scope}{own}"
        count = 0
        while name in used:
            count += 1
            name = f"{base}_{count}"
        used.add(name)
        named.add(id(value))
        if value.name != name:
            value.name = name

    def visit(inner: ir.Graph, scope: str) -> None:
        for value in inner.inputs:
            claim(value, scope)
        for node in inner:
            for value in node.outputs:
                claim(value, scope)
            node.name = f"{node.op_type}_{node.outputs[0].name}"
            for attribute in node.attributes.values():
                if attribute.type is ir.AttributeType.GRAPH:
                    visit(attribute.as_graph(), f"{scope}{attribute.as_graph().name}.")

    aside = {value.name: value for value in graph.initializers.values() if value.name in used}
    for value in aside.values():  # a folded constant that took a port's name
        value.name = f"{value.name}_constant"
    for value, port in ports:
        if value.name != port.name:
            value.name = port.name
    for value in list(graph.initializers.values()):
        claim(value, "")
    visit(graph, "")


def _clean(graph: ir.Graph, outer: dict[str, str]) -> None:
    """Keep only seqc's metadata; a node that has none (the optimiser made it) takes that of a neighbour."""
    graph.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
    for node in graph:
        kept = {k: v for k, v in node.metadata_props.items() if k.startswith("seqc.")}
        node.metadata_props.clear()
        node.metadata_props.update(kept)
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for node in graph:
        if not node.metadata_props:
            near = [use.node for value in node.outputs for use in value.uses()]
            near += [p for value in node.inputs if value is not None and (p := value.producer()) is not None]
            found = next((dict(n.metadata_props) for n in near if n.metadata_props), outer)
            node.metadata_props.update(found)
        for attribute in node.attributes.values():
            if attribute.type is ir.AttributeType.GRAPH:
                _clean(attribute.as_graph(), dict(node.metadata_props))
