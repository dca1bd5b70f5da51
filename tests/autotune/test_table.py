"""Which configuration a launch gets: precedence, stale results, switches; and that a look-up harms nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tetra.autotune import store as stores
from tetra.autotune import table
from tetra.autotune.store import Identity, Results, Store, write_results
from tetra.autotune.table import lookup

CONFIGS = ((128, 4), (64, 2), (32, 1), (16, 8), (256, 8))
GPU = torch.device("cuda", 0)
HERE = Identity(
    {"kind": "cuda", "name": "NVIDIA Test 1", "arch": "sm_80", "sms": 4, "driver": "1.2"}, {"triton": "3.6.0"}
)
ELSEWHERE: dict[str, Any] = {"driver": "9.9", "sms": 5, "name": "NVIDIA Test 2"}


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Path]]:
    """The user's folder and that of the shipped results, both empty, for a GPU that need not be here."""
    user, shipped = tmp_path / "user", tmp_path / "shipped"
    user.mkdir()
    shipped.mkdir()
    monkeypatch.setenv(stores.FOLDER_VARIABLE, str(user))
    monkeypatch.delenv(table.VARIABLE, raising=False)
    monkeypatch.setattr(table, "SHIPPED", shipped)
    monkeypatch.setattr(table, "current_hash", lambda module: f"source of {module}")
    monkeypatch.setattr(table, "device_identity", _Identities())
    table.reset()
    yield user, shipped
    monkeypatch.undo()
    table.reset()


class _Identities:
    """In the place of ``device_identity``: there is no such GPU here."""

    def __call__(self, device: torch.device) -> Identity:
        return HERE if device.type == "cuda" else Identity({"kind": "cpu", "name": "Test CPU", "cores": 2}, {})

    def cache_clear(self) -> None:
        pass


def keep(
    path: Path,
    config: tuple[int, ...],
    origin: str = "measured",
    device: Any = None,
    toolchain: Any = None,
    **kernels: str,
) -> None:
    device = HERE.device if device is None else device
    results = {"attention": {"t530": {"config": list(config)}}}
    hashes = kernels or {"attention": "source of attention"}
    write_results(path, Results(origin, device, HERE.toolchain if toolchain is None else toolchain, hashes, results))


def test_a_miss_gives_the_first_row() -> None:
    assert lookup("no_such_kernel", 80, "m1", CONFIGS) == CONFIGS[0]
    assert lookup("ternary_matmul", 12, "m1", CONFIGS) == CONFIGS[0]


def test_precedence(folders: tuple[Path, Path]) -> None:
    user, shipped = folders
    static = {"kind": "cuda", "name": "Test", "arch": "sm_80"}
    steps = [
        (shipped / "sm_80.json", CONFIGS[1], "static", static, "shipped static"),
        (user / "static-sm_80.json", CONFIGS[2], "static", static, "user static"),
        (shipped / "measured_test.json", CONFIGS[3], "measured", HERE.device, "shipped"),
        (user / HERE.file_name, CONFIGS[4], "measured", HERE.device, "user"),
    ]
    assert table.explain("attention", 80, "t530", CONFIGS, GPU).origin == "first row"
    for path, config, origin, device, label in steps:
        keep(path, config, origin, device)
        table.reset()
        choice = table.explain("attention", 80, "t530", CONFIGS, GPU)
        assert (choice.config, choice.origin, choice.path) == (config, label, path)
        assert lookup("attention", 80, "t530", CONFIGS, GPU) == config
        assert lookup("attention", 80, "t529", CONFIGS, GPU) == CONFIGS[0]
        assert lookup("row_quantize", 80, "t530", CONFIGS, GPU) == CONFIGS[0]
    # Without a device only predictions are known; Triton's interpreter uses the first row.
    assert lookup("attention", 80, "t530", CONFIGS) == CONFIGS[2]
    assert lookup("attention", 80, "t530", CONFIGS, torch.device("cpu")) == CONFIGS[0]
    assert lookup("attention", 90, "t530", CONFIGS) == CONFIGS[0]


def test_switches(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    user, shipped = folders
    keep(user / HERE.file_name, CONFIGS[4])
    keep(shipped / "sm_80.json", CONFIGS[1], "static", {"kind": "cuda", "name": "Test", "arch": "sm_80"})
    for value, expected in (("off", 0), ("static", 1), ("auto", 4), (" AUTO ", 4), ("", 4)):
        monkeypatch.setenv(table.VARIABLE, value)
        table.reset()
        assert lookup("attention", 80, "t530", CONFIGS, GPU) == CONFIGS[expected]
    monkeypatch.setenv(table.VARIABLE, "always")
    table.reset()
    with pytest.warns(UserWarning, match="TETRA_TUNING is 'always'; set it to one of auto, static, off"):
        assert lookup("attention", 80, "t530", CONFIGS, GPU) == CONFIGS[4]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_results_of_another_device_or_driver_do_not_count(folders: tuple[Path, Path], name: str) -> None:
    user, shipped = folders
    device = {**HERE.device, name: ELSEWHERE[name]}
    stale = user / Identity(device, HERE.toolchain).file_name
    keep(stale, CONFIGS[4], device=device)
    if name == "name":  # another GPU of the user's: nothing to be said
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert lookup("attention", 80, "t530", CONFIGS, GPU) == CONFIGS[0]
    else:
        with pytest.warns(UserWarning, match=f"ignored: {name} was .*, here it is .*tetra tune measure") as warned:
            found = [lookup("attention", 80, key, CONFIGS, GPU) for key in ("t530", "t530", "t1")]
        assert found == 3 * [CONFIGS[0]]
        assert len(warned) == 1
    # Shipped ones hold for any driver, since a driver does not compile.
    stale.unlink()
    keep(shipped / "measured_test.json", CONFIGS[3], device=device)
    table.reset()
    assert lookup("attention", 80, "t530", CONFIGS, GPU) == CONFIGS[3 if name == "driver" else 0]


@pytest.mark.parametrize(("version", "shipped_counts"), [("3.6.1", True), ("3.7.0", False), (None, False)])
def test_results_of_another_triton_do_not_count(
    folders: tuple[Path, Path], version: str | None, shipped_counts: bool
) -> None:
    user, shipped = folders
    toolchain = {"triton": version}
    keep(user / Identity(HERE.device, toolchain).file_name, CONFIGS[4], toolchain=toolchain)
    with pytest.warns(UserWarning, match=rf"triton was {version}, here it is 3\.6\.0"):
        assert lookup("attention", 80, "t530", CONFIGS, GPU) == CONFIGS[0]
    keep(shipped / "measured_test.json", CONFIGS[3], toolchain=toolchain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table.reset()
        assert lookup("attention", 80, "t530", CONFIGS, GPU) == CONFIGS[3 if shipped_counts else 0]


def test_a_copied_file_of_another_identity_does_not_count(folders: tuple[Path, Path]) -> None:
    user, _ = folders
    keep(user / HERE.file_name, CONFIGS[4], device={**HERE.device, "driver": "0.1"})
    with pytest.warns(UserWarning, match=r"driver was 0\.1, here it is 1\.2"):
        assert lookup("attention", 80, "t530", CONFIGS, GPU) == CONFIGS[0]


@pytest.mark.parametrize("place", ["user", "shipped"])
def test_results_of_another_source_do_not_count(folders: tuple[Path, Path], place: str) -> None:
    user, shipped = folders
    keep(shipped / "sm_80.json", CONFIGS[1], "static", {"kind": "cuda", "name": "Test", "arch": "sm_80"})
    path = user / HERE.file_name if place == "user" else shipped / "measured_test.json"
    keep(path, CONFIGS[4], attention="an older source")
    with pytest.warns(UserWarning, match="results of attention are ignored: its source has changed") as warned:
        found = [lookup("attention", 80, "t530", CONFIGS, GPU) for _ in range(3)]
    assert found == 3 * [CONFIGS[1]]  # the next in line
    assert len(warned) == 1


def test_a_row_that_may_not_run_is_a_miss(folders: tuple[Path, Path]) -> None:
    user, shipped = folders
    keep(shipped / "sm_80.json", CONFIGS[1], "static", {"kind": "cuda", "name": "Test", "arch": "sm_80"})
    keep(user / HERE.file_name, (1, 2, 3))
    assert lookup("attention", 80, "t530", CONFIGS, GPU) == CONFIGS[1]
    # Later calls may allow other rows, in another order.
    assert lookup("attention", 80, "t530", (CONFIGS[3], *CONFIGS), GPU) == CONFIGS[1]
    assert lookup("attention", 80, "t530", (CONFIGS[3],), GPU) == CONFIGS[3]
    assert lookup("attention", 80, "t530", (CONFIGS[0], CONFIGS[0], CONFIGS[1]), GPU) == CONFIGS[1]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": "tetra-tuning", "version": 7}', b"\x00" * 99])
def test_bad_files_never_stop_a_launch(folders: tuple[Path, Path], content: bytes) -> None:
    user, shipped = folders
    for path in (
        user / HERE.file_name,
        user / "static-sm_80.json",
        shipped / "sm_80.json",
        shipped / "measured_x.json",
    ):
        path.write_bytes(content)
    with pytest.warns(UserWarning, match="ignored") as warned:
        found = [lookup("attention", 80, key, CONFIGS, GPU) for key in ("t530", "t531")]
    assert found == 2 * [CONFIGS[0]]
    assert len(warned) == 4


def test_no_failure_stops_a_launch(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: torch.device) -> Identity:
        raise RuntimeError("no driver")

    monkeypatch.setattr(broken, "cache_clear", lambda: None, raising=False)
    monkeypatch.setattr(table, "device_identity", broken)
    with pytest.warns(UserWarning, match="attention are ignored: RuntimeError: no driver"):
        assert lookup("attention", 80, "t530", CONFIGS, GPU) == CONFIGS[0]


def test_an_unwritable_folder_is_no_matter_for_look_ups(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "below", tmp_path / "none"):
        monkeypatch.setenv(stores.FOLDER_VARIABLE, str(folder))
        table.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert lookup("attention", 80, "t530", CONFIGS, GPU) == CONFIGS[0]
        assert not folder.exists()


def test_a_look_up_reads_files_once(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    user, _ = folders
    keep(user / HERE.file_name, CONFIGS[2])
    assert lookup("attention", 80, "t530", CONFIGS, GPU) == CONFIGS[2]
    monkeypatch.setattr(table, "explain", None)  # would fail, and give the first row
    for path in user.iterdir():
        path.unlink()
    for _ in range(3):
        assert lookup("attention", 80, "t530", CONFIGS, GPU) == CONFIGS[2]


def test_shipped_files_can_be_used() -> None:
    """Every file that is shipped is read, and says for what it holds."""
    for path in table.SHIPPED.glob("*.json"):
        results = stores.read_results(path)
        assert results.kernels
        assert results.origin == ("measured" if path.name.startswith("measured_") else "static")
        if results.origin == "static":
            assert path.stem == results.device["arch"]
            assert "unmeasured" in json.loads(path.read_text())["note"]


def test_imports_tune_nothing_and_touch_no_gpu(tmp_path: Path) -> None:
    code = (
        "import tetra.kernels, torch, tetra.autotune.table as t;"
        "tetra.kernels.quantize_rows(torch.randn(3, 8));"
        "print(torch.cuda.is_initialized(), t.lookup('attention', 80, 'x', ((1,),)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {stores.FOLDER_VARIABLE: str(tmp_path / "tuning")},
    )
    assert done.stdout == "False (1,)\n"
    assert not (tmp_path / "tuning").exists()


def test_the_users_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(stores.FOLDER_VARIABLE, "/a")
    assert Store().folder == Path("/a")
    monkeypatch.delenv(stores.FOLDER_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert Store().folder == Path("/b/tetra/tuning")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Store().folder == tmp_path / ".cache/tetra/tuning"


def test_numbers_that_are_no_integers_give_the_row_of_the_table(folders: tuple[Path, Path]) -> None:
    keep(Store().path_of(HERE), (64.0, 2.0))  # type: ignore[arg-type]
    found = lookup("attention", 80, "t530", CONFIGS, GPU)
    assert found == (64, 2)
    assert [type(number) for number in found] == [int, int]


def test_predictions_count_for_the_architecture_that_they_say(folders: tuple[Path, Path]) -> None:
    user, shipped = folders
    keep(shipped / "sm_80.json", (32, 1), "static")
    for change in ({"origin": "static", "device": {**HERE.device, "arch": "sm_90"}}, {"origin": "measured"}):
        keep(user / "static-sm_80.json", (64, 2), **change)
        table.reset()
        with pytest.warns(UserWarning, match=r"not static for sm_80; delete the file") as warned:
            assert lookup("attention", 80, "t530", CONFIGS) == (32, 1)
        assert len(warned) == 1


def test_a_folder_that_cannot_be_looked_into_hides_only_itself(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(folders[1] / "sm_80.json", (32, 1), "static")
    monkeypatch.setenv(stores.FOLDER_VARIABLE, "/tmp/" + "a" * 300)
    table.reset()
    with pytest.warns(UserWarning, match="File name too long"):
        assert lookup("attention", 80, "t530", CONFIGS, GPU) == (32, 1)


def test_a_renamed_file_is_said_to_be_one(folders: tuple[Path, Path]) -> None:
    own = Store().path_of(HERE)
    keep(own.with_name(f"{HERE.family}-copy.json"), (64, 2))
    with pytest.warns(UserWarning, match=rf"the file was renamed, its name here is {own.name}"):
        lookup("attention", 80, "t530", CONFIGS, GPU)
