import json
import random

import pytest

from gradientspace_ray.examples.formats import SourceError
from gradientspace_ray.recipe import parse_recipe
from gradientspace_ray.run import RunDirectory
from gradientspace_ray.stages.prepare import DataError, prepare, split_of

SPLITS = ("train", "validation", "test")


@pytest.fixture
def make(tmp_path, tiny_model_dir):
    """Write rows, prepare them, and return (summary, run directory, split -> rows)."""

    def build(rows, **data):
        path = tmp_path / "data.jsonl"
        path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
        settings = {"sources": [str(path)], "validation_share": 0.2, "test_share": 0.2} | data
        recipe = parse_recipe({"name": "t", "model": {"name": str(tiny_model_dir)}, "data": settings})
        run = RunDirectory(tmp_path / "run")
        summary = prepare(recipe, run)
        return summary, run, {split: run.read_table(f"examples/{split}.parquet").to_pylist() for split in SPLITS}

    return build


def row(number, **more):
    return {"prompt": f"What is {number} plus {number}?", "completion": f"It is {2 * number}."} | more


def test_columns_counts_and_hidden_domain(make):
    summary, _, splits = make([row(number, domain="sums") for number in range(60)])
    assert sum(map(len, splits.values())) == summary.counts["examples"] == 60
    for split, rows in splits.items():
        assert summary.counts[split] == len(rows)
        for example in rows:
            assert example["tokens"] == len(example["input_ids"]) == len(example["labels"])
            assert example["label_tokens"] == sum(label != -100 for label in example["labels"])
            assert example["prompt"] == example["messages"][0]["content"]
            assert example["domain"] == "sums"


def test_bad_lines_are_counted_by_reason_and_listed_with_their_place(make, tmp_path):
    rows = [*(row(number) for number in range(40)), "{broken\n", row(1), {"prompt": "?", "completion": ""}]
    rows.append({"prompt": "long", "completion": "x" * 500})
    summary, run, _ = make(rows, max_tokens=200)
    expected = {"malformed_json": 1, "duplicate": 1, "empty_response": 1, "too_long": 1}
    assert summary.counts["rejected_by_reason"] == expected
    listed = [json.loads(line) for line in run.read_bytes("examples/rejected.jsonl").decode().splitlines()]
    places = {rejection["reason"]: rejection["place"] for rejection in listed}
    path = tmp_path / "data.jsonl"
    assert places == {
        "malformed_json": f"{path}:41",
        "duplicate": f"{path}:42",
        "empty_response": f"{path}:43",
        "too_long": f"{path}:44",
    }


def test_the_split_depends_on_the_prompt_alone(make):
    rows = [row(number) for number in range(80)]
    first, _, splits = make(rows)
    random.Random(0).shuffle(rows)
    again, _, shuffled = make(rows)
    assert again.output == first.output
    assert {name: [r["id"] for r in found] for name, found in shuffled.items()} == {
        name: [r["id"] for r in found] for name, found in splits.items()
    }
    _, _, fewer = make(rows[:50])
    for name, found in fewer.items():
        assert {r["id"] for r in found} <= {r["id"] for r in splits[name]}


def test_near_duplicates_share_a_split(make, tiny_model_dir):
    data = parse_recipe({"name": "t", "model": {"name": "m"}, "data": {"sources": ["x"]}}).data
    for number in range(200):
        assert split_of(f"What is  {number}?", data) == split_of(f"what is {number}? ", data)
    shares = [split_of(f"prompt {number}", data) for number in range(4000)]
    assert abs(shares.count("test") / 4000 - data.test_share) < 0.02
    assert abs(shares.count("validation") / 4000 - data.validation_share) < 0.02


def test_a_sample_is_seeded_and_does_not_depend_on_the_order(make):
    rows = [row(number) for number in range(80)]
    _, _, first = make(rows, max_examples=30)
    _, _, again = make(rows[::-1], max_examples=30)
    assert first == again
    assert sum(map(len, first.values())) == 30


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(1)], "1 usable examples, at least 3 are needed"),
        (["{broken\n"], "malformed_json"),
        ([row(number) for number in range(3)], "give more data"),
    ],
    ids=["one example", "none", "too few to split"],
)
def test_too_little_data_is_one_clear_line(make, rows, message):
    with pytest.raises(DataError) as caught:
        make(rows)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(make, tmp_path):
    with pytest.raises(SourceError, match=r"nowhere\.jsonl"):
        make([row(1)], sources=[str(tmp_path / "nowhere.jsonl")])
