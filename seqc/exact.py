"""The source model in float64: what decides where float32 lost digits that the compiled model kept."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import nn

from seqc.compare import Array

Source = Callable[[dict[str, torch.Tensor]], Mapping[str, Array]]


def in_float64(module: nn.Module, build: Callable[[nn.Module], Source]) -> Source:
    """``build`` of a float64 copy of ``module``, as a function of inputs that are cast to float64 too.

    The copy is made at the first call. Constants that the forward makes are float64 where it does not name a type; the
    function raises what the model raises where it is tied to another one.
    """
    made: list[Source] = []

    def run(inputs: dict[str, torch.Tensor]) -> Mapping[str, Array]:
        usual = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            if not made:
                made.append(build(_copied(module)))
            return made[0]({name: _wide(tensor) for name, tensor in inputs.items()})
        finally:
            torch.set_default_dtype(usual)

    return run


def _copied(module: nn.Module) -> nn.Module:
    """Not ``module.to(torch.float64)``, which drops the imaginary part of complex weights."""
    copied = copy.deepcopy(module)
    for tensor in (*copied.parameters(), *copied.buffers()):
        tensor.data = _wide(tensor.data)
    return copied


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.double() if tensor.is_floating_point() else tensor
