"""Files of torch that are read without running anything that they bring along."""

from __future__ import annotations

import contextlib
import io
import json
import operator
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.fx as fx
from torch.utils import _pytree as pytree


@contextlib.contextmanager
def weights_only() -> Iterator[None]:
    """Inside, every ``torch.load``, also those deep inside torch.export, refuses pickles that would run code."""
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ[names[0]] = "1"
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def load_exported_program(path: str, vet: Callable[[str, Any], None]) -> torch.export.ExportedProgram:
    """The program of a torch.export archive, without running anything that the archive brings along.

    ``torch.export.load`` is no way to read a file one does not trust: it unpickles without limits, loads compiled
    libraries, hands strings to sympy's ``eval`` and lets a node call any function below ``torch``. Here ``vet`` sees
    first, as parsed JSON, the list of records ("names"), "program", "weights" and "constants", and raises on what it
    refuses (it may edit what it sees); pickled tensors are read with ``weights_only``.
    """
    from torch._export.serde import schema, serialize
    from torch.export.pt2_archive import _package
    from torch.export.pt2_archive import constants as layout

    reader = _package.PT2ArchiveReader(path)
    names = set(reader.get_file_names())
    vet("names", sorted(names))
    start, end = layout.MODELS_FILENAME_FORMAT.split("{}")
    models = [name[len(start) : -len(end)] for name in names if name.startswith(start) and name.endswith(end)]
    model = models[0] if len(models) == 1 else "model"
    program = json.loads(reader.read_bytes(layout.MODELS_FILENAME_FORMAT.format(model)))
    vet("program", program)
    program["guards_code"] = []  # Python source that ExportedProgram.module() would execute
    for kind, config in (
        ("weights", layout.WEIGHTS_CONFIG_FILENAME_FORMAT),
        ("constants", layout.CONSTANTS_CONFIG_FILENAME_FORMAT),
    ):
        if config.format(model) in names:
            vet(kind, json.loads(reader.read_bytes(config.format(model))))
    with weights_only():
        sample = reader.read_bytes(layout.SAMPLE_INPUTS_FILENAME_FORMAT.format(model))
        examples = torch.load(io.BytesIO(sample), weights_only=True) if sample else None
        result: torch.export.ExportedProgram = serialize.ExportedProgramDeserializer().deserialize(
            serialize._dict_to_dataclass(schema.ExportedProgram, program),  # type: ignore[no-untyped-call]
            _package._load_state_dict(reader, model),
            _package._load_constants(reader, model),
            examples,
        )
    return result


def foreign_calls(gm: fx.GraphModule) -> list[str]:
    """What a deserialised graph calls, or hands to an op, that is no torch operator or reads or writes files."""
    from torch._export.serde.serialize import _SYM_OPS

    allowed = (*_SYM_OPS, operator.getitem)
    found = []
    for module in gm.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            leaves = [node.target] if node.op == "call_function" else []
            leaves += [x for x in pytree.tree_leaves((node.args, node.kwargs)) if callable(x)]
            for value in leaves:
                if isinstance(value, torch._ops.OpOverload):
                    schema = value._schema
                    if any("file" in a.name or "path" in a.name for a in schema.arguments):
                        found.append(str(value))
                elif not isinstance(value, torch._ops.HigherOrderOperator) and not any(value is op for op in allowed):
                    found.append(getattr(value, "__name__", str(value)))
            if node.op in ("call_module", "call_method"):
                found.append(str(node.target))
    return found
