"""Preconditioned gradients against torch's own Adam, and against the formulas in float64."""

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from gradientspace_ray.gradients import preconditioner
from gradientspace_ray.gradients.preconditioner import Preconditioner
from gradientspace_ray.models.moments import AdamMoments, MomentsError

ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-8}
KINDS = st.sampled_from(["adam", "less"])
SHAPES = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 6)), min_size=1, max_size=4)


def columns_of(shapes):
    columns, offset = [], 0
    for index, (rows, width) in enumerate(shapes):
        columns.append((f"layers.{index}.lora_A.weight", offset, (rows, width)))
        offset += rows * width
    return columns


def random_moments(columns, seed=0, step=5):
    """Moments whose sizes lie on both sides of eps, as those of real weights do."""
    generator = torch.Generator().manual_seed(seed)
    first, second = {}, {}
    for name, _, shape in columns:
        scale = 10.0 ** torch.randint(-7, 0, shape, generator=generator)
        first[name] = torch.randn(shape, generator=generator) * scale
        second[name] = (torch.randn(shape, generator=generator) * scale).square()
    return AdamMoments(first, second, step, (0.9, 0.999), 1e-8)


def random_gradients(count, dimension, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0 ** torch.randint(-7, 0, (count, dimension), generator=generator)
    return (torch.randn(count, dimension, generator=generator) * scale).to(dtype)


def formula(kind, moments, columns, gradients_ND):
    """In float64, one expression; and the size of its terms, which decides how it rounds where they cancel."""
    g = gradients_ND.double()
    m = torch.cat([moments.first[name].flatten() for name, _, _ in columns]).double()
    v = torch.cat([moments.second[name].flatten() for name, _, _ in columns]).double()
    (b1, b2), eps = moments.betas, moments.eps
    if kind == "adam":
        wanted = g / ((v / (1 - b2**moments.step)).sqrt() + eps)
        return wanted, wanted.abs()
    root = torch.sqrt(b2 * v + (1 - b2) * g**2 + eps)
    return (b1 * m + (1 - b1) * g) / root, (b1 * m.abs() + (1 - b1) * g.abs()) / root


@given(KINDS, SHAPES, st.sampled_from(list(ROUNDING)), st.integers(0, 5), st.integers(1, 9), st.integers(0, 99))
def test_every_entry_is_that_of_the_formula(kind, shapes, dtype, count, block_columns, seed):
    columns = columns_of(shapes)
    moments = random_moments(columns, seed, step=seed + 1)
    gradients_ND = random_gradients(count, sum(rows * width for rows, width in shapes), dtype, seed)
    wanted, size = formula(kind, moments, columns, gradients_ND)
    with mock.patch.object(preconditioner, "BLOCK_COLUMNS", block_columns):
        Preconditioner(kind, moments, columns).apply(gradients_ND)
    assert gradients_ND.dtype == dtype
    assert bool(((gradients_ND.double() - wanted).abs() <= ROUNDING[dtype] * size).all())


@given(SHAPES, st.integers(0, 99), st.integers(-3, 3))
def test_adam_is_linear_in_the_gradient(shapes, seed, exponent):
    columns = columns_of(shapes)
    scaled = Preconditioner("adam", random_moments(columns, seed), columns)
    once = random_gradients(3, sum(rows * width for rows, width in shapes), torch.float32, seed)
    more = once * 2.0**exponent
    scaled.apply(once)
    scaled.apply(more)
    assert torch.equal(more, once * 2.0**exponent)


@pytest.mark.parametrize("optimizer_class", [torch.optim.Adam, torch.optim.AdamW])
def test_adams_denominators_are_those_of_the_optimizers_last_step(optimizer_class):
    """Adam moves a weight by -lr times its bias-corrected momentum over the denominator."""
    columns = columns_of([(3, 4), (2, 5)])
    weights = {name: torch.nn.Parameter(torch.zeros(shape)) for name, _, shape in columns}
    optimizer = optimizer_class(weights.values(), lr=0.5, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        for weight in weights.values():
            weight.grad = torch.randn(weight.shape, generator=generator) * 1e-4
        optimizer.step()
    state = {name: optimizer.state[weight] for name, weight in weights.items()}
    moments = AdamMoments(
        {name: values["exp_avg"] for name, values in state.items()},
        {name: values["exp_avg_sq"] for name, values in state.items()},
        int(state[columns[0][0]]["step"]),
        optimizer.param_groups[0]["betas"],
        optimizer.param_groups[0]["eps"],
    )
    momentum = torch.cat([moments.first[name].flatten() for name, _, _ in columns]) / (1 - 0.9**6)
    moved = torch.cat([(weights[name].detach() - before[name]).flatten() for name, _, _ in columns])
    rows = momentum[None].clone()
    Preconditioner("adam", moments, columns).apply(rows)
    torch.testing.assert_close(rows[0], moved / -0.5, rtol=1e-4, atol=1e-6)


def test_less_pulls_rows_together_and_adam_does_not():
    columns = columns_of([(4, 50)])
    moments = random_moments(columns)
    gradients_ND = random_gradients(2, 200, torch.float32, 1) * 1e-3
    cosines = {}
    for kind in ("adam", "less"):
        rows = gradients_ND.clone()
        Preconditioner(kind, moments, columns).apply(rows)
        cosines[kind] = float(torch.cosine_similarity(rows[0], rows[1], dim=0))
    assert abs(cosines["adam"]) < 0.3
    assert cosines["less"] > 0.9


class LargestResult(TorchDispatchMode):
    """Entries of the largest tensor that an operation makes anew."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view and result is not args[0]:
            self.entries = max(self.entries, result.numel())
        return result


@pytest.mark.parametrize("kind", ["adam", "less"])
@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_temporaries_are_blocks_of_columns(kind, dtype):
    columns = columns_of([(10, 100)] * 10)
    scaled = Preconditioner(kind, random_moments(columns), columns)
    gradients_ND = random_gradients(3, 10_000, dtype, 0)
    with mock.patch.object(preconditioner, "BLOCK_COLUMNS", 64), LargestResult() as largest:
        scaled.apply(gradients_ND)
    assert largest.entries <= 3 * 64


def test_the_moments_given_are_left_as_they_were():
    columns = columns_of([(2, 3), (3, 2)])
    moments, untouched = random_moments(columns), random_moments(columns)
    for kind in ("adam", "less"):
        Preconditioner(kind, moments, columns).apply(random_gradients(2, 12, torch.float32, 0))
    for name, _, _ in columns:
        assert torch.equal(moments.first[name], untouched.first[name])
        assert torch.equal(moments.second[name], untouched.second[name])


@pytest.mark.parametrize("part", ["first", "second"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda part, name: part.pop(name), "they are another adapter's, without layers.1.lora_A.weight"),
        (
            lambda part, name: part.update({name: torch.ones(5, 2)}),
            r"they are another adapter's, layers.1.lora_A.weight is \(5, 2\) and not \(2, 5\)",
        ),
        (
            lambda part, name: part.update({"layers.2.lora_A.weight": torch.ones(1, 1)}),
            "they are another adapter's, with layers.2.lora_A.weight",
        ),
        (lambda part, name: part[name].fill_(torch.nan), "layers.1.lora_A.weight is not finite, which a lower warmup"),
        (lambda part, name: part[name].fill_(torch.inf), "layers.1.lora_A.weight is not finite, which a lower warmup"),
    ],
)
def test_moments_of_another_adapter_and_moments_that_are_not_finite_are_refused(part, change, reason):
    columns = columns_of([(3, 4), (2, 5)])
    moments = random_moments(columns)
    change(getattr(moments, part), "layers.1.lora_A.weight")
    with pytest.raises(MomentsError, match=f"optimizer_moments.safetensors: .*{reason}.*--again warmup$") as error:
        Preconditioner("adam", moments, columns)
    assert "\n" not in str(error.value)


def test_moments_of_an_optimizer_that_made_no_step_are_refused():
    columns = columns_of([(3, 4)])
    with pytest.raises(MomentsError, match="the optimizer made no step; run the warmup stage again"):
        Preconditioner("less", random_moments(columns, step=0), columns)


@pytest.mark.parametrize(
    ("gradients_ND", "found"),
    [
        (torch.ones(2, 11), r"torch.float32 \(2, 11\)"),
        (torch.ones(12), r"torch.float32 \(12,\)"),
        (torch.ones(2, 12, dtype=torch.float64), r"torch.float64 \(2, 12\)"),
        (torch.ones(2, 12, dtype=torch.float16), r"torch.float16 \(2, 12\)"),
    ],
)
def test_gradients_that_do_not_fit_are_refused(gradients_ND, found):
    columns = columns_of([(3, 4)])
    with pytest.raises(ValueError, match=rf"gradients are {found}; needed: float32 or bfloat16 \(N, 12\)"):
        Preconditioner("adam", random_moments(columns), columns).apply(gradients_ND)
