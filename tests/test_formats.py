import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

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
@pytest.mark.parametrize("kind", ["jsonl", "json", "jsonl.gz", "parquet"])
def test_every_format_in_every_kind_of_file(tmp_path, row, kind):
    path = tmp_path / f"data.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist([row, row]), path)
    elif kind == "json":
        path.write_text(json.dumps([row, row], indent=1))
    else:
        text = json.dumps(row) + "\n"
        path.write_bytes(gzip.compress((text * 2).encode()) if kind.endswith("gz") else (text * 2).encode())
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
    "bad_role": {"messages": [{"role": "teacher", "content": "x"}, *CHAT]},
    "empty_response": {"prompt": "2 + 2?", "completion": "  "},
    "empty_prompt": {"prompt": "", "completion": "4"},
    "wrong_type": {"prompt": "2 + 2?", "completion": 4},
}


@pytest.mark.parametrize(("reason", "line"), BAD.items(), ids=BAD)
def test_a_bad_line_is_rejected_with_its_place_and_the_rest_is_read(tmp_path, reason, line):
    source = write_lines(tmp_path / "data.jsonl", ROWS["prompt"], line, ROWS["prompt"])
    good, bad, after = read_source(source)
    assert isinstance(good, Record)
    assert isinstance(after, Record)
    assert isinstance(bad, Rejected)
    assert (bad.place, bad.reason) == (f"{source}:2", reason)
    assert bad.detail
    assert "\n" not in bad.detail


def test_a_line_that_is_not_utf8_is_rejected(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "\xff", "completion": "4"}\n' + json.dumps(ROWS["prompt"]).encode())
    bad, good = read_source(str(path))
    assert (bad.place, bad.reason) == (f"{path}:1", "not_utf8")
    assert isinstance(good, Record)


def test_byte_order_mark_windows_line_ends_and_blank_lines(tmp_path):
    path = tmp_path / "data.jsonl"
    line = json.dumps(ROWS["prompt"]).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n" + line + b"\r\n")
    first, second = read_source(str(path))
    assert isinstance(first, Record)
    assert second.place == f"{path}:3"


def test_folders_and_globs_read_their_files_in_order(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl"):
        write_lines(tmp_path / name, ROWS["prompt"])
    write_lines(tmp_path / ".hidden.jsonl", ROWS["prompt"])
    (tmp_path / "notes.txt").write_text("not data")
    names = [record.source.removeprefix(f"{tmp_path}/") for record in read_source(str(tmp_path))]
    assert names == ["a.jsonl", "b.jsonl", "deep/c.jsonl"]
    names = [record.source.removeprefix(f"{tmp_path}/") for record in read_source(f"{tmp_path}/*.jsonl")]
    assert names == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize("name", ["missing.jsonl", "empty", "data.txt", "broken.parquet", "hf:some/dataset"])
def test_a_source_that_cannot_be_read_is_one_line_that_names_it(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "data.txt").write_text("x")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and nothing else")
    source = name if name.startswith("hf:") else str(tmp_path / name)
    with pytest.raises(SourceError) as caught:
        list(read_source(source))
    assert source in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_fingerprint_follows_the_file(tmp_path):
    source = write_lines(tmp_path / "data.jsonl", ROWS["prompt"])
    before = fingerprint(source)
    assert fingerprint(source) == before
    write_lines(tmp_path / "data.jsonl", ROWS["prompt"], ROWS["alpaca"])
    assert fingerprint(source) != before
    assert fingerprint("quickstart") == fingerprint("quickstart")
