"""``tetra bench --save``, ``compare`` and ``history`` as scripts see them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import Runner, assert_refused, read_json

from tetra.diary import append, read_diary

SMALL = ("--arch", "nano", "--kernel", "bits", "--repeats", "6", "--threads", "1")


@pytest.fixture(autouse=True)
def diary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "home" / "diary.jsonl"
    monkeypatch.setenv("TETRA_DIARY", str(path))
    return path


def test_both_places_of_save(tetra: Runner, diary: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    assert tetra("bench", "kernels", *SMALL).status == 0
    assert not diary.exists()
    result = tetra("bench", "--save", "kernels", *SMALL)
    assert result.status == 0
    assert str(diary) in result.out
    assert tetra("bench", "kernels", "--save", *SMALL).status == 0
    assert tetra("bench", "kernels", *SMALL, "--save").status == 0
    assert tetra("bench", "kernels", *SMALL, "--save", other).status == 0
    assert tetra("bench", "kernels", f"--save={other}", *SMALL).status == 0
    assert [len(read_diary(path)) for path in (diary, other)] == [3, 2]
    run = read_diary(diary)[0]
    assert run.command == "bench kernels"
    assert all(len(row["samples_ms"]) == 6 for row in run.rows)
    assert run.environment["threads"] == 1


@pytest.mark.parametrize(
    "args",
    [
        ("search", "--rows", "200", "--bytes", "16", "--queries", "2", "--k", "2", "--repeats", "5"),
        ("train", "--arch", "nano", "--stage", "distill", "--batch", "2", "--image-size", "32", "--repeats", "5"),
    ],
)
def test_other_benchmarks_are_saved_and_compared(tetra: Runner, diary: Path, args: tuple[str, ...]) -> None:
    for _ in range(2):
        assert tetra("bench", *args, "--save").status == 0
    result = tetra("bench", "compare", "last~1", "last")
    assert result.status in (0, 1)  # whatever the machine did in between
    assert "B / A" in result.out
    assert "variants of this project" in result.out


def test_compare_judges_and_its_status_tells(tetra: Runner, diary: Path, tmp_path: Path) -> None:
    assert tetra("bench", "kernels", *SMALL, "--save").status == 0
    (run,) = read_diary(diary)
    for factor in (1.0, 2.0):
        rows = [
            {**row, **run.environment, "samples_ms": [factor + i / 1e4 for i in range(9)], "median_ms": factor + 4e-4}
            for row in run.rows
        ]
        append(diary, "bench kernels", rows)
    same = tetra("bench", "compare", "last~1", "last~1")
    assert same.status == 0
    assert "no difference shown" in same.out
    slower = tetra("bench", "compare", "last~1", "last", "--json", tmp_path / "c.json")
    assert slower.status == 1
    assert "slower" in slower.out
    assert "moved too" in slower.out  # PyTorch's variants were planted to be slower as well
    found = read_json(tmp_path / "c.json")["rows"]
    assert {row["verdict"] for row in found} == {"slower"}
    assert all(row["ratio"] == pytest.approx(2.0, abs=0.01) for row in found)
    assert tetra("bench", "compare", "last", "last~1").status == 0


def test_compare_refuses(tetra: Runner, diary: Path, tmp_path: Path) -> None:
    assert_refused(tetra("bench", "compare", "last", "last"), diary, "--save")
    assert tetra("bench", "kernels", *SMALL, "--save", "--json", tmp_path / "one.json").status == 0
    assert tetra("bench", "kernels", *SMALL[:-1], "2", "--save").status == 0
    assert_refused(tetra("bench", "compare", "last~1", "last"), "threads", "1", "2")
    assert tetra("bench", "kernels", *SMALL, "--batch", "2", "--save").status == 0
    assert_refused(tetra("bench", "compare", "last~2", "last"), "shapes", "batch=1", "batch=2")
    rows = read_json(tmp_path / "one.json")
    (tmp_path / "other.json").write_text(json.dumps([{**row, "device_name": "GPU X"} for row in rows]))
    assert_refused(tetra("bench", "compare", tmp_path / "one.json", tmp_path / "other.json"), "devices", "GPU X")
    assert_refused(tetra("bench", "compare", "last", "nothing"), "nothing")


def test_names_are_shown_as_they_are(tetra: Runner, diary: Path) -> None:
    assert tetra("bench", "kernels", *SMALL, "--save").status == 0
    run = read_diary(diary)[0]
    for variant, shown in (("tetra [bold] [/x]",) * 2, ("tetra \x1b[1m \ud800", "tetra \\x1b[1m \\ud800")):
        append(diary, "[/x]", [{**row, **run.environment, "variant": variant} for row in run.rows])
        result = tetra("bench", "compare", "last", "last")
        assert result.status == 0, result.err
        assert shown in result.out


def test_save_refuses_before_the_work(tetra: Runner, tmp_path: Path) -> None:
    foreign = tmp_path / "notes.txt"
    foreign.write_text("my notes\nof today\n")
    assert_refused(tetra("bench", "kernels", *SMALL, "--save", foreign), foreign, "no diary")
    assert foreign.read_text() == "my notes\nof today\n"
    assert_refused(tetra("bench", "kernels", *SMALL, "--save", tmp_path), tmp_path)


def test_history_is_one_page_that_loads_nothing(tetra: Runner, diary: Path, tmp_path: Path) -> None:
    page = tmp_path / "history.html"
    assert_refused(tetra("bench", "history", "-o", page), diary)
    for _ in range(2):
        assert tetra("bench", "kernels", *SMALL, "--save").status == 0
    evil = "</script><script>alert(1)</script>"
    rows = [{**row, **read_diary(diary)[0].environment, "variant": evil} for row in read_diary(diary)[0].rows]
    append(diary, evil, rows)
    result = tetra("bench", "history", "-o", page)
    assert result.status == 0
    assert "3 runs" in result.out
    text = page.read_text()
    assert "alert(1)</script>" not in text
    assert text.count("<script") == text.count("</script") == 1
    assert "default-src 'none'" in text
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", text)


def test_a_line_with_threads_that_are_no_number_is_left_out(tetra: Runner, diary: Path, tmp_path: Path) -> None:
    assert tetra("bench", "kernels", *SMALL, "--save").status == 0
    entry = json.loads(diary.read_text())
    entry["environment"]["threads"] = float("nan")
    with diary.open("a") as file:
        file.write(json.dumps(entry) + "\n")
    result = tetra("bench", "history", "-o", tmp_path / "history.html")
    assert result.status == 0, result.err
    assert "left out: line 2" in result.err
    result = tetra("bench", "compare", "last", "last")
    assert result.status == 0, result.err
    assert "left out: line 2" in result.err


def test_a_real_process_appends(diary: Path) -> None:
    command = [sys.executable, "-m", "tetra.cli", "bench", "--save", "kernels", *SMALL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert len(read_diary(diary)) == 1
