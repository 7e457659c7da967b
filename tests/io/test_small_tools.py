"""The small tools of `io`: files written aside and renamed, tables, and waiting for a condition."""

from pathlib import Path

import pytest

from ddp_kit.io import polling
from ddp_kit.io.atomic import write_text
from ddp_kit.io.polling import wait_until
from ddp_kit.io.tables import aligned


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_replaced_whole_and_nothing_stays_beside_it(
    durable: bool, tmp_path: Path
) -> None:
    path = tmp_path / "names"
    path.write_text("old")
    write_text(path, "né\n", durable=durable)
    assert path.read_bytes() == "né\n".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_the_old_content_stays_where_the_new_one_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "names"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "no text: \udcff")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    rows = [("step", "age", ""), ("12", "3 h", "best"), ("7", "10 min", "")]
    assert aligned(rows) == ["step  age", "12    3 h     best", "7     10 min"]
    assert aligned(rows, right=[0, 1]) == ["step     age", "  12     3 h  best", "   7  10 min"]
    assert aligned([]) == []


def test_the_last_column_is_cut_where_lines_end_but_for_its_beginning() -> None:
    rows = [("step", "why"), ("12", "no process has it any more"), ("7", "")]
    assert aligned(rows, width=16, shortest=4) == ["step  why", "12    no process", "7"]
    assert aligned(rows, width=8, shortest=4) == ["step  why", "12    no p", "7"]
    assert aligned(rows, width=80, shortest=4) == aligned(rows)
    assert aligned([], width=8, shortest=4) == []


def test_a_condition_is_asked_until_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(polling.time, "monotonic", lambda: now)
    monkeypatch.setattr(polling.time, "sleep", sleep)
    asked: list[float] = []

    def at_two() -> bool:
        asked.append(now)
        return now >= 2

    assert wait_until(at_two, within_s=5, pause_s=1)
    assert asked == [0, 1, 2]
    now = 0.0
    asked.clear()
    assert not wait_until(at_two, within_s=1, pause_s=1)
    assert asked == [0, 1]
    now = 0.0
    asked.clear()
    assert not wait_until(at_two, within_s=0, pause_s=1)
    assert asked == [0]
