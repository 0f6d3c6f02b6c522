"""`gradientspace release` against an HTTP server that holds to the endpoint's contract."""

import hmac
import json
import os
import socket
import subprocess
import sys
import threading
import time
from datetime import datetime
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from small_runs import make_small_run, publish_run

from gradientspace_ray import cli, release_client
from gradientspace_ray.release_client import EndpointError, parse_share
from gradientspace_ray.releases import ReleaseConflictError, ReleaseError, commit, load_or_begin, promote, roll_back

ADMIN_KEY = "the-admin-key"


def make_app(run, registry):
    """The admin routes as the ingress has them."""
    app = FastAPI()

    @app.middleware("http")
    async def check(request, call_next):
        key = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(key, ADMIN_KEY):
            return refused(401, "the admin key is missing or wrong")
        return await call_next(request)

    def refused(status, message):
        return JSONResponse({"error": {"message": message, "type": "x", "param": None, "code": None}}, status)

    @app.exception_handler(ReleaseError)
    async def explain(request, error):
        return refused(409 if isinstance(error, ReleaseConflictError) else 400, str(error))

    def state():
        return load_or_begin(run, registry)

    @app.get("/admin/releases")
    def status():
        return state().model_dump(mode="json")

    @app.post("/admin/releases")
    async def release(request: Request):
        body = await request.json()
        assert body.keys() == {"run_dir", "canary_share"}
        return publish_run(run, state(), body["run_dir"], body["canary_share"]).model_dump(mode="json")

    @app.post("/admin/promote")
    def all_to_canary():
        before = state()
        return commit(run, before, promote(before)).model_dump(mode="json")

    @app.post("/admin/rollback")
    def back():
        before = state()
        return commit(run, before, roll_back(before)).model_dump(mode="json")

    return app


@pytest.fixture
def served(tmp_path):
    return make_small_run(tmp_path / "served", 0)


@pytest.fixture
def endpoint(served):
    """Address of a server with the routes, on a port of its own."""
    server = uvicorn.Server(uvicorn.Config(make_app(*served), port=0, log_level="critical", ws="none"))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield "http://{}:{}".format(*listening.getsockname())
        server.should_exit = True
        thread.join()


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("GRADIENTSPACE_ADMIN_KEY", ADMIN_KEY)


@pytest.fixture
def release(capsys, monkeypatch):
    """Runs the command; returns exit code, rows of the table that it shows, and standard error."""
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(cli.console, "_width", 300)

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["gradientspace", "release", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        output, errors = capsys.readouterr()
        return caught.value.code or 0, [line.split() for line in output.splitlines()], errors

    return command


def test_a_release_goes_live_as_a_canary_and_is_taken_back(release, endpoint, key, served, tmp_path):
    run, registry = served
    make_small_run(tmp_path / "new", 1)
    code, rows, errors = release("--status", "--endpoint", endpoint)
    own = load_or_begin(run, registry).current.id
    assert (code, errors) == (0, "")
    assert rows == [
        ["release", "role", "run", "experts", "traffic", "published"],
        [own, "current", run.uri, "2", "100%", "at", "the", "endpoint's", "start"],
    ]
    code, rows, _ = release(tmp_path / "new", "--canary", "10%", "--endpoint", endpoint)
    new = load_or_begin(run, registry).canary.id
    assert code == 0
    assert [row[:5] for row in rows[1:]] == [
        [own, "current", run.uri, "2", "90%"],
        [new, "canary", str(tmp_path / "new"), "2", "10%"],
    ]
    assert abs(datetime.fromisoformat(" ".join(rows[2][5:])).timestamp() - time.time()) < 60

    def roles(*arguments):
        code, rows, errors = release(*arguments, "--endpoint", f"{endpoint}/v1/")
        assert (code, errors) == (0, "")
        return [(row[0], row[1], row[4]) for row in rows[1:]]

    assert roles("--promote") == [(new, "current", "100%"), (own, "previous", "0%")]
    assert roles("--rollback") == [(own, "current", "100%"), (new, "previous", "0%")]
    assert roles(tmp_path / "new", "--canary", "0.25") == [
        (own, "current", "75%"),
        (new, "canary", "25%"),
        (new, "previous", "0%"),
    ]
    assert roles("--rollback") == [(own, "current", "100%"), (new, "previous", "0%")]
    assert roles(tmp_path / "new") == [(new, "current", "100%"), (own, "previous", "0%")]


def test_a_local_run_directory_is_made_absolute(release, endpoint, key, tmp_path, monkeypatch):
    make_small_run(tmp_path / "new", 1)
    monkeypatch.chdir(tmp_path)
    code, rows, _ = release("new", "--endpoint", endpoint)
    assert (code, rows[1][2]) == (0, str(tmp_path / "new"))


def test_what_the_endpoint_refuses_is_its_own_line(release, endpoint, key, tmp_path):
    for arguments, reason in [
        (["--rollback"], "there is nothing to roll back to"),
        (["--promote"], "there is no canary to promote"),
        (
            [tmp_path / "[nothing]"],
            f"{tmp_path}/[nothing] holds no registry.json here; finish the run, and give its dir",
        ),
        ([tmp_path / "served"], "is current already"),
    ]:
        code, rows, errors = release(*arguments, "--endpoint", endpoint)
        assert (code, rows) == (1, [])
        assert errors.startswith(f"error: {endpoint} refused: ")
        assert reason in errors
        assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "give one of RUN_DIR, --promote, --rollback, --status"),
        (["a", "--promote"], "give one of RUN_DIR, --promote, --rollback, --status, not RUN_DIR and --promote"),
        (
            ["--status", "--rollback"],
            "give one of RUN_DIR, --promote, --rollback, --status, not --rollback and --status",
        ),
        (["--promote", "--canary", "10%"], "--canary goes with a RUN_DIR, not with --promote"),
        (["a", "--canary", "2"], "--canary 2: give a share such as 10% or 0.1, above 0 and at most 100%"),
        (["a", "--canary", "1"], "--canary 1: give 1% or 100%"),
        (
            ["--status", "--endpoint", "127.0.0.1:8000"],
            "--endpoint 127.0.0.1:8000: give an address such as http://127.0.0.1:8000",
        ),
        (
            ["--status", "--endpoint", "http://[::1:8000"],
            "--endpoint http://[::1:8000: give an address such as http://127.0.0.1:8000",
        ),
    ],
)
def test_options_that_make_no_sense_are_told_before_anything_is_asked(release, monkeypatch, arguments, line):
    assert release(*arguments) == (1, [], f"error: {line}\n")


@pytest.mark.parametrize(
    ("text", "share"),
    [("10%", 0.1), ("0.1", 0.1), (" 2.5 % ", 0.025), ("100%", 1.0), ("1.0", 1.0), ("1%", 0.01), ("1e-3", 0.001)],
)
def test_a_share_is_a_percentage_or_a_number(text, share):
    assert parse_share(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["", "%", "0", "0%", "-5%", "101%", "1.5", "nan", "inf", "ten", "10%%", "1"])
def test_what_is_no_share_is_refused(text):
    with pytest.raises(EndpointError, match="--canary"):
        parse_share(text)


def test_the_admin_key_is_asked_for(release, endpoint, monkeypatch):
    monkeypatch.delenv("GRADIENTSPACE_ADMIN_KEY", raising=False)
    mend = "set GRADIENTSPACE_ADMIN_KEY to its admin key"
    assert release("--status", "--endpoint", endpoint) == (1, [], f"error: {endpoint} asks for its admin key; {mend}\n")
    monkeypatch.setenv("GRADIENTSPACE_ADMIN_KEY", "another")
    mend = "the key in GRADIENTSPACE_ADMIN_KEY is another one"
    assert release("--status", "--endpoint", endpoint) == (1, [], f"error: {endpoint} asks for its admin key; {mend}\n")
    monkeypatch.setenv("GRADIENTSPACE_ADMIN_KEY", "schlüssel")
    line = "error: GRADIENTSPACE_ADMIN_KEY holds characters that no key has\n"
    assert release("--status", "--endpoint", endpoint) == (1, [], line)


def test_an_endpoint_that_does_not_answer_is_told(release):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = "http://{}:{}".format(*closed.getsockname())
        code, rows, errors = release("--status", "--endpoint", url)
    assert (code, rows) == (1, [])
    assert errors.startswith(f"error: {url} does not answer (")
    assert errors.endswith("; is the endpoint running there?\n")


@pytest.fixture
def other_server():
    """Answers every request with one status and body; `answer` sets them."""

    class Handler(BaseHTTPRequestHandler):
        status, body, pause_s = 200, b"", 0.0

        def do_GET(self):
            time.sleep(self.pause_s)
            self.send_response(self.status)
            self.send_header("content-length", str(len(self.body)))
            self.end_headers()
            self.wfile.write(self.body)

        def log_message(self, *arguments):
            """Says nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield Handler, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


PAGE, ERROR = b"<html>nginx</html>", json.dumps({"error": {"message": "GET /admin/releases: not found"}}).encode()


@pytest.mark.parametrize(
    ("status", "body", "line"),
    [
        (404, PAGE, "is no gradientspace endpoint (status 404, Not Found); give another --endpoint"),
        (404, ERROR, "is no gradientspace endpoint that takes releases (GET /admin/releases: not found); give another"),
        (502, PAGE, "is no gradientspace endpoint (status 502, Bad Gateway); give another --endpoint"),
        (302, PAGE, "is no gradientspace endpoint (status 302, Found); give another --endpoint"),
        (200, PAGE, "does not answer as a gradientspace endpoint of this version does"),
        (200, b'{"revision": 1}', "does not answer as a gradientspace endpoint of this version does"),
        (404, b'"error"', "is no gradientspace endpoint (status 404"),
        (404, b"\xff", "is no gradientspace endpoint (status 404"),
        (503, b'{"error": {"message": "no room"}}', "refused: no room"),
    ],
)
def test_what_is_no_such_endpoint_is_told(release, other_server, status, body, line):
    handler, url = other_server
    handler.status, handler.body = status, body
    code, rows, errors = release("--status", "--endpoint", url)
    assert (code, rows) == (1, [])
    assert errors.startswith(f"error: {url} {line}")
    assert errors.count("\n") == 1


def test_an_endpoint_that_takes_too_long_is_told(release, other_server, monkeypatch):
    monkeypatch.setattr(release_client, "ANSWER_TIMEOUT_S", 0.1)
    handler, url = other_server
    handler.pause_s = 0.5
    _, _, errors = release("--status", "--endpoint", url)
    assert errors == f"error: {url} has not answered for 0 s; see with --status what became of it\n"


def test_the_command_loads_neither_ray_nor_torch(tmp_path):
    code = (
        "import sys\nfrom gradientspace_ray import release_client\n"
        "assert not {'ray', 'torch', 'transformers', 'sklearn', 'deepspeed'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
