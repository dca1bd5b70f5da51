"""Roofline chart: what the kernels reach, beside what a chip can do at most.

A launch is a point: its intensity (operations a byte, by the kernel's own cost function) and its performance
(operations a second). Roofs are the chip's peaks by data type (flat) and its bandwidths (slanted). No point can lie
above all of them; one below the roof of its data type, at its intensity, leaves that share unused. Points are

- *predicted*: by the static model of ``tetra.profiling.roofline`` from the compiled code, in the configuration that
  would run, for a GPU that need not be here;
- *measured*: from files that ``tetra bench kernels --json``, ``tetra bench search --json`` or ``tetra tune measure``
  wrote, or from any list of ``kernel``, ``median_ms``, ``operations``, ``n_bytes`` and ``dtype``.

Source: Williams, Waterman, Patterson, Roofline: An Insightful Visual Performance Model (2009).
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch

from tetra.autotune.hardware import Product
from tetra.autotune.workloads import Problem
from tetra.autotune.workloads import problems as all_problems
from tetra.kernels.ahead_of_time import compile_for
from tetra.kernels.attention import cost as attention_cost
from tetra.kernels.attention_distillation import cost as attention_distillation_cost
from tetra.kernels.attention_training import cost as attention_training_cost
from tetra.kernels.bits import cost as bits_cost
from tetra.kernels.blended_linear import cost as blended_cost
from tetra.kernels.hamming_popcount import cost as hamming_popcount_cost
from tetra.kernels.layer_norm import cost as layer_norm_cost
from tetra.kernels.patches import cost as patches_cost
from tetra.kernels.residual_dropout import cost as residual_dropout_cost
from tetra.kernels.row_quantize import cost as row_quantize_cost
from tetra.kernels.ternary_matmul import cost as ternary_cost
from tetra.kernels.token_loss import cost as token_loss_cost
from tetra.kernels.tunable import Work, all_tunables
from tetra.profiling.model_cost import Shape, chosen_works, model_steps
from tetra.profiling.page import page
from tetra.profiling.roofline import FORMULA, Launch, predict_launch
from tetra.profiling.sass import Report, report

LABEL_PREDICTED, LABEL_MEASURED = "predicted", "measured"
TRAINING_BATCH = 32

Progress = Callable[[int, int, str], None]


class RooflineError(ValueError):
    """Figures that are no measurements, or of another device than the chart's."""


@dataclass(frozen=True)
class Roof:
    """A limit of the chip.

    Attributes:
        name: such as "int8 tensor" or "HBM".
        kind: "compute" (``rate`` in operations a second) or "memory" (in bytes a second).
        source: where the figure is from; measured ones say on what.
        is_assumed: nobody states the figure.
    """

    name: str
    kind: str
    rate: float
    source: str
    is_assumed: bool = False


@dataclass(frozen=True)
class Point:
    """One launch.

    Attributes:
        kernel: the file that holds it, or "library".
        name: what it does.
        shape: on one line.
        operations, n_bytes: by the kernel's cost function.
        dtype: of the operands, which says under which peak it lies: int8, fp16 (also bf16), tf32, fp32 or int32.
        seconds: of the launch.
        label: "predicted" or "measured".
        limit: what the model says it waits for; "" if unknown.
    """

    kernel: str
    name: str
    shape: str
    operations: int
    n_bytes: int
    dtype: str
    seconds: float
    label: str
    limit: str = ""

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.operations / self.n_bytes

    @property
    def performance(self) -> float:
        """Operations a second."""
        return self.operations / self.seconds


@dataclass(frozen=True)
class Chart:
    """What is drawn: ``device``, its ``roofs``, the ``points``, and what has to be said about them."""

    device: str
    roofs: list[Roof]
    points: list[Point]
    notes: list[str]

    def roof_of(self, point: Point) -> tuple[str, float]:
        """The limit above a point, by name, and its operations a second: the peak of its data type, or memory."""
        compute = _peak(self.roofs, point.dtype)
        memory = next(roof for roof in self.roofs if roof.kind == "memory")
        slanted = point.intensity * memory.rate
        return (memory.name, slanted) if compute is None or slanted < compute.rate else (compute.name, compute.rate)

    def to_json(self) -> dict[str, Any]:
        """All of it, with what follows for every point: ``intensity``, ``performance``, ``roof``, ``share_of_roof``."""
        points = []
        for point in self.points:
            name, rate = self.roof_of(point)
            derived = {"intensity": point.intensity, "performance": point.performance}
            points.append({**asdict(point), **derived, "roof": name, "share_of_roof": point.performance / rate})
        return {
            "device": self.device,
            "roofs": [asdict(roof) for roof in self.roofs],
            "points": points,
            "notes": self.notes,
        }


_PEAK_OF = {"int8": "int8", "fp16": "fp16", "bf16": "fp16", "tf32": "tf32", "fp32": "fp32", "int32": "int32"}


def _peak(roofs: Iterable[Roof], dtype: str) -> Roof | None:
    """The roof of a data type; of integer operations outside tensor cores the float32 one, if there is no other."""
    found = {roof.name.partition(" ")[0]: roof for roof in roofs if roof.kind == "compute"}
    return found.get(_PEAK_OF.get(dtype, dtype)) or (found.get("fp32") if dtype in ("int32", "tf32") else None)


# --- roofs -------------------------------------------------------------------------------------------------


def roofs_of(product: Product) -> list[Roof]:
    """A GPU's roofs, memory first.

    The second-level cache's bandwidth is in no data sheet: it is the width of an SM's port, as the hardware table has
    it, times SMs and clock, an assumption.
    """
    clock = product.clock_ghz * 1e9
    chip = product.chip
    l2 = chip.l2_bytes_per_clock * product.n_sms * clock
    vector = f"{chip.float_per_clock} multiply-adds a clock and SM at {product.clock_ghz:g} GHz"
    integer = f"{chip.alu_per_clock} operations a clock and SM at {product.clock_ghz:g} GHz"
    width = (
        f"assumption: {chip.l2_bytes_per_clock} bytes a clock and SM, {product.n_sms} SMs, {product.clock_ghz:g} GHz"
    )
    return [
        Roof("HBM" if product.arch in (80, 90, 100) else "DRAM", "memory", product.dram_gb_per_s * 1e9, product.source),
        Roof("L2", "memory", l2, width, is_assumed=True),
        Roof("int8 tensor", "compute", product.int8_tops * 1e12, product.source),
        Roof("fp16 tensor", "compute", product.fp16_tflops * 1e12, product.source),
        Roof("fp32", "compute", 2 * chip.float_per_clock * product.n_sms * clock, vector),
        Roof("int32", "compute", chip.alu_per_clock * product.n_sms * clock, integer),
    ]


def measure_cpu_roofs(name: str, rounds: int = 5) -> list[Roof]:
    """What PyTorch reaches on this CPU, with its current number of threads: takes some seconds.

    Products of 2048 x 2048 in float32, bfloat16 and int8 stand for peaks, the sum of 256 MiB for the memory's.

    Args:
        name: of the device, for the sources.
    """
    n = 2048

    def best(call: Callable[[], object]) -> float:
        call()
        taken = []
        for _ in range(rounds):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
        return min(taken)

    words = torch.zeros(1 << 25, dtype=torch.int64)
    said = f"measured on {name} with {torch.get_num_threads()} threads"
    roofs = [Roof("DRAM", "memory", 8 * words.numel() / best(words.sum), f"{said}: sum of 256 MiB")]
    square = torch.rand(n, n)
    codes = torch.randint(-127, 128, (n, n), dtype=torch.int8)
    products: dict[str, Callable[[], object]] = {
        "int8 product": lambda: torch._int_mm(codes, codes.T),
        "fp16 product": lambda: half @ half,
        "fp32 product": lambda: square @ square,
    }
    half = square.to(torch.bfloat16)
    for title, call in products.items():
        what = "bfloat16" if title.startswith("fp16") else title.partition(" ")[0]
        roofs.append(Roof(title, "compute", 2 * n**3 / best(call), f"{said}: {n} x {n} products, {what}"))
    return roofs


# --- predicted points --------------------------------------------------------------------------------------


def _text(sizes: Mapping[str, Any]) -> str:
    return " ".join(
        name if value is True else f"{name}={value}"
        for name, value in sizes.items()
        if value is not False and value is not None
    )


def _name_of(problem: Problem) -> str:
    part = problem.sizes.get("part")
    return f"{problem.tunable}, {part}" if part else problem.tunable


def _operations_of(kernel: str, work: Work) -> str:
    """What a launch computes with: where there are no products, floats or integers."""
    return "int32" if kernel in ("hamming_popcount", "bits", "sign_similarity") else work.dtype


def predicted_points(
    product: Product, problems: Sequence[Problem], progress: Progress | None = None
) -> tuple[list[Point], list[str]]:
    """A point a problem, and notes on those that can't be predicted.

    Every problem is compiled in the configuration that would run it (see ``tetra.autotune.table``).

    Raises:
        RuntimeError: there is no Triton that can compile.
    """
    points, notes = [], []
    reports: dict[str, Report] = {}
    for done, problem in enumerate(problems):
        kernel, sizes = problem.tunable, problem.sizes
        name = _name_of(problem)
        if progress is not None:
            progress(done, len(problems), name)
        try:
            config, works = chosen_works(product, kernel, sizes)
        except LookupError as error:
            notes.append(f"{error.args[0]} and was left out")
            continue
        seconds, limits = 0.0, []
        for work in works:
            code = work.specimen
            key = json.dumps([code.name, code.config, code.options], sort_keys=True, default=str)
            if key not in reports:
                reports[key] = report(compile_for(code, product.arch))
            launch = Launch(
                *(name, kernel, work.operations, work.dtype, work.n_bytes),
                *(work.blocks, work.iterations, work.macs, work.popcounts),
            )
            prediction = predict_launch(launch, product, reports[key])
            seconds += prediction.seconds
            limits.append((prediction.seconds, prediction.limit))
        operations, n_bytes = sum(w.operations for w in works), sum(w.n_bytes for w in works)
        dtype = _operations_of(kernel, works[0])
        if not operations or not n_bytes:
            continue
        shape = f"{_text(sizes)} config={','.join(map(str, config))}"
        points.append(
            Point(
                all_tunables()[kernel].module,
                name,
                shape,
                operations,
                n_bytes,
                dtype,
                seconds,
                LABEL_PREDICTED,
                max(limits)[1],
            )
        )
    return points, notes


def library_points(product: Product, shape: Shape, batch: int) -> list[Point]:
    """Launches of torch's own library in a backbone, taken at the peak on whole tiles; no code was read."""
    launches = dict.fromkeys(step.launch for step in model_steps(shape, batch) if step.sizes is None)
    found = []
    for launch in launches:
        prediction = predict_launch(launch, product)
        sizes = f"batch={batch}"
        found.append(
            Point(
                "library",
                launch.name,
                sizes,
                launch.operations,
                launch.n_bytes,
                launch.dtype,
                prediction.seconds,
                LABEL_PREDICTED,
                prediction.limit,
            )
        )
    return found


# --- measured points ---------------------------------------------------------------------------------------

_BYTES_OF = {"fp32": 4, "fp16": 2, "bf16": 2}


def _cost_of(kernel: str, s: Mapping[str, int], variant: str) -> tuple[int, int, str]:
    """(operations, bytes, data type) of a case of ``tetra bench kernels``; the variant names the type of values."""
    half = next((name for name in _BYTES_OF if name in variant), "fp16")
    n = _BYTES_OF[half]
    tensor = "fp32" if half == "fp32" else "fp16"
    if kernel == "ternary_matmul":
        if "weights only" in variant:
            return (*ternary_cost(s["M"], s["N"], s["K"], n, x_bytes=n), tensor)
        return (*ternary_cost(s["M"], s["N"], s["K"], 4 if "int32" in variant else n), "int8")
    if kernel == "row_quantize":
        return (*row_quantize_cost(s["M"], s["K"], n, norm=True), "fp32")
    if kernel == "layer_norm":
        return (*layer_norm_cost(s["M"], s["K"], n), "fp32")
    if kernel == "attention":
        return (*attention_cost(s["B"], s["T"], s["H"], s["D"], n), tensor)
    if kernel == "patches":
        return (*patches_cost(s["B"], s["H"], s["W"], 1, n), "fp32")
    if kernel == "bits":
        return (*bits_cost(s["B"], s["D"], 4), "int32")
    if kernel == "residual_dropout":
        return (*residual_dropout_cost(s["M"], s["K"], n, 4), "fp32")
    if kernel == "attention_training":
        return (*attention_training_cost(s["B"], s["T"], s["H"], s["D"], n), tensor)
    if kernel == "attention_distillation":
        width = s["H"] * s["D"]
        return (*attention_distillation_cost(s["B"], s["T"], width, width, n), tensor)
    if kernel == "token_loss":
        return (*token_loss_cost(s["M"], s["C"], n), "fp32")
    if kernel == "blended_linear":  # the whole layer: rows, weight and product
        rows = blended_cost(s["M"], s["K"], n, n)
        product = 2 * s["M"] * s["N"] * s["K"], n * (s["M"] * s["K"] + s["N"] * s["K"] + s["M"] * s["N"])
        weight = 10 * s["N"] * s["K"], s["N"] * s["K"] * (8 + n)
        operations, n_bytes = (sum(part) for part in zip(rows, product, weight, strict=True))
        return operations, n_bytes, tensor
    raise KeyError(kernel)


def _number(row: Mapping[str, Any], where: str, *names: str) -> float:
    return _named_number(row, where, *names)[1]


def _named_number(row: Mapping[str, Any], where: str, *names: str) -> tuple[str, float]:
    """The first of ``names`` that has a positive number, and it; what is absurdly large or small is none."""
    for name in names:
        value = row.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 1e-30 < value < 1e30:
            return name, float(value)
    raise RooflineError(f"{where}: has no positive {' or '.join(names)}")


def _whole(row: Mapping[str, Any], where: str, name: str) -> int:
    return max(1, int(_number(row, where, name)))


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 40


def _is_own(variant: str) -> bool:
    """Whether it is a kernel of this project, and not PyTorch or another library in its place."""
    return variant.startswith("tetra") and not variant.endswith(("plain torch", "no compiled kernels"))


def _point_of_row(row: Mapping[str, Any], where: str) -> Point | None:
    """None for what is not this project's."""
    variant = str(row.get("variant") or row.get("backend") or "")
    figures: tuple[int, int, str]
    seconds_names = ("median_ms", "measured_us", "median_us")
    if "operations" in row and "n_bytes" in row:
        figures = (
            _whole(row, where, "operations"),
            _whole(row, where, "n_bytes"),
            str(row.get("dtype", "fp32")),
        )
        if figures[2] not in _PEAK_OF:
            raise RooflineError(f"{where}: dtype is {figures[2]!r}, wanted one of {', '.join(_PEAK_OF)}")
        kernel, shape = str(row.get("kernel", "?")), row.get("shape")
    elif {"rows", "bytes", "queries", "k"} <= row.keys():
        if variant and not _is_own(variant):
            return None
        sizes = {name: _whole(row, where, name) for name in ("queries", "rows", "bytes", "k")}
        kernel, shape = "hamming_popcount", sizes
        figures = (*hamming_popcount_cost(*sizes.values()), "int32")
    elif isinstance(row.get("kernel"), str) and isinstance(row.get("shape"), Mapping):
        if variant and not _is_own(variant):
            return None
        kernel, shape = row["kernel"], row["shape"]
        if not all(_is_size(size) for name, size in shape.items() if len(name) == 1):
            raise RooflineError(f"{where}: sizes of {kernel} are no numbers above 0: {shape!s:.200}")
        try:
            figures = _cost_of(kernel, shape, variant)
        except KeyError as error:
            raise RooflineError(
                f"{where}: nothing is known of kernel or size {error}; wanted what tetra bench writes"
            ) from None
    else:
        raise RooflineError(f"{where}: wanted kernel and shape as tetra bench writes them, or operations and n_bytes")
    unit, figure = _named_number(row, where, *seconds_names)
    seconds = figure / (1e3 if unit == "median_ms" else 1e6)
    text = _text(shape) if isinstance(shape, Mapping) else str(shape or "")
    return Point(kernel, variant or kernel, text, *figures, seconds, LABEL_MEASURED)


def read_measured(
    path: Path, device: str, problems: Sequence[Problem] = (), notes: list[str] | None = None
) -> list[Point]:
    """The points of a file of measurements.

    Args:
        device: the chart's; figures that name another one are refused.
        problems: by which keys of tuning results are understood.
        notes: gets lines on what was left out.

    Raises:
        RooflineError: the file can't be read, holds no measurements, or was measured on another device.
    """
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise RooflineError(f"{path}: can't be read: {error.strerror}") from error
    except (ValueError, RecursionError):
        raise RooflineError(f"{path}: is not JSON, or truncated") from None
    notes = [] if notes is None else notes
    if isinstance(value, dict) and value.get("format") == "tetra-tuning":
        return _points_of_tuning(value, path, device, problems, notes)
    if not isinstance(value, list) or not value or not all(isinstance(row, dict) for row in value):
        raise RooflineError(f"{path}: holds no list of measurements; name a file that tetra bench wrote with --json")
    points = []
    for number, row in enumerate(value):
        _check_device(row.get("device_name"), device, path)
        point = _point_of_row(row, f"{path}: entry {number}")
        if point is not None:
            points.append(point)
    if len(points) < len(value):
        notes.append(f"{path.name}: {len(value) - len(points)} figures that are not of our kernels were left out")
    return points


def _check_device(found: object, device: str, path: Path) -> None:
    """A product's number, such as A100, has to be in the name that the driver gives."""
    numbers = [word for word in device.split() if any(letter.isdigit() for letter in word)]
    word = device if not numbers or "(" in device else numbers[0]
    if found is None:
        return
    if not isinstance(found, str) or not (_has_word(found, word) or _has_word(device, found)):
        raise RooflineError(f"{path}: was measured on {found!r}, and the chart is of {device!r}; name that --gpu")


def _has_word(text: str, word: str) -> bool:
    """Whether ``word`` is in ``text``, and not a part of a longer number: L4 is not in L40S."""
    pattern = rf"(?<![a-z0-9]){re.escape(word.strip().lower())}(?![a-z0-9])"
    return bool(word.strip()) and re.search(pattern, text.lower()) is not None


def _points_of_tuning(
    value: Mapping[str, Any], path: Path, device: str, problems: Sequence[Problem], notes: list[str]
) -> list[Point]:
    if value.get("origin") != "measured" or not isinstance(value.get("results"), dict):
        raise RooflineError(f"{path}: holds tuning results that were not measured; name those of tetra tune measure")
    about = value.get("device")
    _check_device(about.get("name", "") if isinstance(about, dict) else "", device, path)
    by_key: dict[tuple[str, str], Problem] = {}
    for problem in problems:
        if all_tunables()[problem.tunable].works is not None:
            by_key.setdefault((problem.tunable, problem.key), problem)
    points, unknown = [], 0
    for kernel, entries in value["results"].items():
        for key, entry in entries.items() if isinstance(entries, dict) else ():
            known = by_key.get((kernel, key))
            if known is None or not isinstance(entry, dict) or not isinstance(entry.get("config"), list):
                unknown += 1
                continue
            tunable = all_tunables()[kernel]
            assert tunable.works is not None
            try:  # cost does not depend on the chip
                works = tunable.works(80, 108, known.sizes, tuple(entry["config"]))
            except (ValueError, TypeError, LookupError, ArithmeticError):
                raise RooflineError(
                    f"{path}: {kernel} {key}: config {entry['config']!s:.100} is none of this kernel"
                ) from None
            seconds = _number(entry, f"{path}: {kernel} {key}", "measured_us") / 1e6
            costs = sum(w.operations for w in works), sum(w.n_bytes for w in works)
            text = f"{_text(known.sizes)} config={','.join(map(str, entry['config']))}"
            dtype = _operations_of(kernel, works[0])
            points.append(Point(tunable.module, _name_of(known), text, *costs, dtype, seconds, LABEL_MEASURED))
    if unknown:
        notes.append(f"{path.name}: {unknown} results are of shapes that this chart does not have, and were left out")
    return points


# --- chart -------------------------------------------------------------------------------------------------


def gpu_chart(
    product: Product,
    shape: Shape,
    batch: int,
    measured: Sequence[Path] = (),
    *,
    predict: bool = True,
    progress: Progress | None = None,
) -> Chart:
    """Roofs of a GPU with predicted points of a backbone's launches, its training and searches, and measured ones.

    Raises:
        RooflineError: a file of measurements is none, or of another device.
        ValueError: ``batch`` is below 1.
        RuntimeError: points are predicted, and there is no Triton that can compile.
    """
    if batch < 1:
        raise ValueError(f"batch: is {batch}, wanted 1 or more")
    problems = all_problems({"": shape}, (batch,), (TRAINING_BATCH,))
    known = [*problems, *all_problems({"": shape})]  # files of measurements may be of other batches
    notes: list[str] = []
    points = [p for path in measured for p in read_measured(path, product.name, known, notes)]
    if predict:
        predicted, left_out = predicted_points(product, problems, progress)
        points += [*predicted, *library_points(product, shape, batch)]
        notes += left_out
        notes.append(
            f"Predicted points were not measured. Formula: {FORMULA}. Inference at batch {batch}, training at batch "
            f"{TRAINING_BATCH}, searches; launches of torch's library are taken at the peak on whole tiles."
        )
    roofs = roofs_of(product)
    notes += [f"{roof.name}: {roof.source}" for roof in roofs]
    return Chart(product.name, roofs, points, notes)


def cpu_chart(device_name: str, measured: Sequence[Path]) -> Chart:
    """Measured roofs of this CPU with measured points. RooflineError as :func:`read_measured`, or without points."""
    if not measured:
        raise RooflineError("a chart of a CPU shows measured points alone; give --measured FILE of tetra bench kernels")
    notes: list[str] = []
    points = [p for path in measured for p in read_measured(path, device_name, (), notes)]
    if not points:
        raise RooflineError(
            f"{', '.join(map(str, measured))}: no figures of our kernels on a CPU; give what bench wrote"
        )
    files = [json.loads(path.read_text()) for path in measured]
    used = {str(row["threads"]) for rows in files if isinstance(rows, list) for row in rows if row.get("threads")}
    if len(used) > 1:
        raise RooflineError(f"the figures were measured with {' and '.join(sorted(used))} threads; draw them apart")
    if not all(re.fullmatch(r"[1-9]\d{0,4}", n) for n in used):
        raise RooflineError(f"the figures were measured with {min(used):.50} threads, wanted a number above 0")
    before = torch.get_num_threads()
    torch.set_num_threads(int(next(iter(used), before)))
    try:
        roofs = measure_cpu_roofs(device_name)
    finally:
        torch.set_num_threads(before)
    return Chart(device_name, roofs, points, notes + [f"{roof.name}: {roof.source}" for roof in roofs])


def _limits(chart: Chart) -> tuple[float, float, float, float]:
    """Ranges of both axes, powers of ten around points and the corners of the roofs."""
    memory = [roof.rate for roof in chart.roofs if roof.kind == "memory"]
    compute = [roof.rate for roof in chart.roofs if roof.kind == "compute"]
    xs = [p.intensity for p in chart.points] + [max(compute) / min(memory)]
    ys = [p.performance for p in chart.points] + [max(compute)]
    return min(xs) / 2, max(xs) * 4, min(ys) / 2, max(ys) * 2


_COLOURS = ("#1f6f8b", "#d1495b", "#66a182", "#8d6a9f", "#edae49", "#30638e", "#7a5c3e", "#5f7a1f")


def _tera(rate: float) -> str:
    """In 1e12 a second: 4.8, 61.8, 1,979."""
    return f"{rate / 1e12:,.0f}" if rate >= 1e14 else f"{rate / 1e12:.3g}"


def draw_png(chart: Chart, file: IO[bytes]) -> None:
    """Write the chart as a PNG. ModuleNotFoundError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    left, right, low, high = _limits(chart) if chart.points else (0.1, 1e4, 1e9, 1e15)
    figure = Figure(figsize=(10, 6.2), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    peaks = [roof for roof in chart.roofs if roof.kind == "compute"]
    memories = [roof for roof in chart.roofs if roof.kind == "memory"]
    for roof in memories:
        top = max(peak.rate for peak in peaks)
        ends = [left, min(top / roof.rate, right)]
        style = ":" if roof.is_assumed else "-"
        axes.plot(ends, [x * roof.rate for x in ends], color="#888", linewidth=1.2, linestyle=style)
        x = max(left, low / roof.rate) * 1.15
        text = f"{roof.name} {_tera(roof.rate)} TB/s" + (" (assumed)" if roof.is_assumed else "")
        axes.annotate(
            text, (x, x * roof.rate), xytext=(6, -9), textcoords="offset points", fontsize="x-small", color="#555"
        )
    for peak in peaks:
        start = peak.rate / max(memory.rate for memory in memories)
        axes.plot([max(start, left), right], [peak.rate, peak.rate], color="#333", linewidth=1.2)
        axes.annotate(
            f"{peak.name} {_tera(peak.rate)} T/s", (right, peak.rate), xytext=(-4, 3), textcoords="offset points",
            ha="right", fontsize="x-small",
        )  # fmt: skip
    kernels = list(dict.fromkeys(p.kernel for p in chart.points))
    for number, kernel in enumerate(kernels):
        colour = _COLOURS[number % len(_COLOURS)]
        marker = "osD^"[number // len(_COLOURS) % 4]
        for label in (LABEL_PREDICTED, LABEL_MEASURED):
            mine = [p for p in chart.points if p.kernel == kernel and p.label == label]
            if mine:
                axes.scatter(
                    [p.intensity for p in mine], [p.performance for p in mine], s=34, marker=marker, edgecolors=colour,
                    facecolors=colour if label == LABEL_MEASURED else "white", linewidths=1.5, zorder=3,
                    label=f"{kernel}, {label}",
                )  # fmt: skip
    labels = " and ".join(dict.fromkeys(p.label for p in chart.points)) or "roofs alone"
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(low, high))
    axes.set(xlabel="operations a byte, by the kernels' cost functions", ylabel="operations a second")
    axes.set_title(f"{chart.device}: {labels}" + (" (hollow: nothing measured)" if "predicted" in labels else ""))
    axes.grid(which="major", color="#e8e8e8")
    axes.set_axisbelow(True)
    if chart.points:
        figure.legend(loc="outside right upper", fontsize="x-small")
    canvas.print_png(file)


_SCRIPT = """
const W = 1100, H = 640, L = 76, R = 20, T = 16, B = 46;
const kernels = [...new Set(DATA.points.map(p => p.kernel))], labels = [...new Set(DATA.points.map(p => p.label))];
const colour = kernel => COLOURS[kernels.indexOf(kernel) % COLOURS.length];
const hidden = new Set();
const whole = DATA.limits.map(Math.log10);
let view = [...whole];
const controls = document.getElementById("controls");
for (const key of [...labels, ...kernels]) {
  const label = make(controls, "label", kernels.includes(key) ? { style: "color:" + colour(key) } : {});
  const box = make(label, "input", { type: "checkbox", checked: "" });
  make(label, "span", {}, " " + key);
  box.addEventListener("change", () => { box.checked ? hidden.delete(key) : hidden.add(key); draw(); });
}
const reset = make(controls, "button", {}, "whole chart");
reset.addEventListener("click", () => { view = [...whole]; draw(); });
make(controls, "span", {}, "wheel: zoom, drag: move; hollow points are predicted");
const svg = make(document.getElementById("page"), "svg", { viewBox: `0 0 ${W} ${H}`, role: "img" });
const x = v => L + (W - L - R) * (Math.log10(v) - view[0]) / (view[1] - view[0]);
const y = v => T + (H - T - B) * (1 - (Math.log10(v) - view[2]) / (view[3] - view[2]));

function draw() {
  svg.replaceChildren();
  const clip = make(make(svg, "defs"), "clipPath", { id: "inside" });
  make(clip, "rect", { x: L, y: T, width: W - L - R, height: H - T - B });
  for (let d = Math.ceil(view[0]); d <= view[1]; d++) {
    make(svg, "line", { x1: x(10 ** d), x2: x(10 ** d), y1: T, y2: H - B, stroke: "#eee" });
    make(svg, "text", { x: x(10 ** d), y: H - B + 16, "text-anchor": "middle" }, digits(10 ** d));
  }
  for (let d = Math.ceil(view[2]); d <= view[3]; d++) {
    make(svg, "line", { x1: L, x2: W - R, y1: y(10 ** d), y2: y(10 ** d), stroke: "#eee" });
    make(svg, "text", { x: L - 6, y: y(10 ** d) + 4, "text-anchor": "end" }, "1e" + d);
  }
  make(svg, "text", { x: (L + W - R) / 2, y: H - 8, "text-anchor": "middle" }, "operations a byte");
  make(svg, "text", { x: 14, y: H / 2, "text-anchor": "middle", transform: `rotate(-90 14 ${H / 2})` },
    "operations a second");
  const inside = make(svg, "g", { "clip-path": "url(#inside)" });
  const peaks = DATA.roofs.filter(r => r.kind === "compute"), memories = DATA.roofs.filter(r => r.kind === "memory");
  const top = Math.max(...peaks.map(r => r.rate)), fastest = Math.max(...memories.map(r => r.rate));
  const far = 10 ** Math.max(view[1], whole[1]), near = 10 ** Math.min(view[0], whole[0]);
  for (const roof of DATA.roofs) {
    const [a, b] = roof.kind === "memory" ? [near, top / roof.rate] : [roof.rate / fastest, far];
    const at = v => roof.kind === "memory" ? v * roof.rate : roof.rate;
    const line = make(inside, "line", { x1: x(a), y1: y(at(a)), x2: x(b), y2: y(at(b)), stroke: "#555",
      "stroke-width": 1.5, "stroke-dasharray": roof.is_assumed ? "3 4" : "none" });
    const unit = roof.kind === "memory" ? " TB/s" : " T/s";
    showTip(line, `${roof.name}: ${digits(roof.rate / 1e12)}${unit}\\n${roof.source}`);
    const where = roof.kind === "memory"
      ? Math.max(10 ** view[0] * 1.1, 10 ** view[2] / roof.rate * 1.3) : 10 ** view[1] / 1.05;
    make(inside, "text", { x: x(where), y: y(at(where)) - 6, "text-anchor": roof.kind === "memory" ? "start" : "end" },
      `${roof.name} ${digits(roof.rate / 1e12)}${unit}${roof.is_assumed ? " (assumed)" : ""}`);
  }
  for (const p of DATA.points) {
    if (hidden.has(p.kernel) || hidden.has(p.label)) continue;
    const dot = make(inside, "circle", { cx: x(p.intensity), cy: y(p.performance), r: 5.5, stroke: colour(p.kernel),
      "stroke-width": 2, fill: p.label === "predicted" ? "#fff" : colour(p.kernel) });
    showTip(dot, `${p.kernel}: ${p.name}, ${p.label}\\n${p.shape}\\n${digits(p.intensity)} operations a byte\\n` +
      `${digits(p.performance / 1e12)} T operations a second (${p.dtype}), ${digits(p.seconds * 1e6)} us\\n` +
      `${digits(100 * p.share_of_roof)}% of ${p.roof}` + (p.limit ? `\\nwaits for: ${p.limit}` : ""));
  }
}
function place(event) {
  const box = svg.getBoundingClientRect();
  return [(event.clientX - box.left) / box.width * W, (event.clientY - box.top) / box.height * H];
}
svg.addEventListener("wheel", event => {
  event.preventDefault();
  const [px, py] = place(event), factor = event.deltaY > 0 ? 1.2 : 1 / 1.2;
  const u = view[0] + (view[1] - view[0]) * (px - L) / (W - L - R);
  const v = view[2] + (view[3] - view[2]) * (1 - (py - T) / (H - T - B));
  view = [u - (u - view[0]) * factor, u + (view[1] - u) * factor, v - (v - view[2]) * factor,
    v + (view[3] - v) * factor];
  draw();
}, { passive: false });
let held = null;
svg.addEventListener("pointerdown", event => { held = [...place(event), ...view]; });
addEventListener("pointerup", () => { held = null; });
svg.addEventListener("pointermove", event => {
  if (held === null) return;
  const [px, py] = place(event);
  const du = (px - held[0]) / (W - L - R) * (held[3] - held[2]);
  const dv = (py - held[1]) / (H - T - B) * (held[5] - held[4]);
  view = [held[2] - du, held[3] - du, held[4] + dv, held[5] + dv];
  draw();
});
draw();
"""


def draw_html(chart: Chart) -> str:
    """The chart as a page on which points tell what they are, and which zooms."""
    data = {**chart.to_json(), "limits": list(_limits(chart)) if chart.points else [0.1, 1e4, 1e9, 1e15]}
    return page(f"Roofline of {chart.device}", chart.notes, data, _SCRIPT)
