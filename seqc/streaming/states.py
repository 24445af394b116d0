"""The states of a streaming Program: what one call leaves for the next."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch.fx as fx


@dataclass
class Slot:
    """A state while it is being derived: where it stands in the source graph, and its nodes in the new one."""

    kind: str
    origin: fx.Node
    placeholder: fx.Node
    initial: fx.Node | float
    grows: int | None = None
    pending: int | None = None
    window: int | None = None
    following: fx.Node | None = None


def names(slots: list[Slot], layer_of: dict[int, int]) -> list[tuple[str, str]]:
    """Names of the states' inputs and outputs, as ONNX Runtime GenAI derives them: ``past_key_values.0.key``."""
    found: list[tuple[str, str]] = []
    taken: set[str] = set()
    for i, slot in enumerate(slots):
        stem = slot.kind if slot.kind == "position" else f"{layer_of[i]}.{slot.kind}"
        unique, n = stem, 1
        while unique in taken:
            n += 1
            unique = f"{stem}_{n}"
        taken.add(unique)
        found.append(
            (f"past_{unique}", f"present_{unique}")
            if slot.kind == "position"
            else (f"past_key_values.{unique}", f"present.{unique}")
        )
    return found


def layer(path: str) -> int | None:
    """The first number in a module's path: ``model.layers.3.attention`` is of layer 3."""
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", path)
    return int(match.group(1)) if match else None
