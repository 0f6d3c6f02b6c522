"""Memory of the per-sample gradients: what they take, how many tokens they take at once, and what if it runs out."""

from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
from peft import PeftModel
from test_per_sample import PATHS, VARIANTS, adapted, oracle, ragged, relative_error
from tiny_models import random_causal_lm, tiny_llama_config
from torch.profiler import ProfilerActivity, profile

from gradientspace_ray.examples.packing import Packed, pack
from gradientspace_ray.gradients import budget, per_sample
from gradientspace_ray.gradients.per_sample import PerSampleGradients
from gradientspace_ray.models import losses


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("tokens_per_batch", [200, "auto"])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_running_out_of_memory_halves_the_budget_and_loses_no_example(
    path: str,
    tokens_per_batch: int | str,
    where: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = adapted(**VARIANTS["plain"])
    examples = ragged([40, 3, 18, 25, 2, 31, 12, 9, 4])
    tried = []

    def label_nll(model_: PeftModel, packed: Packed, dtype: torch.dtype) -> torch.Tensor:
        tokens = sum(packed.lengths) if path == "packed" else len(packed.lengths) * max(packed.lengths)
        tried.append(tokens)
        nll_L = losses.label_nll(model_, packed, dtype)
        if tokens > 60 and where == "forward":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB")
        if tokens > 60:
            nll_L.register_hook(_raise_out_of_memory)
        return nll_L

    engine = PerSampleGradients(model, tokens_per_batch=tokens_per_batch, path=path)
    monkeypatch.setattr(per_sample, "label_nll", label_nll)
    gradients = engine.gradients(examples)
    assert max(tried) > 60
    assert "out of memory; going on with" in caplog.text
    assert relative_error(gradients, oracle(model, examples)) < 1e-5
    # What did not fit once is not tried again.
    tried.clear()
    engine.gradients(examples)
    assert max(tried) <= 60


def _raise_out_of_memory(gradient: torch.Tensor) -> None:
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory")


def test_one_example_that_does_not_fit_is_named_with_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(**VARIANTS["plain"])

    def label_nll(_model: PeftModel, packed: Packed, _dtype: torch.dtype) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB")

    monkeypatch.setattr(per_sample, "label_nll", label_nll)
    for checkpointing, mend in ((False, "set gradients.checkpointing"), (True, "lower data.max_tokens")):
        engine = PerSampleGradients(model, checkpointing=checkpointing)
        with pytest.raises(torch.OutOfMemoryError, match=rf"example 1: its 30 tokens .* 7 GiB\); {mend}"):
            engine.gradients(ragged([12, 30]))


def _peak_bytes(run: Callable[[], object]) -> int:
    """Most bytes of tensors at once beyond those that were there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    changes = [
        (event.start_ns(), event.nbytes())
        for event in recorded.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    return max(accumulate(size for _, size in sorted(changes)))


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dtype", "normalisation"), [(torch.float32, "none"), (torch.bfloat16, "module")])
def test_memory_is_the_ordinary_passes_and_the_result(
    compute_dtype: torch.dtype, dtype: torch.dtype, normalisation: str
) -> None:
    config = tiny_llama_config(hidden_size=128, intermediate_size=256, num_hidden_layers=4, vocab_size=4096)
    model = adapted(random_causal_lm(config), r=8, lora_alpha=8)
    examples = ragged([40] * 12)
    options = {"dtype": dtype, "normalisation": normalisation, "compute_dtype": compute_dtype}
    engine = PerSampleGradients(model, tokens_per_batch=480, **options)

    def ordinary() -> None:
        packed = pack(examples)
        nll_L = losses.label_nll(model, packed, compute_dtype)
        losses.example_nll(nll_L, packed.label_examples, len(examples)).sum().backward()
        for parameter in model.parameters():
            parameter.grad = None

    result_bytes = len(examples) * engine.dimension * dtype.itemsize
    for run in (ordinary, lambda: engine.gradients(examples)):
        run()
    assert _peak_bytes(lambda: engine.gradients(examples)) - _peak_bytes(ordinary) <= 1.1 * result_bytes


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_automatic_budget_is_what_free_memory_holds(checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(**VARIANTS["plain"])
    examples = ragged([40] * 6)
    free = 2_000_000
    monkeypatch.setattr(budget, "free_bytes", lambda _device: free)
    engine = PerSampleGradients(model, checkpointing=checkpointing)
    gradients = engine.gradients(examples)
    assert relative_error(gradients, oracle(model, examples)) < 1e-5
    assert 1 < engine.tokens_per_batch < budget.MOST_TOKENS["cpu"]
    # A row of so many tokens takes the share of the memory that may be used, by the profiler's count: within 5 %,
    # because its share of label tokens is not the measured example's, and operations have scratch of their own.
    row = ragged([engine.tokens_per_batch])
    result = torch.empty(1, engine.dimension)
    taken = _peak_bytes(lambda: engine.gradients(row, out=result))
    assert taken == pytest.approx(budget.USABLE_SHARE["cpu"] * free, rel=0.05)
