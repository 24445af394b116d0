"""FuseDiscretization: exp(z) - 1 becomes expm1(z)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx

from seqc.emit import Emitter
from seqc.program import Program, place_of
from seqc.rewrite import remove_dead_code, replace_node
from seqc.verify import same_shape

aten = torch.ops.aten

_SUB = frozenset({aten.sub.Tensor, aten.sub.Scalar})
_ADD = frozenset({aten.add.Tensor, aten.add.Scalar})
_RSUB = frozenset({aten.rsub.Tensor, aten.rsub.Scalar})
_ONES = frozenset({aten.ones.default, aten.ones_like.default, aten.new_ones.default})
_FULL = {aten.full.default: 1, aten.full_like.default: 1, aten.new_full.default: 2}


@dataclass(frozen=True)
class FuseDiscretization:
    """Writes exp(z) - 1, real or complex, in the form that keeps its digits where z is small.

        (exp(rate * dt) - 1) / rate      ->     expm1(rate * dt) / rate
        exp(a) * cos(b) - 1              ->     expm1(a) * cos(b) - 2 * sin(b / 2) ** 2

    This is the zero-order hold of a state-space model. As written it has an error of 1e-7, the rounding of a number near
    1, whatever its size: in float32 (exp(-1e-9) - 1) / -1e-6 is 0 instead of 1e-3. The second form is the real part of a
    complex exponential that the model keeps as two real numbers. Any spelling of "minus 1" is taken, with either sign;
    where z is 0 both sides are 0, so that 0 / 0 stays NaN.

    ``tolerance``: of 1, next to which exp(z) was rounded; where the model divides by a small number the source itself has
    lost its digits, and the compiled model has them. The check then compares with the source in float64, see
    :func:`seqc.check.check`.
    """

    name: ClassVar[str] = "fuse_discretization"
    tolerance: ClassVar[float] = 1e-6

    def __call__(self, program: Program) -> int:
        changes = 0
        for gm in program.graph_modules():
            emit = Emitter(gm, program.fake_mode)
            weights = program.weights if gm is program.graph_module else {}
            for node in [n for n in gm.graph.nodes if n.op == "call_function"]:
                found = _less_one(node, weights)
                if found is None or not _same(found[0], node):
                    continue
                with emit.before(node):
                    value = _stable(emit, found[0])
                    if value is None:
                        continue
                    replace_node(node, value if found[1] > 0 else emit(aten.neg.default, value))
                where = place_of(value)
                program.reasons.append(f"{where}: exp(z) - 1 as expm1, which keeps the digits of a small z")
                changes += 1
        if changes:
            remove_dead_code(program)
        return changes


def _less_one(node: fx.Node, weights: dict[str, torch.Tensor]) -> tuple[fx.Node, int] | None:
    """(v, sign) where ``node`` is sign * (v - 1)."""
    if node.target not in _SUB | _ADD | _RSUB or len(node.args) != 2 or node.kwargs.get("alpha", 1) != 1:
        return None
    a, b = node.args if node.target not in _RSUB else reversed(node.args)
    if node.target in _ADD:
        a, b = (a, b) if isinstance(a, fx.Node) and not _is(a, 1, weights) else (b, a)
        if isinstance(a, fx.Node) and a.target is aten.neg.default and _is(b, 1, weights):
            return a.args[0], -1  # type: ignore[return-value]
        return (a, 1) if isinstance(a, fx.Node) and _is(b, -1, weights) else None
    if isinstance(a, fx.Node) and _is(b, 1, weights):
        return a, 1
    return (b, -1) if isinstance(b, fx.Node) and _is(a, 1, weights) else None


def _is(value: Any, number: int, weights: dict[str, torch.Tensor]) -> bool:
    """Whether ``value`` is ``number``, or a tensor of it."""
    if not isinstance(value, fx.Node):
        return bool(value == number)
    if value.op == "placeholder" and value.name in weights:
        return bool((weights[value.name] == number).all())
    if value.target in _ONES:
        return number == 1
    return value.target in _FULL and bool(value.args[_FULL[value.target]] == number)


def _same(value: fx.Node, node: fx.Node) -> bool:
    """Whether subtracting changed neither shape nor type."""
    a, b = value.meta["val"], node.meta["val"]
    return a.dtype == b.dtype and same_shape(a.shape, b.shape)


def _stable(emit: Emitter, value: fx.Node) -> fx.Node | None:
    """``value`` - 1, where ``value`` is exp(z), cos(b), or exp(a) * cos(b); else None."""
    if value.target is aten.exp.default:
        return emit(aten.expm1.default, value.args[0])
    if value.target is aten.cos.default:
        return emit(aten.neg.default, _versine(emit, value))
    if value.target is aten.mul.Tensor and all(isinstance(a, fx.Node) for a in value.args):
        for grown, turned in (value.args, value.args[::-1]):
            if grown.target is aten.exp.default and turned.target is aten.cos.default:  # type: ignore[union-attr]
                part = emit(aten.mul.Tensor, emit(aten.expm1.default, grown.args[0]), turned)  # type: ignore[union-attr]
                return emit(aten.sub.Tensor, part, _versine(emit, turned))  # type: ignore[arg-type]
    return None


def _versine(emit: Emitter, cosine: fx.Node) -> fx.Node:
    """1 - cos(b) as 2 sin(b / 2) ** 2."""
    half = emit(aten.sin.default, emit(aten.mul.Tensor, cosine.args[0], 0.5))
    return emit(aten.mul.Tensor, emit(aten.mul.Tensor, half, half), 2.0)
