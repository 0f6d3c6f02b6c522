"""Real DeepSpeed engines of every ZeRO stage behind the loop: on one and two processes, and on a GPU if it is there."""

import json
import os
import socket
from contextlib import nullcontext
from functools import partial
from importlib import import_module

import numpy as np
import pytest
import torch
from reference_training import (
    adamw,
    assert_moments_are,
    flat_weights,
    plain_training,
    random_examples,
    small_adapted_model,
)

from gradientspace_ray.models.attention import SEGMENTED
from gradientspace_ray.models.checkpointing import activation_checkpointing
from gradientspace_ray.training.budget import TrainingSettings
from gradientspace_ray.training.engine import PlainEngine, TrainingError, set_weights
from gradientspace_ray.training.finetune import Data, PreemptedError, finetune
from gradientspace_ray.training.loop import ALONE, Worker
from gradientspace_ray.training.schedule import plan_steps
from gradientspace_ray.training.state import load_state, save_state

DATA = Data(random_examples(7), random_examples(3, seed=1))
SEED = [5, 2]
STEPS, STOP = 6, 3
# Of two workers one has nothing to do in the steps that have one example.
SETTINGS = TrainingSettings(
    epochs=1.5,
    learning_rate=1e-2,
    examples_per_step=2,
    weight_decay=0.01,
    max_grad_norm=0.5,
    evaluate_every=2,
    tokens_per_batch=60,
)
PARTED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
"""Under ZeRO 3 weights this small stay whole unless this says otherwise."""
SCARCE = {"zero_optimization": {**PARTED["zero_optimization"], "stage3_max_live_parameters": 20_000}}
"""As if the model were larger than what ZeRO 3 keeps of it at once."""
MODES = {
    "0": {"zero_stage": 0},
    "1": {"zero_stage": 1},
    "2": {"zero_stage": 2},
    "3": {"zero_stage": 3, "deepspeed": PARTED},
    "3-small": {"zero_stage": 3},
    "1-offload": {"zero_stage": 1, "offload": True},
    "2-offload": {"zero_stage": 2, "offload": True},
    "3-offload": {"zero_stage": 3, "offload": True, "deepspeed": PARTED},
    "3-scarce": {"zero_stage": 3, "deepspeed": SCARCE},
    "1-checkpointing": {"zero_stage": 1, "checkpointing": True},
    "3-checkpointing": {"zero_stage": 3, "checkpointing": True, "deepspeed": SCARCE},
    "2-bfloat16": {"zero_stage": 2},
    "3-bfloat16": {"zero_stage": 3, "deepspeed": PARTED},
}
NARROW = [name for name in MODES if "bfloat16" in name]
WIDE = [name for name in MODES if name not in NARROW]
MOVED = [name for name in WIDE if name.partition("-")[2] in ("", "offload")]
RESUMED = [*MOVED, "3-small"]


def segmented_model(state=None, dtype=torch.float32, device="cpu"):
    model = small_adapted_model().to(device)
    model.set_attn_implementation(SEGMENTED)
    for weight in model.parameters():
        weight.data = weight.data.to(torch.float32 if weight.requires_grad else dtype)
    if state:
        set_weights(model, state.weights)
    return model


def finetuned(
    engine, folder, *, section=SETTINGS, worker=ALONE, state=None, stop=None, is_first=True, observe=lambda: None
):
    """Train to the end, or save and leave after step `stop`; the first worker writes the state into `folder`.

    Returns:
        The length of the gradient, and what `observe` finds, after each step.
    """
    found = []
    try:
        outcome = finetune(
            engine,
            DATA,
            section,
            seed=SEED,
            worker=worker,
            state=state,
            on_step=lambda step, heldout: found.append((step.grad_norm, observe(), heldout)),
            save=partial(save_state, folder=folder) if is_first else None,
            must_leave=lambda step: step.number == stop,
        )
    except PreemptedError:
        return found
    if is_first:
        save_state(outcome.state, folder)
    return found


def numbers_of(weights):
    return sum(weight.numel() for weight in weights)


def _worker(rank, world_size, port, folder, jobs, device):
    """Go through `jobs`: (mode, folder to write, folder to resume from or None, step to stop after or None)."""
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    names |= {"DS_ACCELERATOR": device}
    os.environ.update({name: str(value) for name, value in names.items()})
    backend = "nccl" if device == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, rank=rank, world_size=world_size)
    module = import_module("gradientspace_ray.stages.deepspeed_engine")
    for mode, target, source, stop in jobs:
        state = load_state(folder / source) if source else None
        dtype = torch.bfloat16 if mode in NARROW else torch.float32
        model = segmented_model(state, dtype, device)
        frozen = [weight for weight in model.parameters() if not weight.requires_grad]
        section = SETTINGS.model_copy(update=MODES[mode])
        engine = module.DeepSpeedEngine(model, section, dtype, "experts")
        facts = {"trained": numbers_of(engine.weights().values())}
        with activation_checkpointing(model) if section.checkpointing else nullcontext():
            facts["found"] = finetuned(
                engine,
                folder / target,
                section=section,
                worker=Worker(rank, world_size),
                state=state,
                stop=stop,
                is_first=rank == 0,
                observe=partial(numbers_of, frozen),
            )
        facts |= {
            "zero_stage": engine.deepspeed.zero_optimization_stage(),
            "optimizer": type(engine.deepspeed.optimizer).__name__,
            "moments": [
                sum(part[key].numel() for part in engine.deepspeed.basic_optimizer.state.values())
                for key in ("exp_avg", "exp_avg_sq")
            ],
            "frozen_kept": numbers_of(getattr(weight, "ds_tensor", weight) for weight in frozen),
            "offload": [
                offload is not None and str(offload.device)
                for offload in (engine.deepspeed.zero_offload_optimizer(), engine.deepspeed.zero_offload_param())
            ],
            "training_mode": any(part.training for part in model.modules()),
        }
        every = [None] * world_size
        torch.distributed.all_gather_object(every, facts)
        if rank == 0:
            (folder / f"{target}.json").write_text(json.dumps(every))
    torch.distributed.barrier()
    _leave()


def _leave():
    """End this process with what it has written, without the destructors of so many groups, which may abort."""
    os._exit(0)


def spawn(world_size, folder, jobs, device="cpu"):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_worker, (world_size, port, folder, jobs, device), nprocs=world_size)


def plain_engine(dtype=torch.float32):
    return PlainEngine(segmented_model(dtype=dtype), dtype, SETTINGS.weight_decay, SETTINGS.max_grad_norm)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """States and facts of all modes: `<mode>@2` undisturbed, `<mode>@2-2` stopped and resumed, and so on."""
    folder = tmp_path_factory.mktemp("engines")
    found = finetuned(plain_engine(), folder / "plain")
    finetuned(plain_engine(torch.bfloat16), folder / "plain-bfloat16")
    finetuned(plain_engine(), folder / "plain-part", stop=STOP)
    pair = [(mode, f"{mode}@2", None, None) for mode in MODES]
    pair += [(mode, f"{mode}@2-part", None, STOP) for mode in RESUMED]
    pair += [(mode, f"{mode}@2-2", f"{mode}@2-part", None) for mode in RESUMED]
    pair += [(mode, f"{mode}@1-2", "plain-part", None) for mode in MOVED]
    spawn(2, folder, pair)
    spawn(1, folder, [(mode, f"{mode}@2-1", f"{mode}@2-part", None) for mode in MOVED])
    facts = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    states = {path.name: load_state(path) for path in folder.iterdir() if path.is_dir()}
    return states, facts, [norm for norm, *_ in found]


def parts_of(state):
    return [state.weights, state.best, state.moments.first, state.moments.second]


def assert_near(found, wanted, name):
    """Within 1e-5, and moments within a thousandth."""
    np.testing.assert_allclose(found.losses, wanted.losses, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(found.heldout, wanted.heldout, atol=1e-5, err_msg=name)
    assert (found.moments.step, found.best_step) == (wanted.moments.step, wanted.best_step)
    for place, (ours, theirs) in enumerate(zip(parts_of(found), parts_of(wanted), strict=True)):
        assert set(ours) == set(theirs)
        for weight, value in theirs.items():
            if place < 2:
                torch.testing.assert_close(ours[weight], value, atol=1e-5, rtol=0, msg=f"{name} {weight}")
            else:
                error = float((ours[weight] - value).norm() / value.norm())
                assert error < 1e-3, f"{name} {weight}"


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_the_stage_is_in_use_and_the_state_is_parted(trained, mode):
    _, facts, _ = trained
    zero_stage = MODES[mode]["zero_stage"]
    names = {0: "AdamW", 3: "DeepSpeedZeroOptimizer_Stage3"}
    weights = list(small_adapted_model().parameters())
    whole, frozen = (numbers_of(weight for weight in weights if weight.requires_grad is own) for own in (True, False))
    assert len(facts[f"{mode}@2"]) == 2
    for rank in facts[f"{mode}@2"]:
        assert rank["zero_stage"] == zero_stage
        assert rank["optimizer"] == names.get(zero_stage, "DeepSpeedZeroOptimizer")
        assert rank["trained"] == whole
        # What does not divide evenly is padded.
        assert rank["moments"] == pytest.approx([whole / 2 if zero_stage else whole] * 2, abs=8)
        assert rank["frozen_kept"] == pytest.approx(frozen / 2 if zero_stage == 3 else frozen, abs=8)
        here = {numbers for _, numbers, _ in rank["found"]}
        assert mode == "3-small" or here == {0 if zero_stage == 3 else frozen}
        offload = "cpu" if "offload" in mode else False
        assert rank["offload"] == [offload, offload if zero_stage == 3 else False]
        assert not rank["training_mode"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", WIDE)
def test_two_workers_give_what_a_plain_loop_gives(trained, mode):
    states, _, _ = trained
    model = small_adapted_model()
    optimizer = adamw(model, SETTINGS.weight_decay)
    lengths = [len(input_ids) for input_ids, _ in DATA.train]
    steps = plan_steps(len(lengths), SETTINGS.examples_per_step, SETTINGS.epochs, SEED, lengths)
    assert len(steps) == STEPS
    losses = plain_training(
        model,
        DATA.train,
        steps,
        peak=SETTINGS.learning_rate,
        warmup_share=SETTINGS.warmup_share,
        max_grad_norm=SETTINGS.max_grad_norm,
        optimizer=optimizer,
    )
    found = states[f"{mode}@2"]
    np.testing.assert_allclose(found.losses, losses, atol=1e-4)
    weights = {name.replace(".default.", "."): weight for name, weight in model.named_parameters()}
    ours = torch.cat([found.weights[name].flatten() for name in weights if name in found.weights])
    torch.testing.assert_close(ours, flat_weights(model), atol=1e-4, rtol=0)
    assert_moments_are(found.moments, model, optimizer, mode)


@pytest.mark.slow
@pytest.mark.parametrize("mode", WIDE)
def test_two_workers_give_what_the_plain_engine_gives(trained, mode):
    states, facts, norms = trained
    assert_near(states[f"{mode}@2"], states["plain"], mode)
    for rank in facts[f"{mode}@2"]:
        found = [norm for norm, *_ in rank["found"]]
        if mode == "0":
            assert found == [None] * STEPS
        else:
            np.testing.assert_allclose(found, norms, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("mode", NARROW)
def test_two_workers_in_bfloat16_give_what_the_plain_engine_gives(trained, mode):
    states, _, _ = trained
    found, wanted = states[f"{mode}@2"], states["plain-bfloat16"]
    np.testing.assert_allclose(found.losses, wanted.losses, rtol=5e-3)
    np.testing.assert_allclose(found.heldout, wanted.heldout, rtol=5e-3)
    assert wanted.losses != states["plain"].losses


@pytest.mark.slow
@pytest.mark.parametrize("mode", RESUMED)
def test_one_who_resumes_with_as_many_workers_ends_bit_for_bit_where_the_undisturbed_one_does(trained, mode):
    states, facts, _ = trained
    found, wanted, part = states[f"{mode}@2-2"], states[f"{mode}@2"], states[f"{mode}@2-part"]
    assert (part.step, part.moments.step, found.step) == (STOP, STOP, STEPS)
    assert (found.losses, found.heldout, found.best_step) == (wanted.losses, wanted.heldout, wanted.best_step)
    assert (found.moments.step, found.moments.betas) == (wanted.moments.step, wanted.moments.betas)
    for ours, theirs in zip(parts_of(found), parts_of(wanted), strict=True):
        assert set(ours) == set(theirs)
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    for rank, before in zip(facts[f"{mode}@2-2"], facts[f"{mode}@2"], strict=True):
        assert rank["moments"] == before["moments"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", MOVED)
@pytest.mark.parametrize("change", ["1-2", "2-1"])
def test_one_who_resumes_with_another_number_of_workers_ends_close_by(trained, mode, change):
    states, _, _ = trained
    assert_near(states[f"{mode}@{change}"], states["plain"], f"{mode}@{change}")


def _diverge(rank, messages):
    """What the loop says of an infinite gradient, by ZeRO stage."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    module = import_module("gradientspace_ray.stages.deepspeed_engine")

    class Exploding(module.DeepSpeedEngine):
        def backward(self, loss):
            super().backward(loss * float("inf"))

    for zero_stage in range(4):
        settings = SETTINGS.model_copy(update={"zero_stage": zero_stage})
        try:
            finetune(Exploding(segmented_model(), settings, torch.float32), DATA, settings, seed=SEED)
        except TrainingError as error:
            messages.put((zero_stage, str(error)))
        else:
            messages.put((zero_stage, "it went on"))
    _leave()


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_ends_a_finetune_under_every_stage():
    messages = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(_diverge, (messages,))
    found = dict(messages.get() for _ in range(4))
    # Without ZeRO, DeepSpeed does not say how long the gradient was; the weights, and the next loss, are not finite.
    assert found[0].startswith("the loss is nan at step 2 of 6 ")
    assert all(found[stage].startswith("the gradient is inf at step 1 of 6 ") for stage in (1, 2, 3))


@pytest.fixture(scope="module")
def trained_on_a_gpu(trained, tmp_path_factory):
    """States of all modes on one GPU, and of those resumed there that two processors began."""
    folder = tmp_path_factory.mktemp("gpu")
    for mode in MOVED:
        save_state(trained[0][f"{mode}@2-part"], folder / f"{mode}-part")
    jobs = [(mode, mode, None, None) for mode in MODES]
    spawn(1, folder, [*jobs, *((mode, f"{mode}-resumed", f"{mode}-part", None) for mode in MOVED)], "cuda")
    return {path.name: load_state(path) for path in folder.iterdir() if path.is_dir()}


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")
@pytest.mark.parametrize("name", [*MODES, *(f"{mode}-resumed" for mode in MOVED)])
def test_a_gpu_gives_what_the_plain_engine_gives(trained, trained_on_a_gpu, name):
    narrow = name in NARROW
    found, wanted = trained_on_a_gpu[name], trained[0]["plain-bfloat16" if narrow else "plain"]
    assert found.step == STEPS
    np.testing.assert_allclose(found.losses, wanted.losses, rtol=5e-3 if narrow else 1e-5)
    np.testing.assert_allclose(found.heldout, wanted.heldout, rtol=5e-3 if narrow else 1e-5)
