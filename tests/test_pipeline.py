"""The whole line on a tiny model: every stage, resumption, and a routed answer over HTTP."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from gradientspace_ray.recipe import STAGES, parse_recipe

COMMAND = [sys.executable, "-c", "from gradientspace_ray.cli import main; main()"]


def gradientspace(*arguments, check=True, timeout_s=400):
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=timeout_s)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def tiny_arguments(tmp_path_factory, tiny_model_dir, tiny_encoder_dir):
    run_dir = tmp_path_factory.mktemp("runs") / "tiny"
    settings = [
        f"model.name={tiny_model_dir}",
        f"router.encoder={tiny_encoder_dir}",
        "warmup.learning_rate=5e-3",
        "experts.learning_rate=5e-3",
    ]
    return run_dir, ["run", "tiny", "--run-dir", str(run_dir), *(f"--set={setting}" for setting in settings)]


def wait_until(condition, process, timeout_s=200):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)


def trains(process):
    """Whether Ray Train is at work for a driver."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return any(
            "TrainController" in " ".join(child.cmdline())
            for child in psutil.Process(process.pid).children(recursive=True)
        )


def stage_statuses(run_dir):
    manifest = run_dir / "manifest.json"
    stages = json.loads(manifest.read_text())["stages"] if manifest.exists() else {}
    return {name: record["status"] for name, record in stages.items()}


@pytest.fixture(scope="module")
def finished_run(tiny_arguments):
    """A run that is stopped while Ray Data and while Ray Train are at work, then finished."""
    run_dir, arguments = tiny_arguments
    for stage, at_work, stop in (
        ("warmup", trains, lambda process: process.terminate()),
        (
            "gradients",
            lambda _: (run_dir / "sketch/shards").exists(),
            lambda process: os.killpg(process.pid, signal.SIGINT),
        ),
        ("experts", trains, lambda process: os.killpg(process.pid, signal.SIGINT)),
    ):
        process = subprocess.Popen(
            [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        wait_until(lambda at_work=at_work, process=process: at_work(process), process)
        stop(process)
        output, errors = process.communicate(timeout=90)
        assert process.returncode == 130, output + errors
        assert "interrupted" in output
        before = STAGES[: STAGES.index(stage)]
        assert stage_statuses(run_dir) == dict.fromkeys(before, "done") | {stage: "interrupted"}
    output = gradientspace(*arguments).stdout
    assert output.count("done before") == len(before)
    return run_dir, arguments, output


@pytest.mark.ray
@pytest.mark.slow
def test_every_stage_is_done_with_counts_and_seconds(finished_run):
    run_dir, _, output = finished_run
    status = json.loads(gradientspace("status", str(run_dir), "--json").stdout)
    assert list(status["stages"]) == list(STAGES)
    for name, record in status["stages"].items():
        assert record["status"] == "done"
        assert record["seconds"] > 0
        assert record["counts"], name
        assert record["made"]
        assert name in output
    assert "gradientspace serve" in output
    leftovers = [path for path in run_dir.rglob("*") if ".tmp" in path.name or path.name == "lease.json"]
    assert not leftovers
    assert not (run_dir / "sketch" / "shards").exists() or not any((run_dir / "sketch" / "shards").iterdir())


@pytest.mark.ray
@pytest.mark.slow
def test_the_loss_matrix_is_in_scores_json(finished_run):
    run_dir, _, _ = finished_run
    scores = json.loads((run_dir / "evaluation" / "scores.json").read_text())
    losses = scores["heldout_loss"]
    assert losses["generalist"] < losses["base"]
    assert losses["oracle"] <= min(losses["generalist"], losses["routed"]) + 1e-9
    assert 0 <= scores["router_accuracy"] <= 1
    assert scores["clusters"] == 2


@pytest.mark.ray
@pytest.mark.slow
def test_a_finished_run_is_skipped(finished_run):
    _, arguments, _ = finished_run
    output = gradientspace(*arguments).stdout
    assert output.count("done before") == len(STAGES)


@pytest.mark.ray
@pytest.mark.slow
def test_the_endpoint_answers_a_routed_prompt(finished_run):
    run_dir, _, _ = finished_run
    prompt = "Write a Python function that adds two numbers."
    lines = gradientspace("serve", str(run_dir), "--port", "0", "--ask", prompt).stdout.splitlines()
    headers = dict(line.split(": ", 1) for line in lines if line.startswith("x-gradientspace-"))
    experts = {path.name.split("@")[0] for path in (run_dir / "experts").iterdir()}
    assert headers["x-gradientspace-expert"] in experts | {"generalist"}
    assert 0 <= float(headers["x-gradientspace-confidence"]) <= 1
    assert prompt in lines


def test_a_bad_recipe_key_is_one_line_and_exit_code_1():
    done = gradientspace("run", "quickstart", "--set", "experts.epoch=2", check=False)
    assert done.returncode == 1
    assert "did you mean epochs?" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_data_file_is_one_line_that_names_it(tmp_path, tiny_model_dir):
    arguments = ["run", "tiny", "--run-dir", str(tmp_path / "run"), f"--set=model.name={tiny_model_dir}"]
    done = gradientspace(*arguments, "--set=data.sources=[no-such.jsonl]", check=False)
    assert done.returncode == 1
    assert "no-such.jsonl" in done.stderr
    assert "Traceback" not in done.stderr


def test_status_of_an_empty_folder_says_what_to_do(tmp_path):
    done = gradientspace("status", f"{tmp_path}/[ab]", check=False)
    assert done.returncode == 1
    assert f"{tmp_path}/[ab] holds no run; start one with: gradientspace run" in done.stderr


def test_jobs_pipeline_is_the_same_command(tmp_path):
    job = Path(__file__).parents[1] / "jobs" / "pipeline.py"
    done = subprocess.run([sys.executable, str(job), "nothing"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "no such recipe" in done.stderr


def test_the_readme_s_recipes_are_valid():
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    whole, *parts = re.findall(r"```yaml\n(.*?)```", readme, flags=re.DOTALL)
    assert parts
    for part in ("{}", *parts):
        parse_recipe(yaml.safe_load(whole) | yaml.safe_load(part))
