"""Whatever Python object a user compiles, as a module that can be traced, with inputs by name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from seqc.errors import UsageError
from seqc.frontend.exported import from_exported
from seqc.frontend.load_script import to_module

Examples = Sequence[torch.Tensor] | Mapping[str, torch.Tensor]


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Inside, ``module`` is in eval mode; behind it every part is in the mode it was in."""
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def traceable(model: Any, examples: Examples, dynamic_shapes: Any) -> tuple[nn.Module, Examples, Any]:
    """A module, example inputs and dynamic shapes that ``bind`` takes.

    An ExportedProgram keeps the dynamic dimensions it was exported with unless others are given; a TorchScript module is
    interpreted, so that its loops can be traced. Raises UsageError for anything else that is no nn.Module.
    """
    if isinstance(model, torch.export.ExportedProgram):
        found = from_exported(model)
        named = examples if isinstance(examples, Mapping) else dict(zip(found.example_inputs, examples, strict=False))
        if isinstance(dynamic_shapes, Sequence):
            dynamic_shapes = dict(zip(found.example_inputs, dynamic_shapes, strict=False))
        return found.module, named, found.dynamic_shapes if dynamic_shapes is None else dynamic_shapes
    if isinstance(model, torch.jit.ScriptModule):
        names = [a.name for a in model.forward.schema.arguments if a.name != "self"]  # type: ignore[attr-defined]
        named = examples if isinstance(examples, Mapping) else dict(zip(names, examples, strict=False))
        return to_module(model, named), named, dynamic_shapes
    if not isinstance(model, nn.Module):
        raise UsageError(f"seqc compiles an nn.Module or a torch.export.ExportedProgram, not {type(model).__name__}")
    return model, examples, dynamic_shapes
