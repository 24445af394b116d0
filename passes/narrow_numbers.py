"""NarrowNumbers: what Python computes of positions and lengths is float32, for targets without float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx
from torch.utils import _pytree as pytree

from seqc import _torch
from seqc.ops.recurrence import is_recurrence
from seqc.program import Program, place_of

aten = torch.ops.aten

_MADE = {aten.arange.default, aten.full.default}
_COMPUTED = {
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.neg.default,
    aten._to_copy.default,
    aten.cat.default,
    aten.permute.default,
    aten.reshape.default,
    aten.slice.Tensor,
    aten.unsqueeze.default,
}


@dataclass(frozen=True)
class NarrowNumbers:
    """Numbers of the model's Python code that became tensors of float64 are float32: 0.01 * t, t / T.

        x[:, t] + 0.01 * t      y = add(x, f64(0.01) * f64(t))    ->    y = add(x, f32(0.01) * f32(t))

    For targets that compute nothing in float64. It is done where all float64 there is comes from positions, lengths and
    literals by sums, products and quotients, whose results PyTorch itself reads as float32 numbers: then each is off by a few
    units in its last place. A tensor of the model that is float64, an angle, a power, a comparison, a sum over the steps
    stays float64, which the target then refuses.

    ``tolerance``: a few units in the last place of float32.
    """

    name: ClassVar[str] = "narrow_numbers"
    tolerance: ClassVar[float] = 1e-6

    def __call__(self, program: Program) -> int:
        nodes = [node for gm in program.graph_modules() for node in gm.graph.nodes]
        doubles = [node for node in nodes if _is_double(node.meta.get("val")) and node.op == "call_function"]
        outside = [*program.input_nodes, *program.weight_nodes, *program.output_nodes]
        if not doubles or any(_is_double(node.meta["val"]) for node in outside):
            return 0
        if not all(_is_number(n) for n in doubles) or not all(_reads_as_number(n) for n in nodes if n not in doubles):
            return 0
        for node in nodes:
            node.args, node.kwargs = pytree.tree_map(_single, (node.args, node.kwargs), is_leaf=lambda a: a is None)
            if _is_double(node.meta.get("val")):
                with _torch.faking(program.fake_mode):
                    node.meta["val"] = node.meta["val"].to(torch.float32)
        for gm in program.graph_modules():
            gm.recompile()
        program.reasons += [
            f"{place_of(n)}: a number made of positions is float32" for n in doubles if n.target in _MADE
        ]
        return len(doubles)


def _is_double(value: Any) -> bool:
    return any(isinstance(v, torch.Tensor) and v.dtype is torch.float64 for v in pytree.tree_leaves(value))


def _single(arg: Any) -> Any:
    return torch.float32 if arg is torch.float64 else arg


def _is_number(node: fx.Node) -> bool:
    """Whether a value of float64 is made of integers, literals and other such values without losing more than digits."""
    read = [a.meta["val"] for a in node.all_input_nodes if isinstance(a.meta["val"], torch.Tensor)]
    exact = all(v.dtype is torch.float64 or not v.is_floating_point() for v in read)
    return exact and node.target in _MADE | _COMPUTED


def _reads_as_number(node: fx.Node) -> bool:
    """Whether a value of another type takes those of float64, if it reads any, as float32 numbers."""
    if node.op != "call_function" or is_recurrence(node):
        return True
    value = node.meta["val"]
    double = any(_is_double(a.meta.get("val")) for a in node.all_input_nodes)
    return not double or (isinstance(value, torch.Tensor) and value.is_floating_point())
