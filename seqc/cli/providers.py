"""``--provider``: ONNX Runtime's execution providers, or the engines' package, with options, from the command line."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

from seqc.errors import UsageError
from seqc.runtime.ort import Provider

_F = TypeVar("_F", bound=Callable[..., Any])
# a comma begins the next option only where that has a key: shapes such as x:1x4,y:1x8 have commas too
_NEXT = re.compile(r",(?=\w+=)")
_OPTION = re.compile(r"(\w+)=(.*)", re.DOTALL)


def provider_option(function: _F) -> _F:
    """Add ``--provider``, which may be repeated; the command gets a tuple of names and of (name, options) pairs."""

    def callback(context: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> tuple[Provider, ...]:
        return tuple(parse_provider(text) for text in value)

    text = (
        "onnxruntime execution provider, with options as NAME:KEY=VALUE,KEY=VALUE; repeat in order. tensorrt-rtx or "
        "tensorrt runs the artifact's engines."
    )
    return click.option("--provider", multiple=True, metavar="NAME[:OPTIONS]", callback=callback, help=text)(function)


def parse_provider(text: str) -> Provider:
    """Read ``CUDAExecutionProvider`` or ``TensorrtExecutionProvider:trt_fp16_enable=1,device_id=0``. Raises UsageError."""
    name, colon, rest = text.strip().partition(":")
    if not colon:
        return name
    found = [_OPTION.fullmatch(part) for part in _NEXT.split(rest)]
    options = {match[1]: match[2] for match in found if match is not None}
    if not name or len(options) != len(found):
        raise UsageError(f"--provider takes NAME or NAME:KEY=VALUE,KEY=VALUE with each key once, not {text!r}")
    return name, options
