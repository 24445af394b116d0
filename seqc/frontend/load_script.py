"""TorchScript archives: read without running them, and converted to a module that torch.export can trace."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.fx as fx
from torch import nn

from seqc import _torch
from seqc.errors import LoadError, UnsupportedModelError

_FILE_ACCESS = re.compile(rb"\b(?:torch|aten)\.(?:save|load|from_file)\s*\(")
_LOOP = re.compile(r"prim::Loop")


class ScriptedModule(nn.Module):
    """The graph of a TorchScript module, called with its tensors by name."""

    def __init__(self, graph: fx.GraphModule, names: tuple[str, ...]) -> None:
        super().__init__()
        self.graph = graph
        self.names = names

    def forward(self, **tensors: torch.Tensor) -> Any:
        return self.graph(*(tensors[name] for name in self.names))


def read_script(path: Path) -> torch.jit.ScriptModule:
    """Load a TorchScript archive. Its code is compiled, not run; code that opens files is refused.

    Raises LoadError with one line where the archive is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if "/code/" in name and name.endswith(".py") and _FILE_ACCESS.search(archive.read(name)):
                    raise LoadError(f"{path}: its TorchScript code reads or writes files; seqc does not load it")
        module = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
    except LoadError:
        raise
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise LoadError(f"{path}: this TorchScript archive cannot be read ({reason[:200]})") from error
    assert isinstance(module, torch.jit.ScriptModule)
    return module


def to_module(script: torch.jit.ScriptModule, example_inputs: Mapping[str, torch.Tensor]) -> nn.Module:
    """Convert ``script`` for the example inputs, which come in the order of ``forward`` or under its argument names.

    Raises UnsupportedModelError where torch's converter does not know a construct; loops over a length that is not a
    constant are the common case.
    """
    forward: Any = script.forward
    arguments = [a.name for a in forward.schema.arguments if a.name != "self"]
    names = tuple(a for a in arguments if a in example_inputs)
    if set(names) != set(example_inputs):
        names = tuple(example_inputs)
    try:
        graph = _torch.torchscript_module(script, tuple(example_inputs[name] for name in names))
    except Exception as error:
        loops = _LOOP.search(str(error)) or _LOOP.search(str(script.inlined_graph))
        why = "it loops over a length that TorchScript hides" if loops else str(error).strip().splitlines()[0][:200]
        raise UnsupportedModelError(
            f"this TorchScript module cannot be converted: {why}; compile the Python module it was made from, or save "
            "that with torch.export.save or as weights with --entry"
        ) from error
    return ScriptedModule(graph, names).eval()
