"""Options: the same keys in Python and on the command line, with errors that help."""

from __future__ import annotations

import pytest

from seqc.errors import UsageError
from seqc.options import OPTIONS, parse_options


def test_defaults_are_filled_in() -> None:
    assert parse_options() == {name: option.default for name, option in OPTIONS.items()}


def test_texts_and_mappings_mean_the_same() -> None:
    expected = {**parse_options(), "loops": "unroll", "tolerance": 1e-3}
    assert parse_options(["loops=unroll", " tolerance = 1e-3"]) == expected
    assert parse_options({"loops": "unroll", "tolerance": 1e-3}) == expected
    assert parse_options(expected) == expected


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["loop=unroll"], "unknown option 'loop'; did you mean 'loops'"),
        ({"tolerence": 1}, "did you mean 'tolerance'"),
        (["zzzzzz=1"], "known are loops, tolerance"),
        (["loops=maybe"], "'loops' takes reroll or unroll, not 'maybe'"),
        (["tolerance=small"], "takes a number of at least 0, or auto, not 'small'"),
        (["tolerance=nan"], "takes a number"),
        (["tolerance=-1"], "takes a number"),
        ({"tolerance": True}, "takes a number"),
        ({"loops": None}, "takes reroll or unroll, not None"),
        (["loops"], "an option is KEY=VALUE, not 'loops'"),
        (["=unroll"], "KEY=VALUE"),
        (["hoist=on", "hoist=off"], "given twice"),
    ],
)
def test_wrong_options_are_named(items: object, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse_options(items)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
