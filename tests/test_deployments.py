"""What deployments refuse by themselves, without Serve: experts that cannot start, bodies that do not come."""

import asyncio
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fastapi import Request
from tiny_run import EXPERTS, make_run

from gradientspace_ray.engine.adapters import AdapterFiles
from gradientspace_ray.engine.contract import Sampling
from gradientspace_ray.models.loading import ModelError
from gradientspace_ray.registry import read_registry
from gradientspace_ray.releases import ReleaseConflictError, ReleaseError
from gradientspace_ray.serving import experts as module
from gradientspace_ray.serving.api_errors import ApiError
from gradientspace_ray.serving.arguments import ServeArguments
from gradientspace_ray.serving.experts import Experts, _compute_dtype, fetch
from gradientspace_ray.serving.ingress import Ingress, _explained, _read_body
from gradientspace_ray.serving.messages import Generation, Place, RunChangedError, Started

AGAIN = "; release the run again: gradientspace release RUN_DIR$"


@pytest.fixture(scope="module")
def made_run(tmp_path_factory, tiny_model_dir, tiny_encoder_dir):
    return make_run(tmp_path_factory.mktemp("deployments") / "run", tiny_model_dir, tiny_encoder_dir)


@pytest.fixture
def run(made_run, tmp_path):
    """A copy to change."""
    shutil.copytree(made_run.path(), tmp_path / "run")
    return type(made_run)(tmp_path / "run")


def start_experts(run, registry):
    return Experts(registry, ServeArguments(run_dir=run.uri, max_slots=2, max_tokens=8))


def test_a_base_model_that_is_not_there_is_named(run):
    registry = read_registry(run).model_copy(update={"base_model": "no/such-model"})
    with pytest.raises(ModelError, match=r"^no/such-model: the model cannot be loaded"):
        start_experts(run, registry)


@pytest.mark.parametrize("change", ["gone", "replaced"])
def test_a_run_with_another_generalist_is_refused(run, change):
    registry = read_registry(run)
    start_experts(run, registry)
    shutil.rmtree(run.path("generalist"))
    if change == "replaced":
        shutil.copytree(run.path(registry.resolve(EXPERTS[0]).folder), run.path("generalist"))
    with pytest.raises(RunChangedError, match=f"generalist no longer holds {registry.generalist.id}{AGAIN}"):
        start_experts(run, registry)


def test_a_store_that_hangs_keeps_only_those_waiting_who_need_it(run, monkeypatch):
    registry = read_registry(run)
    experts = start_experts(run, registry)
    adapter = registry.resolve(EXPERTS[0])
    place, reads, stored = Place(adapter.id, run.uri, adapter.folder), [], threading.Event()

    def fetch_slowly(place):
        reads.append(place)
        assert stored.wait(30)
        return fetch(place)

    monkeypatch.setattr(module, "fetch", fetch_slowly)
    prompt = Generation([{"role": "user", "content": "hi"}], Sampling(2, temperature=0.0, ignore_eos=True), None)

    async def ask():
        waiting = [asyncio.create_task(experts._held(place)) for _ in range(40)]
        items = [item async for item in experts.generate(prompt)]
        assert isinstance(items[0], Started)
        waiting[0].cancel()
        await asyncio.sleep(0)
        stored.set()
        return await asyncio.gather(*waiting[1:]), await experts._held(place)

    held, again = asyncio.run(ask())
    assert {*held, again} == {AdapterFiles(adapter.id, Path(run.path(adapter.folder)))}
    assert reads == [place]


def test_a_failed_read_is_tried_again(run):
    registry = read_registry(run)
    experts = start_experts(run, registry)
    adapter = registry.resolve(EXPERTS[0])
    place = Place(adapter.id, run.uri, adapter.folder)
    elsewhere = Path(run.path(adapter.folder)).rename(run.path("elsewhere"))

    async def ask():
        with pytest.raises(RunChangedError):
            await experts._held(place)
        elsewhere.rename(run.path(adapter.folder))
        return await experts._held(place)

    assert asyncio.run(ask()).id == adapter.id


TEAMS = """
import asyncio, os, sys, threading, time, torch
from gradientspace_ray.engine.contract import Sampling
from gradientspace_ray.models.loading import load_tokenizer
from gradientspace_ray.registry import read_registry
from gradientspace_ray.run import RunDirectory
from gradientspace_ray.serving.arguments import ServeArguments
from gradientspace_ray.serving.experts import Experts
from gradientspace_ray.serving.messages import Place

def others():
    return len(os.listdir("/proc/self/task")) - threading.active_count()

run = RunDirectory(sys.argv[1])
registry = read_registry(run)
# Tokenizers, and another pool of PyTorch's that has as many threads, are there before.
load_tokenizer(registry.base_model)
torch.set_num_threads(3)
before = others()
experts = Experts(registry, ServeArguments(run_dir=run.uri, max_slots=2, cpus_per_replica=2.5))

async def ask():
    adapter = registry.experts[0]
    files = await experts._held(Place(adapter.id, run.uri, adapter.folder))
    long = [5 + number % 50 for number in range(400)]
    async for _ in experts._engine.submit(long, Sampling(4, temperature=0.0, ignore_eos=True), files):
        pass

asyncio.run(ask())
deadline = time.monotonic() + 20
while others() != before + 2 and time.monotonic() < deadline:  # threads end a moment later
    time.sleep(0.05)
print(others() - before)
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or "OpenMP" not in torch.__config__.parallel_info(),
    reason="counts the threads of OpenMP's teams as Linux shows them",
)
def test_the_engine_s_thread_is_the_only_one_with_a_team(run):
    """See `engine.threads`: a second team, on whatever thread, would slow down each step."""
    counted = subprocess.run([sys.executable, "-c", TEAMS, run.path()], capture_output=True, text=True, check=True)
    assert counted.stdout.split() == ["2"]


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (ReleaseConflictError("changed meanwhile"), 409, "changed meanwhile"),
        (ReleaseError("releases.json is damaged"), 400, "releases.json is damaged"),
        (PermissionError(13, "Permission denied"), 500, "the served run directory cannot be read or written (Perm"),
    ],
)
def test_an_admin_hears_what_keeps_releases_from_being_read_or_changed(error, status, text):
    with pytest.raises(ApiError) as caught, _explained():
        raise error
    assert caught.value.status == status
    assert str(caught.value).startswith(text)


def test_a_health_check_waits_for_no_store():
    async def check():
        replica = SimpleNamespace(_rereading=None, _reread=lambda: asyncio.Event().wait())
        for _ in range(3):
            await asyncio.wait_for(Ingress.check_health(replica), 5)
        return len(asyncio.all_tasks()) - 1

    assert asyncio.run(check()) == 1


@pytest.mark.parametrize(
    ("device", "named", "expected"),
    [
        ("cpu", "bfloat16", torch.float32),
        ("cuda", "bfloat16", torch.bfloat16),
        ("cuda", "float32", torch.float32),
    ],
)
def test_products_are_bfloat16_only_on_a_gpu(run, device, named, expected):
    registry = read_registry(run).model_copy(update={"compute_dtype": named})
    assert _compute_dtype(registry, device) is expected


def test_a_body_that_does_not_come_ends_the_request():
    """Its place is one that others could have."""

    async def read(parts):
        async def receive():
            return parts.pop(0) if parts else await asyncio.Event().wait()

        request = Request({"type": "http", "headers": [(b"content-type", b"application/json")]}, receive)
        return await _read_body(request, 10, timeout_s=0.05)

    begun, ended = ({"type": "http.request", "body": b"{}", "more_body": more} for more in (True, False))
    assert asyncio.run(read([begun, ended])) == b"{}{}"
    with pytest.raises(ApiError, match=r"did not come within 0.05 s") as caught:
        asyncio.run(read([begun]))
    assert (caught.value.status, caught.value.code) == (408, "request_timeout")
