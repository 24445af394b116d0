"""From names in what TensorRT says back to ONNX nodes, and from those to the lines of the user's model."""

from __future__ import annotations

import re
from dataclasses import dataclass

import onnx_ir as ir


@dataclass(frozen=True)
class Origin:
    """An ONNX node, by name and operator, with the module and the source line that it comes from (empty: unknown)."""

    node: str
    operator: str
    module: str
    source: str

    def __str__(self) -> str:
        place = " ".join(filter(None, (self.module, self.source)))
        return f"{self.operator} ({self.node})" + (f" at {place}" if place else "")


class Origins:
    """The nodes of a model by name, those of its bodies included, and by the values that they give."""

    def __init__(self, model: ir.Model) -> None:
        self._found: dict[str, Origin] = {}
        for node in model.graph.all_nodes():
            props = node.metadata_props
            origin = Origin(node.name or "", node.op_type, props.get("seqc.module", ""), props.get("seqc.source", ""))
            for value in node.outputs:
                if value.name:
                    self._found.setdefault(value.name, origin)
            self._found[origin.node] = origin

    def get(self, name: str) -> Origin | None:
        return self._found.get(name)

    def first_in(self, text: str) -> Origin | None:
        """The first node that ``text`` names, itself or by one of its values."""
        for word in re.findall(r"[\w./]+", text):
            for name in (word, word.rstrip("."), re.sub(r"(\.\d+)?$", "", word)):
                if len(name) > 2 and name in self._found:
                    return self._found[name]
        return None
