"""Training images: unlabelled views for distillation, labelled places for fine-tuning.

Nothing here draws from a global random state: what a sample is depends only on the seed, its index and its
view, and which samples a step sees only on the seed and the step. A resumed run therefore sees what an
uninterrupted one would.
"""

from __future__ import annotations

import csv
import json
import math
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from tetra.errors import DatasetError, TrainingError
from tetra.files import write_json
from tetra.images import list_images, load_image
from tetra.training.teachers import Teacher, TeacherOutput

Size = tuple[int, int]


def crop_box(height: int, width: int, key: str, min_scale: float) -> tuple[tuple[int, int, int, int], bool]:
    """A crop (left, top, right, bottom) and whether to mirror it, drawn from the hash of ``key``.

    The crop has ``min_scale`` to 1 of the area and an aspect ratio within 3/4 to 4/3 of the image's.
    """
    rng = random.Random(key)
    area, aspect = rng.uniform(min_scale, 1.0), math.exp(rng.uniform(-1, 1) * math.log(4 / 3) / 2)
    h = min(height, max(1, round(height * math.sqrt(area) / aspect)))
    w = min(width, max(1, round(width * math.sqrt(area) * aspect)))
    top, left = rng.randint(0, height - h), rng.randint(0, width - w)
    return (left, top, left + w, top + h), rng.random() < 0.5


def square_box(height: int, width: int, side: int, key: str) -> tuple[int, int, int, int]:
    """A square (left, top, right, bottom) of ``side`` pixels, or the largest that fits, where ``key`` draws it."""
    rng, side = random.Random(key), min(side, height, width)
    top, left = rng.randint(0, height - side), rng.randint(0, width - side)
    return left, top, left + side, top + side


def load_view(path: Path, size: Size, key: str | None, min_scale: float = 0.3, crop: int = 0) -> Tensor:
    """The view of an image file that ``key`` draws (None: the whole image), uint8 [3, *size].

    ``crop`` is the side of a square to draw, in pixels, which is not mirrored; 0 draws a :func:`crop_box`.
    """
    image = load_image(path)
    if key is None:
        box, mirror = (0, 0, image.shape[2], image.shape[1]), False
    elif crop:
        box, mirror = square_box(image.shape[1], image.shape[2], crop, key), False
    else:
        box, mirror = crop_box(image.shape[1], image.shape[2], key, min_scale)
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    picture = picture.resize((size[1], size[0]), Image.Resampling.BILINEAR, box=box)
    if mirror:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def find_images(folders: Sequence[str | Path], exclude: Sequence[str | Path] = ()) -> list[Path]:
    """All images below the folders but not below the excluded ones, in a stable order.

    Raises:
        DatasetError: a folder is missing or holds no image.
    """
    left_out = [Path(folder) for folder in exclude]
    for folder in left_out:
        if not folder.is_dir():
            raise DatasetError(f"{folder}: excluded from training but not there; check the path")
    paths = [path for folder in folders for path in list_images(folder, recursive=True)]
    return [path for path in paths if not any(path.is_relative_to(folder) for folder in left_out)]


class ViewDataset(Dataset[dict[str, Any]]):
    """``views`` views of every image: view 0 is the whole image, the others random crops.

    With ``crop`` every view is a random square of that many pixels a side, another one in each epoch that a key
    (epoch, index) names: for panoramas, of which the whole would be squashed.

    Items: {"index": int, "images": uint8 [3, *size]}.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        size: Size,
        views: int = 1,
        seed: int = 0,
        min_scale: float = 0.3,
        crop: int = 0,
    ) -> None:
        if not paths:
            raise DatasetError("no training images; name at least one folder that holds some")
        self.paths, self.size, self.views = list(paths), size, views
        self.seed, self.min_scale, self.crop = seed, min_scale, crop

    def __len__(self) -> int:
        return len(self.paths) * self.views

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        image, view = divmod(index, self.views)
        drawn = f"{self.seed}/{image}/{view}" if view or self.crop else None
        if self.crop:
            drawn = f"{epoch}/{drawn}"
        return {"index": index, "images": load_view(self.paths[image], self.size, drawn, self.min_scale, self.crop)}

    def fingerprint(self) -> str:
        """Changes whenever an item would: file names and sizes, views, seed, size, crop."""
        facts = [(p.name, p.parent.name, p.stat().st_size) for p in self.paths]
        crop = (self.crop,) if self.crop else ()
        return sha256(repr((facts, self.size, self.views, self.seed, self.min_scale, *crop)).encode()).hexdigest()


def _reserve(path: Path) -> None:
    """Claim a file's disk blocks now: a full disk behind a memory map kills the process without a word."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        path.unlink()
        raise TrainingError(
            f"{path}: the teacher's cache can't be written: {error.strerror}; free space or choose another folder"
        ) from error


class CachedViews(Dataset[dict[str, Any]]):
    """Views with the teacher's outputs for them, computed once and kept on disk as memory-mapped arrays.

    Items: {"index", "images": uint8 [3, *size], "cls": float16 [C], "patches": float16 [rows, columns, C]}.
    The cache is filled in chunks; after an interruption it goes on behind the last whole chunk. It is bound to
    the data and the teacher by a fingerprint and made anew when either changes.

    Args:
        views: what to cache.
        folder: where; created.
        grid: patch grid to resample the teacher's tokens to before storing (None: as they come).
    """

    CHUNK = 64
    _NAMES = ("images", "cls", "patches")

    def __init__(self, views: ViewDataset, folder: Path, grid: tuple[int, int] | None = None) -> None:
        self.views, self.folder, self.grid = views, folder, grid
        self._arrays: dict[str, np.ndarray[Any, Any]] | None = None

    def fill(self, teacher: Teacher, n_threads: int = 2, teacher_size: int | None = None) -> None:
        """Compute what is missing, with a progress bar; ``teacher_size``: square size that the teacher sees."""
        from concurrent.futures import ThreadPoolExecutor

        from tetra.training.augment import resize
        from tetra.training.progress import track

        self.folder.mkdir(parents=True, exist_ok=True)
        facts = (self.views.fingerprint(), teacher.identity, self.grid, teacher_size)
        manifest_path = self.folder / "cache.json"
        manifest: dict[str, Any] = {"fingerprint": sha256(repr(facts).encode()).hexdigest(), "done": 0}
        if manifest_path.is_file():
            try:
                found = json.loads(manifest_path.read_text())
            except ValueError:
                found = {}
            known = isinstance(found, dict) and found.get("fingerprint") == manifest["fingerprint"]
            if known and found.get("done") in range(len(self.views) + 1) and self._is_whole():
                manifest = found
        done, n = int(manifest["done"]), len(self.views)
        starts = range(done, n, self.CHUNK)
        device = next(teacher.parameters()).device
        with ThreadPoolExecutor(n_threads) as pool:
            for start in track(starts, f"teacher outputs for {n} views"):
                items = list(pool.map(self.views.__getitem__, range(start, min(n, start + self.CHUNK))))
                images = torch.stack([item["images"] for item in items])
                seen = resize(images.to(device), (teacher_size,) * 2 if teacher_size else self.views.size)
                with torch.inference_mode(), half_precision(device):
                    out = teacher(seen)
                self._write(start, n, images, out)
                manifest["done"] = min(n, start + self.CHUNK)
                write_json(manifest_path, manifest)
        self._arrays = None

    def _is_whole(self) -> bool:
        """Whether all files are there, as long as their heads say."""
        try:
            return all(len(np.load(self._file(k), mmap_mode="r")) == len(self.views) for k in self._NAMES)
        except (OSError, EOFError, ValueError):
            return False

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.npy"

    def _write(self, start: int, n: int, images: Tensor, out: TeacherOutput) -> None:
        patches = out.patches
        if self.grid is not None:
            from tetra.training.teachers import resample_tokens

            patches = resample_tokens(patches, self.grid).unflatten(1, self.grid)
        data = {"images": images, "cls": out.cls.half(), "patches": patches.half()}
        if self._arrays is None or start == 0:
            self._arrays = {}
            for name, value in data.items():
                path = self._file(name)
                shape = (n, *value.shape[1:])
                if start == 0:
                    array = open_memmap(path, "w+", dtype=value.cpu().numpy().dtype, shape=shape)
                    _reserve(path)
                else:
                    array = open_memmap(path, "r+")
                self._arrays[name] = array
        for name, value in data.items():
            self._arrays[name][start : start + len(value)] = value.cpu().numpy()
            self._arrays[name].flush()  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self._arrays is None:
            self._arrays = {k: np.load(self._file(k), mmap_mode="r") for k in self._NAMES}
        return {"index": index, **{k: torch.from_numpy(a[index].copy()) for k, a in self._arrays.items()}}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": None}


def half_precision(device: torch.device) -> torch.autocast:
    """bfloat16 autocast where the device has it in hardware, else a context that does nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device.type))


def has_bfloat16(device_type: str) -> bool:
    """Whether bfloat16 products run in hardware on this machine."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type == "cpu":
        check = getattr(torch.cpu, "_is_avx512_bf16_supported", None) or getattr(
            torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None
        )
        return bool(check()) if check is not None else False
    return False


@dataclass(frozen=True)
class Place:
    """Images that show one place; a single photo becomes a place through its augmented views."""

    paths: tuple[Path, ...]


def video_places(folder: str | Path, window: int = 4, stride: int | None = None) -> list[Place]:
    """Places of a video: every ``window`` consecutive frames of a folder (subfolders are videos of their own).

    ``stride`` frames lie between the starts of neighbouring windows. By default it is 4 x ``window``, so that
    neighbouring places share no view.
    """
    stride = stride or 4 * window
    by_folder: dict[Path, list[Path]] = {}
    for path in list_images(folder, recursive=True):
        by_folder.setdefault(path.parent, []).append(path)
    places = []
    for frames in by_folder.values():
        for start in range(0, max(1, len(frames) - window + 1), stride):
            places.append(Place(tuple(frames[start : start + window])))
    return places


def photo_places(folder: str | Path) -> list[Place]:
    """Every photo below ``folder`` is a place of its own."""
    return [Place((path,)) for path in list_images(folder, recursive=True)]


def gsv_cities_places(root: str | Path, cities: Sequence[str] = (), min_images: int = 4) -> list[Place]:
    """Places of a data set in GSV-Cities layout: ``Dataframes/CITY.csv`` and ``Images/CITY/``.

    A row has place_id, year, month, northdeg, city_id, lat, lon, panoid; its image is
    ``CITY_<place_id, 7 digits>_<year>_<month, 2>_<northdeg, 3>_<lat>_<lon>_<panoid>.jpg``.
    Places with fewer than ``min_images`` images are left out. Source: Ali-bey et al., arXiv 2210.10239.

    Raises:
        DatasetError: a folder, a city or a column is missing, or no place is left.
    """
    root = Path(root)
    frames = root / "Dataframes"
    if not frames.is_dir() or not (root / "Images").is_dir():
        raise DatasetError(f"{root}: not in GSV-Cities layout; expected the folders Dataframes and Images in it")
    files = [frames / f"{c}.csv" for c in cities] or sorted(frames.glob("*.csv"))
    places: list[Place] = []
    for file in files:
        if not file.is_file():
            known = ", ".join(sorted(p.stem for p in frames.glob("*.csv")))
            raise DatasetError(f"{file}: no such city; known: {known}")
        groups: dict[str, list[Path]] = {}
        with file.open(newline="") as stream:
            for number, row in enumerate(csv.DictReader(stream), start=2):
                try:
                    if None in row.values():
                        raise ValueError("the row ends early")
                    name = (
                        f"{row['city_id']}_{int(row['place_id']) % 10**5:07d}_{int(row['year']):04d}_"
                        f"{int(row['month']):02d}_{int(row['northdeg']):03d}_{row['lat']}_{row['lon']}_"
                        f"{row['panoid']}.jpg"
                    )
                except (KeyError, ValueError, TypeError) as error:
                    raise DatasetError(f"{file}, line {number}: bad or missing column ({error})") from None
                groups.setdefault(row["place_id"], []).append(root / "Images" / file.stem / name)
        places += [Place(tuple(paths)) for paths in groups.values() if len(paths) >= min_images]
    if not places:
        raise DatasetError(f"{root}: no place with at least {min_images} images")
    missing = next((p for place in places[:: max(1, len(places) // 50)] for p in place.paths if not p.is_file()), None)
    if missing is not None:
        raise DatasetError(f"{missing}: listed in a data frame but not there; complete the download")
    return places


class PlaceBatches(Dataset[dict[str, Any]]):
    """Items are places: ``images_per_place`` views, {"label": int, "images": uint8 [n, 3, *size]}.

    Which of a place's images a step uses is drawn from the seed, the epoch (see :meth:`key`) and the place. A
    place with fewer images repeats them in other crops.
    """

    def __init__(
        self,
        places: Sequence[Place],
        size: Size,
        images_per_place: int = 4,
        seed: int = 0,
        min_scale: float = 0.6,
        keep_decoded: bool = False,
    ) -> None:
        if len(places) < 2:
            raise DatasetError(f"{len(places)} training places; at least 2 are needed to tell places apart")
        self.places, self.size, self.images_per_place = list(places), size, images_per_place
        self.seed, self.min_scale = seed, min_scale
        self._decoded: dict[Path, Image.Image] | None = {} if keep_decoded else None

    def __len__(self) -> int:
        return len(self.places)

    def _open(self, path: Path) -> Image.Image:
        if self._decoded is not None and path in self._decoded:
            return self._decoded[path]
        image = Image.fromarray(load_image(path).permute(1, 2, 0).numpy())
        if self._decoded is not None:
            self._decoded[path] = image
        return image

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, label = key if isinstance(key, tuple) else (0, key)
        rng = random.Random(f"{self.seed}/{epoch}/{label}")
        paths = list(self.places[label].paths)
        chosen = rng.sample(paths, min(len(paths), self.images_per_place))
        chosen += [rng.choice(paths) for _ in range(self.images_per_place - len(chosen))]
        views = []
        for i, path in enumerate(chosen):
            image = self._open(path)
            # Never mirrored: a mirrored street is another place.
            box, _ = crop_box(image.height, image.width, f"{self.seed}/{epoch}/{label}/{i}", self.min_scale)
            view = image.resize((self.size[1], self.size[0]), Image.Resampling.BILINEAR, box=box)
            views.append(torch.from_numpy(np.array(view)).permute(2, 0, 1))
        return {"label": label, "images": torch.stack(views)}


class StepSampler(Sampler[list[Any]]):
    """Batches for all steps of a training, a pure function of the seed.

    Epoch e is a permutation drawn from (seed, e); batches run across epoch borders, so that every batch is
    full. Iteration starts at ``first_step``; ``len`` counts all steps.

    Args:
        batch_size: of all processes together.
        with_epoch: yield (epoch, index) instead of index.
        rank, world_size: of several processes each has an equal, consecutive part of every batch.
    """

    def __init__(
        self,
        n_items: int,
        batch_size: int,
        n_steps: int,
        seed: int,
        with_epoch: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if n_items < 1 or batch_size < 1:
            raise TrainingError(f"{n_items} items in batches of {batch_size}: both must be positive")
        if batch_size % world_size:
            raise TrainingError(f"a batch of {batch_size} can't be shared by {world_size} processes; choose a multiple")
        self.n_items, self.batch_size, self.n_steps, self.seed = n_items, batch_size, n_steps, seed
        self.with_epoch, self.first_step = with_epoch, 0
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return self.n_steps

    def _permutation(self, epoch: int) -> np.ndarray[Any, Any]:
        order = np.random.default_rng([self.seed, epoch]).permutation(self.n_items)
        # A batch of two across the border must not hold one item twice: one place has nothing to be told apart from.
        if epoch and self.n_items > 2:
            before = np.random.default_rng([self.seed, epoch - 1]).permutation(self.n_items)
            if order[0] == before[-1]:
                order[:2] = order[1::-1]
        return order

    def batch(self, step: int) -> list[Any]:
        """The indices of one step, of this process's part."""
        items: list[Any] = []
        permutations: dict[int, np.ndarray[Any, Any]] = {}
        size = self.batch_size // self.world_size
        first = step * self.batch_size + self.rank * size
        for position in range(first, first + size):
            epoch, offset = divmod(position, self.n_items)
            if epoch not in permutations:
                permutations[epoch] = self._permutation(epoch)
            index = int(permutations[epoch][offset])
            items.append((epoch, index) if self.with_epoch else index)
        return items

    def epoch_at(self, step: int) -> int:
        """Whole passes over the items before ``step``."""
        return step * self.batch_size // self.n_items

    def __iter__(self) -> Iterator[list[Any]]:
        for step in range(self.first_step, self.n_steps):
            yield self.batch(step)
