"""Modules made of functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Applied(nn.Module):
    """The forward is ``function``, of one input called x."""

    def __init__(self, function: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)
