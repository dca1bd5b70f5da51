"""Model files, and writing files so that nothing is ever left half-written.

A model file is one safetensors file. Its tensors are the model's ``state_dict``; its metadata has one entry,
``tetra``, a JSON object:

====================  ============================================================================
``format_version``    1; a reader refuses higher ones
``kind``              ``tetra-packed-model`` (2-bit weights, for inference) or
                      ``tetra-trainable-model`` (master weights)
``tetra_version``     release that wrote the file
``config``            :meth:`tetra.config.ModelConfig.to_dict`
``content_hash``      sha256 over the config and every tensor, see :func:`content_hash`: the model's identity
``info``              facts about the training
``header_hash``       sha256 over all the entries above
====================  ============================================================================
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from tetra import __version__
from tetra.config import ModelConfig
from tetra.errors import ConfigError, FileFormatError, TetraError
from tetra.kernels import check_packed
from tetra.layers import PackedTernaryLinear
from tetra.model import TetraModel

FORMAT_VERSION = 1
PACKED_KIND = "tetra-packed-model"
TRAINABLE_KIND = "tetra-trainable-model"

_ASSETS = Path(__file__).parent / "assets"
_SUFFIX = ".safetensors"
_AGAIN = "fetch or save it again"


# --- writing ---


def check_output(path: str | Path, *, overwrite: bool = True) -> Path:
    """``path`` as a Path, after making sure that a file can be written there.

    Long work calls this first, so that it does not end with a result that has nowhere to go.

    Raises:
        TetraError: the folder is missing or not writable, ``path`` is a folder, a device or a pipe, or it exists
            and may not be overwritten.
    """
    path = Path(path)
    if path.is_dir():
        raise TetraError(f"{path}: is a folder; name a file inside it")
    # A file that replaced /dev/null would harm every program on the machine.
    if path.exists() and not path.is_file():
        raise TetraError(f"{path}: is a device or a pipe; name a file")
    folder = _behind_links(path).parent
    if not folder.is_dir():
        raise TetraError(f"{path}: the folder '{folder}' does not exist; create it first")
    if not os.access(folder, os.W_OK):
        raise TetraError(f"{path}: the folder '{folder}' is not writable; choose another one")
    if path.exists() and not overwrite:
        raise TetraError(f"{path}: exists already; choose another name or remove it")
    return path


def _behind_links(path: Path) -> Path:
    """The file that is written when ``path`` is: where a symbolic link leads, else ``path`` itself."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file that becomes ``path`` when the block ends, whole and synced to disk, or not at all.

    Where ``path`` is a symbolic link, the file that it leads to is replaced and the link stays.

    Raises:
        TetraError: it can't be written, for example because the disk is full. Whatever was at ``path`` is
            still there, and no temporary file is left.
    """
    path = check_output(path)
    target = _behind_links(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        reason = error.strerror or str(error)
        raise TetraError(f"{path}: can't be written: {reason}; free space or choose another folder") from error
    finally:
        temporary.unlink(missing_ok=True)


_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def writing_into(folder: str | Path) -> Iterator[None]:
    """Name the folder when a library's own writing (logs, tables) finds the disk full.

    Raises:
        TetraError: no space is left, a quota is used up, or a file would exceed its limit.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        raise TetraError(
            f"{error.filename or folder}: can't be written: {error.strerror}; free space or choose another folder"
        ) from error


def write_json(path: str | Path, value: object) -> None:
    """Write ``value`` as indented JSON, atomically; NaN and infinity are refused, since JSON has neither."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    with atomic_write(path) as file:
        file.write(text.encode())


# --- hashes ---


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def content_hash(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Identity of a model: two files with the same hash give the same descriptors.

    sha256 over the config as canonical JSON, then, in order of names, each tensor's name, dtype, shape and
    little-endian bytes. Independent of the order and the padding in the file.
    """
    digest = hashlib.sha256(_canonical(config))
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(_canonical([name, str(tensor.dtype), list(tensor.shape)]))
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# --- saving ---


def save(model: TetraModel, path: str | Path, *, overwrite: bool = True) -> None:
    """Write ``model`` to one file, atomically, and set its ``content_hash``.

    A packed model becomes a file for :func:`load`; a trainable one keeps its master weights and becomes a
    file for :func:`load_trainable`.

    Raises:
        TetraError: the file exists and ``overwrite`` is off, it can't be written, or a tensor of a packed model has
            NaN or infinite values (float16 ends at 65504), which :func:`load` would refuse; the old file stays.
    """
    path = check_output(path, overwrite=overwrite)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    for name, tensor in tensors.items():
        if model.is_packed and tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise TetraError(
                f"{path}: not written, tensor '{name}' has NaN or infinite values in {tensor.dtype}; train again with "
                "a lower learning rate, or pack to a dtype with a wider range"
            )
    config = json.loads(_canonical(model.config.to_dict()))
    header: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "kind": PACKED_KIND if model.is_packed else TRAINABLE_KIND,
        "tetra_version": __version__,
        "config": config,
        "content_hash": content_hash(config, tensors),
        "info": model.info,
    }
    header["header_hash"] = hashlib.sha256(_canonical(header)).hexdigest()
    # One metadata entry: safetensors writes several in any order, and equal models should give equal files.
    data = safetensors.torch.save(tensors, metadata={"tetra": _canonical(header).decode()})
    with atomic_write(path) as file:
        file.write(data)
    model.content_hash = header["content_hash"]


# --- loading ---


@dataclass(frozen=True)
class Header:
    """What a model file says about itself; see the table at the top of this module."""

    path: Path
    format_version: int
    kind: str
    tetra_version: str
    config: ModelConfig
    config_as_written: dict[str, Any]
    """What the content hash covers; ``config`` may have gained fields since."""
    content_hash: str
    info: dict[str, Any]
    tensor_bytes: dict[str, int]
    """Size of each tensor in the file."""
    file_bytes: int


def shipped_models() -> list[str]:
    """Names that :func:`load` knows without a path."""
    return sorted(path.stem for path in _ASSETS.glob(f"*{_SUFFIX}"))


def find(name_or_path: str | Path) -> Path:
    """The file of a shipped model's name, or the path itself. A shipped name wins over a file of that name.

    Raises:
        FileFormatError: there is neither; the message lists what ships.
    """
    if str(name_or_path) in shipped_models():
        return _ASSETS / f"{name_or_path}{_SUFFIX}"
    path = Path(name_or_path)
    if path.is_file():
        return path
    what = "is a folder, not a model file" if path.is_dir() else "no such model file"
    shipped = ", ".join(shipped_models()) or "none"
    raise FileFormatError(f"{path}: {what}; name a file or a shipped model ({shipped})")


def _unreadable(path: Path, error: OSError) -> FileFormatError:
    return FileFormatError(f"{path}: can't be read: {error.strerror or error}; check its permissions")


def _read_json_header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON at the start of a safetensors file, and the file's size."""
    n_file = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        n_json = int.from_bytes(start, "little")
        if len(start) < 8:
            raise FileFormatError(f"{path}: truncated, {n_file} bytes; {_AGAIN}")
        if n_json > 100_000_000:  # the limit of the safetensors format
            # Asked only now: the length of an honest header may begin with these bytes too.
            if start[:2] == b"PK" or start[:1] == b"\x80":
                raise FileFormatError(
                    f"{path}: a PyTorch pickle, which could run any code; name a model file (safetensors)"
                )
            raise FileFormatError(f"{path}: no safetensors file (begins with {start!r}); name a model file")
        text = file.read(n_json)
    if len(text) < n_json:
        raise FileFormatError(f"{path}: truncated, {n_file} of at least {n_json + 8} bytes; {_AGAIN}")
    try:
        parsed = json.loads(text)
    except ValueError:  # also what bytes that are not UTF-8 raise
        raise FileFormatError(f"{path}: the header is not JSON, so the file is damaged; {_AGAIN}") from None
    if not isinstance(parsed, dict):
        raise FileFormatError(f"{path}: the header is not a JSON object, so the file is damaged; {_AGAIN}")
    return parsed, n_file


def read_header(name_or_path: str | Path) -> Header:
    """Read and check the header of a model file, not its tensors.

    Raises:
        FileFormatError: no such file, not a TeTRA model, truncated, altered or written by a newer release.
        ConfigError: the config in the file has an unknown key or a value that cannot work.
    """
    path = find(name_or_path)
    try:
        parsed, n_file = _read_json_header(path)
    except OSError as error:
        raise _unreadable(path, error) from None
    metadata: Any = parsed.pop("__metadata__", None)
    try:
        header: dict[str, Any] = json.loads(metadata["tetra"])
        kind, version = header["kind"], header["format_version"]
    except (KeyError, TypeError, ValueError):
        raise FileFormatError(
            f"{path}: a safetensors file of another kind, without TeTRA's header; name a model file"
        ) from None
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise FileFormatError(
            f"{path}: file format {version}, this release ({__version__}) reads up to {FORMAT_VERSION}; "
            "upgrade: pip install --upgrade tetra-vpr"
        )
    if kind not in (PACKED_KIND, TRAINABLE_KIND):
        raise FileFormatError(f"{path}: holds a '{kind}', expected '{PACKED_KIND}'; name a model file")
    claimed = header.pop("header_hash", None)
    if hashlib.sha256(_canonical(header)).hexdigest() != claimed or not isinstance(header.get("content_hash"), str):
        raise FileFormatError(f"{path}: the header was altered (its hash does not match); {_AGAIN}")
    try:
        tensor_bytes = {k: int(v["data_offsets"][1]) - int(v["data_offsets"][0]) for k, v in parsed.items()}
        return Header(
            path=path,
            format_version=version,
            kind=kind,
            tetra_version=header["tetra_version"],
            config=ModelConfig.from_dict(header["config"], where=f"{path}: config"),
            config_as_written=header["config"],
            content_hash=header["content_hash"],
            info=header["info"],
            tensor_bytes=tensor_bytes,
            file_bytes=n_file,
        )
    except (KeyError, TypeError, IndexError) as error:
        raise FileFormatError(f"{path}: the header lacks or garbles {error}; {_AGAIN}") from None


def _check_tensors(path: Path, model: TetraModel, tensors: Mapping[str, Tensor]) -> None:
    expected = model.state_dict()
    for name in sorted(expected.keys() - tensors.keys()):
        raise FileFormatError(f"{path}: tensor '{name}' is missing, the config asks for it; {_AGAIN}")
    for name in sorted(tensors.keys() - expected.keys()):
        raise FileFormatError(f"{path}: unexpected tensor '{name}', the config has no such layer; {_AGAIN}")
    for name, tensor in tensors.items():
        want = expected[name]
        if tensor.shape != want.shape:
            raise FileFormatError(
                f"{path}: tensor '{name}' has shape {list(tensor.shape)}, the config asks for "
                f"{list(want.shape)}; {_AGAIN}"
            )
        # Floats may rest in half precision; codes and scales may not.
        fixed = not want.is_floating_point() or name.endswith(".weight_scale")
        if tensor.dtype != want.dtype if fixed else not tensor.is_floating_point():
            found = f"tensor '{name}' is {tensor.dtype}"
            raise FileFormatError(f"{path}: {found}, expected {want.dtype}; {_AGAIN}")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise FileFormatError(f"{path}: tensor '{name}' has NaN or infinite values; save a sound model")
    for name, layer in model.named_modules():
        if isinstance(layer, PackedTernaryLinear):
            try:
                check_packed(tensors[f"{name}.packed"], layer.in_features)
            except ValueError as error:
                raise FileFormatError(f"{path}: tensor '{name}.packed': {error}; {_AGAIN}") from None


def _load(name_or_path: str | Path, kind: str, device: torch.device | str | None) -> TetraModel:
    header = read_header(name_or_path)
    path = header.path
    if header.kind != kind:
        fix = "run: tetra pack FILE OUT" if kind == PACKED_KIND else "packed weights can't be trained"
        raise FileFormatError(f"{path}: holds a '{header.kind}', expected a '{kind}'; {fix}")
    try:
        tensors = safetensors.torch.load(path.read_bytes())
    except OSError as error:
        raise _unreadable(path, error) from None
    except (SafetensorError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise FileFormatError(f"{path}: truncated or damaged, {header.file_bytes} bytes ({reason}); {_AGAIN}") from None
    found = content_hash(header.config_as_written, tensors)
    if found != header.content_hash:
        raise FileFormatError(
            f"{path}: the content was altered: its hash is {found[:12]}..., the header says "
            f"{header.content_hash[:12]}...; {_AGAIN}"
        )
    try:
        model = TetraModel(header.config, packed=kind == PACKED_KIND)
    except ConfigError as error:  # an option of the head, which only the head knows
        raise ConfigError(f"{path}: config: {error}") from None
    _check_tensors(path, model, tensors)
    model.load_state_dict(tensors, assign=True)
    model.content_hash, model.info = header.content_hash, header.info
    return model if device is None else model.to(device)


def load(name_or_path: str | Path, *, device: torch.device | str | None = None) -> TetraModel:
    """Load a packed model, ready to describe images.

    Args:
        name_or_path: a file written by :func:`save`, or the name of a model that ships, such as "nano".
        device: where to put it; the CPU by default.

    Raises:
        FileFormatError: no such file; truncated, altered, of another kind or a newer format; a tensor
            missing, unexpected, of the wrong shape, or with an illegal 2-bit code.
        ConfigError: the config in the file has an unknown key or a value that cannot work.
    """
    return _load(name_or_path, PACKED_KIND, device)


def load_trainable(path: str | Path, *, device: torch.device | str | None = None) -> TetraModel:
    """Load a model with its master weights, to go on training or to pack. Raises what :func:`load` raises."""
    return _load(path, TRAINABLE_KIND, device)
