"""Builds one engine in a child process, shows how far it is, and turns whatever ends it into one clear error."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from seqc.backends.tensorrt.log import parsed_last
from seqc.backends.tensorrt.package import Package
from seqc.backends.tensorrt.where import Origins
from seqc.errors import EngineError, SeqcError, UnsupportedOpError

Phase = Callable[[str, float], None]
"""Called with the name of a phase and its seconds when it has ended."""

_FORMS = "another form of the recurrence around it (--opt lowering.OP=FORM, see seqc targets)"
_WRITE_OTHERWISE = f"write it with other operations, or take {_FORMS}"
_SMALLER = f"try smaller ranges (--opt profile.DIM=MIN,OPT,MAX) or {_FORMS}"
_LONGEST_REASON = 400


def build_engine(
    package: Package,
    onnx: Path,
    origins: Origins,
    shapes: Mapping[str, Sequence[Sequence[int]]],
    *,
    sms: Sequence[int] = (),
    workspace: int = 0,
    phase: Phase | None = None,
) -> tuple[bytes, str]:
    """The engine of the ONNX file, and the log of its build.

    ``shapes`` holds the smallest, best and largest shape of each input; ``sms`` the compute capabilities (none: those of the
    GPU that is there); ``workspace`` a limit in bytes (0: none). The child process is killed, and its files removed, when
    anything interrupts the wait for it.

    Raises UnsupportedOpError where the parser refuses a node, EngineError where the build fails or the process dies.
    """
    with tempfile.TemporaryDirectory(prefix="seqc-engine-") as name:
        folder = Path(name)
        files = {key: str(folder / key) for key in ("engine", "log", "result")}
        settings = {
            **files,
            "module": package.module,
            "onnx": str(onnx),
            "parent": os.getpid(),
            "sms": list(sms),
            "shapes": dict(shapes),
            "workspace": workspace,
        }
        (folder / "settings").write_text(json.dumps(settings), "utf-8")
        code = _run(folder, phase)
        log = _text(folder / "log")
        result = json.loads(_text(folder / "result") or "null")
        if code or result is None:
            raise _died(package, onnx.name, code, log, _text(folder / "stderr"), origins)
        if result:
            raise _failed(package, onnx.name, result, origins, workspace)
        return (folder / "engine").read_bytes(), log


def _run(folder: Path, phase: Phase | None) -> int:
    command = [sys.executable, "-m", "seqc.backends.tensorrt.child", str(folder / "settings")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with (folder / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,  # an interrupt from the terminal is ours to handle
        )
        try:
            assert process.stdout is not None, "asked for above"
            for line in process.stdout:
                told = re.fullmatch(r"@phase (\S+) (.*)\n", line)
                if told and phase is not None:
                    phase(told[2], float(told[1]))
            return process.wait()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()


def _text(path: Path) -> str:
    return path.read_text("utf-8", errors="replace") if path.exists() else ""


def _failed(package: Package, file: str, result: dict[str, Any], origins: Origins, workspace: int) -> SeqcError:
    reason, stage = _one_line(result["message"]), result["stage"]
    if stage == "check":
        return EngineError(f"{file} is no valid ONNX model, of which {package.title} would build something: {reason}")
    if stage == "start":
        return EngineError(f"{package.title} does not start: {reason}; it builds engines for the GPU that is there")
    if stage == "parse":
        where = origins.get(result.get("node", "")) or origins.first_in(reason)
        named = where or result.get("operator") or "a node that it does not name"
        return UnsupportedOpError(f"{package.title} cannot parse {named} of {file}: {reason}; {_WRITE_OTHERWISE}")
    where = origins.first_in(result["message"])
    advice = f"leave it more room than workspace={workspace}, or {_SMALLER}" if workspace else _SMALLER
    advice = "name other GPUs (--opt sm=...)" if refused_sm(reason) else advice
    return EngineError(f"{package.title} builds no engine of {file}{_near(where)}: {reason}; {advice}")


def _died(package: Package, file: str, code: int, log: str, stderr: str, origins: Origins) -> SeqcError:
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
    said = [line for line in stderr.splitlines() if line.strip()]
    reason = f": {_one_line(said[-1])}" if said else ""
    where = origins.get(parsed_last(log)) if "Building engine" not in log else origins.first_in(reason)
    return EngineError(f"the process in which {package.title} builds {file} {how}{_near(where)}{reason}; {_SMALLER}")


def refused_sm(message: str) -> int | None:
    """The compute capability for which alone an engine cannot be built, if ``message`` says so."""
    found = re.search(r"Cannot compile operation .* for \w+ \(SM(\d+)\)", message)
    return int(found[1]) if found else None


def _near(where: object) -> str:
    return f", near {where}" if where else ""


def _one_line(text: str) -> str:
    """The text on one line, without the places in TensorRT's own sources."""
    line = re.sub(r" In \w+ at /_src/[\w./:]+|^IBuilder::\w+: ", "", " ".join(text.split()))
    return line if len(line) <= _LONGEST_REASON else f"{line[:_LONGEST_REASON]}..."
