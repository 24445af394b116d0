"""The README's table of models is what was measured."""

from __future__ import annotations

import json
from pathlib import Path

from tests.models.compare import relative_error
from tests.models.measure import verdict
from tests.models.table import BEGIN, END, RESULTS, render, replaced
from tests.models.zoo import ALL

README = Path(__file__).parents[2] / "README.md"


def test_readme_shows_the_measured_results() -> None:
    table = render(json.loads(RESULTS.read_text()))
    shown = README.read_text().split(BEGIN, 1)[1].split(END, 1)[0]
    assert shown.strip() == table.strip()


def test_every_model_of_the_zoo_is_measured() -> None:
    assert list(json.loads(RESULTS.read_text())["models"]) == list(ALL)


def test_table_replaces_only_what_stands_between_the_markers() -> None:
    assert replaced(f"a\n{BEGIN}\nold\n{END}\nz", "new") == f"a\n{BEGIN}\nnew\n{END}\nz"


def test_a_model_right_only_at_the_exported_length_is_called_frozen() -> None:
    assert verdict({"1": "shape", "7": 0.0}, "7") == "frozen: fails elsewhere"
    assert verdict({"1": 0.5, "7": 0.0}, "7") == "frozen: wrong numbers elsewhere"
    assert verdict({"1": 0.0, "7": 0.0}, "7") == "right"
    assert verdict({"1": 0.0, "7": 0.0, "64": 0.2}, "7") == "right only at 1, 7"


def test_error_is_relative_to_scale_and_infinite_where_outputs_differ_in_kind() -> None:
    import numpy as np

    one = np.array([10.0, -20.0], dtype=np.float32)
    assert abs(relative_error([one + 0.2], [one]) - 0.01) < 1e-6
    assert relative_error([one[:1]], [one]) == float("inf")
    assert relative_error([np.array([np.nan, 1.0])], [np.array([1.0, 1.0])]) == float("inf")
    assert relative_error([], [one]) == float("inf")
