"""Everything after translation: opset, optimisation, names, metadata."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxscript.optimizer
import onnxscript.version_converter

from seqc.program import Program

# Constants larger than this are computed at run time rather than stored: a folded mask of [n, n] costs n*n in the file.
_FOLD_LIMIT = 4096


def finalize(model: ir.Model, program: Program, opset: int) -> ir.Model:
    """Optimise ``model`` in place, declare ``opset``, give every value a unique name, keep only our metadata."""
    onnxscript.version_converter.convert_version(model, opset)
    _optimise(model)
    _name(model, program)
    _clean(model)
    model.ir_version = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])
    return model


def _keep(node: ir.Node) -> bool | None:
    if node.op_type == "Transpose":
        return False  # a weight keeps its name, bytes and sharing; runtimes fold the transpose when they load it
    return None


def _optimise(model: ir.Model) -> None:
    onnxscript.optimizer.optimize_ir(
        model, input_size_limit=_FOLD_LIMIT, output_size_limit=_FOLD_LIMIT, should_fold=_keep
    )


def _name(model: ir.Model, program: Program) -> None:
    used = {p.name for p in (*program.inputs, *program.outputs)}
    named: set[int] = set()

    def claim(value: ir.Value, scope: str) -> None:
        if id(value) in named:
            return
        base = f"{scope}{value.name or 'value'}"
        name, count = base, 1
        while name in used:
            name, count = f"{base}_{count}", count + 1
        used.add(name)
        named.add(id(value))
        if value.name != name:
            value.name = name

    graph = model.graph
    for value, port in (*zip(graph.inputs, program.inputs, strict=True), *zip(graph.outputs, program.outputs, strict=True)):
        value.name = port.name
        named.add(id(value))
    for value in list(graph.initializers.values()):
        claim(value, "")

    def visit(inner: ir.Graph, scope: str) -> None:
        for value in inner.inputs:
            claim(value, scope)
        for node in inner:
            for value in node.outputs:
                claim(value, scope)
            node.name = f"{node.op_type}_{node.outputs[0].name}" if node.outputs else f"{scope}{node.op_type}"
            for attribute in node.attributes.values():
                if attribute.type is ir.AttributeType.GRAPH:
                    visit(attribute.as_graph(), f"{node.outputs[0].name}.")

    visit(graph, "")


def _clean(model: ir.Model) -> None:
    for graph in model.graphs():
        graph.metadata_props.clear()
        for value in (*graph.inputs, *graph.initializers.values()):
            value.metadata_props.clear()
        for node in graph:
            for key in [k for k in node.metadata_props if not k.startswith("seqc.")]:
                del node.metadata_props[key]
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()


__all__ = ["common", "finalize"]
