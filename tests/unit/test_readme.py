"""What the README shows as output of a benchmark is that benchmark's recorded output, to the letter."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "tests" / "benchmarks" / "results").glob("*.txt"))


def test_there_are_recorded_results() -> None:
    assert {path.stem for path in RESULTS} >= {"big_mamba", "latency", "node_counts"}


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_readme_shows_the_recorded_output_of_each_benchmark_and_its_command(path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    assert f"```\n{path.read_text().rstrip()}\n```" in readme
    assert f"python -m tests.benchmarks.{path.stem}" in readme
