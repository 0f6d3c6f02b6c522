import pytest

from gradientspace_ray.registry import (
    Adapter,
    Registry,
    UnknownModelError,
    adapter_digest,
    read_registry,
    write_registry,
)
from gradientspace_ray.run import RunDirectory


def make_registry():
    def adapter(name, digest):
        return Adapter(name=name, digest=digest, folder=name)

    return Registry(
        base_model="some/model",
        max_tokens=512,
        generalist=adapter("generalist", "g1"),
        experts=(adapter("story-door", "s1"), adapter("sum-total", "t1")),
        router_digest="r1",
    )


def test_a_registry_comes_back_from_the_run_directory(tmp_path):
    run = RunDirectory(tmp_path)
    write_registry(run, make_registry())
    assert read_registry(run) == make_registry()


def test_names_resolve_to_adapters():
    registry = make_registry()
    assert registry.resolve("base") is None
    assert registry.resolve("story-door").digest == "s1"
    assert registry.resolve("story-door@s1").name == "story-door"
    assert registry.model_ids() == ["auto", "base", "generalist", "story-door", "sum-total"]
    for unknown in ("story-door@old", "other", ""):
        with pytest.raises(UnknownModelError):
            registry.resolve(unknown)


def test_the_digest_follows_the_adapter_s_content(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
        (tmp_path / name / "adapter_model.safetensors").write_bytes(b"same" if name != "c" else b"other")
    digests = [adapter_digest(tmp_path / name) for name in ("a", "b", "c")]
    assert digests[0] == digests[1] != digests[2]
    assert len(digests[0]) == 12
