"""Forms of ``seqc::lti_scan`` that convolve with its kernel: from a state of zeros, the sequence alone.

    y = K * u        K_0 = D, K_l = C A^(l-1) B

The kernel depends on the system alone and is computed at compile time, with powers of A squared in float64. Source: Gu,
Goel and Ré, "Efficiently modeling long sequences with structured state spaces" (2022), section 2.4.

``direct`` is one causal convolution, of as many products a step as there are steps: the fastest for few, because it reads a
kernel where chunks read matrices. ``fft`` multiplies transforms of twice the length, in time T log T; ONNX Runtime's DFT is
slower than ``direct`` where that is taken, and than the chunks beyond (``python -m tests.benchmarks.scans --only
"time-invariant, 1024 x 32 complex, from zeros"``), so that it is taken where it is asked for.
"""

from __future__ import annotations

import torch
import torch.fx as fx

from seqc import _torch
from seqc.emit import Emitter
from seqc.lowerings import causal_conv
from seqc.lowerings.base import Lowering, Refused
from seqc.lowerings.lti_scan import System, refuse_short_floats
from seqc.windows import is_zeros

aten = torch.ops.aten

_MOST_TAPS = 2048
_MOST_BYTES = 1 << 26
_BLOCK = 64

_MOVES = frozenset({
    aten.permute.default, aten.transpose.int, aten.view.default, aten.reshape.default, aten.unsqueeze.default,
    aten.squeeze.dim, aten.expand.default, aten.select.int, aten.slice.Tensor, aten.clone.default, aten.cat.default,
    aten.stack.default, aten._to_copy.default,
})  # fmt: skip


def direct(emit: Emitter, node: fx.Node) -> list[fx.Node]:
    """One causal convolution with the kernel."""
    system = _from_zeros(emit, node)
    kernel = _kernel(system, _steps(system, _MOST_TAPS))
    taps = emit(aten.flip.default, emit(aten.unsqueeze.default, kernel, 1), [2])
    call = emit(torch.ops.seqc.causal_conv.default, _line(system), taps, None, None)
    y, _ = causal_conv.conv(emit, call)
    return [_steps_of(system, y), system.state]


def fft(emit: Emitter, node: fx.Node) -> list[fx.Node]:
    """The product of the transforms of inputs and kernel, padded to twice the length."""
    system = _from_zeros(emit, node)
    kernel = _kernel(system, _steps(system, _MOST_BYTES // (system.channels * system.u.meta["val"].dtype.itemsize)))
    y = emit(torch.ops.seqc.fft_conv.default, _line(system), kernel)
    return [_steps_of(system, y), system.state]


def _from_zeros(emit: Emitter, node: fx.Node) -> System:
    system = System.of(emit, node)
    refuse_short_floats(system)
    if not _zero(system.state):
        raise Refused("it starts from a state that may not be zero")
    if any(reader.args[1] == 1 and reader.users for reader in node.users):
        raise Refused("the final state is read")
    return system


def _zero(value: object) -> bool:
    """Whether ``value`` is zeros, moved about."""
    if isinstance(value, (list, tuple)):
        return all(map(_zero, value))
    if not isinstance(value, fx.Node):
        return False
    return is_zeros(value) or (value.target in _MOVES and _zero(value.args[0]))


def _steps(system: System, limit: int) -> int:
    """The largest number of steps, that of the kernel. Raises Refused where it may be more than ``limit``."""
    emit = system.emit
    most = _torch.largest(system.u.meta["val"].shape[0]) if emit.most_steps is None else emit.most_steps
    if most is None or most > limit:
        raise Refused(f"a kernel of more than {limit} steps is too large: give the dimension a bound")
    return most


def _kernel(system: System, steps: int) -> fx.Node:
    """K [channels, steps]: powers of A up to a block on the side of B, by whole blocks on that of C."""
    emit, size = system.emit, min(_BLOCK, 1 << (steps - 1).bit_length())
    write = emit(aten.unsqueeze.default, system.input, -1)  # [channels, m, k, size]
    done = 1
    while done < size:
        write = emit(aten.cat.default, [write, emit(aten.matmul.default, system.power(done), write)], -1)
        done *= 2
    read = emit(aten.unsqueeze.default, system.readout, -2)  # [channels, m, blocks, k]
    while done < steps:
        read = emit(aten.cat.default, [read, emit(aten.matmul.default, read, system.power(done))], -2)
        done *= 2
    rows = emit(
        aten.reshape.default, emit(aten.permute.default, read, [0, 2, 1, 3]), [system.channels, -1, system.states]
    )
    columns = emit(aten.reshape.default, write, [system.channels, system.states, size])
    later = emit(aten.reshape.default, emit(aten.matmul.default, rows, columns), [system.channels, done])
    now = emit(aten.unsqueeze.default, system.feedthrough, 1)
    return emit(aten.slice.Tensor, emit(aten.cat.default, [now, later], 1), 1, 0, steps)


def _line(system: System) -> fx.Node:
    """The inputs [batch, channels, T], in the order in which they are walked."""
    line = system.emit(aten.permute.default, system.u, [1, 2, 0])
    return system.emit(aten.flip.default, line, [2]) if system.reverse else line


def _steps_of(system: System, line: fx.Node) -> fx.Node:
    """Back to [T, batch, channels]."""
    line = system.emit(aten.flip.default, line, [2]) if system.reverse else line
    return system.emit(aten.permute.default, line, [2, 0, 1])


LOWERINGS = (
    Lowering(
        "seqc::lti_scan",
        "direct",
        "one convolution with the kernel, which is computed at compile time",
        direct,
        timed="u",
        needs_steps=True,
    ),
    Lowering(
        "seqc::lti_scan",
        "fft",
        "a product of Fourier transforms with the kernel's",
        fft,
        timed="u",
        needs_steps=True,
    ),
)
