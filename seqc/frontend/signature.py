"""Example inputs and dynamic dimensions as the user gives them, bound to the names of ``forward``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from seqc.errors import UsageError

# Sizes to trace at: distinct primes, so that no two dimensions are confused with each other or with a usual width.
_BATCH_SIZES = (3, 2, 5)
_LENGTHS = (7, 5, 11, 13, 17)


@dataclass(frozen=True)
class Axis:
    """A named dimension as the user declared it, with its inclusive range (``max`` None: unbounded)."""

    name: str
    min: int = 1
    max: int | None = None


@dataclass(frozen=True)
class Signature:
    """Named example tensors and, for each, which axis is which named dimension."""

    examples: dict[str, torch.Tensor]
    axes: dict[str, dict[int, str]]
    dims: dict[str, Axis]
    positional: bool

    def example_sizes(self) -> dict[str, int]:
        """The size of each named dimension in the example inputs."""
        sizes: dict[str, int] = {}
        for name, axes in self.axes.items():
            for axis, dim in axes.items():
                size = self.examples[name].shape[axis]
                if sizes.setdefault(dim, size) != size:
                    raise UsageError(f"dimension {dim!r} is {sizes[dim]} in one example input and {size} in {name!r}")
        return sizes

    def trace_sizes(self) -> dict[str, int]:
        """Small sizes to trace at, inside each dimension's range; axis 0 is taken for a batch."""
        batch, lengths = list(_BATCH_SIZES), list(_LENGTHS)
        sizes: dict[str, int] = {}
        for name in self.dims:
            is_batch = all(a == 0 for axes in self.axes.values() for a, d in axes.items() if d == name)
            pool = batch if is_batch and batch else lengths
            sizes[name] = self.clamp(name, pool.pop(0) if pool else 19 + len(sizes))
        return sizes

    def clamp(self, dim: str, size: int) -> int:
        axis = self.dims[dim]
        size = max(size, axis.min)
        return size if axis.max is None else min(size, axis.max)

    def resized(self, sizes: Mapping[str, int]) -> dict[str, torch.Tensor]:
        """The example inputs, cropped or repeated along each named axis to ``sizes``."""
        result = {}
        for name, tensor in self.examples.items():
            for axis, dim in self.axes.get(name, {}).items():
                index = torch.arange(sizes[dim], device=tensor.device) % max(tensor.shape[axis], 1)
                tensor = tensor.index_select(axis, index)
            result[name] = tensor.contiguous()
        return result

    def random(self, sizes: Mapping[str, int], seed: int) -> dict[str, torch.Tensor]:
        """Fresh inputs of ``sizes`` like the examples: floats with their mean and spread, other types drawn from them."""
        generator = torch.Generator().manual_seed(seed)
        result = {}
        for name, like in self.resized(sizes).items():
            example = self.examples[name]
            if like.is_floating_point() or like.is_complex():
                flat = torch.view_as_real(example) if example.is_complex() else example
                mean, std = flat.double().mean(), flat.double().std(unbiased=False)
                shape = (*like.shape, 2) if like.is_complex() else like.shape
                noise = torch.randn(shape, generator=generator, dtype=torch.float64) * std + mean
                result[name] = (torch.view_as_complex(noise) if like.is_complex() else noise).to(like.dtype)
            elif example.numel() == 0:
                result[name] = like
            else:
                pick = torch.randint(example.numel(), like.shape, generator=generator)
                result[name] = example.flatten()[pick]
        return result


def bind(
    model: nn.Module,
    example_inputs: Sequence[torch.Tensor] | Mapping[str, torch.Tensor],
    dynamic_shapes: Mapping[str, Any] | Sequence[Any] | None,
) -> Signature:
    """Check the example inputs against ``model.forward`` and the dynamic dimensions against the examples.

    Without ``dynamic_shapes`` axis 0 of every input of rank two or more is ``batch`` and axis 1 is ``sequence``.
    """
    given: Any = example_inputs
    if isinstance(given, torch.Tensor):
        example_inputs = (given,)
    positional = not isinstance(example_inputs, Mapping)
    names = _parameter_names(model, len(example_inputs))
    if isinstance(example_inputs, Mapping):
        examples = dict(example_inputs)
    else:
        if len(example_inputs) > len(names):
            raise UsageError(f"forward takes {len(names)} inputs, {len(example_inputs)} examples were given")
        examples = dict(zip(names, example_inputs, strict=False))
    if not examples:
        raise UsageError("at least one example input is needed")
    for name, value in examples.items():
        if not isinstance(value, torch.Tensor):
            raise UsageError(f"example input {name!r} is a {type(value).__name__}; seqc takes tensors")
    axes, dims = _dynamic_axes(examples, dynamic_shapes)
    signature = Signature(examples, axes, dims, positional)
    signature.example_sizes()
    return signature


def _parameter_names(model: nn.Module, count: int) -> list[str]:
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return [f"input_{i}" for i in range(count)]
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        names += [f"input_{i}" for i in range(len(names), count)]
    return names


def _dynamic_axes(
    examples: dict[str, torch.Tensor], dynamic_shapes: Mapping[str, Any] | Sequence[Any] | None
) -> tuple[dict[str, dict[int, str]], dict[str, Axis]]:
    if dynamic_shapes is None:
        dynamic_shapes = {n: {0: "batch", 1: "sequence"} for n, t in examples.items() if t.dim() >= 2}
    if not isinstance(dynamic_shapes, Mapping):
        dynamic_shapes = dict(zip(examples, dynamic_shapes, strict=False))
    axes: dict[str, dict[int, str]] = {}
    dims: dict[str, Axis] = {}
    for name, spec in dynamic_shapes.items():
        if name not in examples:
            raise UsageError(f"dynamic_shapes names {name!r}, but the inputs are {', '.join(examples)}")
        items = spec.items() if isinstance(spec, Mapping) else enumerate(spec or ())
        for axis, value in items:
            if value is None or isinstance(value, int):
                continue
            rank = examples[name].dim()
            if not isinstance(axis, int) or not -rank <= axis < rank:
                raise UsageError(f"input {name!r} has {rank} axes, dynamic_shapes names axis {axis}")
            declared = _axis(value)
            if dims.setdefault(declared.name, declared) != declared:
                raise UsageError(f"dimension {declared.name!r} is declared twice with different ranges")
            axes.setdefault(name, {})[axis % rank] = declared.name
    return axes, dims


def _axis(value: Any) -> Axis:
    if isinstance(value, str):
        if not value.isidentifier():
            raise UsageError(f"dimension name {value!r} is not an identifier")
        return Axis(value)
    name = getattr(value, "__name__", None)
    if name is None or not hasattr(value, "min") or hasattr(value, "root"):
        raise UsageError(f"dynamic_shapes takes names or torch.export.Dim, not {value!r}")
    unbounded = value.max is None or value.max >= 2**31
    return Axis(name, max(int(value.min), 1), None if unbounded else int(value.max))
