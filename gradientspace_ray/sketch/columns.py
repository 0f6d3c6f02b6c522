"""A saved sketch: a folder with the rows in column blocks, so that it is read and merged one block at a time.

    block-00000.safetensors, ...   `rows`, K x columns
    coordinates.safetensors        of a shard: `coordinates` U, N x K, `row_energies`, N, and, where it was asked for,
                                   `projection`, N x P, see `RandomProjection`
    turn.safetensors               of a merge instead: `directions`, S x K, by which the S rows of its inputs became K
    sketch.json                    the record, written last, with the size and the checksum of the others

A sketch that was merged keeps all but its blocks: the coordinates of its examples in the merged one are its own times
the directions on the way.

Shapes: N examples, D gradient entries, K rows, S rows of the inputs of a merge together, P numbers of a projection.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple, Protocol

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from gradientspace_ray.sketch.directions import column_blocks
from gradientspace_ray.sketch.encoding import decode, encode
from gradientspace_ray.sketch.online_svd import OnlineSVD, Shrink
from gradientspace_ray.sketch.refinement import Refinement

BLOCK_COLUMNS = 2**17
RECORD, COORDINATES, TURN = "sketch.json", "coordinates.safetensors", "turn.safetensors"
PROJECTION = "projection"
MEND = "delete the folder and run the gradients stage again"
CONNECTIONS = 16
"""Small files that are read at once."""
BLOCKS_AT_ONCE = 4
"""Blocks that are written at once: an object store's answer takes longer than a block's way to it."""
RowsDtype = Literal["float32", "bfloat16"]


class SketchError(ValueError):
    """A saved sketch that cannot be used; the message names the file in one line."""


class Store(Protocol):
    """Where sketches are saved; a `RunDirectory` is one. Folders and files have names with `/`."""

    def read_view(self, name: str) -> memoryview:
        """Contents of a file; FileNotFoundError when it is missing."""
        ...

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a file so that others see all of it or nothing."""
        ...

    def sizes(self, name: str) -> dict[str, int]:
        """Files in a folder and its folders -> bytes."""
        ...


class SavedFile(NamedTuple):
    """What `sketch.json` knows about another file of the folder."""

    size_bytes: int
    sha256: str


class SketchRecord(BaseModel):
    """Contents of `sketch.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: Literal[2] = 2
    name: str
    """What the sketch is of; a caller's own mark."""
    kind: Literal["svd", "sums"]
    """`sums`: rows and coordinates are the sums and projections of a `Refinement`."""
    rank: int
    """Most rows shown at the end."""
    oversampling: int
    """Rows carried beyond these until then."""
    rows: int
    """K, the rows that are carried here."""
    dimension: int
    """D."""
    dtype: RowsDtype
    """Type of the rows; all else is float64."""
    block_columns: int
    examples: int
    """N."""
    energy_total: float
    energy_captured: float | None
    """Of the leading `rank` rows; None: not known before all sums are there."""
    singular_values: list[float]
    """Of an `svd`, falling."""
    shrink: Shrink = "none"
    shrunk: float = 0.0
    ids: list[str]
    """Of a shard: one for each row of the coordinates."""
    files: dict[str, SavedFile]
    """The column blocks in order, and the coordinates or the directions."""

    @property
    def blocks(self) -> list[str]:
        """File names of the column blocks, in order."""
        return [name for name in self.files if name not in (COORDINATES, TURN)]


class SavedSketch(NamedTuple):
    """A saved sketch that has a record."""

    store: Store
    folder: str
    record: SketchRecord

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Contents of one of its files.

        Raises:
            SketchError: the file is missing, truncated or altered.
        """
        # Aligned as PyTorch aligns, which products depend on.
        return {key: tensor.clone() for key, tensor in self._views(name).items()}

    def block(self, name: str) -> torch.Tensor:
        """The rows of a column block, [K, columns]; not to be written to.

        Raises:
            SketchError: the file is missing, truncated or altered.
        """
        return self._views(name)["rows"]

    def small(self) -> dict[str, torch.Tensor]:
        """What it keeps when its rows have been merged: coordinates and row energies, or directions.

        Raises:
            SketchError: the file is missing, truncated or altered.
        """
        views = self._views(COORDINATES if COORDINATES in self.record.files else TURN)
        return {key: tensor.clone() for key, tensor in views.items() if key != PROJECTION}

    def projection(self) -> torch.Tensor:
        """The random projections of a shard's examples, [N, P] float32; not to be written to.

        Raises:
            SketchError: the file is missing, truncated or altered, or holds none.
        """
        tensors = self._views(COORDINATES)
        if PROJECTION not in tensors:
            raise SketchError(f"{self.folder}/{COORDINATES} holds no projection; {MEND}")
        return tensors[PROJECTION]

    def _views(self, name: str) -> dict[str, torch.Tensor]:
        place = f"{self.folder}/{name}"
        try:
            data = self.store.read_view(place)
        except FileNotFoundError as error:
            raise SketchError(f"{place} is missing; {MEND}") from error
        if name not in self.record.files:
            raise SketchError(f"{place} is none of the files of {self.folder}/{RECORD}; {MEND}")
        size_bytes, sha256 = self.record.files[name]
        if len(data) != size_bytes:
            raise SketchError(f"{place}: {len(data)} bytes where {size_bytes} were written; {MEND}")
        if hashlib.sha256(data).hexdigest() != sha256:
            raise SketchError(f"{place}: the contents are not what was written; {MEND}")
        return decode(data)

    def rows(self) -> torch.Tensor:
        """All rows, [K, D] in the type that they have on disk.

        Raises:
            SketchError: a file is missing, truncated or altered.
        """
        shape = (self.record.rows, self.record.dimension)
        rows_KD = torch.empty(shape, dtype=getattr(torch, self.record.dtype))
        columns = column_blocks(self.record.dimension, self.record.block_columns)
        for block, part in zip(self.record.blocks, columns, strict=True):
            rows_KD[:, part] = self.block(block)
        return rows_KD

    def check(self, files: Iterable[str]) -> None:
        """Compare files with their checksums.

        Raises:
            SketchError: one is missing, truncated or altered.
        """
        for name in files:
            self._views(name)


def open_sketch(store: Store, folder: str) -> SavedSketch:
    """Read the record of a saved sketch.

    Raises:
        SketchError: it is missing or not readable.
    """
    place = f"{folder}/{RECORD}"
    try:
        return SavedSketch(store, folder, SketchRecord.model_validate_json(bytes(store.read_view(place))))
    except FileNotFoundError as error:
        raise SketchError(f"{place} is missing; {MEND}") from error
    except ValidationError as error:
        reason = json.dumps(error.errors()[0]["msg"])
        raise SketchError(f"{place}: not a sketch's record ({reason}); {MEND}") from error


def save_sketch(
    store: Store,
    folder: str,
    sketch: OnlineSVD,
    ids: Sequence[str],
    block_columns: int = BLOCK_COLUMNS,
    name: str = "",
    projection_NP: torch.Tensor | None = None,
) -> SketchRecord:
    """Save a sketch that is in memory, with the ids of its examples.

    Args:
        store: where to.
        folder: name of the sketch's folder there.
        sketch: at least one example. Rows in bfloat16 halve the files; along a tree of merges R = U^T G then holds to
            about 3e-3 of ||G||, and the ledger to about 1e-4 of ||G||^2 where D is in the thousands or more.
        ids: one for each row of the coordinates.
        block_columns: columns in one file; sketches that are to be merged must agree.
        name: see `SketchRecord`.
        projection_NP: kept beside the coordinates.

    Raises:
        ValueError: the ids, or the projection, do not fit the sketch.
    """
    tensors = {"coordinates": sketch.carried_coordinates, "row_energies": sketch.row_energies}
    if sketch.weights is not None:
        tensors["weights"] = sketch.weights
    return _save_leaf(
        store,
        folder,
        sketch.carried_rows,
        tensors,
        ids,
        projection_NP,
        name=name,
        kind="svd",
        rank=sketch.rank,
        oversampling=sketch.carried - sketch.rank,
        block_columns=block_columns,
        energy_total=sketch.energy_total,
        energy_captured=sketch.energy.captured,
        singular_values=sketch.carried_singular_values.tolist(),
        shrink=sketch.shrink,
        shrunk=sketch.shrunk,
    )


def save_sums(
    store: Store,
    folder: str,
    refinement: Refinement,
    ids: Sequence[str],
    rank: int,
    block_columns: int = BLOCK_COLUMNS,
    name: str = "",
    projection_NP: torch.Tensor | None = None,
) -> SketchRecord:
    """Save what a second pass gathered from some examples, to make a sketch of `rank` rows; see `save_sketch`."""
    tensors = {"coordinates": refinement.projections, "row_energies": refinement.row_energies}
    return _save_leaf(
        store,
        folder,
        refinement.sums,
        tensors,
        ids,
        projection_NP,
        name=name,
        kind="sums",
        rank=rank,
        oversampling=max(0, refinement.sums.shape[0] - rank),
        block_columns=block_columns,
        energy_total=refinement.energy_total,
        energy_captured=None,
        singular_values=[],
    )


def save_shard(
    store: Store,
    folder: str,
    made: OnlineSVD | Refinement,
    ids: Sequence[str],
    rank: int,
    name: str,
    projections: Sequence[torch.Tensor] = (),
) -> SketchRecord:
    """Save what a pass made of a shard, `projections` being those of its buffers in order; see `save_sketch`."""
    projection_NP = torch.cat(list(projections)) if projections else None
    if isinstance(made, Refinement):
        return save_sums(store, folder, made, ids, rank, name=name, projection_NP=projection_NP)
    return save_sketch(store, folder, made, ids, name=name, projection_NP=projection_NP)


def load_sketch(store: Store, folder: str) -> tuple[OnlineSVD, list[str]]:
    """The saved sketch of a shard, and the ids of its examples.

    Raises:
        SketchError: a file is missing, truncated or altered, or the sketch has no coordinates of its own.
    """
    saved = open_sketch(store, folder)
    record, tensors = saved.record, saved.tensors(COORDINATES)
    sketch = OnlineSVD.from_parts(
        rank=record.rank,
        oversampling=record.oversampling,
        rows_CD=saved.rows(),
        coordinates_NC=tensors["coordinates"],
        singular_values_C=torch.tensor(record.singular_values, dtype=torch.float64),
        row_energies_N=tensors["row_energies"],
        energy_total=record.energy_total,
        shrink=record.shrink,
        weights_CC=tensors.get("weights"),
        shrunk=record.shrunk,
        dtype=getattr(torch, record.dtype),
    )
    return sketch, record.ids


def is_complete(store: Store, folder: str, name: str) -> bool:
    """Whether the sketch called `name` is at `folder` with all files at their sizes; contents are not read."""
    sizes = store.sizes(folder)
    if RECORD not in sizes:
        return False
    try:
        record = open_sketch(store, folder).record
    except SketchError:
        return False
    return record.name == name and has_files(record, record.files, sizes)


def is_committed(store: Store, folder: str, name: str) -> bool:
    """Whether the sketch called `name` was saved at `folder`; its blocks may have been merged and removed since."""
    try:
        return open_sketch(store, folder).record.name == name
    except SketchError:
        return False


def has_files(record: SketchRecord, names: Iterable[str], sizes: dict[str, int]) -> bool:
    """Whether files of a sketch are there at their sizes, `sizes` being what its folder holds."""
    return all(sizes.get(name) == record.files[name].size_bytes for name in names)


def save_block(store: Store, folder: str, name: str, tensors: dict[str, torch.Tensor]) -> SavedFile:
    """Write one file of a sketch."""
    data = encode(tensors)
    store.write_bytes(f"{folder}/{name}", data)
    return SavedFile(len(data), hashlib.sha256(data).hexdigest())


def save_record(store: Store, folder: str, record: SketchRecord) -> None:
    """Commit a sketch whose other files are there."""
    store.write_bytes(f"{folder}/{RECORD}", (record.model_dump_json() + "\n").encode())


def _save_leaf(
    store: Store,
    folder: str,
    rows_KD: torch.Tensor,
    tensors: dict[str, torch.Tensor],
    ids: Sequence[str],
    projection_NP: torch.Tensor | None,
    block_columns: int,
    **facts: Any,
) -> SketchRecord:
    count = tensors["coordinates"].shape[0]
    if len(ids) != count or not ids:
        raise ValueError(f"a sketch of {count} examples cannot be saved with {len(ids)} ids")
    if projection_NP is not None:
        if len(projection_NP) != count:
            raise ValueError(f"a sketch of {count} examples cannot be saved with {len(projection_NP)} projections")
        tensors[PROJECTION] = projection_NP
    blocks = {
        f"block-{index:05d}.safetensors": columns
        for index, columns in enumerate(column_blocks(rows_KD.shape[1], block_columns))
    }

    def save_columns(block: tuple[str, slice]) -> SavedFile:
        return save_block(store, folder, block[0], {"rows": rows_KD[:, block[1]]})

    with ThreadPoolExecutor(BLOCKS_AT_ONCE) as pool:
        files = dict(zip(blocks, pool.map(save_columns, blocks.items()), strict=True))
    files[COORDINATES] = save_block(store, folder, COORDINATES, tensors)
    record = SketchRecord(
        **facts,
        rows=rows_KD.shape[0],
        dimension=rows_KD.shape[1],
        dtype="bfloat16" if rows_KD.dtype == torch.bfloat16 else "float32",
        block_columns=block_columns,
        examples=count,
        ids=list(ids),
        files=files,
    )
    save_record(store, folder, record)
    return record
