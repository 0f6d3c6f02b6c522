"""The run directory: where every stage reads its inputs and commits its outputs.

It lives on any pyarrow filesystem (a local folder, `s3://`, `gs://`). What is committed is whole: a file or folder
appears under its name only when it is complete, and the manifest's entry is written last.
"""

import hashlib
import json
import os
import shutil
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs
from pydantic import BaseModel, ConfigDict, Field

LEASE_FRESH_S = 30.0
LEASE_RENEWAL_S = 10.0


class RunError(RuntimeError):
    """A run directory that cannot be used; the message names the place and the mend in one line."""


class Summary(BaseModel):
    """What a stage returns: `made` for people (one line), `counts` for the manifest."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    made: str
    counts: dict[str, Any] = {}
    output: str | None = None
    """Digest of what was made, where that is known better than by the digest of the stage's inputs."""


class StageRecord(BaseModel):
    """One stage's entry in the manifest."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    status: Literal["done", "running", "failed", "interrupted"]
    digest: str
    """Of the recipe parts and inputs that decide the stage's output."""
    output: str = ""
    seconds: float = 0.0
    made: str = ""
    counts: dict[str, Any] = {}
    versions: dict[str, str] = {}
    started_at: float = 0.0
    """Unix time."""
    error: str | None = None


class Manifest(BaseModel):
    """Stage name -> record, in the order in which they ran."""

    model_config = ConfigDict(extra="forbid")
    format: int = 1
    stages: dict[str, StageRecord] = Field(default_factory=dict)


def digest_of(value: Any) -> str:
    """Sixteen hex digits of the SHA-256 of a JSON-able value; equal values give equal digests on every machine."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class RunDirectory:
    """Paths, atomic commits and the manifest of one run. Names are relative to the run directory, with `/`.

    It is opened anew in every process from `uri`; nothing else needs to travel.
    """

    def __init__(self, uri: str | Path) -> None:
        """Open (without creating) the run directory at a local path or a `scheme://` URI."""
        text = str(uri)
        if "://" in text:
            self.uri = text.rstrip("/")
            self.filesystem, base = fs.FileSystem.from_uri(self.uri)
        else:
            self.uri = base = os.path.abspath(os.path.expanduser(text))
            self.filesystem = fs.LocalFileSystem()
        self._base = base.rstrip("/")
        self.is_local = isinstance(self.filesystem, fs.LocalFileSystem)

    def path(self, name: str = "") -> str:
        """The path of `name` on `self.filesystem`."""
        return f"{self._base}/{name}" if name else self._base

    def exists(self, name: str = "") -> bool:
        """Whether a file or folder called `name` is there."""
        return self.filesystem.get_file_info(self.path(name)).type != fs.FileType.NotFound

    def names(self, name: str) -> list[str]:
        """Base names of what a folder holds, sorted; empty when it is missing."""
        selector = fs.FileSelector(self.path(name), allow_not_found=True)
        return sorted(info.base_name for info in self.filesystem.get_file_info(selector))

    def delete(self, name: str) -> None:
        """Remove a file or folder; nothing happens when it is missing."""
        info = self.filesystem.get_file_info(self.path(name))
        if info.type == fs.FileType.Directory:
            self.filesystem.delete_dir(info.path)
        elif info.type == fs.FileType.File:
            self.filesystem.delete_file(info.path)

    def read_bytes(self, name: str) -> bytes:
        """Contents of a file.

        Raises:
            RunError: the file is missing.
        """
        try:
            with self.filesystem.open_input_stream(self.path(name)) as stream:
                return stream.read()
        except FileNotFoundError as error:
            raise RunError(f"{self.path(name)} is missing; run the stage that makes it again") from error

    def write_bytes(self, name: str, data: bytes) -> None:
        """Commit a file at once: readers see the old contents or the new, never a part."""
        target = self.path(name)
        if not self.is_local:
            with self.filesystem.open_output_stream(target) as stream:
                stream.write(data)
            return
        os.makedirs(os.path.dirname(target), exist_ok=True)
        temporary = f"{target}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            Path(temporary).write_bytes(data)
            os.replace(temporary, target)
        finally:
            Path(temporary).unlink(missing_ok=True)

    def read_json(self, name: str) -> Any:
        """A JSON file's value."""
        return json.loads(self.read_bytes(name))

    def write_json(self, name: str, value: Any) -> None:
        """Commit a JSON file."""
        self.write_bytes(name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """A Parquet file as an Arrow table."""
        return pq.read_table(pa.BufferReader(self.read_bytes(name)), columns=columns)

    def write_table(self, name: str, table: pa.Table) -> None:
        """Commit a Parquet file."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        self.write_bytes(name, sink.getvalue().to_pybytes())

    @contextmanager
    def staged(self, name: str) -> Iterator[Path]:
        """A local folder to write into; it becomes `name` when the block ends without an error, and vanishes otherwise.

        An existing folder of that name is replaced.
        """
        if self.is_local:
            parent = Path(self.path(".staging"))
            parent.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(dir=parent))
        else:
            folder = Path(tempfile.mkdtemp(prefix="gradientspace-"))
        try:
            yield folder
            self.delete(name)
            if self.is_local:
                target = Path(self.path(name))
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(folder, target)
                target.chmod(0o755)
            else:
                fs.copy_files(str(folder), self.path(name), destination_filesystem=self.filesystem)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def fetch(self, name: str) -> Path:
        """A local path of a committed file or folder: itself when the run is local, else a copy in the cache.

        The copy is kept under the run's URI, so fetch only names that carry a digest or a folder that does not change
        while this process lives.

        Raises:
            RunError: nothing of that name is there.
        """
        if not self.exists(name):
            raise RunError(f"{self.path(name)} is missing; run the stage that makes it again")
        if self.is_local:
            return Path(self.path(name))
        folder = Path(tempfile.gettempdir()) / "gradientspace-fetched" / str(os.getpid()) / digest_of(self.uri)
        target = folder / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            fs.copy_files(self.path(name), str(target), source_filesystem=self.filesystem)
        return target

    def manifest(self) -> Manifest:
        """The manifest; empty before the first stage has started."""
        if not self.exists("manifest.json"):
            return Manifest()
        return Manifest.model_validate(self.read_json("manifest.json"))

    def record(self, stage: str, record: StageRecord) -> None:
        """Write one stage's entry into the manifest."""
        manifest = self.manifest()
        manifest.stages[stage] = record
        self.write_json("manifest.json", manifest.model_dump(mode="json"))

    @contextmanager
    def lease(self) -> Iterator[None]:
        """Hold the run directory for this driver; renewed while the block runs.

        Raises:
            RunError: another driver holds it, and its lease is fresh.
        """
        owner = uuid.uuid4().hex
        self._refuse_if_held()
        self._write_lease(owner)
        if self.read_json("lease.json")["owner"] != owner:
            raise RunError(f"{self.uri}: another driver took this run directory just now; wait for it to finish")
        stop = threading.Event()

        def renew() -> None:
            while not stop.wait(LEASE_RENEWAL_S):
                self._write_lease(owner)

        thread = threading.Thread(target=renew, name="run-lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            self.delete("lease.json")

    def _write_lease(self, owner: str) -> None:
        lease = {"owner": owner, "host": socket.gethostname(), "pid": os.getpid(), "renewed_at": time.time()}
        self.write_json("lease.json", lease)

    def _refuse_if_held(self) -> None:
        if not self.exists("lease.json"):
            return
        lease = self.read_json("lease.json")
        age_s = time.time() - lease["renewed_at"]
        gone = lease["host"] == socket.gethostname() and not _is_alive(lease["pid"])
        if age_s < LEASE_FRESH_S and not gone:
            raise RunError(
                f"{self.uri} is in use by process {lease['pid']} on {lease['host']}; "
                f"wait for it, stop it, or give another --run-dir"
            )


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
