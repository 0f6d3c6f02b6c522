import glob
import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gradientspace_ray.examples import formats
from gradientspace_ray.examples.formats import Record, Rejected, SourceError, fingerprint, read_source

CHAT = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
ROWS = {
    "messages": {"messages": CHAT, "domain": "sums"},
    "alpaca": {"instruction": "Add.", "input": "2 + 2", "output": "4", "domain": "sums"},
    "prompt": {"prompt": "2 + 2?", "completion": "4", "domain": "sums"},
    "prompt_messages": {"prompt": CHAT[:1], "completion": CHAT[1:], "domain": "sums"},
}


def write_lines(path, *lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("kind", ["jsonl", "json", "json lines", "jsonl.gz", "json.gz", "parquet"])
def test_every_format_in_every_kind_of_file(tmp_path, row, kind):
    path = tmp_path / f"data.{kind.removesuffix(' lines')}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist([row, row]), path)
    else:
        is_array = kind in ("json", "json.gz")
        data = (json.dumps([row, row], indent=1) if is_array else (json.dumps(row) + "\n") * 2).encode()
        path.write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
    records = list(read_source(str(path)))
    assert len(records) == 2
    for record in records:
        assert isinstance(record, Record)
        assert [message["role"] for message in record.messages] == ["user", "assistant"]
        assert record.messages[1]["content"] == "4"
        assert record.messages[0]["content"] in ("2 + 2?", "Add.\n\n2 + 2")
        assert record.domain == "sums"
        assert record.source == str(path)


BAD = {
    "malformed_json": '{"messages": [\n',
    "not_an_object": "[1, 2]\n",
    "unknown_format": {"question": "2 + 2?", "reply": "4"},
    "missing_field": {"prompt": "2 + 2?"},
    "missing_field of alpaca": {"instruction": "Add.", "input": "2 + 2"},
    "missing_field of a message": {"messages": [{"role": "user"}, CHAT[1]]},
    "missing_field that is null": {"prompt": "2 + 2?", "completion": None},
    "bad_role": {"messages": [{"role": "teacher", "content": "x"}, *CHAT]},
    "empty_response": {"prompt": "2 + 2?", "completion": "  "},
    "empty_response of alpaca": {"instruction": "Add.", "output": ""},
    "empty_response without an answer": {"messages": CHAT[:1]},
    "empty_response without messages": {"messages": []},
    "empty_response in an earlier turn": {"messages": [CHAT[0], {"role": "assistant", "content": "\n"}, *CHAT]},
    "empty_prompt": {"prompt": "", "completion": "4"},
    "empty_prompt before the first answer": {"messages": CHAT[1:]},
    "wrong_type": {"prompt": "2 + 2?", "completion": 4},
    "wrong_type of messages": {"messages": "2 + 2?"},
    "wrong_type of a message": {"messages": ["2 + 2?"]},
    "wrong_type of a group": ROWS["prompt"] | {"group": ["a", "b"]},
    "not_utf8": '{"prompt": "\\ud800", "completion": "4"}\n',
    "unknown_format of a field name": '{"\\ud800\\n": 1}\n',
}


@pytest.mark.parametrize(("reason", "line"), BAD.items(), ids=BAD)
def test_a_bad_line_is_rejected_with_its_place_and_the_rest_is_read(tmp_path, reason, line):
    source = write_lines(tmp_path / "data.jsonl", ROWS["prompt"], line, ROWS["prompt"])
    good, bad, after = read_source(source)
    assert isinstance(good, Record)
    assert isinstance(after, Record)
    assert isinstance(bad, Rejected)
    assert (bad.place, bad.reason) == (f"{source}:2", reason.split()[0])
    assert bad.detail
    assert "\n" not in bad.detail
    bad.detail.encode()


def test_a_line_that_is_not_utf8_is_rejected(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "\xff", "completion": "4"}\n' + json.dumps(ROWS["prompt"]).encode())
    bad, good = read_source(str(path))
    assert (bad.place, bad.reason) == (f"{path}:1", "not_utf8")
    assert isinstance(good, Record)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_group_is_read_from_every_row_that_has_one(tmp_path, kind):
    rows = [{**ROWS["prompt"], "group": group} for group in ("page 7", " ", None)]
    path = tmp_path / f"data.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        write_lines(path, *rows)
    assert [record.group for record in read_source(str(path))] == ["page 7", None, None]


def test_labels_may_be_numbers(tmp_path):
    source = write_lines(tmp_path / "data.jsonl", ROWS["prompt"] | {"group": 0, "domain": 12})
    [record] = read_source(source)
    assert (record.group, record.domain) == ("0", "12")


def test_a_domain_that_is_no_text_costs_no_row(tmp_path):
    source = write_lines(tmp_path / "data.jsonl", ROWS["prompt"] | {"domain": ["sums", "math"]})
    [record] = read_source(source)
    assert record.domain is None


@pytest.mark.parametrize("length", [100, 101, 250, 100_000])
def test_a_line_that_is_too_long_is_rejected_and_the_rest_is_read(tmp_path, monkeypatch, length):
    monkeypatch.setattr(formats, "MAX_LINE_BYTES", 100)
    monkeypatch.setattr(formats, "READ_BYTES", 64)
    row = json.dumps(ROWS["prompt"]) + "\n"
    source = write_lines(tmp_path / "data.jsonl", row, "[" + "1" * (length - 3) + "]\n", row, "x" * length)
    before, bad, after, last = read_source(source)
    assert isinstance(before, Record)
    assert (after.place, last.place) == (f"{source}:3", f"{source}:4")
    assert isinstance(after, Record)
    assert (bad.place, bad.reason) == (f"{source}:2", "too_long" if length > 100 else "not_an_object")
    assert last.reason == ("too_long" if length > 100 else "malformed_json")


@pytest.mark.parametrize("suffix", ["json", "json.gz"])
def test_an_array_that_is_too_large_says_how_to_convert_it(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"data.{suffix}"
    data = json.dumps([ROWS["prompt"]] * 50).encode()
    path.write_bytes(gzip.compress(data) if suffix == "json.gz" else data)
    monkeypatch.setattr(formats, "MAX_ARRAY_BYTES", len(data))
    assert len(list(read_source(str(path)))) == 50
    monkeypatch.setattr(formats, "MAX_ARRAY_BYTES", len(data) - 1)
    with pytest.raises(SourceError, match=r"data\.json.* convert it to JSON lines") as caught:
        list(read_source(str(path)))
    assert "\n" not in str(caught.value)


def test_a_lines_file_has_no_size_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "MAX_ARRAY_BYTES", 10)
    source = write_lines(tmp_path / "data.json", ROWS["prompt"], ROWS["prompt"])
    assert len(list(read_source(source))) == 2


def test_byte_order_mark_windows_line_ends_and_blank_lines(tmp_path):
    path = tmp_path / "data.jsonl"
    line = json.dumps(ROWS["prompt"]).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n" + line + b"\r\n")
    first, second = read_source(str(path))
    assert isinstance(first, Record)
    assert second.place == f"{path}:3"


def test_a_lines_file_whose_first_row_is_a_list_is_not_an_array(tmp_path):
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(("[1, 2]\n" + json.dumps(ROWS["prompt"])).encode()))
    bad, good = read_source(str(path))
    assert (bad.place, bad.reason) == (f"{path}:1", "not_an_object")
    assert good.place == f"{path}:2"


def test_rows_of_an_array_have_the_line_that_they_begin_on(tmp_path):
    path = tmp_path / "data.json"
    row = json.dumps(ROWS["prompt"])
    path.write_bytes(b"\xef\xbb\xbf" + f"[{row},\r\n\r\n{row}, 7\r\n]\r\n".encode())
    places = [(item.place, getattr(item, "reason", None)) for item in read_source(str(path))]
    assert places == [(f"{path}:1", None), (f"{path}:3", None), (f"{path}:3", "not_an_object")]


@pytest.mark.parametrize(
    "ending", [",\n{broken}]", ",", "", "]\nmore", ',\n{"prompt": "\\'], ids=["row", "comma", "open", "after", "cut"]
)
def test_an_array_that_breaks_off_says_so_and_keeps_what_came_before(tmp_path, ending):
    path = tmp_path / "data.json"
    path.write_text(f"[{json.dumps(ROWS['prompt'])}{ending}")
    good, bad = read_source(str(path))
    assert isinstance(good, Record)
    assert bad.reason == "malformed_json"
    assert bad.place == f"{path}:{2 if ending.startswith(',' + chr(10)) else 1}"
    assert "not read" in bad.detail


def test_an_array_that_is_not_utf8_is_rejected_with_the_line(tmp_path):
    path = tmp_path / "data.json"
    path.write_bytes(b'[\n{"prompt": "\xff"}]')
    [bad] = read_source(str(path))
    assert (bad.place, bad.reason) == (f"{path}:2", "not_utf8")


def test_parquet_rows_of_mixed_formats_and_bad_ones(tmp_path):
    path = tmp_path / "data.parquet"
    rows = [ROWS["messages"], ROWS["prompt"], {"prompt": "2 + 2?"}, {"messages": [{"role": "tool", "content": "x"}]}]
    pq.write_table(
        pa.Table.from_pylist(
            rows,
            pa.schema(
                [
                    ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
                    ("prompt", pa.string()),
                    ("completion", pa.string()),
                    ("domain", pa.string()),
                ]
            ),
        ),
        path,
    )
    first, second, missing, role = read_source(str(path))
    assert first.messages == second.messages == CHAT
    assert (missing.place, missing.reason) == (f"{path}:3", "missing_field")
    assert (role.place, role.reason) == (f"{path}:4", "bad_role")


def test_a_parquet_text_that_is_not_utf8_is_rejected(tmp_path):
    path = tmp_path / "data.parquet"
    buffers = [None, pa.array([0, 1, 2], pa.int32()).buffers()[1], pa.py_buffer(b"\xffa")]
    pq.write_table(pa.table({"prompt": pa.Array.from_buffers(pa.string(), 2, buffers), "completion": ["4", "4"]}), path)
    bad, good = read_source(str(path))
    assert (bad.place, bad.reason) == (f"{path}:1", "not_utf8")
    assert good.place == f"{path}:2"


def test_what_follows_the_last_answer_is_left_out_and_an_empty_input_too(tmp_path):
    alpaca = {"instruction": "Add.", "input": " ", "output": "4"}
    source = write_lines(tmp_path / "data.jsonl", {"messages": [*CHAT, CHAT[0]]}, alpaca)
    first, second = read_source(source)
    assert first.messages == CHAT
    assert second.messages[0]["content"] == "Add."
    assert second.domain is None


@pytest.fixture
def tree(tmp_path):
    for folder in ("deep/er", "other", ".cache", "_tmp"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("b", "a", "a1", "[x]", "deep/c", "deep/er/d", "other/a", ".hidden", "_half", ".cache/e", "_tmp/f"):
        write_lines(tmp_path / f"{name}.jsonl", ROWS["prompt"])
    return tmp_path


def names_of(source, folder):
    return [record.source.removeprefix(f"{folder}/") for record in read_source(source)]


def test_a_folder_is_read_in_order_without_hidden_and_other_files(tree):
    (tree / "notes.txt").write_text("not data")
    expected = sorted(
        ["[x].jsonl", "a.jsonl", "a1.jsonl", "b.jsonl", "deep/c.jsonl", "deep/er/d.jsonl", "other/a.jsonl"]
    )
    assert names_of(str(tree), tree) == names_of(f"file://{tree}", tree) == expected


@pytest.mark.parametrize(
    "pattern",
    ["*.jsonl", "a?.jsonl", "[ab].jsonl", "[!a]*.jsonl", "*/*.jsonl", "**/*.jsonl", "deep/**/*.jsonl", "*/a.jsonl",
     "**/er/*.jsonl", ".*.jsonl", ".cache/*.jsonl", "[[]x].jsonl"],
)  # fmt: skip
def test_globs_find_what_the_shell_finds(tree, pattern):
    found = glob.glob(pattern, root_dir=tree, recursive=True)
    # Names that begin with an underscore are temporary here, as Spark and Arrow have it.
    assert names_of(f"{tree}/{pattern}", tree) == sorted(name for name in found if not name.startswith("_"))


def test_temporary_names_are_read_when_the_glob_or_the_path_says_so(tree):
    assert names_of(f"{tree}/_*.jsonl", tree) == ["_half.jsonl"]
    assert names_of(f"{tree}/_tmp/*.jsonl", tree) == names_of(f"{tree}/_tmp", tree) == ["_tmp/f.jsonl"]
    assert names_of(f"{tree}/[x].jsonl", tree) == ["[x].jsonl"]


UNREADABLE = {
    "missing.jsonl": "no such file",
    "empty": "holds no data",
    "data.txt": "unknown kind of file",
    "broken.parquet": "cannot be read",
    "pages.parquet": "cannot be read",
    "columns.parquet": "has question, expected one of",
    "cut.jsonl.gz": "cannot be read",
    "plain.jsonl.gz": "cannot be read",
    "nothing*.jsonl": "holds no data",
    "[z-a].jsonl": "holds no data",
    "dat*": "unknown kind of file",
    "ftp://host/data.jsonl": "cannot be reached",
    "hf:some/dataset": "need the package|cannot be loaded",
}


@pytest.mark.parametrize(("name", "message"), UNREADABLE.items(), ids=UNREADABLE)
def test_a_source_that_cannot_be_read_is_one_line_that_names_it(tmp_path, name, message):
    line = json.dumps(ROWS["prompt"]).encode()
    (tmp_path / "empty").mkdir()
    (tmp_path / "data.txt").write_text("x")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and nothing else")
    (tmp_path / "plain.jsonl.gz").write_bytes(line)
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(line)[:-12])
    pq.write_table(pa.table({"question": ["2 + 2?"]}), tmp_path / "columns.parquet")
    pq.write_table(pa.Table.from_pylist([ROWS["prompt"]] * 500), tmp_path / "pages.parquet", compression="gzip")
    pages = bytearray((tmp_path / "pages.parquet").read_bytes())
    pages[20:60] = b"\xff" * 40
    (tmp_path / "pages.parquet").write_bytes(pages)
    source = name if ":" in name else str(tmp_path / name)
    with pytest.raises(SourceError, match=message) as caught:
        list(read_source(source))
    assert (str(tmp_path / "data.txt") if name == "dat*" else source) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_name_that_is_not_utf8_is_one_line(tmp_path):
    try:
        (tmp_path / os.fsdecode(b"\xff.jsonl")).touch()
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    with pytest.raises(SourceError, match="cannot be reached"):
        list(read_source(str(tmp_path)))


def test_the_fingerprint_follows_the_file(tmp_path):
    source = write_lines(tmp_path / "data.jsonl", ROWS["prompt"])
    before = fingerprint(source)
    assert fingerprint(source) == before
    write_lines(tmp_path / "data.jsonl", ROWS["prompt"], ROWS["alpaca"])
    assert fingerprint(source) != before
    assert fingerprint("quickstart") == fingerprint("quickstart")
