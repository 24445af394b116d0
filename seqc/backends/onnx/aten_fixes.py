"""Translations of ATen ops that replace torchlib's where it is wrong or unstable; each says why."""

from __future__ import annotations

from typing import Any


def register(registry: Any, opset: int) -> None:
    """Put the corrections before torchlib's translations in ``registry``."""
