"""How each ATen operator on complex values is written with real ones."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from seqc.dft import Transform
from seqc.emit import Emitter
from seqc.pairs import REAL, Arithmetic, Pair, Part

aten = torch.ops.aten


@dataclass(frozen=True)
class Call:
    """A node to be rewritten. In ``args`` and ``kwargs`` complex nodes are replaced by their :class:`Pair`.

    ``matrices`` are those of Fourier transforms that the graph has already, see :class:`seqc.dft.Transform`.
    """

    emit: Emitter
    node: fx.Node
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    matrices: dict[Any, tuple[fx.Node, fx.Node]]

    @property
    def math(self) -> Arithmetic:
        return Arithmetic(self.emit)

    @property
    def real(self) -> torch.dtype:
        """The dtype of the parts of the complex values involved."""
        value = self.node.meta["val"]
        values = value if isinstance(value, (tuple, list)) else [value]
        values = [*values, *(n.meta["val"] for n in self.node.all_input_nodes)]
        return next(REAL[v.dtype] for v in values if getattr(v, "dtype", None) in REAL)

    def pair(self, arg: Any) -> Pair:
        """An operand as a pair: complex, real of any dtype, or a literal."""
        if isinstance(arg, Pair):
            return arg
        if isinstance(arg, fx.Node):
            value = arg.meta["val"]
            if isinstance(value, torch.Tensor) and value.dtype != self.real:
                arg = self.emit(aten._to_copy.default, arg, dtype=self.real)
            return Pair(arg, None)
        number = complex(arg)
        return Pair(number.real or None, number.imag or None)

    def tensor(self, arg: Any) -> Pair:
        """As :meth:`pair`, with both parts nodes."""
        return Pair(*self.math.both(self.pair(arg)))


Result = Pair | fx.Node | list[Pair] | None
Rule = Callable[[Call], Result]


def rewrite(call: Call) -> Result:
    """The real form of a node: a pair, a real node, a list of pairs, or None where there is none."""
    rule = RULES.get(call.node.target)
    return None if rule is None else rule(call)


def _binary(name: str) -> Rule:
    def rule(call: Call) -> Result:
        left, right = call.pair(call.args[0]), call.pair(call.args[1])
        scale = call.kwargs.get("alpha", call.args[2] if len(call.args) > 2 else 1)
        if scale != 1:
            right = call.math.times(right, call.pair(scale))
        result: Pair = getattr(call.math, name)(left, right)
        return result

    return rule


def _divided(call: Call) -> Result:
    if call.kwargs.get("rounding_mode") is not None:
        return None
    return call.math.over(call.pair(call.args[0]), call.pair(call.args[1]))


def _subtracted_from(call: Call) -> Result:
    return call.math.minus(call.pair(call.args[1]), call.pair(call.args[0]))


def _unary(function: Callable[[Arithmetic, Pair], Pair]) -> Rule:
    return lambda call: function(call.math, call.pair(call.args[0]))


def _measure(function: Callable[[Arithmetic, Pair], Part]) -> Rule:
    def rule(call: Call) -> Result:
        pair = call.tensor(call.args[0])
        result = function(call.math, pair)
        assert isinstance(result, fx.Node)
        return result

    return rule


def _expm1(math: Arithmetic, a: Pair) -> Pair:
    """exp(x + iy) - 1 without cancellation: expm1(x) cos y - 2 sin^2(y / 2), and exp(x) sin y."""
    grown = math.each(aten.expm1.default, a.re)
    if a.im is None:
        return Pair(grown, None)
    half = math.each(aten.sin.default, math.mul(a.im, 0.5))
    below = math.mul(math.mul(half, half), -2.0)
    return Pair(math.add(math.mul(grown, math.each(aten.cos.default, a.im)), below), math.exp(a).im)


def _sqrt(math: Arithmetic, a: Pair) -> Pair:
    return math.polar(math.each(aten.sqrt.default, math.size(a)), math.mul(math.angle(a), 0.5))


def _power(call: Call) -> Result:
    """Whole powers by repeated squaring; others by size and angle: |z|^p and p arg z, right for z = 0 as well."""
    base, exponent, math = call.pair(call.args[0]), call.args[1], call.math
    if isinstance(exponent, (int, float)) and float(exponent).is_integer() and abs(exponent) <= 64:
        return math.power(base, int(exponent))
    power = call.pair(exponent)
    if power.im is not None:
        return math.exp(math.times(math.log(base), power))
    like = next(p for p in (base.re, base.im, power.re) if isinstance(p, fx.Node))
    size, angle = math.node(math.size(base), like), math.angle(base) if _has_node(base) else _angle_of(base)
    if isinstance(power.re, fx.Node):
        grown = call.emit(aten.pow.Tensor_Tensor, size, power.re)
    else:
        grown = call.emit(aten.pow.Tensor_Scalar, size, power.re)
    return math.polar(grown, math.mul(angle, power.re))


def _has_node(pair: Pair) -> bool:
    return isinstance(pair.re, fx.Node) or isinstance(pair.im, fx.Node)


def _angle_of(pair: Pair) -> float:
    re, im = (0.0 if p is None else p for p in (pair.re, pair.im))
    return float(torch.angle(torch.tensor(complex(re, im), dtype=torch.complex128)))  # type: ignore[arg-type]


def _view_as_complex(call: Call) -> Result:
    return Pair(*(call.emit(aten.select.int, call.args[0], -1, i) for i in (0, 1)))


def _view_as_real(call: Call) -> Result:
    return call.emit(aten.stack.default, list(call.math.both(call.args[0])), -1)


def _joined_parts(call: Call) -> Result:
    return Pair(call.args[0], call.args[1])


def _cast(call: Call) -> Result:
    """_to_copy to a complex dtype of a real or complex value, or of a complex value to a real dtype (its real part)."""
    pair, value = call.pair(call.args[0]), call.node.meta["val"]
    target = REAL.get(value.dtype, value.dtype)

    def cast(part: Part) -> Part:
        if not isinstance(part, fx.Node) or part.meta["val"].dtype == target:
            return part
        return call.emit(aten._to_copy.default, part, dtype=target)

    if value.dtype in REAL:
        return Pair(cast(pair.re), cast(pair.im))
    result = cast(call.math.both(pair)[0])
    assert isinstance(result, fx.Node)
    return result


def _created(call: Call) -> Result:
    """full, zeros, ones and their like: the sizes stay, the literal is split."""
    args, kwargs, target = list(call.args), {**call.kwargs, "dtype": call.real}, call.node.target
    like = args and isinstance(args[0], Pair)
    if like:
        args[0] = call.math.both(args[0])[0]
    fill = _FILL_AT.get(target)  # type: ignore[call-overload]
    if fill is None:
        part = call.emit(target, *args, **kwargs)
        return Pair(part, None)
    number = complex(args[fill])
    parts = []
    for value in (number.real, number.imag):
        args[fill] = value
        parts.append(call.emit(target, *args, **kwargs))
    return Pair(*parts)


def _structural(call: Call) -> Result:
    """Linear and the same for both parts: moves, selects, sums or joins elements; the real operands are indices."""
    value = call.node.meta["val"]
    results: list[Any] = []
    for side in (0, 1):

        def part(arg: Any, side: int = side) -> Any:
            if isinstance(arg, Pair):
                return call.math.both(arg)[side]
            return [part(a) for a in arg] if isinstance(arg, (list, tuple)) else arg

        kwargs = {k: v for k, v in call.kwargs.items() if k != "dtype"}
        results.append(call.emit(call.node.target, *(part(a) for a in call.args), **kwargs))
    if isinstance(value, (tuple, list)):
        return [Pair(*(call.emit(operator.getitem, r, i) for r in results)) for i in range(len(value))]
    return Pair(results[0], results[1])


def _values_at(*positions: int) -> Rule:
    """As :func:`_structural`, with the operands at ``positions`` being values, which may be real among complex ones."""

    def rule(call: Call) -> Result:
        args = list(call.args)
        for i in positions:
            found = args[i]
            args[i] = [call.tensor(a) for a in found] if isinstance(found, (list, tuple)) else call.tensor(found)
        return _structural(Call(call.emit, call.node, tuple(args), call.kwargs, call.matrices))

    return rule


def _filled(call: Call) -> Result:
    """masked_fill by a literal."""
    pair, mask, number = call.tensor(call.args[0]), call.args[1], call.pair(call.args[2])
    parts = zip((pair.re, pair.im), (number.re, number.im), strict=True)
    return Pair(*(call.emit(aten.masked_fill.Scalar, p, mask, v or 0.0) for p, v in parts))


def _chosen(call: Call) -> Result:
    """where of a tensor and a literal."""
    this, other = call.pair(call.args[1]), call.pair(call.args[2])
    like = next(p for p in (this.re, this.im, other.re, other.im) if isinstance(p, fx.Node))

    def side(a: Part, b: Part) -> fx.Node:
        return call.emit(aten.where.self, call.args[0], call.math.node(a, like), call.math.node(b, like))

    return Pair(side(this.re, other.re), side(this.im, other.im))


def _padded(call: Call) -> Result:
    """Padding by zeros."""
    rest = [*call.args[2:], *call.kwargs.values()]
    if any(v not in (None, 0, "constant") for v in rest):
        return None
    return Pair(*(call.emit(aten.constant_pad_nd.default, p, call.args[1]) for p in call.math.both(call.args[0])))


def _multilinear(call: Call) -> Result:
    """Matrix products: linear in each operand."""
    operands = [call.pair(a) for a in call.args]
    return call.math.multilinear(lambda nodes: call.emit(call.node.target, *nodes), operands)


def _einsum(call: Call) -> Result:
    operands = [call.pair(a) for a in call.args[1]]
    return call.math.multilinear(lambda nodes: call.emit(aten.einsum.default, call.args[0], list(nodes)), operands)


def _linear(call: Call) -> Result:
    product = call.math.multilinear(
        lambda nodes: call.emit(aten.linear.default, *nodes), [call.pair(a) for a in call.args[:2]]
    )
    bias = call.args[2] if len(call.args) > 2 else call.kwargs.get("bias")
    return product if bias is None else call.math.plus(product, call.pair(bias))


def _added_product(call: Call) -> Result:
    if {call.kwargs.get("alpha", 1), call.kwargs.get("beta", 1)} != {1}:
        return None
    product = call.math.multilinear(
        lambda nodes: call.emit(aten.matmul.default, *nodes), [call.pair(a) for a in call.args[1:3]]
    )
    return call.math.plus(call.pair(call.args[0]), product)


def _to_complex_spectrum(call: Call) -> Result:
    """_fft_r2c: real to complex, the last of the axes one-sided."""
    x, axes, normalization, onesided = call.args
    axes = [a % x.meta["val"].dim() for a in axes]
    transform, axis = Transform(call.emit, call.real, call.matrices), axes[-1]
    n = _length(call, x, axis)
    count = _length(call, call.node.meta["val"], axis, n) if onesided else n
    pair = transform.norm(transform.forward(call.pair(x), axis, n, count), normalization, n)
    return _along_axes(call, transform, pair, axes[:-1], normalization, forward=True)


def _spectrum(call: Call) -> Result:
    """_fft_c2c."""
    x, axes, normalization, forward = call.args
    rank = call.node.meta["val"].dim()
    transform = Transform(call.emit, call.real, call.matrices)
    return _along_axes(call, transform, call.pair(x), [a % rank for a in axes], normalization, forward)


def _from_complex_spectrum(call: Call) -> Result:
    """_fft_c2r: one-sided complex to real of a given length."""
    x, axes, normalization, n = call.args
    axes = [a % call.node.meta["val"].dim() for a in axes]
    transform = Transform(call.emit, call.real, call.matrices)
    pair = _along_axes(call, transform, x, axes[:-1], normalization, forward=False)
    result = transform.norm(Pair(transform.backward_to_real(pair, axes[-1], n), None), normalization, n).re
    assert isinstance(result, fx.Node)
    return result


def _along_axes(
    call: Call, transform: Transform, pair: Pair, axes: Sequence[int], normalization: int, forward: bool
) -> Pair:
    for axis in axes:
        source = pair.re if isinstance(pair.re, fx.Node) else pair.im
        n = _length(call, source, axis)
        pair = transform.forward(pair, axis, n, n) if forward else transform.backward(pair, axis, n)
        pair = transform.norm(pair, normalization, n)
    return pair


def _length(call: Call, of: Any, axis: int, full: Any = None) -> Any:
    """The size of a node along ``axis``; with ``full``, the number of one-sided coefficients of that length."""
    value = of.meta["val"] if isinstance(of, fx.Node) else of
    size = value.shape[axis]
    if isinstance(size, int):
        return size
    if full is not None:
        return call.emit(operator.add, call.emit(operator.floordiv, full, 2), 1)
    return call.emit(aten.sym_size.int, of, axis)


def _size(call: Call) -> Result:
    return call.emit(aten.sym_size.int, call.math.both(call.args[0])[0], call.args[1])


_FILL_AT = {
    aten.full.default: 1,
    aten.full_like.default: 1,
    aten.new_full.default: 2,
    aten.scalar_tensor.default: 0,
}
"""Where the literal stands among the arguments of operators that fill."""

_STRUCTURAL = """
    permute transpose.int t view reshape _unsafe_view unsqueeze squeeze squeeze.dim squeeze.dims expand expand_as
    select.int slice.Tensor flip roll index_select index.Tensor gather repeat split.Tensor split_with_sizes chunk
    unbind.int sum sum.dim_IntList mean mean.dim cumsum tril triu diagonal diag_embed neg clone alias detach
    contiguous lift_fresh_copy resolve_conj resolve_neg movedim.int unfold flatten.using_ints narrow
"""


def _table(rule: Rule, names: str) -> dict[Any, Rule]:
    """``rule`` for each ATen operator in ``names``; those that this torch does not have are left out."""
    result: dict[Any, Rule] = {}
    for name in names.split():
        packet, _, overload = name.partition(".")
        found = getattr(getattr(aten, packet, None), overload or "default", None)
        if found is not None:
            result[found] = rule
    return result


RULES: dict[Any, Rule] = {
    **_table(_structural, _STRUCTURAL),
    **_table(_values_at(0), "cat stack"),
    **_table(_values_at(1, 2), "where.self"),
    **_table(_chosen, "where.ScalarOther where.ScalarSelf"),
    **_table(_values_at(0, 1), "select_scatter slice_scatter"),
    **_table(_values_at(0, 3), "scatter.src scatter_add"),
    **_table(_filled, "masked_fill.Scalar"),
    **_table(_padded, "constant_pad_nd"),
    **_table(_binary("plus"), "add.Tensor add.Scalar"),
    **_table(_binary("minus"), "sub.Tensor sub.Scalar"),
    **_table(_subtracted_from, "rsub.Scalar rsub.Tensor"),
    **_table(_binary("times"), "mul.Tensor mul.Scalar"),
    **_table(_divided, "div.Tensor div.Scalar"),
    **_table(_power, "pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar"),
    **_table(_unary(Arithmetic.reciprocal), "reciprocal"),
    **_table(_unary(Arithmetic.exp), "exp"),
    **_table(_unary(Arithmetic.log), "log"),
    **_table(_unary(_expm1), "expm1 special_expm1"),
    **_table(_unary(_sqrt), "sqrt"),
    **_table(_unary(lambda math, a: math.times(a, a)), "square"),
    **_table(_unary(Arithmetic.conj), "_conj conj conj_physical _conj_physical"),
    **_table(_measure(lambda math, a: a.re), "real"),
    **_table(_measure(lambda math, a: a.im), "imag"),
    **_table(_measure(Arithmetic.size), "abs"),
    **_table(_measure(Arithmetic.angle), "angle"),
    **_table(_view_as_complex, "view_as_complex"),
    **_table(_view_as_real, "view_as_real"),
    **_table(_joined_parts, "complex"),
    **_table(lambda call: call.math.polar(*call.args[:2]), "polar"),
    **_table(_cast, "_to_copy to.dtype"),
    **_table(
        _created, "zeros ones full zeros_like ones_like full_like new_zeros new_ones new_full scalar_tensor empty"
    ),
    **_table(_multilinear, "matmul mm bmm mv dot outer"),
    **_table(_einsum, "einsum"),
    **_table(_linear, "linear"),
    **_table(_added_product, "addmm baddbmm"),
    **_table(_to_complex_spectrum, "_fft_r2c"),
    **_table(_spectrum, "_fft_c2c"),
    **_table(_from_complex_spectrum, "_fft_c2r"),
    **_table(_size, "sym_size.int"),
}
"""Every operator on complex values that has a real form."""
