"""Which values of a graph are computed from which."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch.fx as fx


def computed_from(sources: Iterable[fx.Node]) -> set[fx.Node]:
    """``sources`` and what is computed from any of them."""
    return _reached(sources, lambda node: node.users)


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """``nodes`` and what any of them is computed from."""
    return _reached(nodes, lambda node: node.all_input_nodes)


def _reached(starts: Iterable[fx.Node], following: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    found = set(starts)
    pending = list(found)
    while pending:
        new = [node for node in following(pending.pop()) if node not in found]
        found.update(new)
        pending += new
    return found
