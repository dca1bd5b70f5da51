"""The model: images in, float or packed binary descriptors out."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from tetra.config import ModelConfig, model_config
from tetra.errors import ConfigError, ImageError
from tetra.heads import Head, create_head
from tetra.kernels import pack_bits_checked
from tetra.layers import KeepsFloat32, PackedTernaryLinear, TernaryLinear, name_layers, run
from tetra.vit import Features, PatchEmbedding, VisionTransformer

# ImageNet statistics, in RGB order, as the teachers use them.
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)

LARGEST_PIXEL = 1.5
"""Float images reach 1, or a little more after resampling; beyond this they were not divided by 255."""


def _pack_layers(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, TernaryLinear):
            setattr(module, name, child.pack())
        else:
            _pack_layers(child)


def refuse_non_finite(finite: Tensor) -> None:
    """ValueError that names the first row where ``finite`` (bool [B]) is False."""
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        raise ValueError(f"descriptor {row} of the batch has NaN or infinite values; check the model's weights")


class TetraModel(KeepsFloat32):
    """Ternary backbone and aggregation head.

    Args:
        config: shape of the model.
        packed: build it from packed layers at once (for loading); such a model can only infer.

    Attributes:
        compute_dtype: images are cast to it at the entry and everything but the integer products runs in it;
            parameters may rest in another dtype (see :mod:`tetra.layers`).
        content_hash: sha256 of the file that the model was loaded from or saved to, or None.
        info: facts about the training that travel with the file.
    """

    float32_buffers = ("image_mean", "image_std")

    backbone: VisionTransformer
    head: Head | None
    image_mean: Tensor
    image_std: Tensor

    def __init__(self, config: ModelConfig, packed: bool = False) -> None:
        super().__init__()
        self.config = config
        self.backbone = VisionTransformer(config.backbone)
        self.head = None if config.head is None else create_head(config.head, config.backbone)
        self.compute_dtype = torch.float32
        self.content_hash: str | None = None
        self.info: dict[str, object] = {}
        self.is_packed = False
        self.register_buffer("image_mean", torch.tensor(IMAGE_MEAN).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(IMAGE_STD).reshape(1, 3, 1, 1), persistent=False)
        name_layers(self)
        if packed:
            self._become_packed()

    def _become_packed(self) -> None:
        _pack_layers(self)
        self.is_packed = True
        self.requires_grad_(False)
        super().train(False)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width that the model was trained for; others are accepted if they fit the patches."""
        return self.config.backbone.image_size

    @property
    def n_bits(self) -> int:
        """Dimensions of the descriptor, one bit each.

        Raises:
            ConfigError: the model has no head.
        """
        return self._require_head().n_bits

    def _require_head(self) -> Head:
        if self.head is None:
            raise ConfigError(f"model '{self.config.arch}' has no head and gives no descriptors; add one")
        return self.head

    def check(self, images: Tensor) -> tuple[int, int]:
        """Patch rows and columns of images that the model takes: uint8 or float in [0, 1], [B, 3, height, width].

        Values are looked at on the CPU alone: elsewhere that would stop the queue of launches.

        Raises:
            ImageError: wrong dtype, rank, number of channels, size or device; on the CPU also values far beyond 1.
        """
        if images.dim() != 4 or images.shape[1] != 3:
            raise ImageError(f"images have shape {tuple(images.shape)}, expected [batch, 3, height, width]")
        grid = self.backbone.grid_of(images.shape[-2], images.shape[-1])
        if images.device != self.image_mean.device:
            raise ImageError(f"images are on {images.device}, but the model is on {self.image_mean.device}; move one")
        if images.is_floating_point():
            if images.device.type == "cpu" and images.numel() and not torch.compiler.is_compiling():
                largest = float(images.detach().amax())
                if not largest <= LARGEST_PIXEL:
                    raise ImageError(
                        f"images are {images.dtype} with values up to {largest:g}, expected 0 to 1; divide by 255, "
                        "or pass them as uint8"
                    )
        elif images.dtype != torch.uint8:
            raise ImageError(f"images have dtype {images.dtype}, expected uint8 or float in [0, 1]")
        return grid

    def normalise(self, images: Tensor) -> Tensor:
        """(value - mean) / std per channel, of checked images, in compute_dtype."""
        if images.dtype == torch.uint8:
            images = images.to(torch.float32) / 255.0
        return ((images.float() - self.image_mean) / self.image_std).to(self.compute_dtype)

    def prepare(self, images: Tensor) -> Tensor:
        """Check and normalise: uint8 or float in [0, 1], [B, 3, height, width] RGB -> compute_dtype.

        Raises:
            ImageError: as :meth:`check`.
        """
        self.check(images)
        return self.normalise(images)

    def features(self, images: Tensor, collect_last: int = 0) -> Features:
        """Tokens of the backbone; see :meth:`tetra.vit.VisionTransformer.features`. Images as in forward."""
        grid = self.check(images)
        if images.dtype == torch.float64:
            images = images.float()
        stem, dtype = self.backbone.stem, self.compute_dtype

        def compose(images: Tensor) -> Tensor:
            tokens: Tensor = stem(self.normalise(images))
            return tokens

        def infer(images: Tensor) -> Tensor:
            assert isinstance(stem, PatchEmbedding)
            return stem.infer(images, IMAGE_MEAN, IMAGE_STD, dtype)

        patches = run(stem, images, infer if isinstance(stem, PatchEmbedding) else compose, compose, dtype)
        return self.backbone.encode(patches, grid, collect_last)

    def forward(self, images: Tensor) -> Tensor:
        """Float descriptors.

        Args:
            images: [B, 3, height, width] RGB, uint8 or float in [0, 1].

        Returns:
            float [B, n_bits], L2-normalised.

        Raises:
            ImageError: wrong shape, dtype or size of ``images``.
            ConfigError: the model has no head.
        """
        head = self._require_head()
        descriptors: Tensor = head(self.features(images))
        return descriptors

    @torch.no_grad()
    def describe(self, images: Tensor) -> Tensor:
        """Binary descriptors: bit = (value > 0), most significant first.

        Computed in evaluation mode whatever the model's mode, which is left as it was. Several threads may share
        a packed model, or one in evaluation mode; a model in training mode only one, since its mode changes here.

        Args:
            images: as in :meth:`forward`.

        Returns:
            uint8 [B, n_bits / 8].

        Raises:
            ImageError, ConfigError: as :meth:`forward`.
            ValueError: a descriptor has NaN or infinite values; in a compiled or exported graph it has no code.
        """
        training = [m for m in self.modules() if m.training]
        try:
            for module in training:
                module.training = False
            codes, finite = self.codes(images)
        finally:
            for module in training:
                module.training = True
        if not torch.compiler.is_compiling():
            refuse_non_finite(finite)
        return codes

    def codes(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What :meth:`describe` packs, in the mode that the model is in, and which rows are finite.

        Returns:
            uint8 [B, n_bits / 8], and bool [B]: whether the descriptor has no NaN or infinite value.
        """
        head = self._require_head()
        return pack_bits_checked(head.values(self.features(images)))

    def pack(self, rest_dtype: torch.dtype | None = None) -> TetraModel:
        """A packed copy for inference; this model is left untouched.

        Args:
            rest_dtype: dtype in which everything but the ternary weights rests: float16 and bfloat16 halve its
                memory and round it; None keeps it, and then codes equal this model's at lambda = 1.

        Raises:
            ValueError: a ternary layer has NaN or infinite weights; the message names it.
        """
        packed = copy.deepcopy(self)
        packed.content_hash = None
        if not packed.is_packed:
            packed._become_packed()
        if rest_dtype is not None:
            packed.rest_to(rest_dtype)
        return packed

    def rest_to(self, dtype: torch.dtype) -> TetraModel:
        """Cast every parameter to ``dtype``; packed weights and their scales stay as they are."""
        for parameter in self.parameters():
            parameter.data = parameter.data.to(dtype)
        return self

    def train(self, mode: bool = True) -> TetraModel:
        """Training mode; a packed model stays in evaluation mode, since it can only infer."""
        super().train(mode and not self.is_packed)
        return self

    def n_ternary(self) -> int:
        """Number of ternary weights."""
        kinds = (TernaryLinear, PackedTernaryLinear)
        return sum(m.in_features * m.out_features for m in self.modules() if isinstance(m, kinds))


def create_model(arch: str = "vit-b", head: str | None = "boq") -> TetraModel:
    """A fresh, trainable model of a stock architecture; see :func:`tetra.config.model_config`."""
    return TetraModel(model_config(arch, head))
