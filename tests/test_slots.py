import functools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from tiny_run import make_adapter

from gradientspace_ray.engine.adapters import AdapterFiles, read_adapter
from gradientspace_ray.engine.slots import Slots
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


def acquire(slots, adapter, **options):
    return slots.acquire(adapter, {} if adapter is None else read_adapter(adapter.folder), **options)


@torch.no_grad()
def test_every_adapter_gives_peft_s_logits(tiny_model_dir, model, adapters):
    slots = Slots.like(model, adapters[0].folder, capacity=2)  # fewer slots than adapters: contents are replaced
    input_ids = token_ids(2)
    base = peft_logits(tiny_model_dir, None, input_ids)
    for adapter in [*adapters, None, adapters[0]]:
        lease = acquire(slots, adapter)
        with slots.rows([lease.index] * 2):
            logits = model(input_ids).logits
        slots.release(lease)
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
    with slots.rows([acquire(slots, adapters[0]).index] * 2):
        distance = (model(input_ids).logits.float() - exact).norm()
    assert distance <= 1.5 * (peft(input_ids).logits.float() - exact).norm()
    assert distance < 0.1 * (exact - peft_logits(tiny_model_dir, None, input_ids)).norm()


@torch.no_grad()
@settings(max_examples=40)
@given(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=5), min_size=1, max_size=6), st.integers(0, 3))
def test_rows_of_one_batch_use_different_adapters(tiny_model_dir, adapters, batches, replaced):
    """Batches of changing size and order, and one slot whose adapter is replaced on the way."""
    model, slots = batch_model(tiny_model_dir, adapters)
    choices = [*adapters, None]
    for number, batch in enumerate(batches):
        if number == len(batches) // 2:
            lease = acquire(slots, AdapterFiles(f"again-{number}@0", choices[replaced].folder))
            slots.release(lease)
        leases = [acquire(slots, choices[choice]) for choice in batch]
        input_ids = token_ids(len(batch), tokens=2)
        with slots.rows([lease.index for lease in leases]):
            logits = model(input_ids).logits
        for lease in leases:
            slots.release(lease)
        expected = [
            expected_logits(tiny_model_dir, adapters, choice)(input_ids[row : row + 1])
            for row, choice in enumerate(batch)
        ]
        torch.testing.assert_close(logits, torch.cat(expected), atol=TOLERANCE, rtol=0)


@functools.cache
def _batch_model(model_dir, folder):
    model = load_base(str(model_dir))
    return model, Slots.like(model, folder, capacity=4)


def batch_model(model_dir, adapters):
    """One for all examples: what earlier ones left must not matter."""
    return _batch_model(model_dir, adapters[0].folder)


@functools.cache
def _peft_model(model_dir, folder):
    model = load_base(str(model_dir))
    return model if folder is None else PeftModel.from_pretrained(model, folder).eval()


def expected_logits(model_dir, adapters, choice):
    folder = adapters[choice].folder if choice < len(adapters) else None
    return lambda input_ids: _peft_model(model_dir, folder)(input_ids).logits


def test_the_least_recently_used_free_slot_is_taken_and_never_one_in_use(model, adapters):
    slots = Slots.like(model, adapters[0].folder, capacity=2)
    first, second, third, fourth = adapters
    held, other = acquire(slots, first), acquire(slots, second)
    assert acquire(slots, third) is None
    again = acquire(slots, first)
    assert again.index == held.index
    slots.release(again)
    slots.release(other)
    other = acquire(slots, third)
    assert slots.leases() == {first.id: 1, third.id: 1}
    slots.release(held)
    slots.release(other)
    other = acquire(slots, fourth)  # `third` was used after `first` had been acquired
    assert slots.leases() == {third.id: 0, fourth.id: 1}
    slots.release(other)
    statistics = slots.statistics()
    assert (statistics.loads, statistics.evictions) == (4, 2)
    assert statistics.load_s > 0


def test_only_an_unused_slot_is_taken_where_that_is_asked_for(model, adapters):
    slots = Slots.like(model, adapters[0].folder, capacity=2)
    first, second, third, _ = adapters
    for adapter in (first, second):
        slots.release(acquire(slots, adapter, unused=True))
    assert acquire(slots, third, unused=True) is None
    assert acquire(slots, first, unused=True) is not None
    assert slots.leases() == {first.id: 1, second.id: 0}


def test_an_adapter_that_does_not_fit_leaves_the_slots_as_they_were(tiny_model_dir, model, adapters, tmp_path):
    slots = Slots.like(model, adapters[0].folder, capacity=1)
    slots.release(acquire(slots, adapters[0]))
    large = make_adapter(tiny_model_dir, tmp_path / "large", 5, r=8)
    with pytest.raises(ModelError, match="LoRA rank 8, these slots hold 4"):
        acquire(slots, large)
    assert slots.leases() == {adapters[0].id: 0}
    input_ids = token_ids(1)
    with torch.no_grad(), slots.rows([acquire(slots, adapters[0]).index]):
        logits = model(input_ids).logits
    assert slots.statistics().loads == 1
    torch.testing.assert_close(logits, peft_logits(tiny_model_dir, adapters[0], input_ids), atol=TOLERANCE, rtol=0)


def test_a_model_without_slots_says_so(model, adapters):
    with pytest.raises(ModelError, match="no slot for adapters"):
        acquire(Slots.like(model, adapters[0].folder, capacity=0), adapters[0])


def test_rows_that_a_layer_does_not_see_are_refused(model, adapters):
    """As the experts of a mixture see tokens: an adapter could reach another request's."""
    slots = Slots.like(model, adapters[0].folder, capacity=2)
    indices = [acquire(slots, adapter).index for adapter in adapters[:2]]
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    with slots.rows(indices), pytest.raises(ModelError, match="cannot be told apart"):
        layer(torch.zeros(2, layer.base.in_features))


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


def test_an_adapter_of_another_shape_is_refused(model, adapters):
    slots = Slots.like(model, adapters[2].folder, capacity=1)
    with pytest.raises(ModelError, match="which these slots do not hold"):
        acquire(slots, adapters[0])
    a_RI, b_OR = torch.zeros(4, 32), torch.zeros(64, 4)
    with pytest.raises(ModelError, match=r"made for another base model: .* is 32 -> 64 there"):
        slots.acquire(adapters[2], {"model.layers.0.self_attn.q_proj": (a_RI, b_OR)})
    with pytest.raises(ModelError, match="no linear layer of that name"):
        Slots(model, ["model.layers.9.mlp.up_proj"], 4, 1)
