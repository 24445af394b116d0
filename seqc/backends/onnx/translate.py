"""A Program to an ONNX graph, node by node.

ATen ops go through torch.onnx's own translations (with the corrections of :mod:`seqc.backends.onnx.aten_fixes`),
``seqc::recurrence`` through :mod:`seqc.backends.onnx.recurrence`. A body is translated into a graph of its own whose
values from outside are captured, so no local function arises. Neither ``torch.onnx.export`` nor its ExportedProgram is
used: it runs the decompositions again, which freezes symbolic sizes.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
import torch.fx as fx

import seqc
from seqc import _torch
from seqc.backends.onnx import aten_fixes, choose, contrib, left_padded_conv, recurrence
from seqc.backends.onnx.refusal import Refusals, innermost_reason
from seqc.errors import UnsupportedModelError
from seqc.ops.choose import is_choice
from seqc.ops.recurrence import is_recurrence
from seqc.program import Program, module_path, source_line

Values = dict[str, Any]
"""What each fx node, by name, became: an ir.Value, or a list of them where it has several results."""


def translate(program: Program, opset: int) -> ir.Model:
    """The ONNX form of a prepared Program, not yet optimised.

    Raises UnsupportedOpError that names every op without a translation, with module path and source line, and
    UnsupportedModelError where an input and an output have one name.
    """
    return Translator(program, opset).run()


class Translator:
    """Holds what all graphs of one model share: the registry, the model, and the refusals."""

    def __init__(self, program: Program, opset: int) -> None:
        self.program = program
        self.opset = opset
        self.registry = _torch.onnx_registry(opset)
        aten_fixes.register(self.registry)
        self.refusals = Refusals()
        self.inputs: list[tuple[fx.Node, ir.Value]] = []
        self.model = ir.Model(ir.Graph([], [], nodes=[], name="main"), ir_version=10)

    def run(self) -> ir.Model:
        program, graph = self.program, self.model.graph
        if both := {p.name for p in program.inputs} & {p.name for p in program.outputs}:
            raise UnsupportedModelError(f"an input and an output are both called {min(both)!r}: rename one of them")
        values: Values = {}
        stored: dict[tuple[Any, ...], list[tuple[torch.Tensor, ir.Value]]] = {}
        for node in program.weight_nodes:
            tensor = program.weights[node.name]
            alike = stored.setdefault(_fingerprint(tensor), [])
            value = next((v for other, v in alike if _same_bytes(tensor, other)), None)
            if value is None:
                value = self.initializer(tensor, program.weight_names.get(node.name, node.name))
                alike.append((tensor, value))
            values[node.name] = value
        for node, port in zip(program.input_nodes, program.inputs, strict=True):
            value = self.value(port.name, node.meta["val"])
            graph.inputs.append(value)
            values[node.name] = value
            self.inputs.append((node, value))
        with _torch.quiet_onnx():
            outputs = self.graph(program.graph_module, graph, values)
        graph.outputs.extend(recurrence.own_outputs(graph, outputs))
        self.refusals.check()
        _torch.add_opset_imports(self.model)
        return self.model

    def graph(self, gm: fx.GraphModule, graph: ir.Graph, values: Values) -> list[ir.Value]:
        """Translate the nodes of ``gm`` into ``graph``; ``values`` holds its placeholders. Returns the outputs."""
        constants: dict[Any, ir.Value] = {}
        for node in gm.graph.nodes:
            if node.op == "call_function":
                self.node(node, graph, values, constants)
        results: Any = gm.graph.output_node().args[0]
        return [values[n.name] for n in results]

    def node(self, node: fx.Node, graph: ir.Graph, values: Values, constants: dict[Any, ir.Value]) -> None:
        last = graph[-1] if len(graph) else None
        try:
            if is_recurrence(node):
                values[node.name] = recurrence.lower(self, node, graph, values)
            elif is_choice(node):
                values[node.name] = choose.lower(self, node, graph, values)
            elif node.target is torch.ops.seqc.left_padded_conv.default:
                values[node.name] = left_padded_conv.lower(self, node, graph, values)
            elif node.target in contrib.WRITERS:
                values[node.name] = contrib.WRITERS[node.target](self, node, graph, values)
            elif (several := _several(node, values)) is not None:
                index: Any = node.args[1]
                values[node.name] = several[index]
                return
            elif not _torch.has_translation(self.registry, node):
                self.refuse(node, values, "torch.onnx has no translation of it")
                return
            else:
                _torch.translate_node(self.model, graph, node, values, constants, self.registry)
        except Exception as error:
            self.refuse(node, values, innermost_reason(error))
            return
        self.describe(values[node.name], node.meta["val"])
        self.annotate(node, graph, last)

    def refuse(self, node: fx.Node, values: Values, reason: str) -> None:
        """Record the refusal and go on with a stand-in, so that later ops are seen too."""
        self.refusals.add(node, reason)
        val = node.meta.get("val")
        if isinstance(val, (tuple, list)):
            values[node.name] = [self.value(node.name, v) for v in val]
        else:
            values[node.name] = self.value(node.name, val)

    def annotate(self, node: fx.Node, graph: ir.Graph, last: ir.Node | None) -> None:
        """Give every node after ``last`` the provenance of ``node``, in place of torch's long form."""
        props = {"seqc.module": module_path(node), "seqc.source": source_line(node)}
        for added in reversed(graph):
            if added is last:
                return
            added.metadata_props.clear()
            added.metadata_props.update({k: v for k, v in props.items() if v})

    def initializer(self, tensor: torch.Tensor, name: str) -> ir.Value:
        unique, count = name, 1
        taken = {p.name for p in (*self.program.inputs, *self.program.outputs)}
        while unique in self.model.graph.initializers or unique in taken:
            unique, count = f"{name}_{count}", count + 1
        value = self.value(unique, tensor)
        value.const_value = _torch.onnx_tensor(tensor, unique)
        self.model.graph.register_initializer(value)
        return value

    def value(self, name: str, val: Any) -> ir.Value:
        """A fresh value of the type and shape of ``val``."""
        value: ir.Value = _torch.onnx_value(name, self.opset)
        self.describe(value, val)
        return value

    def describe(self, value: Any, val: Any) -> None:
        """Set type and shape from what the node is known to give; symbolic sizes by the user's dimension names."""
        if isinstance(value, Sequence):
            for item, part in zip(value, val, strict=False):
                self.describe(item, part)
        elif isinstance(val, torch.Tensor):
            shape = [*self.program.shape_of(val), *([2] if val.is_complex() else [])]
            value.dtype = _torch.onnx_dtype(val.dtype)
            value.shape = ir.Shape(shape)
        elif isinstance(val, (bool, torch.SymBool)):
            value.dtype, value.shape = ir.DataType.BOOL, ir.Shape([])
        elif isinstance(val, (int, torch.SymInt)):
            value.dtype, value.shape = ir.DataType.INT64, ir.Shape([])
        elif isinstance(val, (float, torch.SymFloat)):
            value.dtype, value.shape = ir.DataType.FLOAT, ir.Shape([])


def _several(node: fx.Node, values: Values) -> Sequence[ir.Value] | None:
    """The results of which a getitem node takes one, where they are values of their own."""
    source = node.args[0] if node.target is operator.getitem else None
    found = values[source.name] if isinstance(source, fx.Node) else None
    return found if isinstance(found, Sequence) else None


def _fingerprint(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Equal for equal tensors, and seldom for others: type, shape and a few elements."""
    flat = tensor.detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // 16)][:16]
    return (tensor.dtype, tuple(tensor.shape), *map(str, sample.tolist()))


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one type and shape are equal bit by bit, so that -0.0 is not 0.0 and NaN is NaN."""
    if a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
        return True
    x, y = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(x, y)


def stamp(model: ir.Model, program: Program) -> None:
    """Say in the model who made it, and of what."""
    model.producer_name, model.producer_version = "seqc", seqc.__version__
    model.metadata_props.clear()
    model.metadata_props["seqc.version"] = seqc.__version__
    model.metadata_props["seqc.torch"] = torch.__version__
    ports = [f"{p.name}[{', '.join(map(str, p.shape))}]" for p in (*program.inputs, *program.outputs)]
    count = len(program.inputs)
    model.doc_string = (
        f"Compiled by seqc {seqc.__version__}: {', '.join(ports[:count])} -> {', '.join(ports[count:])}. "
        "Nodes carry seqc.module and seqc.source: the module and the source line they come from."
    )
    model.graph.doc_string = None
