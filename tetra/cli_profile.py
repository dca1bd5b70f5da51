"""``tetra profile``: where time and bytes go, by the profilers' own tools."""

from __future__ import annotations

import typer

profile_app = typer.Typer(
    no_args_is_help=True, help="Where time and bytes go: Nsight, traces, rooflines.", rich_markup_mode=None
)
