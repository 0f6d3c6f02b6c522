"""A checkpoint: it reads back bit for bit, holds the adapter and no more, and is refused when it is not whole."""

import math
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_training import random_examples, tiny_adapted_model
from safetensors.torch import load_file

from gradientspace_ray.models.loading import add_lora
from gradientspace_ray.models.moments import AdamMoments
from gradientspace_ray.registry import adapter_digest
from gradientspace_ray.training.budget import TrainingSettings
from gradientspace_ray.training.checkpoints import TrainingRecord, save
from gradientspace_ray.training.engine import PlainEngine, TrainingError, set_weights, trained_weights
from gradientspace_ray.training.finetune import Data, finetune
from gradientspace_ray.training.state import (
    STATE_FILE,
    TENSORS_FILE,
    CheckpointError,
    TrainingState,
    load_state,
    save_state,
)

SECTION = TrainingSettings(examples_per_step=4, learning_rate=1e-2)
RECORD = TrainingRecord(
    key="0", name="x", examples=1, tokens=1, steps=1, seconds=0, workers=1, zero_stage=0, losses=[1.0]
)


@pytest.fixture(scope="module")
def model():
    return tiny_adapted_model()


@pytest.fixture(scope="module")
def state(model):
    """After three real steps, with a held-out part."""
    data = Data(random_examples(12), random_examples(2, seed=1))
    return finetune(PlainEngine(model), data, SECTION, seed=[0]).state


def assert_equal_states(found, wanted):
    for name in ("losses", "heldout", "seconds", "step", "best_step"):
        assert getattr(found, name) == getattr(wanted, name), name
    pairs = [(found.weights, wanted.weights), (found.best or {}, wanted.best or {})]
    for ours, theirs in ((found.moments, wanted.moments), (found.best_moments, wanted.best_moments)):
        if theirs is None:
            assert ours is None
            continue
        assert (ours.step, ours.betas, ours.eps) == (theirs.step, theirs.betas, theirs.eps)
        pairs += [(ours.first, theirs.first), (ours.second, theirs.second)]
    for ours, theirs in pairs:
        assert set(ours) == set(theirs)
        for name, value in theirs.items():
            assert ours[name].dtype == value.dtype == torch.float32
            assert torch.equal(ours[name].view(torch.int32), value.view(torch.int32)), name


def kept(state):
    """What has best weights and their moments."""
    moments = state.moments
    first, second = ({name: value + 1 for name, value in part.items()} for part in (moments.first, moments.second))
    best = AdamMoments(first, second, moments.step - 1, moments.betas, moments.eps)
    return replace(state, best_moments=best)


def without_best(state):
    return TrainingState(state.losses, (), state.seconds, state.weights, state.moments, None)


def test_a_checkpoint_reads_back_bit_for_bit(state, tmp_path):
    save_state(state, tmp_path / "deep" / "a")
    assert_equal_states(load_state(tmp_path / "deep" / "a"), state)
    save_state(kept(state), tmp_path / "kept")
    assert_equal_states(load_state(tmp_path / "kept"), kept(state))
    save_state(without_best(state), tmp_path / "b")
    found = load_state(tmp_path / "b")
    assert_equal_states(found, without_best(state))
    assert (found.best, found.best_step) == (None, None)


def test_equal_states_give_equal_files(state, tmp_path):
    for name in ("a", "b"):
        save_state(state, tmp_path / name)
    # Of one that was read, too: its names come in another order.
    save_state(load_state(tmp_path / "a"), tmp_path / "c")
    for file in (STATE_FILE, TENSORS_FILE):
        assert len({(tmp_path / name / file).read_bytes() for name in "abc"}) == 1


def test_an_adapter_has_the_same_digest_whether_its_weights_came_from_a_checkpoint(model, state, tmp_path):
    save_state(state, tmp_path / "state")
    save(model, state.best, RECORD, tmp_path / "a")
    save(model, load_state(tmp_path / "state").best, RECORD, tmp_path / "b")
    assert adapter_digest(tmp_path / "a") == adapter_digest(tmp_path / "b")


numbers = st.floats(width=32, allow_nan=False)


@settings(max_examples=30)
@given(
    rows=st.lists(st.lists(numbers, min_size=3, max_size=3), min_size=1, max_size=4),
    losses=st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=5),
    heldout=st.lists(st.tuples(st.integers(0, 9), st.floats(allow_nan=False, allow_infinity=False)), max_size=3),
    seconds=st.floats(0, 1e9),
    step=st.integers(0, 2**31),
)
def test_any_numbers_read_back_bit_for_bit(rows, losses, heldout, seconds, step):
    weight = torch.tensor(rows, dtype=torch.float32)
    moments = AdamMoments({"x.weight": weight + 1}, {"x.weight": weight.T.clone().T}, step, (0.9, 0.95), 1e-8)
    wanted = TrainingState(
        tuple(losses), tuple(heldout), seconds, {"x.weight": weight}, moments, {"x.weight": weight * 2}
    )
    with tempfile.TemporaryDirectory() as folder:
        save_state(wanted, Path(folder))
        assert_equal_states(load_state(Path(folder)), wanted)


def test_a_checkpoint_holds_the_adapter_and_no_more(model, state, tmp_path):
    adapter = sum(weight.numel() for _, weight in trained_weights(model))
    whole = sum(weight.numel() for weight in model.parameters())
    for found, times, name in ((state, 4, "a"), (without_best(state), 3, "b")):
        save_state(found, tmp_path / name)
        size = sum(file.stat().st_size for file in (tmp_path / name).iterdir())
        header = 200 * times * len(state.weights)
        assert 4 * times * adapter <= size <= 4 * times * adapter + header + 2000
        assert all(".lora_" in key for key in load_file(tmp_path / name / TENSORS_FILE))
    assert whole > 5 * adapter, "a checkpoint with the base would be no larger"
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == [STATE_FILE, TENSORS_FILE]


@pytest.mark.parametrize("file", [STATE_FILE, TENSORS_FILE])
@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_file_that_was_cut_off_is_refused(state, tmp_path, file, share):
    save_state(state, tmp_path)
    data = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(data[: math.floor(len(data) * share)])
    with pytest.raises(CheckpointError) as caught:
        load_state(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", [0, 100, -1])
def test_a_changed_byte_is_found(state, tmp_path, place):
    save_state(state, tmp_path)
    data = bytearray((tmp_path / TENSORS_FILE).read_bytes())
    data[place] ^= 1
    (tmp_path / TENSORS_FILE).write_bytes(data)
    with pytest.raises(CheckpointError, match=r"state\.safetensors is damaged: its checksum is another"):
        load_state(tmp_path)


@pytest.mark.parametrize("missing", [(STATE_FILE,), (TENSORS_FILE,), (STATE_FILE, TENSORS_FILE)])
def test_a_missing_file_is_named(state, tmp_path, missing):
    save_state(state, tmp_path)
    for file in missing:
        (tmp_path / file).unlink()
    with pytest.raises(CheckpointError, match=rf"no whole checkpoint \(.*{missing[0]}"):
        load_state(tmp_path)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is no whole checkpoint"):
        load_state(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", "[]", "{}", "\xff", '{"losses": "many"}'])
def test_a_state_of_another_kind_is_refused(state, tmp_path, text):
    save_state(state, tmp_path)
    (tmp_path / STATE_FILE).write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match="is no whole checkpoint"):
        load_state(tmp_path)


def test_weights_are_set_bit_for_bit(state):
    other = tiny_adapted_model(seed=1)
    set_weights(other, state.weights)
    found = PlainEngine(other).weights()
    assert set(found) == set(state.weights)
    assert all(torch.equal(found[name], value) for name, value in state.weights.items())


@pytest.mark.parametrize("changes", [{"rank": 2}, {"target_modules": ("q_proj", "v_proj")}])
def test_a_checkpoint_of_another_adapter_is_refused_and_changes_nothing(state, changes):
    base = tiny_adapted_model().unload()
    other = add_lora(base, **{"rank": 4, "alpha": 8, "target_modules": "all-linear", "seed": 0, **changes})
    before = PlainEngine(other).weights()
    with pytest.raises(TrainingError, match="the checkpoint is of another adapter; delete the run's checkpoints/"):
        set_weights(other, state.weights)
    assert all(torch.equal(value, before[name]) for name, value in PlainEngine(other).weights().items())


def test_weights_beside_the_adapter_must_be_frozen():
    model = tiny_adapted_model()
    model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(TrainingError, match=r"embed_tokens.weight is trained, but is no weight of adapter 'default'"):
        PlainEngine(model)
