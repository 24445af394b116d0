"""Every form of every scan op in ONNX Runtime, by length, against torch's loop over steps.

``python -m tests.benchmarks.scans [--lengths 1 64 512 2048 8192] [--rounds 7] [--only NAME ...] [--write README.md]``
``python -m tests.benchmarks.scans --target ort-cuda``, on a machine with a GPU

Batch 1, float32, two threads, all forms of a row interleaved in one process, medians (:func:`timing.repeated`; one pool of
threads for all sessions, so that none spins while another is timed). A cell holds milliseconds and, in brackets, how many
times slower than the best form of the row it is. A star marks what seqc chooses; where that is the graph of one form at every
length it is measured as that form, else it is a column of its own. ``torch`` is the op as a loop in eager PyTorch, ``C++`` a
fused loop compiled at run time (:mod:`fused`).

With ``--target ort-cuda`` the forms of that target run by the CUDA provider, on inputs and outputs that stay on the GPU; torch
and C++, which run on the CPU here, have no columns then.

What is measured is kept in ``results/scans.json``, so that a table can be measured in parts. ``--write`` renders all of it to
``results/scans.txt`` and in its place in the README; with ``--only`` and no name nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import onnx_ir as ir
import onnxruntime
import torch
from torch import nn

import seqc
import seqc.ops
from seqc.backends.onnx import export
from seqc.lowerings import FORMS
from seqc.lowerings.lower import Lower
from seqc.ops.gated_rnn import GATES
from seqc.passes import FoldConstants
from seqc.pipeline import run_passes
from seqc.target import TARGETS
from tests.benchmarks import fused
from tests.benchmarks.timing import repeated

THREADS = 2
RESULTS = Path(__file__).parent / "results" / "scans.json"
PROVIDERS = {"ort-cpu": "CPUExecutionProvider", "ort-cuda": "CUDAExecutionProvider"}
Tensors = tuple[torch.Tensor, ...]
Table = dict[str, dict[str, dict[str, float]]]
"""Seconds by case, length and column."""


class Calls(nn.Module):
    """Calls a dialect op on its inputs."""

    def __init__(self, function: Callable[..., Tensors]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> Tensors:
        return tuple(self.function(*inputs))


@dataclass(frozen=True)
class Case:
    """A recurrence of a real model's size: the op, and inputs of which those in ``timed`` have time as axis
    ``axis``; ``fused`` is it as one loop in C++, where there is one. There are at most ``most`` steps."""

    op: str
    function: Callable[..., Tensors]
    inputs: Callable[[int], Tensors]
    timed: tuple[int, ...]
    axis: int = 0
    fused: Callable[..., Tensors] | None = None
    most: int = 65536


def _unit(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def _diagonal(length: int) -> Tensors:
    return torch.rand(length, 1, 2048), torch.randn(length, 1, 2048), torch.randn(1, 2048)


def _mamba(length: int) -> Tensors:
    dt = 0.1 * torch.rand(length, 1, 1536)
    b, c = torch.randn(2, length, 1, 16)
    return torch.randn(length, 1, 1536), dt, -torch.rand(1536, 16), b, c, torch.randn(1, 1536, 16)


def _attention(heads: int, keys: int, values: int, shared: bool) -> Callable[[int], Tensors]:
    def make(length: int) -> Tensors:
        q = torch.randn(length, 1, 1 if shared else heads, keys)
        k = _unit(torch.randn(length, 1, 1 if shared else heads, keys))
        g, beta = -0.1 * torch.rand(length, 1, heads, 1), torch.rand(length, 1, heads)
        return q, k, torch.randn(length, 1, heads, values), torch.zeros(1, heads, keys, values), g, beta

    return make


def _softmax(scores: tuple[int, ...], values: tuple[int, ...]) -> Callable[[int], Tensors]:
    def make(length: int) -> Tensors:
        start = torch.full((1, *scores), float("-inf")), torch.zeros(1, *values), torch.zeros(1, *scores)
        return 3 * torch.randn(length, 1, *scores), torch.randn(length, 1, *values), -torch.rand(1, 1, *scores), *start

    return make


def _ratio(found: Tensors) -> Tensors:
    """What models read: the weighted mean."""
    return (found[1] / found[2],)


class Systems(nn.Module):
    """A state space of complex diagonal states per channel, as S4D's."""

    def __init__(self, channels: int, states: int) -> None:
        super().__init__()
        self.a = nn.Parameter(0.999 * torch.linalg.qr(torch.randn(channels, states, 2, 2))[0])
        self.b, self.c = (nn.Parameter(torch.randn(channels, states, 2)) for _ in range(2))
        self.d = nn.Parameter(torch.randn(channels))

    def forward(self, u: torch.Tensor, state: torch.Tensor) -> Tensors:
        return tuple(ops.lti_scan(self.a, self.b, self.c, self.d, u, state)[:1])


class SystemsFromZeros(Systems):
    """The same without a state of its own, as models that are given whole sequences."""

    def forward(self, u: torch.Tensor) -> Tensors:  # type: ignore[override]
        return super().forward(u, u.new_zeros(u.shape[1], *self.b.shape))


class Convolution(nn.Module):
    """A causal convolution of each channel."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(channels, 1, taps)), nn.Parameter(torch.randn(channels))

    def forward(self, x: torch.Tensor) -> Tensors:
        return tuple(ops.causal_conv(x, self.weight, self.bias, None)[:1])


class Cells(nn.Module):
    """A layer of gated cells with its input projection."""

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        rows = GATES[kind] * width
        self.kind = kind
        self.inputs, self.recurrent = nn.Linear(width, rows), nn.Linear(width, rows)

    def forward(self, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> Tensors:
        parts = (self.recurrent.weight, self.recurrent.bias)
        return tuple(ops.gated_rnn(self.inputs(x), *parts, h, c, self.kind)[:1])


def _cells(width: int) -> Callable[[int], Tensors]:
    return lambda length: (torch.randn(length, 1, width), torch.zeros(1, width), torch.zeros(1, width))


ops = torch.ops.seqc
CASES = {
    "diagonal, 2048": Case("linear_scan", ops.linear_scan, _diagonal, (0, 1), fused=fused.linear_scan),
    "selective scan, 1536 x 16": Case(
        "selective_scan", ops.selective_scan, _mamba, (0, 1, 3, 4), fused=fused.selective_scan
    ),
    "scalar decay, 24 heads, 128 x 64, shared keys": Case(
        "linear_attention",
        lambda q, k, v, s, g, beta: ops.linear_attention(q, k, v, s, g, None),
        _attention(24, 128, 64, True),
        (0, 1, 2, 4, 5),
        fused=fused.gated_attention,
    ),
    "scalar decay, 8 heads, 64 x 64": Case(
        "linear_attention",
        lambda q, k, v, s, g, beta: ops.linear_attention(q, k, v, s, g, None),
        _attention(8, 64, 64, False),
        (0, 1, 2, 4, 5),
        fused=fused.gated_attention,
    ),
    "softmax scan, 8 heads of 64": Case(
        "softmax_scan",
        lambda s, v, d, m, u, w: _ratio(ops.softmax_scan(s, v, None, m, u, w)),
        _softmax((8, 1), (8, 64)),
        (0, 1),
        fused=fused.weighted_mean(False),
    ),
    "softmax scan, 1024 channels, with decay": Case(
        "softmax_scan",
        lambda *given: _ratio(ops.softmax_scan(*given)),
        _softmax((1024,), (1024,)),
        (0, 1),
        fused=fused.weighted_mean(True),
    ),
    "gated delta, 16 heads, 128 x 128": Case(
        "linear_attention",
        ops.linear_attention,
        _attention(16, 128, 128, False),
        (0, 1, 2, 4, 5),
    ),
    "time-invariant, 1024 x 32 complex": Case(
        "lti_scan",
        Systems(1024, 32),
        lambda length: (torch.randn(length, 1, 1024), torch.zeros(1, 1024, 32, 2)),
        (0,),
    ),
    "time-invariant, 1024 x 32 complex, from zeros": Case(
        "lti_scan", SystemsFromZeros(1024, 32), lambda length: (torch.randn(length, 1, 1024),), (0,), most=8192
    ),
    "LSTM, 256 units": Case("gated_rnn", Cells("lstm", 256), _cells(256), (0,)),
    "GRU, 256 units": Case("gated_rnn", Cells("gru", 256), _cells(256), (0,)),
    "causal convolution, 1536 x 4": Case(
        "causal_conv", Convolution(1536, 4), lambda length: (torch.randn(1, 1536, length),), (0,), axis=2
    ),
    "causal convolution, 256 x 31": Case(
        "causal_conv", Convolution(256, 31), lambda length: (torch.randn(1, 256, length),), (0,), axis=2
    ),
}


def written(case: Case, form: str | None, target: str = "ort-cpu") -> tuple[bytes, str] | None:
    """The model of the case in ``form`` (None: the chosen one), with how it was written; None where that refuses."""
    sequence = torch.export.Dim("sequence", max=case.most)  # some forms need a bound
    shapes = [{case.axis: sequence} if i in case.timed else {} for i in range(len(case.inputs(9)))]
    model = case.function if isinstance(case.function, nn.Module) else Calls(case.function)
    program = seqc.trace(model, case.inputs(9), shapes)
    try:
        forced = {} if form is None else {case.op: form}
        record, _ = run_passes(program, [Lower(TARGETS[target], forced), FoldConstants()])
    except seqc.errors.UnsupportedOpError:
        return None
    proto = ir.serde.serialize_model(export(program)).SerializeToString(deterministic=True)
    name, _, why = record.reasons[0].split(" as ")[1].partition(": ")
    few = why.rpartition(", but ")[2].split(" for at most ")[0] if ", but " in why else ""
    return proto, f"{few} or {name}" if few else name


def columns(case: Case, target: str = "ort-cpu") -> dict[str, onnxruntime.InferenceSession]:
    """A session for each form that takes the case, and one for what is chosen where that is none of them."""
    forms = {form: pair[0] for form in FORMS[case.op] if (pair := written(case, form, target)) is not None}
    found = written(case, None, target)
    assert found is not None
    chosen, name = found
    star = {f"{form}*": proto for form, proto in forms.items() if proto == chosen} or {f"{name}*": chosen}
    rest = {form: proto for form, proto in forms.items() if proto != chosen}
    return {form: opened(proto, PROVIDERS[target]) for form, proto in {**star, **rest}.items()}


def opened(proto: bytes, provider: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(proto, options, providers=[provider])


def bound(session: onnxruntime.InferenceSession, given: Tensors, device: str) -> onnxruntime.IOBinding:
    """The call of ``session`` on ``given``, whose inputs and outputs stay on ``device``."""
    binding = session.io_binding()
    for port, x in zip(session.get_inputs(), given, strict=True):
        binding.bind_ortvalue_input(port.name, onnxruntime.OrtValue.ortvalue_from_numpy(x.numpy(), device, 0))
    for output in session.get_outputs():
        binding.bind_output(output.name, device)
    return binding


def _run(session: onnxruntime.InferenceSession, binding: onnxruntime.IOBinding) -> None:
    session.run_with_iobinding(binding)
    binding.synchronize_outputs()


def row(
    case: Case, sessions: dict[str, onnxruntime.InferenceSession], length: int, rounds: int, device: str = "cpu"
) -> dict[str, float]:
    given = case.inputs(length)
    candidates: dict[str, Callable[[], object]] = {}
    if device != "cpu":
        calls = {form: bound(session, given, device) for form, session in sessions.items()}
        return repeated({form: partial(_run, sessions[form], binding) for form, binding in calls.items()}, rounds)
    for form, session in sessions.items():
        feeds = {i.name: x.numpy() for i, x in zip(session.get_inputs(), given, strict=True)}
        candidates[form] = lambda s=session, f=feeds: s.run(None, f)
    candidates["torch"] = lambda: case.function(*given)
    if case.fused is not None and fused.library() is not None:
        candidates["C++"] = lambda: case.fused(*given)
    return repeated(candidates, rounds)


def ratios(times: dict[str, float]) -> dict[str, float]:
    """How many times slower than the best form each column is."""
    best = min(t for form, t in times.items() if form not in ("torch", "C++"))
    return {form: t / best for form, t in times.items()}


def render(table: Table) -> str:
    lines, chosen = [], {}
    for name in (name for name in CASES if name in table):
        lines.append(name)
        for length, times in sorted(table[name].items(), key=lambda item: int(item[0])):
            slower = ratios(times)
            cells = [f"{form} {1e3 * t:.3f} ms ({slower[form]:.2f}x)" for form, t in times.items()]
            lines.append(f"  length {length:>5}: {'; '.join(cells)}")
            chosen[name, length] = next(ratio for form, ratio in slower.items() if form.endswith("*"))
    (name, length), worst = max(chosen.items(), key=lambda item: item[1])
    lines.append(
        f"what is chosen takes at most {worst:.2f} times as long as the best form in {len(chosen)} cells"
        f" ({name}, length {length})"
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 64, 512, 2048, 8192])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="*", default=list(CASES), metavar="NAME")
    parser.add_argument("--target", choices=PROVIDERS, default="ort-cpu")
    parser.add_argument("--dry", action="store_true", help="keep nothing of what is measured")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table where FILE has the last one")
    options = parser.parse_args()
    provider, device = PROVIDERS[options.target], options.target.removeprefix("ort-")
    if provider not in onnxruntime.get_available_providers():
        parser.error(f"this onnxruntime has no {provider}: install onnxruntime-gpu on a machine with a GPU")
    if options.write is not None and options.target != "ort-cpu":
        parser.error("the README shows ort-cpu only: leave out --write")
    results = RESULTS if options.target == "ort-cpu" else RESULTS.with_stem(f"{RESULTS.stem}-{options.target}")
    warnings.simplefilter("ignore")
    torch.set_num_threads(THREADS)
    torch.set_grad_enabled(False)
    onnxruntime.set_global_thread_pool_sizes(THREADS, 1)
    table: Table = json.loads(results.read_text()) if results.exists() and not options.dry else {}
    for name in options.only:
        sessions = columns(CASES[name], options.target)
        table[name] = {}
        for length in options.lengths:
            table[name][str(length)] = row(CASES[name], sessions, length, options.rounds, device)
        print(render({name: table[name]}), flush=True)
        if not options.dry:
            results.write_text(json.dumps(table, indent=1) + "\n")
    if options.write is not None:
        shown = RESULTS.with_suffix(".txt")
        text = options.write.read_text()
        assert shown.read_text() in text, f"{options.write} does not show {shown}"
        options.write.write_text(text.replace(shown.read_text(), render(table)))
        shown.write_text(render(table))


if __name__ == "__main__":
    main()
