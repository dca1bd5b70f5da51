"""Memory over one training step: bytes that are allocated at every moment, by what they are for.

Categories are

- ``weights``: parameters and buffers;
- ``optimizer``: its state;
- ``inputs``: what the caller names: images, and a teacher's outputs;
- ``kept``: what autograd keeps from the forward for the backward pass;
- ``gradients``: of parameters;
- ``temporary``: all else: results that nobody keeps, gradients on their way, workspaces.

Sizes are the allocator's own (the events of torch.profiler), on CPUs and GPUs alike: a storage counts from the moment
that it is allocated until it is freed. Memory that a library allocates past PyTorch does not appear. Weights, optimizer
and inputs are there before the step, and count as they are. The profiler slows the step down: its times say in which
order things happen, not how long they take.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from tetra.profiling.page import page

CATEGORIES = ("weights", "optimizer", "inputs", "kept", "gradients", "temporary")
PHASES = ("forward", "backward", "step")
_LARGEST_HOLDERS = 12
_MARK = "tetra memory: "


@dataclass(frozen=True)
class Holder:
    """Allocations that are alike, alive at the peak.

    Attributes:
        category: one of ``CATEGORIES``.
        where: the module in whose forward pass, or the step of autograd, they were made; "" before the step.
        operation: of PyTorch, that allocated them.
        count, n_bytes: how many, and of all.
    """

    category: str
    where: str
    operation: str
    count: int
    n_bytes: int


@dataclass(frozen=True)
class Timeline:
    """Memory over a step.

    Attributes:
        device: whose memory.
        times_ms: since the start, at every change.
        n_bytes: category -> bytes from that time on.
        phases: (name, start, end) in milliseconds.
        peak_bytes, peak_ms, peak_phase: the most that was allocated, and when.
        holders: what holds it then, largest first; the last one is the rest.
    """

    device: str
    times_ms: list[float]
    n_bytes: dict[str, list[int]]
    phases: list[tuple[str, float, float]]
    peak_bytes: int
    peak_ms: float
    peak_phase: str
    holders: list[Holder]

    def at_end_of(self, phase: str) -> dict[str, int]:
        """Bytes by category when a phase ends."""
        end = next(end for name, _, end in self.phases if name == phase)
        last = max((i for i, t in enumerate(self.times_ms) if t <= end), default=0)
        return {category: values[last] for category, values in self.n_bytes.items()}

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {**asdict(self), "phases": [list(phase) for phase in self.phases]}


@dataclass
class _Block:
    """One allocation."""

    n_bytes: int
    start: float
    end: float
    where: str
    operation: str
    category: str = "temporary"


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _storages(tensors: Iterable[Tensor], device: torch.device) -> dict[int, int]:
    """Address -> bytes of the storages that lie on ``device``."""
    return {_address(t): t.untyped_storage().nbytes() for t in tensors if t.device.type == device.type}


@contextmanager
def _modules_marked(model: nn.Module) -> Iterator[None]:
    """Within this context the trace tells which module's forward pass runs."""
    running: list[Any] = []
    handles = []

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            mark = torch.profiler.record_function(f"{_MARK}module {name}")
            mark.__enter__()
            running.append(mark)

        return hook

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        running.pop().__exit__(None, None, None)

    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(enter(name)))
            handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def record(
    forward: Callable[[], Tensor],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    inputs: Iterable[Tensor] = (),
    context: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Timeline:
    """Run two steps, and give the second one's memory; the first makes what stays, such as the optimizer's state.

    Args:
        forward: up to the loss, a scalar.
        inputs: tensors that exist anyway.
        context: around forward and backward, such as autocast.

    Raises:
        RuntimeError: the profiler gives no memory events.
    """

    def clear() -> None:
        for parameter in model.parameters():
            parameter.grad = None

    clear()
    with context():
        forward().backward()
    optimizer.step()
    clear()
    if device.type == "cuda":
        torch.cuda.synchronize(device)

    state = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
    before = {
        "weights": _storages([*model.parameters(), *model.buffers()], device),
        "optimizer": _storages(state, device),
        "inputs": _storages(inputs, device),
    }

    def mark(kind: str, tensor: Tensor) -> AbstractContextManager[object]:
        n_bytes = tensor.untyped_storage().nbytes() if tensor.device.type == device.type else 0
        return torch.profiler.record_function(f"{_MARK}{kind} {_address(tensor)} {n_bytes}")

    def keep(tensor: Tensor) -> Tensor:
        with mark("kept", tensor):
            return tensor.detach()  # the tensor itself would be kept by what it keeps

    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    phase = torch.profiler.record_function
    # Shapes are not wanted: they would keep tensors alive.
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        with context():
            hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
            with phase(f"{_MARK}phase forward"), hooks, _modules_marked(model):
                loss = forward()
            with phase(f"{_MARK}phase backward"):
                loss.backward()
                del loss
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        with mark("gradient", parameter.grad):
                            pass
        with phase(f"{_MARK}phase step"):
            optimizer.step()
            clear()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return timeline_of(events, before, device)


def timeline_of(
    events: list[dict[str, Any]], before: Mapping[str, Mapping[int, int]], device: torch.device
) -> Timeline:
    """The timeline from a Chrome trace with marks, and the storages (address -> bytes) that existed before.

    RuntimeError where the trace has no memory events of the device.
    """
    # On a GPU a trace holds every mark a second time, where the work that it launched ran.
    hosts = [e for e in events if e.get("ph") == "X" and e.get("cat") != "gpu_user_annotation"]
    marks = [e for e in hosts if str(e.get("name", "")).startswith(_MARK)]
    marks.sort(key=lambda e: float(e["ts"]))
    phases = [
        (str(e["name"]).rpartition(" ")[2], float(e["ts"]), float(e["ts"]) + float(e["dur"]))
        for e in marks
        if str(e["name"]).startswith(f"{_MARK}phase ")
    ]
    device_type = {"cpu": 0, "cuda": 1}[device.type]
    memory = [e for e in events if e.get("name") == "[memory]" and e.get("args", {}).get("Device Type") == device_type]
    if not memory or not phases:
        raise RuntimeError(
            f"torch.profiler recorded no memory events of {device}; is this build of PyTorch without them?"
        )
    start, end = min(begin for _, begin, _ in phases), max(stop for _, _, stop in phases)
    blocks = _blocks(sorted(memory, key=lambda e: float(e["ts"])), _places(events), end)
    known = {name: dict(before.get(name, {})) for name in ("weights", "optimizer", "inputs")}
    _categorise(blocks, marks, known)

    existing = {name: sum(sizes.values()) for name, sizes in known.items()}
    changes: list[tuple[float, str, int]] = []
    for found in blocks.values():
        for block in found:
            changes.append((block.start, block.category, block.n_bytes))
            changes.append((block.end, block.category, -block.n_bytes))
    times, n_bytes = [0.0], {category: [existing.get(category, 0)] for category in CATEGORIES}
    now = {category: values[0] for category, values in n_bytes.items()}
    peak, peak_at = sum(now.values()), start
    for at, category, change in sorted(c for c in changes if c[0] < end):
        now[category] += change
        times.append((at - start) / 1e3)
        for name in CATEGORIES:
            n_bytes[name].append(now[name])
        if sum(now.values()) > peak:
            peak, peak_at = sum(now.values()), at
    alive = [b for found in blocks.values() for b in found if b.start <= peak_at < b.end]
    return Timeline(
        device=str(device),
        times_ms=times,
        n_bytes=n_bytes,
        phases=[(name, (begin - start) / 1e3, (stop - start) / 1e3) for name, begin, stop in phases],
        peak_bytes=peak,
        peak_ms=(peak_at - start) / 1e3,
        peak_phase=next((name for name, begin, stop in phases if begin <= peak_at <= stop), ""),
        holders=_holders(alive, known),
    )


def _places(events: list[dict[str, Any]]) -> Callable[[float, Any], tuple[str, str]]:
    """A function from a time and a thread to (module or step of autograd, operation) that ran there; to be called in
    the order of time."""
    spans: dict[Any, list[tuple[float, float, str]]] = {}
    for e in events:
        if e.get("ph") == "X" and e.get("cat") in ("cpu_op", "user_annotation"):
            ts = float(e["ts"])
            spans.setdefault(e.get("tid"), []).append((ts, ts + float(e["dur"]), str(e["name"])))
    waiting = {thread: iter(sorted(found, key=lambda s: (s[0], -s[1]))) for thread, found in spans.items()}
    following = {thread: next(found, None) for thread, found in waiting.items()}
    open_spans: dict[Any, list[tuple[float, float, str]]] = {thread: [] for thread in spans}

    def place(at: float, thread: Any) -> tuple[str, str]:
        if thread not in waiting:
            return "", ""
        span = following[thread]
        while span is not None and span[0] <= at:
            open_spans[thread].append(span)
            span = following[thread] = next(waiting[thread], None)
        open_spans[thread] = [s for s in open_spans[thread] if s[1] >= at]
        where = operation = ""
        for _, _, name in open_spans[thread]:
            if name.startswith(f"{_MARK}module "):
                where, operation = name.removeprefix(f"{_MARK}module "), ""
            elif name.startswith("autograd::engine::evaluate_function: "):
                where, operation = name.rpartition(" ")[2], ""
            elif not name.startswith(_MARK) and not operation:
                operation = name.removeprefix("aten::")
        return where, operation

    return place


def _blocks(
    memory: list[dict[str, Any]], place: Callable[[float, Any], tuple[str, str]], end: float
) -> dict[int, list[_Block]]:
    """Address -> what was allocated there, one after the other. What is freed without having been allocated was there
    before, and is not followed."""
    blocks: dict[int, list[_Block]] = {}
    for event in memory:
        at, args = float(event["ts"]), event["args"]
        address, change = int(args["Addr"]), int(args["Bytes"])
        if change > 0:
            where, operation = place(at, event.get("tid"))
            blocks.setdefault(address, []).append(_Block(change, at, float("inf"), where, operation))
        elif address in blocks and blocks[address][-1].end == float("inf"):
            blocks[address][-1].end = at
    for found in blocks.values():
        for block in found:
            block.end = max(min(block.end, max(end, block.start)), block.start)
    return blocks


def _categorise(
    blocks: dict[int, list[_Block]], marks: list[dict[str, Any]], before: dict[str, dict[int, int]]
) -> None:
    """By the marks, in the order of time. What is kept and was there before, such as targets, is an input."""
    for mark in marks:
        kind, *numbers = str(mark["name"]).removeprefix(_MARK).split(" ")
        if kind not in ("kept", "gradient"):
            continue
        at, (address, n_bytes) = float(mark["ts"]), map(int, numbers)
        block = next((b for b in blocks.get(address, ()) if b.start <= at <= b.end), None)
        if block is not None:
            block.category = "kept" if kind == "kept" else "gradients"
        elif n_bytes and not any(address in sizes for sizes in before.values()):
            before["inputs"][address] = n_bytes


def _holders(alive: list[_Block], before: Mapping[str, Mapping[int, int]]) -> list[Holder]:
    groups: dict[tuple[str, str, str], list[int]] = {}
    for category, sizes in before.items():
        if sizes:
            groups[category, "", ""] = list(sizes.values())
    for block in alive:
        groups.setdefault((block.category, block.where, block.operation), []).append(block.n_bytes)
    found = sorted((Holder(*key, len(sizes), sum(sizes)) for key, sizes in groups.items()), key=lambda h: -h.n_bytes)
    rest = found[_LARGEST_HOLDERS:]
    if rest:
        last = Holder("", "the rest", "", sum(h.count for h in rest), sum(h.n_bytes for h in rest))
        found = [*found[:_LARGEST_HOLDERS], last]
    return found


# --- pictures ----------------------------------------------------------------------------------------------

_COLOURS = {
    "weights": "#30638e",
    "optimizer": "#8d6a9f",
    "inputs": "#9a9a9a",
    "kept": "#edae49",
    "gradients": "#66a182",
    "temporary": "#d1495b",
}
MIB = 1 << 20


def draw_png(timeline: Timeline, title: str, file: IO[bytes]) -> None:
    """Write the timeline as a PNG. ModuleNotFoundError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    values = [[n / MIB for n in timeline.n_bytes[category]] for category in CATEGORIES]
    axes.stackplot(
        timeline.times_ms, values, labels=CATEGORIES, colors=[_COLOURS[c] for c in CATEGORIES], step="post"
    )  # fmt: skip
    for name, start, end in timeline.phases:
        axes.axvline(end, color="#555", linewidth=0.8, linestyle=":")
        axes.annotate(
            name, ((start + end) / 2, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 3),
            textcoords="offset points", ha="center", fontsize="small",
        )  # fmt: skip
    axes.plot([timeline.peak_ms], [timeline.peak_bytes / MIB], "v", color="black", markersize=6)
    axes.annotate(f"peak {timeline.peak_bytes / MIB:.1f} MiB", (timeline.peak_ms, timeline.peak_bytes / MIB),
                  xytext=(0, 6), textcoords="offset points", ha="center", fontsize="small")  # fmt: skip
    axes.set(xlabel="milliseconds, slowed down by the profiler", ylabel="MiB allocated")
    axes.set(xlim=(0, max(end for _, _, end in timeline.phases)), ylim=(0, 1.12 * timeline.peak_bytes / MIB))
    figure.suptitle(title)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize="small", reverse=True)
    canvas.print_png(file)


_SCRIPT = """
const W = 1100, H = 460, L = 70, R = 16, T = 24, B = 40;
const times = DATA.times_ms, categories = Object.keys(DATA.n_bytes);
const end = Math.max(...DATA.phases.map(p => p[2]));
const x = t => L + (W - L - R) * t / end, y = v => T + (H - T - B) * (1 - v / (1.08 * DATA.peak_bytes));
const mib = v => digits(v / 1048576) + " MiB";
const svg = make(document.getElementById("page"), "svg", { viewBox: `0 0 ${W} ${H}`, role: "img" });
const sums = times.map(() => 0);
for (const category of categories) {
  const low = [], high = [];
  times.forEach((t, i) => {
    const until = i + 1 < times.length ? times[i + 1] : end;
    const before = sums[i];
    sums[i] += DATA.n_bytes[category][i];
    high.push(`${x(t)},${y(sums[i])}`, `${x(until)},${y(sums[i])}`);
    low.push(`${x(t)},${y(before)}`, `${x(until)},${y(before)}`);
  });
  make(svg, "polygon", { points: [...high, ...low.reverse()].join(" "), fill: DATA.colours[category] });
  const label = make(document.getElementById("controls"), "span", { style: `color:${DATA.colours[category]}` });
  label.textContent = "\\u25a0 " + category;
}
for (const [name, from, to] of DATA.phases) {
  make(svg, "line", { x1: x(to), x2: x(to), y1: T, y2: H - B, stroke: "#555", "stroke-dasharray": "2 3" });
  make(svg, "text", { x: (x(from) + x(to)) / 2, y: T - 8, "text-anchor": "middle" }, name);
}
for (let i = 0; i <= 4; i++) {
  const v = DATA.peak_bytes * i / 4;
  make(svg, "text", { x: L - 6, y: y(v) + 4, "text-anchor": "end" }, mib(v));
  make(svg, "text", { x: x(end * i / 4), y: H - B + 16, "text-anchor": "middle" }, digits(end * i / 4) + " ms");
}
make(svg, "circle", { cx: x(DATA.peak_ms), cy: y(DATA.peak_bytes), r: 5, fill: "none", stroke: "#000" });
const cover = make(svg, "rect", { x: L, y: T, width: W - L - R, height: H - T - B, fill: "transparent" });
showTip(cover, event => {
  const box = svg.getBoundingClientRect();
  const t = ((event.clientX - box.left) / box.width * W - L) / (W - L - R) * end;
  let low = 0, high = times.length - 1;
  while (low < high) { const middle = (low + high + 1) >> 1; times[middle] <= t ? low = middle : high = middle - 1; }
  return `${digits(times[low])} ms: ${mib(sums[low])}\\n` +
    categories.map(c => `${c}: ${mib(DATA.n_bytes[c][low])}`).reverse().join("\\n");
});
make(document.getElementById("page"), "h2", {}, `At the peak, ${mib(DATA.peak_bytes)} in the ${DATA.peak_phase} phase`);
const table = make(document.getElementById("page"), "table"), head = make(table, "tr");
for (const title of ["category", "where", "operation", "storages", "MiB"]) make(head, "th", {}, title);
for (const h of DATA.holders) {
  const row = make(table, "tr");
  for (const text of [h.category, h.where, h.operation]) make(row, "td", {}, text);
  for (const text of [h.count, digits(h.n_bytes / 1048576)]) make(row, "td", { class: "number" }, text);
}
"""


def draw_html(timeline: Timeline, title: str) -> str:
    """The timeline as a page on which every moment tells what it holds."""
    notes = ["Bytes of PyTorch's allocator over one training step. Times are slowed down by the profiler."]
    return page(title, notes, {**timeline.to_json(), "colours": _COLOURS}, _SCRIPT)
