"""``seqc::left_padded_conv`` to ONNX ``Conv`` with padding in front only.

Three ways, each where it is fastest on ONNX Runtime's CPU provider (``python -m tests.benchmarks.convolutions``); where the
number of steps is known at run time only, an ``If`` chooses:

* A single step, as in streaming, is a product with the taps: Conv does as many small matrix products as there are channels.
* Over an image of one row, for which the runtime has a layout with channels inside: at any length from ``MANY_TAPS`` taps
  on, and for at most ``FEW_STEPS`` steps of at least ``WIDE`` channels. It is taken for weights that the graph of the Conv
  holds (:func:`hold_biases`), and fails where there are no steps.
* Over a line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch.fx as fx

from seqc.ops.causal_conv import reach
from seqc.program import named_args
from seqc.sizes import at_least_one

if TYPE_CHECKING:
    from seqc.backends.onnx.translate import Translator, Values

MANY_TAPS = 12
FEW_STEPS = 128
WIDE = 192

Form = Callable[[ir.Graph], ir.Value]


def lower(translator: Translator, node: fx.Node, graph: ir.Graph, values: Values) -> ir.Value:
    """Append the ONNX form of a left_padded_conv node to ``graph``."""
    arguments = named_args(node)
    x, weight, bias, left, dilation = arguments.values()
    inputs = [values[n.name] for n in (x, weight, bias) if n is not None]
    steps = reach(weight.meta["val"], dilation)
    channels, _, taps = (int(size) for size in weight.meta["val"].shape)
    line, row = (partial(conv, inputs, left, dilation, over) for over in (False, True))
    forms: list[tuple[str, int, Form]] = []
    # With zeros in front one step meets the last tap only, with a state in front all of them; between are no such forms.
    if left == steps or (left == 0 and dilation == 1):
        forms.append(("Equal", 1, partial(_single, inputs, left)))
    length = node.meta["val"].shape[2]
    known = inputs[1].const_value is not None and at_least_one(translator.program.dims, length)
    if known and taps < MANY_TAPS and channels >= WIDE:
        forms.append(("LessOrEqual", FEW_STEPS, row))
    otherwise = row if known and taps >= MANY_TAPS else line
    if isinstance(length, int):
        return next((form for _, most, form in forms if length <= most), otherwise)(graph)
    for is_taken, most, form in reversed(forms):
        size = most + steps - left
        otherwise = partial(_if, translator, node, inputs[0], ir.tensor([size]), is_taken, form, otherwise)
    return otherwise(graph)


def _if(
    translator: Translator,
    node: fx.Node,
    x: ir.Value,
    size: ir.TensorProtocol,
    is_taken: str,
    form: Form,
    otherwise: Form,
    graph: ir.Graph,
) -> ir.Value:
    """``form`` where the steps of ``x`` are ``is_taken``, a comparison with ``size``."""
    branches = [ir.Graph([], [], nodes=[], name=f"{node.name}_{which}") for which in ("few", "more")]
    for branch, write in zip(branches, (form, otherwise), strict=True):
        result = write(branch)
        translator.describe(result, node.meta["val"])
        branch.outputs.append(result)
    steps = _append(graph, "Shape", [x], ir.AttrInt64("start", 2), ir.AttrInt64("end", 3))
    taken = _append(graph, is_taken, [steps, _append(graph, "Constant", [], ir.AttrTensor("value", size))])
    attributes = [ir.AttrGraph("then_branch", branches[0]), ir.AttrGraph("else_branch", branches[1])]
    result = _append(graph, "If", [taken], *attributes)
    result.name = f"{node.name}_{is_taken.lower()}"
    return result


def _single(inputs: Sequence[ir.Value], left: int, graph: ir.Graph) -> ir.Value:
    x, weight, *bias = inputs
    if left:
        last = _append(graph, "Gather", [weight, _ints(graph, -1)], ir.AttrInt64("axis", 2))
        y = _append(graph, "Mul", [x, _append(graph, "Squeeze", [last, _ints(graph, 1)])])
    else:
        products = _append(graph, "Mul", [x, _append(graph, "Squeeze", [weight, _ints(graph, 1)])])
        y = _append(graph, "ReduceSum", [products, _ints(graph, 2)], ir.AttrInt64("keepdims", 1))
    return _append(graph, "Add", [y, _append(graph, "Unsqueeze", [bias[0], _ints(graph, 1)])]) if bias else y


def conv(inputs: Sequence[ir.Value], left: int, dilation: int, over_image: bool, graph: ir.Graph) -> ir.Value:
    """Append the Conv of ``inputs`` (x, weight and perhaps bias), over an image of one row or over a line."""
    x, weight, *bias = inputs
    assert weight.shape is not None
    channels, _, taps = weight.shape.numpy()
    first = [1] if over_image else []
    none = [0] if over_image else []
    if over_image:
        x, weight = (_append(graph, "Unsqueeze", [value, _ints(graph, 2)]) for value in (x, weight))
    y = _append(
        graph,
        "Conv",
        [x, weight, *bias],
        ir.AttrInt64("group", channels),
        ir.AttrInt64s("kernel_shape", [*first, taps]),
        ir.AttrInt64s("dilations", [*first, dilation]),
        ir.AttrInt64s("pads", [*none, left, *none, 0]),
    )
    return _append(graph, "Squeeze", [y, _ints(graph, 2)]) if over_image else y


def hold_biases(graph: ir.Graph) -> None:
    """Give each Conv over an image that stands in a branch of ``graph``, the outermost, a copy of its bias there, in place.

    The kernel, which is unsqueezed there, becomes the branch's own when the runtime loads the model.
    """
    for node in list(graph.all_nodes()):
        if node.op_type != "Conv" or node.graph is graph or len(node.inputs) < 3:
            continue
        bias = node.inputs[2]
        if bias is None or bias.const_value is None or len(node.attributes["kernel_shape"].as_ints()) == 1:
            continue
        held = ir.Node("", "Constant", [], [ir.AttrTensor("value", bias.const_value)])
        held.outputs[0].dtype, held.outputs[0].shape = bias.const_value.dtype, bias.shape
        assert node.graph is not None
        node.graph.insert_before(node, held)
        node.replace_input_with(2, held.outputs[0])
        if bias.is_initializer() and not bias.uses():
            del graph.initializers[str(bias.name)]


def _append(graph: ir.Graph, op: str, inputs: Sequence[ir.Value], *attributes: ir.Attr) -> ir.Value:
    node = ir.Node("", op, inputs, attributes)
    graph.append(node)
    return node.outputs[0]


def _ints(graph: ir.Graph, value: int) -> Any:
    return _append(graph, "Constant", [], ir.AttrTensor("value", ir.tensor([value], dtype=ir.DataType.INT64)))
