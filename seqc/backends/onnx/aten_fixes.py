"""Translations of ATen ops that torchlib lacks, or has wrong, unstable or needlessly narrow (each says why), and of ours.

A translation is a function of what the fx node's arguments became: ir.Values, or Python numbers, lists and None. It
calls onnxscript ops, which append nodes to the graph at hand. It raises Unsupported where it would not be right.
"""

from __future__ import annotations

from typing import Any

from seqc import _torch
from seqc.backends.onnx import aten_layers, aten_math, aten_scans, aten_writes, dialect

_TABLES = (
    aten_math.TRANSLATIONS,
    aten_scans.TRANSLATIONS,
    aten_layers.TRANSLATIONS,
    aten_writes.TRANSLATIONS,
    dialect.TRANSLATIONS,
)


def register(registry: Any) -> None:
    """Put these translations before torchlib's in ``registry``."""
    for table in _TABLES:
        for target, function in table.items():
            _torch.register_translation(registry, target, function)
