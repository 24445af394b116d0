"""How the error of every form of every scan op grows with the length, in ONNX Runtime.

``python -m tests.benchmarks.errors [--lengths 16 128 1024 4096] [--only NAME ...] [--write README.md]``

The cases are those of :mod:`tests.benchmarks.scans`, in float32. An error is the largest difference from the reference
implementation in float64, relative to the largest number of that; the exponent is the slope of the logarithm of the error
over that of the length (0: it does not grow), fitted to all lengths.
"""

from __future__ import annotations

import argparse
import copy
import math
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import nn

from tests.benchmarks.scans import CASES, Case, columns

RESULTS = Path(__file__).parent / "results" / "errors.txt"


def errors(case: Case, sessions: dict[str, onnxruntime.InferenceSession], length: int) -> dict[str, float]:
    torch.manual_seed(length)
    given = case.inputs(length)
    exact = copy.deepcopy(case.function).double() if isinstance(case.function, nn.Module) else case.function
    expected = [x.numpy() for x in exact(*(x.double() for x in given))]
    found = {}
    for form, session in sessions.items():
        feeds = {i.name: x.numpy() for i, x in zip(session.get_inputs(), given, strict=True)}
        pairs = zip(session.run(None, feeds), expected, strict=True)
        found[form] = max(float(np.abs(y - x).max() / np.abs(x).max()) for y, x in pairs)
    return found


def exponent(lengths: list[int], values: list[float]) -> float:
    slope, _ = np.polyfit(np.log(lengths), [math.log(max(v, 1e-9)) for v in values], 1)
    return float(slope)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 128, 1024, 4096])
    parser.add_argument("--only", nargs="*", default=list(CASES), metavar="NAME")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table where FILE has the last one")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_grad_enabled(False)
    onnxruntime.set_global_thread_pool_sizes(2, 1)
    lines = []
    for name in options.only:
        sessions = columns(CASES[name])
        table = [errors(CASES[name], sessions, length) for length in options.lengths]
        lines.append(name)
        for form in sessions:
            values = [row[form] for row in table]
            shown = ", ".join(f"{length}: {value:.1e}" for length, value in zip(options.lengths, values, strict=True))
            lines.append(f"  {form}: {shown}; length^{exponent(options.lengths, values):.2f}")
        print("\n".join(lines[-len(sessions) - 1 :]), flush=True)
    if options.write is not None:
        text, table_text = options.write.read_text(), "\n".join(lines) + "\n"
        assert RESULTS.read_text() in text, f"{options.write} does not show {RESULTS}"
        options.write.write_text(text.replace(RESULTS.read_text(), table_text))
        RESULTS.write_text(table_text)


if __name__ == "__main__":
    main()
