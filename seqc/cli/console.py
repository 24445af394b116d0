"""What the commands share: their common flags, progress on stderr, results on stdout."""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import click

_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass
class State:
    """The flags every command has; they also decide how an error is shown."""

    debug: bool = False
    json: bool = False


def common_options(function: _F) -> _F:
    """Add ``--json`` and ``--debug``, which are stored in the State that the context carries."""

    def store(name: str) -> Callable[[click.Context, click.Parameter, bool], None]:
        def callback(context: click.Context, parameter: click.Parameter, value: bool) -> None:
            if value:
                setattr(context.ensure_object(State), name, True)

        return callback

    for name, text in (("debug", "Show a traceback with errors."), ("json", "Print one JSON object on stdout.")):
        function = click.option(
            f"--{name}", is_flag=True, expose_value=False, is_eager=True, callback=store(name), help=text
        )(function)
    return function


def print_json(value: Any) -> None:
    """Print ``value`` as one strict JSON object; numbers that JSON lacks become strings."""
    click.echo(json.dumps(_strict(value), indent=2, ensure_ascii=False))


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _strict(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)


def note(text: str) -> None:
    """Tell the user something that is no result: a line on stderr."""
    click.echo(f"note: {text}", err=True)


def table(rows: Sequence[Sequence[str]], indent: str = "  ") -> str:
    """Rows as aligned columns, the last one as long as it is."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    lines = ["  ".join([*(c.ljust(w) for c, w in zip(row[:-1], widths, strict=False)), row[-1]]) for row in rows]
    return "\n".join((indent + line).rstrip() for line in lines)


def human_bytes(size: float) -> str:
    """A file size for people: ``1.5 MB`` (1 MB = 10**6 bytes)."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def peak_line(peak: Mapping[str, Any]) -> str:
    """The manifest's ``peak_activations`` for people, with its sizes and what the model took before the passes."""
    after, before = human_bytes(peak["after_passes"]), human_bytes(peak["before_passes"])
    sizes = ", ".join(f"{name}={size}" for name, size in peak["sizes"].items())
    where = f", reached at {peak['at']}" if peak["at"] else ""
    return f"peak activations about {after} ({before} before the passes){f' at {sizes}' if sizes else ''}{where}"


def engine_line(engine: Mapping[str, Any]) -> str:
    """An engine of the manifest for people: for which GPUs and sizes, how many kernels, what memory it needs."""
    (profile,) = engine["profiles"]
    sizes = ", ".join(f"{name} {r['min']} to {r['max']} (best at {r['opt']})" for name, r in profile.items())
    gpus = f"sm {','.join(map(str, engine['sm']))}" if engine["sm"] else "the GPU it was built on"
    loop = ", a loop over steps" if engine["has_step_loop"] else ""
    memory = f"{human_bytes(engine['activation_bytes'])} of activations"
    return f"{gpus}; {engine['kernels']} kernels{loop}; {memory}; {sizes or 'fixed sizes'}"


_ALIVE_SECONDS = 30.0
"""Where nothing moves on a screen, so often a line says that the work goes on."""


class Progress:
    """Prints a line on stderr as each stage ends; on a terminal also what time the running stage has taken, elsewhere (logs of
    CI, which may take silence for a hang) a line about that now and then.

    Call it as ``progress(stage, nodes, seconds)``.
    """

    def __init__(self, doing: str) -> None:
        self._doing = doing
        self._start = time.perf_counter()
        self._stage_start = self._start
        self._live: Any = None
        self._ended = threading.Event()
        self._alive = threading.Thread(target=self._say_alive, daemon=True)
        self.stages: list[dict[str, Any]] = []

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress as Live
            from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

            columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            self._live = Live(*columns, console=Console(stderr=True), transient=True)
            self._live.start()
            self._task = self._live.add_task(self._doing)
        else:
            self._alive.start()
        return self

    def _say_alive(self) -> None:
        while not self._ended.wait(_ALIVE_SECONDS):
            now = time.perf_counter()
            at = f"after {self.stages[-1]['stage']}" if self.stages else self._doing
            click.echo(
                f"{at}: running for {now - self._stage_start:.0f} s  (total {now - self._start:.1f} s)", err=True
            )

    def __call__(self, stage: str, nodes: int, seconds: float) -> None:
        self.stages.append({"stage": stage, "nodes": nodes, "seconds": round(seconds, 4)})
        self._stage_start = time.perf_counter()
        elapsed = self._stage_start - self._start
        line = f"{stage:<20} {nodes:>8} nodes {seconds:>8.2f} s  (total {elapsed:.1f} s)"
        if self._live is not None:
            from rich.text import Text

            self._live.console.print(Text(line, style="dim"))
            self._live.reset(self._task, description=f"after {stage}")
        else:
            click.echo(line, err=True)

    def note(self, text: str) -> None:
        """Tell the user something while the work goes on."""
        if self._live is not None:
            from rich.text import Text

            self._live.console.print(Text(f"note: {text}"))
        else:
            note(text)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._live is not None:
            self._live.stop()
        else:
            self._alive.join()
