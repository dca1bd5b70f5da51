"""Ranges: what is recorded, by real listeners, and that nothing is left behind."""

from __future__ import annotations

import copy
import importlib
import os
import shutil
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import photo
from torch import Tensor
from torch.utils.data import Dataset

from tetra import evaluation, images
from tetra.config import BackboneConfig, HeadConfig, ModelConfig
from tetra.errors import ImageError
from tetra.kernels import hamming_search
from tetra.model import TetraModel
from tetra.profiling import ranges

ROOT = Path(__file__).resolve().parent.parent.parent
PIXELS = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)


class Recorder:
    """A listener that keeps a tree for each thread."""

    def __init__(self) -> None:
        self.seen: dict[int, list[tuple[int, str]]] = defaultdict(list)  # depth, name
        self.payloads: dict[str, tuple[Any, int]] = {}
        self.categories: dict[str, str] = {}
        self.depth: dict[int, int] = defaultdict(int)

    def push(self, name: str, category: str, shape: tuple[int, ...] | None, n_bytes: int) -> str:
        thread = threading.get_ident()
        self.seen[thread].append((self.depth[thread], name))
        self.payloads.setdefault(name, (shape, n_bytes))
        self.categories[name] = category
        self.depth[thread] += 1
        return name

    def pop(self, token: str) -> None:
        self.depth[threading.get_ident()] -= 1

    @property
    def here(self) -> list[tuple[int, str]]:
        return self.seen[threading.get_ident()]

    @property
    def names(self) -> list[str]:
        return [name for _, name in self.here]

    def is_balanced(self) -> bool:
        return not any(self.depth.values())


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    found = Recorder()
    remove = ranges.add_sink(found)
    yield found
    ranges.disable()
    remove()
    assert not ranges.is_enabled()


@pytest.fixture
def packed(tiny_model: TetraModel) -> TetraModel:
    return tiny_model.pack()


def objects() -> dict[str, Any]:
    """What stands at every place that has a hook, as Python looks it up, without what is inherited."""
    found = {}
    for hook in ranges.HOOKS:
        module = importlib.import_module(hook.module)
        owner, _, name = hook.attribute.rpartition(".")
        found[f"{hook.module}.{hook.attribute}"] = vars(getattr(module, owner) if owner else module).get(name)
    return found


def test_every_hook_names_something_and_off_leaves_nothing_behind(recorder: Recorder) -> None:
    before, finders = objects(), list(sys.meta_path)
    for place, value in before.items():
        module, _, attribute = place.rpartition(".")
        if value is None:  # an inherited method
            module, _, owner = module.rpartition(".")
            assert attribute == "__call__", place
            assert callable(getattr(importlib.import_module(module), owner)), place
    ranges.enable()
    during = objects()
    assert all(during[place] is not before[place] for place in before)
    assert evaluation.hamming_search is hamming_search  # by whatever module it was imported, this one too
    assert hasattr(hamming_search, "__wrapped__")
    ranges.enable()
    ranges.disable()
    ranges.disable()
    after = objects()
    assert all(after[place] is before[place] for place in before)
    assert sys.meta_path == finders


def test_ranges_of_a_packed_model(recorder: Recorder, packed: TetraModel) -> None:
    expected = packed.describe(PIXELS)
    ranges.enable()
    assert torch.equal(packed.describe(PIXELS), expected)
    block = ["attention.qkv", "attention", "attention.out", "mlp.up", "mlp.down"]
    ternary = [(3, "blocks.0"), *((4, name) for name in block)]
    assert recorder.here == [
        (0, "describe"),
        (1, "backbone"),
        (2, "stem"),
        (2, "blocks"),
        *ternary,
        (3, "blocks.1"),  # in full precision: its products are the library's
        (4, "attention"),
        (1, "head"),
        (1, "pack bits"),
    ]
    assert recorder.is_balanced()
    assert recorder.payloads["describe"] == ((2, 3, 32, 32), 2 * 3 * 32 * 32)
    assert recorder.payloads["blocks.0"] == ((2, 5, 40), 2 * 5 * 40 * 4)
    assert recorder.payloads["head"] == ((2, 5, 40), 2 * 5 * 40 * 4)
    assert recorder.categories["head"] == "model"
    assert {ranges.COLOURS[category] >> 24 for category in recorder.categories.values()} == {0xFF}
    ranges.disable()
    n = len(recorder.here)
    packed.describe(PIXELS)
    assert len(recorder.here) == n


def test_ranges_of_a_model_that_trains(recorder: Recorder, tiny_model: TetraModel) -> None:
    ranges.enable()
    tiny_model.train()
    tiny_model(PIXELS).sum().backward()
    assert {"describe", "backbone", "stem", "blocks.0", "blocks.1", "attention", "head"} <= set(recorder.names)
    assert {"mlp", "mlp.down"} & set(recorder.names)
    assert recorder.is_balanced()


def test_every_head_has_its_range(recorder: Recorder) -> None:
    backbone = BackboneConfig(width=24, depth=1, n_heads=2, head_dim=12, mlp_dim=40, image_size=(32, 32), patch_size=8)
    heads: dict[str, dict[str, Any]] = {
        "gem": {"out_dim": 16},
        "mixvpr": {"out_channels": 8, "mix_depth": 1, "out_rows": 2},
        "boq": {"channels": 16, "n_queries": 4, "n_layers": 1, "n_heads": 2, "out_rows": 4},
        "salad": {"n_clusters": 4, "cluster_dim": 4, "token_dim": 8, "hidden_dim": 16},
    }
    ranges.enable()
    for name, options in heads.items():
        model = TetraModel(ModelConfig("tiny", backbone, HeadConfig(name, options))).eval()
        for call in (model, model.describe):
            recorder.here.clear()
            with torch.no_grad():
                call(PIXELS)
            assert recorder.names.count("head") == 1, name


def test_one_model_alone(recorder: Recorder, packed: TetraModel, tiny_model: TetraModel) -> None:
    other = copy.deepcopy(packed)
    first = ranges.annotate(packed)
    with ranges.annotate(packed):
        other.describe(PIXELS)
        hamming_search(packed.codes(PIXELS)[0], packed.codes(PIXELS)[0], 1)
        assert "search" not in recorder.names
        assert recorder.names.count("blocks.1") == 2
    recorder.here.clear()
    packed.describe(PIXELS)  # the first annotation still holds
    assert "blocks.0" in recorder.names
    assert "attention.qkv" in recorder.names
    first.remove()
    first.remove()
    recorder.here.clear()
    packed.describe(PIXELS)
    assert recorder.here == []
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        ranges.annotate("nano")


def test_everything_and_one_model_end_separately(recorder: Recorder, packed: TetraModel) -> None:
    before = objects()
    annotation = ranges.annotate(packed)
    ranges.enable()
    ranges.disable()
    packed.describe(PIXELS)
    assert "blocks.0" in recorder.names
    assert images.load_image is before["tetra.images.load_image"]
    annotation.remove()
    assert all(now is before[place] for place, now in objects().items())


def test_an_error_closes_its_ranges(recorder: Recorder, packed: TetraModel) -> None:
    ranges.enable()
    with pytest.raises(ImageError, match="multiples"):
        packed.describe(PIXELS[..., :30])
    assert recorder.is_balanced()
    assert recorder.here == [(0, "describe"), (1, "backbone")]
    with pytest.raises(KeyboardInterrupt), ranges.span("mine"):
        raise KeyboardInterrupt
    assert recorder.is_balanced()


def test_threads_have_ranges_of_their_own(recorder: Recorder, packed: TetraModel) -> None:
    ranges.enable()
    barrier = threading.Barrier(4)

    def work(i: int) -> list[tuple[int, str]]:
        barrier.wait()
        for _ in range(3):
            with ranges.span(f"mine {i}", PIXELS):
                packed.describe(PIXELS)
        return recorder.here

    with ThreadPoolExecutor(4) as pool:
        trees = list(pool.map(work, range(4)))
    assert recorder.is_balanced()
    for i, tree in enumerate(trees):
        assert tree == 3 * tree[: len(tree) // 3]
        assert tree[:2] == [(0, f"mine {i}"), (1, "describe")]


def test_switching_while_a_range_is_open(recorder: Recorder, packed: TetraModel) -> None:
    ranges.enable()
    with ranges.span("outer"):
        ranges.disable()
        packed.describe(PIXELS)
    assert recorder.here == [(0, "outer")]
    assert recorder.is_balanced()


def test_search_map_and_images(recorder: Recorder, packed: TetraModel, tmp_path: Path) -> None:
    for i in range(5):
        photo(tmp_path / f"{i}.png", i)
    paths = sorted(tmp_path.glob("*.png"))
    ranges.enable()
    described = evaluation.describe_folder(packed, paths, batch_size=2)
    evaluation.hamming_search(described.codes, described.codes, 2)
    assert recorder.is_balanced()
    read = [name for tree in recorder.seen.values() for _, name in tree if name == "read image"]
    assert len(read) == 5  # by the threads that decode
    assert recorder.payloads["read image"] in {(None, path.stat().st_size) for path in paths}  # the last to be opened
    assert recorder.names.count("next batch") == 4  # three batches, and that there is no more
    assert (0, "search") in recorder.here
    assert (1, "next batch") in recorder.here


def test_a_reader_that_stops_early_ends_the_work(recorder: Recorder, tmp_path: Path) -> None:
    for i in range(6):
        photo(tmp_path / f"{i}.png", i)
    ranges.enable()
    batches = images.iterate_batches(sorted(tmp_path.glob("*.png")), (32, 32), 1)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert not any(thread.name.startswith("images") for thread in threading.enumerate())
    assert recorder.is_balanced()
    with pytest.raises(ImageError):
        list(images.iterate_batches([tmp_path / "nowhere.png"], (32, 32)))
    assert recorder.is_balanced()


def test_spans_of_one_s_own(recorder: Recorder) -> None:
    with ranges.span("quiet", PIXELS):
        pass
    assert recorder.here == []
    with pytest.raises(ValueError, match="category"):
        ranges.span("x", category="weather").__enter__()
    ranges.enable()
    with ranges.span("loud", PIXELS, PIXELS.float(), category="data"):
        pass
    assert recorder.here == [(0, "loud")]
    assert recorder.payloads["loud"] == (tuple(PIXELS.shape), 5 * PIXELS.nbytes)


def test_compiled_models_stay_whole(recorder: Recorder, packed: TetraModel) -> None:
    expected = packed(PIXELS)
    ranges.enable()
    compiled = torch.compile(packed, backend="eager", fullgraph=True)
    assert torch.equal(compiled(PIXELS), expected)
    assert recorder.here == []
    block = packed.backbone.blocks[0]
    block.compile(backend="eager")  # by itself, it shows from outside
    packed(PIXELS)
    assert recorder.names.count("blocks.0") == 1
    assert "attention.qkv" not in recorder.names


def test_a_capture_collects_some_ranges(recorder: Recorder, packed: TetraModel) -> None:
    said: list[tuple[str, int]] = []
    capture = ranges.Capture(
        "describe", 2, 3, lambda: said.append(("start", len(recorder.here))), lambda: said.append(("stop", n_seen()))
    )

    def n_seen() -> int:
        return recorder.names.count("describe")

    ranges.set_capture(capture)
    ranges.enable()
    for i in range(8):
        packed.describe(PIXELS)
        assert ranges.is_capturing() == (i in (2, 3))
    (_, at), (_, n) = said
    assert [name for name, _ in said] == ["start", "stop"]
    assert recorder.names[:at].count("describe") == 2  # the range that starts it is inside
    assert n == 5


@pytest.mark.parametrize(
    ("text", "found"),
    [("describe", ("describe", 0, 1)), ("map search:3", ("map search", 3, 1)), ("step:10:5", ("step", 10, 5))],
)
def test_captures_as_text(text: str, found: tuple[str, int, int]) -> None:
    assert ranges.parse_capture(text) == found


@pytest.mark.parametrize("text", ["", ":1:2", "a:b", "a:1:0", "a:-1", "a:1:2:3"])
def test_captures_that_cannot_be(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="RANGE:SKIP:COUNT"):
        ranges.parse_capture(text)
    if text:
        monkeypatch.setenv(ranges.CAPTURE_VARIABLE, text)
        with pytest.raises(ValueError, match=ranges.CAPTURE_VARIABLE):
            ranges.enable()
        assert not ranges.is_enabled()


class Numbers(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"images": torch.full((3, 32, 32), index, dtype=torch.uint8)}


def test_ranges_of_a_training(recorder: Recorder, tiny_model: TetraModel, tmp_path: Path) -> None:
    from tetra.training.loop import LoopConfig, StageModule, run_stage

    class Stage(StageModule):
        def __init__(self) -> None:
            super().__init__(LoopConfig(accumulate=2, checkpoint_every=2), 3, lambda: {"figure": 1.0})
            self.model = tiny_model

        def lr_factor(self, step: int) -> float:
            return 1.0

        def loss(self, batch: dict[str, Tensor], progress: float) -> dict[str, Tensor]:
            return {"loss": self.model(batch["images"]).square().sum()}

    ranges.enable()
    run_stage(Stage(), Numbers(), 2, tmp_path, resume=False, progress=False)
    assert recorder.is_balanced()
    count = {name: recorder.names.count(name) for name in set(recorder.names)}
    assert (count["step"], count["forward"], count["backward"]) == (6, 6, 6)  # two batches an optimiser step
    assert count["optimizer"] == 3
    assert count["wait for data"] >= 6
    assert count["checkpoint"] >= 2
    assert count["validation"] >= 1
    step = recorder.here.index((0, "step")) if (0, "step") in recorder.here else recorder.here.index((1, "step"))
    depth = recorder.here[step][0]
    inside = []
    for at, name in recorder.here[step + 1 :]:
        if at <= depth:
            break
        inside.append(name)
    assert {"forward", "describe", "blocks.0", "backward"} <= set(inside)


def test_a_trainer_that_has_a_profiler_keeps_it(recorder: Recorder) -> None:
    import lightning as L
    from lightning.pytorch.profilers import SimpleProfiler

    ranges.enable()
    own = SimpleProfiler()
    quiet = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu", "enable_progress_bar": False}
    assert L.Trainer(profiler=own, **quiet).profiler is own  # type: ignore[attr-defined, arg-type]
    assert type(L.Trainer(**quiet).profiler).__name__ == "RangeProfiler"  # type: ignore[attr-defined, arg-type]
    ranges.disable()
    assert type(L.Trainer(**quiet).profiler).__name__ == "PassThroughProfiler"  # type: ignore[attr-defined, arg-type]


# --- other processes


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_what_is_imported_later_has_ranges_too() -> None:
    code = """
import sys
from tetra.profiling import ranges
assert "torch" not in sys.modules and "tetra.vit" not in sys.modules
ranges.enable()
assert "tetra.vit" not in sys.modules and "lightning" not in sys.modules
from tetra.images import load_image
import tetra.images, tetra.vit, tetra.training.data
assert tetra.training.data.load_image is load_image is tetra.images.load_image
assert hasattr(load_image, "__wrapped__") and hasattr(tetra.vit.Block.__call__, "__wrapped__")
original = load_image.__wrapped__
ranges.disable()
assert tetra.training.data.load_image is load_image is tetra.images.load_image is original, "__main__ has it, too"
assert "__call__" not in vars(tetra.vit.Block)
import tetra.evaluation
assert not hasattr(tetra.evaluation.describe_batches, "__wrapped__")
"""
    python(code)


def test_without_the_package_a_notice_says_what_is_missing() -> None:
    code = """
import sys, warnings
sys.modules["nvtx"] = None
from tetra.profiling import ranges
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    ranges.enable()
    ranges.disable()
    ranges.enable()
print(*(str(w.message) for w in caught), sep="\\n")
import tetra, torch
tetra.load("nano").describe(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
"""
    out = python(code).stdout.splitlines()
    assert len(out) == 2
    assert 'pip install "tetra-vpr[profile]"' in out[0]


@pytest.fixture(scope="module")
def nvtx_tool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tool that NVTX loads, as it loads Nsight's; it writes a line for each event. With OLD_NVTX=1 it has another
    version of NVTX's extensions, as the Nsight Systems of some distributions has."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("no C compiler to build an NVTX tool")
    pytest.importorskip("nvtx")
    library = tmp_path_factory.mktemp("nvtx") / "log.so"
    source = Path(__file__).parent / "data" / "nvtx_log.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-pthread", "-o", library, source], check=True)
    return library


def nvtx_events(log: Path) -> dict[str, list[list[str]]]:
    """Pushes and pops by thread; checked to be balanced, in our domain."""
    by_thread: dict[str, list[list[str]]] = defaultdict(list)
    for line in log.read_text().splitlines():
        kind, *fields = line.split("\t")
        if kind != "category":
            by_thread[fields[0]].append([kind, *fields[1:]])
    for events in by_thread.values():
        depth = 0
        for kind, domain, *_ in events:
            assert domain == ranges.DOMAIN
            depth += 1 if kind == "push" else -1
            assert depth >= 0
        assert depth == 0
    return by_thread


def test_nvtx_gets_domain_colours_categories_and_payloads(nvtx_tool: Path, tmp_path: Path) -> None:
    """A ``tetra`` command under a real tool, and worker processes that are forked."""
    for i in range(3):
        photo(tmp_path / f"images/{i}.png", i)
    log = tmp_path / "log"
    code = f"""
import sys
from tetra import cli
sys.argv = ["tetra", "match", "nano", {str(tmp_path / "images")!r}, {str(tmp_path / "images")!r}]
try:
    cli.main()
except SystemExit as end:
    assert not end.code
from pathlib import Path
from torch.utils.data import DataLoader
from tetra.training.data import ViewDataset
dataset = ViewDataset(sorted(Path({str(tmp_path / "images")!r}).glob("*.png")), (32, 32))
assert len(list(DataLoader(dataset, num_workers=1, multiprocessing_context="fork"))) == 3
"""
    tool = {"NVTX_INJECTION64_PATH": str(nvtx_tool), "NVTX_LOG": str(log)}
    python(code, TETRA_NVTX="1", **tool)
    by_thread = nvtx_events(log)
    pushes = [fields for events in by_thread.values() for kind, _, *fields in events if kind == "push"]
    categories = {line.split("\t")[2]: line.split("\t")[3] for line in log.read_text().splitlines() if "categ" in line}
    named: dict[str, list[str]] = defaultdict(list)
    for name, category, colour, *rest in pushes:
        assert int(colour, 16) == ranges.COLOURS[categories[category]], name
        named[name].append(rest[0] if rest else "")
    assert {"load model", "describe", "stem", "blocks.0", "blocks.5", "mlp.up", "head", "search"} <= set(named)
    assert f"{3 * 3 * 224 * 224} 3 3 224 224" in named["describe"]
    sizes = {str(path.stat().st_size) for path in (tmp_path / "images").iterdir()}
    assert set(named["read image"]) == sizes
    # Two folders of three by threads that decode, three by the worker process.
    assert len(named["read image"]) == 9
    assert len(named["load item"]) == 3
    assert len(by_thread) >= 3


def test_a_tool_of_another_version_of_nvtx_gets_ranges_too(nvtx_tool: Path, tmp_path: Path) -> None:
    code = """
import torch, tetra
from tetra.profiling import ranges
ranges.enable()
tetra.load("nano").describe(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
"""
    pushes = {}
    for old in ("", "1"):
        log = tmp_path / f"log{old}"
        python(code, NVTX_INJECTION64_PATH=str(nvtx_tool), NVTX_LOG=str(log), OLD_NVTX=old)
        (events,) = nvtx_events(log).values()
        pushes[old] = [
            (name, colour, *rest)
            for kind, _, *fields in events
            if kind == "push"
            for name, _, colour, *rest in [fields]
        ]
    assert len(pushes[""]) > 10
    # The same ranges; of the payload only the bytes, since fields with names are what the versions differ in.
    assert pushes["1"] == [(name, colour, *(part.split(" ")[0] for part in rest)) for name, colour, *rest in pushes[""]]
    assert any(" " in rest[0] for _, _, *rest in pushes[""] if rest)


def test_a_package_that_can_not_be_used_is_named(nvtx_tool: Path, tmp_path: Path) -> None:
    code = """
import warnings, nvtx._lib.lib as lib
del lib.DomainHandle
from tetra.profiling import ranges
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    ranges.enable()
print([str(warning.message) for warning in caught])
"""
    tool = {"NVTX_INJECTION64_PATH": str(nvtx_tool), "NVTX_LOG": str(tmp_path / "log"), "OLD_NVTX": "1"}
    assert 'pip install "nvtx<0.2.12"' in python(code, **tool).stdout
