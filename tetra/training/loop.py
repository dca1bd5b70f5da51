"""What both stages share: step-exact data order and randomness, checkpoints, logs, precision."""

from __future__ import annotations

import csv
import logging
import signal
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tetra.config import check_range
from tetra.errors import TetraError, TrainingError
from tetra.training.checkpoint import SafetensorsCheckpointIO, load_checkpoint
from tetra.training.data import StepSampler, has_bfloat16

CHECKPOINT = "last.ckpt.safetensors"
Precision = Literal["auto", "bf16-mixed", "32-true"]


@dataclass(frozen=True)
class LoopConfig:
    """How to run a stage.

    Attributes:
        seed: of data order, augmentation, dropout and fresh parameters.
        precision: "auto" is bfloat16 autocast where the device has it.
        accumulate: batches per optimiser step.
        checkpoint_every: optimiser steps between checkpoints.
        validate_every: optimiser steps between validations; 0 only at the end.
        log_every: optimiser steps between log rows.
        workers: processes that load data; 0 loads in the training process.
        threads: CPU threads; 0 leaves torch's choice.
        clip: largest norm of the gradient; 0 turns clipping off.
    """

    seed: int = 0
    precision: Precision = "auto"
    accumulate: int = 1
    checkpoint_every: int = 200
    validate_every: int = 0
    log_every: int = 20
    workers: int = 0
    threads: int = 0
    clip: float = 0.0

    def __post_init__(self) -> None:
        check_range("loop", self, "accumulate checkpoint_every log_every", 1)
        check_range("loop", self, "validate_every workers threads clip", 0)
        check_range("loop", self, "seed", 0, 2**63 - 1)


def step_seed(seed: int, step: int) -> int:
    """A 63-bit seed for one step."""
    return int.from_bytes(sha256(f"{seed}/{step}".encode()).digest()[:8], "little") >> 1


class StageModule(L.LightningModule):
    """Base of both stages' modules.

    Subclasses implement :meth:`loss` and hold ``model``; ``optimizer`` and ``lr_factor`` are given.

    Args:
        loop: see :class:`LoopConfig`.
        n_steps: optimiser steps of the whole stage.
        validate: called with the module at each validation, returns figures to log.
    """

    def __init__(self, loop: LoopConfig, n_steps: int, validate: Callable[[], dict[str, float]] | None) -> None:
        super().__init__()
        self.loop, self.n_steps, self._validate = loop, n_steps, validate
        self.lr, self.weight_decay = 1e-4, 0.0

    def lr_factor(self, step: int) -> float:
        """Learning rate at an optimiser step as a factor of the base rate."""
        raise TypeError(f"{type(self).__name__} lacks lr_factor")

    def loss(self, batch: dict[str, Tensor], progress: float) -> dict[str, Tensor]:
        """Named losses of a batch; "loss" is minimised."""
        raise TypeError(f"{type(self).__name__} lacks loss")

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        accumulate = self.loop.accumulate
        step = self.global_step * accumulate + batch_idx % accumulate
        torch.manual_seed(step_seed(self.loop.seed, step))
        losses = self.loss(batch, min(1.0, step / (self.n_steps * accumulate)))
        if not torch.isfinite(losses["loss"]):
            figures = ", ".join(f"{k} {v.item():.4g}" for k, v in losses.items())
            raise TrainingError(
                f"step {self.global_step}: the loss is not finite ({figures}); lower the learning rate or resume "
                "from the last checkpoint with another seed"
            )
        self.log_dict({k: v.detach() for k, v in losses.items()}, prog_bar=True)
        return losses["loss"]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        decayed = [p for p in self.parameters() if p.requires_grad and p.dim() >= 2]
        plain = [p for p in self.parameters() if p.requires_grad and p.dim() < 2]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def validate(self) -> dict[str, float]:
        """Figures of the validation set in evaluation mode; the mode and the random state are restored."""
        if self._validate is None:
            return {}
        modes = {m: m.training for m in self.modules()}
        try:
            self.eval()
            with torch.random.fork_rng(), torch.inference_mode():
                return self._validate()
        finally:
            for module, mode in modes.items():
                module.training = mode


class _Keeper(Callback):
    """Saves checkpoints and validates between steps."""

    def __init__(self, folder: Path, loop: LoopConfig) -> None:
        self.folder, self.loop = folder, loop

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        # Between two optimiser steps all of Lightning's counters agree; in on_train_batch_end they don't yet.
        step = trainer.global_step
        if batch_idx % self.loop.accumulate or step == 0:
            return
        if self.loop.validate_every and step % self.loop.validate_every == 0:
            self.validate(trainer, module)
        if step % self.loop.checkpoint_every == 0:
            trainer.save_checkpoint(self.folder / CHECKPOINT)

    def validate(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, StageModule)
        figures = module.validate()
        if figures:
            for logger in trainer.loggers:
                logger.log_metrics(figures, step=trainer.global_step)
            text = ", ".join(f"{name} {value:.1f}" for name, value in figures.items())
            logging.getLogger("tetra.training").info("step %d: %s", trainer.global_step, text)


def run_stage(
    module: StageModule,
    dataset: Dataset[Any],
    batch_size: int,
    folder: Path,
    *,
    resume: bool,
    with_epoch: bool = False,
    collate: Callable[[list[Any]], Any] | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """Train ``module`` for its steps and return the figures of the last validation.

    Checkpoints and logs (CSV, TensorBoard) lie in ``folder``; with ``resume`` a checkpoint there is continued, to the
    same result as an uninterrupted run on the same machine.

    Raises:
        TrainingError: a loss is not finite, a checkpoint can't be written, or one is there and ``resume`` is off.
        SystemExit: with status 143 after SIGTERM.
    """
    loop = module.loop
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / CHECKPOINT
    if checkpoint.exists() and not resume:
        raise TrainingError(f"{checkpoint}: a training lies here already; resume it or choose another folder")
    start = 0
    if checkpoint.exists():
        saved = load_checkpoint(checkpoint)
        start = int(saved["global_step"])
        _check_fits(checkpoint, saved["state_dict"], module)
    if loop.threads:
        torch.set_num_threads(loop.threads)
    sampler = StepSampler(
        len(dataset),  # type: ignore[arg-type]
        batch_size,
        module.n_steps * loop.accumulate,
        loop.seed,
        with_epoch,
    )
    sampler.first_step = start * loop.accumulate
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=loop.workers,
        collate_fn=collate,
        persistent_workers=loop.workers > 0,
    )
    accelerator = "gpu" if torch.cuda.is_available() else "cpu"
    precision = loop.precision
    if precision == "auto":
        precision = "bf16-mixed" if has_bfloat16("cuda" if accelerator == "gpu" else "cpu") else "32-true"
    version = f"part{sum(1 for _ in folder.glob('csv/part*'))}"
    keeper = _Keeper(folder, loop)
    callbacks: list[Callback] = [keeper]
    if progress:
        callbacks.append(TQDMProgressBar(refresh_rate=10))
    _quiet()
    trainer = L.Trainer(
        accelerator=accelerator,
        devices=1,
        max_steps=module.n_steps,
        max_epochs=-1,
        precision=precision,
        accumulate_grad_batches=loop.accumulate,
        gradient_clip_val=loop.clip or None,
        logger=[
            CSVLogger(folder, "csv", version, flush_logs_every_n_steps=loop.log_every),
            TensorBoardLogger(folder, "tensorboard", version),
        ],
        log_every_n_steps=loop.log_every,
        callbacks=callbacks,
        plugins=[SafetensorsCheckpointIO()],
        enable_checkpointing=False,
        enable_progress_bar=progress,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    module.train()  # Lightning keeps whatever mode it finds
    if start < module.n_steps:
        try:
            trainer.fit(module, loader, ckpt_path=checkpoint if start else None)
        except TetraError as error:
            if not loop.workers or "Original Traceback" not in str(error):
                raise
            # A loader's process sends its whole traceback as the message; the last line is "class: message".
            message = str(error).strip().splitlines()[-1].partition(": ")[2]
            raise type(error)(message) from None
        except SystemExit as stop:
            # Lightning ends the process by itself: after SIGTERM as if all were well, after Ctrl-C as after a bug.
            logging.getLogger("tetra.training").info(
                "stopped at step %d of %d; resuming goes on from the last checkpoint",
                trainer.global_step,
                module.n_steps,
            )
            if isinstance(stop, SIGTERMException):
                raise SystemExit(128 + signal.SIGTERM) from None
            raise KeyboardInterrupt from None
        trainer.save_checkpoint(checkpoint)
    else:
        module.load_state_dict(load_checkpoint(checkpoint)["state_dict"])
    figures = module.validate()
    if figures and start < module.n_steps:
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=module.n_steps)
            logger.save()
    return figures


def _check_fits(path: Path, saved: dict[str, Tensor], module: StageModule) -> None:
    """Refuse a checkpoint of another model before Lightning fails on each of its tensors."""
    here, there = ({name: tuple(t.shape) for name, t in state.items()} for state in (module.state_dict(), saved))
    name = next((name for name in sorted({*here, *there}) if here.get(name) != there.get(name)), None)
    if name is not None:
        raise TrainingError(
            f"{path}: of another model: '{name}' is {there.get(name, 'missing')} there and {here.get(name, 'missing')} "
            "in this recipe; resume with the recipe that the run began with, or choose another folder"
        )


def _quiet() -> None:
    # Advice that does not hold here: samplers are ours, workers are a setting.
    for text in (
        ".*does not have many workers.*",
        ".*IterableDataset.*",
        ".*lr_scheduler.step.*",
        ".*save_dir.*",
        ".*Found .* module.s. in eval mode.*",
        ".*TensorBoard.*",
        ".*dataloader is not resumable.*",
        ".*LeafSpec.*",
    ):
        warnings.filterwarnings("ignore", text)
    for name in ("utilities.rank_zero", "accelerators.cuda", "trainer.connectors.checkpoint_connector"):
        logging.getLogger(f"lightning.pytorch.{name}").setLevel(logging.WARNING)


def read_log(folder: Path) -> list[dict[str, float]]:
    """Rows of a stage's CSV logs in step order; where a resumed part repeats steps, the later part counts."""
    rows: dict[tuple[int, bool], dict[str, float]] = {}
    for part in sorted(folder.glob("csv/part*"), key=lambda p: int(p.name[4:])):
        file = part / "metrics.csv"
        if not file.is_file():
            continue
        with file.open(newline="") as stream:
            for row in csv.DictReader(stream):
                values = {k: float(v) for k, v in row.items() if v}
                rows.setdefault((int(values["step"]), "loss" in values), {}).update(values)
    return [rows[key] for key in sorted(rows)]


__all__ = ["CHECKPOINT", "LoopConfig", "StageModule", "read_log", "run_stage", "step_seed"]
