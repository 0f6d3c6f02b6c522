"""The stages router, evaluate and report on a synthetic run directory, on a real Ray."""

import re
import shutil

import numpy as np
import pyarrow as pa
import pytest
import torch
from peft import PeftModel
from synthetic_run import EXAMPLE_SCHEMA, synthetic_recipe, synthetic_run
from transformers import AutoModelForCausalLM

from gradientspace_ray.registry import adapter_digest, read_registry
from gradientspace_ray.router.classifier import HEAD_FILE, SETTINGS_FILE, Router
from gradientspace_ray.router.encoder import PromptEncoder
from gradientspace_ray.run import RunDirectory, RunError
from gradientspace_ray.stages import encode, report, route, score
from gradientspace_ray.stages.progress import Bars

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def recipe(tiny_model_dir, tiny_encoder_dir):
    return synthetic_recipe(tiny_model_dir, tiny_encoder_dir)


@pytest.fixture(scope="module")
def finished(ray_cluster, recipe, tiny_model_dir, tmp_path_factory):
    """A run through router, evaluate and report, with the summaries of the stages."""
    run = synthetic_run(tmp_path_factory.mktemp("run"), tiny_model_dir)
    summaries = {
        "validation": score.score(recipe, run, "validation"),
        "router": route.router(recipe, run),
        "test": score.score(recipe, run, "test"),
        "evaluate": score.evaluate(recipe, run),
        "report": report.report(recipe, run),
    }
    return run, summaries


def test_the_matrix_is_plain_peft_and_transformers(finished, tiny_model_dir):
    run, _ = finished
    losses = run.read_table("evaluation/losses.test.parquet").to_pylist()
    examples = run.read_table("examples/test.parquet").to_pylist()
    folder = next(f"experts/{name}" for name in run.names("experts") if name.startswith("expert-b@"))
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), run.path(folder)).eval()
    assert set(losses[0]) == {"id", "domain", "label_tokens"} | {
        f"nll/{name}" for name in ("base", "generalist", "single_lora", "expert-a", "expert-b")
    }
    for row, example in zip(losses, examples, strict=True):
        assert row["id"] == example["id"]
        inputs = {"input_ids": torch.tensor([example["input_ids"]]), "labels": torch.tensor([example["labels"]])}
        with torch.no_grad():
            assert row["nll/base"] == pytest.approx(base(**inputs).loss.item(), abs=1e-4)
            assert row["nll/expert-b"] == pytest.approx(adapted(**inputs).loss.item(), abs=1e-4)


def test_the_registry_lists_the_experts_in_the_routers_order(finished, recipe):
    run, _ = finished
    registry = read_registry(run)
    assert [expert.name for expert in registry.experts] == ["expert-a", "expert-b"]
    assert list(Router.load(run.fetch("router")).labels) == ["expert-a", "expert-b"]
    assert registry.experts[0].title == "<term0>, two"
    for adapter in (registry.generalist, *registry.experts):
        assert adapter.digest == adapter_digest(run.fetch(adapter.folder))
    assert registry.base_model == recipe.model.name
    digest = registry.router_digest
    route.router(recipe, run)
    assert read_registry(run).router_digest == digest, "the same inputs must give the same router"


def test_the_router_tells_the_two_kinds_of_prompt_apart(finished):
    run, summaries = finished
    settings = run.read_json("router/router.json")
    assert settings["calibration"]["cross_validated_accuracy"] > 0.95
    assert settings["calibration"]["measured_on"] == "validation"
    assert "2 experts" in summaries["router"].made


def test_scores_follow_from_the_matrix(finished):
    run, summaries = finished
    scores = run.read_json("evaluation/scores.json")
    both = run.read_table("evaluation/losses.parquet").to_pandas()
    test = both[both["split"] == "test"]
    assert (len(both), len(test)) == (48, 24)
    loss = scores["heldout_loss"]
    for name in ("base", "generalist", "single_lora"):
        assert loss[name] == pytest.approx(test[f"nll/{name}"].mean(), abs=1e-6)
    routed = [row[f"nll/{row['routed']}"] for _, row in test.iterrows()]
    assert loss["routed"] == pytest.approx(np.mean(routed), abs=1e-6)
    served = test[["nll/generalist", "nll/expert-a", "nll/expert-b"]]
    assert loss["oracle"] == pytest.approx(served.min(axis=1).mean(), abs=1e-6)
    assert loss["oracle"] <= loss["routed"]
    for name, interval in scores["intervals"]["heldout_loss"].items():
        assert interval["low"] <= loss[name] <= interval["high"]
    assert scores["clusters"] == 2
    assert 0 <= scores["router_accuracy"] <= 1
    assert scores["expert_domains"] == {"expert-a": "sums", "expert-b": "stories"}
    assert [row["examples"] for row in scores["by_domain"].values()] == [12, 12]
    assert re.match(
        r"held-out loss: base [\d.]+, generalist .* router \d+% \(by domain \d+%\)", summaries["evaluate"].made
    )


def test_the_report_shows_every_part(finished):
    run, _ = finished
    html = run.read_bytes("report.html").decode()
    for anchor in ("results", "map", "clusters", "losses", "router", "spectrum", "stages"):
        assert f'<section id="{anchor}">' in html
    assert "&lt;term0&gt;" in html


def test_one_expert_no_labels_few_validation_examples_no_single_lora(tiny_model_dir, tiny_encoder_dir, tmp_path):
    recipe = synthetic_recipe(tiny_model_dir, tiny_encoder_dir, single_lora={"train": False})
    run = synthetic_run(tmp_path, tiny_model_dir, clusters=1, validation=3, test=5, labelled=False)
    score.score(recipe, run, "validation")
    route.router(recipe, run)
    score.score(recipe, run, "test")
    score.evaluate(recipe, run)
    report.report(recipe, run)
    scores = run.read_json("evaluation/scores.json")
    assert "single_lora" not in scores["heldout_loss"], "an old single LoRA is not this recipe's"
    assert scores["router_domain_accuracy"] is None
    assert scores["by_domain"] == {}
    assert scores["heldout_loss"]["routed"] == pytest.approx(scores["heldout_loss"]["best_single"])
    assert run.read_json("router/router.json")["calibration"]["measured_on"] == "nothing"
    assert "hidden labels" not in run.read_bytes("report.html").decode()


def test_no_test_examples_is_said_and_is_no_error(recipe, tiny_model_dir, tmp_path):
    run = synthetic_run(tmp_path, tiny_model_dir, validation=0, test=0, single_lora=False)
    for split in ("validation", "test"):
        score.score(recipe, run, split)
    route.router(recipe, run)
    assert "data.test_share is 0" in score.evaluate(recipe, run).made
    report.report(recipe, run)


def test_prompts_out_of_distribution_are_counted(recipe, tiny_model_dir, tmp_path):
    run = synthetic_run(tmp_path, tiny_model_dir, validation=60, single_lora=False)
    messages = [{"role": "user", "content": "???"}, {"role": "assistant", "content": "no"}]
    test = run.read_table("examples/test.parquet").to_pylist()
    test[0] |= {"messages": messages, "prompt": "???"}
    run.write_table("examples/test.parquet", pa.Table.from_pylist(test, schema=EXAMPLE_SCHEMA))
    score.score(recipe, run, "validation")
    assert "out of distribution" in route.router(recipe, run).made
    score.score(recipe, run, "test")
    settings = run.read_json("router/router.json")
    # To a random encoder everything looks alike.
    run.write_json("router/router.json", settings | {"min_similarity": max(settings["min_similarity"], 0.95)})
    score.evaluate(recipe, run)
    assert settings["calibration"]["out_of_distribution"] == {
        "false_alarm_rate": 0.01,
        "training_prompts": 40,
        "training_false_alarms": 0,
        "validation_prompts": 60,
        "validation_false_alarms": 0,
    }
    served = run.read_table("evaluation/losses.parquet").to_pandas()
    strange = served[served["reason"] == "out_of_distribution"]
    assert test[0]["id"] in set(strange["id"])
    assert set(strange["routed"]) == {"generalist"}
    share = (strange["split"] == "test").sum() / len(test)
    assert run.read_json("evaluation/scores.json")["out_of_distribution"] == pytest.approx(share)
    report.report(recipe, run)
    assert "Prompts unlike all of its training go to the generalist." in run.read_bytes("report.html").decode()


@pytest.mark.parametrize(("margin", "decisive"), [(1.0, 0), (-1.0, 1)])
def test_a_conversation_is_served_as_an_endpoint_does(finished, tmp_path, margin, decisive):
    run = RunDirectory(shutil.copytree(finished[0].path(), tmp_path / "run"))
    test = run.read_table("examples/test.parquet").to_pylist()
    questions = [row["prompt"] for row in test]
    for row, other in zip(test, reversed(questions), strict=True):
        row["messages"] = [
            *row["messages"],
            {"role": "user", "content": other},
            {"role": "assistant", "content": "yes"},
        ]
    run.write_table("examples/test.parquet", pa.Table.from_pylist(test, schema=EXAMPLE_SCHEMA))
    router = Router.load(run.fetch("router"))
    settings = router.settings.model_copy(update={"switch_margin": margin, "view": "last_user", "threshold": 0.0})
    router = Router(router.encoder, router.head, settings)
    table = score._with_decisions(run, router, "test", Bars())
    asked = (questions, questions[::-1])[decisive]
    assert table["routed"].to_pylist() == [decision.expert for decision in router.route(asked)]
    assert len(set(table["routed"].to_pylist())) == 2


def test_a_missing_expert_is_named(recipe, tiny_model_dir, tmp_path):
    run = synthetic_run(tmp_path, tiny_model_dir, single_lora=False)
    lost = next(name for name in run.names("experts") if name.startswith("expert-a@"))
    run.delete(f"experts/{lost}")
    with pytest.raises(RunError, match=r"expert-b.*run the experts stage again"):
        score.score(recipe, run, "test")


@pytest.mark.parametrize("splits", [("train", "validation"), ("train",), ("test", "validation")])
def test_encodings_are_those_of_the_prompts_in_the_order_of_the_file(recipe, tiny_model_dir, tmp_path, splits):
    run = synthetic_run(tmp_path, tiny_model_dir, test=0, single_lora=False)
    encoder = PromptEncoder(recipe.router.encoder, recipe.router.max_tokens)
    parts = encode.encodings(recipe, run, splits)
    for split, found_NH in zip(splits, parts, strict=True):
        prompts = run.read_table(f"examples/{split}.parquet", ["prompt"])["prompt"].to_pylist()
        assert found_NH.dtype == np.float32
        np.testing.assert_allclose(found_NH, encoder.encode(prompts), atol=1e-6)


def test_encodings_do_not_depend_on_the_number_of_workers(tiny_model_dir, tiny_encoder_dir, tmp_path):
    run = synthetic_run(tmp_path, tiny_model_dir, validation=100, single_lora=False)
    found = []
    for workers in (1, 2, 3):
        recipe = synthetic_recipe(tiny_model_dir, tiny_encoder_dir, evaluate={"workers": workers})
        found.append(np.concatenate(encode.encodings(recipe, run, ("train", "validation"))))
    assert all(np.array_equal(found[0], other_NH) for other_NH in found[1:])


def test_outliers_teach_the_router_nothing(recipe, tiny_model_dir, tmp_path):
    runs = [synthetic_run(tmp_path / kind, tiny_model_dir, single_lora=False) for kind in ("outliers", "skipped")]
    assignments = runs[0].read_table("clusters/assignments.parquet")
    kept = np.arange(len(assignments)) % 3 > 0
    clusters = pa.array(np.where(kept, assignments["cluster"].to_numpy(), -1), pa.int32())
    runs[0].write_table("clusters/assignments.parquet", pa.table({"id": assignments["id"], "cluster": clusters}))
    runs[1].write_table("clusters/assignments.parquet", assignments.filter(pa.array(kept)))
    for run in runs:
        places, labels = route._clusters(run)
        assert np.array_equal(places, np.flatnonzero(kept))
        assert np.array_equal(labels, places % 2)
        score.score(recipe, run, "validation")
        route.router(recipe, run)
    for file in (HEAD_FILE, SETTINGS_FILE):
        assert runs[0].read_bytes(f"router/{file}") == runs[1].read_bytes(f"router/{file}")


def test_outliers_are_no_experts_domain(tiny_model_dir, tmp_path):
    run = synthetic_run(tmp_path, tiny_model_dir, single_lora=False)
    ids = run.read_table("clusters/assignments.parquet")["id"].to_pylist()
    # Sums and stories in turn: the stories are the first expert's but for one, and the sums but for one are nobody's.
    clusters = [0, 1] + [-1, 0] * (len(ids) // 2 - 1)
    run.write_table("clusters/assignments.parquet", pa.table({"id": ids, "cluster": pa.array(clusters, pa.int32())}))
    majority = score._majority_domains(run, ("expert-a", "expert-b"))
    assert majority == {"expert-a": "stories", "expert-b": "stories"}
