"""API keys, their limits and the admin's routes over HTTP."""

import contextlib
import time

import httpx
import openai
import pytest
from endpoints import assert_openai_error, serving, write_keys
from prometheus_client.parser import text_string_to_metric_families
from tiny_run import make_run

pytestmark = [pytest.mark.ray, pytest.mark.slow]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = {"model": "base", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
LONG = HELLO | {"max_tokens": 1500, "ignore_eos": True, "stream": True}
PER_MINUTE = 3
MAX_REQUESTS = 6
KEYS = {name: f"sk-of-{name}-0123456789" for name in ("alice", "slow", "single", "pair", "ops")}


def bearer(name):
    return {"authorization": f"Bearer {KEYS.get(name, name)}"}


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model_dir, tiny_encoder_dir):
    return make_run(tmp_path_factory.mktemp("keys") / "run", tiny_model_dir, tiny_encoder_dir)


def test_without_keys_an_endpoint_does_not_start_where_strangers_reach_it(ray_cluster, run):
    refused = "Ingress does not start: anyone who reaches 0.0.0.0 could use this endpoint"
    with pytest.raises(RuntimeError, match=refused), serving(run, host="0.0.0.0", start_attempts=1):
        pass


@pytest.fixture(scope="module")
def url(ray_cluster, run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    limits = {
        "alice": {},
        "slow": {"requests_per_minute": PER_MINUTE},
        "single": {"concurrent_requests": 1},
        "pair": {"concurrent_requests": 2},
    }
    clients = [{"name": name, "key": KEYS[name], **limit} for name, limit in limits.items()]
    file = write_keys(folder / "keys.yaml", keys=clients, admin=[{"name": "ops", "key": KEYS["ops"]}])
    with serving(run, keys_file=file, max_requests=MAX_REQUESTS) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    with httpx.Client(base_url=url, timeout=30) as client:
        yield client


def ask(client, name, **changes):
    return client.post(CHAT, json=HELLO | changes, headers=bearer(name))


@contextlib.contextmanager
def answers_under_way(client, name, number):
    """So many answers that are not read to their end; their places are given back when the block ends."""
    lines = []  # an iterator that goes away closes its answer
    with contextlib.ExitStack() as stack:
        for _ in range(number):
            answer = stack.enter_context(client.stream("POST", CHAT, json=LONG, headers=bearer(name)))
            assert answer.status_code == 200, answer.read()
            lines.append(answer.iter_lines())
            next(lines[-1])
        yield


def answered_again(client, name):
    """Asks until the places of answers that were left are free."""
    deadline = time.monotonic() + 10
    while (answer := ask(client, name)).status_code != 200:
        assert answer.status_code == 429, answer.text
        assert time.monotonic() < deadline, "a place is never given back"
        time.sleep(0.1)


WRONG = {
    "nothing": None,
    "nothing after the scheme": "Bearer",
    "another scheme": f"Basic {KEYS['alice']}",
    "no scheme": KEYS["alice"],
    "another key": "Bearer sk-of-nobody",
    "a part of a key": f"Bearer {KEYS['alice'][:-1]}",
    "a key and more": f"Bearer {KEYS['alice']}x",
    "another case": f"Bearer {KEYS['alice'].upper()}",
    "two keys": f"Bearer {KEYS['alice']} {KEYS['slow']}",
    "an admin's key": f"Bearer {KEYS['ops']}",
    "a name": "Bearer alice",
    "what is no ASCII": "Bearer \xe9",
}


@pytest.mark.parametrize("authorization", WRONG.values(), ids=WRONG.keys())
def test_nobody_without_a_clients_key_is_answered(client, authorization):
    headers = {} if authorization is None else {"authorization": authorization.encode("latin-1")}
    answers = [client.get(path, headers=headers) for path in ("/v1/models", "/v1/models/base", "/v1/models/nobody")]
    answers += [client.post(path, json=HELLO, headers=headers) for path in (CHAT, COMPLETIONS)]
    # The key comes first: a stranger's body is not even read.
    answers.append(client.post(CHAT, content=b"{", headers=headers))
    for answer in answers:
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        error = assert_openai_error(answer)
        assert (error["code"], error["type"]) == ("invalid_api_key", "invalid_request_error")
        assert not any(key in answer.text for key in KEYS.values())


@pytest.mark.parametrize("form", ["Bearer {}", "bearer {}", "BEARER   {}"])
def test_a_clients_key_is_taken_however_the_scheme_is_written(client, form):
    headers = {"authorization": form.format(KEYS["alice"])}
    assert client.get("/v1/models", headers=headers).status_code == 200
    assert client.post(CHAT, json=HELLO, headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/admin/releases"),
        ("POST", "/admin/releases"),
        ("POST", "/admin/promote"),
        ("POST", "/admin/rollback"),
        ("GET", "/metrics"),
    ],
)
@pytest.mark.parametrize("name", ["", "alice", "sk-of-nobody"])
def test_a_clients_key_opens_no_route_of_the_admin(client, method, path, name):
    answer = client.request(method, path, json={"run_dir": "/tmp"}, headers=bearer(name) if name else {})
    assert answer.status_code == 401
    assert assert_openai_error(answer)["code"] == "invalid_api_key"


@pytest.mark.parametrize("path", ["/", "/health", "/openapi.json"])
def test_what_needs_no_key(client, path):
    assert client.get(path).status_code == 200
    assert client.get(path, headers=bearer("sk-of-nobody")).status_code == 200


def test_an_admin_reads_and_changes_the_releases(client):
    state = client.get("/admin/releases", headers=bearer("ops"))
    assert state.status_code == 200
    assert state.json()["canary"] is None
    for path, status in (("/admin/promote", 400), ("/admin/rollback", 400)):
        answer = client.post(path, headers=bearer("ops"))
        assert answer.status_code == status, answer.text
        assert assert_openai_error(answer)["code"] == "release_refused"
    assert client.get("/admin/releases", headers=bearer("ops")).json() == state.json()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"[]", None),
        (b"{}", "run_dir"),
        (b'{"run_dir": 5}', "run_dir"),
        (b'{"run_dir": "/tmp", "canary_share": "x"}', "canary_share"),
        (b'{"run_dir": "/tmp", "unknown": 1}', "unknown"),
        (b'{"run_dir": "/no/such/run"}', None),
        (b'{"run_dir": "relative"}', None),
        (b'{"run_dir": "/tmp/\\u0000"}', None),
        (b'{"run_dir": ""}', None),
        (b'{"run_dir": "nope://bucket/run"}', None),
        (b'{"run_dir": "/tmp", "canary_share": 7}', None),
        (b'{"run_dir": "/tmp", "canary_share": -1}', None),
    ],
)
def test_a_release_that_cannot_be_is_the_askers_fault(client, body, param):
    headers = bearer("ops") | {"content-type": "application/json"}
    answer = client.post("/admin/releases", content=body, headers=headers)
    assert answer.status_code == 400, answer.text
    assert assert_openai_error(answer)["param"] == param


def test_a_key_has_its_requests_a_minute(client):
    begun = time.monotonic()
    assert [ask(client, "slow").status_code for _ in range(PER_MINUTE)] == [200] * PER_MINUTE
    for _ in range(3):
        refused = ask(client, "slow")
        assert refused.status_code == 429
        error = assert_openai_error(refused)
        assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded")
        assert str(PER_MINUTE) in error["message"]
        # The first of the three leaves the window a minute after it came.
        left_s = 60 - (time.monotonic() - begun)
        assert left_s - 1 <= int(refused.headers["retry-after-ms"]) / 1000 <= 60
        assert int(refused.headers["retry-after"]) == -(-int(refused.headers["retry-after-ms"]) // 1000)
    openai_client = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key=KEYS["slow"], max_retries=0)
    with pytest.raises(openai.RateLimitError, match="requests a minute") as caught:
        openai_client.chat.completions.create(**HELLO)
    assert 0 < float(caught.value.response.headers["retry-after"]) <= 60
    assert client.get("/v1/models", headers=bearer("slow")).status_code == 200, "looking up costs no request"
    assert ask(client, "alice").status_code == 200, "another key has limits of its own"


@pytest.mark.parametrize(("name", "limit"), [("single", 1), ("pair", 2)])
def test_a_key_has_so_many_requests_at_once(client, name, limit):
    with answers_under_way(client, name, limit):
        refused = ask(client, name)
        assert refused.status_code == 429
        error = assert_openai_error(refused)
        assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded")
        assert f"{limit} requests at once" in error["message"]
        assert int(refused.headers["retry-after"]) >= 1
        assert int(refused.headers["retry-after-ms"]) >= 1000
        assert ask(client, "alice").status_code == 200
    answered_again(client, name)


@pytest.mark.parametrize("change", [{"messages": []}, {"model": "nobody"}, {"temperature": 9}])
def test_a_request_that_fails_gives_its_place_back(client, change):
    for _ in range(3):
        assert ask(client, "single", **change).status_code in (400, 404)
    assert ask(client, "single").status_code == 200


def test_the_endpoint_takes_so_many_requests_at_once(client):
    with answers_under_way(client, "alice", MAX_REQUESTS):
        refused = ask(client, "alice")
        assert refused.status_code == 429
        assert "as many requests as it can" in assert_openai_error(refused)["message"]
        assert int(refused.headers["retry-after"]) >= 1
        assert client.get("/health").status_code == 200
    answered_again(client, "alice")


def test_an_admin_reads_metrics_that_name_no_key(client):
    """Ray collects them every ten seconds."""
    assert client.get("/v1/models").status_code == 401
    deadline = time.monotonic() + 30
    while True:
        text = client.get("/metrics", headers=bearer("ops")).raise_for_status().text
        families = {family.name: family for family in text_string_to_metric_families(text)}
        if rejected := families.get("ray_gradientspace_rejected"):
            break
        assert time.monotonic() < deadline, sorted(families)
        time.sleep(1)
    assert "auth" in {sample.labels["reason"] for sample in rejected.samples}
    assert not any(key in text for key in KEYS.values())
