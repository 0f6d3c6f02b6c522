"""What is skipped, repeated and recorded, with stages that write their outputs and do nothing else."""

import contextlib
import dataclasses
import io
import json
import os
import signal
import time

import pytest
import ray
import torch
from rich.console import Console

from gradientspace_ray import pipeline
from gradientspace_ray.errors import one_line
from gradientspace_ray.models import fingerprint
from gradientspace_ray.models.fingerprint import model_fingerprint
from gradientspace_ray.models.loading import ModelError, load_tokenizer
from gradientspace_ray.pipeline import STAGES, StageFailedError, run_pipeline
from gradientspace_ray.recipe import load_recipe, parse_recipe
from gradientspace_ray.run import RunDirectory, RunError, Summary

NAMES = [stage.name for stage in STAGES]
FOLDERS = {"generalist", "experts", "router", "sketch/rows", "experts/one@1"}
EXTRA = {"experts": ("experts/one@1",)}


class Line:
    """The real stages' names, digests and outputs, with functions that only count; one may be made to fail."""

    def __init__(self, monkeypatch):
        self.ran = []
        self.connected = 0
        self.failure = {}
        self.output = {}
        self.before = {}
        self.found = {}
        self.dtypes = []
        monkeypatch.setattr(pipeline, "STAGES", tuple(self._quick(stage) for stage in STAGES))
        monkeypatch.setattr(pipeline, "connect", self._connect)

    def _connect(self, device):
        self.connected += 1

    def _quick(self, stage):
        def function(recipe, run):
            self.ran.append(stage.name)
            self.dtypes.append(recipe.model.compute_dtype)
            outputs = (*stage.outputs, *EXTRA.get(stage.name, ()))
            self.found[stage.name] = [name for name in outputs if run.exists(name)]
            self.before.get(stage.name, lambda: None)()
            if stage.name in self.failure:
                raise self.failure[stage.name]
            for name in outputs:
                run.write_bytes(f"{name}/x" if name in FOLDERS else name, b"made")
            made, output = f"[{stage.name}]", self.output.get(stage.name)
            return Summary(made=made, counts={"things": 1}, output=output, outputs=EXTRA.get(stage.name, ()))

        return dataclasses.replace(stage, functions=(function,))


@pytest.fixture
def line(monkeypatch):
    return Line(monkeypatch)


@pytest.fixture
def model_dir(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": 64}')
    return folder


@pytest.fixture
def recipe(model_dir):
    return parse_recipe({"name": "x", "model": {"name": str(model_dir)}, "data": {"sources": ["quickstart"]}})


def run_all(recipe, run, **options):
    screen = io.StringIO()
    records = run_pipeline(recipe, run, Console(file=screen, width=200), **options)
    return records, screen.getvalue()


def changed(recipe, section, **values):
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=values)})


@pytest.mark.parametrize("name", NAMES)
def test_ctrl_c_in_any_stage_repeats_that_stage_alone(line, recipe, tmp_path, name):
    run = RunDirectory(tmp_path / "run")
    line.failure = {name: KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        run_all(recipe, run)
    before = NAMES[: NAMES.index(name)]
    statuses = {stage: record.status for stage, record in run.manifest().stages.items()}
    assert statuses == dict.fromkeys(before, "done") | {name: "interrupted"}
    assert not run.exists("lease.json")
    line.failure, line.ran = {}, []
    records, _ = run_all(recipe, run)
    assert line.ran == NAMES[len(before) :]
    assert all(record.status == "done" for record in records.values())


def test_a_ctrl_c_that_a_library_swallows_ends_the_run_after_that_stage(line, recipe, tmp_path):
    def swallow():
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)

    run = RunDirectory(tmp_path / "run")
    line.before = {"cluster": swallow}
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run_all(recipe, run)
    assert run.manifest().stages["cluster"].status == "interrupted"
    assert line.ran[-1] == "cluster"
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_finished_run_starts_nothing(line, recipe, tmp_path):
    run = RunDirectory(tmp_path / "run")
    run_all(recipe, run)
    line.ran, line.connected = [], 0
    _, shown = run_all(recipe, run)
    assert line.ran == []
    assert line.connected == 0
    assert "cluster    done before: [cluster]" in shown


@pytest.mark.parametrize(
    ("section", "values", "expected"),
    [
        ("report", {}, []),
        ("experts", {"max_concurrent": 7, "tokens_per_batch": 64}, []),
        ("experts", {"workers": 2, "zero_stage": 3, "checkpoint_every": 7}, []),
        ("experts", {"epochs": 3.0}, ["experts", "router", "evaluate", "report"]),
        # The generalist must not know what the experts hold out.
        ("experts", {"heldout_share": 0.2}, NAMES[1:]),
        ("gradients", {"workers": 5}, []),
        ("evaluate", {"confidence": 0.9}, ["evaluate", "report"]),
        ("router", {"max_tokens": 32}, ["router", "evaluate", "report"]),
        ("clusters", {"neighbours": 3}, ["cluster", "experts", "router", "evaluate", "report"]),
        ("sketch", {"rank": 8}, ["gradients", "cluster", "experts", "router", "evaluate", "report"]),
        ("warmup", {"epochs": 2.0}, NAMES[1:]),
    ],
)
def test_a_changed_key_runs_its_stage_and_what_follows(line, recipe, tmp_path, section, values, expected):
    run = RunDirectory(tmp_path / "run")
    run_all(recipe, run)
    line.ran = []
    run_all(changed(recipe, section, **values) if values else recipe, run)
    assert line.ran == expected


@pytest.mark.parametrize(("method", "expected"), [("embedding", NAMES[3:]), ("random", NAMES[5:])])
def test_another_encoder_makes_other_clusters_of_embeddings(line, recipe, tmp_path, method, expected):
    recipe = changed(recipe, "clusters", method=method)
    run = RunDirectory(tmp_path / "run")
    run_all(recipe, run)
    line.ran = []
    run_all(changed(recipe, "router", max_tokens=32), run)
    assert line.ran == expected


def test_what_follows_is_skipped_when_the_output_is_the_same(line, recipe, tmp_path):
    run = RunDirectory(tmp_path / "run")
    line.output = {"cluster": "same"}
    run_all(recipe, run)
    line.ran = []
    run_all(changed(recipe, "clusters", neighbours=3), run)
    assert line.ran == ["cluster"]


@pytest.mark.parametrize("name", NAMES)
def test_again_runs_a_stage_on_a_clean_table_and_all_that_follow(line, recipe, tmp_path, name):
    run = RunDirectory(tmp_path / "run")
    run_all(recipe, run)
    line.ran, line.found = [], {}
    run_all(recipe, run, again=name)
    assert line.ran == NAMES[NAMES.index(name) :]
    assert line.found[name] == []


@pytest.mark.parametrize(
    ("lost", "stage"),
    [
        ("generalist", "warmup"),
        ("experts/one@1", "experts"),
        ("evaluation/losses.validation.parquet", "router"),
        ("evaluation/scores.json", "evaluate"),
        ("sketch/rows", "gradients"),
    ],
)
def test_a_lost_output_is_made_again(line, recipe, tmp_path, lost, stage):
    run = RunDirectory(tmp_path / "run")
    run_all(recipe, run)
    run.delete(lost)
    line.ran = []
    run_all(recipe, run)
    assert line.ran == [stage]


def test_another_model_in_the_same_folder_is_another_model(line, recipe, tmp_path, model_dir):
    run = RunDirectory(tmp_path / "run")
    line.output = {"prepare": "same tokens"}
    run_all(recipe, run)
    weights = model_dir / "model.safetensors"
    weights.write_bytes(b"retrained")
    line.ran = []
    run_all(recipe, run)
    assert line.ran == NAMES
    # The same file, written anew as when a job's working directory is unpacked.
    weights.write_bytes(b"retrained")
    os.utime(weights, ns=(1, 1))
    line.ran = []
    run_all(recipe, run)
    assert line.ran == []


def test_large_weights_are_told_apart_by_size_and_time(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "HASHED_BYTES", 4)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"large")
    before = model_fingerprint(str(tmp_path))
    assert model_fingerprint(str(tmp_path)) == before
    os.utime(weights, ns=(1, 1))
    assert model_fingerprint(str(tmp_path)) != before


def test_auto_is_decided_once_and_what_is_decided_counts(line, recipe, tmp_path, monkeypatch):
    run = RunDirectory(tmp_path / "run")
    automatic = changed(recipe, "model", dtype="auto", compute_dtype="auto")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    run_all(automatic, run)
    resolved = load_recipe(run.path("recipe.yaml")).model
    assert resolved.dtype == resolved.compute_dtype == "bfloat16"
    assert set(line.dtypes) == {"bfloat16"}
    line.ran = []
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    run_all(automatic, run)
    assert load_recipe(run.path("recipe.yaml")).model.compute_dtype == "float32"
    assert line.ran == NAMES[1:]


@pytest.mark.parametrize(("hidden_size", "rate"), [(576, 2e-3), (4096, 4.3e-4), (64, 1.1e-2)])
def test_the_learning_rate_is_the_models_unless_the_recipe_has_one(
    line, recipe, tmp_path, model_dir, hidden_size, rate
):
    (model_dir / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": hidden_size}))
    run = RunDirectory(tmp_path / "run")
    run_all(recipe, run)
    assert load_recipe(run.path("recipe.yaml")).warmup.learning_rate == rate
    run_all(changed(recipe, "warmup", examples_per_step=2), run)
    assert load_recipe(run.path("recipe.yaml")).warmup.learning_rate == pytest.approx(rate / 2, rel=0.06)
    run_all(changed(recipe, "warmup", learning_rate=3e-5), run)
    assert load_recipe(run.path("recipe.yaml")).warmup.learning_rate == 3e-5


def test_a_driver_that_lost_the_run_records_nothing(line, recipe, tmp_path):
    run = RunDirectory(tmp_path / "run")
    line.before = {
        "cluster": lambda: run.write_json("lease.json", {"owner": "x", "host": "y", "pid": 1, "renewed_at": 0})
    }
    with pytest.raises(RunError, match="another driver took over"):
        run_all(recipe, run)
    assert run.manifest().stages["cluster"].status == "running"
    assert run.read_json("lease.json")["owner"] == "x"


def test_what_was_made_of_something_else_is_stale_until_it_is_made_again(line, recipe, tmp_path):
    def statuses():
        return [record.status for record in run.manifest().stages.values()]

    run = RunDirectory(tmp_path / "run")
    run_all(recipe, run)
    other = changed(recipe, "experts", epochs=0.4)
    run_all(other, run, until="experts")
    assert statuses() == ["done"] * 5 + ["stale"] * 3
    run_all(other, run)
    assert statuses() == ["done"] * 8
    line.failure = {"prepare": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        run_all(recipe, run, again="prepare")
    assert statuses() == ["interrupted"] + ["stale"] * 7
    line.failure, line.ran = {}, []
    run_all(other, run)
    assert line.ran == ["prepare"]
    assert statuses() == ["done"] * 8


def test_until_ends_after_a_stage(line, recipe, tmp_path):
    records, _ = run_all(recipe, RunDirectory(tmp_path / "run"), until="cluster")
    assert list(records) == NAMES[:4] == line.ran


def test_a_failure_is_one_line_and_its_traceback_is_kept(line, recipe, tmp_path):
    run = RunDirectory(tmp_path / "run")
    try:
        raise RunError("x.json is missing; make it") from FileNotFoundError("[Errno 2] x.json")
    except RunError as error:
        line.failure = {"cluster": error}
    with pytest.raises(StageFailedError, match=r"^cluster: x\.json is missing; make it \(traceback: .*error\.log\)$"):
        run_all(recipe, run)
    assert run.manifest().stages["cluster"].error == "x.json is missing; make it"
    assert "Errno 2" in run.read_bytes("error.log").decode()


def test_a_model_that_cannot_be_had_says_how_to_get_it():
    with pytest.raises(ModelError) as caught:
        load_tokenizer("nobody/nothing")
    assert "give a local folder, or a Hugging Face name" in one_line(caught.value)


@pytest.mark.ray
def test_a_failure_on_a_worker_is_its_own_message(ray_cluster):
    import ray

    @ray.remote(max_retries=0)
    def fail():
        try:
            raise OSError(2, "no such file")
        except OSError as error:
            raise ValueError("shard 3 is damaged; delete it") from error

    with pytest.raises(ray.exceptions.RayTaskError) as caught:
        ray.get(fail.remote())
    assert one_line(caught.value) == "shard 3 is damaged; delete it"


def test_only_a_ray_that_was_joined_inside_is_left(ray_cluster):
    with pipeline.disconnecting():
        pipeline.connect("cpu")
    assert ray.is_initialized()
