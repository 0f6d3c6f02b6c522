import json

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_run import make_adapter, make_run

from gradientspace_ray.engine.slots import read_adapter
from gradientspace_ray.registry import (
    Adapter,
    LayerShape,
    Registry,
    UnknownModelError,
    adapter_digest,
    adapter_layers,
    committed_digest,
    file_problems,
    misfits,
    name_problems,
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


def test_a_run_s_own_files_have_no_problems(tmp_path, tiny_model_dir, tiny_encoder_dir):
    registry = read_registry(make_run(tmp_path, tiny_model_dir, tiny_encoder_dir))
    assert name_problems(registry) == file_problems(registry, tmp_path) == []
    assert misfits(registry, tmp_path, adapter_layers(tmp_path / "generalist")) == []


@pytest.mark.parametrize("changes", [{}, {"rank_pattern": {"q_proj": 2}}, {"target_modules": "model.*(q|v)_proj"}])
def test_an_adapter_s_layers_are_those_that_serving_loads(tmp_path, tiny_model_dir, changes):
    make_adapter(tiny_model_dir, tmp_path, 0, **changes)
    shapes = {
        f"base_model.model.{name}": LayerShape(a_RI.shape[0], a_RI.shape[1], b_OR.shape[0])
        for name, (a_RI, b_OR) in read_adapter(tmp_path).items()
    }
    assert adapter_layers(tmp_path) == shapes
    assert {shape.lora_rank for shape in shapes.values()} == ({2, 4} if "rank_pattern" in changes else {4})


def write_adapter(folder, **layers):
    """An adapter without weights to speak of: layer -> (lora_rank, in_features, out_features)."""
    folder.mkdir()
    tensors = {}
    for name, (lora_rank, in_features, out_features) in layers.items():
        tensors[f"{name}.lora_A.weight"] = np.zeros((lora_rank, in_features), np.float16)
        tensors[f"{name}.lora_B.weight"] = np.zeros((out_features, lora_rank), np.float16)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "target_modules": list(layers), "rank_pattern": {"q": 1}}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("layers", "problem"),
    [
        ({"q": (2, 8, 4)}, None),
        ({"v": (3, 8, 8), "q": (1, 8, 4)}, None),
        ({"q": (4, 8, 4)}, "has LoRA rank 4, the endpoint's slots 3"),
        ({"q": (2, 6, 4)}, "made for another base model: q is 6 -> 4, not 8 -> 4"),
        ({"q": (2, 8, 4), "k": (2, 8, 4)}, "changes k, which the adapters of this endpoint do not"),
    ],
)
def test_adapters_fit_the_slots_of_others_like_them(tmp_path, layers, problem):
    write_adapter(tmp_path / "served", q=(2, 8, 4), v=(3, 8, 8))
    write_adapter(tmp_path / "generalist", **layers)
    registry = make_registry().model_copy(update={"experts": ()})
    found = misfits(registry, tmp_path, adapter_layers(tmp_path / "served"))
    assert found == ([] if problem is None else [f"generalist: {problem}"])


def test_all_problems_of_a_registry_are_told_at_once():
    registry = make_registry()
    bad = registry.experts[0].model_copy(update={"name": "auto", "folder": "../other"})
    assert name_problems(registry.model_copy(update={"experts": (bad, bad), "generalist": bad})) == [
        "the generalist is called 'auto'; call it generalist",
        *["'auto' is no name for an adapter: taken already, or not made of [A-Za-z0-9._-]+"] * 3,
        *["'../other' is no folder inside the run directory"] * 3,
    ]
    assert name_problems(registry.model_copy(update={"experts": ()})) == ["there is no expert; finish the run"]
    assert name_problems(registry.model_copy(update={"router": "/router"})) == [
        "'/router' is no folder inside the run directory"
    ]
