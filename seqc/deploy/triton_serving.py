"""How an artifact is to be served by NVIDIA Triton."""

from __future__ import annotations

from dataclasses import dataclass

ALONE = "--max-batch 0 serves one request at a time"


@dataclass(frozen=True)
class Serving:
    """How an artifact is to be served.

    ``max_batch``: so many requests at most go through the model together; 0: each by itself. ``capacity``: the steps that a
    sequence may have in all where states grow. ``sequences``: those that an instance keeps at a time. ``idle_seconds``: after
    so long without a request a sequence is forgotten. ``onnx``: the ONNX model is served, also where there are engines of it.
    """

    name: str
    max_batch: int = 8
    capacity: int | None = None
    sequences: int = 64
    idle_seconds: float = 60.0
    onnx: bool = False
