"""The demo: a rendered town on which TeTRA does everything it exists for, told in one HTML report."""

from __future__ import annotations

from pathlib import Path

__all__ = ["run_demo"]


def run_demo(out_dir: str | Path, *, seed: int = 0, fast: bool = False, model: str | Path = "nano") -> Path:
    """Render a town, train, evaluate, pack and localise, and write ``out_dir/index.html``.

    Takes under five minutes on two cores; says what it does and draws progress bars as it goes. A second run into the
    same folder starts from scratch.

    Args:
        out_dir: folder of the report; ``town/`` in it holds the images, ``student/`` the training.
        seed: of the town and the training.
        fast: a much smaller town and a few training steps, to try the machinery.
        model: the model that is shown: a file, or the name of a shipped one.

    Returns:
        The path of the report.

    Raises:
        TetraError: a package of the extra ``demo`` is missing, or the model or the folder can't be used.
    """
    from tetra.demo.steps import run
    from tetra.files import writing_into

    with writing_into(out_dir):
        return run(Path(out_dir), seed=seed, fast=fast, model_name=model)
