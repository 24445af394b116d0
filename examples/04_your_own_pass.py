"""A pass of your own: a frozen dataclass that edits the Program and returns how many changes it made."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

import seqc
from seqc.passes import DEFAULT
from seqc.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class DoubleNegation:
    """Removes neg(neg(x)).

    neg(neg(x))  ->  x
    """

    name: ClassVar[str] = "double-negation"
    tolerance: ClassVar[float] = 0.0

    def __call__(self, program: Program) -> int:
        changes = 0
        for node in list(program.graph.nodes):
            inner = node.args[0] if node.target is aten.neg.default else None
            if isinstance(inner, torch.fx.Node) and inner.target is aten.neg.default:
                node.replace_all_uses_with(inner.args[0])
                program.graph.erase_node(node)
                changes += 1
        program.graph_module.recompile()
        return changes


class Model(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.neg(torch.neg(torch.cumsum(x, dim=1)))


compiled = seqc.compile(Model(), (torch.randn(2, 10, 8),), passes=[*DEFAULT, DoubleNegation()])
for record in compiled.report["passes"]:
    print(f"{record['name']:<20} {record['changes']} changes")
changes = {record["name"]: record["changes"] for record in compiled.report["passes"]}
assert changes["double-negation"] == 1
