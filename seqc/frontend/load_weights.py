"""Pickled modules, and weights (pickled or safetensors) that go into the module an entry function builds."""

from __future__ import annotations

import importlib
import pickle
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from seqc import _torch
from seqc.errors import LoadError, MissingExtraError, UsageError
from seqc.frontend.load import Loaded

_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")
_REASON = re.compile(r"WeightsUnpickler error:\s*(.+)")
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_TORCH_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."


def load_weights(path: Path, kind: str, entry: str | None, allow_pickle: bool) -> Loaded:
    """Load what ``torch.save`` or safetensors wrote. ``kind`` is "weights" (a pickle) or "safetensors".

    Raises LoadError where the file is damaged, would run code, does not fit, or holds no model and ``entry`` is None.
    """
    value = _read_safetensors(path) if kind == "safetensors" else _unpickle(path, allow_pickle)
    if isinstance(value, nn.Module):
        if entry is not None:
            raise UsageError(f"{path} holds a whole module; --entry goes with a file of weights")
        return Loaded(value, "pickle", path)
    weights = _state_dict(path, value)
    if entry is None:
        first = next(iter(weights))
        raise LoadError(
            f"{path}: {len(weights)} weights ({first}, ...) without the model they belong to; "
            "name a function that builds it: --entry pkg.mod:factory"
        )
    model = build(entry)
    _fill(path, model, weights, entry)
    return Loaded(model, "weights", path)


def build(entry: str) -> nn.Module:
    """Import and call ``pkg.mod:factory``; the current directory is importable. Raises UsageError, one line."""
    name, colon, attribute = entry.partition(":")
    if not (colon and name and attribute):
        raise UsageError(f"--entry takes pkg.mod:factory, not {entry!r}")
    cwd = str(Path.cwd())
    if cwd not in sys.path:
        sys.path.insert(0, cwd)
    try:
        factory: Any = importlib.import_module(name)
        for part in attribute.split("."):
            factory = getattr(factory, part)
        model = factory if isinstance(factory, nn.Module) else factory()
    except Exception as error:
        raise UsageError(f"--entry {entry}: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"--entry {entry} returned a {type(model).__name__}, not a torch.nn.Module")
    return model


def _unpickle(path: Path, allow_pickle: bool) -> Any:
    try:
        if not allow_pickle:
            with _torch.weights_only():
                return torch.load(path, map_location="cpu", weights_only=True)
        cwd = str(Path.cwd())
        if cwd not in sys.path:
            sys.path.insert(0, cwd)
        with path.open("rb") as file:
            head = file.read(len(_TORCH_MAGIC))
            if not head.startswith(b"PK") and head != _TORCH_MAGIC:
                file.seek(0)
                return pickle.load(file)
        return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:
        raise LoadError(f"{path}: {_why(error, allow_pickle)}") from error


def _why(error: Exception, allow_pickle: bool) -> str:
    text = str(error)
    found = _GLOBAL.search(text)
    if found and not allow_pickle:
        return (
            f"a pickled Python object ({found.group(1)}); unpickling runs code from the file: pass --allow-pickle "
            "if you trust it, or save the model with torch.export.save"
        )
    if isinstance(error, (ModuleNotFoundError, AttributeError)):
        return f"the pickled model needs code that cannot be imported from here ({text})"
    reason = _REASON.search(text)
    if reason and "operand" in reason.group(1) and not allow_pickle:
        return "a damaged pickle, or one that torch.save did not write (--allow-pickle reads it, if you trust it)"
    first = reason.group(1) if reason else next((line.strip() for line in text.splitlines() if line.strip()), "")
    return f"the file is truncated or damaged ({type(error).__name__}: {first[:160]})"


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise MissingExtraError("reading safetensors needs the package safetensors: pip install 'seqc[hf]'") from error
    try:
        result: dict[str, torch.Tensor] = load_file(path)
        return result
    except (SafetensorError, OSError, ValueError) as error:
        raise LoadError(f"{path}: the safetensors file is damaged ({str(error)[:160]})") from error


def _state_dict(path: Path, value: Any) -> dict[str, torch.Tensor]:
    for key in _WRAPPERS:
        if isinstance(value, Mapping) and isinstance(value.get(key), Mapping):
            value = value[key]
            break
    if isinstance(value, Mapping) and value and all(isinstance(v, torch.Tensor) for v in value.values()):
        return dict(value)
    raise LoadError(f"{path}: holds neither a module nor weights by name, but a {type(value).__name__}")


def _fill(path: Path, model: nn.Module, weights: dict[str, torch.Tensor], entry: str) -> None:
    own = model.state_dict()
    problems = [
        *(f"{name!r} is missing" for name in own if name not in weights),
        *(f"{name!r} is unexpected" for name in weights if name not in own),
        *(
            f"{name!r} has shape {tuple(weights[name].shape)}, the model has {tuple(own[name].shape)}"
            for name in own
            if name in weights and weights[name].shape != own[name].shape
        ),
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise LoadError(f"{path}: the weights do not fit the model of {entry}: {problems[0]}{more}")
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise LoadError(f"{path}: the weights do not fit the model of {entry}: {str(error).splitlines()[0]}") from error
