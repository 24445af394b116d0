"""Arithmetic on symbolic sizes without doing it twice."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.fx.experimental.sym_node import _NO_HINT, SymNode


@contextlib.contextmanager
def replaced(owner: Any, attributes: dict[str, Any]) -> Iterator[None]:
    """Inside, a module or class of a library has these attributes instead of its own."""
    saved = {name: vars(owner)[name] for name in attributes}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in saved.items():
            setattr(owner, name, value)


_ARITHMETIC = (
    "add",
    "sub",
    "mul",
    "int_floordiv",
    "sym_min",
    "sym_max",
    "eq",
    "ne",
    "ge",
    "gt",
    "le",
    "lt",
    "and_",
    "or_",
)


@contextlib.contextmanager
def quick_sizes() -> Iterator[None]:
    """Inside, arithmetic on sizes that was done before in the same ShapeEnv is looked up: shape rules repeat the same few
    sums and comparisons for every operation, and sympy is a third of the time of a trace."""
    if getattr(SymNode._add, "remembers", False):  # type: ignore[attr-defined]
        yield
        return
    changed: dict[str, Any] = {f"_{name}": _remembered(getattr(SymNode, f"_{name}")) for name in _ARITHMETIC}
    changed["expr"] = property(_current_expr)
    # meta["tensor_meta"], which nothing of ours reads, asks whether each value is contiguous, in every memory format
    with replaced(SymNode, changed), replaced(proxy_tensor, {"_extract_tensor_metadata": lambda value: None}):
        yield


def _remembered(original: Callable[[SymNode, SymNode], SymNode]) -> Callable[[SymNode, SymNode], SymNode]:
    def operation(a: SymNode, b: SymNode) -> SymNode:
        env = a.shape_env
        if env is None or get_proxy_mode() is not None:  # a trace records the operation itself
            return original(a, b)
        known = vars(env).setdefault("_seqc_arithmetic", {})
        # types, since equal numbers of different types are equal keys
        key = (original, a._expr, a.pytype, a.hint, b._expr, b.pytype, b.hint, env._replacements_version_counter)
        result = known.get(key)
        if result is None:
            result = known[key] = original(a, b)
        # A node of its own: a trace tells values apart by the identity of their nodes.
        hint = _NO_HINT if result.hint is None else result.hint
        summation = result._optimized_summation
        return SymNode(result._expr, env, result.pytype, hint, result.constant, result.fx_node, summation)

    operation.remembers = True  # type: ignore[attr-defined]
    return operation


def _current_expr(node: SymNode) -> Any:
    """``SymNode.expr`` without the question, at each use, whether all of it is a number: nothing replaces numbers anyway."""
    env = node.shape_env
    if env is None or env._replacements_version_counter == 0 or isinstance(node._expr, int):
        return node._expr
    return env.replace(node._expr)
