"""Measures every model of the zoo with seqc, TensorRT's builder and torch.onnx, and renders the table of the README.

``python -m tests.models.table [--only NAME ...] [--sides seqc engines torch] [--render] [--write README.md]``: each measurement
is a process of its own, one after the other; results are kept in ``results.json`` beside this file, so that ``--only``
and ``--sides`` replace a part of them and ``--render`` measures nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.models.measure import parse
from tests.models.measure_engines import SMS, engine_cells

RESULTS = Path(__file__).with_name("results.json")
BEGIN, END = "<!-- models:begin -->", "<!-- models:end -->"
_TIMEOUT = {"seqc": 900, "engines": 1800, "torch": 300}
_GROUPS = {
    "transformers": "From transformers",
    "pytorch": "Plain PyTorch",
    "refused": "Must be refused: no static graph computes these as written",
}
_HEAD = (
    "| model | seqc | became | ONNX nodes | Scans | max error | compile s | engine | kernels | loop over steps? "
    "| torch.onnx.export | its nodes |",
    "|---|---|---|--:|--:|--:|--:|---|--:|---|---|--:|",
)


def measured(name: str, which: str) -> dict[str, Any]:
    """Run ``tests.models.measure`` for one model; a crash or a timeout is a result too."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "tests.models.measure", name, which]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT[which], check=False)
    except subprocess.TimeoutExpired:
        return {"status": "timeout", "detail": f"over {_TIMEOUT[which]} s", "seconds": time.perf_counter() - start}
    result = parse(done.stdout)
    if result is None:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"status": "crash", "detail": f"exit {done.returncode}: {last[:300]}"}
    return result


def render(results: Mapping[str, Any]) -> str:
    """The Markdown table of ``results``: one section per group, in the order of the zoo."""
    lines = [
        f"Measured with {results['tools']}. Lengths {results['lengths']} (where the model itself takes them) at batch 1"
        " and 3, all from one compilation at length 7; error relative to the output's scale, against eager PyTorch. The"
        " dynamic dimensions of torch.onnx.export are torch.export.Dim objects; given as names (strings) or as"
        " dynamic_axes, torch 2.13 raises an error for a loop over time instead of freezing its length. Engines are built by"
        f" {results.get('builder', '')} for compute capabilities {', '.join(f'{sm // 10}.{sm % 10}' for sm in SMS)} at"
        " once, for lengths to 4096 and batch to 8; kernels: fp32 / fp16 where they differ.",
        "",
    ]
    models = results["models"]
    for group, title in _GROUPS.items():
        rows = [_row(name, entry) for name, entry in models.items() if entry["group"] == group]
        if rows:
            lines += [f"**{title}**", "", *_HEAD, *rows, ""]
    compiled = [e for e in models.values() if e["group"] != "refused"]
    lines.append(_summary("All models", compiled))
    lines.append(_summary("Those that loop over time", [e for e in compiled if e["loops"]]))
    return "\n".join(lines)


def _summary(title: str, entries: list[Any]) -> str:
    ours = sum(e.get("seqc", {}).get("status") == "right" for e in entries)
    theirs = sum(e.get("torch", {}).get("status") == "right" for e in entries)
    silent = sum(e.get("torch", {}).get("status", "").startswith(("frozen", "right only", "wrong")) for e in entries)
    return (
        f"- {title}: seqc right for {ours} of {len(entries)}, torch.onnx.export for {theirs}; it returned, without a "
        f"word, a model that is not right at other lengths for {silent}."
    )


def _row(name: str, entry: Mapping[str, Any]) -> str:
    ours, theirs = entry.get("seqc", {}), entry.get("torch", {})
    note = f" ({entry['note']})" if entry["note"] else ""
    cells = [
        f"{name}{note}",
        _status(ours),
        ours.get("became", ""),
        ours.get("nodes", ""),
        ours.get("scans", ""),
        _worst(ours),
        f"{ours['seconds']:.0f}" if "seconds" in ours else "",
        *engine_cells(entry.get("engines", {})),
        _status(theirs),
        theirs.get("nodes", ""),
    ]
    return "| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |"


def _status(result: Mapping[str, Any]) -> str:
    status = str(result.get("status", ""))
    detail = str(result.get("detail", ""))
    if status == "refused":
        return "refused"
    return f"{status}: {detail[:70]}" if detail else status


def _worst(result: Mapping[str, Any]) -> str:
    errors = result.get("errors", {})
    if not errors:
        return ""
    failed = [length for length, error in errors.items() if isinstance(error, str)]
    return f"fails at {', '.join(failed)}" if failed else f"{max(errors.values()):.0e}"


def replaced(text: str, table: str) -> str:
    """``text`` with what stands between the markers replaced by ``table``."""
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def _tools() -> str:
    import onnxruntime
    import torch
    import transformers

    versions = (
        f"torch {torch.__version__}, transformers {transformers.__version__}, onnxruntime {onnxruntime.__version__}"
    )
    return f"{versions} on {platform.machine()}, 2 cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="measure these models; keep the other rows")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table between the markers of FILE")
    parser.add_argument("--render", action="store_true", help="measure nothing")
    parser.add_argument("--sides", nargs="+", choices=_TIMEOUT, default=list(_TIMEOUT), help="keep the other side")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"models": {}}
    if not options.render:
        _measure(results, options.only, options.sides)
    table = render(results)
    if options.write is None:
        print(table)
    else:
        options.write.write_text(replaced(options.write.read_text(), table))


def _measure(results: dict[str, Any], only: list[str] | None, sides: list[str]) -> None:
    from tests.models.zoo import ALL
    from tests.models.zoo.base import LENGTHS

    results["tools"], results["lengths"] = _tools(), ", ".join(map(str, LENGTHS))
    results["builder"] = f"tensorrt-rtx {version('tensorrt-rtx')}"
    known = results["models"]
    for name, zoo in ALL.items():
        if only is not None and name not in only:
            continue
        facts = {"group": zoo.group, "loops": zoo.loops, "note": zoo.note, "lengths": list(zoo.lengths)}
        now = [side for side in sides if side != "engines" or zoo.group != "refused"]
        known[name] = {**known.get(name, {}), **facts, **{side: measured(name, side) for side in now}}
        results["models"] = {n: known[n] for n in ALL if n in known}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print(name, {side: known[name][side] for side in now}, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
