"""Inverses and solutions of linear systems without the check that raises for singular matrices.

torch.export keeps that check as an effect on an otherwise pure graph. Without it the numbers are the same, and infinite
or NaN where torch would raise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_UNCHECKED: dict[Any, Callable[..., torch.Tensor]] = {
    **dict.fromkeys(
        (torch.linalg.inv, torch.inverse, torch.Tensor.inverse), lambda *a, **k: torch.linalg.inv_ex(*a, **k)[0]
    ),
    torch.linalg.solve: lambda *a, **k: torch.linalg.solve_ex(*a, **k)[0],
    torch.linalg.cholesky: lambda *a, **k: torch.linalg.cholesky_ex(*a, **k)[0],
}


class Unchecked(TorchFunctionMode):
    """Inside, torch.linalg's inv, solve and cholesky do not look at whether they succeeded."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _UNCHECKED.get(func, func)(*args, **(kwargs or {}))
