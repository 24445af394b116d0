"""The execution runtime: loads a compiled artifact and runs it. Needs numpy and onnxruntime, or TensorRT, only."""

from __future__ import annotations

from seqc.runtime.manifest import Manifest, Port
from seqc.runtime.session import Session, load
from seqc.runtime.stream import Stream

__all__ = ["Manifest", "Port", "Session", "Stream", "load"]
