"""Reads torch.export archives without running anything that they bring along.

What ``torch.export.load`` of torch 2.13 would run from a file: pickles (weights, constants, example inputs), compiled
libraries (AOTInductor), sympy's ``eval`` of size expressions, names pasted into generated Python source, guards that
are Python source, imports named by tree specifications, and calls of any function below ``torch`` (such as
``torch.os.system``). Each is refused here before the file is read further.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch.export.pt2_archive import constants as layout

from seqc import _torch
from seqc.errors import LoadError

_NAME = re.compile(r"[\w.+:@-]*")
_TARGET = re.compile(r"torch\.ops\.\w+\.\w+(\.\w+)?|_operator\.\w+|math\.\w+|torch\.sym_\w+")
_FREE_TEXT = ("as_string", "as_strings", "guards_code")  # only ever shown, compared, or dropped
_KEPT_METADATA = ("stack_trace", "nn_module_stack")
_EXPRESSION_NODES = (
    ast.Expression, ast.Call, ast.Name, ast.Constant, ast.keyword, ast.BinOp, ast.UnaryOp, ast.Compare, ast.BoolOp,
    ast.Tuple, ast.Load, ast.operator, ast.unaryop, ast.cmpop, ast.boolop,
)  # fmt: skip
_EXPRESSION_FUNCTIONS = frozenset({
    "Symbol", "Integer", "Rational", "Float", "Add", "Mul", "Pow", "Max", "Min", "Mod", "Abs", "Eq", "Ne", "Equality",
    "Unequality", "Lt", "Le", "Gt", "Ge", "StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan", "And", "Or",
    "Not", "Piecewise", "ExprCondPair", "Tuple", "floor", "ceiling", "sqrt", "FloorDiv", "ModularIndexing", "Where",
    "PythonMod", "CleanDiv", "CeilToInt", "FloorToInt", "CeilDiv", "LShift", "RShift", "PowByNatural", "FloatPow",
    "FloatTrueDiv", "IntTrueDiv", "IsNonOverlappingAndDenseIndicator", "TruncToFloat", "TruncToInt", "RoundToInt",
    "RoundDecimal", "ToFloat", "Identity",
})  # fmt: skip


class Refused(LoadError):
    """The archive asks for something to be executed while it is loaded or run."""


def read_archive(path: Path, allow_pickle: bool) -> torch.export.ExportedProgram:
    """The program of a torch.export archive (the format written since torch 2.8).

    Raises LoadError, one line, where the archive is damaged or brings code along; ``allow_pickle`` accepts the latter.
    """
    try:
        if allow_pickle:
            return torch.export.load(path)
        program = _torch.load_exported_program(str(path), _vet)
        foreign = _torch.foreign_calls(program.graph_module)
    except LoadError as error:
        raise LoadError(f"{path}: {error}") from error.__cause__
    except Exception as error:
        if "weights_only" in str(error).lower() or "Unsupported global" in str(error):
            raise LoadError(f"{path}: {_with_hint('it holds pickled objects that would run code')}") from error
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        raise LoadError(f"{path}: this torch.export archive cannot be read ({reason[:200]})") from error
    if foreign:
        raise LoadError(f"{path}: {_with_hint(f'its graph calls {foreign[0]!r}, which is no tensor operator')}")
    return program


def _with_hint(what: str) -> str:
    return f"{what}; --allow-pickle loads it all the same, if you trust it"


def _refuse(what: str) -> None:
    raise Refused(_with_hint(what))


def _vet(kind: str, value: Any) -> None:
    if kind == "names":
        models = [n for n in value if n.startswith(layout.MODELS_DIR)]
        if not models:
            raise LoadError("the torch.export archive holds no model")
        if len(models) > 1 and layout.MODELS_FILENAME_FORMAT.format("model") not in models:
            raise LoadError(f"the torch.export archive holds {len(models)} models and none is called 'model'")
        if any(n.startswith(layout.AOTINDUCTOR_DIR) for n in value):
            _refuse("it holds compiled libraries, which would be run")
    elif kind == "program":
        _vet_json(value)
    else:
        for name, payload in value["config"].items():
            path = str(payload["path_name"])
            tensors = layout.WEIGHT_FILENAME_PREFIX if kind == "weights" else layout.TENSOR_CONSTANT_FILENAME_PREFIX
            if not path.startswith(tensors):
                _refuse(f"its constant {name!r} is a pickled object, not a tensor")
            _vet_name(name)
            _vet_name(path)


def _vet_json(value: Any, key: str = "") -> None:
    """Refuse any string of the program that torch would evaluate, import, call or paste into source code."""
    if isinstance(value, dict):
        for name, item in value.items():
            _vet_name(name)
            if name == "metadata" and isinstance(item, dict):
                for extra in set(item) - set(_KEPT_METADATA):
                    del item[extra]
            else:
                _vet_json(item, name)
    elif isinstance(value, list):
        for item in value:
            _vet_json(item, key)
    elif isinstance(value, str) and key not in _FREE_TEXT:
        if key == "expr_str":
            _vet_expression(value)
        elif key in ("in_spec", "out_spec"):
            _vet_tree(json.loads(value) if value else None, names=key == "in_spec")
        elif key in ("target", "as_operator"):
            if not _TARGET.fullmatch(value):
                _refuse(f"its graph calls {value[:60]!r}, which is no tensor operator")
        else:
            _vet_name(value)


def _vet_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        _refuse(f"it holds the name {name[:40]!r}, which would end up in generated code")


def _vet_tree(value: Any, names: bool) -> None:
    """Tree specifications are JSON with JSON inside; two of their forms import modules by name."""
    if isinstance(value, dict):
        if "__enum__" in value or "default_factory_module" in value:
            _refuse("the structure of its inputs or outputs names a module to import")
        for name, item in value.items():
            _vet_tree(name, names)
            _vet_tree(item, names)
    elif isinstance(value, list):
        for item in value:
            _vet_tree(item, names)
    elif isinstance(value, str):
        try:
            inner = json.loads(value)
        except ValueError:
            if names:
                _vet_name(value)
            return
        if not isinstance(inner, (int, float)):
            _vet_tree(inner, names)


def _vet_expression(text: str) -> None:
    """Only arithmetic, comparisons and known size functions may reach sympy, which evaluates what it is given."""
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        tree = None
    if tree is None or len(text) > 10_000:
        raise Refused(f"the size expression {text[:40]!r} cannot be read")
    for node in ast.walk(tree):
        safe = isinstance(node, _EXPRESSION_NODES)
        if isinstance(node, ast.Call):
            safe = isinstance(node.func, ast.Name) and node.func.id in _EXPRESSION_FUNCTIONS
        elif isinstance(node, ast.Name):
            safe = not node.id.startswith("_")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # srepr writes Float('1.5') and Symbol('s0'); sympify would evaluate any other string again.
            safe = re.fullmatch(r"\w+|-?[\d.]+(e[+-]?\d+)?", node.value) is not None
        if not safe:
            _refuse(f"the size expression {text[:40]!r} is code")
