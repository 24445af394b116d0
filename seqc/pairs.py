"""Complex numbers as pairs of real nodes, with zero parts left out, and the arithmetic on them.

A part is a node, a Python number that is the same everywhere, or None for zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.fx as fx

from seqc.emit import Emitter
from seqc.verify import same_shape

aten = torch.ops.aten
Part = fx.Node | float | None

REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64, torch.complex32: torch.float16}
"""The dtype of the parts of a complex dtype."""


@dataclass(frozen=True)
class Pair:
    """re + i im."""

    re: Part
    im: Part


class Arithmetic:
    """Writes real nodes that compute with parts and pairs."""

    def __init__(self, emit: Emitter) -> None:
        self.emit = emit

    def neg(self, a: Part) -> Part:
        if isinstance(a, fx.Node):
            return self.emit(aten.neg.default, a)
        return None if a is None else -a

    def add(self, a: Part, b: Part) -> Part:
        if a is None or b is None:
            return b if a is None else a
        if isinstance(a, fx.Node):
            return self.emit(aten.add.Tensor if isinstance(b, fx.Node) else aten.add.Scalar, a, b)
        return self.add(b, a) if isinstance(b, fx.Node) else a + b

    def sub(self, a: Part, b: Part) -> Part:
        if isinstance(a, fx.Node) and isinstance(b, fx.Node):
            return self.emit(aten.sub.Tensor, a, b)
        return self.add(a, self.neg(b))

    def mul(self, a: Part, b: Part) -> Part:
        if a is None or b is None:
            return None
        if isinstance(a, fx.Node):
            if b == 1.0 or b == -1.0:
                return a if b == 1.0 else self.neg(a)
            return self.emit(aten.mul.Tensor if isinstance(b, fx.Node) else aten.mul.Scalar, a, b)
        return self.mul(b, a) if isinstance(b, fx.Node) else a * b

    def each(self, target: Any, a: Part, *args: Any) -> Part:
        """A function of real numbers, applied to a part that is a node or a number."""
        if isinstance(a, fx.Node):
            return self.emit(target, a, *args)
        value: float = target(torch.tensor(0.0 if a is None else a, dtype=torch.float64), *args).item()
        return value or None

    def times(self, a: Pair, b: Pair) -> Pair:
        return Pair(
            self.sub(self.mul(a.re, b.re), self.mul(a.im, b.im)), self.add(self.mul(a.re, b.im), self.mul(a.im, b.re))
        )

    def scaled(self, a: Pair, factor: Part) -> Pair:
        return Pair(self.mul(a.re, factor), self.mul(a.im, factor))

    def plus(self, a: Pair, b: Pair) -> Pair:
        return Pair(self.add(a.re, b.re), self.add(a.im, b.im))

    def minus(self, a: Pair, b: Pair) -> Pair:
        return Pair(self.sub(a.re, b.re), self.sub(a.im, b.im))

    def conj(self, a: Pair) -> Pair:
        return Pair(a.re, self.neg(a.im))

    def squared_size(self, a: Pair) -> Part:
        return self.add(self.mul(a.re, a.re), self.mul(a.im, a.im))

    def size(self, a: Pair) -> Part:
        return self.each(aten.abs.default, a.re) if a.im is None else self.each(aten.sqrt.default, self.squared_size(a))

    def angle(self, a: Pair) -> Part:
        """Of a pair with at least one node: atan2(im, re)."""
        like = a.re if isinstance(a.re, fx.Node) else a.im
        return self.emit(aten.atan2.default, self.node(a.im, like), self.node(a.re, like))

    def reciprocal(self, a: Pair) -> Pair:
        if a.im is None:
            return Pair(self.each(aten.reciprocal.default, a.re), None)
        return self.scaled(self.conj(a), self.each(aten.reciprocal.default, self.squared_size(a)))

    def over(self, a: Pair, b: Pair) -> Pair:
        if b.im is None and isinstance(b.re, fx.Node):
            divisor = b.re

            def divided(part: Part) -> Part:
                if part is None:
                    return None
                return self.emit(aten.div.Tensor, self.node(part, divisor), divisor)

            return Pair(divided(a.re), divided(a.im))
        return self.times(a, self.reciprocal(b))

    def polar(self, size: Part, angle: Part) -> Pair:
        if angle is None:
            return Pair(size, None)
        return Pair(
            self.mul(size, self.each(aten.cos.default, angle)), self.mul(size, self.each(aten.sin.default, angle))
        )

    def exp(self, a: Pair) -> Pair:
        size = 1.0 if a.re is None else self.each(aten.exp.default, a.re)
        return self.polar(size, a.im)

    def log(self, a: Pair) -> Pair:
        return Pair(self.each(aten.log.default, self.size(a)), self.angle(a))

    def power(self, a: Pair, exponent: int) -> Pair:
        """A whole power by repeated squaring."""
        if exponent < 0:
            return self.reciprocal(self.power(a, -exponent))
        result: Pair | None = None
        while exponent:
            if exponent & 1:
                result = a if result is None else self.times(result, a)
            exponent >>= 1
            if exponent:
                a = self.times(a, a)
        return Pair(1.0, None) if result is None else result

    def multilinear(self, function: Callable[[Sequence[fx.Node]], fx.Node], operands: Sequence[Pair]) -> Pair:
        """``function``, linear in each operand (a matrix product, an einsum): the sum over all choices of parts."""
        total: list[Part] = [None, None]
        for choice in product((0, 1), repeat=len(operands)):
            parts = [(p.re, p.im)[c] for p, c in zip(operands, choice, strict=True)]
            nodes = [p for p in parts if isinstance(p, fx.Node)]
            if len(nodes) < len(parts):
                continue
            value: Part = function(nodes)
            power = sum(choice)
            side = power % 2
            total[side] = self.sub(total[side], value) if power % 4 >= 2 else self.add(total[side], value)
        return Pair(total[0], total[1])

    def node(self, part: Part, like: Any, dtype: torch.dtype | None = None) -> fx.Node:
        """``part`` as a node; a number or zero takes the shape and dtype of ``like``."""
        if isinstance(part, fx.Node):
            return part
        assert isinstance(like, fx.Node)
        dtype = dtype or like.meta["val"].dtype
        if part is None:
            return self.emit(aten.zeros_like.default, like, dtype=dtype)
        return self.emit(aten.full_like.default, like, part, dtype=dtype)

    def shaped(self, pair: Pair, value: torch.Tensor) -> Pair:
        """``pair`` with parts that are None or nodes of the shape of ``value``; broadcasting leaves some smaller."""
        full = next((p for p in (pair.re, pair.im) if isinstance(p, fx.Node) and _has_shape(p, value)), None)
        if full is None:
            nodes = [p for p in (pair.re, pair.im) if isinstance(p, fx.Node)]
            if len(nodes) < 2:
                return pair
            full = self.emit(aten.add.Tensor, *nodes)

        def part(p: Part) -> Part:
            if p is None or (isinstance(p, fx.Node) and _has_shape(p, value)):
                return p
            return self.emit(aten.expand_as.default, p, full) if isinstance(p, fx.Node) else self.node(p, full)

        return Pair(part(pair.re), part(pair.im))

    def both(self, pair: Pair) -> tuple[fx.Node, fx.Node]:
        """Both parts as nodes."""
        like = pair.re if isinstance(pair.re, fx.Node) else pair.im
        return self.node(pair.re, like), self.node(pair.im, like)


def _has_shape(node: fx.Node, value: torch.Tensor) -> bool:
    return same_shape(node.meta["val"].shape, value.shape)
