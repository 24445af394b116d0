"""Options of the compiler: ``options={"loops": "unroll"}`` in Python and ``--opt loops=unroll`` on the command line."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from seqc.backends.tensorrt.settings import parse_bytes, parse_range, parse_sms
from seqc.errors import UsageError
from seqc.lowerings import FORMS, SETTINGS

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""The names that ``dtype`` takes, and those of numpy and PyTorch."""

CACHES = ("int8",)
"""The names of :data:`seqc.caches.SCHEMES`, which needs torch."""


@dataclass(frozen=True)
class Option:
    """A known option. ``parse`` turns the text or Python value given into the value used, or raises ValueError."""

    name: str
    default: Any
    allowed: str
    parse: Callable[[Any], Any]
    help: str


def _choice(*values: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if value not in values:
            raise ValueError
        return str(value)

    return parse


def _tolerance(value: Any) -> float | None:
    if value in (None, "auto"):
        return None
    number = float(value)
    if isinstance(value, bool) or not math.isfinite(number) or number < 0:
        raise ValueError
    return number


def _count(value: Any) -> int:
    if isinstance(value, bool) or int(value) != float(value) or int(value) < 1:
        raise ValueError
    return int(value)


def _lowering(op: str) -> Option:
    names = ("auto", *FORMS[op])
    return Option(f"lowering.{op}", "auto", " or ".join(names), _choice(*names), f"the form in which {op} is written")


OPTIONS: dict[str, Option] = {
    option.name: option
    for option in (
        Option(
            "loops",
            "reroll",
            "reroll or unroll",
            _choice("reroll", "unroll"),
            "loops over a dynamic length become recurrences, or stay unrolled at the example's length, then fixed",
        ),
        Option(
            "tolerance",
            None,
            "a number of at least 0, or auto",
            _tolerance,
            "largest error that the check accepts, relative to the scale of each output; auto: 1e-4, for float16 2^-8",
        ),
        Option(
            "dtype",
            "auto",
            "fp32, fp16 or bf16, or auto",
            _choice("auto", *DTYPES),
            "what the model computes in, but for states, decays, norms and softmax; auto: the model's own types",
        ),
        Option(
            "weights",
            "float",
            "float, int8 or int4",
            _choice("float", "int8", "int4"),
            "how matrices are stored: int8 has a scale for each output channel, int4 for each block of 128 or fewer",
        ),
        Option(
            "cache",
            "float",
            f"float or {', '.join(CACHES)}",
            _choice("float", *CACHES),
            "how keys and values of earlier steps are kept by streams: int8 has a scale for each step and head",
        ),
        Option("hoist", "on", "on or off", _choice("on", "off"), "move what does not depend on the state out of loops"),
        *map(_lowering, FORMS),
        Option(
            "newton.iterations",
            SETTINGS["newton"]["iterations"],
            "a whole number of at least 1",
            _count,
            "iterations of Newton's method (lowering.recurrence=newton) before its result is checked",
        ),
        Option(
            "newton.tolerance",
            SETTINGS["newton"]["tolerance"],
            "a number of at least 0",
            _tolerance,
            "by how much of the state's scale a step's equation may be off before the loop is taken instead",
        ),
        Option(
            "engines", "on", "on or off", _choice("on", "off"), "build engines where the target has some, or ONNX only"
        ),
        Option(
            "sm",
            (),
            "compute capabilities such as 89,120, or all",
            parse_sms,
            "the GPUs that engines are built for",
        ),
        Option(
            "workspace",
            0,
            "a size such as 2GiB",
            parse_bytes,
            "memory that an engine may use besides weights and activations; 0 is no limit",
        ),
    )
}

FAMILIES: dict[str, Option] = {
    "profile.": Option(
        "profile.DIM",
        None,
        "MIN,OPT,MAX or one size",
        parse_range,
        "the sizes of a dimension that an engine takes, and the one it is made fast for",
    ),
}
"""Options whose names end in a name of the model's, by what they begin with; those that are not given are left out."""


def parse_options(items: Iterable[str] | Mapping[str, Any] = ()) -> dict[str, Any]:
    """Every known option with its value: the default, or what ``items`` (``KEY=VALUE`` texts or a mapping) says.

    Raises UsageError, one line, for an unknown key (naming the nearest known one), a wrong value or a key given twice.
    """
    given: dict[str, Any] = {}
    pairs = items.items() if isinstance(items, Mapping) else (_split(item) for item in items)
    for key, value in pairs:
        family = next((prefix for prefix in FAMILIES if str(key).startswith(prefix) and key != prefix), "")
        option = FAMILIES[family] if family else OPTIONS.get(key)
        if option is None:
            known = [*OPTIONS, *(o.name for o in FAMILIES.values())]
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise UsageError(f"unknown option {key!r}; {hint}")
        if key in given:
            raise UsageError(f"option {key!r} is given twice")
        try:
            given[key] = option.parse(value)
        except (ValueError, TypeError) as error:
            raise UsageError(f"option {key!r} takes {option.allowed}, not {value!r}") from error
    return {**{name: option.default for name, option in OPTIONS.items()}, **given}


def _split(item: str) -> tuple[str, str]:
    key, equals, value = item.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"an option is KEY=VALUE, not {item!r}")
    return key.strip(), value.strip()
