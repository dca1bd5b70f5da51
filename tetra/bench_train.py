"""Training: images a second, and what is kept for the backward pass; this project's kernels beside plain PyTorch.

A *case* is a stage's whole step (forward, losses, backward, optimiser) or one component (forward and backward). Its
variants take turns (see :mod:`tetra.timing`), the first is what the others are compared with, and for each what
autograd keeps is counted (:mod:`tetra.saved_tensors`). All run under bfloat16 autocast, blended at lambda 1/2, with
the architecture's dropout, on one model and one batch.

- ``torch, sdpa``: plain modules with fused attention; losses of normalised tokens and of one map of averaged logits.
- ``torch, maps``: the reference's formulation of TeTRA-VPR (arXiv 2503.02511): matmul, softmax and dropout of the
  weights for the attention of every block, and the attention loss from a map of every head.
- ``tetra``: this project's kernels; ``tetra, attention again`` and ``tetra, blocks again``: with recomputation, see
  :class:`tetra.vit.VisionTransformer`.

The teacher's outputs are given, and not timed: tokens, and queries and keys of the last blocks, as wide as ViT-B's.
What a loss keeps of them is counted, for it stays alive until the backward pass; the teacher's weights are not.

Stage 2 freezes all blocks but the last. The frozen ones run this project's inference; in plain PyTorch, products of
values that are quantised at every call, as while training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tetra.config import BackboneConfig, ModelConfig, model_config
from tetra.errors import ConfigError
from tetra.kernels import attention_distillation, attention_train, token_loss
from tetra.kernels.backend import backend_for
from tetra.layers import TernaryLinear, add_dropped, set_lambda, train_linear
from tetra.model import TetraModel
from tetra.saved_tensors import Saved, count_saved, total_bytes
from tetra.timing import Progress, Times, check_positive, environment, forced_backend, take_turns
from tetra.timing import threads as _threads
from tetra.vit import Attention, Block, QueriesKeys, Recompute

Stage = Literal["distill", "finetune"]
STAGES: tuple[Stage, ...] = get_args(Stage)
RECOMPUTE: tuple[Recompute, ...] = get_args(Recompute)

PLAIN, MAPS, OWN = "torch, sdpa", "torch, maps", "tetra"
LAMBDA = 0.5
TEMPERATURE = 4.0
TOKEN_WEIGHT, PATCH_SHARE, ATTENTION_WEIGHT = 100.0, 0.3, 0.05 * 50 * TEMPERATURE**2
ATTENTION_LAYERS = 4
TEACHER_HEADS, TEACHER_HEAD_DIM = 12, 64  # ViT-B's
CNN_DIMS = 1280, 112  # CLS and patch tokens of the teacher of an architecture with a convolutional stem

MeanOfMaps = Callable[[Tensor, Tensor], Tensor]
TokenLoss = Callable[[Tensor, Tensor], Tensor]
AttentionLoss = Callable[[QueriesKeys, QueriesKeys], Tensor]


@dataclass
class Variant:
    """One way to compute a case.

    Attributes:
        loss: the forward pass, up to a scalar.
        context: around forward and backward.
        lse_bytes: what compiled attention keeps besides, where it did not run.
    """

    loss: Callable[[], Tensor]
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    lse_bytes: int = 0


@dataclass
class Case:
    """One computation: ``variants`` of it, the first the baseline.

    Attributes:
        stage: "distill" or "finetune"; "" for a component.
        name: what it is.
        shape: of its inputs.
        n_images, n_tokens: that pass through it.
        model: whose parameters are not counted.
        given: tensors that are not counted, because they exist anyway.
        leaves: inputs with a gradient.
        optimizer: its step ends the computation; None for components.
    """

    stage: str
    name: str
    shape: dict[str, Any]
    n_images: int
    n_tokens: int
    model: nn.Module = field(default_factory=nn.Module)
    given: list[Tensor] = field(default_factory=list)
    leaves: list[Tensor] = field(default_factory=list)
    optimizer: torch.optim.Optimizer | None = None
    variants: dict[str, Variant] = field(default_factory=dict)

    def step(self, variant: Variant) -> None:
        """Forward, backward and the optimiser's step."""
        with variant.context():
            variant.loss().backward()
        if self.optimizer is not None:
            self.optimizer.step()
        for tensor in (*self.model.parameters(), *self.leaves):
            tensor.grad = None

    def saved(self, variant: Variant) -> list[Saved]:
        """What is kept when the forward pass has ended."""
        with variant.context(), count_saved(self.model, self.given) as found:
            loss = variant.loss()
            saved = found()
        del loss
        return saved


# --- plain PyTorch -----------------------------------------------------------------------------------------


def torch_token_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error between L2-normalised tokens."""
    return F.mse_loss(F.normalize(student.float(), dim=-1), F.normalize(teacher.float(), dim=-1))


def averaged_logits(q: Tensor, k: Tensor) -> Tensor:
    """Attention logits [B, T, T] averaged over the heads, of queries and keys [B, H, T, E], by one product."""
    rows, columns = (x.transpose(1, 2).flatten(2) for x in (q, k))
    return rows @ columns.transpose(1, 2) / (q.shape[1] * q.shape[3] ** 0.5)


def averaged_maps(q: Tensor, k: Tensor) -> Tensor:
    """The same from a map of every head."""
    return (q @ k.transpose(-2, -1) / q.shape[3] ** 0.5).mean(1)


def torch_attention_loss(student: QueriesKeys, teacher: QueriesKeys, mean: MeanOfMaps = averaged_logits) -> Tensor:
    """KL(teacher || student) of the averaged logits, mean over all elements."""
    log_p, log_r = (F.log_softmax(mean(*side).float() / TEMPERATURE, dim=-1) for side in (student, teacher))
    return F.kl_div(log_p, log_r, log_target=True, reduction="sum") / log_p.numel()


def _heads(qkv: Tensor, n_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    b, t, width = qkv.shape
    q, k, v = qkv.view(b, t, 3, n_heads, width // (3 * n_heads)).permute(2, 0, 3, 1, 4)
    return q, k, v


def torch_attention(qkv: Tensor, n_heads: int) -> Tensor:
    """Fused attention on the output of the projection: [B, T, 3 H E] -> [B, T, H E]."""
    return F.scaled_dot_product_attention(*_heads(qkv, n_heads)).transpose(1, 2).flatten(2)


def attention_by_maps(qkv: Tensor, n_heads: int, dropout: float) -> Tensor:
    """The same by matmul, softmax, dropout and matmul."""
    q, k, v = _heads(qkv, n_heads)
    weights = torch.softmax(q @ k.transpose(-2, -1) * q.shape[3] ** -0.5, dim=-1)
    return (F.dropout(weights, dropout) @ v).transpose(1, 2).flatten(2)


def _branch_by_maps(attention: Attention, x: Tensor) -> tuple[Tensor, QueriesKeys]:
    qkv = train_linear(x, attention.qkv, attention.norm)
    y = attention_by_maps(qkv, attention.n_heads, attention.dropout.p)
    return train_linear(y, attention.out, attention.norm_out), _heads(qkv, attention.n_heads)[:2]


@contextmanager
def _maps_in(blocks: nn.ModuleList) -> Iterator[None]:
    """Within this context the attention of ``blocks`` is :func:`attention_by_maps`."""
    modules: list[Any] = [block.attention for block in blocks]
    for attention in modules:
        attention.branch = partial(_branch_by_maps, attention)
    try:
        yield
    finally:
        for attention in modules:
            del attention.branch


# --- cases -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Setting:
    """What every case needs to know."""

    config: ModelConfig
    batch: int
    device: torch.device
    recompute: tuple[Recompute, ...]
    attention_layers: int

    @property
    def backbone(self) -> BackboneConfig:
        return self.config.backbone

    @property
    def tokens(self) -> int:
        """Of an image."""
        return 1 + self.backbone.grid[0] * self.backbone.grid[1]

    @property
    def teacher_dims(self) -> tuple[int, int]:
        """Widths of the teacher's CLS and patch tokens."""
        return CNN_DIMS if self.backbone.stem == "conv" else (TEACHER_HEADS * TEACHER_HEAD_DIM,) * 2

    def random(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype)

    def teacher(self) -> QueriesKeys:
        """Queries and keys of one layer, from two projections, as in DINOv2; autocast makes them bfloat16."""
        shape = (self.batch, self.tokens, TEACHER_HEADS, TEACHER_HEAD_DIM)
        q, k = (self.random(*shape, dtype=torch.bfloat16).transpose(1, 2) for _ in "qk")
        return q, k

    def lse_bytes(self, n_blocks: int) -> int:
        """What compiled attention keeps of ``n_blocks`` besides, if it does not run here: float32 [B, H, T] each."""
        if backend_for(torch.empty(0, device=self.device)) not in ("torch", "native"):
            return 0
        return 4 * n_blocks * self.batch * self.backbone.n_heads * self.tokens

    def case(self, stage: str, name: str, shape: dict[str, Any], **rest: Any) -> Case:
        return Case(stage, name, shape, self.batch, self.batch * self.tokens, **rest)

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Plain modules, under autocast."""
        with forced_backend("torch"), self.own():
            yield

    @contextmanager
    def maps(self, blocks: nn.ModuleList) -> Iterator[None]:
        """The same with a map of every head."""
        with self.plain(), _maps_in(blocks):
            yield

    @contextmanager
    def own(self) -> Iterator[None]:
        """This project's kernels, under autocast."""
        with torch.autocast(self.device.type, torch.bfloat16):
            yield


def _own_name(recompute: Recompute) -> str:
    return OWN if recompute == "nothing" else f"{OWN}, {recompute} again"


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)


def _own_attention_loss(student: QueriesKeys, teacher: QueriesKeys) -> Tensor:
    return attention_distillation(*student, *teacher, temperature=TEMPERATURE)


def _distill_case(setting: _Setting) -> Case:
    """One step of stage 1."""
    backbone, batch, layers = setting.backbone, setting.batch, setting.attention_layers
    images = torch.rand(batch, 3, *backbone.image_size, device=setting.device)
    targets = [
        setting.random(batch, n, width) for n, width in zip((1, setting.tokens - 1), setting.teacher_dims, strict=True)
    ]
    teacher = [setting.teacher() for _ in range(layers)]
    student = TetraModel(replace(setting.config, head=None))
    widths = setting.teacher_dims
    projections = [nn.Identity() if w == backbone.width else nn.Linear(backbone.width, w) for w in widths]
    model = nn.ModuleDict({"student": student, "project_cls": projections[0], "project_patches": projections[1]})
    model.to(setting.device)
    set_lambda(model, LAMBDA)

    def loss(token_loss: TokenLoss, attention_loss: AttentionLoss, recompute: Recompute = "nothing") -> Tensor:
        student.backbone.recompute = recompute
        features = student.features(images, layers)
        found = [features.tokens[:, :1], features.patches]
        cls, patches = (token_loss(p(f), t) for p, f, t in zip(projections, found, targets, strict=True))
        total = TOKEN_WEIGHT * (cls + PATCH_SHARE * patches)
        if layers:
            pairs = zip(features.queries_keys, teacher, strict=True)
            total = total + ATTENTION_WEIGHT * torch.stack([attention_loss(s, t) for s, t in pairs]).mean()
        return total

    shape = {"image_size": list(backbone.image_size), "attention_layers": layers}
    case = setting.case("distill", "step", shape, model=model, given=[images], optimizer=_optimizer(model))
    by_maps = partial(torch_attention_loss, mean=averaged_maps)
    blocks = student.backbone.blocks
    case.variants[PLAIN] = Variant(partial(loss, torch_token_loss, torch_attention_loss), setting.plain)
    case.variants[MAPS] = Variant(partial(loss, torch_token_loss, by_maps), partial(setting.maps, blocks))
    for recompute in setting.recompute:
        own = partial(loss, token_loss, _own_attention_loss, recompute)
        lse_bytes = setting.lse_bytes(backbone.depth if recompute == "nothing" else 0)
        case.variants[_own_name(recompute)] = Variant(own, setting.own, lse_bytes)
    return case


def _labels(setting: _Setting) -> Tensor:
    """Four images a place, or two in small batches."""
    return torch.arange(setting.batch, device=setting.device) // (4 if setting.batch >= 8 else 2)


def _descriptor_losses() -> tuple[TokenLoss, TokenLoss]:
    """Of descriptors [B, D] and labels [B], at lambda 1/2: from the library, and this project's."""
    from pytorch_metric_learning.distances import CosineSimilarity
    from pytorch_metric_learning.losses import MultiSimilarityLoss
    from pytorch_metric_learning.miners import MultiSimilarityMiner

    from tetra.training.losses import BinaryMultiSimilarityLoss, sign_descriptor

    loss = MultiSimilarityLoss(alpha=1.0, beta=50.0, base=0.0, distance=CosineSimilarity())
    miner = MultiSimilarityMiner(epsilon=0.1, distance=CosineSimilarity())
    own = BinaryMultiSimilarityLoss()

    def library(descriptors: Tensor, labels: Tensor) -> Tensor:
        descriptors = descriptors.float()
        pairs = miner(descriptors, labels)
        floats, signs = (loss(x, labels, pairs) for x in (descriptors, sign_descriptor(descriptors)))
        total: Tensor = (1.0 - LAMBDA) * floats + LAMBDA * signs
        return total

    return library, partial(own, lam=LAMBDA)


def _finetune_case(setting: _Setting) -> Case:
    """One step of stage 2: the head and the last block train."""
    images = torch.rand(setting.batch, 3, *setting.backbone.image_size, device=setting.device)
    labels = _labels(setting)
    model = TetraModel(setting.config).to(setting.device)
    set_lambda(model, 1.0)
    model.backbone.requires_grad_(False)
    last = model.backbone.blocks[-1].requires_grad_(True)
    library, own = _descriptor_losses()

    def loss(of: TokenLoss, plain: bool, recompute: Recompute = "nothing") -> Tensor:
        model.backbone.recompute = recompute
        model.backbone.train(plain)  # in evaluation mode inference would run
        for module in model.backbone.modules():
            if isinstance(module, nn.Dropout):
                module.eval()
        last.train()
        return of(model(images), labels)

    shape = {"image_size": list(setting.backbone.image_size), "bits": model.n_bits}
    case = setting.case("finetune", "step", shape, model=model, given=[images], optimizer=_optimizer(model))
    case.variants[PLAIN] = Variant(partial(loss, library, True), setting.plain)
    for recompute in setting.recompute:
        lse_bytes = setting.lse_bytes(1 if recompute == "nothing" else 0)
        case.variants[_own_name(recompute)] = Variant(partial(loss, own, False, recompute), setting.own, lse_bytes)
    return case


def _block_case(setting: _Setting) -> Case:
    """A ternary block; its input, a float32 stream as on GPUs, is counted: without the block nobody would keep it."""
    block = Block(setting.backbone, ternary=True).to(setting.device)
    set_lambda(block, LAMBDA)
    x = setting.random(setting.batch, setting.tokens, setting.backbone.width).requires_grad_()
    case = setting.case("", "ternary block", {"T": setting.tokens, "D": x.shape[2]}, model=block, leaves=[x])

    def loss(recompute: Recompute = "nothing") -> Tensor:
        return cast(Tensor, block(x, None, recompute)).sum()

    case.variants[PLAIN] = Variant(loss, setting.plain)
    case.variants[MAPS] = Variant(loss, partial(setting.maps, nn.ModuleList([block])))
    for recompute in setting.recompute:
        lse_bytes = setting.lse_bytes(1 if recompute == "nothing" else 0)
        case.variants[_own_name(recompute)] = Variant(partial(loss, recompute), setting.own, lse_bytes)
    return case


def _linear_case(setting: _Setting, layer: str, n: int, k: int) -> Case:
    """A ternary layer and the norm before it; before that of "down" also GELU and dropout."""
    linear, norm, dropout = TernaryLinear(k, n), nn.LayerNorm(k), nn.Dropout(setting.backbone.dropout)
    model = nn.ModuleDict({"norm": norm, "linear": linear}).to(setting.device)
    linear.lam = LAMBDA
    gelu = layer == "down"
    dtype = torch.float32 if layer in ("qkv", "up") else torch.bfloat16  # of the stream, or what products leave
    x = setting.random(setting.batch, setting.tokens, k, dtype=dtype).requires_grad_()
    case = setting.case("", "blended linear", {"layer": layer, "N": n, "K": k}, model=model, leaves=[x])

    def loss() -> Tensor:
        return train_linear(x, linear, norm, gelu=gelu, dropout=dropout if gelu else None).sum()

    case.variants[PLAIN] = Variant(loss, setting.plain)
    case.variants[OWN] = Variant(loss, setting.own)
    return case


def _residual_case(setting: _Setting) -> Case:
    """The end of a branch: dropout and sum."""
    width, dropout = setting.backbone.width, nn.Dropout(setting.backbone.dropout)
    stream = setting.random(setting.batch, setting.tokens, width).requires_grad_()
    branch = setting.random(setting.batch, setting.tokens, width, dtype=torch.bfloat16).requires_grad_()
    shape = {"T": setting.tokens, "D": width, "dropout": dropout.p}
    case = setting.case("", "residual dropout", shape, leaves=[stream, branch])
    case.variants[PLAIN] = Variant(lambda: add_dropped(stream, branch, dropout).sum(), setting.plain)
    case.variants[OWN] = Variant(lambda: add_dropped(stream, branch, dropout).sum(), setting.own)
    return case


def _attention_case(setting: _Setting) -> Case:
    c = setting.backbone
    qkv = setting.random(setting.batch, setting.tokens, 3 * c.inner_dim, dtype=torch.bfloat16).requires_grad_()
    case = setting.case("", "attention", {"T": setting.tokens, "H": c.n_heads, "E": c.head_dim}, leaves=[qkv])
    by_maps = partial(attention_by_maps, qkv, c.n_heads, c.dropout)
    case.variants[PLAIN] = Variant(lambda: torch_attention(qkv, c.n_heads).sum(), setting.plain)
    case.variants[MAPS] = Variant(lambda: by_maps().sum(), setting.plain)
    case.variants[OWN] = Variant(lambda: attention_train(qkv, c.n_heads).sum(), setting.own, setting.lse_bytes(1))
    return case


def _attention_loss_case(setting: _Setting) -> Case:
    """Of one layer; the student's queries and keys are not counted, for attention keeps them."""
    c = setting.backbone
    qkv = setting.random(setting.batch, setting.tokens, 3 * c.inner_dim, dtype=torch.bfloat16).requires_grad_()
    shape = {"T": setting.tokens, "C": c.inner_dim}
    case = setting.case("", "attention loss", shape, given=[qkv], leaves=[qkv])
    teacher = setting.teacher()

    def loss(of: AttentionLoss) -> Tensor:
        return of(_heads(qkv, c.n_heads)[:2], teacher)

    by_maps = partial(torch_attention_loss, mean=averaged_maps)
    case.variants[PLAIN] = Variant(partial(loss, torch_attention_loss), setting.plain)
    case.variants[MAPS] = Variant(partial(loss, by_maps), setting.plain)
    case.variants[OWN] = Variant(partial(loss, _own_attention_loss), setting.own)
    return case


def _token_loss_case(setting: _Setting) -> Case:
    """Of the patch tokens, which are counted on both sides."""
    width = setting.teacher_dims[1]
    student, teacher = (setting.random(setting.batch, setting.tokens - 1, width) for _ in range(2))
    case = setting.case("", "token loss", {"T": setting.tokens - 1, "C": width}, leaves=[student.requires_grad_()])
    case.variants[PLAIN] = Variant(lambda: torch_token_loss(student, teacher), setting.plain)
    case.variants[OWN] = Variant(lambda: token_loss(student, teacher), setting.own)
    return case


def _descriptor_loss_case(setting: _Setting) -> Case:
    with torch.device("meta"):
        n_bits = TetraModel(setting.config).n_bits
    descriptors = setting.random(setting.batch, n_bits).requires_grad_()
    labels = _labels(setting)
    library, own = _descriptor_losses()
    case = setting.case("", "descriptor loss", {"bits": n_bits}, given=[descriptors], leaves=[descriptors])
    case.variants[PLAIN] = Variant(lambda: library(descriptors, labels), setting.plain)
    case.variants[OWN] = Variant(lambda: own(descriptors, labels), setting.own)
    return case


def _cases(setting: _Setting, stages: tuple[Stage, ...]) -> Iterator[Callable[[], Case]]:
    """The stages, each followed by its components; made one at a time, so that one set of tensors is alive."""
    c = setting.backbone
    if "distill" in stages:
        yield partial(_distill_case, setting)
        yield partial(_block_case, setting)
        for layer, n, k in (
            ("qkv", 3 * c.inner_dim, c.width),
            ("out", c.width, c.inner_dim),
            ("up", c.mlp_dim, c.width),
            ("down", c.width, c.mlp_dim),
        ):
            yield partial(_linear_case, setting, layer, n, k)
        yield partial(_attention_case, setting)
        if c.dropout:
            yield partial(_residual_case, setting)
        if setting.attention_layers:
            yield partial(_attention_loss_case, setting)
        yield partial(_token_loss_case, setting)
    if "finetune" in stages:
        yield partial(_finetune_case, setting)
        yield partial(_descriptor_loss_case, setting)


def step_case(
    arch: str,
    stage: Stage,
    batch: int,
    image_size: int | None = None,
    recompute: Recompute = "nothing",
    device: str | torch.device = "cpu",
) -> tuple[Case, Variant]:
    """A stage's whole step, to look at: the case, and this project's variant of it. Arguments and errors are those of
    :func:`bench_train`."""
    setting = _setting(arch, batch, image_size, (stage,), (recompute,), None, torch.device(device))
    case = _distill_case(setting) if stage == "distill" else _finetune_case(setting)
    return case, case.variants[_own_name(recompute)]


# --- run ---------------------------------------------------------------------------------------------------


def _setting(
    arch: str,
    batch: int,
    image_size: int | None,
    stages: tuple[Stage, ...],
    recompute: tuple[Recompute, ...],
    attention_layers: int | None,
    device: torch.device,
) -> _Setting:
    """Checks the arguments of :func:`bench_train`."""
    check_positive(batch=batch)
    config = model_config(arch, "mixvpr" if arch == "nano" else "boq")
    if image_size is not None:
        check_positive(image_size=image_size)
        config = replace(config, backbone=replace(config.backbone, image_size=(image_size, image_size)))
    if attention_layers is None:
        attention_layers = 0 if config.backbone.stem == "conv" else ATTENTION_LAYERS
    if not 0 <= attention_layers <= config.backbone.depth:
        raise ConfigError(f"attention_layers is {attention_layers}, expected 0 to {config.backbone.depth}")
    if "finetune" in stages and batch < 4:
        raise ConfigError(f"batch is {batch}, but stage 2 needs 4 images or more: two places of two")
    return _Setting(config, batch, device, recompute, attention_layers)


def _peak_bytes(case: Case, variant: Variant, device: torch.device) -> int | None:
    """What a step allocates at most, beyond what was allocated before; None where nobody counts."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    case.step(variant)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _rows(case: Case, device: torch.device, times: dict[str, Times]) -> list[dict[str, Any]]:
    """One mapping a variant, without what they have in common."""
    rows: list[dict[str, Any]] = []
    baseline = next(iter(times.values())).median if times else None
    for name, variant in case.variants.items():
        if times and name not in times:
            continue
        saved = case.saved(variant)
        row: dict[str, Any] = {"stage": case.stage, "case": case.name, "shape": case.shape, "variant": name}
        if times and baseline is not None:
            taken = times[name]
            row |= {"images_per_s": case.n_images / taken.median, **taken.figures(), "ratio": baseline / taken.median}
        row["saved_bytes"] = total_bytes(saved) + variant.lse_bytes
        row["lse_bytes_by_formula"] = variant.lse_bytes
        row["saved_bytes_per_token"] = row["saved_bytes"] / case.n_tokens
        row["times_less_saved"] = (rows or [row])[0]["saved_bytes"] / max(row["saved_bytes"], 1)
        row["peak_bytes"] = _peak_bytes(case, variant, device)
        rows.append(row | {"saved": [asdict(group) for group in saved]})
    return rows


def bench_train(
    arch: str = "vit-b",
    batch: int = 8,
    image_size: int | None = None,
    stages: tuple[Stage, ...] = STAGES,
    recompute: tuple[Recompute, ...] = ("nothing",),
    attention_layers: int | None = None,
    repeats: int = 15,
    threads: int | None = None,
    device: str | torch.device = "cpu",
    count_only: bool = False,
    progress: Progress | None = None,
    notices: list[str] | None = None,
) -> list[dict[str, Any]]:
    """Time and count training steps of ``arch`` and their components; see the module for the variants.

    Args:
        arch: a stock architecture (see :func:`tetra.config.model_config`); its head is BoQ, that of ``nano`` MixVPR.
        batch: images a step.
        image_size: side of the images; the architecture's own by default.
        stages: "distill" and "finetune".
        recompute: what this project's variants make again, one variant each.
        attention_layers: blocks in the attention loss; by default 4, and 0 where the teacher is convolutional (nano).
        repeats: timed steps of each variant, after two untimed ones.
        threads: PyTorch threads on the CPU; the current setting by default.
        device: where to run.
        count_only: run every forward pass once, and count what it keeps, without timing.
        progress: called with one line a case.
        notices: lines are appended that say which variant was left out, and why.

    Returns:
        One mapping a case and variant: ``stage`` ("" for a component), ``case``, ``shape``, ``variant``,
        ``saved_bytes`` (what autograd keeps when the forward pass ends, each storage once, without parameters and
        images), ``lse_bytes_by_formula`` (the part of it that was not counted: log-sum-exps that compiled attention
        would keep, where it did not run), ``saved_bytes_per_token``, ``times_less_saved`` (than the case's first
        variant), ``saved`` (by tensor, see :class:`tetra.saved_tensors.Saved`), ``peak_bytes`` (CUDA: what a step
        allocates at most, beyond weights and optimiser; else None); unless ``count_only``, ``images_per_s``,
        ``median_ms``, ``p95_ms``, ``min_ms``, ``first_call_ms`` and ``ratio`` (how many times as fast as the first
        variant, by medians); then ``arch``, ``batch``, ``repeats``, ``backend`` and what
        :func:`tetra.timing.environment` tells.

    Raises:
        ConfigError: unknown ``arch``, or a number that is not positive, or a batch that is too small.
        ModuleNotFoundError: pytorch-metric-learning is not installed (stage 2).
    """
    check_positive(batch=batch, repeats=repeats, threads=threads)
    device = torch.device(device)
    setting = _setting(arch, batch, image_size, stages, recompute, attention_layers, device)
    rows: list[dict[str, Any]] = []
    with _threads(threads):
        facts = {"arch": arch, "batch": batch, "repeats": repeats, **environment(device)}
        own = backend_for(torch.empty(0, device=device))
        for make in _cases(setting, stages):
            case = make()
            if progress is not None:
                progress(f"{case.stage} {case.name} {case.shape}".lstrip())
            calls = {name: partial(case.step, variant) for name, variant in case.variants.items()}
            times = {} if count_only else take_turns(calls, device, repeats, left_out=notices)
            for row in _rows(case, device, times):
                backend = own if row["variant"].startswith(OWN) else "torch"
                rows.append({**row, "backend": backend, **facts})
            del case, calls  # before the next one's tensors are made
    return rows
