"""seqc: a compiler from PyTorch sequence models to checked, dynamic-length ONNX models.

Importing ``seqc`` imports neither torch nor onnx; the compiler is loaded on first use, so that
``seqc.runtime`` works where only numpy and onnxruntime are installed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seqc.compiler import Compiled as Compiled
    from seqc.compiler import compile as compile
    from seqc.frontend.trace import trace as trace
    from seqc.program import Program as Program

__version__ = "0.1.0"

_LAZY = {
    "compile": "seqc.compiler",
    "Compiled": "seqc.compiler",
    "trace": "seqc.frontend.trace",
    "Program": "seqc.program",
}

__all__ = ["Compiled", "Program", "__version__", "compile", "trace"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in ("passes", "runtime", "errors"):
        return importlib.import_module(f"seqc.{name}")
    raise AttributeError(f"module 'seqc' has no attribute {name!r}")
