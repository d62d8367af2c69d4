"""Tables against numbers worked out by hand."""

from __future__ import annotations

import csv
import io

import pytest

from hgprompt.paper.tables import Entry, accuracy_table
from hgprompt.paper.tasks import TaskFolder


def task(name, group):
    return TaskFolder(name, name.upper(), group, 2, {}, "")


TASKS = [task("a", "natural"), task("b", "natural"), task("c", "structured")]
ACCURACIES = {
    "one": {"a": [0.5, 0.7], "b": [0.9, 0.9], "c": [0.1, 0.3]},
    "two": {"a": [0.6, 0.6], "b": [0.8, 1.0], "c": [0.4, 0.4]},
    "three": {"a": [0.1, 0.1], "b": [0.2, 0.2], "c": [0.0, 0.0]},
}


def test_mean_and_deviation():
    # 50, 60, 70: the squares about 60 sum to 200; over n - 1 = 2 the root is 10 (over n it were 8.2).
    assert Entry.of([0.5, 0.6, 0.7]) == Entry(pytest.approx(60), pytest.approx(10))
    assert str(Entry.of([0.5, 0.6, 0.7])) == "60.0 ± 10.0"
    assert str(Entry.of([0.1234])) == "12.3"


def test_a_table_by_hand():
    table = accuracy_table("Method", ACCURACIES, TASKS, parameters={"one": 38400, "two": 5})
    # Deviations: two values d apart have d/√2. Averages are of each seed first: of "one" at seed 1 (50+90+10)/3 = 50
    # and at seed 2 (70+90+30)/3 = 63.33, mean 56.67, deviation 13.33/√2 = 9.43; natural: 70 and 80.
    assert table.markdown().splitlines() == [
        "| Method | Parameters | A | B | C | Natural | Structured | Average |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        "| one | 38,400 | **60.0 ± 14.1** | **90.0 ± 0.0** | <u>20.0 ± 14.1</u> | **75.0 ± 7.1** "
        "| <u>20.0 ± 14.1</u> | <u>56.7 ± 9.4</u> |",
        "| two | 5 | **60.0 ± 0.0** | **90.0 ± 14.1** | **40.0 ± 0.0** | **75.0 ± 7.1** "
        "| **40.0 ± 0.0** | **63.3 ± 4.7** |",
        "| three |  | <u>10.0 ± 0.0</u> | <u>20.0 ± 0.0</u> | 0.0 ± 0.0 | <u>15.0 ± 0.0</u> | 0.0 ± 0.0 | 10.0 ± 0.0 |",
    ]


def test_the_csv_has_all_digits():
    rows = list(csv.DictReader(io.StringIO(accuracy_table("Method", ACCURACIES, TASKS).csv())))
    assert float(rows[0]["Average mean"]) == pytest.approx(100 * (0.5 + 0.6333333333333333) / 2)
    assert float(rows[0]["A std"]) == pytest.approx(20 / 2**0.5)
    assert "parameters" not in rows[0]


def test_one_group_has_no_mean_of_its_own_and_one_row_no_marks():
    table = accuracy_table("Method", {"one": {"a": [0.5], "b": [0.25]}}, TASKS[:2])
    assert table.columns == ("A", "B", "Average")
    assert table.markdown().splitlines()[2] == "| one | 50.0 | 25.0 | 37.5 |"


def test_average_follows_what_is_printed():
    # 0.50001 and 0.5 print alike, and are marked alike.
    table = accuracy_table("Method", {"x": {"a": [0.50001]}, "y": {"a": [0.5]}, "z": {"a": [0.4]}}, TASKS[:1])
    assert [line.split("|")[2].strip() for line in table.markdown().splitlines()[2:]] == [
        "**50.0**", "**50.0**", "<u>40.0</u>",
    ]  # fmt: skip
