"""Forms of ``seqc::lti_scan``: what a chunk of steps computes is a few matrices that depend on the system alone.

With a chunk's inputs U and the state S in front of it, for chunks of Q steps:

    Y      = T U + F S          T_ij = D for i = j, C A^(i-j-1) B for i > j;  F_i = C A^i
    S_next = A^Q S + G U        G_j  = A^(Q-1-j) B

T, F and G are products with powers of A, which are squared in float64 and rounded once, so that poles close to the unit
circle keep their digits; that happens at compile time where they are no larger than the weights, else when the runtime
loads the model. Source: Gu et al., "Combining recurrent, convolutional, and continuous-time models with linear state space
layers" (2021), section 3; the chunks are those of Dao and Gu, "Transformers are SSMs" (2024).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from seqc.emit import Emitter
from seqc.lowerings.base import Lowering, Refused, size_of, trip_of
from seqc.lowerings.blocks import Blocks
from seqc.program import named_args
from seqc.write_loop import write_loop

aten = torch.ops.aten

SIZES = (64, 16)
"""Steps of a chunk; what is left over of the larger goes into the smaller, and what is left of these is walked."""

DIRECT = 256
"""Steps up to which one convolution with the kernel is faster (:mod:`seqc.lowerings.lti_convolution`)."""

KERNEL_BYTES = 1 << 20
"""The largest kernel for few steps: what FoldConstants computes at compile time whatever it is computed from."""

# Blocks of up to this many states are multiplied element by element: thousands of tiny matrix products are slower.
_FEW = 4

# Powers of a system that grows stay finite, so that they make 0 of 0 in steps that are not there.
_LARGEST = 1e150


def sequential(emit: Emitter, node: fx.Node) -> list[fx.Node]:
    """Step by step."""
    system = System.of(emit, node)
    state = system.turned(system.state)
    y, final = system.steps(system.u, state)
    return [y, system.turned(final)]


def chunked(emit: Emitter, node: fx.Node) -> list[fx.Node]:
    """Chunks from the largest to the smallest, and the rest step by step."""
    system = System.of(emit, node)
    refuse_short_floats(system)
    trip = trip_of(emit, system.u)
    if isinstance(trip, int) and trip < SIZES[-1]:
        raise Refused(f"{trip} steps are no whole chunk")
    state, rest, parts = system.turned(system.state), system.u, []
    for size in SIZES:
        left = trip_of(emit, rest)
        if isinstance(left, int) and left < size:
            continue
        count = left // size if isinstance(left, int) else emit(operator.floordiv, left, size)
        whole = count * size if isinstance(count, int) else emit(operator.mul, count, size)
        if system.reverse:
            first = left % size if isinstance(left, int) else emit(operator.sub, left, whole)
            piece = emit(aten.slice.Tensor, rest, 0, first, 2**63 - 1)
            rest = emit(aten.slice.Tensor, rest, 0, 0, first)
        else:
            piece = emit(aten.slice.Tensor, rest, 0, 0, whole)
            rest = emit(aten.slice.Tensor, rest, 0, whole, 2**63 - 1)
        y, state = _in_a_loop(system, piece, state, count, size)
        parts.append(y)
    if trip_of(emit, rest) != 0:
        y, state = system.steps(rest, state)
        parts.append(y)
    y = emit(aten.cat.default, parts[::-1] if system.reverse else parts, 0)
    return [y, system.turned(state)]


def prefix(emit: Emitter, node: fx.Node) -> list[fx.Node]:
    """Chunks whose states are found by a scan of logarithmic depth."""
    system = System.of(emit, node)
    refuse_short_floats(system)
    u = emit(aten.flip.default, system.u, [0]) if system.reverse else system.u
    size = SIZES[0]
    blocks = Blocks(emit, u, size=size)
    chunks = Chunks.of(system, size, reverse=False)
    lines = system.lines(blocks.split(u, 0.0), blocks.count, size)
    first = emit(aten.unsqueeze.default, system.turned(system.state), 0)
    added = system.per_chunk(chunks.added(emit, lines), blocks.count)
    states = emit(aten.cat.default, [first, added], 0)  # in front of each chunk, and behind the last
    ends = any(reader.args[1] == 1 for reader in node.users)
    if not ends:
        states = emit(aten.slice.Tensor, states, 0, 0, blocks.count)
    distance = 1
    while distance < blocks.most + ends:
        before = emit(aten.constant_pad_nd.default, states, _in_front(states, distance))
        before = emit(aten.slice.Tensor, before, 0, 0, -distance)
        kept = system.advanced(emit, system.factors(system.power(size * distance)), before)
        states = emit(aten.add.Tensor, kept, states)
        distance *= 2
    starts = emit(aten.slice.Tensor, states, 0, 0, blocks.count) if ends else states
    entering = system.all_chunks(starts, blocks.count)
    y = system.steps_of(chunks.out(emit, lines, entering), blocks.count, size)
    y = blocks.joined(y, emit(aten.select.int, u, 0, 0))
    final = system.state
    if ends:
        final = system.turned(_behind_all(system, chunks, u, states, size))
    return [emit(aten.flip.default, y, [0]) if system.reverse else y, final]


def _behind_all(system: System, chunks: Chunks, u: fx.Node, states: fx.Node, size: int) -> fx.Node:
    """The state behind the last step: that behind the whole chunks, carried over the r < ``size`` steps that are left.

    These steps stand at the end of a chunk that begins with zeros, so G U is what they add; A^r is the product of the powers
    of 2 that r is made of.
    """
    emit = system.emit
    trip = trip_of(emit, u)
    whole: Any
    left: Any
    if isinstance(trip, int):
        whole, left = divmod(trip, size)
        done: Any = whole * size
        upto: Any = whole + 1
    else:
        whole = emit(operator.floordiv, trip, size)
        done = emit(operator.mul, whole, size)
        left, upto = emit(operator.sub, trip, done), emit(operator.add, whole, 1)
    state = emit(aten.select.int, emit(aten.slice.Tensor, states, 0, 0, upto), 0, -1)
    rest = emit(aten.constant_pad_nd.default, emit(aten.slice.Tensor, u, 0, done, 2**63 - 1), _in_front(u, size))
    rest = emit(aten.unsqueeze.default, emit(aten.slice.Tensor, rest, 0, left, 2**63 - 1), 0)
    bit = 1
    while bit < size:
        if not isinstance(left, int) or left & bit:
            further = system.advanced(emit, system.factors(system.power(bit)), state)
            state = further if isinstance(left, int) else _where_odd(emit, left, bit, further, state)
        bit *= 2
    added = system.per_chunk(chunks.added(emit, system.lines(rest, 1, size)), 1)
    return emit(aten.add.Tensor, state, emit(aten.select.int, added, 0, 0))


def _where_odd(emit: Emitter, count: fx.Node, bit: int, one: fx.Node, other: fx.Node) -> fx.Node:
    """``one`` where ``bit`` is among the powers of 2 that ``count`` is made of, else ``other``."""
    quotient = count if bit == 1 else emit(operator.floordiv, count, bit)
    odd = emit(aten.full.default, [], emit(operator.mod, quotient, 2), dtype=torch.int64)
    return emit(aten.where.self, emit(aten.gt.Scalar, odd, 0), one, other)


def _in_front(x: fx.Node, count: int) -> list[int]:
    """The padding of axis 0 of ``x`` that puts ``count`` in front."""
    return [0, 0] * (x.meta["val"].dim() - 1) + [count, 0]


def refuse_short_floats(system: System) -> None:
    """Raises Refused for floats of 16 bits."""
    dtype = system.u.meta["val"].dtype
    if dtype not in (torch.float32, torch.float64):
        raise Refused(f"sums over a chunk lose too much in {dtype}")


def _in_a_loop(system: System, u: fx.Node, state: fx.Node, count: Any, size: int) -> tuple[fx.Node, fx.Node]:
    """Whole chunks: their products all at once, the states between them in a loop."""
    emit = system.emit
    chunks = Chunks.of(system, size, system.reverse)
    sizes = [size_of(emit, u, axis) for axis in (1, 2)]
    lines = system.lines(emit(aten.reshape.default, u, [count, size, *sizes]), count, size)
    added = system.per_chunk(chunks.added(emit, lines), count)
    power = system.factors(system.power(size))

    def step(
        inner: Emitter, carries: list[fx.Node], xs: list[fx.Node], factors: list[fx.Node]
    ) -> tuple[list[fx.Node], list[fx.Node]]:
        kept = system.advanced(inner, factors, carries[0])
        return [inner(aten.add.Tensor, kept, xs[0])], [inner(aten.clone.default, carries[0])]

    final, entering = write_loop(emit, step, count, [state], [added], power, system.reverse)
    y = system.steps_of(chunks.out(emit, lines, system.all_chunks(entering, count)), count, size)
    whole = count * size if isinstance(count, int) else emit(operator.mul, count, size)
    return emit(aten.reshape.default, y, [whole, *sizes]), final


@dataclass
class System:
    """The operands of the op, and values in the layouts in which they are multiplied.

    States are held as [.., channels, k, m] where blocks are of few states, else as [.., channels, m, k], flat as n. Products
    with T, F and G, transposed, are taken for all chunks of a channel: [channels, chunks * batch, steps or n]. Axes are
    moved one at a time: others are several times slower in ONNX Runtime.
    """

    emit: Emitter
    transition: fx.Node
    input: fx.Node
    readout: fx.Node
    feedthrough: fx.Node
    u: fx.Node
    state: fx.Node
    reverse: bool

    @classmethod
    def of(cls, emit: Emitter, node: fx.Node) -> System:
        system = cls(emit, *named_args(node).values())
        if not all(isinstance(size, int) for size in system.transition.meta["val"].shape):
            raise Refused("the numbers of channels and states are not fixed")
        return system

    def __post_init__(self) -> None:
        self.channels, self.blocks, self.size, _ = self.transition.meta["val"].shape
        self.states = self.blocks * self.size
        self.few = self.size <= _FEW
        self.batch = size_of(self.emit, self.u, 1)
        self._powers: dict[int, fx.Node] = {1: self.transition}
        self._wide: dict[int, fx.Node] = {}

    def power(self, exponent: int) -> fx.Node:
        """A^exponent for a power of 2, [channels, m, k, k], squared in float64."""
        if exponent not in self._powers:
            dtype = self.transition.meta["val"].dtype
            most = min(torch.finfo(dtype).max, _LARGEST)
            finite = self.emit(aten.clamp.default, self._squared(exponent), -most, most)
            self._powers[exponent] = self.emit(aten._to_copy.default, finite, dtype=dtype)
        return self._powers[exponent]

    def _squared(self, exponent: int) -> fx.Node:
        if exponent not in self._wide:
            if exponent == 1:
                wide = self.emit(aten._to_copy.default, self.transition, dtype=torch.float64)
            else:
                half = self._squared(exponent // 2)
                square = self.emit(aten.matmul.default, half, half)
                wide = self.emit(aten.clamp.default, square, -_LARGEST, _LARGEST)
            self._wide[exponent] = wide
        return self._wide[exponent]

    def factors(self, power: fx.Node) -> list[fx.Node]:
        """``power`` as :meth:`advanced` takes it: its columns [channels, k, m], or transposed."""
        if not self.few:
            return [self.emit(aten.transpose.int, power, -1, -2)]
        turned = self.emit(aten.permute.default, power, [0, 2, 1, 3])
        return [self.emit(aten.select.int, turned, 3, i) for i in range(self.size)]

    def advanced(self, emit: Emitter, factors: list[fx.Node], state: fx.Node) -> fx.Node:
        """A power times states."""
        if not self.few:
            product = emit(aten.matmul.default, emit(aten.unsqueeze.default, state, -2), factors[0])
            return emit(aten.squeeze.dim, product, -2)
        total: fx.Node | None = None
        for i, column in enumerate(factors):
            part = state if self.size == 1 else emit(aten.slice.Tensor, state, -2, i, i + 1)
            product = emit(aten.mul.Tensor, column, part)
            total = product if total is None else emit(aten.add.Tensor, total, product)
        assert total is not None
        return total

    def turned(self, state: fx.Node) -> fx.Node:
        """From [.., m, k] to the layout of states, and back."""
        return self.emit(aten.transpose.int, state, -1, -2) if self.few else state

    def lines(self, u: fx.Node, count: Any, size: int) -> fx.Node:
        """[chunks, size, batch, channels] as [channels, chunks * batch, size]."""
        apart = self.emit(aten.permute.default, u, [0, 2, 1, 3])
        flat = self.emit(aten.reshape.default, apart, [self._times(count, size), self.channels])
        turned = self.emit(aten.permute.default, flat, [1, 0])
        return self.emit(aten.reshape.default, turned, [self.channels, self._times(count), size])

    def steps_of(self, lines: fx.Node, count: Any, size: int) -> fx.Node:
        """Back to [chunks, size, batch, channels]."""
        flat = self.emit(aten.reshape.default, lines, [self.channels, self._times(count, size)])
        turned = self.emit(aten.permute.default, flat, [1, 0])
        apart = self.emit(aten.reshape.default, turned, [count, self.batch, size, self.channels])
        return self.emit(aten.permute.default, apart, [0, 2, 1, 3])

    def per_chunk(self, states: fx.Node, count: Any) -> fx.Node:
        """[channels, chunks * batch, n] as [chunks, batch, channels, ..]."""
        turned = self.emit(aten.permute.default, states, [1, 0, 2])
        inner = (self.size, self.blocks) if self.few else (self.blocks, self.size)
        return self.emit(aten.reshape.default, turned, [count, self.batch, self.channels, *inner])

    def all_chunks(self, states: fx.Node, count: Any) -> fx.Node:
        """Back to [channels, chunks * batch, n]."""
        flat = self.emit(aten.reshape.default, states, [count, self.batch, self.channels, self.states])
        # With an axis less ONNX Runtime takes product and transposition as one, and divides by a count of 0 chunks.
        turned = self.emit(aten.permute.default, flat, [2, 0, 1, 3])
        return self.emit(aten.reshape.default, turned, [self.channels, self._times(count), self.states])

    def _times(self, count: Any, size: int = 1) -> Any:
        """chunks * batch * size."""
        if isinstance(count, int) and isinstance(self.batch, int):
            return count * self.batch * size
        both = self.emit(operator.mul, count, self.batch)
        return both if size == 1 else self.emit(operator.mul, both, size)

    def steps(self, u: fx.Node, state: fx.Node) -> tuple[fx.Node, fx.Node]:
        """(y, the state behind) of single steps."""
        emit = self.emit

        def step(
            inner: Emitter, carries: list[fx.Node], xs: list[fx.Node], constants: list[fx.Node]
        ) -> tuple[list[fx.Node], list[fx.Node]]:
            (h,), (now,), (b, c, *factors) = carries, xs, constants
            y = inner(aten.sum.dim_IntList, inner(aten.mul.Tensor, c, h), [-2, -1])
            entering = inner(aten.unsqueeze.default, inner(aten.unsqueeze.default, now, -1), -1)
            kept = self.advanced(inner, factors, h)
            return [inner(aten.add.Tensor, kept, inner(aten.mul.Tensor, b, entering))], [y]

        constants = [self.turned(self.input), self.turned(self.readout), *self.factors(self.transition)]
        final, y = write_loop(emit, step, trip_of(emit, u), [state], [u], constants, self.reverse)
        return emit(aten.add.Tensor, y, emit(aten.mul.Tensor, self.feedthrough, u)), final


@dataclass(frozen=True)
class Chunks:
    """The matrices of chunks of a size, those of the module's docstring transposed: T [channels, steps, steps], F
    [channels, n, steps] and G [channels, steps, n]."""

    toeplitz: fx.Node
    read: fx.Node
    write: fx.Node

    @classmethod
    def of(cls, system: System, size: int, reverse: bool) -> Chunks:
        emit, few = system.emit, system.few
        read = emit(aten.unsqueeze.default, system.readout, -2)  # [channels, m, steps, k]
        write = emit(aten.unsqueeze.default, system.input, -1)  # [channels, m, k, steps]
        done = 1
        while done < size:
            power = system.power(done)
            read = emit(aten.cat.default, [read, emit(aten.matmul.default, read, power)], -2)
            write = emit(aten.cat.default, [emit(aten.matmul.default, power, write), write], -1)
            done *= 2
        turned = emit(aten.permute.default, read, [0, 3, 1, 2] if few else [0, 1, 3, 2])
        read = emit(aten.reshape.default, turned, [system.channels, system.states, size])
        turned = emit(aten.permute.default, write, [0, 3, 2, 1] if few else [0, 3, 1, 2])
        write = emit(aten.reshape.default, turned, [system.channels, size, system.states])
        toeplitz = cls._toeplitz(system, size, read, write)
        if reverse:
            read, write = emit(aten.flip.default, read, [2]), emit(aten.flip.default, write, [1])
            toeplitz = emit(aten.transpose.int, toeplitz, 1, 2)
        return cls(toeplitz, read, write)

    @staticmethod
    def _toeplitz(system: System, size: int, read: fx.Node, write: fx.Node) -> fx.Node:
        emit = system.emit
        entering = emit(aten.slice.Tensor, write, 1, size - 1, size)  # B
        later = emit(aten.matmul.default, entering, emit(aten.slice.Tensor, read, 2, 0, size - 1))
        now = emit(aten.unsqueeze.default, system.feedthrough, 1)
        kernel = emit(aten.cat.default, [now, emit(aten.squeeze.dim, later, 1)], 1)
        line = emit(aten.constant_pad_nd.default, kernel, [size - 1, 0])
        step = emit(aten.arange.default, size)
        behind = emit(aten.sub.Tensor, step, emit(aten.unsqueeze.default, step, 1))
        places = emit(aten.reshape.default, emit(aten.add.Tensor, behind, size - 1), [size * size])
        spread = emit(aten.index_select.default, line, 1, places)
        return emit(aten.reshape.default, spread, [system.channels, size, size])

    def added(self, emit: Emitter, lines: fx.Node) -> fx.Node:
        """What each chunk adds to the state."""
        return emit(aten.matmul.default, lines, self.write)

    def out(self, emit: Emitter, lines: fx.Node, states: fx.Node) -> fx.Node:
        """What each chunk gives, entered with ``states``."""
        within = emit(aten.matmul.default, lines, self.toeplitz)
        return emit(aten.add.Tensor, within, emit(aten.matmul.default, states, self.read))


def _few(node: fx.Node) -> dict[str, float]:
    u = named_args(node)["u"].meta["val"]
    row = int(u.shape[2]) * u.dtype.itemsize
    return {"direct": DIRECT if DIRECT * row <= KERNEL_BYTES else KERNEL_BYTES // row}


LOWERINGS = (
    Lowering(
        "seqc::lti_scan",
        "chunked",
        f"products of chunks of {SIZES[0]} steps with matrices known beforehand, the states between them in a loop",
        chunked,
        short=_few,
        timed="u",
    ),
    Lowering("seqc::lti_scan", "sequential", "a loop over steps", sequential),
    Lowering(
        "seqc::lti_scan",
        "prefix",
        f"products of chunks of {SIZES[0]} steps with matrices known beforehand, a scan of logarithmic depth over their"
        " states: no loop",
        prefix,
    ),
)
