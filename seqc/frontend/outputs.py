"""What a model returns, reduced to tensors with names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def keep_tensors(value: Any, path: str, dropped: list[str]) -> Any:
    """What of a model's output is tensors, in plain containers; the rest (caches, None) is named in ``dropped``."""
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, Mapping):
        kept = {k: keep_tensors(v, f"{path}.{k}", dropped) for k, v in value.items()}
        return {k: v for k, v in kept.items() if v is not None} or None
    if isinstance(value, (list, tuple)):
        kept_list = [keep_tensors(v, f"{path}[{i}]", dropped) for i, v in enumerate(value)]
        return tuple(v for v in kept_list if v is not None) or None
    if value is not None:
        dropped.append(f"{path} of type {type(value).__name__} is not a tensor and is not part of the compiled model")
    return None


def output_names(paths: list[Any]) -> tuple[str, ...]:
    """A name per output from its place: a dict's key, ``output`` for a single tensor, ``output_1_0`` in nested tuples."""
    names = []
    for path in paths:
        parts = [str(getattr(k, "key", getattr(k, "idx", k))) for k in path]
        name = "_".join(parts) if parts else "output"
        names.append(f"output_{name}" if name[0].isdigit() else name)
    return tuple(names)
