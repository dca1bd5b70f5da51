"""Pictures of a training: losses, lambda and recall against steps."""

from __future__ import annotations

from pathlib import Path

from tetra.files import atomic_write


def plot_curves(stages: dict[str, list[dict[str, float]]], path: Path) -> None:
    """One row of panels a stage: loss and its parts, lambda and learning progress, recall of the probe.

    Args:
        stages: per stage, log rows as :func:`tetra.training.loop.read_log` gives them.
        path: PNG to write, atomically.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = (
        ("loss", ("loss", "cls", "patch", "attention"), "loss"),
        ("lambda and codes", ("lambda", "code_entropy", "stuck_bits", "zero_weights"), "share"),
        ("held-out recall@1", ("recall_float", "recall_binary"), "%"),
    )
    figure = Figure(figsize=(12, 3.2 * max(1, len(stages))), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(max(1, len(stages)), len(panels), squeeze=False)
    for row, (stage, log) in zip(axes, stages.items(), strict=False):
        for axis, (title, keys, unit) in zip(row, panels, strict=True):
            for key in keys:
                points = [(r["step"], r[key]) for r in log if key in r]
                if points:
                    axis.plot(*zip(*points, strict=True), label=key, marker="o" if len(points) < 30 else "", ms=3)
            axis.set(title=f"{stage}: {title}", xlabel="step", ylabel=unit)
            axis.grid(alpha=0.3)
            if axis.lines:
                axis.legend(fontsize=8)
    with atomic_write(path) as file:
        figure.savefig(file, dpi=110, format="png")
