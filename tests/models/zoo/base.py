"""What a model of the zoo is: how to build it, what to feed it, and the lengths that the model itself accepts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

LENGTHS = (1, 2, 7, 64, 257)
"""The lengths at which a compiled model is compared with its source, where the source model accepts them."""

BATCHES = (1, 3)

VOCABULARY = 61
"""Token ids are below this; a prime, so that no other dimension has the same size."""

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class ZooModel:
    """A model with its inputs.

    ``build()`` returns the module in eval mode, its weights always the same. ``inputs(batch, length, seed)`` returns
    tensors by name in the order of ``forward``. ``lengths`` are the lengths that the model itself accepts, out of
    ``LENGTHS`` unless it takes no other; ``loops`` tells whether its forward loops over time in Python, and ``note``
    says what is particular about it. In the group "refused", ``culprit`` is a piece of the source line to be named.
    """

    name: str
    group: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int, int], Inputs]
    dynamic_shapes: Mapping[str, Mapping[int, str]]
    lengths: tuple[int, ...] = LENGTHS
    loops: bool = False
    note: str = ""
    culprit: str = ""


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Noise on every weight, eval mode: so that no bias is 0, no scale 1, and no layer too weak to be noticed.

    Initialisation leaves many models close to the identity (deviation 0.02), and an error in a layer that changes
    nothing would not be seen in the output.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.25 if parameter.dim() > 1 else 0.1
            real = torch.view_as_real(parameter) if parameter.is_complex() else parameter
            real.add_(torch.randn(real.shape, generator=generator) * scale)
    return model.eval()


def tokens(name: str = "input_ids", low: int = 0) -> Callable[[int, int, int], Inputs]:
    """Inputs of one int64 tensor [batch, length] of token ids in [low, VOCABULARY)."""

    def inputs(batch: int, length: int, seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        return {name: torch.randint(low, VOCABULARY, (batch, length), generator=generator)}

    return inputs


def floats(*names: str, width: int) -> Callable[[int, int, int], Inputs]:
    """Inputs of float32 tensors [batch, length, width], one per name."""

    def inputs(batch: int, length: int, seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        return {name: torch.randn(batch, length, width, generator=generator) for name in names}

    return inputs


def tensors(output: Any) -> list[torch.Tensor]:
    """The tensors in what a model returns, in order; None, caches and other objects are left out."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, Mapping):
        return [t for value in output.values() for t in tensors(value)]
    if isinstance(output, (list, tuple)):
        return [t for value in output for t in tensors(value)]
    return []


def eager(model: nn.Module, inputs: Inputs) -> list[torch.Tensor]:
    """The reference: the source model run in eager PyTorch."""
    with torch.no_grad():
        return tensors(model(**inputs))
