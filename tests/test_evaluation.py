import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from scipy.stats import bootstrap
from synthetic_run import DOMAINS, text_of
from transformers import AutoModelForCausalLM

from gradientspace_ray.evaluation import strategies
from gradientspace_ray.evaluation.intervals import bootstrap_intervals, paired_differences
from gradientspace_ray.evaluation.losses import adapter_losses, balanced_parts
from gradientspace_ray.evaluation.strategies import LossMatrix
from gradientspace_ray.models.loading import add_lora, load_adapter, load_base, load_tokenizer, save_adapter


@pytest.fixture(scope="module")
def adapters(tiny_model_dir, tmp_path_factory):
    folders = {}
    for seed, name in enumerate(("generalist", "expert-a", "expert-b")):
        adapted = add_lora(load_base(str(tiny_model_dir)), 4, 8, "all-linear", seed)
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in adapted.named_parameters():
            if "lora_B" in key:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        folders[name] = tmp_path_factory.mktemp(name)
        save_adapter(adapted, folders[name])
    return folders


@pytest.fixture(scope="module")
def examples(tiny_model_dir):
    tokenizer = load_tokenizer(str(tiny_model_dir))
    found = []
    for number in range(9):
        question, answer = (tokenizer(text)["input_ids"] for text in text_of(DOMAINS[number % 2], number))
        found.append((question + answer, [-100] * len(question) + answer))
    return found


def plain_loss(folder, model_dir, example):
    """transformers' own loss of one example, with PEFT's own loader."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    if folder:
        model = PeftModel.from_pretrained(model, folder)
    input_ids, labels = (torch.tensor([row]) for row in example)
    with torch.no_grad():
        return model.eval()(input_ids=input_ids, labels=labels).loss.item()


def test_the_loss_matrix_is_transformers_loss_of_each_pair(adapters, examples, tiny_model_dir):
    model = load_base(str(tiny_model_dir))
    for name, folder in adapters.items():
        model = load_adapter(model, folder, name)
    pairs = []
    columns = ["expert-b", "base", "generalist", "expert-a"]
    nll_NA = adapter_losses(model, columns, examples, tokens_per_batch=150, on_batch=pairs.append)
    expected = [[plain_loss(adapters.get(name), tiny_model_dir, example) for name in columns] for example in examples]
    np.testing.assert_allclose(nll_NA, expected, atol=1e-5)
    assert sum(pairs) == nll_NA.size
    assert np.ptp(nll_NA, axis=1).min() > 1e-3, "the adapters make no difference: they were not switched"
    alone = adapter_losses(model, ["base"], examples[3:4], tokens_per_batch=1)
    np.testing.assert_allclose(alone[0, 0], nll_NA[3, 1], atol=1e-5)


def test_no_example_gives_no_row(adapters, tiny_model_dir):
    model = load_adapter(load_base(str(tiny_model_dir)), adapters["generalist"], "generalist")
    assert adapter_losses(model, ["base"], [], tokens_per_batch=10).shape == (0, 1)


@given(st.lists(st.integers(1, 500), max_size=60), st.integers(1, 8))
def test_parts_hold_each_example_once_and_are_even(lengths, count):
    parts = balanced_parts(lengths, count)
    assert sorted(index for part in parts for index in part) == list(range(len(lengths)))
    assert all(parts)
    assert len(parts) == min(count, len(lengths))
    tokens = [sum(lengths[index] for index in part) for part in parts]
    assert max(tokens, default=0) - min(tokens, default=0) <= max(lengths, default=0)


MATRIX = LossMatrix(
    np.array(
        # base, generalist, single, a, b
        [[3.0, 2.0, 1.9, 1.0, 2.5], [3.0, 2.0, 2.1, 2.4, 1.5], [3.0, 1.0, 1.2, 1.4, 1.1], [3.0, 2.0, 1.8, 1.7, 1.9]]
    ),
    ("base", "generalist", "single_lora", "a", "b"),
)


def test_strategies_by_hand():
    served = ["a", "a", "generalist", "b"]
    losses = strategies.strategy_losses(MATRIX, served)
    means = {name: column.mean() for name, column in losses.items()}
    assert MATRIX.experts == ("a", "b")
    assert means == pytest.approx(
        {
            "base": 3.0,
            "generalist": 1.75,
            "single_lora": 1.75,
            "routed": (1.0 + 2.4 + 1.0 + 1.9) / 4,
            "oracle": (1.0 + 1.5 + 1.0 + 1.7) / 4,
            "best_single": 1.625,
        }
    )
    assert MATRIX.best_single() == "a"
    assert strategies.gap_closed(losses) == pytest.approx((1.75 - 1.575) / (1.75 - 1.3))
    assert strategies.regret(losses) == pytest.approx(1.575 - 1.3)
    # a is right on the first; the abstention on the third is right, since no expert beats the generalist there.
    assert strategies.lowest_loss_accuracy(MATRIX, served) == 0.5
    assert strategies.lowest_loss_accuracy(MATRIX, ["a", "b", "generalist", "a"]) == 1.0


@given(st.integers(0, 10_000))
def test_the_oracle_is_a_bound_and_regret_is_never_negative(seed):
    generator = np.random.default_rng(seed)
    matrix = LossMatrix(generator.uniform(0, 3, size=(12, 5)), MATRIX.adapters)
    served = generator.choice(["generalist", "a", "b"], size=12).tolist()
    losses = strategies.strategy_losses(matrix, served)
    assert strategies.regret(losses) >= 0
    assert losses["oracle"].mean() <= min(losses[name].mean() for name in ("generalist", "routed", "best_single"))


def test_no_gap_to_close_is_none():
    same = LossMatrix(np.ones((3, 3)), ("base", "generalist", "a"))
    losses = strategies.strategy_losses(same, ["a"] * 3)
    assert "single_lora" not in losses
    assert strategies.gap_closed(losses) is None
    assert strategies.regret(losses) == 0


def test_domain_accuracy_reads_the_majority_of_the_training_examples():
    majority = strategies.majority_domains(
        ("a", "b", "c"), ["a", "a", "a", "b", "c"], ["sums", "sums", "code", "code", None]
    )
    assert majority == {"a": "sums", "b": "code"}
    served, domains = ["a", "b", "generalist", "c", "a"], ["sums", "sums", "sums", "code", None]
    assert strategies.domain_accuracy(majority, served, domains) == 0.25
    assert strategies.domain_accuracy({}, served, [None] * 5) is None


def test_group_means_by_hand():
    table = strategies.group_means({"x": np.array([1.0, 2.0, 6.0])}, ["b", "a", "a"])
    assert table == {"a": {"examples": 2, "x": 4.0}, "b": {"examples": 1, "x": 1.0}}
    assert list(table) == ["a", "b"]


def test_intervals_agree_with_scipys_bootstrap():
    generator = np.random.default_rng(0)
    columns = {"x": generator.gamma(2.0, size=150), "y": generator.normal(size=150)}
    ours = bootstrap_intervals(columns, 0.9, seed=0)
    for name, column in columns.items():
        reference = bootstrap(
            (column,), np.mean, confidence_level=0.9, method="percentile", n_resamples=6000, rng=1
        ).confidence_interval
        assert ours[name].mean == pytest.approx(column.mean())
        width = reference.high - reference.low
        assert ours[name].low == pytest.approx(reference.low, abs=0.05 * width)
        assert ours[name].high == pytest.approx(reference.high, abs=0.05 * width)


def test_intervals_are_seeded_and_paired():
    generator = np.random.default_rng(0)
    easy = generator.normal(size=80) * 5
    columns = {"routed": easy - 0.1, "generalist": easy}
    differences = paired_differences(columns, [("routed", "generalist"), ("routed", "absent")])
    intervals = bootstrap_intervals(columns | differences, 0.95, seed=3)
    assert list(differences) == ["routed - generalist"]
    paired = intervals["routed - generalist"]
    assert (paired.low, paired.high) == pytest.approx((-0.1, -0.1))
    assert intervals["routed"].low < intervals["generalist"].mean < intervals["routed"].high
    assert intervals == bootstrap_intervals(columns | differences, 0.95, seed=3)
    assert intervals != bootstrap_intervals(columns | differences, 0.95, seed=4)
