"""The run directory: where every stage reads its inputs and commits its outputs.

It lives on any pyarrow filesystem (a local folder, `s3://`, `gs://`). What is committed is whole: a file or a folder
appears under its name when it is complete; a folder on an object store is complete when its marker is there.
"""

import atexit
import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gradientspace_ray.retries import TRIES, insist

MANIFEST = "manifest.json"
COPIES = "gradientspace-fetched-"
STAGING = ".staging"
ROWS_AT_ONCE, ROW_GROUP_SIZE = 4096, 65_536
"""Of Parquet files: rows in memory together, and those that can only be read together."""
CONNECTIONS = 16
"""Requests to an object store at once."""
TEMPORARY = re.compile(r"\.[0-9a-f]{8}\.tmp$")
T = TypeVar("T")
ModelT = TypeVar("ModelT", bound=BaseModel)


class RunError(RuntimeError):
    """A run directory that cannot be used; the message names the place and the mend in one line."""


class MissingFileError(RunError, FileNotFoundError):
    """What was asked for is not there; nothing else is wrong."""


class Summary(BaseModel):
    """What a stage returns: `made` for people (one line), `counts` for the manifest."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    made: str
    counts: dict[str, Any] = {}
    output: str | None = None
    """Digest of what was made, where that is known better than by the digest of the stage's inputs."""
    outputs: tuple[str, ...] = ()
    """Names in the run directory that the stage made, beside those that every run of it makes."""


class StageRecord(BaseModel):
    """One stage's entry in the manifest."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    status: Literal["done", "running", "failed", "interrupted", "stale"]
    """`stale`: done, but what it was made of has changed since."""
    digest: str
    """Of the recipe parts and inputs that decide the stage's output."""
    output: str = ""
    seconds: float = 0.0
    made: str = ""
    counts: dict[str, Any] = {}
    versions: dict[str, str] = {}
    outputs: tuple[str, ...] = ()
    """See `Summary`."""
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
        """Open (without creating) the run directory at a local path or a `scheme://` URI.

        A URI may end with options of pyarrow, as in `s3://bucket/run?endpoint_override=http://host:9000`.
        """
        text = str(uri)
        if "://" in text:
            place, mark, options = text.partition("?")
            self.uri = place.rstrip("/") + mark + options
            self.filesystem, base = fs.FileSystem.from_uri(self.uri)
        else:
            self.uri = base = os.path.abspath(os.path.expanduser(text))
            self.filesystem = fs.LocalFileSystem()
        self._base = base.rstrip("/")
        self.is_local = isinstance(self.filesystem, fs.LocalFileSystem)

    def path(self, name: str = "") -> str:
        """The path of `name` on `self.filesystem`."""
        return f"{self._base}/{name}" if name else self._base

    def uri_of(self, name: str) -> str:
        """The URI of `name` with the run's options, for libraries that open it themselves."""
        place, mark, options = self.uri.partition("?") if "://" in self.uri else (self.uri, "", "")
        return f"{place}/{name}{mark}{options}"

    def require(self) -> None:
        """Check that a run was started here.

        Raises:
            RunError: there is no manifest.
        """
        if not self.exists(MANIFEST):
            raise RunError(f"{self.uri} holds no run; start one with: gradientspace run quickstart")

    def exists(self, name: str = "") -> bool:
        """Whether a file or folder called `name` is there."""
        return self._insist(self.filesystem.get_file_info, self.path(name)).type != fs.FileType.NotFound

    def names(self, name: str) -> list[str]:
        """Base names of what a folder holds, sorted; empty when it is missing."""
        return sorted(info.base_name for info in self._list(name))

    def sizes(self, name: str) -> dict[str, int]:
        """Bytes of every file in a folder and the folders in it, by path relative to `name`; empty when missing."""
        skipped = len(self.path(name)) + 1
        return {info.path[skipped:]: info.size for info in self._list(name, recursive=True) if info.is_file}

    def _list(self, name: str, recursive: bool = False) -> list[fs.FileInfo]:
        selector = fs.FileSelector(self.path(name), allow_not_found=True, recursive=recursive)
        return self._insist(self.filesystem.get_file_info, selector)

    def _insist(self, act: Callable[..., T], *args: Any, **options: Any) -> T:
        return act(*args, **options) if self.is_local else insist(act, *args, **options)

    def delete(self, *names: str) -> None:
        """Remove files or folders; nothing happens when one is missing, or goes meanwhile."""
        paths = [self.path(name) for name in names]
        with ThreadPoolExecutor(1 if self.is_local else CONNECTIONS) as pool:
            list(pool.map(lambda path: self._insist(self._delete, path), paths))

    def _delete(self, path: str) -> None:
        while (info := self.filesystem.get_file_info(path)).type != fs.FileType.NotFound:
            # Of processes that remove the same folder, pyarrow stops all but one on the way.
            with suppress(FileNotFoundError):
                if info.type == fs.FileType.Directory:
                    self.filesystem.delete_dir(path)
                else:
                    self.filesystem.delete_file(path)
                return

    def sweep(self, name: str = "") -> None:
        """Remove what killed processes left: all staged folders, and parts of files in `name` and the folders in it.

        Commits that are under way may fail. Object stores show nothing of one that was cut off.
        """
        if not self.is_local:
            return
        self.delete(STAGING)
        for folder, _, files in os.walk(self.path(name)):
            for file in filter(TEMPORARY.search, files):
                Path(folder, file).unlink(missing_ok=True)

    def read_bytes(self, name: str) -> bytes:
        """Contents of a file; MissingFileError when there is none."""
        return bytes(self.read_view(name))

    def read_view(self, name: str) -> memoryview:
        """Contents of a large file, in memory that Arrow uses again: what the system gives, it has to clear first.

        Raises:
            MissingFileError: the file is missing.
        """
        try:
            return memoryview(self._insist(self._read, self.path(name)))
        except FileNotFoundError as error:
            raise MissingFileError(f"{self.path(name)} is missing; run the stage that makes it again") from error

    def _read(self, path: str) -> pa.Buffer:
        # Not as a stream, for which an object store is asked anew every 256 KiB.
        with self.filesystem.open_input_file(path) as file:
            return file.read_buffer()

    def write_bytes(self, name: str, data: bytes) -> None:
        """Commit a file at once: readers see the old contents or the new, never a part."""
        if self.is_local:
            try:
                self._replace(name, data)
            except FileNotFoundError:
                # Another process removed the folder, or swept, between two steps.
                self._replace(name, data)
        else:
            self._put({name: data})

    def _put(self, sources: Mapping[str, bytes | Path]) -> None:
        # In threads, which no interrupt reaches: a stream that ends early commits what it got until then.
        pool = ThreadPoolExecutor()
        try:
            for put in [pool.submit(self._insist, self._put_one, name, source) for name, source in sources.items()]:
                put.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _put_one(self, name: str, source: bytes | Path) -> None:
        data = pa.memory_map(str(source)).read_buffer() if isinstance(source, Path) else source
        # Not with copy_files, which says nothing when a part does not arrive.
        with self.filesystem.open_output_stream(self.path(name)) as stream:
            stream.write(data)

    def _replace(self, name: str, data: bytes) -> None:
        target = self.path(name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        temporary = f"{target}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            Path(temporary).write_bytes(data)
            os.replace(temporary, target)
        finally:
            Path(temporary).unlink(missing_ok=True)

    def read_json(self, name: str) -> Any:
        """A JSON file's value.

        Raises:
            RunError: the file is missing or damaged.
        """
        try:
            return self._parse(name, json.loads)
        except ValueError as error:
            raise self._unusable(name, str(error)) from error

    def read_model(self, name: str, model: type[ModelT]) -> ModelT:
        """A JSON file as a pydantic model.

        Raises:
            RunError: the file is missing, damaged, or of another version.
        """
        try:
            return self._parse(name, model.model_validate_json)
        except ValidationError as error:
            first, *others = error.errors(include_url=False)
            place = "".join(f"{part}: " for part in first["loc"])
            more = f", and {len(others)} more" if others else ""
            raise self._unusable(name, f"{place}{first['msg']}{more}") from error

    def _parse(self, name: str, parse: Callable[[bytes], T]) -> T:
        # pyarrow asks for the length first: what an object store replaces meanwhile comes cut, or with a wrong end.
        for _ in range(0 if self.is_local else TRIES - 1):
            with suppress(ValueError):
                return parse(self.read_bytes(name))
        return parse(self.read_bytes(name))

    def _unusable(self, name: str, reason: str) -> RunError:
        # Without the manifest every stage runs again, and takes what it finds whole.
        mend = f"delete {self.path(MANIFEST)} and run again, what is finished is kept"
        return RunError(f"{self.path(name)} cannot be used ({reason}); {mend}")

    def write_json(self, name: str, value: Any) -> None:
        """Commit a JSON file."""
        self.write_bytes(name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """A Parquet file as an Arrow table."""
        return pq.read_table(pa.BufferReader(self.read_view(name)), columns=columns)

    def read_batches(self, name: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """Rows of a Parquet file in their order, some at a time, where all of them at once would be much."""
        file = pq.ParquetFile(pa.BufferReader(self.read_view(name)))
        yield from file.iter_batches(ROWS_AT_ONCE, columns=columns)

    def write_table(self, name: str, table: pa.Table) -> None:
        """Commit a Parquet file."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", row_group_size=ROW_GROUP_SIZE)
        self.write_bytes(name, sink.getvalue().to_pybytes())

    @contextmanager
    def staged(self, name: str, last: str | None = None) -> Iterator[Path]:
        """A local folder to write into; it becomes `name` when the block ends without an error, and vanishes otherwise.

        Args:
            name: where the folder goes; an existing one is replaced.
            last: the file that marks a complete folder. That of an old folder goes first, and the new one comes last:
                object stores cannot rename a folder.
        """
        parent = Path(self.path(STAGING)) if self.is_local else _copies(os.getpid())
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="gradientspace-", dir=parent))
        try:
            yield folder
            if last:
                self.delete(f"{name}/{last}")
            self.delete(name)
            if self.is_local:
                target = Path(self.path(name))
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(folder, target)
                target.chmod(0o755)
            else:
                paths = {f"{name}/{path.relative_to(folder)}": path for path in folder.rglob("*") if path.is_file()}
                paths.pop(f"{name}/{last}", None)
                self._put(paths)
                if last:
                    self._put({f"{name}/{last}": folder / last})
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def fetch(self, name: str) -> Path:
        """A local path of a committed file or folder: itself when the run is local, else a copy of this process's own.

        The copy is made once, so fetch only names that carry a digest or do not change while this process lives. A
        caller may remove it to save room; the next call makes it anew.

        Raises:
            MissingFileError: nothing of that name is there.
        """
        info = self._insist(self.filesystem.get_file_info, self.path(name))
        if info.type == fs.FileType.NotFound:
            raise MissingFileError(f"{info.path} is missing; run the stage that makes it again")
        if self.is_local:
            return Path(info.path)
        copies = _copies(os.getpid())
        target = copies / digest_of([self.uri, name]) / Path(name).name
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=copies) as scratch:
                partial = Path(scratch) / target.name
                if info.type == fs.FileType.Directory:
                    # Arrow makes the folders inside the copied one, not that one itself.
                    partial.mkdir()
                self._insist(fs.copy_files, info.path, str(partial), source_filesystem=self.filesystem)
                # It fails when another thread was faster; that one's copy is as good.
                with suppress(OSError):
                    os.replace(partial, target)
        return target

    def manifest(self) -> Manifest:
        """The manifest; empty before the first stage has started.

        Raises:
            RunError: it is damaged.
        """
        with suppress(MissingFileError):
            return self.read_model(MANIFEST, Manifest)
        return Manifest()

    def record(self, stage: str, record: StageRecord) -> None:
        """Write one stage's entry into the manifest."""
        manifest = self.manifest()
        manifest.stages[stage] = record
        self.write_json(MANIFEST, manifest.model_dump(mode="json"))


@functools.cache
def _copies(pid: int) -> Path:
    """The folder of what this process fetched or stages, removed when it ends; a forked child makes its own."""
    # Ray kills its workers, and what a killed process leaves behind is removed by the next one.
    for left in Path(tempfile.gettempdir()).glob(f"{COPIES}*"):
        owner = left.name.removeprefix(COPIES).partition("-")[0]
        if owner.isdecimal() and not is_alive(int(owner)):
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{COPIES}{pid}-"))
    # A forked child inherits what is to be done at exit, but not the folder.
    atexit.register(lambda: shutil.rmtree(folder, ignore_errors=True) if os.getpid() == pid else None)
    return folder


def is_alive(pid: int) -> bool:
    """Whether this machine runs a process of this number."""
    try:
        os.kill(pid, 0)
    except OSError as error:
        # It lives, and is another user's.
        return isinstance(error, PermissionError)
    return True
