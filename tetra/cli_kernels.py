"""``tetra kernels``: what the compiled kernels cost, read from their machine code; needs no GPU."""

from __future__ import annotations

from contextlib import ExitStack
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tetra.cli_parts import (
    Json,
    check_json_path,
    config_text,
    make_table,
    print_table,
    printable,
    progress_bar,
    user_errors,
    write_json,
)
from tetra.errors import ConfigError

if TYPE_CHECKING:
    from tetra.profiling.static_profile import Comparison

ConfigValues = Annotated[
    list[str] | None,
    typer.Option("--config", metavar="NAME=VALUE", help="Only configurations with this value; repeat it."),
]

kernels_app = typer.Typer(
    no_args_is_help=True, help="What the compiled kernels cost, without a GPU.", rich_markup_mode=None
)


@kernels_app.command("report")
def kernels_report(
    arch: Annotated[
        list[str] | None, typer.Option("--arch", metavar="ARCH", help="Such as sm_87; repeat it. [default: all]")
    ] = None,
    kernel: Annotated[str | None, typer.Option(metavar="NAME", help="Only this one, such as attention.")] = None,
    json: Json = None,
) -> None:
    """Registers, spills, shared memory and instruction mix of every compiled kernel; needs no GPU."""
    from tetra.kernels.ahead_of_time import ARCHITECTURES, check_compiler, check_kernel, parse_arch
    from tetra.profiling.report import kernel_report

    check_json_path(json)
    with user_errors():
        archs = [parse_arch(name) for name in arch] if arch else ARCHITECTURES
        if kernel is not None:
            check_kernel(kernel)
        check_compiler()
    with progress_bar("compiling") as progress:
        rows = kernel_report(archs, kernel, progress)
    write_json(json, rows)
    table = make_table(
        "compiled kernels; the limiting unit and its tensor share are predicted, nothing was measured",
        *("kernel", "arch", "registers", "spills", "stack", "shared", "CTAs/SM"),
        *("loop", "MMA", "ALU/MMA", "all/MMA", "limit", "tensor share"),
    )
    for row in rows:
        loop, share = row["loop"], row["predicted"]["tensor_core_share"]
        per_mma = [f"{loop[kind] / loop['mma']:.2f}" if loop["mma"] else "" for kind in ("alu", "all")]
        table.add_row(
            f"{row['kernel']}  {config_text(row['config'])}",
            *(str(row[key]) for key in ("arch", "registers", "spills", "stack_bytes", "shared_bytes", "ctas_per_sm")),
            *(str(loop["all"]), str(loop["mma"]), *per_mma),
            *(row["limiting_unit"], f"{share:.0%}" if share else ""),
        )
    print_table(table)


@kernels_app.command("predict")
def kernels_predict(
    batch: Annotated[
        list[int] | None, typer.Option("--batch", min=1, help="Images a pass; repeat it. [default: 1 64]")
    ] = None,
    gpu: Annotated[
        list[str] | None,
        typer.Option("--gpu", metavar="NAME", help="Such as H100; repeat it. [default: A100, H100, Orin, RTX 4090]"),
    ] = None,
    json: Json = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", metavar="FILE", help="Also write the result as a document.")
    ] = None,
) -> None:
    """Latency of ViT-B that a static model predicts for GPUs that need not be here; nothing is measured."""
    from tetra.autotune.hardware import find_product
    from tetra.config import BACKBONES
    from tetra.files import atomic_write
    from tetra.kernels.ahead_of_time import check_compiler
    from tetra.profiling.model_cost import PREDICTED_GPUS, predict_model, to_markdown

    check_json_path(json)
    check_json_path(markdown)
    with user_errors():
        products = [find_product(name) for name in gpu or PREDICTED_GPUS]
        check_compiler()
    work = [(product, size) for product in products for size in batch or (1, 64)]
    rows = []
    with progress_bar("predicting") as progress:
        for done, (product, size) in enumerate(work):
            progress(done, len(work), f"{product.name}, batch {size}")
            rows.append(predict_model(product, BACKBONES["vit-b"], size))
    write_json(json, rows)
    if markdown is not None:
        with atomic_write(markdown) as file:
            file.write(to_markdown(rows, "vit-b").encode())
    table = make_table(
        "ViT-B: PREDICTED by a static model, nothing here was measured",
        *(
            "GPU",
            "batch",
            "predicted ms",
            "bound ms",
            "share of bound",
            "launches",
            "overhead ms",
            "mostly limited by",
        ),
    )
    for row in rows:
        limits = row["limited_by_ms"]
        numbers = (f"{row['predicted_ms']:.3f}", f"{row['bound_ms']:.3f}", f"{row['share_of_bound']:.0%}")
        most = max(limits, key=lambda unit: limits[unit])
        table.add_row(row["gpu"], str(row["batch"]), *numbers, str(row["launches"]), f"{row['overhead_ms']:.3f}", most)
    print_table(table)
    print(f"formula: {rows[0]['formula']}")


def _config_values(texts: list[str] | None) -> dict[str, str]:
    """{"BLOCK_M": "64"} from ["BLOCK_M=64"]."""
    values = {}
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise ConfigError(f"--config {text!r}: wanted NAME=VALUE, such as BLOCK_M=64")
        values[name] = value
    return values


@kernels_app.command("loop")
def kernels_loop(
    kernel: Annotated[str, typer.Argument(metavar="KERNEL", help="Such as ternary_matmul.")],
    arch: Annotated[str, typer.Option("--arch", metavar="ARCH", help="Such as sm_87.")] = "sm_80",
    config: ConfigValues = None,
    json: Json = None,
) -> None:
    """The main loop of a compiled kernel, instruction by instruction with its class; needs no GPU."""
    from tetra.kernels.ahead_of_time import check_compiler, parse_arch
    from tetra.profiling.static_profile import find_specimen, loop_view

    check_json_path(json)
    values = _config_values(config)
    with user_errors():
        number = parse_arch(arch)
        specimen, n_fitting = find_specimen(kernel, number, values)
        check_compiler()
        row = loop_view(specimen, number)
    write_json(json, row)
    print(f"{kernel}  {config_text(row['config'])}, {row['arch']}")
    if n_fitting > 1:
        print(f"the first of {n_fitting} configurations; --config NAME=VALUE chooses another")
    what = "main loop" if row["has_loop"] else "all instructions: the kernel has no loop"
    print(f"\n{what}, {len(row['lines'])} instructions")
    width = max(len(line["kind"]) for line in row["lines"])
    for line in row["lines"]:
        print(f"  {line['address']:#06x}  {line['kind']:<{width}}  {line['text']}")
    share = row["predicted"]["busy_share"]
    table = make_table("by class", "class", "instructions", "share", "for each MMA")
    loop = row["loop"]
    for kind in sorted(
        (k for k in loop if loop[k] and k not in ("all", "prmt", "i2f", "mma_shape")), key=lambda k: -loop[k]
    ):
        each = f"{loop[kind] / loop['mma']:.2f}" if loop["mma"] else ""
        table.add_row(kind, str(loop[kind]), f"{loop[kind] / loop['all']:.0%}", each)
    print_table(table)
    print(
        f"{row['registers']} registers, {row['spills']} spills, {row['stack_bytes']} bytes of stack, "
        f"{row['shared_bytes']} bytes of shared memory (limit {row['shared_bytes_limit']}), {row['num_warps']} warps; "
        f"{row['ctas_per_sm']} blocks fit a multiprocessor; "
        f"{row['n_loops']} loops in {row['instructions']} instructions"
    )
    busy = ", ".join(f"{unit} {part:.0%}" for unit, part in sorted(share.items(), key=lambda u: -u[1]) if part >= 0.005)
    print(f"predicted on {row['predicted']['on']}, not measured: limited by {row['limiting_unit']}; busy: {busy}")


class Model(str, Enum):
    """Stock architectures."""

    vit_s = "vit-s"
    vit_b = "vit-b"
    nano = "nano"


@kernels_app.command("roofline")
def kernels_roofline(
    gpu: Annotated[
        str, typer.Option("--gpu", metavar="NAME", help="Such as H100 or Orin; cpu for this machine's CPU.")
    ],
    model: Annotated[Model, typer.Option(help="Architecture whose launches are predicted.")] = Model.vit_b,
    batch: Annotated[int, typer.Option(min=1, help="Images a pass.")] = 1,
    measured: Annotated[
        list[Path] | None,
        typer.Option("--measured", metavar="FILE", help="Of tetra bench --json or tetra tune measure; repeat it."),
    ] = None,
    predict: Annotated[bool, typer.Option("--predict/--no-predict", help="Predicted points too.")] = True,
    png: Annotated[Path | None, typer.Option("--png", metavar="FILE", help="Draw the chart.")] = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write the chart as a page.")] = None,
    json: Json = None,
) -> None:
    """Every kernel's operations a second beside what the chip can do at most; predicted points need no GPU."""

    from tetra.autotune.hardware import find_product
    from tetra.config import BACKBONES
    from tetra.files import atomic_write
    from tetra.kernels.ahead_of_time import check_compiler
    from tetra.profiling import roofline_chart as chart

    for path in (json, png, html):
        check_json_path(path)
    if png is not None:
        import matplotlib.figure  # noqa: F401
    with user_errors():
        if gpu.lower() == "cpu":
            import torch

            from tetra.timing import environment

            drawn = chart.cpu_chart(environment(torch.device("cpu"))["device_name"], measured or [])
        else:
            product = find_product(gpu)
            if predict:
                check_compiler()
            with progress_bar("predicting") as progress:
                drawn = chart.gpu_chart(
                    product, BACKBONES[model.value], batch, measured or [], predict=predict, progress=progress
                )
    found = drawn.to_json()
    write_json(json, found)
    if png is not None:
        with atomic_write(png) as file:
            chart.draw_png(drawn, file)
    if html is not None:
        with atomic_write(html) as file:
            file.write(chart.draw_html(drawn).encode())
    columns = ("", "figures", "operations a byte", "T operations/s", "us", "share of roof", "roof", "waits for")
    table = make_table(f"{drawn.device}: roofline", *columns)
    for point in found["points"]:
        figures = f"{point['intensity']:.4g}", f"{point['performance'] / 1e12:.4g}", f"{1e6 * point['seconds']:.4g}"
        share = f"{point['share_of_roof']:.0%}"
        name = f"{point['name']}  {point['shape']}"
        table.add_row(name, point["label"], *figures, share, point["roof"], point["limit"])
    print_table(table)
    for note in drawn.notes:
        print(printable(note))


@kernels_app.command("check")
def kernels_check(
    base: Annotated[
        str | None, typer.Option("--base", metavar="REV", help="What to compare with: a commit, branch or tag.")
    ] = None,
    head: Annotated[
        str | None, typer.Option("--head", metavar="REV", help="What is compared. [default: the files as they are]")
    ] = None,
    arch: Annotated[
        list[str] | None,
        typer.Option("--arch", metavar="ARCH", help="Such as sm_87; repeat it. [default: sm_80 sm_90]"),
    ] = None,
    kernel: Annotated[
        list[str] | None, typer.Option("--kernel", metavar="NAME", help="Only this one; repeat it.")
    ] = None,
    config: ConfigValues = None,
    slack: Annotated[
        list[str] | None,
        typer.Option(
            "--slack",
            metavar="[CLASS=]PERCENT",
            help="By how much a count may rise, such as 2 or alu=5. [default: 1, instructions=10, copied_bytes=0]",
        ),
    ] = None,
    repo: Annotated[Path, typer.Option("--repo", metavar="DIR", help="The checkout.")] = Path("."),
    baseline: Annotated[
        Path | None, typer.Option("--baseline", metavar="FILE", help="A profile to compare with, in place of --base.")
    ] = None,
    write_baseline: Annotated[
        Path | None, typer.Option("--write-baseline", metavar="FILE", help="Write the profile of what is compared.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that compile. [default: as many as there are cores]")
    ] = None,
    json: Json = None,
) -> None:
    """What a change of the sources does to the compiled kernels and to what the operations launch; needs no GPU.

    Exit status: 0 if nothing is worse beyond the slack, 1 if something is or could not be compared, 2 for bad input.
    """
    from tetra.kernels.ahead_of_time import check_compiler, parse_arch
    from tetra.profiling import static_profile as static

    for path in (json, write_baseline):
        check_json_path(path)
    if base is not None and baseline is not None:
        raise ConfigError("--base and --baseline both say what to compare with; give one of them")
    if base is None and baseline is None and write_baseline is None:
        raise ConfigError("nothing to compare with; give --base REV, --baseline FILE or --write-baseline FILE")
    calls = (Path(static.__file__).with_name("traced_calls.py"), Path(__file__).with_name("traced_model.py"))
    values = tuple(_config_values(config).items())
    with user_errors(), progress_bar("profiling") as progress, ExitStack() as trees:
        archs = tuple(dict.fromkeys(parse_arch(name) for name in arch or ("sm_80", "sm_90")))
        allowed = static.parse_slack(slack or [])
        check_compiler()
        before = static.read_profile(baseline) if baseline is not None else None
        root = static.repository_root(repo)
        for revision in (base, head):
            if revision is not None:
                static.commit_of(root, revision)  # before the kernels are compiled
        static.check_kernel_files(root, head, kernel or ())
        request = static.Request(archs, None if kernel is None else tuple(sorted(set(kernel))), values, calls)

        def open_tree(revision: str | None) -> tuple[Path, str]:
            if revision is None:
                return root, "the files as they are"
            tree, commit = trees.enter_context(static.tree_of(root, revision))
            return tree, f"{revision} ({commit})"

        def profile(tree: Path, name: str) -> dict[str, Any]:
            return static.profile_tree(tree, request, name=name, workers=workers, progress=progress)

        head_tree, name = open_tree(head)
        after = profile(head_tree, name)
        if kernel is not None:
            _check_some_found(after, kernel)
        if write_baseline is not None:
            write_json(write_baseline, after)
        if base is not None:
            base_tree, name = open_tree(base)
            before = profile(base_tree, name)
            before["others"] = static.other_choices(
                base_tree, request, before, after, workers=workers, progress=progress
            )
        found = None
        if before is not None:
            after["others"] = static.other_choices(
                head_tree, request, after, before, workers=workers, progress=progress
            )
            found = static.compare(before, after, allowed)
    if found is None:
        print(f"profile of {after['name']} written to {write_baseline}: {len(after['kernels'])} compiled kernels")
        return
    assert before is not None
    write_json(json, {"base": before["name"], "head": after["name"], "slack_percent": allowed, **found.to_json()})
    _print_comparison(found, before["name"], after["name"])
    if found.regressions:
        raise typer.Exit(1)


def _check_some_found(profile: dict[str, Any], kernels: list[str]) -> None:
    there = {row["kernel"] for row in profile["kernels"]}
    missing = sorted(set(kernels) - there)
    if missing:
        wanted = ", ".join(missing)
        raise ConfigError(
            f"{profile['name']}: no compiled kernel {wanted} with such a configuration; see tetra kernels report"
        )


def _print_comparison(found: Comparison, base: str, head: str) -> None:
    """One line a difference; what is worse first."""
    print(f"{head} compared with {base}; static counts, nothing was measured")
    for finding in found.findings:
        print(printable(f"  {'WORSE' if finding.is_regression else 'note '}  {finding.where}: {finding.text()}"))
    n = len(found.regressions)
    verdict = "nothing is worse" if found.n_kernels else f"nothing could be compared: {base} has no such kernels"
    if n:
        verdict = f"{n} regression{'' if n == 1 else 's'}"
    print(f"{verdict}; {found.n_same} of {found.n_compared} kernels and operations are the same")
