import hashlib
import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from sklearn.linear_model import LogisticRegression

from gradientspace_ray.registry import router_digest
from gradientspace_ray.router.classifier import (
    HEAD_FILE,
    INVERSE_PENALTIES,
    SETTINGS_FILE,
    LinearHead,
    Router,
    RouterError,
    RouterSettings,
    decide,
    fit_head,
    load_head,
    save_router,
)
from gradientspace_ray.router.encoder import PromptEncoder


def clouds(count, experts, width=8, spread=0.6, seed=0):
    """Unit vectors around one random direction for each expert."""
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(experts, width))
    labels = np.arange(count) % experts
    points = centres[labels] / np.linalg.norm(centres[labels], axis=1, keepdims=True)
    points = points + spread * generator.normal(size=points.shape) / width**0.5
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32), labels


def settings_for(experts, **changes):
    labels = tuple(f"expert-{index}" for index in range(experts))
    values = {"encoder": "e", "view": "conversation", "max_tokens": 64, "labels": labels}
    return RouterSettings(**{**values, "temperature": 1.0, "threshold": 0.0, **changes})


@pytest.mark.parametrize("experts", [2, 3, 5])
def test_probabilities_are_scikit_learns(experts):
    points, labels = clouds(90, experts)
    fit = fit_head(points, labels, experts, seed=0)
    reference = LogisticRegression(C=fit.inverse_penalty, class_weight="balanced", max_iter=2000)
    expected = reference.fit(points.astype(np.float64), labels).predict_proba(points.astype(np.float64))
    ours = torch.softmax(torch.tensor(fit.head.logits(points)), dim=1).numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    assert fit.head.weight_KH.shape == (experts, points.shape[1])


def test_heldout_predictions_are_from_heads_that_had_not_seen_the_prompt():
    points, _ = clouds(60, 2)
    noise = np.random.default_rng(1).permutation(np.arange(60) % 2)
    fit = fit_head(points, noise, 2, seed=0)
    assert (fit.heldout_logits_NK.argmax(1) == noise[fit.heldout_N]).mean() < 0.75
    assert sorted(fit.heldout_N) == list(range(60))
    assert fit.inverse_penalty == min(INVERSE_PENALTIES), "labels that are noise want the strongest penalty"


def test_separable_experts_are_told_apart():
    points, labels = clouds(120, 4, spread=0.3)
    fit = fit_head(points, labels, 4, seed=0)
    assert (fit.heldout_logits_NK.argmax(1) == labels).mean() > 0.95


def test_a_small_expert_is_not_drowned_by_a_large_one():
    points, labels = clouds(400, 2, spread=0.9)
    keep = (labels == 0) | (np.arange(400) % 40 == 1)
    fit = fit_head(points[keep], labels[keep], 2, seed=0)
    assert (fit.head.logits(points[labels == 1]).argmax(1) == 1).mean() > 0.7


def test_one_expert_gives_a_constant_router():
    points, _ = clouds(10, 1)
    fit = fit_head(points, np.zeros(10, int), 1, seed=0)
    decision = decide(fit.head.logits(points[:1]), settings_for(1))[0]
    assert (decision.expert, decision.confidence, decision.second_best) == ("expert-0", 1.0, None)
    assert len(fit.heldout_N) == 0


def test_an_expert_of_one_example_is_fitted_without_cross_validation():
    points, labels = clouds(20, 2)
    keep = [0, *range(1, 20, 2)]
    fit = fit_head(points[keep], labels[keep], 2, seed=0)
    assert len(fit.heldout_N) == 0
    assert np.isfinite(fit.head.logits(points)).all()


def test_an_empty_cluster_is_refused():
    points, labels = clouds(20, 2)
    with pytest.raises(ValueError, match="cluster stage"):
        fit_head(points, labels, 3, seed=0)


def test_below_the_threshold_the_generalist_serves():
    logits = np.log(np.array([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4]]))
    sure, unsure = decide(logits, settings_for(3, threshold=0.5))
    assert (sure.expert, sure.reason, sure.second_best) == ("expert-0", "routed", "expert-1")
    assert sure.confidence == pytest.approx(0.7)
    assert (unsure.expert, unsure.reason, unsure.second_best) == (None, "low_confidence", "expert-2")
    assert unsure.confidence == pytest.approx(0.4)
    assert sum(unsure.probabilities.values()) == pytest.approx(1)
    flattened = decide(logits, settings_for(3, temperature=10.0))
    assert flattened[0].confidence < 0.5


def test_strangers_go_to_the_generalist_however_sure_the_head_is():
    logits = np.log(np.array([[0.7, 0.2, 0.1], [0.7, 0.2, 0.1], [0.3, 0.3, 0.4]]))
    similarity = np.array([0.5, 0.49, 0.49])
    decisions = decide(logits, settings_for(3, threshold=0.5, min_similarity=0.5), similarity)
    assert [decision.expert for decision in decisions] == ["expert-0", None, None]
    assert [decision.reason for decision in decisions] == ["routed", "out_of_distribution", "out_of_distribution"]
    assert [decision.confidence for decision in decisions] == pytest.approx([0.7, 0.7, 0.4])
    assert [decision.second_best for decision in decisions] == ["expert-1", "expert-0", "expert-2"]
    for undecided in (decide(logits, settings_for(3), similarity), decide(logits, settings_for(3, min_similarity=0.5))):
        assert {decision.reason for decision in undecided} == {"routed"}


def test_a_saved_router_knows_the_prompts_that_it_was_trained_on(tmp_path, tiny_encoder_dir):
    encoder = PromptEncoder(str(tiny_encoder_dir), 64)
    known, other = ["2 + 2", "a story about a fox", "12 + 9"], ["?", "Wie geht es dir heute?"]
    settings = settings_for(2, encoder=str(tiny_encoder_dir), neighbours=1, min_similarity=0.999)
    head = LinearHead(np.zeros((2, 32), np.float32), np.zeros(2, np.float32))
    save_router(tmp_path, head, settings, encoder.encode(known))
    assert load_file(tmp_path / HEAD_FILE)["sample"].dtype == np.float16
    decisions = Router.load(tmp_path).route([*known, *other])
    assert [decision.reason for decision in decisions] == ["routed"] * 3 + ["out_of_distribution"] * 2


def test_a_router_saved_without_these_settings_loads_and_calls_nothing_strange(tmp_path, tiny_encoder_dir):
    head, settings = LinearHead(np.zeros((2, 32), np.float32), np.zeros(2, np.float32)), settings_for(2)
    save_file({"weight": head.weight_KH, "bias": head.bias_K}, tmp_path / HEAD_FILE)
    tree = settings.model_dump(mode="json", exclude={"min_similarity", "neighbours", "switch_margin"})
    (tmp_path / SETTINGS_FILE).write_text(json.dumps(tree | {"encoder": str(tiny_encoder_dir)}))
    assert {decision.reason for decision in Router.load(tmp_path).route(["2 + 2", "?!?!"])} == {"routed"}
    content = b"".join(name.encode() + (tmp_path / name).read_bytes() for name in (HEAD_FILE, SETTINGS_FILE))
    assert router_digest(tmp_path) == hashlib.sha256(content).hexdigest()[:12]


def test_a_saved_router_decides_as_before_and_has_the_same_bytes(tmp_path, tiny_encoder_dir):
    prompts = ["2 + 2", "a story about a fox", "12 + 9", "a tale of an owl"] * 5
    settings = settings_for(2, encoder=str(tiny_encoder_dir), temperature=0.7, threshold=0.6)
    head = LinearHead(np.random.default_rng(0).normal(size=(2, 32)).astype(np.float32), np.zeros(2, np.float32))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        save_router(tmp_path / name, head, settings)
    for file in (HEAD_FILE, SETTINGS_FILE):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    router = Router.load(tmp_path / "one")
    decisions = router.route(prompts)
    assert router.labels == settings.labels
    assert router.view == "conversation"
    logits = router.encoder.encode(prompts) @ head.weight_KH.T
    expected = torch.softmax(torch.tensor(logits) / 0.7, dim=1).max(dim=1).values.numpy()
    np.testing.assert_allclose([decision.confidence for decision in decisions], expected, atol=1e-5)
    assert [decision.expert is None for decision in decisions] == (expected < 0.6).tolist()
    assert router.route([]) == []


def test_the_digest_of_a_router_changes_with_each_of_its_files(tmp_path):
    head, settings = LinearHead(np.zeros((2, 4), np.float32), np.zeros(2, np.float32)), settings_for(2)
    save_router(tmp_path, head, settings)
    digest = router_digest(tmp_path)
    save_router(tmp_path, head, settings)
    assert router_digest(tmp_path) == digest
    save_router(tmp_path, head, settings.model_copy(update={"threshold": 0.9}))
    other_settings = router_digest(tmp_path)
    save_router(tmp_path, LinearHead(np.ones((2, 4), np.float32), head.bias_K), settings)
    assert len({digest, other_settings, router_digest(tmp_path)}) == 3
    (tmp_path / HEAD_FILE).unlink()
    with pytest.raises(FileNotFoundError):
        router_digest(tmp_path)


@pytest.mark.parametrize("damage", ["missing", "truncated", "key", "labels", "view", "sample", "width"])
def test_a_damaged_router_is_one_line(tmp_path, damage):
    head = LinearHead(np.zeros((2, 4), np.float32), np.zeros(2, np.float32))
    save_router(tmp_path, head, settings_for(2))
    if damage == "missing":
        (tmp_path / SETTINGS_FILE).unlink()
    elif damage == "truncated":
        (tmp_path / HEAD_FILE).write_bytes(b"short")
    else:
        changes = {
            "key": {"surprise": 1},
            "labels": {"labels": ["a", "b", "c"]},
            "view": {"view": "system"},
            "sample": {"min_similarity": 0.5},
            "width": {"min_similarity": 0.5},
        }
        if damage == "width":
            save_router(tmp_path, head, settings_for(2), np.zeros((9, 5)))
        tree = json.loads((tmp_path / SETTINGS_FILE).read_text()) | changes[damage]
        (tmp_path / SETTINGS_FILE).write_text(json.dumps(tree))
    with pytest.raises(RouterError, match="run the router stage again") as caught:
        load_head(tmp_path)
    assert "\n" not in str(caught.value)
