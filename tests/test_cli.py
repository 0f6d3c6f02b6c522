"""The command line without Ray: what it says, and how it ends."""

import contextlib
import errno
import importlib.abc
import socket
import subprocess
import sys

import httpx
import pytest
import torch
from ray.exceptions import RayError, RayTaskError

import gradientspace_ray
from gradientspace_ray import cli
from gradientspace_ray.recipe import dump_recipe, load_recipe, parse_recipe
from gradientspace_ray.registry import REGISTRY
from gradientspace_ray.run import RunDirectory

FREE_SOME_SPACE = "free some space and run the same command again"
MISSING = "holds no run; start one with: gradientspace run quickstart"


def gradientspace(capsys, *arguments):
    """Exit code, standard output and standard error of a command."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["gradientspace", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
    output, errors = capsys.readouterr()
    return caught.value.code or 0, output, errors


@pytest.fixture
def run_dir(tmp_path):
    """What `serve` looks at before it starts anything."""
    adapter = {"name": "generalist", "digest": "1", "folder": "generalist"}
    registry = {"base_model": "x", "max_tokens": 1, "generalist": adapter, "experts": [], "router_digest": "1"}
    run = RunDirectory(tmp_path)
    run.write_json(REGISTRY, registry)
    run.write_json("manifest.json", {"format": 1, "stages": {}})
    recipe = {
        "name": "gpu-run",
        "model": {"name": "x"},
        "data": {"sources": ["quickstart"]},
        "router": {"encoder": "x"},
        "compute": {"device": "cuda", "gpus_per_worker": 1},
    }
    run.write_bytes("recipe.yaml", dump_recipe(parse_recipe(recipe)).encode())
    (tmp_path / "generalist").mkdir()
    (tmp_path / "router").mkdir()
    return tmp_path


@pytest.fixture
def pipeline(monkeypatch):
    """The pipeline, which must not connect to Ray."""
    from gradientspace_ray import pipeline

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(pipeline, "connect", lambda device: pytest.fail("Ray was started"))
    return pipeline


def test_the_command_line_loads_neither_ray_nor_torch():
    code = "import sys, gradientspace_ray.cli\nassert not {'ray', 'torch', 'deepspeed'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("command", [("status",), ("resume",), ("report",), ("route",), ("serve",)])
def test_a_folder_without_a_run_is_the_same_line_in_every_command(capsys, tmp_path, command):
    prompt = ["hello"] if command == ("route",) else []
    for folder in (tmp_path, tmp_path / "[nowhere]"):
        code, output, errors = gradientspace(capsys, *command, folder, *prompt)
        assert (code, output, errors) == (1, "", f"error: {folder} {MISSING}\n")


def full_disk_in_a_stage():
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "/data/rows.bin")
        except OSError as error:
            raise RuntimeError("gradients: No space left on device (traceback: error.log)") from error
    except RuntimeError as error:
        return error


def answer(status, **body):
    return httpx.Response(status, request=httpx.Request("POST", "http://here"), **body)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("first line\nsecond line"), "first line"),
        (KeyError(), "KeyError"),
        (OSError(errno.ENOSPC, "No space left on device", "a.bin"), f"the disk is full (a.bin); {FREE_SOME_SPACE}"),
        (full_disk_in_a_stage(), f"the disk is full (/data/rows.bin); {FREE_SOME_SPACE}"),
        (httpx.ReadTimeout("timed out"), "the endpoint does not answer (ReadTimeout: timed out)"),
        (httpx.ConnectError("refused"), "the endpoint does not answer (ConnectError: refused)"),
        (httpx.HTTPStatusError("502 Bad Gateway", request=None, response=answer(502)), "502 Bad Gateway"),
        (httpx.InvalidURL("Invalid port: 'x'"), "Invalid port: 'x'"),
        (RayError("the cluster is gone"), "the cluster is gone"),
        (RayTaskError("f", "Traceback\nOSError: no bucket", OSError("no bucket")), "no bucket"),
    ],
)
def test_expected_errors_are_one_line_and_exit_code_1(capsys, monkeypatch, error, line):
    def fail(run_dir):
        raise error

    monkeypatch.setattr(cli, "RunDirectory", fail)
    assert gradientspace(capsys, "status", "x") == (1, "", f"error: {line}\n")


def test_errors_that_nobody_expects_keep_their_traceback(monkeypatch):
    def fail(run_dir):
        raise TypeError("a mistake in this package")

    monkeypatch.setattr(cli, "RunDirectory", fail)
    monkeypatch.setattr(sys, "argv", ["gradientspace", "status", "x"])
    with pytest.raises(TypeError, match="a mistake"):
        cli.main()


class Interrupted(importlib.abc.MetaPathFinder):
    """Ctrl-C while the pipeline is imported."""

    def find_spec(self, name, path=None, target=None):
        if name == "gradientspace_ray.pipeline":
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("command", "what_now"),
    [("run", "run the same command again to continue where it stopped"), ("serve", "the endpoint has stopped")],
)
def test_ctrl_c_during_the_imports_is_one_line_and_exit_code_130(capsys, monkeypatch, run_dir, command, what_now):
    monkeypatch.delitem(sys.modules, "gradientspace_ray.pipeline", raising=False)
    monkeypatch.delattr(gradientspace_ray, "pipeline", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    arguments = ["quickstart", "--run-dir", run_dir] if command == "run" else [run_dir]
    code, output, errors = gradientspace(capsys, command, *arguments)
    assert (code, output, errors) == (130, f"\ninterrupted; {what_now}\n", "")


@pytest.mark.parametrize("arguments", [("--port", "70000"), ("--port", "-1"), ("--device", "tpu"), ("--nothing",)])
def test_usage_errors_exit_with_2(capsys, run_dir, arguments):
    code, _, errors = gradientspace(capsys, "serve", run_dir, *arguments)
    assert code == 2
    assert arguments[0] in errors


def test_resume_takes_the_run_s_own_recipe_and_what_is_set(capsys, monkeypatch, pipeline, run_dir):
    seen = []
    monkeypatch.setattr(
        pipeline, "run_pipeline", lambda recipe, run, *arguments: seen.append((recipe, run.uri, *arguments))
    )
    code, _, _ = gradientspace(capsys, "resume", run_dir, "--set", "experts.tokens_per_batch=99", "--until", "experts")
    ((recipe, uri, _, until, again),) = seen
    assert (code, uri, until, again) == (0, str(run_dir), "experts", None)
    assert recipe.name == "gpu-run"
    assert recipe.experts.tokens_per_batch == 99
    assert recipe == load_recipe(str(run_dir / "recipe.yaml"), ["experts.tokens_per_batch=99"])


def test_resume_tells_what_is_wrong_with_the_recipe(capsys, run_dir):
    (run_dir / "recipe.yaml").write_text("name: [")
    code, _, errors = gradientspace(capsys, "resume", run_dir)
    assert code == 1
    assert errors.startswith(f"error: {run_dir}/recipe.yaml")
    assert len(errors.splitlines()) == 1


def test_what_cannot_be_served_is_told_before_ray_starts(capsys, pipeline, run_dir):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        _, _, errors = gradientspace(capsys, "serve", run_dir, "--device", "cpu", "--port", port)
        assert errors == f"error: port {port} on 127.0.0.1 is in use; choose another with --port\n"
    (run_dir / "router").rmdir()
    _, _, errors = gradientspace(capsys, "serve", run_dir, "--device", "cpu", "--port", 0)
    again = f"gradientspace run {run_dir}/recipe.yaml --run-dir {run_dir}"
    assert errors == f"error: {run_dir}: router is missing; finish the run with: {again}\n"
    (run_dir / REGISTRY).unlink()
    _, _, errors = gradientspace(capsys, "serve", run_dir, "--device", "cpu", "--port", 0)
    assert f"{REGISTRY} is missing, the run has no router yet" in errors


@pytest.mark.parametrize(
    ("option", "device", "gpus"),
    [
        ([], "cuda", 1),
        (["--set", "gpus_per_replica=0.5"], "cuda", 0.5),
        (["--set", "vllm={tensor_parallel_size: 2}"], "cuda", 0),
        (["--set", "vllm=null"], "cuda", 1),
        (["--device", "cpu"], "cpu", 0),
    ],
)
def test_the_run_s_device_is_the_default(capsys, monkeypatch, pipeline, run_dir, option, device, gpus):
    from gradientspace_ray.serving import app

    def build(arguments):
        assert (arguments.device, arguments.gpus_per_replica) == (device, gpus)
        raise RuntimeError("as far as this test goes")

    monkeypatch.setattr(app, "build", build)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "as far as this test goes" in gradientspace(capsys, "serve", run_dir, "--port", 0, *option)[2]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    missing = "this machine has no CUDA GPU for the experts; serve with --device cpu"
    assert (missing in gradientspace(capsys, "serve", run_dir, "--port", 0, *option)[2]) == (device == "cuda")


@pytest.mark.parametrize(
    ("cpus", "threads", "address", "more", "expected"),
    [
        (2, 2, None, {}, 1.7),
        (2, 1, None, {}, 1),
        (16, 8, None, {}, 8),
        (16, 16, None, {"ingress_replicas": 3}, 15.5),
        (2, 2, None, {"router_replicas": 9}, 1),
        (16, 8, "auto", {}, 1),
        (16, 8, None, {"max_replicas": 2}, 1),
        (16, 8, None, {"cpus_per_replica": 4}, 4),
        (16, 8, None, {"vllm": {}}, 1),
        (16, 8, None, {"device": "cuda"}, 1),
    ],
)
def test_a_single_replica_takes_what_its_own_machine_has(monkeypatch, cpus, threads, address, more, expected):
    from gradientspace_ray.serving.app import own_share
    from gradientspace_ray.serving.arguments import ServeArguments

    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    assert own_share(ServeArguments(run_dir="x", **more), cpus).cpus_per_replica == pytest.approx(expected)


@pytest.mark.parametrize("key", [None, "secret"])
def test_an_endpoint_says_where_it_is_and_how_to_ask_it(capsys, monkeypatch, key):
    monkeypatch.delenv(cli.API_KEY_ENV, raising=False)
    if key:
        monkeypatch.setenv(cli.API_KEY_ENV, key)
    cli._announce("runs/[a]", "http://[::1]:8000")
    first, command = capsys.readouterr().out.splitlines()
    assert first.startswith("Serving runs/[a] at http://[::1]:8000/v1 (model: auto)")
    assert (f'-H "Authorization: Bearer ${cli.API_KEY_ENV}"' in command) == bool(key)
    assert "secret" not in command


@pytest.mark.parametrize(
    ("host", "option", "key", "refused"),
    [
        ("127.0.0.1", (), "", False),
        ("::1", (), "", False),
        ("localhost", (), "", False),
        ("0.0.0.0", (), "", True),
        ("::", (), "", True),
        ("my-host", (), "", True),
        ("0.0.0.0", (), "secret-secret-secret", False),
        ("0.0.0.0", ("--set", "allow_anonymous=true"), "", False),
    ],
)
def test_an_endpoint_that_strangers_could_use_is_refused(capsys, monkeypatch, run_dir, host, option, key, refused):
    from gradientspace_ray.serving import app

    def build(arguments):
        raise RuntimeError("as far as this test goes")

    @contextlib.contextmanager
    def reserved_port(host, port):
        yield port

    monkeypatch.setenv(cli.API_KEY_ENV, key)
    monkeypatch.setattr(app, "build", build)
    monkeypatch.setattr(app, "reserved_port", reserved_port)
    error = gradientspace(capsys, "serve", run_dir, "--host", host, "--device", "cpu", *option)[2]
    assert ("could use this endpoint" in error) == refused
    assert ("as far as this test goes" in error) != refused


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("max_slot=3", "max_slot: there is no such argument; did you mean max_slots?"),
        ("max_slots=0", "max_slots: input should be greater than or equal to 1"),
        ("max_slots", "--set max_slots: write it as key=value"),
        ("max_slots=[", "--set max_slots=[: the value is not valid YAML"),
        ("min_replicas=3", "min_replicas 3 is more than max_replicas 1"),
    ],
)
def test_a_bad_argument_of_the_endpoint_is_one_line(capsys, run_dir, assignment, message):
    code, _, error = gradientspace(capsys, "serve", run_dir, "--device", "cpu", "--set", assignment)
    assert (code, error) == (1, f"error: {message}\n")


HEADERS = {
    "x-gradientspace-expert": "count-sum",
    "x-gradientspace-confidence": "0.9876",
    "x-gradientspace-reason": "routed",
    "x-gradientspace-router-ms": "3.1",
}


def test_an_answer_is_the_prompt_the_decision_and_the_text(capsys, monkeypatch):
    def post(url, json, headers, timeout):
        assert url == "http://here/v1/chat/completions"
        assert headers == {"authorization": "Bearer secret"}
        assert json["messages"] == [{"role": "user", "content": "[b]2+2[/b]"}]
        return answer(200, headers=HEADERS, json={"choices": [{"message": {"content": "\n[red]4\n"}}]})

    monkeypatch.setenv(cli.API_KEY_ENV, "secret")
    monkeypatch.setattr(httpx, "post", post)
    cli._show_answer("http://here", "[b]2+2[/b]")
    shown = "".join(f"{name}: {value}\n" for name, value in HEADERS.items())
    assert capsys.readouterr().out == f"\n[b]2+2[/b]\n{shown}[red]4\n"


@pytest.mark.parametrize(
    ("body", "reason"),
    [({"json": {"error": {"message": "no room"}}}, "no room"), ({"text": "<html>"}, "Service Unavailable")],
)
def test_an_answer_that_is_an_error_says_the_server_s_reason(monkeypatch, body, reason):
    monkeypatch.delenv(cli.API_KEY_ENV, raising=False)
    monkeypatch.setattr(httpx, "post", lambda url, **request: answer(503, **body))
    with pytest.raises(RuntimeError, match=f"^the endpoint answered with status 503: {reason}$"):
        cli._show_answer("http://here", "hello")
