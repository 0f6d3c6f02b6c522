"""What tells two models apart that have the same name."""

import functools
import hashlib
import os
from pathlib import Path
from typing import Any

HASHED_BYTES = 2**29
"""Reading larger files would be felt at every start."""
CHUNK_BYTES = 2**20


def model_fingerprint(name: str) -> Any:
    """A JSON-able value that changes when the model does.

    For a local folder, its files' names and contents; of files above `HASHED_BYTES`, sizes and times instead.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return name
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [name, [[str(path.relative_to(folder)), *_file_fingerprint(path, path.stat())] for path in files]]


def _file_fingerprint(path: Path, stat: os.stat_result) -> tuple[int, int | str]:
    if stat.st_size > HASHED_BYTES:
        return stat.st_size, stat.st_mtime_ns
    return stat.st_size, _sha256(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _sha256(path: Path, size_bytes: int, mtime_ns: int) -> str:
    """Digest of a file's contents; size and time are there for the cache."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for chunk in iter(lambda: stream.read(CHUNK_BYTES), b""):
            digest.update(chunk)
    return digest.hexdigest()
