"""Measure which gradient features, and which clustering, find the skills of a mixture.

python jobs/benchmarks/clusters.py [--data DIR] [--json OUT]
python jobs/benchmarks/clusters.py --planted [--json OUT]

An adapter is warmed up on the examples themselves, as a run's generalist is. Then every example's gradient is taken,
features are made of all of them, and each set of features is clustered by every method into the same number of
clusters: the one that the default method chooses from the default features, without looking at any label. The hidden
domains (each row's `domain`) only judge.

* nn: share of examples whose nearest neighbour, by cosine of these features, has their domain.
* NMI, ARI: agreement of the clusters with the domains; each row's number of clusters is the same, so they compare.
* stable: mean adjusted Rand index between the clusters and those of ten random subsamples of 80 %.
* variance: what is left inside the clusters of the variance of the full gradients; needs no label. Gradients are nearly
  orthogonal, so it is near 1 for all; random clusters have the number in the table's title.

Features: `svd_64` is the online SVD that a run makes; `exact_svd_64` and all variants are exact, from the products of
all pairs. Variants change one thing of `exact_svd_64`. `less` and `adam` scale by the warm-up's optimizer, `module`
gives every adapted layer an equal part, `scale kept` leaves the gradients' lengths as they are until the coordinates
are scaled. `length` places examples on a quarter of a circle by the logarithm of their tokens.

`--planted` clusters made-up gradients of up to a million examples instead; see cluster_planted.py.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cluster_features import features_by_name
from cluster_gradients import RANK, Pass, features_of_pass, warmed_up
from cluster_planted import SIZES, Planted, show_planted
from gradient_task import (
    LORA_ALPHA,
    LORA_RANK,
    SEED,
    LabelledExample,
    TaskError,
    mixture_folder,
    read_labelled_examples,
)
from gradients import machine
from rich.console import Console
from rich.table import Table
from sketch_methods import MethodError, in_new_process

from gradientspace_ray.clusters import quality
from gradientspace_ray.clusters.baselines import birch_labels, length_labels, random_labels
from gradientspace_ray.clusters.kmeans import spherical_kmeans
from gradientspace_ray.clusters.methods import Method, clusters_of
from gradientspace_ray.clusters.selection import choose_count
from gradientspace_ray.examples.formats import SourceError
from gradientspace_ray.examples.rendering import prompt_view
from gradientspace_ray.models.attention import UnsupportedModelError
from gradientspace_ray.models.bundled import CHAT_MODEL
from gradientspace_ray.models.loading import ModelError, add_lora, as_dtype, chosen_compute_dtype, load_base
from gradientspace_ray.recipe import ClustersSection, RouterSection
from gradientspace_ray.router.encoder import PromptEncoder

METHODS: tuple[Method, ...] = ("graph", "kmeans")
DEFAULT_FEATURES = f"svd_{RANK}"
STABILITY_REPEATS = 10


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print tables, and write the JSON file where one is wanted."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    console = Console(width=None if sys.stdout.isatty() else 110)
    try:
        report = planted(options, console) if options.planted else studied(options, console)
    except (TaskError, MethodError, SourceError, ModelError, UnsupportedModelError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    report = {"machine": machine(torch.device("cpu")), **report}
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    if options.planted:
        show_planted(report["planted"], console)
    else:
        show(report, console)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    defaults = ClustersSection()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="OUT", help="where the results go, beside the tables printed")
    parser.add_argument("--data", metavar="DIR", help="JSONL files, mixed evenly; without, the built-in mixture")
    parser.add_argument("--model", default=CHAT_MODEL, metavar="NAME", help="a local folder, or a Hugging Face name")
    parser.add_argument("--encoder", default=RouterSection().encoder, metavar="NAME", help="of the embeddings")
    dtypes = ("auto", "bfloat16", "float32")
    parser.add_argument("--dtype", choices=dtypes, default="auto", help="of the model and its products; default: auto")
    parser.add_argument("--examples", type=int, default=620, metavar="N", help="default: 620")
    marks = "of 8 examples, all of which are studied; the first is what the others are compared with; default: 80,24"
    parser.add_argument("--warm-up-steps", type=_numbers, default=[80, 24], metavar="A,B", help=marks)
    policies = "whose gradients are taken after the first warm-up, response beside others; default: all of them"
    parser.add_argument("--labels", default="response,all,instruction", metavar="A,B", help=policies)
    parser.add_argument("--count", type=int, metavar="C", help="clusters; default: chosen from the data")
    parser.add_argument("--neighbours", type=int, default=defaults.neighbours, metavar="M", help="of the graph")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep features there, and take those that are there")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="for gradients; default: the system's place")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N", help="PyTorch's")
    made_up = parser.add_argument_group("made-up gradients")
    made_up.add_argument("--planted", action="store_true", help="cluster these instead")
    sizes = f"numbers of examples; default: {','.join(map(str, SIZES))}"
    made_up.add_argument("--sizes", type=_numbers, default=[*SIZES], metavar="A,B", help=sizes)
    cosine = "mean cosine of two gradients of a group; default: 0.07, as of real ones"
    made_up.add_argument("--cosine", type=float, default=0.07, metavar="X", help=cosine)
    return parser.parse_args(arguments)


def _numbers(text: str) -> list[int]:
    if not all(part.isdecimal() and int(part) for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text} is no list of positive numbers")
    return [int(part) for part in text.split(",")]


def planted(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The report of `--planted`: every size in a process of its own, so that each has its own peak of memory."""
    results = []
    for examples in options.sizes:
        task = Planted(examples, options.cosine, ClustersSection().max_count, options.neighbours, SEED)
        results.append(in_new_process("cluster_planted.py", task._asdict(), options.threads))
        console.print(f"{examples:,} examples: {results[-1]['seconds']:.1f} s")
    return {"planted": results}


def studied(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The report of all features."""
    first, *others = options.warm_up_steps
    labels = [policy for policy in options.labels.split(",") if policy != "response"]
    passes = [Pass(first, "response"), *(Pass(first, policy) for policy in labels)]
    passes += [Pass(steps, "response") for steps in others]
    with tempfile.TemporaryDirectory(prefix="cluster-benchmark-", dir=options.scratch) as folder:
        data = options.data or mixture_folder(Path(folder), options.examples)
        rows = read_labelled_examples(data, options.examples, options.model)
        made = features_of_passes(options, rows, passes, Path(folder), console)
    tokens_N = np.array([len(row.example[0]) for row in rows])
    encoder = PromptEncoder(options.encoder, RouterSection().max_tokens)
    encodings_NH = encoder.encode([prompt_view(row.record.messages, RouterSection().view) for row in rows])
    features = features_by_name(made, encodings_NH, tokens_N)
    count, candidates = options.count, {}
    if not count:
        maximum = ClustersSection().max_count
        count, candidates = choose_count(features[DEFAULT_FEATURES], maximum, "graph", options.neighbours, SEED)
    domains = [row.record.domain for row in rows]
    report: dict[str, Any] = {
        "data": options.data,
        "model": options.model,
        "dtype": chosen_compute_dtype(options.dtype, "cpu"),
        "examples": len(rows),
        "tokens": int(tokens_N.sum()),
        "domains": sorted({domain for domain in domains if domain}),
        "count": count,
        "candidates": candidates,
        "neighbours": options.neighbours,
        "variance_at_random": (len(rows) - count) / (len(rows) - 1),
        "features": {},
    }
    for name, feature_NK in features.items():
        report["features"][name] = _judged(feature_NK, features["full_gradient"], domains, count, options)
        shown = report["features"][name]
        console.print(f"{name}: nn {shown['nn_purity']:.3f}, NMI {shown['methods']['graph']['nmi']:.3f}")
    report["baselines"] = _baselines(features, encodings_NH, tokens_N, domains, count)
    return report


def features_of_passes(
    options: argparse.Namespace,
    rows: Sequence[LabelledExample],
    passes: Sequence[Pass],
    scratch: Path,
    console: Console,
) -> dict[Pass, dict[str, np.ndarray]]:
    """Features of every pass, kept in `--cache`."""
    dtype = chosen_compute_dtype(options.dtype, "cpu")
    facts = json.dumps([options.model, options.data, dtype, [row.example for row in rows]])
    name = hashlib.sha256(facts.encode()).hexdigest()[:16]
    files = {one: (options.cache or scratch) / f"{name}.{one.warm_up_steps}.{one.labels}.npz" for one in passes}
    missing = [one for one, file in files.items() if not file.exists()]
    if missing:
        model = add_lora(load_base(options.model, dtype), LORA_RANK, LORA_ALPHA, "all-linear", SEED)
        marks = sorted({one.warm_up_steps for one in missing})
        examples = [row.example for row in rows]
        for steps, moments in warmed_up(model, examples, marks, as_dtype(dtype), console.print):
            for one in missing:
                if one.warm_up_steps == steps:
                    arguments = (model, rows, one.labels, moments, as_dtype(dtype), scratch, console.print)
                    files[one].parent.mkdir(parents=True, exist_ok=True)
                    np.savez(files[one], **features_of_pass(*arguments))
    return {one: dict(np.load(file)) for one, file in files.items()}


def _judged(
    feature_NK: np.ndarray,
    gradients_NK: np.ndarray,
    domains: Sequence[str | None],
    count: int,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """One set of features under every method."""
    methods = {}
    for method in METHODS:
        settings: dict[str, Any] = {"method": method, "neighbours": options.neighbours, "seed": SEED}

        def cluster_again(chosen: np.ndarray, settings: dict[str, Any] = settings) -> np.ndarray:
            return clusters_of(feature_NK[chosen], min(count, len(chosen)), **settings)

        labels_N = cluster_again(np.arange(len(feature_NK)))
        methods[method] = {
            **quality.agreement(labels_N, domains),
            "stability": quality.stability(labels_N, cluster_again, STABILITY_REPEATS, SEED),
            "variance_inside": quality.variance_inside(gradients_NK, labels_N)["share"],
        }
    purity = quality.nearest_neighbour_purity(feature_NK, domains, SEED)
    return {"dimensions": feature_NK.shape[1], "nn_purity": purity, "methods": methods}


def _baselines(
    features: dict[str, np.ndarray],
    encodings_NH: np.ndarray,
    tokens_N: np.ndarray,
    domains: Sequence[str | None],
    count: int,
) -> dict[str, dict[str, float]]:
    """What `clusters.method` gives for each baseline."""
    labels = {
        "random": random_labels(len(tokens_N), count, SEED),
        "length": length_labels(tokens_N, count, SEED),
        "embedding": spherical_kmeans(encodings_NH, count, SEED),
    }
    labels |= {name: birch_labels(features[name], count, SEED) for name in features if name.startswith("random_proj")}
    gradients_NK = features["full_gradient"]
    return {
        name: {
            **quality.agreement(labels_N, domains),
            "variance_inside": quality.variance_inside(gradients_NK, labels_N)["share"],
        }
        for name, labels_N in labels.items()
    }


def show(report: dict[str, Any], console: Console) -> None:
    """One table of features and methods, and a line for each baseline."""
    sizes = f"{report['examples']} examples, {report['tokens']} tokens, {len(report['domains'])} domains"
    at_random = f"{report['count']} clusters; at random {report['variance_at_random']:.4f} of the variance is inside"
    table = Table(title=f"{report['model']}, {report['dtype']}; {sizes}\n{at_random}")
    table.add_column("features")
    for heading in ("numbers", "nn", *(f"{method} {what}" for method in METHODS for what in ("NMI", "ARI", "stable"))):
        table.add_column(heading, justify="right")
    table.add_column("variance", justify="right")
    for name, result in report["features"].items():
        cells = [name, str(result["dimensions"]), _three(result["nn_purity"])]
        for method in METHODS:
            cells += [_three(result["methods"][method].get(key)) for key in ("nmi", "ari", "stability")]
        table.add_row(*cells, f"{result['methods']['graph']['variance_inside']:.4f}")
    console.print(table)
    for name, result in report["baselines"].items():
        agreement = f"NMI {_three(result.get('nmi'))}, ARI {_three(result.get('ari'))}"
        console.print(f"baseline {name}: {agreement}, variance inside {result['variance_inside']:.4f}")


def _three(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    main()
