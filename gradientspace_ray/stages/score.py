"""The loss matrix: held-out examples under every adapter, and what follows from it.

`score` runs on validation for the router and on test for the evaluation: two disjoint splits.
"""

from dataclasses import asdict
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from gradientspace_ray.evaluation import strategies
from gradientspace_ray.evaluation.intervals import bootstrap_intervals, paired_differences
from gradientspace_ray.evaluation.losses import BASE, adapter_losses, balanced_parts
from gradientspace_ray.evaluation.strategies import GENERALIST, SINGLE_LORA, LossMatrix
from gradientspace_ray.models.loading import as_dtype, load_adapter, load_base
from gradientspace_ray.recipe import Recipe
from gradientspace_ray.registry import trained_experts
from gradientspace_ray.router.classifier import Router
from gradientspace_ray.router.conversation import route_conversations
from gradientspace_ray.run import RunDirectory, Summary
from gradientspace_ray.stages.progress import Bars, watched_board

Split = Literal["validation", "test"]
NLL = "nll/"
CONVERSATIONS_PER_UPDATE = 64
COMPARED = [("routed", GENERALIST), ("routed", SINGLE_LORA), ("routed", "best_single"), ("routed", BASE)]


def score(recipe: Recipe, run: RunDirectory, split: Split) -> Summary:
    """Write `evaluation/losses.<split>.parquet`: one row an example, one column `nll/<adapter>` an adapter.

    Each worker loads the base model and all adapters once and takes one part of the examples.
    """
    folders = _adapter_folders(recipe, run)
    examples = run.read_table(f"examples/{split}.parquet", ["id", "domain", "tokens", "label_tokens"])
    parts = balanced_parts(examples["tokens"].to_pylist(), recipe.evaluate.workers)
    adapters = [BASE, *folders]
    nll_NA = np.zeros((examples.num_rows, len(adapters)), dtype=np.float32)
    task = _score_part.options(
        num_cpus=recipe.compute.cpus_per_worker,
        num_gpus=recipe.compute.gpus_per_worker,
        max_retries=recipe.compute.retries,
        retry_exceptions=[OSError],
    )
    with watched_board() as board:
        lines = [f"{split} losses {i + 1}/{len(parts)}" for i in range(len(parts))]
        running = [
            task.remote(recipe, run.uri, split, part, folders, board, line)
            for part, line in zip(parts, lines, strict=True)
        ]
        for part, part_nll in zip(parts, ray.get(running), strict=True):
            nll_NA[part] = part_nll
    table = examples.drop_columns(["tokens"])
    for column, adapter in enumerate(adapters):
        table = table.append_column(NLL + adapter, pa.array(nll_NA[:, column]))
    run.write_table(f"evaluation/losses.{split}.parquet", table)
    return Summary(
        made=f"losses of {len(nll_NA)} {split} examples under {len(adapters)} adapters",
        counts={f"{split}_examples": len(nll_NA), "adapters": len(adapters)},
    )


@ray.remote
def _score_part(
    recipe: Recipe, run_uri: str, split: Split, part: list[int], folders: dict[str, str], board: Any, line: str
) -> np.ndarray:
    """[len(part), 1 + len(folders)] losses of the examples at the indices `part`: the base model, then the adapters."""
    run = RunDirectory(run_uri)
    rows = run.read_table(f"examples/{split}.parquet", ["input_ids", "labels"]).take(part).to_pylist()
    total = len(rows) * (1 + len(folders))
    board.report.remote(line, 0, total, "loading")
    base, compute_dtype = recipe.model, as_dtype(recipe.model.compute_dtype)
    model: Any = load_base(base.name, base.dtype, recipe.compute.device, base.quantization, compute_dtype)
    for name, folder in folders.items():
        model = load_adapter(model, run.fetch(folder), name)
    done = 0

    def count(pairs: int) -> None:
        nonlocal done
        done += pairs
        board.report.remote(line, done, total)

    examples = [(row["input_ids"], row["labels"]) for row in rows]
    return adapter_losses(
        model, [BASE, *folders], examples, recipe.evaluate.tokens_per_batch, compute_dtype, on_batch=count
    )


def evaluate(recipe: Recipe, run: RunDirectory) -> Summary:
    """Write `evaluation/losses.parquet` (both splits, with the router's choices) and `evaluation/scores.json`."""
    router = Router.load(run.fetch("router"))
    tables: dict[Split, pa.Table] = {}
    splits: tuple[Split, ...] = ("validation", "test")
    with Bars() as bars:
        for split in splits:
            tables[split] = _with_decisions(run, router, split, bars)
    run.write_table("evaluation/losses.parquet", pa.concat_tables(tables.values()))
    test = tables["test"]
    clusters = len(router.labels)
    if not test.num_rows:
        run.write_json("evaluation/scores.json", {"examples": 0, "clusters": clusters, "heldout_loss": {}})
        return Summary(made="no test examples (data.test_share is 0)", counts={"test_examples": 0})
    scores = _scores(recipe, test, _majority_domains(run, router.labels)) | {"clusters": clusters}
    run.write_json("evaluation/scores.json", scores)
    return Summary(made=_headline(scores), counts={"heldout_loss": scores["heldout_loss"], "clusters": clusters})


def _with_decisions(run: RunDirectory, router: Router, split: Split, bars: Bars) -> pa.Table:
    """A split's losses with the columns `split`, `routed` (the adapter that serves), `confidence` and `reason`.

    An endpoint decides on the same conversations in the same way: on their last turn, in the light of earlier ones.
    """
    losses = run.read_table(f"evaluation/losses.{split}.parquet")
    examples = run.read_table(f"examples/{split}.parquet", ["id", "messages"])
    if examples["id"].to_pylist() != losses["id"].to_pylist():
        raise ValueError(f"evaluation/losses.{split}.parquet is not about examples/{split}.parquet; run evaluate again")
    conversations = examples["messages"].to_pylist()
    decisions = []
    for start in range(0, len(conversations), CONVERSATIONS_PER_UPDATE):
        decisions += route_conversations(router, conversations[start : start + CONVERSATIONS_PER_UPDATE])
        bars.update(f"routing {split}", len(decisions), len(conversations))
    routed = pa.array([decision.expert or GENERALIST for decision in decisions], pa.string())
    confidence = pa.array([decision.confidence for decision in decisions], pa.float64())
    reason = pa.array([decision.reason for decision in decisions], pa.string())
    table = losses.add_column(1, "split", pa.array([split] * len(decisions), pa.string()))
    table = table.append_column("routed", routed).append_column("confidence", confidence)
    return table.append_column("reason", reason)


def _scores(recipe: Recipe, test: pa.Table, majority: dict[str, str]) -> dict[str, Any]:
    """Contents of `scores.json`, all but the number of clusters."""
    adapters = tuple(name.removeprefix(NLL) for name in test.column_names if name.startswith(NLL))
    nll_NA = np.stack([test[NLL + adapter].to_numpy() for adapter in adapters], axis=1).astype(np.float64)
    matrix = LossMatrix(nll_NA, adapters)
    served, domains = test["routed"].to_pylist(), test["domain"].to_pylist()
    losses = strategies.strategy_losses(matrix, served)
    differences = paired_differences(losses, COMPARED)
    intervals = bootstrap_intervals(losses | differences, recipe.evaluate.confidence, recipe.seed)
    columns = losses | {name: matrix.column(name) for name in matrix.experts}
    labelled = any(domains)
    return {
        "examples": test.num_rows,
        "label_tokens": int(np.sum(test["label_tokens"].to_numpy())),
        "unit": "nats per label token, mean over examples",
        "heldout_loss": {name: intervals[name].mean for name in losses},
        "intervals": {
            "confidence": recipe.evaluate.confidence,
            "heldout_loss": {name: asdict(intervals[name]) for name in losses},
            "difference": {name: asdict(intervals[name]) for name in differences},
        },
        "gap_closed": strategies.gap_closed(losses),
        "regret": strategies.regret(losses),
        "best_single_expert": matrix.best_single(),
        "router_accuracy": strategies.lowest_loss_accuracy(matrix, served),
        "router_domain_accuracy": strategies.domain_accuracy(majority, served, domains),
        "abstained": served.count(GENERALIST) / len(served),
        "out_of_distribution": test["reason"].to_pylist().count("out_of_distribution") / len(served),
        "expert_domains": majority,
        "by_domain": strategies.group_means(columns, [domain or "none" for domain in domains]) if labelled else {},
        "by_routed": strategies.group_means(columns, served),
    }


def _majority_domains(run: RunDirectory, labels: tuple[str, ...]) -> dict[str, str]:
    """Expert -> the most frequent hidden label of its training examples; empty when there are no labels.

    Outliers, whose cluster is -1, are no expert's.
    """
    assignments = run.read_table("clusters/assignments.parquet")
    clusters = assignments.filter(pc.greater_equal(assignments["cluster"], 0)).to_pydict()
    train = run.read_table("examples/train.parquet", ["id", "domain"]).to_pydict()
    domain_of = dict(zip(train["id"], train["domain"], strict=True))
    experts = [labels[cluster] for cluster in clusters["cluster"]]
    return strategies.majority_domains(labels, experts, [domain_of[id_] for id_ in clusters["id"]])


def _headline(scores: dict[str, Any]) -> str:
    losses = scores["heldout_loss"]
    shown = [name for name in (BASE, GENERALIST, SINGLE_LORA, "routed", "oracle") if name in losses]
    text = ", ".join(f"{name.replace('_', ' ')} {losses[name]:.3f}" for name in shown)
    by_domain = scores["router_domain_accuracy"]
    domain = f" (by domain {by_domain:.0%})" if by_domain is not None else ""
    return f"held-out loss: {text} · router {scores['router_accuracy']:.0%}{domain}"


def _adapter_folders(recipe: Recipe, run: RunDirectory) -> dict[str, str]:
    """Adapter -> its folder: the generalist, the single LoRA if this recipe trains it, the experts."""
    folders = {GENERALIST: "generalist"}
    if recipe.single_lora.train and run.exists("single_lora"):
        folders[SINGLE_LORA] = "single_lora"
    return folders | {expert.name: expert.folder for expert in trained_experts(run)}
