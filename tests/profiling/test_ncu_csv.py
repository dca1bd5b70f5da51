"""Tables of Nsight Compute. The files in data/ are of an H200, with fewer columns than it printed."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nsys_files import assert_table_or_one_line

from tetra.profiling.events import Profile, ReadError, readable, table
from tetra.profiling.ncu_csv import ranges_of
from tetra.profiling.readers import read

DATA = Path(__file__).parent / "data"
COMPLETE, CUT_OFF = DATA / "ncu_basic.csv", DATA / "ncu_cut_off.csv"


def test_a_complete_run() -> None:
    profile = read(COMPLETE)
    assert (profile.tool, profile.device, len(profile.activities), profile.notices) == ("ncu", "NVIDIA H200", 12, [])
    assert {activity.path for activity in profile.activities} == {("tetra.describe",)}
    first = profile.activities[0]
    assert first.duration_ns == 3520
    assert first.metrics["launch__registers_per_thread"] == 18
    assert first.metrics["sm__warps_active.avg.pct_of_peak_sustained_active"] == 25.52
    (row,) = table(profile, "range")
    assert (row.name, row.time_ns, row.calls) == ("tetra.describe", profile.total_ns, None)


def test_a_run_that_was_cut_off_gives_what_there_was_and_says_so() -> None:
    profile = read(CUT_OFF)
    assert len(profile.activities) == 33
    assert 'Failed to profile "_layer_norm_kernel"' in profile.notices[0]
    read_bytes, written = 616_448, 1_024  # of the first launch, in the file with separators
    assert profile.activities[0].n_bytes == read_bytes + written
    kernels = {readable(row.name): row for row in table(profile)}
    norm = kernels["_layer_norm_kernel"]
    assert (norm.time_ns, norm.count) == (9824, 3)
    assert "sass__inst_executed_register_spilling_mem_local" not in norm.metrics  # "no data" is not 0


def test_ranges_within_ranges() -> None:
    """As ncu printed them for `tetra profile ncu` of nano on an H200."""
    profile = read(DATA / "ncu_ranges.csv")
    assert [activity.path for activity in profile.activities] == [
        ("describe", "backbone", "stem"),
        ("describe", "backbone", "blocks", "blocks.0", "attention.qkv"),
        ("describe", "backbone", "blocks", "blocks.0", "attention.qkv"),
        ("describe", "backbone", "blocks", "blocks.0", "attention"),
        ("describe", "backbone", "blocks", "blocks.0", "mlp.up"),
        ("describe", "backbone", "blocks", "blocks.1", "attention.qkv"),
    ]
    ranges = {row.name: row for row in table(profile, "range")}
    assert ranges["blocks.0"].count == 4
    assert ranges["describe"].time_ns == profile.total_ns == sum(a.duration_ns for a in profile.activities)


HEADER = (
    '"ID","Host Name","thread Domain:Push/Pop_Range:PL_Type:PL_Value:CLR_Type:Color:Msg_Type:Msg","Kernel Name",'
    '"dram__bytes_read.sum","gpu__time_duration.sum"'
)


def test_units_and_separators(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(
        '==PROF== Connected to process 1\nprogram: "ID" of a picture\n'
        f'{HEADER}\n"","","","","Mbyte","usecond"\n'
        '"0","h","1  ""tetra:describe:int64:12:argb:4280250251:str:none"" '
        '""tetra:blocks.0:none:none:none:none:none:none"" '
        '","a<int, (bool)1>(int)","1.5","1,234.5"\n'
        '==PROF== Profiling "b": 0%....50%....100% - 9 passes\n'
        "the program speaks\n"
        '"1","h","","b","no data","2"\n"2","h","","b","1","n/a"\n"3","h","","b"\n'
    )
    profile = read(path)
    a, b = profile.activities  # a launch without a time is none that took no time
    assert (a.duration_ns, a.n_bytes, a.path) == (1_234_500, 1_500_000, ("describe", "blocks.0"))
    assert (b.duration_ns, b.n_bytes, b.path) == (2000, None, ())
    assert profile.notices == [
        "1 launches have no gpu__time_duration.sum that can be read, and were left out",
        "1 rows of the table were cut short and left out",
    ]


def one_launch(path: Path, time: str, unit: str, n_bytes: str = "1", bytes_unit: str = "byte") -> Profile:
    """A table of a launch of 7 ns and of one with these."""
    path.write_text(
        f'{HEADER}\n"","","","","","ns"\n"0","h","","good","","7"\n'
        f'"","","","","{bytes_unit}","{unit}"\n"1","h","","k","{n_bytes}","{time}"\n'
    )
    return read(path)


@pytest.mark.parametrize(
    ("unit", "nanoseconds"),
    [
        *[(name, 1.0) for name in ("ns", "nsecond", "nanosecond", "nanoseconds", "Ns", " ns ")],
        *[(name, 1e3) for name in ("us", "usecond", "microsecond", "µs", "\N{GREEK SMALL LETTER MU}s")],
        *[(name, 1e6) for name in ("ms", "msecond", "millisecond")],
        *[(name, 1e9) for name in ("s", "second", "seconds")],
        *[(name, 60e9) for name in ("min", "minute")],
        *[(name, 3600e9) for name in ("hour", "hours")],
    ],
)
def test_units_of_time(tmp_path: Path, unit: str, nanoseconds: float) -> None:
    profile = one_launch(tmp_path / "a.csv", "2.5", unit)
    assert profile.activities[1].duration_ns == round(2.5 * nanoseconds)
    assert profile.notices == []


@pytest.mark.parametrize(
    ("unit", "size"),
    [
        *[(name, 1) for name in ("byte", "bytes", "Byte", "B")],
        *[(name, 1000) for name in ("Kbyte", "kbyte", "KByte", "KB", "kB")],
        *[(name, 1024) for name in ("Kibyte", "KiB", "KiByte")],
        *[("Mbyte", 1000**2), ("Mibyte", 1024**2), ("Gbyte", 1000**3), ("GiB", 1024**3), ("Tbyte", 1000**4)],
    ],
)
def test_units_of_bytes(tmp_path: Path, unit: str, size: int) -> None:
    profile = one_launch(tmp_path / "a.csv", "1", "ns", "3", unit)
    assert profile.activities[1].n_bytes == 3 * size
    assert profile.notices == []


@pytest.mark.parametrize("unit", ["", "fortnight", "cycle", "m", "u"])
def test_launches_in_unknown_units_of_time_are_left_out(tmp_path: Path, unit: str) -> None:
    profile = one_launch(tmp_path / "a.csv", "3", unit)
    assert [activity.name for activity in profile.activities] == ["good"]
    (notice,) = profile.notices
    assert notice.startswith("1 launches were left out")
    assert f"'{unit}'" in notice


@pytest.mark.parametrize("unit", ["", "Kb", "KBit", "sector", "ibyte"])
def test_bytes_in_unknown_units_are_left_out(tmp_path: Path, unit: str) -> None:
    profile = one_launch(tmp_path / "a.csv", "3", "ns", "5", unit)
    assert [(a.duration_ns, a.n_bytes) for a in profile.activities] == [(7, None), (3, None)]
    (notice,) = profile.notices
    assert "dram__bytes_read.sum" in notice
    assert f"'{unit}'" in notice


@pytest.mark.parametrize(
    ("text", "value"),
    [("1,234.56", 1235), ("12,345,678", 12_345_678), ("0.999", 1), ("1234.000", 1234), ("1.5e3", 1500)],
)
def test_numbers_as_in_english(tmp_path: Path, text: str, value: int) -> None:
    profile = one_launch(tmp_path / "a.csv", text, "ns")
    assert profile.activities[1].duration_ns == value
    assert profile.notices == []


@pytest.mark.parametrize("text", ["1.234", "12.345.678", "3,42", "1.234,56", "1,23,456", "1 234", "1'234", "1,2345"])
def test_numbers_of_other_languages_are_left_out(tmp_path: Path, text: str) -> None:
    """1.234 is a thousand in German and one in English, and ncu writes neither three decimals nor the language."""
    profile = one_launch(tmp_path / "a.csv", text, "ns")
    assert [activity.name for activity in profile.activities] == ["good"]
    assert len(profile.notices) == 2
    assert profile.notices[0].startswith("1 numbers are not written as in English")
    assert "LC_ALL=C" in profile.notices[0]
    assert profile.notices[1].startswith("1 launches have no gpu__time_duration.sum")


def test_a_table_without_any_time_that_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f'{HEADER}\n"","","","","byte","ns"\n"0","h","","k","1","1.234"\n')
    with pytest.raises(ReadError, match="no kernels that can be read") as error:
        read(path)
    assert "LC_ALL=C" in str(error.value)


def test_names_with_colons() -> None:
    assert ranges_of('7  "<default domain>:at::copy:none:none:none:none:none:none" ') == ("at::copy",)
    assert ranges_of("") == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("==PROF== Connected\n==ERROR== ERR_NVGPUCTRPERM - no permission\n", "ERR_NVGPUCTRPERM"),
        ("==PROF== Connected\n==WARNING== No kernels were profiled.\n", "printed no table"),
        (
            '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n"0","k","Duration","us","3"\n',
            "another page",
        ),
        ('"ID","Name"\n"0","k"\n', "no column 'Kernel Name'"),
        (f'{HEADER}\n"","","","","byte","ns"\n', "no kernels"),
        (f'{HEADER},"gpu__time_duration.sum"\n', "one name twice"),
    ],
)
def test_tables_that_say_nothing(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(ReadError, match=words) as error:
        read(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("value", ["1e300", "-1e300", "9" * 400, "nan", "-5"])
def test_numbers_that_nothing_measured(tmp_path: Path, value: str) -> None:
    path = tmp_path / "a.csv"
    names = ("gpu__time_duration.sum", "dram__bytes_read.sum", "launch__registers_per_thread")
    header = ",".join(f'"{name}"' for name in ("ID", "Kernel Name", *names))
    kernel = f'"0","k","{value}","{value}","{value}"\n'
    path.write_text(f'{header}\n"","","s","Tbyte",""\n{kernel}{kernel}')
    assert_table_or_one_line(path)
    path.write_text(path.read_text() + '"1","good","2","1","32"\n')
    assert [(a.name, a.duration_ns) for a in read(path).activities] == [("good", 2_000_000_000)]


def test_a_table_without_times_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('"ID","Kernel Name","launch__registers_per_thread"\n"","","x"\n"0","k","32"\n')
    profile = read(path)
    assert profile.total_ns == 0
    assert "gpu__time_duration.sum" in profile.notices[0]
    assert table(profile)[0].share == 0.0


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_tables_never_end_in_a_traceback(tmp_path: Path, data: st.DataObject) -> None:
    text = COMPLETE.read_bytes()
    start = data.draw(st.integers(0, len(text)))
    middle = data.draw(st.binary(max_size=40))
    path = tmp_path / "a.csv"
    path.write_bytes(text[:start] + middle + text[data.draw(st.integers(start, len(text))) :])
    assert_table_or_one_line(path)
