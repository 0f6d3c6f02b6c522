import shutil
import threading
import time

import pytest
import torch
from tiny_run import make_adapter

from gradientspace_ray.engine import adapters as module
from gradientspace_ray.engine.adapters import AdapterFiles, HostCache, read_adapter
from gradientspace_ray.models.loading import ModelError


@pytest.fixture(scope="module")
def folder(tiny_model_dir, tmp_path_factory):
    return make_adapter(tiny_model_dir, tmp_path_factory.mktemp("host") / "adapter", 1).folder


def test_the_least_recently_used_adapter_goes_first(folder):
    host = HostCache(capacity=2)
    adapters = [AdapterFiles(f"{name}@0", folder) for name in "abc"]
    first = host.get(adapters[0])
    host.get(adapters[1])
    assert host.get(adapters[0]) is first
    host.get(adapters[2])
    assert host.held() == ["a@0", "c@0"]


def test_what_fails_is_not_held_and_read_again(folder, tmp_path):
    refused = ["b@0"]

    def verify(adapter):
        if adapter.id in refused:
            raise RuntimeError("other weights")

    host = HostCache(verify=verify)
    with pytest.raises(ModelError, match="not a PEFT adapter"):
        host.get(AdapterFiles("a@0", tmp_path))
    with pytest.raises(RuntimeError, match="other weights"):
        host.get(AdapterFiles("b@0", folder))
    assert host.held() == []
    refused.clear()
    assert host.get(AdapterFiles("b@0", folder)).keys() == read_adapter(folder).keys()
    assert host.held() == ["b@0"]


def test_what_is_held_stays_when_the_file_is_overwritten_in_place(folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "adapter")
    held = HostCache().get(AdapterFiles("a@0", copied))
    weights = copied / "adapter_model.safetensors"
    with weights.open("r+b") as file:
        file.write(bytes(weights.stat().st_size))
    for name, matrices in read_adapter(folder).items():
        assert all(map(torch.equal, held[name], matrices))


def test_one_adapter_is_read_once_and_others_meanwhile(folder, monkeypatch):
    """Two threads want `a`, whose reading waits until `b` has been read."""
    reads, other_read = [], threading.Event()

    def read_slowly(path):
        reads.append(path.name)
        if path.name == "a":
            assert other_read.wait(30)
        return read_adapter(folder)

    monkeypatch.setattr(module, "read_adapter", read_slowly)
    host = HostCache()
    slow = AdapterFiles("a@0", folder.parent / "a")
    results = []
    threads = [threading.Thread(target=lambda: results.append(host.get(slow))) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    host.get(AdapterFiles("b@0", folder.parent / "b"))
    other_read.set()
    for thread in threads:
        thread.join(30)
    assert sorted(reads) == ["a", "b"]
    assert results[0] is results[1]
