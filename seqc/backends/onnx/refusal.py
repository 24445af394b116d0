"""Collects what cannot be translated, so that one error can name all of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.fx as fx

from seqc.errors import UnsupportedOpError
from seqc.program import provenance


@dataclass(frozen=True)
class Refusal:
    """One op that has no ONNX form: its name, module path with source line, and the reason."""

    op: str
    where: str
    reason: str


class Unsupported(Exception):
    """Raised by a translation that knows it cannot be right for these arguments; its message is the reason."""


@dataclass
class Refusals:
    """The refusals met so far; alike ones (same op, place and reason) are kept once."""

    items: list[Refusal] = field(default_factory=list)

    def add(self, node: fx.Node, reason: str) -> None:
        target = node.target
        op = (
            str(target)
            if not callable(target) or hasattr(target, "_schema")
            else getattr(target, "__name__", str(target))
        )
        refusal = Refusal(op, provenance(node) or f"node {node.name}", reason)
        if refusal not in self.items:
            self.items.append(refusal)

    def check(self) -> None:
        """Raise UnsupportedOpError that lists every refusal, if there is any."""
        if self.items:
            ops = list(dict.fromkeys(r.op for r in self.items))
            lines = [f"the onnx backend cannot translate {len(ops)} op{'s' * (len(ops) > 1)}: {', '.join(ops)}"]
            lines += [f"  {r.op} at {r.where}: {r.reason}" for r in self.items]
            raise UnsupportedOpError("\n".join(lines))


def innermost_reason(error: BaseException) -> str:
    """One line saying why a translation failed: the message of the error at the bottom of the chain."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip().splitlines()
    if isinstance(error, Unsupported):
        return text[0]
    return f"its translation failed with {type(error).__name__}: {text[0] if text else ''}"
