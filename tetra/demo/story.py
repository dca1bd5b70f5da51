"""The demo's results as a report: which numbers, charts and pictures, in which order."""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

import tetra
from tetra.demo.report import (
    Localised,
    Picture,
    Report,
    Table,
    bar_chart,
    jpeg,
    line_chart,
    stacked_bars,
    town_map,
)
from tetra.demo.town import CONDITIONS, QUERY_CONDITIONS, Pose, TownDataset, render_view
from tetra.images import list_images

if TYPE_CHECKING:
    from tetra.demo.steps import Results

_KIB = 1024


def write_story(r: Results, path: Path) -> Path:
    """Write the report of a run of the demo."""
    right = sum(a.is_right for a in r.answers)
    town = r.town
    report = Report(
        "TeTRA: where was this photo taken?",
        f"A neural network with 2-bit weights turns each picture into {r.shipped.facts.bytes_per_image} bytes and "
        f"finds the place in a town that it has never seen: {len(town.queries)} queries by night, in rain, fog and "
        f"snow, against a map of {len(town.database)} pictures taken by day.",
        _hero(town),
    )
    before, after = r.memory["nano"]
    report.cards(_cards(r, before, after, right))
    _tell_town(report, town)
    _tell_recall(report, r)
    _tell_map(report, r, right)
    _tell_training(report, r)
    _tell_packing(report, r)
    _tell_speed(report, r)
    footer = (
        f"Made by tetra {tetra.__version__} with torch {torch.__version__}, {torch.get_num_threads()} CPU threads, "
        f"seed {r.seed}{', fast settings' if r.fast else ''}. The town is drawn, not photographed: recall on it says "
        "that the parts work together, not how a model does in a real city."
    )
    return report.write(path, footer)


def _cards(r: Results, before: dict[str, int], after: dict[str, int], right: int) -> list[tuple[str, str, str]]:
    main = next(iter(r.latency.values())) if "vit-b" not in r.latency else r.latency["vit-b"]
    arch = main[0]["arch"]
    best = max(main, key=lambda row: row["ratio_to_fp32_sdpa"] if "packed" in row["variant"] else 0)
    return [
        ("Localised", f"{right} of {len(r.answers)}", "queries within 25 m, one look each, no tracking"),
        (
            "Binary recall@1",
            f"{r.shipped.recall_binary[1]:.1f} %",
            f"float descriptors: {r.shipped.recall_float[1]:.1f} %",
        ),
        ("Median error", f"{statistics.median(a.error_m for a in r.answers):.1f} m", "map images are about 8 m apart"),
        ("Model in memory", f"{after['total'] / 2**20:.2f} MiB", f"{before['total'] / 2**20:.1f} MiB before packing"),
        ("Map", f"{r.shipped.facts.bytes_per_image} B", f"an image; {4 * r.shipped.facts.n_bits:,} B as floats"),
        (f"Speed of {arch}", f"{best['ratio_to_fp32_sdpa']:.1f} x", "packed against float32, same machine, in turns"),
    ]


def _hero(town: TownDataset) -> bytes:
    return jpeg(render_view(town.town, _postcard(town, 3), "dusk", (420, 1260)), 82)


def _postcard(town: TownDataset, rank: int) -> Pose:
    """The pose of a picture with much in it: the variety of its parts says so, ``rank`` 0 the most."""

    def variety(pose: Pose) -> float:
        small = render_view(town.town, pose, "overcast", (64, 96), supersample=1).astype(float)
        return float(small.std((0, 1)).sum() + 2 * small[:40].std(1).mean())

    candidates = [shot.pose for shot in town.database[:: max(1, len(town.database) // 24)]]
    return sorted(candidates, key=variety, reverse=True)[min(rank, len(candidates) - 1)]


def _tell_town(report: Report, town: TownDataset) -> None:
    report.section(
        "The town",
        "Every picture is rendered by the package itself from a seed: streets, houses, trees, cars that have moved "
        "since. The map is made on a sunny day. Queries come back from shifted viewpoints in other light and weather; "
        "here is one place in all of them.",
    )
    pose = _postcard(town, 0)
    report.gallery(
        [
            Picture(
                jpeg(render_view(town.town, pose, name, (300, 400))), "day (the map)" if name == "day" else name, True
            )
            for name in CONDITIONS
        ]
    )


def _tell_recall(report: Report, r: Results) -> None:
    ks = list(r.shipped.recall_float)
    rows = []
    for name, result in (
        ("shipped nano", r.shipped),
        ("student, trained here", r.trained),
        ("student, untrained", r.untrained),
    ):
        for form, recalls in (("float", result.recall_float), ("binary", result.recall_binary)):
            size = 4 * result.facts.n_bits if form == "float" else result.facts.bytes_per_image
            rows.append([f"{name}, {form}", *(f"{recalls[k]:.1f}" for k in ks), f"{size:,}"])
    table = Table(
        ["descriptor", *(f"R@{k}" for k in ks), "bytes"],
        rows,
        f"Recall in percent: {r.shipped.n_queries} queries, {r.shipped.n_references} map images; right is within 25 m.",
    )
    by_weather = {
        name: [a for a in r.answers if r.town.queries[a.query].conditions.name == name] for name in QUERY_CONDITIONS
    }
    by_weather = {name: found for name, found in by_weather.items() if found}
    bars = bar_chart(
        list(by_weather),
        {"recall@1": [100 * sum(a.is_right for a in v) / len(v) for v in by_weather.values()]},
        "binary recall@1, %",
        top=112,
    )
    curve = r.shipped.precision_recall
    precision = line_chart(
        {"shipped nano, binary": ([100 * v for v in curve.recall], [100 * v for v in curve.precision])},
        "recall, %",
        "precision, %",
        y_from_zero=True,
    )
    report.section(
        "Finding places again",
        "Descriptors are cut to their signs, one bit a dimension, and compared by counting bits that differ.",
        table,
        [
            Picture(bars, "The shipped model by light and weather of the query."),
            Picture(
                precision,
                f"Precision against recall as the largest accepted distance grows; area {curve.auc:.3f}, recall "
                f"without a wrong answer {100 * curve.recall_at_full_precision:.1f} %.",
            ),
        ],
    )
    names = [path.name for path in list_images(r.town.folder / "queries")]
    strips = []
    for path in sorted(r.pictures.glob("match_*.png")):
        weather = names[int(path.stem.removeprefix("match_"))].split("@")[-2]
        strips.append(
            Picture(_strip(path), f"A query ({weather}) and its nearest map images; green is right, red wrong.")
        )
    report.gallery(strips, wide=True)


def _strip(path: Path) -> bytes:
    image = Image.open(path).convert("RGB")
    # The first four tiles say enough, and are large enough to look at.
    image = image.crop((0, 0, image.width * 5 // 6, image.height))
    image.thumbnail((1100, 1100), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=84)
    return buffer.getvalue()


def _tell_map(report: Report, r: Results, right: int) -> None:
    town = r.town
    localised = [
        Localised(
            (town.queries[a.query].pose.x, town.queries[a.query].pose.y),
            (town.database[a.row].pose.x, town.database[a.row].pose.y),
            a.is_right,
        )
        for a in r.answers
    ]
    picture = town_map(town.town, [(s.pose.x, s.pose.y) for s in town.database], localised)
    # An odd stride: conditions follow each other in a fixed order of eight.
    shown = r.answers[:: max(1, len(r.answers) // 12) | 1][:12]
    rows: list[list[str]] = []
    good: set[tuple[int, int]] = set()
    bad: set[tuple[int, int]] = set()
    for i, a in enumerate(shown):
        query, found = town.queries[a.query], town.database[a.row]
        rows.append([query.conditions.name, _local(query.pose), _local(found.pose), str(a.bits), f"{a.error_m:.1f} m"])
        (good if a.is_right else bad).add((i, 4))
    medians = {n: statistics.median(getattr(a, f"{n}_ms") for a in r.answers) for n in ("decode", "network", "search")}
    report.section(
        "You are here",
        f"Each query alone, as it would come from a robot's camera. {right} of {len(r.answers)} are put within 25 m of "
        f"where they were taken. A frame takes {sum(medians.values()):.0f} ms: {medians['decode']:.1f} to decode, "
        f"{medians['network']:.1f} in the network, {medians['search']:.1f} to search the map (medians).",
        [
            Picture(
                picture,
                "White: the map's images. Green: queries that were localised, with a line to the answer. "
                "Red: queries put elsewhere.",
            ),
            Table(
                ["weather", "taken at", "you are here", "bits", "error"],
                rows,
                "Some of the queries. Metres from the district's south-west corner; bits that differ from the match.",
                frozenset(good),
                frozenset(bad),
            ),
        ],
    )


def _local(pose: Pose) -> str:
    return f"{pose.x:.0f} E {pose.y:.0f} N"


def _column(rows: Sequence[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    points = [(row["step"], row[name]) for row in rows if name in row]
    return [p[0] for p in points], [p[1] for p in points]


def _tell_training(report: Report, r: Results) -> None:
    distill, finetune = r.logs["distill"], r.logs["finetune"]
    losses = {
        name: _column(distill, key)
        for name, key in (("loss", "loss"), ("class token", "cls"), ("patch tokens", "patch"))
    }
    pictures = [
        Picture(
            line_chart(losses, "step", "loss", twin={"lambda": _column(distill, "lambda")}, twin_label="lambda"),
            f"Stage 1, distillation from {r.teacher}: lambda blends full-precision weights (0) into ternary ones (1).",
        ),
        Picture(
            line_chart(
                {"loss": _column(finetune, "loss")},
                "step",
                "loss",
                twin={"lambda": _column(finetune, "lambda")},
                twin_label="lambda",
            ),
            "Stage 2, fine-tuning with place labels: lambda blends float descriptors (0) into binary ones (1).",
        ),
    ]
    first, last = distill[-1]["step"] if distill else 0, finetune[-1]["step"] if finetune else 0
    probe: dict[str, tuple[list[float], list[float]]] = {}
    for name, key in (("float", "recall_float"), ("binary", "recall_binary")):
        one, two = _column(distill, key), _column(finetune, key)
        probe[name] = (one[0] + [first + x for x in two[0]], one[1] + two[1])
    if any(x for x, _ in probe.values()):
        chart = line_chart(probe, "step, both stages", "recall@1, %", markers=True, y_from_zero=True, split_at=first)
        pictures.append(
            Picture(
                chart,
                "Recall on a street that training leaves out: pooled tokens in stage 1, the head's "
                "descriptors in stage 2, after the rule.",
            )
        )
    before_after = bar_chart(
        ["R@1", "R@5", "R@10"],
        {
            "untrained": [r.untrained.recall_binary[k] for k in (1, 5, 10)],
            "trained here": [r.trained.recall_binary[k] for k in (1, 5, 10)],
            "shipped nano": [r.shipped.recall_binary[k] for k in (1, 5, 10)],
        },
        "binary recall, %",
        top=118,
    )
    pictures.append(
        Picture(before_after, "Binary recall on the unseen district before and after the training shown here.")
    )
    report.section(
        "Learning",
        f"A small student learns in the other district, {r.n_train_images} pictures, for {r.training_s:.0f} seconds on "
        f"this machine ({last + first:.0f} steps): enough to see the curves move, far too little for a good model.",
        pictures,
    )


def _tell_packing(report: Report, r: Results) -> None:
    items = (("2-bit weights", "ternary"), ("rest of the backbone", "full_precision"), ("head", "head"))
    rows: list[list[str]] = []
    totals: set[int] = set()
    groups: list[str] = []
    parts: dict[str, list[float]] = {label: [] for label, _ in items}
    for name, (before, after) in r.memory.items():
        for label, key in (*items, ("total", "total")):
            if key == "total":
                totals.add(len(rows))
            rows.append(
                [f"{name}: {label}", f"{before[key]:,}", f"{after[key]:,}", f"{before[key] / max(after[key], 1):.1f} x"]
            )
        if name == "nano":
            for state, sizes in (("float32", before), ("packed", after)):
                groups.append(state)
                for label, key in items:
                    parts[label].append(sizes[key] / 2**20)
    packing = r.packing
    report.section(
        "Packing",
        f"Ternary weights take 2 bits each. The student's file shrinks from {packing['before'] / _KIB:,.0f} to "
        f"{packing['after'] / _KIB:,.0f} KiB, and its codes stay what they were: of {packing['bits']:,} bits for "
        f"{packing['n_images']} queries, {packing['differing']['packed']} differ after packing and "
        f"{packing['differing']['reloaded']} after saving and loading.",
        [
            Table(
                ["bytes in memory", "before", "after", "smaller"],
                rows,
                "Weights at rest, measured on the loaded models.",
                totals=frozenset(totals),
            ),
            Picture(stacked_bars(groups, parts, "MiB", "MiB"), "Memory of the shipped model's weights."),
        ],
    )


def _tell_speed(report: Report, r: Results) -> None:
    tables: list[Table] = []
    for arch, rows in r.latency.items():
        cells = [_latency_row(row) for row in rows]
        side = " x ".join(str(v) for v in rows[0]["image_size"])
        tables.append(
            Table(
                ["variant", "median ms", "p95 ms", "speed-up", "MiB"],
                cells,
                f"{arch}, one image of {side}, {rows[0]['threads']} CPU threads, {rows[0]['repeats']} rounds",
            )
        )
    report.section(
        "Speed",
        "The variants of a backbone take turns, so that whatever else this machine does meets all of them alike. "
        "Ratios of medians against float32 with PyTorch's fused attention.",
        tables,
    )


def _latency_row(row: dict[str, Any]) -> list[str]:
    return [
        row["variant"],
        f"{row['median_ms']:.1f}",
        f"{row['p95_ms']:.1f}",
        f"{row['ratio_to_fp32_sdpa']:.2f}",
        f"{row['weights_mib']:.1f}",
    ]
