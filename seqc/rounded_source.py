"""The source of a quantised artifact with the weights that the artifact holds: what that artifact has to compute."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import nn

from seqc.backends.onnx.quantize import Stored
from seqc.errors import VerificationError

_CAST = ".to_copy"
"""Behind the name of a weight that was put in another type at compile time."""

# Relative: the type of a weight rounds it before it is divided into units, and again what they give.
_ROUNDING = {"float32": 2.0**-20, "float16": 2.0**-9, "bfloat16": 2.0**-6}


def round_weights(module: nn.Module, matrices: Iterable[Stored], others: Iterable[str]) -> str:
    """Put ``matrices``, which an artifact has instead of the weights of ``module``, in their place.

    Each has to be within half a unit of the weight that it was made of; so this shows too that all of them are the module's.
    ``others`` are the names of the weights that the artifact has as they were.

    Returns:
        Empty, or why one of them cannot be put there, the module then being as it was: it was computed of several weights.

    Raises:
        VerificationError: a matrix is not the weight of its name, rounded.
    """
    weights = dict(module.state_dict(keep_vars=True))
    unrounded = {tensor.data_ptr() for other in others for name, tensor in weights.items() if _made_of(other, name)}
    found: list[tuple[torch.Tensor, Stored]] = []
    for matrix in matrices:
        values = matrix.values.astype(np.float32)
        name = _source_name(matrix.name, weights)
        if name is None or weights[name].shape != values.shape:
            return f"{matrix.name} is computed of the model's weights"
        if weights[name].data_ptr() in unrounded:
            return f"{name} is also read as it was"
        unit = matrix.unit.astype(np.float32)
        off = np.abs(weights[name].detach().cpu().float().numpy() - values)
        rounding = _ROUNDING.get(matrix.values.dtype.name, _ROUNDING["float32"]) * np.abs(values)
        if not (off <= 0.5 * unit + rounding).all():
            raise VerificationError(
                f"the artifact's {name} is not the source's, rounded: it is off by {float((off / unit).max()):.2g} units, "
                "and rounding takes half a unit at most"
            )
        found.append((weights[name], matrix))
    with torch.no_grad():
        for weight, matrix in found:
            weight.copy_(torch.from_numpy(matrix.values.astype(np.float32)))
    return ""


def _source_name(name: str, weights: Mapping[str, torch.Tensor]) -> str | None:
    """The weight that the artifact calls ``name``. What loads a model may put it inside another, whose name is in front."""
    plain = name.removesuffix(_CAST)
    if plain in weights:
        return plain
    found = [n for n in weights if plain.endswith(f".{n}") or n.endswith(f".{plain}")]
    return found[0] if len(found) == 1 else None


def _made_of(name: str, weight: str) -> bool:
    """Whether what the artifact calls ``name`` is ``weight``, or computed of it (``layer.weight.neg``)."""
    return f".{weight}." in f".{name}." or weight.endswith(f".{name.removesuffix(_CAST)}")
