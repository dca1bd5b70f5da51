"""What a place map answers, whoever may write to it: searching, looking up, facts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tetra.coordinates import CoordinateFrame
from tetra.errors import MapError
from tetra.images import load_image
from tetra.kernels import pack_bits
from tetra.map_checks import check_codes, check_descriptors, check_whole
from tetra.map_columns import Floats, Ids, Ints
from tetra.map_manifest import Manifest
from tetra.map_segments import damage_named
from tetra.map_state import Hits, Match, State
from tetra.regions import Region


class Describes(Protocol):
    """A model, as far as a query by image needs one: see :class:`tetra.model.TetraModel`."""

    content_hash: str | None

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width."""

    def __call__(self, images: Tensor) -> Tensor:
        """Float descriptors [B, D] of images uint8 [B, 3, height, width]."""


def one_code(code: Tensor | npt.NDArray[np.uint8]) -> Any:
    """A code [B] as [1, B]; what is no array is left for the check of codes to name."""
    return code[None] if isinstance(code, (Tensor, np.ndarray)) else code


class MapReader:
    """The reading half of :class:`tetra.place_map.PlaceMap`.

    Every method works on the state that it finds when it begins; no thread waits for another.
    """

    path: Path
    _manifest: Manifest
    _state: State

    # --- facts ---

    @property
    def frame(self) -> CoordinateFrame:
        """What positions mean."""
        return self._manifest.frame

    @property
    def model_hash(self) -> str:
        """Content hash of the model whose codes the map holds."""
        return self._manifest.model_hash

    @property
    def code_bytes(self) -> int:
        """Bytes of a code, B."""
        return self._manifest.code_bytes

    @property
    def descriptor_dims(self) -> int | None:
        """Values of the float descriptors that are kept beside the codes, D; None if none are."""
        return self._manifest.descriptor_dims

    def __len__(self) -> int:
        return self._state.n_places

    def __contains__(self, id: object) -> bool:
        return isinstance(id, str) and self.row(id) >= 0

    def __repr__(self) -> str:
        return f"PlaceMap({str(self.path)!r}, {len(self)} places, {self.code_bytes} bytes a code, {self.frame})"

    # --- searching ---

    def search(
        self,
        codes: Tensor | npt.NDArray[np.uint8],
        k: int,
        *,
        max_distance: int | None = None,
        within: Region | None = None,
    ) -> Hits:
        """The ``k`` nearest places of each code of uint8 [Q, B], by (distance, row).

        Args:
            codes: of the map's model.
            k: 1 to the number of places.
            max_distance: leave out places that differ in more bits.
            within: leave out places that are not in this region.

        Raises:
            MapError: the map is empty, or an argument cannot be.
        """
        return self._search(self._state, self._check_codes(codes, None), k, max_distance, within)

    def _search(
        self, state: State, codes: npt.NDArray[np.uint8], k: int, max_distance: int | None, within: Region | None
    ) -> Hits:
        n = self._refuse_empty(state)
        limits = f"the map {self.path} has {n} places, so it has to be between 1 and {n}"
        if check_whole(k, "k", 1, limits) > n:
            raise MapError(f"k {k}: {limits}")
        if max_distance is not None:
            check_whole(max_distance, "max_distance", 0, "it has to be a whole number of bits, from 0 on")
        if within is not None and not isinstance(within, Region):
            raise MapError(f"within {within!r}: pass a Region, such as Region.circle((x, y), 100.0)")
        return state.search(codes, int(k), max_distance, within)

    def _refuse_empty(self, state: State) -> int:
        if not state.n_places:
            raise MapError(f"{self.path}: the map is empty; add places first")
        return state.n_places

    def _check_codes(
        self, codes: Tensor | npt.NDArray[np.uint8], n: int | None, name: str = "codes"
    ) -> npt.NDArray[np.uint8]:
        of_map = f"{self.path} is a map of the model {self.model_hash[:12]}, describe images with that"
        return check_codes(codes, n, self.code_bytes, of_map, name)

    def rerank(self, hits: Hits, descriptors: Tensor | npt.NDArray[Any], k: int | None = None) -> Hits:
        """The ``k`` hits (None: all) whose kept descriptors are most similar to those of the queries, float [Q, D].

        By falling cosine similarity; equal ones stay in their order.

        Raises:
            MapError: the map keeps no descriptors, or the shapes do not fit.
        """
        return self._rerank(self._state, hits, descriptors, k)

    def _rerank(self, state: State, hits: Hits, descriptors: Tensor | npt.NDArray[Any], k: int | None) -> Hits:
        queries = check_descriptors(descriptors, len(hits.rows), self._require_descriptors())
        return state.rerank(hits, queries, k)

    def _require_descriptors(self) -> int:
        if self.descriptor_dims is None:
            raise MapError(f"{self.path}: keeps no float descriptors; create it with keep_descriptors")
        return self.descriptor_dims

    def query(
        self,
        query: Tensor | npt.NDArray[np.uint8] | str | Path,
        k: int = 1,
        *,
        model: Describes | None = None,
        max_distance: int | None = None,
        within: Region | None = None,
        shortlist: int | None = None,
        descriptor: Tensor | npt.NDArray[Any] | None = None,
    ) -> list[Match]:
        """The at most ``k`` nearest places of one code or image, best first.

        Args:
            query: a code, uint8 [B]; or, with ``model``, an image: a file or a tensor [3, height, width].
            k: at least 1; a map with fewer places answers with all of them.
            model: describes the image; has to be the model of the map.
            max_distance, within: as in :meth:`search`.
            shortlist: rank this many nearest places again by :meth:`rerank`, and answer with the best ``k`` of them.
                Needs a map that keeps descriptors. None: off.
            descriptor: float [D] of the query, for the shortlist; ``model`` computes it.

        Raises:
            MapError: the map is empty, the model is another one, or an argument cannot be.
            ImageError: the image can't be read or does not fit the model.
        """
        state = self._state
        n = self._refuse_empty(state)
        check_whole(k, "k", 1, "ask for at least 1 place")
        if shortlist is not None:
            self._require_descriptors()
            check_whole(shortlist, "shortlist", k, f"it has to hold at least the {k} places that are asked for")
        code: Tensor | npt.NDArray[np.uint8]
        if model is not None:
            code, descriptor = self._describe(model, query)
        elif isinstance(query, (str, Path)):
            raise MapError(f"query {query}: pass the model that describes it, or a code")
        else:
            code = query
        if not isinstance(code, (Tensor, np.ndarray)) or code.ndim != 1:
            found = f"shape {list(code.shape)}" if isinstance(code, (Tensor, np.ndarray)) else type(code).__name__
            raise MapError(f"query: {found}, expected a code [{self.code_bytes}], or an image with the model")
        if shortlist is not None and descriptor is None:
            raise MapError("descriptor: missing, the shortlist is ranked by it; pass the query's float descriptor")
        hits = self._search(
            state, self._check_codes(one_code(code), 1, "query"), min(shortlist or k, n), max_distance, within
        )
        if shortlist is not None and descriptor is not None:
            hits = self._rerank(state, hits, descriptor[None], k)
        with damage_named(self.path):
            return state.matches(hits, 0)

    def _describe(self, model: Describes, image: Tensor | npt.NDArray[Any] | str | Path) -> tuple[Tensor, Tensor]:
        """(code [B], descriptor [D]) of an image."""
        if model.content_hash != self.model_hash:
            name = "a model that was never saved" if model.content_hash is None else model.content_hash[:12]
            raise MapError(f"model: it is {name}, the map {self.path} is of {self.model_hash[:12]}; use that one")
        is_file = isinstance(image, (str, Path))
        pixels = load_image(image, model.image_size) if is_file else torch.as_tensor(image)  # type: ignore[arg-type]
        with torch.inference_mode():
            floats = model(pixels[None]).float()
        if not bool(floats.isfinite().all()):
            raise MapError("model: it gives a descriptor with NaN or infinity; check its weights")
        return pack_bits(floats)[0], floats[0]

    def matches(self, hits: Hits, query: int = 0) -> list[Match]:
        """The places that :meth:`search` found for its code number ``query``, best first."""
        with damage_named(self.path):
            return self._state.matches(hits, query)

    # --- by row or by id; a row of no place, or of one that was removed, has nothing ---

    def rows(self) -> Ints:
        """Rows of all places, int64 [n], rising."""
        return self._state.rows()

    def row(self, id: str) -> int:
        """The row of the place with this id; -1 if there is none."""
        try:
            return int(self.rows_of([id])[0])
        except MapError:  # what can't be an id
            return -1

    def rows_of(self, ids: Sequence[str]) -> Ints:
        """The rows of the places with these ids, int64 [n]; -1 where there is none.

        Raises:
            MapError: something is not an id.
        """
        checked = Ids.of(ids)
        with damage_named(self.path):
            return self._state.find(checked)

    def codes(self, rows: npt.ArrayLike) -> npt.NDArray[np.uint8]:
        """Codes uint8 [..., B] of rows [...]; zeros where there is no place."""
        codes: npt.NDArray[np.uint8] = self._state.gather(rows, "codes", np.uint8, self.code_bytes, fill=0)
        return codes

    def positions(self, rows: npt.ArrayLike) -> Floats:
        """Positions float64 [..., 2] in metres of rows [...]; NaN where unknown, or where there is no place."""
        positions: Floats = self._state.gather(rows, "positions", np.float64, 2)
        return positions

    def headings(self, rows: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Headings float32 [...] in degrees of rows [...]; NaN as in :meth:`positions`."""
        headings: npt.NDArray[np.float32] = self._state.gather(rows, "headings", np.float32)
        return headings

    def times(self, rows: npt.ArrayLike) -> Floats:
        """Times float64 [...] in seconds of rows [...]; NaN as in :meth:`positions`."""
        times: Floats = self._state.gather(rows, "times", np.float64)
        return times

    def descriptors(self, rows: npt.ArrayLike) -> npt.NDArray[np.float16]:
        """Kept descriptors float16 [..., D] of rows [...]; NaN where there is no place.

        Raises :class:`~tetra.errors.MapError` if the map keeps none.
        """
        dims = self._require_descriptors()
        descriptors: npt.NDArray[np.float16] = self._state.gather(rows, "descriptors", np.float16, dims)
        return descriptors

    def ids(self, rows: npt.ArrayLike) -> list[str | None]:
        """Ids of rows [n]; None where there is no place."""
        wanted = _numbers(rows)
        with damage_named(self.path):
            return [None if raw is None else raw.decode() for raw in self._state.blobs(wanted, "ids")]

    def metadata(self, rows: npt.ArrayLike) -> list[dict[str, Any] | None]:
        """Metadata of rows [n]; None where there is none."""
        wanted = _numbers(rows)
        with damage_named(self.path):
            return [json.loads(raw) if raw else None for raw in self._state.blobs(wanted, "metadata")]

    def thumbnails(self, rows: npt.ArrayLike) -> list[bytes | None]:
        """JPEG files of rows [n]; None where there is none."""
        wanted = _numbers(rows)
        with damage_named(self.path):
            return [raw or None for raw in self._state.blobs(wanted, "thumbnails")]


def _numbers(rows: npt.ArrayLike) -> Ints:
    """Rows int64 [n]; what is no number is the caller's mistake, not a damaged file's."""
    return np.asarray(rows, dtype=np.int64).ravel()
