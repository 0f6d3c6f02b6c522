import json
import threading
import time

import pytest
import torch
from peft import PeftModel
from tiny_run import make_adapter

from gradientspace_ray.engine.slots import AdapterFiles, Slots, read_adapter
from gradientspace_ray.models.loading import ModelError, load_base

TOLERANCE = 1e-4  # float32: the same sums in another order


@pytest.fixture(scope="module")
def adapters(tiny_model_dir, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return [
        make_adapter(tiny_model_dir, root / "plain", 1),
        make_adapter(tiny_model_dir, root / "small-rank", 2, r=2, lora_alpha=3),
        make_adapter(tiny_model_dir, root / "few-layers", 3, target_modules=["q_proj", "down_proj"]),
        make_adapter(
            tiny_model_dir,
            root / "patterns",
            4,
            use_rslora=True,
            rank_pattern={"q_proj": 3},
            alpha_pattern={"layers.1.self_attn.v_proj": 20},
        ),
    ]


@pytest.fixture
def model(tiny_model_dir):
    return load_base(str(tiny_model_dir))


def token_ids(rows, tokens=7):
    return torch.randint(0, 250, (rows, tokens), generator=torch.Generator().manual_seed(rows))


@torch.no_grad()
def peft_logits(model_dir, adapter, input_ids):
    model = load_base(str(model_dir))
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter.folder).eval()
    return model(input_ids).logits


@torch.no_grad()
def test_every_adapter_gives_peft_s_logits(tiny_model_dir, model, adapters):
    slots = Slots.like(model, adapters[0].folder, capacity=2)  # fewer slots than adapters: contents are replaced
    input_ids = token_ids(2)
    base = peft_logits(tiny_model_dir, None, input_ids)
    for adapter in [*adapters, None, adapters[0]]:
        with slots.lease(adapter) as index, slots.rows([index, index]):
            logits = model(input_ids).logits
        expected = peft_logits(tiny_model_dir, adapter, input_ids)
        torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)
        assert adapter is None or (expected - base).abs().max() > 100 * TOLERANCE
    torch.testing.assert_close(model(input_ids).logits, base, atol=0, rtol=0)


@torch.no_grad()
def test_bfloat16_weights_are_as_near_to_float32_as_peft_s(tiny_model_dir, adapters):
    model = load_base(str(tiny_model_dir), "bfloat16")
    slots = Slots.like(model, adapters[0].folder, capacity=1)
    input_ids = token_ids(2)
    exact = peft_logits(tiny_model_dir, adapters[0], input_ids)
    peft = PeftModel.from_pretrained(load_base(str(tiny_model_dir), "bfloat16"), adapters[0].folder).eval()
    with slots.lease(adapters[0]) as index, slots.rows([index, index]):
        distance = (model(input_ids).logits.float() - exact).norm()
    assert distance <= 1.5 * (peft(input_ids).logits.float() - exact).norm()
    assert distance < 0.1 * (exact - peft_logits(tiny_model_dir, None, input_ids)).norm()


@torch.no_grad()
def test_rows_of_one_batch_use_different_adapters(tiny_model_dir, model, adapters):
    slots = Slots.like(model, adapters[0].folder, capacity=4)
    leases = [slots.acquire(adapter) for adapter in (*adapters, None, adapters[1])]
    for lease in leases:
        slots.load(lease)
    input_ids = token_ids(len(leases))
    with slots.rows([lease.index for lease in leases]):
        logits = model(input_ids).logits
    for row, lease in enumerate(leases):
        expected = peft_logits(tiny_model_dir, lease.adapter, input_ids[row : row + 1])
        torch.testing.assert_close(logits[row : row + 1], expected, atol=TOLERANCE, rtol=0)


def test_the_least_recently_used_free_slot_is_taken_and_never_one_in_use(model, adapters):
    slots = Slots.like(model, adapters[0].folder, capacity=2)
    first, second, third, fourth = adapters
    held = slots.acquire(first)
    slots.load(held)
    with slots.lease(second):
        assert slots.acquire(third) is None
        again = slots.acquire(first)
        assert again.index == held.index
        slots.release(again)
    with slots.lease(third):
        assert set(slots.leases()) == {first.id, third.id}
    slots.release(held)
    with slots.lease(fourth):  # `third` was used after `first` had been acquired
        assert set(slots.leases()) == {third.id, fourth.id}
    assert slots.leases() == {third.id: 0, fourth.id: 0}


def test_a_full_pool_waits_for_a_lease_to_end(model, adapters):
    slots = Slots.like(model, adapters[0].folder, capacity=1)
    order = []

    def second():
        with slots.lease(adapters[1], timeout_s=30):
            order.append("second in")

    with slots.lease(adapters[0]):
        with pytest.raises(TimeoutError, match="stayed in use"), slots.lease(adapters[1], timeout_s=0.01):
            pass
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.05)
        order.append("first out")
    thread.join(timeout=30)
    assert order == ["first out", "second in"]


@torch.no_grad()
def test_a_late_load_of_an_ended_lease_does_not_pass_for_the_new_adapter(tiny_model_dir, model, adapters):
    """A cancelled request's step may still load after its slot went to another adapter."""
    slots = Slots.like(model, adapters[0].folder, capacity=1)
    stale = slots.acquire(adapters[0])
    slots.release(stale)
    lease = slots.acquire(adapters[1])
    slots.load(stale)
    slots.load(lease)
    input_ids = token_ids(1)
    with slots.rows([lease.index]):
        logits = model(input_ids).logits
    expected = peft_logits(tiny_model_dir, adapters[1], input_ids)
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


def test_an_adapter_that_cannot_be_loaded_leaves_its_slot_free(model, adapters, tmp_path):
    slots = Slots.like(model, adapters[0].folder, capacity=1)
    with (
        pytest.raises(ModelError, match="not a PEFT adapter"),
        slots.lease(AdapterFiles("missing@0", tmp_path / "missing")),
    ):
        pass
    assert slots.leases() == {}
    with slots.lease(adapters[0], timeout_s=1):
        assert slots.leases() == {adapters[0].id: 1}


def test_what_fails_verification_is_not_loaded_and_leaves_its_slot_free(tiny_model_dir, model, adapters):
    def verify(adapter):
        if adapter.id == adapters[1].id:
            raise RuntimeError("other weights")

    slots = Slots.like(model, adapters[0].folder, capacity=1, verify=verify)
    with pytest.raises(RuntimeError, match="other weights"), slots.lease(adapters[1]):
        pass
    assert slots.leases() == {}
    with slots.lease(adapters[0], timeout_s=1):
        assert slots.leases() == {adapters[0].id: 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora cannot be served"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save cannot be served"),
        ({"bias": "all"}, "bias all cannot be served"),
        ({"peft_type": "IA3"}, "peft_type IA3"),
    ],
)
def test_what_slots_do_not_compute_is_refused_by_name(adapters, tmp_path, change, message):
    source = adapters[0].folder
    config = json.loads((source / "adapter_config.json").read_text()) | change
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes((source / "adapter_model.safetensors").read_bytes())
    with pytest.raises(ModelError, match=message):
        read_adapter(tmp_path)


@pytest.mark.parametrize("config", [b"[]", b"{", b"null", b"\xff"])
def test_a_damaged_configuration_is_one_line(adapters, tmp_path, config):
    (tmp_path / "adapter_config.json").write_bytes(config)
    weights = (adapters[0].folder / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(weights)
    with pytest.raises(ModelError, match=r"^.*: not a PEFT adapter \(.+\)$") as caught:
        read_adapter(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_adapter_of_another_shape_is_refused(tiny_model_dir, model, adapters, tmp_path):
    slots = Slots.like(model, adapters[2].folder, capacity=1)
    with pytest.raises(ModelError, match="which these slots do not hold"), slots.lease(adapters[0]):
        pass
    large = make_adapter(tiny_model_dir, tmp_path / "large", 5, r=8, target_modules=["q_proj", "down_proj"])
    with pytest.raises(ModelError, match="LoRA rank 8, these slots hold 4"), slots.lease(large):
        pass
    with pytest.raises(ModelError, match="no linear layer of that name"):
        Slots(model, ["model.layers.9.mlp.up_proj"], 4, 1)
