"""Instruction data in the formats that people have it in -> conversations, one at a time.

A row that cannot be used becomes a `Rejected` with its place, and reading goes on; a source that cannot be read at all
raises.
"""

import fnmatch
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from gradientspace_ray.examples.quickstart import quickstart_examples
from gradientspace_ray.examples.rendering import ASSISTANT, USER, until_last_answer

QUICKSTART = "quickstart"
HUB_PREFIX = "hf:"
ROLES = ("system", USER, ASSISTANT)
FIELDS = (("messages",), ("instruction", "output"), ("prompt", "completion"))
"""What a row of each format must have, the first format wins."""
LINES, PARQUET = (".jsonl", ".ndjson", ".json"), (".parquet",)
COMPRESSIONS = (".gz", ".bz2", ".zst")
BOM = b"\xef\xbb\xbf"
GLOB = re.compile(r"[*?\[]")
READ_BYTES = 1 << 20
READ_ROWS = 1024
MAX_ARRAY_BYTES = 1 << 29
"""Of a JSON array, which is decoded at once and takes up to five times this much memory; lines have no such limit."""
MAX_LINE_BYTES = 1 << 24

Reason = Literal[
    "malformed_json",
    "not_utf8",
    "not_an_object",
    "unknown_format",
    "missing_field",
    "wrong_type",
    "bad_role",
    "empty_prompt",
    "empty_response",
    "too_long",
]
REASONS: tuple[str, ...] = get_args(Reason)


class SourceError(ValueError):
    """A source that cannot be read; the message names it and the mend in one line."""


@dataclass(frozen=True)
class Record:
    """One conversation, ending with an answer, and where it comes from."""

    messages: list[dict[str, str]]
    source: str
    """Path of the file, or name of the dataset."""
    place: str
    """`source:line`, counted from one."""
    domain: str | None = None
    """Hidden label, for the evaluation and the report only."""
    group: str | None = None
    """What it shares with its near-duplicates, which must be in the same split."""


@dataclass(frozen=True)
class Rejected:
    """A row that was left out."""

    place: str
    reason: str
    detail: str


class _RowError(ValueError):
    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def read_source(source: str, seed: int = 0) -> Iterator[Record | Rejected]:
    """Read every row of a source, in order.

    Rows are `messages` (role and content), alpaca (`instruction`, `input`, `output`) or `prompt` and `completion`
    (texts or messages), each with an optional `domain`, a label for the evaluation only, and an optional `group`: rows
    of one group (a document, a template, a paraphrased question) are never spread over training and held-out examples.
    Both may be a text or a number; null and blank are none. Files are JSON lines, a JSON array, or Parquet; JSON may be
    compressed (.gz, .bz2, .zst).

    Args:
        source: a file, folder (read recursively) or glob, local or a URI that pyarrow knows (`s3://`, `gs://`, ...);
            `hf:NAME` or `hf:NAME:SPLIT` for a Hugging Face dataset; `quickstart` for the built-in mixture.
        seed: of the built-in mixture.

    Raises:
        SourceError: the source is missing, holds no data file, is not of a known kind, or is too large an array.
    """
    if source == QUICKSTART:
        rows: Iterator[tuple[int, Any]] = enumerate(quickstart_examples(seed), start=1)
        yield from (_convert(row, source, f"{source}:{number}") for number, row in rows)
    elif source.startswith(HUB_PREFIX):
        yield from _read_hub(source)
    else:
        filesystem, paths = _find_files(source)
        for path in paths:
            yield from _read_file(filesystem, path)


def fingerprint(source: str) -> Any:
    """A JSON-able value that changes when the source does: names, sizes and times of its files, or its content.

    Raises:
        SourceError: see `read_source`.
    """
    if source == QUICKSTART:
        return hashlib.sha256(json.dumps(quickstart_examples(0)).encode()).hexdigest()[:16]
    if source.startswith(HUB_PREFIX):
        return source
    filesystem, paths = _find_files(source)
    return [[info.path, info.size, info.mtime_ns] for info in filesystem.get_file_info(paths)]


def _find_files(source: str) -> tuple[fs.FileSystem, list[str]]:
    """The data files of a path, folder or glob, sorted."""
    try:
        if "://" in source:
            filesystem, path = fs.FileSystem.from_uri(source)
        else:
            filesystem, path = fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(source))
        info = filesystem.get_file_info(path)
        if info.type == fs.FileType.File:
            paths = [path]
        elif info.type == fs.FileType.Directory:
            paths = [name for name in _expand(filesystem, path, ["**", "*"]) if _kind(name)]
        elif found := GLOB.search(path):
            root = path[: found.start()].rpartition("/")[0]
            paths = _expand(filesystem, root or "/", path[len(root) + 1 :].split("/"))
        else:
            raise SourceError(f"{source}: no such file or folder; correct data.sources in the recipe")
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:  # a file name may not be UTF-8
        raise SourceError(
            f"{source}: cannot be reached ({_first_line(error)}); check the address and access"
        ) from error
    known = ", ".join((*LINES, *PARQUET))
    if not paths:
        raise SourceError(f"{source}: holds no data; expected files that end in {known}")
    for name in paths:
        if _kind(name) is None:
            raise SourceError(f"{name}: unknown kind of file; expected one that ends in {known}")
    return filesystem, paths


def _expand(filesystem: fs.FileSystem, root: str, pattern: list[str]) -> list[str]:
    """Files below `root` whose parts match the pattern's, sorted."""
    selector = fs.FileSelector(root, recursive=len(pattern) > 1, allow_not_found=True)
    infos = [info for info in filesystem.get_file_info(selector) if info.type == fs.FileType.File]
    return sorted(info.path for info in infos if _matches(pattern, info.path[len(root) :].strip("/").split("/")))


def _matches(pattern: list[str], parts: list[str]) -> bool:
    """Shell glob over the parts of a path: `**` spans any number of folders.

    Hidden and temporary names (`.x`, `_x`) match only a pattern that begins as they do.
    """
    if not pattern or not parts:
        return not pattern and not parts
    hidden = parts[0].startswith((".", "_")) and not pattern[0].startswith(parts[0][0])
    if pattern[0] == "**" and len(pattern) > 1:
        return _matches(pattern[1:], parts) or (not hidden and _matches(pattern, parts[1:]))
    return not hidden and fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(pattern[1:], parts[1:])


def _kind(path: str) -> Literal["json", "lines", "parquet"] | None:
    """By the name; a `.json` holds lines or an array."""
    stem, suffix = os.path.splitext(path.lower())
    if suffix in PARQUET:
        return "parquet"
    if suffix in COMPRESSIONS:
        suffix = os.path.splitext(stem)[1]
    if suffix not in LINES:
        return None
    return "json" if suffix == ".json" else "lines"


def _read_file(filesystem: fs.FileSystem, path: str) -> Iterator[Record | Rejected]:
    kind = _kind(path)
    try:
        if kind == "parquet":
            with filesystem.open_input_file(path) as file:
                yield from _read_parquet(pq.ParquetFile(file), path)
            return
        with io.BufferedReader(filesystem.open_input_stream(path, compression="detect"), READ_BYTES) as stream:
            is_array = stream.peek(READ_BYTES).removeprefix(BOM).lstrip()[:1] == b"["
            if kind == "json" and is_array:
                data = stream.read(MAX_ARRAY_BYTES + 1)
                if len(data) > MAX_ARRAY_BYTES:
                    mend = "convert it to JSON lines, one row on each line, for example: jq -c '.[]'"
                    raise SourceError(f"{path}: a JSON array of more than {MAX_ARRAY_BYTES >> 20} MiB; {mend}")
                yield from _read_array(data, path)
            else:
                yield from _read_lines(stream, path)
    except (OSError, pa.ArrowException) as error:
        raise SourceError(f"{path}: cannot be read ({_first_line(error)}); replace the file") from error


def _read_parquet(file: pq.ParquetFile, path: str) -> Iterator[Record | Rejected]:
    wanted = {"input", "domain", "group", *(name for names in FIELDS for name in names)}
    columns = [name for name in file.schema_arrow.names if name in wanted]
    if not columns:
        raise SourceError(f"{path}: {_unknown_format(file.schema_arrow.names)}")
    number = 0
    for batch in file.iter_batches(READ_ROWS, columns=columns):
        for index in range(batch.num_rows):
            number += 1
            place = f"{path}:{number}"
            try:
                [row] = batch.slice(index, 1).to_pylist()
            except UnicodeDecodeError as error:
                yield Rejected(place, "not_utf8", f"byte {error.start + 1} of a text is not UTF-8")
            else:
                yield _convert(row, path, place)


def _read_lines(stream: io.BufferedReader, path: str) -> Iterator[Record | Rejected]:
    lines = iter(lambda: stream.readline(MAX_LINE_BYTES + 1), b"")
    for number, line in enumerate(lines, start=1):
        place = f"{path}:{number}"
        if len(line) > MAX_LINE_BYTES:
            while line and not line.endswith(b"\n"):
                line = stream.readline(READ_BYTES)
            yield Rejected(place, "too_long", f"a line of more than {MAX_LINE_BYTES >> 20} MiB; write one row a line")
            continue
        data = (line.removeprefix(BOM) if number == 1 else line).strip()
        if not data:
            continue
        try:
            row = json.loads(data.decode())
        except UnicodeDecodeError as error:
            yield Rejected(place, "not_utf8", f"byte {error.start + 1} of the line is not UTF-8")
        except (ValueError, RecursionError) as error:
            yield Rejected(place, "malformed_json", _first_line(error))
        else:
            yield _convert(row, path, place)


def _read_array(data: bytes, path: str) -> Iterator[Record | Rejected]:
    """Rows of a JSON array, each with the line that it begins on; what follows a malformed row is not read."""
    try:
        text = data.removeprefix(BOM).decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        yield Rejected(f"{path}:{line}", "not_utf8", "not UTF-8; save the file as UTF-8")
        return
    decoder, space = json.JSONDecoder(), re.compile(r"[\s,]*")
    position, line, counted = text.index("[") + 1, 1, 0
    while True:
        position = space.match(text, position).end()  # type: ignore[union-attr]
        line, counted = line + text.count("\n", counted, position), position
        place = f"{path}:{line}"
        if text[position : position + 1] == "]":
            if text[position + 1 :].strip():
                yield Rejected(place, "malformed_json", "the array ends here; what follows it is not read")
            return
        try:
            row, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            yield Rejected(place, "malformed_json", f"{_first_line(error)}; the rows after it are not read")
            return
        yield _convert(row, path, place)


def _read_hub(source: str) -> Iterator[Record | Rejected]:
    name, _, split = source.removeprefix(HUB_PREFIX).partition(":")
    try:
        import datasets
    except ImportError as error:
        mend = "pip install 'gradientspace-ray[hub]', or give JSONL or Parquet files"
        raise SourceError(f"{source}: datasets of the hub need the package `datasets`; {mend}") from error
    try:
        rows = datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        mend = "check name, split and network, or give JSONL or Parquet files"
        raise SourceError(f"{source}: cannot be loaded ({_first_line(error)}); {mend}") from error
    for number, row in enumerate(rows, start=1):
        yield _convert(row, source, f"{source}:{number}")


def _convert(row: Any, source: str, place: str) -> Record | Rejected:
    try:
        if not isinstance(row, Mapping):
            raise _RowError("not_an_object", f"a row is an object, not {_typename(row)}")
        messages = _checked(_messages(row))
        # A column called domain may hold anything; it serves the evaluation only, and costs no row.
        domain = None if isinstance(row.get("domain"), list | Mapping) else _label(row, "domain")
        return Record(messages, source, place, domain, _label(row, "group"))
    except _RowError as error:
        return Rejected(place, error.reason, str(error))


def _messages(row: Mapping[str, Any]) -> list[Any]:
    """The conversation in a row of any format, its messages still unchecked."""
    present = {name for name, value in row.items() if value is not None}
    formats = [names for names in FIELDS if present.issuperset(names)]
    formats += [names for names in FIELDS if not present.isdisjoint(names)]
    formats += [names for names in FIELDS if not row.keys().isdisjoint(names)]
    if not formats:
        raise _RowError("unknown_format", _unknown_format(row))
    for name in formats[0]:
        if name not in present:
            raise _RowError("missing_field", f"{name} is missing")
    if formats[0] == ("messages",):
        return _list(row["messages"], "messages")
    if formats[0] == ("instruction", "output"):
        prompt, context = _text(row["instruction"], "instruction"), _text(row.get("input") or "", "input")
        if context.strip():
            prompt = f"{prompt}\n\n{context}"
        return [{"role": USER, "content": prompt}, {"role": ASSISTANT, "content": row["output"]}]
    turns: list[Any] = []
    for name, role in (("prompt", USER), ("completion", ASSISTANT)):
        value = row[name]
        turns += [{"role": role, "content": value}] if isinstance(value, str) else _list(value, name)
    return turns


def _checked(messages: list[Any]) -> list[dict[str, str]]:
    """Messages of known roles with text, up to the last answer."""
    turns: list[dict[str, str]] = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping):
            raise _RowError("wrong_type", f"message {number} is {_typename(message)}, not an object")
        for name in ("role", "content"):
            if message.get(name) is None:
                raise _RowError("missing_field", f"message {number} has no {name}")
        role = message["role"]
        if role not in ROLES:
            raise _RowError("bad_role", f"message {number} has the role {role!r:.40}; known are {', '.join(ROLES)}")
        turns.append({"role": role, "content": _text(message["content"], f"the content of message {number}")})
    roles = [turn["role"] for turn in turns]
    if ASSISTANT not in roles:
        raise _RowError("empty_response", "the assistant says nothing")
    if USER not in roles[: roles.index(ASSISTANT)]:
        raise _RowError("empty_prompt", "the user says nothing before the first answer")
    answered = [dict(turn) for turn in until_last_answer(turns)]
    for number, turn in enumerate(answered, start=1):
        if not turn["content"].strip() and turn["role"] != "system":
            reason: Reason = "empty_response" if turn["role"] == ASSISTANT else "empty_prompt"
            raise _RowError(reason, f"message {number} ({turn['role']}) is empty")
    return answered


def _label(row: Mapping[str, Any], name: str) -> str | None:
    value = row.get(name)
    if isinstance(value, list | Mapping):
        raise _RowError("wrong_type", f"{name} is {_typename(value)}, not a text")
    return None if value is None or not str(value).strip() else _text(str(value), name)


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise _RowError("wrong_type", f"{what} is {_typename(value)}, not a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _RowError("not_utf8", f"{what} holds half a surrogate pair") from error
    return value


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise _RowError("wrong_type", f"{what} is {_typename(value)}, not a list")
    return value


def _unknown_format(names: Any) -> str:
    expected = "; ".join(" and ".join(fields) for fields in FIELDS)
    # A name may be anything, but the message is one line of UTF-8.
    shown = ", ".join(ascii(str(name))[1:-1][:40] for name in list(names)[:8])
    return f"has {shown or 'no fields'}, expected one of: {expected}"


def _typename(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
