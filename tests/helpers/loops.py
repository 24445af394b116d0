"""Hand-built Programs that hold ``seqc::recurrence`` nodes, without the front end's rerolling."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from seqc import _torch
from seqc.frontend.capture import capture
from seqc.frontend.signature import bind
from seqc.ops.recurrence import propagate, recurrence
from seqc.program import Port, Program


class _Function(nn.Module):
    def __init__(self, function: Callable[..., Any], weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.function = function
        for name, tensor in weights.items():
            self.register_parameter(name, nn.Parameter(tensor))

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(*inputs, **dict(self.named_parameters()))


def traced(
    function: Callable[..., Any],
    inputs: Sequence[torch.Tensor],
    dynamic: dict[str, dict[int, Any]],
    weights: dict[str, torch.Tensor] | None = None,
) -> Program:
    """The Program of ``function(*inputs, **weights)``; inputs are called input_0, input_1, ..."""
    model = _Function(function, weights or {})
    signature = bind(model, tuple(inputs), dynamic)
    return capture(model, signature, signature.trace_sizes()).program


def step_module(step: Callable[..., Any], values: Sequence[Any]) -> fx.GraphModule:
    """The graph of one step on fake ``values``, sizes kept symbolic; it returns one flat tuple."""
    mode = next(v.fake_mode for v in values if isinstance(v, torch.Tensor))
    with mode, _torch.no_guards(mode.shape_env):
        gm = make_fx(step, decomposition_table=_torch.onnx_decompositions(), tracing_mode="real")(*values)
    out = gm.graph.output_node()
    if isinstance(out.args[0], fx.Node):
        out.args = ((out.args[0],),)
    else:
        out.args = (tuple(out.args[0]),)
    gm.recompile()
    return gm


def splice(gm: fx.GraphModule, body: fx.GraphModule, carries: int, xs: int, *, reverse: bool = False) -> fx.GraphModule:
    """Replace what ``gm`` returns, (carries..., xs..., invariants...), by a recurrence over it and all its results.

    ``body`` may hold recurrences itself. The trip count is the size of the first x, axis 0.
    """
    graph, out = gm.graph, gm.graph.output_node()
    nodes = list(out.args[0])
    name = f"body_{sum(n.op == 'get_attr' for n in graph.nodes)}"
    gm.add_submodule(name, body)
    with graph.inserting_before(out):
        ref = graph.get_attr(name)
        groups = tuple(nodes[:carries]), tuple(nodes[carries : carries + xs]), tuple(nodes[carries + xs :])
        trip: Any = graph.call_function(torch.ops.aten.sym_size.int, (groups[1][0], 0))
        loop = graph.call_function(recurrence, (ref, trip, *groups, reverse))
        count = len(body.graph.output_node().args[0])
        out.args = (tuple(graph.call_function(operator.getitem, (loop, i)) for i in range(count)),)
    gm.recompile()
    return gm


def loop_program(
    outer: Callable[..., Any],
    inputs: Sequence[torch.Tensor],
    dynamic: dict[str, dict[int, Any]],
    step: Callable[..., Any] | Callable[[Sequence[Any]], fx.GraphModule],
    *,
    carries: int,
    xs: int,
    reverse: bool = False,
    weights: dict[str, torch.Tensor] | None = None,
    nested: bool = False,
) -> Program:
    """A recurrence with ``step(*carries, *xs, *invariants)`` over what ``outer`` returns: (carries, xs, invariants).

    With ``nested``, ``step`` takes the list of fake step values and returns the body as a GraphModule.
    """
    program = traced(outer, inputs, dynamic, weights)
    values = [n.meta["val"] for n in program.output_nodes]
    with program.fake_mode, _torch.no_guards(program.fake_mode.shape_env):
        values = [v[0] if carries <= i < carries + xs else v for i, v in enumerate(values)]
    body = step(values) if nested else step_module(step, values)
    splice(program.graph_module, body, carries, xs, reverse=reverse)
    propagate(program.graph_module)
    program.outputs = tuple(
        Port(f"out_{i}", n.meta["val"].dtype, program.shape_of(n.meta["val"]))
        for i, n in enumerate(program.output_nodes)
    )
    return program
