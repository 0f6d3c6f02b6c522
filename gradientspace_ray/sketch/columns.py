"""A sketch on disk: its rows in column blocks, so that two sketches merge while one block of each is in memory.

A saved sketch is a folder: `block-00000.safetensors` (tensor `rows`, K x columns), ..., `coordinates.safetensors`
(`coordinates` U, N x K, and `singular_values`, K, float64) and `sketch.json`, written last, with the size and the
checksum of the others.

Shapes: N examples, D gradient entries, K rows kept.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pyarrow import fs
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save

from gradientspace_ray.sketch.online_svd import Energy, OnlineSVD, column_blocks, gram, rotate, top_directions

BLOCK_COLUMNS = 2**17
RECORD, COORDINATES = "sketch.json", "coordinates.safetensors"
MEND = "delete the folder and make the sketch again"
RowsDtype = Literal["float32", "bfloat16"]


class SketchError(ValueError):
    """A saved sketch that cannot be used; the message names the file in one line."""


class SavedFile(NamedTuple):
    """What `sketch.json` knows about another file of the folder."""

    size_bytes: int
    sha256: str


class SketchRecord(BaseModel):
    """Contents of `sketch.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: Literal[1] = 1
    name: str
    """What the sketch is of; a caller's own mark."""
    rank: int
    """Most rows kept."""
    dimension: int
    """D."""
    dtype: RowsDtype
    """Type of the rows; the coordinates are float64."""
    block_columns: int
    energy_total: float
    energy_captured: float
    singular_values: list[float]
    ids: list[str]
    """One for each row of the coordinates."""
    files: dict[str, SavedFile]
    """The column blocks in order, and the coordinates."""

    @property
    def energy(self) -> Energy:
        """The ledger."""
        return Energy(self.energy_total, self.energy_captured)

    @property
    def blocks(self) -> list[str]:
        """File names of the column blocks, in order."""
        return [name for name in self.files if name != COORDINATES]


def save_sketch(
    folder: Path,
    sketch: OnlineSVD,
    ids: Sequence[str],
    dtype: RowsDtype = "float32",
    block_columns: int = BLOCK_COLUMNS,
    name: str = "",
) -> SketchRecord:
    """Write a sketch into an existing folder.

    Args:
        folder: where to.
        sketch: at least one example.
        ids: one for each row of `sketch.coordinates`.
        dtype: `bfloat16` halves the files; R = U^T G then holds to 2^-9 of an entry, and the ledger of a merge to about
            1e-3.
        block_columns: columns in one file; sketches that are to be merged must agree.
        name: see `SketchRecord`.

    Raises:
        ValueError: the ids do not fit the sketch.
    """
    if len(ids) != sketch.coordinates.shape[0] or not len(ids):
        raise ValueError(f"a sketch of {sketch.coordinates.shape[0]} examples cannot be saved with {len(ids)} ids")
    files = {}
    for index, columns in enumerate(column_blocks(sketch.dimension, block_columns)):
        block = {"rows": sketch.rows[:, columns].to("cpu", getattr(torch, dtype))}
        files[_block_name(index)] = _write(folder / _block_name(index), block)
    return _finish(
        folder,
        files,
        sketch.coordinates,
        sketch.singular_values,
        name=name,
        rank=sketch.rank,
        dimension=sketch.dimension,
        dtype=dtype,
        block_columns=block_columns,
        energy_total=sketch.energy.total,
        ids=list(ids),
    )


def load_sketch(folder: Path) -> tuple[OnlineSVD, list[str]]:
    """Read a saved sketch and the ids of its examples.

    Raises:
        SketchError: a file is missing, truncated or altered.
    """
    record = read_record(folder)
    rows_KD = torch.cat([_read(folder, record, name)["rows"].float() for name in record.blocks], dim=1)
    coordinates_NK, singular_values_K = read_coordinates(folder, record)
    sketch = OnlineSVD.from_parts(record.rank, rows_KD, coordinates_NK, singular_values_K, record.energy)
    return sketch, record.ids


def read_record(folder: Path) -> SketchRecord:
    """`sketch.json` of a saved sketch.

    Raises:
        SketchError: it is missing or not readable.
    """
    try:
        return SketchRecord.model_validate_json((folder / RECORD).read_bytes())
    except (OSError, ValidationError) as error:
        raise SketchError(f"{folder / RECORD}: {_reason(error)}; {MEND}") from error


def read_coordinates(folder: Path, record: SketchRecord) -> tuple[torch.Tensor, torch.Tensor]:
    """U [N, K] and the singular values [K] of a saved sketch, float64.

    Raises:
        SketchError: the file is missing, truncated or altered.
    """
    tensors = _read(folder, record, COORDINATES)
    return tensors["coordinates"], tensors["singular_values"]


def check_sketch(folder: Path) -> SketchRecord:
    """Compare every file of a saved sketch with its checksum.

    Raises:
        SketchError: a file is missing, truncated or altered.
    """
    record = read_record(folder)
    for name in record.files:
        _read_bytes(folder, record, name)
    return record


def is_complete(filesystem: fs.FileSystem, folder: str, name: str) -> bool:
    """Whether the sketch called `name` is at `folder` with all files at their sizes; contents are not read."""
    try:
        with filesystem.open_input_stream(f"{folder}/{RECORD}") as stream:
            record = SketchRecord.model_validate_json(stream.read())
    except (FileNotFoundError, ValidationError):
        return False
    found = filesystem.get_file_info([f"{folder}/{file}" for file in record.files])
    sizes = [saved.size_bytes for saved in record.files.values()]
    return record.name == name and [info.size for info in found] == sizes


def merge_saved(first: Path, second: Path, out: Path, rank: int, name: str = "") -> SketchRecord:
    """Merge two saved sketches into an existing empty folder; the examples of `second` follow those of `first`.

    Two passes over the column blocks, one block of each sketch in memory: the Gram matrix, then the rotation.

    Raises:
        SketchError: a file is missing, truncated or altered, the sketches do not fit, or they share an example.
    """
    records = [read_record(first), read_record(second)]
    _check_fit(first, second, records)
    sources = list(zip((first, second), records, strict=True))
    blocks = records[0].blocks
    gram_SS = torch.stack([gram([_read(*source, block)["rows"] for source in sources]) for block in blocks]).sum(dim=0)
    directions_SK, singular_values_K = top_directions(gram_SS, rank)
    files = {}
    for block in blocks:
        rows = rotate([_read(*source, block)["rows"] for source in sources], directions_SK)
        files[block] = _write(out / block, {"rows": rows.to(getattr(torch, records[0].dtype))})
    kept = len(records[0].singular_values)
    return _finish(
        out,
        files,
        torch.cat(
            [
                read_coordinates(*source)[0] @ part
                for source, part in zip(sources, (directions_SK[:kept], directions_SK[kept:]), strict=True)
            ]
        ),
        singular_values_K,
        name=name,
        rank=rank,
        dimension=records[0].dimension,
        dtype=records[0].dtype,
        block_columns=records[0].block_columns,
        energy_total=records[0].energy_total + records[1].energy_total,
        ids=records[0].ids + records[1].ids,
    )


def copy_saved(source: Path, out: Path, name: str) -> SketchRecord:
    """Copy a saved sketch into an existing empty folder under another name, checking every file.

    Raises:
        SketchError: a file is missing, truncated or altered.
    """
    record = read_record(source)
    for file in record.files:
        (out / file).write_bytes(_read_bytes(source, record, file))
    renamed = record.model_copy(update={"name": name})
    (out / RECORD).write_text(renamed.model_dump_json() + "\n")
    return renamed


def _block_name(index: int) -> str:
    return f"block-{index:05d}.safetensors"


def _check_fit(first: Path, second: Path, records: Sequence[SketchRecord]) -> None:
    for key in ("dimension", "dtype", "block_columns"):
        values = [getattr(record, key) for record in records]
        if values[0] != values[1]:
            raise SketchError(f"{first} and {second} cannot be merged: {key} is {values[0]} and {values[1]}")
    shared = set(records[0].ids) & set(records[1].ids)
    if shared:
        raise SketchError(f"{first} and {second} cannot be merged: both hold example {min(shared)}")


def _finish(
    folder: Path,
    files: dict[str, SavedFile],
    coordinates_NK: torch.Tensor,
    singular_values_K: torch.Tensor,
    **facts: object,
) -> SketchRecord:
    """Write the coordinates, then `sketch.json`."""
    tensors = {"coordinates": coordinates_NK.contiguous(), "singular_values": singular_values_K.contiguous()}
    record = SketchRecord.model_validate(
        {
            **facts,
            "energy_captured": float(singular_values_K.square().sum()),
            "singular_values": singular_values_K.tolist(),
            "files": {**files, COORDINATES: _write(folder / COORDINATES, tensors)},
        }
    )
    (folder / RECORD).write_text(record.model_dump_json() + "\n")
    return record


def _write(path: Path, tensors: dict[str, torch.Tensor]) -> SavedFile:
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    path.write_bytes(data)
    return SavedFile(len(data), hashlib.sha256(data).hexdigest())


def _read(folder: Path, record: SketchRecord, name: str) -> dict[str, torch.Tensor]:
    data = _read_bytes(folder, record, name)
    try:
        return load(data)
    except SafetensorError as error:
        raise SketchError(f"{folder / name}: {_reason(error)}; {MEND}") from error


def _read_bytes(folder: Path, record: SketchRecord, name: str) -> bytes:
    try:
        data = (folder / name).read_bytes()
    except OSError as error:
        raise SketchError(f"{folder / name}: {_reason(error)}; {MEND}") from error
    size_bytes, sha256 = record.files[name]
    if len(data) != size_bytes:
        raise SketchError(f"{folder / name}: {len(data)} bytes where {size_bytes} were written; {MEND}")
    if hashlib.sha256(data).hexdigest() != sha256:
        raise SketchError(f"{folder / name}: the contents are not what was written; {MEND}")
    return data


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return (error.strerror or str(error)).lower()
    if isinstance(error, ValidationError):
        return f"not a sketch's record ({json.dumps(error.errors()[0]['msg'])})"
    return str(error).splitlines()[0]
