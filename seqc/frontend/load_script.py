"""TorchScript archives: read without running them, and converted to a module that torch.export can trace."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from seqc.errors import LoadError, UnsupportedModelError, UsageError
from seqc.frontend.script_interpreter import ScriptModel

_FILE_ACCESS = re.compile(rb"\b(?:torch|aten)\.(?:save|load|from_file)\s*\(")


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
    """A module that torch.export can trace and that computes what ``script`` does.

    The example inputs come under the argument names of ``forward``, or in their order. It is run on them once.
    Raises UnsupportedModelError where it uses TorchScript that the interpreter does not know.
    """
    forward: Any = script.forward
    arguments = [a.name for a in forward.schema.arguments if a.name != "self"]
    names = tuple(a for a in arguments if a in example_inputs)
    if set(names) != set(example_inputs) or names != tuple(arguments[: len(names)]):
        names = tuple(example_inputs)
    module = ScriptModel(script, names).eval()
    try:
        with torch.no_grad():
            module(**{name: tensor.clone() for name, tensor in example_inputs.items()})
    except UnsupportedModelError:
        raise
    except Exception as error:
        try:
            forward(*(example_inputs[name].clone() for name in names))
        except Exception as own:
            raise UsageError(f"the TorchScript module does not accept the example inputs: {_line(own)}") from own
        raise UnsupportedModelError(
            f"this TorchScript module cannot be converted ({_line(error)}); compile the Python module it was made "
            "from, or save that with torch.export.save"
        ) from error
    return module


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1][:200]}" if lines else type(error).__name__
