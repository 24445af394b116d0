"""Hugging Face model directories, through transformers: its own classes only, local files only, safetensors."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from seqc.errors import LoadError, MissingExtraError
from seqc.frontend.load import Loaded

_LENGTH = 16
_BATCH = 2


def load_directory(path: Path, allow_pickle: bool) -> Loaded:
    """Load a model directory in float32 with its cache off. Nothing is downloaded and no code in the directory runs.

    The class is the one that ``architectures`` in config.json names, looked up in transformers. Raises LoadError for
    remote code, absent or incomplete weights, and pickled weights without ``allow_pickle``.
    """
    config = _read_config(path)
    _refuse_code(path, config)
    safetensors = any(path.glob("*.safetensors"))
    if not safetensors and any(path.glob("*.bin")):
        if not allow_pickle:
            raise LoadError(f"{path}: only pickled weights (*.bin); convert them to safetensors or pass --allow-pickle")
    elif not safetensors:
        raise LoadError(f"{path}: config.json but no weights (*.safetensors)")
    model, info = _from_pretrained(path, config, safetensors)
    missing = sorted(info.get("missing_keys", ())) + sorted(str(k) for k in info.get("mismatched_keys", ()))
    if missing:
        raise LoadError(
            f"{path}: the weights do not fit {type(model).__name__}: {missing[0]!r} is missing or misshapen"
        )
    notes = []
    if info.get("unexpected_keys"):
        unexpected = sorted(info["unexpected_keys"])
        notes.append(f"{len(unexpected)} weights are not used by {type(model).__name__}, {unexpected[0]} for one")
    stored = config.get("dtype") or config.get("torch_dtype")
    if stored not in (None, "float32"):
        notes.append(f"the weights are stored as {stored} and compiled as float32")
    for part in _configs(model.config):
        if hasattr(part, "use_cache"):
            part.use_cache = False
    vocabulary = _vocabulary(model.config)
    loaded = Loaded(model, "huggingface", path, notes=notes, vocabulary=vocabulary)
    _describe_inputs(loaded)
    return loaded


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise LoadError(f"{path}/config.json: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{path}/config.json: not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise LoadError(f"{path}/config.json: not a JSON object")
    return config


def _refuse_code(path: Path, config: Any) -> None:
    if isinstance(config, dict):
        if "auto_map" in config:
            raise LoadError(
                f"{path}: its config.json asks for Python code of its own (auto_map); seqc runs no remote code"
            )
        for key, value in config.items():
            if "implementation" in key and isinstance(value, str) and "/" in value:
                raise LoadError(f"{path}: its config.json asks for a downloaded kernel ({key}: {value})")
            _refuse_code(path, value)
    elif isinstance(config, list):
        for value in config:
            _refuse_code(path, value)
    if (path / "adapter_config.json").exists():
        raise LoadError(f"{path}: holds a PEFT adapter; merge it into the model and save that")


def _from_pretrained(path: Path, config: dict[str, Any], safetensors: bool) -> tuple[nn.Module, dict[str, Any]]:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("Hugging Face directories need transformers: pip install 'seqc[hf]'") from error
    names = config.get("architectures") or ["AutoModel"]
    cls = getattr(transformers, str(names[0]), None)
    known = isinstance(cls, type) and (issubclass(cls, transformers.PreTrainedModel) or cls is transformers.AutoModel)
    if cls is None or not known:
        raise LoadError(f"{path}: transformers {transformers.__version__} has no model class {str(names[0])[:80]!r}")
    logging: Any = transformers.utils.logging
    show_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, info = cls.from_pretrained(
            str(path),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=safetensors,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except Exception as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise LoadError(f"{path}: transformers cannot load it ({type(error).__name__}: {first[:200]})") from error
    finally:
        if show_bars:
            logging.enable_progress_bar()
    return model, info


def _configs(config: Any) -> Iterator[Any]:
    yield config
    for name in getattr(config, "sub_configs", None) or ():
        part = getattr(config, name, None)
        if part is not None and part is not config:
            yield from _configs(part)


def _vocabulary(config: Any) -> int | None:
    sizes = [getattr(part, "vocab_size", None) for part in _configs(config)]
    return next((int(size) for size in sizes if isinstance(size, int) and size > 0), None)


def _describe_inputs(loaded: Loaded) -> None:
    """Example token ids, batch and sequence dynamic; the sequence is bounded where positions come from a table."""
    model: Any = loaded.model
    if loaded.vocabulary is None or getattr(model, "main_input_name", None) != "input_ids":
        return
    limit = _position_limit(model)
    length = _LENGTH if limit is None else min(_LENGTH, limit)
    generator = torch.Generator().manual_seed(0)
    names = [n for n in ("input_ids", "decoder_input_ids") if n in inspect.signature(model.forward).parameters]
    loaded.example_inputs = {}
    loaded.dynamic_shapes = {}
    for name in names:
        ids = torch.randint(loaded.vocabulary, (_BATCH, length), generator=generator)
        dim = "sequence" if name == "input_ids" else "decoder_sequence"
        loaded.example_inputs[name] = ids
        loaded.dynamic_shapes[name] = {0: "batch", 1: dim if limit is None else torch.export.Dim(dim, min=1, max=limit)}
    if limit is not None:
        loaded.notes.append(f"the sequence holds at most {limit} tokens: the model looks positions up in a table")


def _position_limit(model: nn.Module) -> int | None:
    """The length of the learned table of positions, less the rows it keeps for padding; None where there is none."""
    config: Any = model.config
    stated = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    vocabulary = _vocabulary(config)
    if not isinstance(stated, int):
        return None
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.num_embeddings in (stated, stated + 2):
            if module.num_embeddings == vocabulary:
                continue
            reserved = 0 if module.padding_idx is None else module.padding_idx + 1
            return stated - reserved if module.num_embeddings == stated else stated
    return None
