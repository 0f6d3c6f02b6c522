import pytest

from gradientspace_ray.registry import (
    Adapter,
    Registry,
    UnknownModelError,
    adapter_digest,
    committed_digest,
    read_registry,
    trained_experts,
    write_registry,
)
from gradientspace_ray.run import RunDirectory, RunError


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


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"base_model": ', "Invalid JSON: EOF while parsing"),
        (b'{"base_model": "some/model"}', "max_tokens: Field required, and 3 more"),
    ],
)
def test_a_damaged_registry_is_named_in_one_line(tmp_path, data, reason):
    run = RunDirectory(tmp_path)
    run.write_bytes("registry.json", data)
    with pytest.raises(RunError, match=reason) as error:
        read_registry(run)
    message = str(error.value)
    assert message.startswith(f"{tmp_path}/registry.json cannot be used (")
    assert message.endswith(f"; delete {tmp_path}/manifest.json and run again, what is finished is kept")
    assert "\n" not in message


def test_a_damaged_expert_is_named(tmp_path):
    run = RunDirectory(tmp_path)
    run.write_json("experts/a@1/training.json", {"name": "a", "cluster": 0, "examples": 3, "losses": [1.0]})
    assert trained_experts(run)[0].folder == "experts/a@1"
    run.write_json("experts/b@1/training.json", {"name": "b"})
    with pytest.raises(RunError, match=r"experts/b@1/training\.json cannot be used \(cluster: Field required"):
        trained_experts(run)


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


def test_the_digest_of_a_committed_adapter_is_read_anew(object_store):
    run, digests = RunDirectory(object_store()), []
    for weights in (b"one", b"two"):
        run.write_bytes("generalist/adapter_config.json", b"{}")
        run.write_bytes("generalist/adapter_model.safetensors", weights)
        digests.append(committed_digest(run, "generalist"))
        if len(digests) == 1:
            assert digests[0] == adapter_digest(run.fetch("generalist"))
    assert digests[0] != digests[1]
    run.delete("generalist/adapter_model.safetensors")
    with pytest.raises(RunError, match=r"adapter_model\.safetensors is missing"):
        committed_digest(run, "generalist")
