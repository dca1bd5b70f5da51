"""What changed between two profiles."""

from __future__ import annotations

from pathlib import Path

from nsys_files import two_blocks

from tetra.profiling.events import Activity, Profile, Span, readable
from tetra.profiling.movers import caveats, movers
from tetra.profiling.readers import read


def test_the_largest_change_comes_first(tmp_path: Path) -> None:
    before = read(two_blocks(tmp_path / "a.sqlite"))
    after = read(two_blocks(tmp_path / "b.sqlite", scale=2, extra=["new_kernel"]))
    found = movers(before, after)
    assert [(m.name, m.before_ns, m.after_ns, m.change_ns, m.ratio) for m in found] == [
        ("_ternary_matmul_kernel", 800, 1600, 800, 2.0),
        ("new_kernel", 0, 300, 300, None),
        ("_row_quantize_kernel", 200, 400, 200, 2.0),
        ("copy HtoD", 50, 50, 0, 1.0),
    ]
    assert (found[0].count_before, found[0].count_after, found[0].each_after_ns) == (2, 2, 800.0)
    assert sum(m.change_ns for m in found) == after.total_ns - before.total_ns
    assert caveats(before, after) == []
    assert [m.change_ns for m in movers(after, before)] == [-800, -300, -200, 0]
    by_range = {m.name: m for m in movers(before, after, "range")}
    assert (by_range["blocks.0"].change_ns, by_range["describe"].change_ns) == (500, 1000)
    assert by_range["blocks.0"].to_dict()["ratio"] == 2.0


def test_what_took_no_time_is_there_all_the_same() -> None:
    """A range without work of a GPU; by the counts, since its time is 0 wherever it is."""

    def profile(*names: str) -> Profile:
        spans = [Span(name, 0, 100, (1, 1)) for name in names]
        return Profile(Path("a"), "nsys", None, [Activity("k", "kernel", 0, 10)], spans)

    found = {m.name: m for m in movers(profile("load", "old"), profile("load", "new"), "range")}
    assert {name: mover.found_in for name, mover in found.items()} == {
        "(no range)": "both",
        "load": "both",
        "old": "before",
        "new": "after",
    }
    assert (found["load"].ratio, found["load"].to_dict()["found_in"]) == (None, "both")


def test_a_run_compared_with_itself_moves_nothing(tmp_path: Path) -> None:
    profile = read(two_blocks(tmp_path / "a.sqlite"))
    assert all(m.change_ns == 0 and m.ratio == 1.0 for m in movers(profile, profile))


def test_what_makes_two_runs_hard_to_compare() -> None:
    def profile(name: str, tool: str, device: str | None, kind: str, n: int) -> Profile:
        activities = [Activity("k", kind, 0, 10)] * n  # type: ignore[arg-type]
        return Profile(Path(name), tool, device, activities, [])  # type: ignore[arg-type]

    notes = caveats(profile("a", "nsys", "H200", "kernel", 3), profile("b", "torch", None, "operator", 4))
    assert len(notes) == 4
    for note, word in zip(notes, ("of torch", "an unnamed device", "CPU", "different number of times"), strict=True):
        assert word in note


def test_readable_names() -> None:
    assert readable("_layer_norm_kernel") == "_layer_norm_kernel"
    assert readable("void at::native::kernel<128, f<float, (int)4>>(int, g<h> const&)") == "at::native::kernel"
    assert readable("void (anonymous namespace)::softmax<float>(float*)") == "softmax"
    assert readable("Memcpy DtoD (Device -> Device)") == "Memcpy DtoD"
    assert readable("(no range)") == "(no range)"
    assert len(readable("x" * 500)) == 72
