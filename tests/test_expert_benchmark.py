"""The benchmark of trainers and experts: its numbers mean what they say. trl is not needed."""

import io
import json
import statistics

import pytest
from benchmark_scripts import imported
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from gradientspace_ray.stages.finetune_worker import examples_of

MODULES = ("experts", "expert_speed", "expert_trainers", "expert_stage", "gradients", "gradient_methods")
MODULES += ("gradient_task", "sketch_methods")
lengths_of_examples = st.lists(st.integers(1, 90), min_size=1, max_size=40)


@pytest.fixture(scope="module")
def modules():
    with imported(*MODULES) as found:
        yield found


@pytest.fixture(scope="module")
def speed(modules):
    return modules["expert_speed"]


@pytest.fixture(scope="module")
def trainers(modules):
    return modules["expert_trainers"]


def rows_of(lengths):
    return [{"input_ids": [number] * length, "labels": [number] * length} for number, length in enumerate(lengths)]


def numbers_of(rows):
    return [row["input_ids"][0] for row in rows]


def sizes_of(rows):
    return [len(row["input_ids"]) for row in rows]


@given(lengths_of_examples, st.integers(1, 9))
def test_steps_keep_their_examples_in_an_order_that_pads_little(trainers, lengths, size):
    examples = rows_of(lengths)
    plain = trainers.steps_of(examples, size, {"tokens_per_batch": 100}, None)
    found = trainers.steps_of(examples, size, {"rows": "padded", "batch": 1, "order": "step"}, None)
    assert [number for rows in plain for number in numbers_of(rows)] == [*range(len(lengths))]
    assert [sorted(numbers_of(rows)) for rows in found] == [numbers_of(rows) for rows in plain]
    for rows in found:
        assert sizes_of(rows) == sorted(sizes_of(rows), reverse=True)


@given(lengths_of_examples, st.integers(1, 9), st.integers(1, 5))
def test_grouping_by_length_takes_all_examples_once_and_some_of_it_is_the_middle(trainers, lengths, size, count):
    settings = {"rows": "padded", "batch": 1, "order": "length"}
    steps = trainers.steps_of(rows_of(lengths), size, settings, None)
    assert [length for rows in steps for length in sizes_of(rows)] == sorted(lengths, reverse=True)
    part = trainers.steps_of(rows_of(lengths), size, settings, count)
    assert len(part) == min(count, len(steps))
    start = max(0, (len(steps) - count) // 2)
    assert part == steps[start : start + count]


@pytest.mark.parametrize(("rows", "steps", "expected"), [(16, 8, 2), (3, 8, 1), (20, 8, 2), (1, 1, 1)])
def test_packed_rows_make_about_as_many_steps(trainers, rows, steps, expected):
    assert trainers.rows_per_step(rows, steps) == expected


def test_candidates_divide_a_step_and_only_trl_packs(speed):
    assert speed.candidates_of("ours", 8, 1024) == [{"tokens_per_batch": 1024}]
    for name in ("trl", "transformers"):
        for size in (1, 6, 8):
            settings = speed.candidates_of(name, size, 1024)
            assert all(size % one["batch"] == 0 for one in settings)
            packing = [one for one in settings if one["rows"] == "packed"]
            assert packing == ([{"rows": "packed", "batch": 1, "length": 1024}] if name == "trl" else [])
    assert sorted(one["batch"] for one in speed.candidates_of("trl", 8, 64) if one["rows"] == "flat") == [2, 4, 8]


def test_the_fastest_candidate_comes_first_and_failures_last(speed):
    runs = [
        {"settings": 1, "tokens": 100, "seconds": 2.0},
        {"settings": 2, "error": "no memory"},
        {"settings": 3, "tokens": 300, "seconds": 3.0},
    ]
    assert [run["settings"] for run in speed.tuned("trl", runs)] == [3, 1, 2]
    with pytest.raises(speed.MethodError, match="trl: no memory"):
        speed.tuned("trl", runs[1:2])


def trained(seconds, losses, settings, tokens=1000, peak=10**9):
    return {"seconds": seconds, "tokens": tokens, "losses": losses, "settings": settings, "peak_bytes": peak}


def result_of(rounds, tried=(), differences=(0.0,)):
    settings = rounds[0]["settings"]
    return {"settings": settings, "tried": list(tried), "rounds": rounds, "differences": list(differences)}


OURS = {"tokens_per_batch": 100}
PADDED = {"rows": "padded", "batch": 2, "order": "step"}
GROUPED = {"rows": "padded", "batch": 2, "order": "length"}


def test_speeds_are_compared_within_a_round(speed):
    ours = result_of([trained(seconds, [3.0, 2.0], OURS) for seconds in (1.0, 2.0, 10.0)])
    tried = trained(1.0, [3.0, 2.0 + 1e-6], PADDED) | {"tokens_per_second": 1000.0}
    failed = {"settings": PADDED, "error": "no memory"}
    rounds = [trained(seconds, [9.0, 9.0], GROUPED) for seconds in (3.0, 4.0, 15.0)]
    found = speed.summary(result_of(rounds, [tried, failed], [0.0, 1e-6]), ours)
    assert found["ours_is_faster_by"] == statistics.median([3.0, 2.0, 1.5])
    assert found["tokens_per_second"] == 250.0
    assert (found["compared_losses"], found["max_loss_difference"]) == (2, 1e-6)
    assert found["tried"] == [{"settings": PADDED, "tokens_per_second": 1000.0}, failed]
    assert speed.summary(ours, ours)["ours_is_faster_by"] == 1


def test_losses_of_the_same_steps_are_compared(speed):
    ours = trained(1.0, [3.0, 2.0, 1.0, 1.0, 1.0], OURS)
    same = trained(1.0, [3.0, 2.0 + 2**-20, 1.0, 1.0, 9.0], PADDED)
    # Those are the losses of other examples.
    others = [trained(1.0, [9.0] * 5, GROUPED), trained(1.0, [9.0] * 5, {"rows": "packed", "batch": 1, "length": 9})]
    failed = {"settings": PADDED, "error": "no memory"}
    assert speed.loss_differences([failed, *others, same], ours, "float32") == [0.0, 2**-20, 0.0, 0.0]


@pytest.mark.parametrize("loss", [2.1, float("nan")])
def test_another_loss_is_refused(speed, loss):
    ours, its = trained(1.0, [3.0, 2.0], OURS), trained(1.0, [3.0, loss], PADDED)
    with pytest.raises(speed.MethodError, match=r"padded, 2 at once: a loss is .* nats from ours"):
        speed.loss_differences([its], ours, "float32")


def test_seconds_to_the_start_add_up(speed):
    rounds = [{"start": {"imports": imports, "model": 2.0, "trainer": 1.0}} for imports in (5.0, 4.0, 90.0)]
    assert speed.started(rounds) == {"imports": 5.0, "model": 2.0, "trainer": 1.0, "all": 8.0}


def test_arrangements_are_compared_with_one_after_the_other_in_the_same_round(speed):
    runs = [
        {"at_once": at_once, "seconds": seconds, "training_seconds": [1.0, 2.0], "tokens": 50}
        for at_once, seconds in ((4, 10.0), (1, 40.0), (1, 60.0), (4, 20.0))
    ]
    found = speed.arranged(runs, 2, 4)
    assert [row["at_once"] for row in found["arrangements"]] == [1, 4]
    alone, together = found["arrangements"]
    assert (alone["seconds"], alone["cpus_each"], alone["faster_than_one_after_the_other"]) == (50, 2, 1)
    assert (together["cpus_each"], together["faster_than_one_after_the_other"]) == (0.5, 3.5)
    assert together["training_seconds"] == 3


def test_the_run_directory_has_what_the_finetunes_read(modules, tmp_path):
    stage = modules["expert_stage"]
    examples = [([number, 1, 2], [-100, 1, 2]) for number in range(9)]
    run = stage.written(tmp_path / "run", examples, 3)
    job = stage.Job("model", "examples", 3, 8, 1024, "bfloat16", [3, 1], 1, "scratch")
    recipe = stage.recipe_of(job, 3, 2)
    parts = [examples_of(recipe, run, "experts", cluster, ["input_ids"])[0] for cluster in range(3)]
    assert [[ids[0] for ids in part["input_ids"].to_pylist()] for part in parts] == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
    assert recipe.experts.max_concurrent * recipe.compute.cpus_per_worker == pytest.approx(2)
    assert recipe.model.compute_dtype == "bfloat16"


def test_a_trainer_that_is_not_installed_is_left_out(speed, monkeypatch):
    monkeypatch.setitem(speed.NEEDS, "trl", ("no_such_package",))
    assert "no_such_package cannot be imported; `make peers`" in speed.why_not("trl")
    assert speed.why_not("ours") is None


def test_options_that_cannot_be_are_refused(modules, capsys):
    parse = modules["experts"].parse
    assert parse(["--trainers", "trl"]).trainers == ["ours", "trl"]
    for words, message in (
        (["--trainers", "magic"], "no magic; there are ours, trl, transformers"),
        (["--parts", "speed,more"], "no more; there are speed, concurrent"),
        (["--examples", "12"], "--examples 12: give a multiple of --examples-per-step 8"),
    ):
        with pytest.raises(SystemExit):
            parse(words)
        assert message in capsys.readouterr().err


def test_the_study_has_options_of_its_own(modules, monkeypatch):
    given_words = []

    class Module:
        main = given_words.append

    monkeypatch.setattr(modules["experts"], "import_module", {"expert_study": Module}.__getitem__)
    modules["experts"].main(["--study", "--cache", "x"])
    assert given_words == [["--cache", "x"]]


@pytest.mark.slow
@pytest.mark.ray
def test_a_small_run_has_every_number(modules, tmp_path, monkeypatch):
    monkeypatch.setattr(modules["expert_speed"], "TUNING_STEPS", 1)
    path = tmp_path / "made" / "experts.json"
    options = {"shape": "tiny", "trainers": "transformers", "examples": 8, "examples-per-step": 4, "rounds": 1}
    options |= {"experts": 2, "expert-examples": 4, "threads": 1, "json": path, "scratch": tmp_path}
    modules["experts"].main([word for name, value in options.items() for word in (f"--{name}", str(value))])
    report = json.loads(path.read_text())
    assert {"machine", "model", "dtype", "tokens", "speed", "start_seconds", "concurrent", "skipped"} < set(report)
    assert list(report["speed"]) == ["ours", "transformers"]
    for name, result in report["speed"].items():
        assert result["max_loss_difference"] < 1e-5
        assert len(result["losses"]) == 3
        assert result["tokens_per_second"] * result["seconds"] == pytest.approx(report["tokens"], rel=0.05)
        assert 100 < result["peak_mb"] < 4000
        assert report["start_seconds"][name]["all"] > 0
    assert report["speed"]["ours"]["losses"][-1] < report["speed"]["ours"]["losses"][0]
    found = report["concurrent"]
    assert [row["at_once"] for row in found["arrangements"]] == [1, 2]
    assert found["arrangements"][0]["faster_than_one_after_the_other"] == 1
    assert all(row["seconds"] > row["training_seconds"] / row["at_once"] > 0 for row in found["arrangements"])
    assert report["start_seconds"]["stage"]["around_training"] > 0
    text = io.StringIO()
    modules["expert_speed"].show_speed(report, Console(file=text, width=140))
    assert "x as fast as transformers" in text.getvalue()
    assert "2 experts" in text.getvalue()
