"""What both stages share: step-exact data order and randomness, checkpoints, logs, precision, several processes.

Started by ``torchrun``, a stage runs in Lightning's DistributedDataParallel: batches are shared out
(:mod:`tetra.training.distributed`), losses and figures are means over the processes, the first process writes files.
"""

from __future__ import annotations

import csv
import logging
import re
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tetra.config import check_range
from tetra.errors import ConfigError, TetraError, TrainingError
from tetra.model import TetraModel
from tetra.training import distributed, guard
from tetra.training.checkpoint import SafetensorsCheckpointIO, load_checkpoint
from tetra.training.data import StepSampler, has_bfloat16

CHECKPOINT = "last.ckpt.safetensors"
logger = logging.getLogger("tetra.training")
Precision = Literal["auto", "bf16-mixed", "32-true"]
Recompute = Literal["nothing", "attention", "blocks"]


@dataclass(frozen=True)
class LoopConfig:
    """How to run a stage.

    Attributes:
        seed: of data order, augmentation, dropout and fresh parameters.
        precision: "auto" is bfloat16 autocast where the device has it.
        accumulate: batches per optimiser step.
        checkpoint_every: optimiser steps between checkpoints.
        validate_every: optimiser steps between validations; 0 validates once an epoch. One more comes at the end.
        log_every: optimiser steps between log rows.
        workers: processes that load data; 0 loads in the training process.
        threads: CPU threads; 0 leaves torch's choice.
        clip: largest norm of the gradient; 0 turns clipping off.
        ema: decay of a running average of the weights, which is validated and is the stage's result; 0 keeps none.
        recompute: activations that the backward pass makes again instead of keeping them: those of each block's
            "attention", of whole "blocks", or "nothing". Saves memory, costs time, changes no result.
        compile: run the blocks through torch.compile, composed of plain modules, instead of this project's kernels.
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
    ema: float = 0.0
    recompute: Recompute = "nothing"
    compile: bool = False

    def __post_init__(self) -> None:
        check_range("loop", self, "accumulate checkpoint_every log_every", 1)
        check_range("loop", self, "validate_every workers threads clip", 0)
        check_range("loop", self, "seed", 0, 2**63 - 1)
        check_range("loop", self, "ema", 0, 1)
        if self.ema == 1.0:
            raise ConfigError("loop: 'ema' is 1.0, and the average would never move; expected less, such as 0.999")


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """A 63-bit seed for one step of one process: two processes don't draw the same for different images."""
    text = f"{seed}/{step}/{rank}" if rank else f"{seed}/{step}"
    return int.from_bytes(sha256(text.encode()).digest()[:8], "little") >> 1


class Averages:
    """Running averages of the parameters of ``module`` that train: a <- d a + (1 - d) w after every step.

    d is ``decay``, and less in the first steps, (1 + step) / (10 + step), so that the start is soon forgotten.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.values = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after ``step`` steps."""
        share = 1.0 - min(self.decay, (1 + step) / (10 + step))
        weights = [p.detach() for p in self.parameters.values()]
        values = [v.to(w.device) for v, w in zip(self.values.values(), weights, strict=True)]
        torch._foreach_lerp_(values, weights, share)
        self.values = dict(zip(self.parameters, values, strict=True))

    def load(self, values: dict[str, Tensor]) -> None:
        """Go on with saved ``values``."""
        self.values = {name: values[name].clone() for name in self.parameters}

    @torch.no_grad()
    def exchange(self) -> None:
        """Put the averages where the weights are, and the weights here."""
        for name, parameter in self.parameters.items():
            average = self.values[name].to(parameter.device)
            self.values[name] = parameter.detach().clone()
            parameter.copy_(average)


class StageModule(L.LightningModule):
    """Base of both stages' modules.

    Subclasses implement :meth:`loss` and hold ``model``; ``optimizer`` and ``lr_factor`` are given.

    Args:
        loop: see :class:`LoopConfig`.
        n_steps: optimiser steps of the whole stage.
        validate: called with the module at each validation, returns figures to log.
    """

    model: TetraModel

    def __init__(self, loop: LoopConfig, n_steps: int, validate: Callable[[], dict[str, float]] | None) -> None:
        super().__init__()
        self.loop, self.n_steps, self._validate = loop, n_steps, validate
        self.lr, self.weight_decay = 1e-4, 0.0
        self.folder = Path()
        self.averages: Averages | None = None
        self._grad_norm = torch.zeros(())
        self._seen: tuple[dict[str, Tensor], dict[str, Tensor], int] = ({}, {}, 0)  # batch, losses, seed

    def lr_factor(self, step: int) -> float:
        """Learning rate at an optimiser step as a factor of the base rate."""
        raise TypeError(f"{type(self).__name__} lacks lr_factor")

    def loss(self, batch: dict[str, Tensor], progress: float) -> dict[str, Tensor]:
        """Named losses of a batch; "loss" is minimised."""
        raise TypeError(f"{type(self).__name__} lacks loss")

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        accumulate = self.loop.accumulate
        step = self.global_step * accumulate + batch_idx % accumulate
        progress = min(1.0, step / (self.n_steps * accumulate))
        seed = step_seed(self.loop.seed, step, distributed.rank())
        torch.manual_seed(seed)
        try:
            losses = self.loss(batch, progress)
        except ValueError as error:
            if not guard.is_refusal(error):
                raise
            losses = {"loss": torch.tensor(torch.nan)}  # a layer has refused its weight; look for it as for others
        self._seen = batch, {name: loss.detach() for name, loss in losses.items()}, seed
        own = torch.stack([loss.detach().float().to(self.device) for loss in losses.values()])
        figures = dict(zip(losses, distributed.mean(own), strict=True))
        if not torch.isfinite(figures["loss"]):

            def again() -> None:
                torch.manual_seed(seed)
                self.loss(batch, progress)

            with distributed.alone():
                where = guard.locate(self, batch, again)
            self._refuse("loss", where, guard.bad_term(self._seen[1]))
        self.log_dict({k: v for k, v in figures.items() if k in ("loss", "lambda")}, prog_bar=True)
        self.log_dict({k: v for k, v in figures.items() if k not in ("loss", "lambda")})
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        if (self.global_step + 1) % self.loop.log_every == 0 and (batch_idx + 1) % accumulate == 0:
            self.log("zero_weights", guard.zero_share(self.model))
        return losses["loss"]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self._grad_norm = torch.nn.utils.get_total_norm(gradients)
        if not torch.isfinite(self._grad_norm):
            # It began in the last of them, since gradients go from the loss to the stem.
            bad = guard.bad_names((name, p.grad) for name, p in self.named_parameters())
            self._refuse("gradient", f"the gradient of '{bad[-1]}'" if bad else "the norm of the gradient")
        self.log("grad_norm", self._grad_norm)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if gradient_clip_val:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, self._grad_norm)

    def _refuse(self, what: str, where: str | None, vague: str | None = None) -> None:
        """Stop because of numbers that are not finite. Processes that have found some write a dump, one reports.

        Args:
            what: is not finite, in all processes.
            where: it began, if in this process; ``vague`` stands in where no process knows.

        Raises:
            TrainingError: always; of the first process that knows more.
            distributed.Stopped: in the others.
        """
        batch, losses, seed = self._seen
        known = distributed.tell(where)
        if not any(known):
            where, known = vague, distributed.tell(vague)
        reporter = next((rank for rank, text in enumerate(known) if text), 0)
        values = {name: float(value) for name, value in losses.items()}
        with distributed.together():  # torchrun ends all when the first of them leaves
            if where is None and distributed.rank() != reporter:
                return
            report = {
                "step": self.global_step,
                "where": where,
                "seed": seed,
                "rank": distributed.rank(),
                "losses": {name: repr(value) for name, value in values.items()},
            }
            name = f"rank{distributed.rank()}-{guard.DUMP}" if distributed.is_on() else guard.DUMP
            try:
                kept = f"what is needed to see it again is in {guard.dump(self.folder, name, report, batch, self)}"
            except TrainingError as error:
                kept = f"and no dump could be written: {error}"
            if distributed.rank() == reporter:
                figures = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
                raise TrainingError(
                    f"step {self.global_step}: the {what} is not finite ({figures}); it began in {where}; {kept}; "
                    "lower the learning rate or change the seed, and begin again in another folder"
                )

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.averages is not None:
            self.averages.update(self.global_step + 1)  # which counts this step only later

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        bad = guard.bad_names(self.named_parameters())
        if bad:  # the checkpoint before is worth more
            raise self._overflow(f"the weight '{bad[0]}' has NaN or infinite values")
        checkpoint["world_size"] = distributed.world_size()
        if self.averages is not None:
            checkpoint["averages"] = self.averages.values

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.averages is not None:
            self.averages.load(checkpoint.get("averages", checkpoint["state_dict"]))

    def _overflow(self, what: str) -> TrainingError:
        """The error for weights that have become useless in a step whose loss and gradient were finite."""
        return TrainingError(
            f"step {self.global_step}: {what}; lower the learning rate and begin again in another folder"
        )

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within this context the weights are their averages, if the stage keeps some."""
        if self.averages is None:
            yield
            return
        self.averages.exchange()
        try:
            yield
        finally:
            self.averages.exchange()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        decayed = [p for p in self.parameters() if p.requires_grad and p.dim() >= 2]
        plain = [p for p in self.parameters() if p.requires_grad and p.dim() < 2]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def validate(self) -> dict[str, float]:
        """Figures of the validation set, of the averaged weights; modes, weights and random state are restored.

        Raises:
            TrainingError: a layer refuses its weight or its input for numbers that are not finite.
        """
        if self._validate is None:
            return {}
        modes = {m: m.training for m in self.modules()}
        own_gpu = [self.device.index or 0] if self.device.type == "cuda" else []  # other processes train on the others
        try:
            self.eval()
            with self.averaged(), torch.random.fork_rng(own_gpu), torch.inference_mode():
                return self._validate()
        except ValueError as error:
            if not guard.is_refusal(error):
                raise
            raise self._overflow(f"validation: {error}") from None
        finally:
            for module, mode in modes.items():
                module.training = mode


class _Keeper(Callback):
    """Saves checkpoints and validates between steps; ends the training after SIGTERM."""

    def __init__(self, folder: Path, loop: LoopConfig, sampler: StepSampler) -> None:
        self.folder, self.loop, self.sampler = folder, loop, sampler
        self.is_terminated = False

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        # Lightning's handler tells the other processes, and waits for them even if they are amid something else.
        # It puts back what was there before at the end.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._terminate)

    def _terminate(self, *_: Any) -> None:
        self.is_terminated = True
        raise SIGTERMException

    def _ends_an_epoch(self, step: int) -> bool:
        """Whether the step before ``step`` was the last one of a pass over the data."""
        steps = step * self.loop.accumulate, (step - 1) * self.loop.accumulate
        return self.sampler.epoch_at(steps[0]) > self.sampler.epoch_at(steps[1])

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        # Between two optimiser steps all of Lightning's counters agree; in on_train_batch_end they don't yet.
        step = trainer.global_step
        if batch_idx % self.loop.accumulate or step == 0:
            return
        every = self.loop.validate_every
        if step % every == 0 if every else self._ends_an_epoch(step):
            self.validate(trainer, module)
        if step % self.loop.checkpoint_every == 0:
            for log in trainer.loggers:  # no row before the checkpoint would be written again
                log.save()
            trainer.save_checkpoint(self.folder / CHECKPOINT)

    def validate(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, StageModule)
        figures = module.validate()
        if figures:
            for log in trainer.loggers:
                log.log_metrics(figures, step=trainer.global_step)
            text = ", ".join(f"{name} {value:.1f}" for name, value in figures.items())
            logger.info("step %d: %s", trainer.global_step, text)


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
    same result as an uninterrupted run on the same machine with as many processes.

    Args:
        batch_size: items of a batch, in all processes together.

    Raises:
        ConfigError: the processes can't share a batch equally.
        FileFormatError: the checkpoint is damaged.
        TrainingError: a loss is not finite (with a dump in ``folder``), a checkpoint can't be written, or one is there
            and ``resume`` is off; or another process died, or finds another checkpoint or other data.
        SystemExit: with status 143 after SIGTERM.
    """
    loop = module.loop
    module.folder = folder
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / CHECKPOINT
    n_items = len(dataset)  # type: ignore[arg-type]
    with distributed.together():
        start = _first_step(checkpoint, module, resume)
        for left in folder.glob(f".{CHECKPOINT}.*.tmp") if distributed.rank() == 0 else ():
            left.unlink()  # of a process that was killed while it wrote
    _check_same_everywhere(folder, "step of the last checkpoint", start)
    _check_same_everywhere(folder, "number of training items", n_items)
    if loop.threads:
        torch.set_num_threads(loop.threads)
    if loop.ema:
        module.averages = Averages(module, loop.ema)
    sampler = StepSampler(
        n_items,
        batch_size,
        module.n_steps * loop.accumulate,
        loop.seed,
        with_epoch,
        distributed.rank(),
        distributed.world_size(),
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
    keeper = _Keeper(folder, loop, sampler)
    callbacks: list[Callback] = [keeper]
    if progress:
        callbacks.append(TQDMProgressBar(refresh_rate=10))
    _quiet()
    plugins: list[Any] = [SafetensorsCheckpointIO()]
    if distributed.is_on():
        plugins.append(TorchElasticEnvironment())
    trainer = L.Trainer(
        accelerator=accelerator,
        devices=distributed.local_world_size(),
        num_nodes=distributed.world_size() // distributed.local_world_size(),
        strategy=_strategy(accelerator),
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
        plugins=plugins,
        enable_checkpointing=False,
        enable_progress_bar=progress,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    module.train()  # Lightning keeps whatever mode it finds
    with _options(module.model, loop):
        if start < module.n_steps:
            _fit(trainer, module, loader, checkpoint, start, keeper)
        else:
            saved = load_checkpoint(checkpoint)
            module.load_state_dict(saved["state_dict"])
            module.on_load_checkpoint(saved)
    if module.averages is not None:  # the checkpoint has both; the stage's result are the averages
        module.averages.exchange()
        module.averages = None
    module.to(trainer.strategy.root_device)  # Lightning has left it on the CPU
    figures = module.validate()
    module.cpu()
    if figures and all(row["step"] < module.n_steps for row in read_log(folder)):
        for log in trainer.loggers:
            log.log_metrics(figures, step=module.n_steps)
            log.save()
    return figures


def _first_step(checkpoint: Path, module: StageModule, resume: bool) -> int:
    """The step to begin with: behind the checkpoint, if there is one, which has to be one of ``module``."""
    if not checkpoint.exists():
        return 0
    if not resume:
        raise TrainingError(f"{checkpoint}: a training lies here already; resume it or choose another folder")
    saved = load_checkpoint(checkpoint)
    _check_fits(checkpoint, saved["state_dict"], module)
    before = saved.get("world_size", 1)
    if before != distributed.world_size():
        logger.warning(
            "%s was written by %s processes and goes on with %d: batches stay as they were, but each process draws "
            "its own augmentation, so that the result will be another one",
            *(checkpoint, before, distributed.world_size()),
        )
    return int(saved["global_step"])


def _fit(
    trainer: L.Trainer, module: StageModule, loader: DataLoader[Any], checkpoint: Path, start: int, keeper: _Keeper
) -> None:
    """Run the steps from ``start`` on, and write the last checkpoint."""
    try:
        with distributed.lost_process(
            f"{checkpoint} is as it was when it was last written: start all of them again, with --resume"
        ):
            trainer.fit(module, loader, ckpt_path=checkpoint if start else None)
            trainer.save_checkpoint(checkpoint)
    except TetraError as error:
        if not module.loop.workers or "Original Traceback" not in str(error):
            raise
        # A loader's process sends its whole traceback as the message; the last line is "class: message".
        message = str(error).strip().splitlines()[-1].partition(": ")[2]
        raise type(error)(message) from None
    except distributed.Stopped:
        raise
    except (SystemExit, RuntimeError) as stop:
        worker = isinstance(stop, RuntimeError)
        if worker and not re.search(r"DataLoader worker .*(killed|exited)", str(stop)):
            raise
        if worker and not keeper.is_terminated:
            raise TrainingError(
                f"step {trainer.global_step}: a process that loads images was killed, perhaps because memory ran out; "
                "lower 'workers' and go on with --resume"
            ) from None
        # Lightning ends the process by itself: after SIGTERM as if all were well, after Ctrl-C as after a bug.
        logger.info(
            "stopped at step %d of %d; resuming goes on from the last checkpoint", trainer.global_step, module.n_steps
        )
        if keeper.is_terminated:
            raise SystemExit(128 + signal.SIGTERM) from None
        raise KeyboardInterrupt from None


def _strategy(accelerator: str) -> Any:
    """How gradients are brought together. Every parameter that trains is used by every loss: none has to be found."""
    if not distributed.is_on():
        return "auto"
    return DDPStrategy(find_unused_parameters=False, process_group_backend="nccl" if accelerator == "gpu" else "gloo")


@contextmanager
def _options(model: TetraModel, loop: LoopConfig) -> Iterator[None]:
    """Within this context the backbone runs as ``loop`` says, and convolutions repeat their bits."""
    backbone, cudnn = model.backbone, torch.backends.cudnn
    before, was_deterministic = backbone.recompute, cudnn.deterministic
    backbone.recompute, cudnn.deterministic = loop.recompute, True
    try:
        if loop.compile:
            for block in backbone.blocks:
                block.compile()
        # What PyTorch 2.13 keeps on disk of a compiled block crashes the next process: its results that are views,
        # such as queries and keys, get sizes out of nowhere. Compiled kernels are still kept.
        with torch._functorch.config.patch(enable_autograd_cache=False):
            yield
    finally:
        backbone.recompute, cudnn.deterministic = before, was_deterministic
        for block in backbone.blocks:
            block._compiled_call_impl = None


def _check_fits(path: Path, saved: dict[str, Tensor], module: StageModule) -> None:
    """Refuse a checkpoint of another model before Lightning fails on each of its tensors."""
    here, there = ({name: tuple(t.shape) for name, t in state.items()} for state in (module.state_dict(), saved))
    name = next((name for name in sorted({*here, *there}) if here.get(name) != there.get(name)), None)
    if name is not None:
        raise TrainingError(
            f"{path}: of another model: '{name}' is {there.get(name, 'missing')} there and {here.get(name, 'missing')} "
            "in this recipe; resume with the recipe that the run began with, or choose another folder"
        )


def _check_same_everywhere(folder: Path, name: str, value: int) -> None:
    """Refuse to train processes of which each would do something else."""
    found = distributed.tell(value)
    with distributed.together():
        if len({*found}) > 1:
            raise TrainingError(
                f"{folder}: the {name} is {', '.join(map(str, found))} for the processes of this run; give all of them "
                "the same data and the same folder, on a file system that their machines share"
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
        lines = file.read_text().splitlines(keepends=True)
        for row in csv.DictReader(line for line in lines if line.endswith("\n")):  # a kill may cut the last one short
            values = {k: float(v) for k, v in row.items() if v}
            rows.setdefault((int(values["step"]), "loss" in values), {}).update(values)
    return [rows[key] for key in sorted(rows)]


__all__ = ["CHECKPOINT", "Averages", "LoopConfig", "StageModule", "read_log", "run_stage", "step_seed"]
