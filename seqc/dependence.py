"""Which values of a graph are computed from which."""

from __future__ import annotations

from collections.abc import Iterable

import torch.fx as fx


def computed_from(sources: Iterable[fx.Node]) -> set[fx.Node]:
    """``sources`` and what is computed from any of them."""
    found = set(sources)
    pending = list(found)
    while pending:
        new = [user for user in pending.pop().users if user not in found]
        found.update(new)
        pending += new
    return found


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """``nodes`` and what any of them is computed from."""
    found = set(nodes)
    pending = list(found)
    while pending:
        new = [source for source in pending.pop().all_input_nodes if source not in found]
        found.update(new)
        pending += new
    return found
