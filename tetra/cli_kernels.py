"""``tetra kernels``: what the compiled kernels cost, read from their machine code; needs no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tetra.cli_parts import (
    Json,
    check_json_path,
    config_text,
    make_table,
    print_table,
    progress_bar,
    user_errors,
    write_json,
)

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
