"""``tetra tune``: which configuration each kernel uses on a chip, and how that was found out."""

from __future__ import annotations

import typer

tune_app = typer.Typer(
    no_args_is_help=True, help="Choose the kernels' configurations, with a GPU or without.", rich_markup_mode=None
)
