"""Tracing with symbolic sizes: what Python asks of them is answered and recorded, and freezes nothing."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.fx as fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx._lazy_graph_module import _LazyGraphModule, _use_lazy_graph_module
from torch.fx.experimental import _config
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from seqc._torch.quick_sizes import quick_sizes
from seqc._torch.quiet import errors_only
from seqc._torch.shape_rules import shape_rules


@dataclass(frozen=True)
class Specialisation:
    """A symbolic size that Python turned into a number or a branch while the model was traced.

    ``expr`` is the size or condition, ``value`` what it was at the traced sizes, ``line`` the user's source line, and
    ``direct`` tells whether that line itself asked, not an operator of torch.
    """

    expr: Any
    value: int | bool
    line: str
    direct: bool


def shape_env_of(values: Any) -> ShapeEnv | None:
    """The ShapeEnv behind the first symbolic size among the tensors ``values``."""
    for value in values:
        for size in getattr(value, "shape", ()):
            if isinstance(size, torch.SymInt):
                env = size.node.shape_env
                assert env is None or isinstance(env, ShapeEnv)
                return env
    return None


# Between a size that Python turns into a number or a truth value, and the line that does so.
_CONVERSIONS = ("/torch/__init__.py", "/torch/fx/experimental/", "/seqc/_torch/", "/torch/utils/")


def _user_line() -> tuple[str, bool]:
    """The innermost line outside torch, and whether no operator of torch lies between."""
    frame: types.FrameType | None = sys._getframe(2)
    direct = True
    while frame is not None:
        file = frame.f_code.co_filename
        if "/torch/" not in file and "/sympy/" not in file and "/seqc/_torch/" not in file:
            return f"{file}:{frame.f_lineno}", direct
        direct = direct and any(part in file for part in _CONVERSIONS)
        frame = frame.f_back
    return "", False


@contextlib.contextmanager
def no_guards(env: ShapeEnv | None, log: list[Specialisation] | None = None) -> Iterator[None]:
    """Evaluate symbolic sizes by their traced value without freezing them; record each evaluation in ``log``.

    Inside, ``range(x.shape[1])`` sees a number while ``x.shape[1]`` stays symbolic everywhere else.
    """
    if env is None:
        yield
        return
    seen: set[tuple[Any, str]] = set()
    original: Callable[..., Any] = env.evaluate_expr

    known: dict[Any, Any] = {}

    def recording(expr: Any, hint: Any = None, fx_node: Any = None, *args: Any, **kwargs: Any) -> Any:
        # Without guards an expression has one value throughout: torch's own cache of 256 entries is too small for us.
        key = (expr, args, tuple(sorted(kwargs.items())))
        if key not in known:
            known[key] = original(expr, hint, fx_node, *args, **kwargs)
        result = known[key]
        if log is not None and isinstance(expr, sympy.Basic) and expr.free_symbols:
            line, direct = _user_line()
            if (expr, line) not in seen:
                seen.add((expr, line))
                is_bool = isinstance(result, bool) or result in (sympy.true, sympy.false)
                log.append(Specialisation(expr, bool(result) if is_bool else int(result), line, direct))
        return result

    symbolic_config: Any = _config
    # backed_size_oblivious: broadcasting and contiguity rules are decided as for a general size, not for this one.
    with env.suppress_guards(), symbolic_config.patch(backed_size_oblivious=True), shape_rules(), quick_sizes():
        vars(env)["evaluate_expr"] = recording
        try:
            yield
        finally:
            del vars(env)["evaluate_expr"]


@contextlib.contextmanager
def faking(mode: FakeTensorMode) -> Iterator[None]:
    """Compute on the fake tensors of ``mode`` without freezing a size, composite operators included."""
    with mode, no_guards(mode.shape_env), enable_python_dispatcher():
        yield


def fake_mode_of(gm: fx.GraphModule) -> FakeTensorMode:
    """The FakeTensorMode of the values in ``gm``."""
    for node in gm.graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if isinstance(mode, FakeTensorMode):
            return mode
    raise ValueError("the graph holds no fake tensors")


@contextlib.contextmanager
def lazy_graph_modules() -> Iterator[None]:
    """GraphModules that torch makes inside write their Python code when it is first called, not after each change."""
    with _use_lazy_graph_module(True):
        yield


def lazy_graph_module(root: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """A GraphModule, whose copies are such too, that writes its Python code when it is called, not after each change."""
    return _LazyGraphModule(root, graph)


@contextlib.contextmanager
def quiet_export() -> Iterator[None]:
    """Hide the graph so far that torch.export prints on stderr where it fails, and its warning that it knows no line."""
    from torch.export import _trace

    names = vars(_trace)
    names["print"] = lambda *_, **__: None  # in this module alone
    try:
        with errors_only("torch.fx.experimental.symbolic_shapes"):
            yield
    finally:
        del names["print"]


@contextlib.contextmanager
def without_fake_cache() -> Iterator[None]:
    """Fake tensor modes made inside compute every shape: looking symbolic shapes up in torch's cache costs more."""
    import torch._dynamo.config

    with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
        yield


def without_effect_tokens(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program with operators that only raise errors called plainly: torch orders them by tokens, which are no tensors."""
    from torch.export._remove_effect_tokens_pass import _remove_effect_tokens

    return _remove_effect_tokens(exported)
