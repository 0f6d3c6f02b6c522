"""Adam's moments on disk: a round trip to the byte, and one line about every file that cannot be used."""

import json

import pytest
import torch
from reference_training import assert_moments_are, random_examples, tiny_adapted_model
from safetensors.torch import load_file, save_file

from gradientspace_ray.gradients.per_sample import PerSampleGradients
from gradientspace_ray.gradients.preconditioner import Preconditioner
from gradientspace_ray.models.attention import SEGMENTED
from gradientspace_ray.models.moments import MOMENTS_FILE, AdamMoments, MomentsError, load_moments, save_moments
from gradientspace_ray.registry import adapter_digest
from gradientspace_ray.training.checkpoints import TrainingRecord, save
from gradientspace_ray.training.engine import PlainEngine
from gradientspace_ray.training.loop import train

NAMES = ("layers.0.q_proj.lora_A.weight", "layers.0.q_proj.lora_B.weight", "layers.1.q_proj.lora_A.weight")
SETTINGS = {"step": 7, "betas": [0.9, 0.999], "eps": 1e-8}
AGAIN = "run the warmup stage again: gradientspace run ... --again warmup"


def random_moments(names=NAMES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    first, second = ({name: torch.randn(3, 5, generator=generator) for name in names} for _ in range(2))
    return AdamMoments(first, {name: v.square() for name, v in second.items()}, 7, (0.9, 0.95), 1e-7)


@pytest.fixture(scope="module")
def trained():
    """A model and its engine after three steps."""
    model = tiny_adapted_model()
    model.set_attn_implementation(SEGMENTED)
    engine = PlainEngine(model)
    steps = [[0, 1], [2, 3], [4, 5]]
    list(train(engine, random_examples(6), steps, peak=1e-2, warmup_share=0, tokens_per_batch=200))
    return model, engine


def test_moments_come_back_as_they_were(tmp_path):
    moments = random_moments()
    save_moments(moments, tmp_path / "adapter")
    again = load_moments(tmp_path / "adapter")
    for part in ("first", "second"):
        assert getattr(again, part).keys() == set(NAMES)
        assert all(torch.equal(getattr(again, part)[name], getattr(moments, part)[name]) for name in NAMES)
    assert (again.step, again.betas, again.eps) == (7, (0.9, 0.95), 1e-7)
    assert set(load_file(tmp_path / "adapter" / MOMENTS_FILE)) == {
        f"{p}.{n}" for p in ("first", "second") for n in NAMES
    }


def test_equal_moments_give_equal_bytes(tmp_path):
    contents = set()
    for attempt, names in enumerate((NAMES, NAMES[::-1], NAMES, NAMES)):
        moments = random_moments()
        first, second = ({name: part[name] for name in names} for part in (moments.first, moments.second))
        save_moments(AdamMoments(first, second, 7, (0.9, 0.95), 1e-7), tmp_path / str(attempt))
        contents.add((tmp_path / str(attempt) / MOMENTS_FILE).read_bytes())
    assert len(contents) == 1


def test_moments_are_the_optimizers_under_the_names_of_the_gradients_columns(trained):
    model, engine = trained
    moments = engine.moments()
    assert_moments_are(moments, model, engine.optimizer)
    assert moments.step == 3
    columns = PerSampleGradients(model).columns
    assert set(moments.first) == {name for name, _, _ in columns}
    Preconditioner("adam", moments, columns)


def test_moments_beside_an_adapter_leave_its_digest_alone(trained, tmp_path):
    model, engine = trained
    made = {"key": "0", "name": "x", "examples": 1, "tokens": 1, "steps": 3, "seconds": 0, "workers": 1}
    record = TrainingRecord(**made, zero_stage=0, losses=[1.0])
    save(model, engine.weights(), record, tmp_path / "without")
    save(model, engine.weights(), record, tmp_path / "with", engine.moments())
    assert not (tmp_path / "without" / MOMENTS_FILE).exists()
    assert load_moments(tmp_path / "with").step == 3
    assert adapter_digest(tmp_path / "with") == adapter_digest(tmp_path / "without")


def test_missing_moments_name_the_file_and_the_stage_to_run(tmp_path):
    with pytest.raises(MomentsError) as error:
        load_moments(tmp_path)
    path = tmp_path / MOMENTS_FILE
    assert str(error.value) == f"{path} is missing, which gradients are scaled by and experts begin with; {AGAIN}"


@pytest.mark.parametrize(
    ("prefixes", "settings", "reason"),
    [
        (("first.",), SETTINGS, "not two float32 moments of every weight"),
        (("first.", "second.", "third."), SETTINGS, "not two float32 moments of every weight"),
        (("first.", "second."), None, "Invalid JSON"),
        (("first.", "second."), {**SETTINGS, "step": -1}, "step: Input should be greater than or equal to 0"),
        (("first.", "second."), {**SETTINGS, "betas": [0.9, 1.0]}, "betas: 1: Input should be less than 1"),
        (("first.", "second."), {**SETTINGS, "eps": 0}, "eps: Input should be greater than 0"),
        (("first.", "second."), {**SETTINGS, "amsgrad": True}, "amsgrad: Extra inputs are not permitted"),
    ],
)
def test_a_file_of_another_kind_is_named_in_one_line(tmp_path, prefixes, settings, reason):
    tensors = {prefix + name: torch.ones(2, 2) for prefix in prefixes for name in NAMES}
    metadata = {"adam": json.dumps(settings)} if settings else None
    save_file(tensors, tmp_path / MOMENTS_FILE, metadata=metadata)
    with pytest.raises(MomentsError) as error:
        load_moments(tmp_path)
    message = str(error.value)
    assert message.startswith(f"{tmp_path / MOMENTS_FILE}: not ")
    assert message.endswith(AGAIN)
    assert reason in message
    assert "\n" not in message


@pytest.mark.parametrize("change", [{"dtype": torch.float16}, {"size": (2, 3)}])
def test_moments_of_another_type_or_shape_than_their_twins_are_refused(tmp_path, change):
    tensors = {prefix + name: torch.ones(2, 2) for prefix in ("first.", "second.") for name in NAMES}
    tensors["second." + NAMES[1]] = torch.ones(**{"size": (2, 2), **change})
    save_file(tensors, tmp_path / MOMENTS_FILE, metadata={"adam": json.dumps(SETTINGS)})
    with pytest.raises(MomentsError, match="not two float32 moments of every weight"):
        load_moments(tmp_path)


@pytest.mark.parametrize("share", [0, 0.01, 0.9])
def test_a_truncated_file_is_named_in_one_line(tmp_path, share):
    save_moments(random_moments(), tmp_path)
    data = (tmp_path / MOMENTS_FILE).read_bytes()
    (tmp_path / MOMENTS_FILE).write_bytes(data[: int(share * len(data))])
    with pytest.raises(MomentsError) as error:
        load_moments(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / MOMENTS_FILE}: not an optimizer's moments (")
    assert "\n" not in str(error.value)
