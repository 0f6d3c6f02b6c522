import json
import random
import shutil
import threading
import time

import pytest
from tiny_models import byte_tokenizer

from gradientspace_ray.examples.formats import SourceError
from gradientspace_ray.recipe import parse_recipe
from gradientspace_ray.run import RunDirectory
from gradientspace_ray.stages import prepare as prepare_stage
from gradientspace_ray.stages.prepare import SCHEMA, DataError, prepare, split_key, split_of

SPLITS = ("train", "validation", "test")


@pytest.fixture
def make(tmp_path, tiny_model_dir):
    """Write rows, prepare them, and return (summary, run directory, split -> rows)."""

    def build(rows, model=tiny_model_dir, view="last_user", seed=0, **data):
        path = tmp_path / "data.jsonl"
        path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
        settings = {"sources": [str(path)], "validation_share": 0.2, "test_share": 0.2} | data
        parts = {"model": {"name": str(model)}, "router": {"view": view}, "data": settings}
        recipe = parse_recipe({"name": "t", "seed": seed} | parts)
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
    summary, run, splits = make(rows, max_tokens=200)
    expected = {"malformed_json": 1, "duplicate": 1, "empty_response": 1, "too_long": 1}
    assert summary.counts["rejected_by_reason"] == expected
    assert summary.counts["rejected"] == 4
    assert summary.counts["examples"] == 40
    assert summary.counts["tokens"] == sum(r["tokens"] for rows in splits.values() for r in rows)
    assert "4 rejected" in summary.made
    listed = [json.loads(line) for line in run.read_bytes("examples/rejected.jsonl").decode().splitlines()]
    path = tmp_path / "data.jsonl"
    assert [(rejection["place"], rejection["reason"]) for rejection in listed] == [
        (f"{path}:41", "malformed_json"),
        (f"{path}:42", "duplicate"),
        (f"{path}:43", "empty_response"),
        (f"{path}:44", "too_long"),
    ]
    assert listed[1]["detail"] == f"same text as {path}:2"
    assert listed[3]["detail"].endswith("more than data.max_tokens 200")


def test_a_conversation_that_the_template_refuses_is_rejected(make, tmp_path, tiny_model_dir):
    model = shutil.copytree(tiny_model_dir, tmp_path / "strict")
    tokenizer = byte_tokenizer()
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = refuse + tokenizer.chat_template
    tokenizer.save_pretrained(model)
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "?"}]
    rows = [*(row(number) for number in range(40)), {"prompt": system, "completion": "!"}]
    summary, _, _ = make(rows, model=model)
    assert summary.counts["rejected_by_reason"] == {"not_rendered": 1}


def test_every_column_has_its_type_and_a_missing_domain_is_null(make):
    _, run, splits = make([row(number) for number in range(40)])
    for split in SPLITS:
        assert run.read_table(f"examples/{split}.parquet").schema == SCHEMA
        assert all(example["domain"] is example["group"] is None for example in splits[split])


def test_the_order_of_the_sources_does_not_matter(make, tmp_path):
    paths = []
    for start in (0, 40):
        lines = (json.dumps(row(number)) + "\n" for number in range(start, start + 50))
        paths.append(tmp_path / f"{start}.jsonl")
        paths[-1].write_text("".join(lines))
    first, _, splits = make([], sources=[str(path) for path in paths])
    again, _, swapped = make([], sources=[str(path) for path in reversed(paths)])
    assert first.counts["rejected_by_reason"] == again.counts["rejected_by_reason"] == {"duplicate": 10}
    assert first.output == again.output
    assert [r["id"] for r in splits["train"]] == [r["id"] for r in swapped["train"]]


def test_the_output_changes_with_whatever_later_stages_read(make):
    turns = [{"role": "system", "content": "Be brief."}]
    rows = [{"prompt": [*turns, {"role": "user", "content": f"{number}?"}], "completion": "!"} for number in range(60)]
    outputs = {make(rows)[0].output, make(rows, view="conversation")[0].output, make(rows[1:])[0].output}
    outputs |= {make([one | {"domain": "sums"} for one in rows])[0].output}
    assert len(outputs) == 4
    assert make(rows)[0].output in outputs


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


def test_answers_to_one_prompt_are_in_one_split(make):
    answers = ("Yes.", "No.", "Who knows?")
    rows = [{"prompt": f"Is {number} odd?", "completion": answer} for number in range(40) for answer in answers]
    rows += [{"prompt": f" is  {number} ODD?", "completion": "Maybe."} for number in range(40)]
    _, _, splits = make(rows)
    prompts = [{" ".join(r["prompt"].lower().split()) for r in found} for found in splits.values()]
    assert sum(map(len, prompts)) == len(set.union(*prompts)) == 40
    assert sum(map(len, splits.values())) == 160


def places_of(splits, key):
    """Value of `key` -> the splits that it is found in."""
    found = {}
    for name, rows in splits.items():
        for example in rows:
            found.setdefault(key(example), set()).add(name)
    return found


def test_the_rows_of_a_group_are_in_one_split_whatever_they_say(make):
    rows = [row(number, group=f"page {number % 20}") for number in range(80)]
    _, _, splits = make(rows)
    found = places_of(splits, lambda example: example["group"])
    assert len(found) == 20
    assert all(len(names) == 1 for names in found.values())
    assert set.union(*found.values()) == set(SPLITS)


def test_the_split_does_not_depend_on_what_the_router_reads(make):
    rows = []
    for number in range(60):
        system = [{"role": "system", "content": f"You are assistant {number % 7}."}] if number % 2 else []
        first = [{"role": "user", "content": f"What is {number % 30}?"}, {"role": "assistant", "content": f"{number}"}]
        last = [{"role": "user", "content": f"And {number}?"}, {"role": "assistant", "content": "No idea."}]
        rows.append({"messages": [*system, *first, *last]})
    found = {}
    for view in ("last_user", "first_user", "conversation"):
        _, _, splits = make(rows, view=view)
        found[view] = {name: [example["id"] for example in members] for name, members in splits.items()}
        by_first = places_of(
            splits, lambda example: next(m["content"] for m in example["messages"] if m["role"] == "user")
        )
        assert len(by_first) == 30
        assert all(len(names) == 1 for names in by_first.values())
    assert found["last_user"] == found["first_user"] == found["conversation"]


def test_the_key_of_a_split_is_the_group_else_the_first_message_of_the_user():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A?"}]
    messages += [{"role": "assistant", "content": "B."}, {"role": "user", "content": "C?"}]
    assert split_key(messages, None) == "A?"
    assert split_key(messages, "page 7") == "page 7"


def test_too_few_groups_are_named(make):
    rows = [row(number, group=f"page {number % 2}") for number in range(30)]
    with pytest.raises(DataError, match=r"no \w+ examples out of 30 in 2 groups; raise data\.\w+_share"):
        make(rows)


@pytest.mark.parametrize("seconds", [0.0, 0.3], ids=["loading", "converting"])
def test_the_user_sees_at_once_that_the_model_is_loading(make, monkeypatch, capfd, seconds):
    load = prepare_stage.load_tokenizer
    seen = []

    def slow(name):
        time.sleep(0.2)
        seen.append(capfd.readouterr().err)
        time.sleep(2 * seconds)
        return load(name)

    monkeypatch.setattr(prepare_stage, "load_tokenizer", slow)
    if seconds:
        monkeypatch.setattr(prepare_stage, "CLOCK_INTERVAL_S", 0.1)
        monkeypatch.setattr(prepare_stage, "CONVERTING_AFTER_S", 0.2)
        monkeypatch.setattr(prepare_stage, "is_installed", lambda name: True)
    make([row(number) for number in range(40)])
    assert "loading the tokenizer: 0/1" in seen[0]
    rest = capfd.readouterr().err
    assert "loading the tokenizer: 1/1" in rest
    assert ("converting the model (once)" in rest) == bool(seconds)


def test_a_tokenizer_that_cannot_be_loaded_ends_the_clock(make, tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        make([row(1)], model=tmp_path / "nowhere")
    assert not [thread for thread in threading.enumerate() if thread.name == "clock"]


def test_near_duplicates_share_a_split():
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
    _, _, other = make(rows, max_examples=30, seed=1)
    ids = [[{r["id"] for r in found} for found in drawn.values()] for drawn in (first, again, other)]
    assert ids[0] == ids[1] != ids[2]
    assert sum(map(len, ids[0])) == sum(map(len, ids[2])) == 30


NO_SPLIT = {"validation_share": 1e-6, "test_share": 1e-6}


@pytest.mark.parametrize(
    ("rows", "data", "message"),
    [
        ([row(1)], {}, "1 usable examples, at least 3 are needed; give more data"),
        ([], {}, "0 usable examples"),
        (
            ["{broken\n"] * 2 + [row(1)] * 2,
            {},
            "1 usable examples.*; rejected: 1 duplicate, 2 malformed_json, see .*rejected",
        ),
        (
            [row(number) for number in range(30)],
            NO_SPLIT,
            "no validation examples out of 30; raise data.validation_share",
        ),
        ([row(number) for number in range(30)], NO_SPLIT | {"validation_share": 0.4}, "no test examples out of 30"),
    ],
    ids=["one example", "none", "mostly rejected", "no validation", "no test"],
)
def test_too_little_data_is_one_clear_line(make, tmp_path, rows, data, message):
    with pytest.raises(DataError, match=message) as caught:
        make(rows, **data)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "data.jsonl") in str(caught.value)


def test_what_was_rejected_is_listed_even_when_too_little_is_left(make, tmp_path):
    with pytest.raises(DataError):
        make(["{broken\n", row(1)])
    [line] = (tmp_path / "run" / "examples" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["place"] == f"{tmp_path / 'data.jsonl'}:1"


def test_a_missing_file_is_named(make, tmp_path):
    with pytest.raises(SourceError, match=r"nowhere\.jsonl"):
        make([row(1)], sources=[str(tmp_path / "nowhere.jsonl")])
