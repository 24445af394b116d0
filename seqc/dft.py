"""The discrete Fourier transform of any length as products with matrices of cosines and sines, in real arithmetic.

Why not ONNX's DFT operator: where the length is no power of two, ONNX Runtime 1.31 computes it by chirp in float32. Its
error, relative to the scale, is 4e-5 at length 514, 2e-4 at 2046 and 2e-3 at 16382 forward, and up to 3 times that
inverse (measured). Here the angle 2 pi (j k mod n) / n is reduced in integers first, and the error stays at 4e-7. The
price is O(n^2) work, and memory for the matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx

from seqc.emit import Emitter
from seqc.pairs import Arithmetic, Pair, Part

aten = torch.ops.aten
Matrices = tuple[fx.Node, fx.Node]


class Transform:
    """Writes transforms along one axis. ``n`` is a size (int or node); ``dtype`` that of the real parts.

    ``made`` holds the matrices that one graph has already, by kind, sizes and dtype: layers share them.
    """

    def __init__(self, emit: Emitter, dtype: torch.dtype, made: dict[Any, Matrices]) -> None:
        self.emit = emit
        self.made = made
        self.dtype = dtype
        self.math = Arithmetic(emit)

    def forward(self, x: Pair, axis: int, n: Any, count: Any) -> Pair:
        """X_k = sum_j x_j exp(-2 pi i j k / n) for k < ``count``, along ``axis`` of length ``n``."""
        cosine, minus = self._shared("forward", (n, count), lambda: self._forward(n, count))
        return self._applied(x, Pair(cosine, minus), axis)

    def _forward(self, n: Any, count: Any) -> tuple[fx.Node, fx.Node]:
        cosine, sine = self._matrices(self._arange(n), self._arange(count), n)
        return cosine, self.emit(aten.neg.default, sine)

    def _shared(self, kind: str, sizes: tuple[Any, ...], make: Callable[[], Matrices]) -> Matrices:
        values = tuple(str(size.meta["val"] if isinstance(size, fx.Node) else size) for size in sizes)
        key = (kind, values, self.dtype)
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def backward(self, x: Pair, axis: int, n: Any) -> Pair:
        """x_j = sum_k X_k exp(2 pi i j k / n), not divided by n."""
        matrices = self._shared("back", (n,), lambda: self._matrices(self._arange(n), self._arange(n), n))
        return self._applied(x, Pair(*matrices), axis)

    def backward_to_real(self, x: Pair, axis: int, n: Any) -> fx.Node:
        """The real x_j of length ``n`` whose first n // 2 + 1 coefficients along ``axis`` are ``x``, times n."""
        emit = self.emit
        source = x.re if isinstance(x.re, fx.Node) else x.im
        assert isinstance(source, fx.Node)
        size = source.meta["val"].shape[axis]
        count = size if isinstance(size, int) else emit(aten.sym_size.int, source, axis)
        cosine, sine = self._shared("real", (count, n), lambda: self._weighted(count, n))
        rows, imaginary = self._product(x.re, cosine, axis), self._product(x.im, sine, axis)
        result = self.math.sub(rows, imaginary)
        assert isinstance(result, fx.Node)
        return result

    def _weighted(self, count: Any, n: Any) -> tuple[fx.Node, fx.Node]:
        """The backward matrices with each coefficient counted twice that also stands for its conjugate."""
        emit, k = self.emit, self._arange(count)
        single = emit(aten.logical_or.default, emit(aten.eq.Scalar, k, 0), self._is_half(k, n))
        ones = emit(aten.ones_like.default, k, dtype=self.dtype)
        weight = emit(aten.where.self, single, ones, emit(aten.add.Scalar, ones, 1.0))
        column = emit(aten.unsqueeze.default, weight, 1)
        cosine, sine = self._matrices(k, self._arange(n), n)
        return emit(aten.mul.Tensor, column, cosine), emit(aten.mul.Tensor, column, sine)

    def norm(self, pair: Pair, normalization: int, n: Any) -> Pair:
        """Scale by 1 (0), by 1 / sqrt(n) (1), or by 1 / n (2), as ATen numbers them."""
        if normalization == 0:
            return pair
        if isinstance(n, int):
            return self.math.scaled(pair, 1.0 / (math.sqrt(n) if normalization == 1 else n))
        divisor = self._number(n)
        if normalization == 1:
            divisor = self.emit(aten.sqrt.default, divisor)
        return self.math.scaled(pair, self.emit(aten.reciprocal.default, divisor))

    def _number(self, n: fx.Node) -> fx.Node:
        """The size ``n`` as a tensor of no axes."""
        return self.emit(aten.full.default, [], n, dtype=self.dtype)

    def _is_half(self, k: fx.Node, n: Any) -> fx.Node:
        twice = self.emit(aten.mul.Scalar, k, 2)
        return self.emit(aten.eq.Tensor, twice, self._whole(n))

    def _whole(self, n: Any) -> fx.Node:
        return self.emit(aten.full.default, [], n, dtype=torch.int64)

    def _arange(self, n: Any) -> fx.Node:
        return self.emit(aten.arange.default, n, dtype=torch.int64)

    def _matrices(self, rows: fx.Node, columns: fx.Node, n: Any) -> tuple[fx.Node, fx.Node]:
        """cos and sin of 2 pi rows columns / n. The product is reduced modulo n as integers: exact at any length."""
        emit = self.emit
        product = emit(aten.mul.Tensor, emit(aten.unsqueeze.default, rows, 1), columns)
        turns = emit(aten.remainder.Tensor, product, self._whole(n))
        part = emit(aten._to_copy.default, turns, dtype=self.dtype)
        if isinstance(n, int):
            angle = emit(aten.mul.Scalar, part, 2 * math.pi / n)
        else:
            angle = emit(aten.div.Tensor, emit(aten.mul.Scalar, part, 2 * math.pi), self._number(n))
        return emit(aten.cos.default, angle), emit(aten.sin.default, angle)

    def _applied(self, x: Pair, matrix: Pair, axis: int) -> Pair:
        products = [[self._product(part, m, axis) for m in (matrix.re, matrix.im)] for part in (x.re, x.im)]
        math_ = self.math
        return Pair(math_.sub(products[0][0], products[1][1]), math_.add(products[0][1], products[1][0]))

    def _product(self, part: Part, matrix: Part, axis: int) -> Part:
        if part is None:
            return None
        assert isinstance(part, fx.Node)
        emit, last = self.emit, part.meta["val"].dim() - 1
        if axis == last:
            return emit(aten.matmul.default, part, matrix)
        moved = emit(aten.transpose.int, part, axis, last)
        return emit(aten.transpose.int, emit(aten.matmul.default, moved, matrix), axis, last)
