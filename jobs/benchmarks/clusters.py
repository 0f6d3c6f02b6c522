"""Measure which gradient features, and which clustering, find the skills of a mixture.

python jobs/benchmarks/clusters.py [--data DIR] [--json OUT]
python jobs/benchmarks/clusters.py --planted [--json OUT]

An adapter is warmed up on the examples themselves, as a run's generalist is, but at a constant learning rate. Then
every example's gradient is taken, features are made of all of them, and each set of features is clustered by every
method into the same number of clusters: the one that the default method chooses from the default features, without
looking at any label. The hidden domains (each row's `domain`) only judge.

* nn: share of examples whose nearest neighbour, by cosine of these features, has their domain.
* NMI, ARI: agreement of the clusters with the domains. Each row has the same number of clusters, so they compare; the
  JSON file has it for as many clusters as there are domains, too (`at_domains`).
* stable: mean adjusted Rand index between the clusters and those of ten random subsamples of 80 %.
* length: share of the variance of the answers' log length that lies between the clusters; the title has the domains'.
* inside: what is left inside the clusters of the variance of the full gradients; needs no label. Gradients are nearly
  orthogonal, so it is near 1 for all; random clusters have the number in the table's title.

Features: `svd_64` is the online SVD that a run makes; `exact_svd_64` and all variants are exact. Random projections are
the means of three. `all` and `instruction` are gradients of other tokens' losses. `scaled` tells how gradients are:
`plain` scales each to unit length, `module` first each adapted layer's part of it, `adam` and `less` as the warm-up's
optimizer would, `none` not at all. Parts of the layers are taken of plain ones. `length` places examples on a quarter
of a circle by the logarithm of their tokens.

`--planted` clusters made-up gradients of up to a million examples instead; see cluster_planted.py.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from cluster_features import DEFAULT, FULL, SCALINGS, Features, all_features
from cluster_gradients import FACTS, Pass, products_of_pass, warmed_up
from cluster_planted import SIZES, SUBSPACE_ENERGY, Planted, show_planted
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
from gradientspace_ray.examples.packing import IGNORED
from gradientspace_ray.examples.rendering import prompt_view
from gradientspace_ray.models.attention import UnsupportedModelError
from gradientspace_ray.models.bundled import CHAT_MODEL
from gradientspace_ray.models.fingerprint import model_fingerprint
from gradientspace_ray.models.loading import ModelError, add_lora, as_dtype, chosen_compute_dtype, load_base
from gradientspace_ray.recipe import ClustersSection, GradientsSection, RouterSection
from gradientspace_ray.router.encoder import PromptEncoder

METHODS: tuple[Method, ...] = ("graph", "kmeans")
POLICIES = ("response", "all", "instruction")
STABILITY_REPEATS = 10


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print tables, and write the JSON file where one is wanted."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    console = Console(width=None if sys.stdout.isatty() else 110)
    try:
        report = planted(options, console) if options.planted else studied(options, console)
    except (TaskError, MethodError, SourceError, ModelError, UnsupportedModelError, ValueError, OSError) as error:
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
    parser.add_argument("--examples", type=_positive, default=620, metavar="N", help="default: 620")
    marks = "of 8 examples, all of which are studied; the first is what the others are compared with; default: 80,24"
    parser.add_argument("--warm-up-steps", type=_numbers, default=[80, 24], metavar="A,B", help=marks)
    policies = "whose gradients are taken after the first warm-up, response beside others; default: all of them"
    parser.add_argument("--labels", type=_policies, default=[*POLICIES], metavar="A,B", help=policies)
    default = _scaling(GradientsSection())
    parser.add_argument("--scaling", choices=SCALINGS, default=default, help=f"of gradients; default: {default}")
    parser.add_argument("--count", type=_positive, metavar="C", help="clusters; default: chosen from the data")
    parser.add_argument("--neighbours", type=_positive, default=defaults.neighbours, metavar="M", help="of the graph")
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="keep products of gradients there, and take those that are there"
    )
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="for gradients; default: the system's place")
    parser.add_argument("--threads", type=_positive, default=torch.get_num_threads(), metavar="N", help="PyTorch's")
    made_up = parser.add_argument_group("made-up gradients")
    made_up.add_argument("--planted", action="store_true", help="cluster these instead")
    sizes = f"numbers of examples; default: {','.join(map(str, SIZES))}"
    made_up.add_argument("--sizes", type=_numbers, default=[*SIZES], metavar="A,B", help=sizes)
    cosines = "mean cosines of two gradients of a group; default: 0.07,0.04, as of real ones"
    made_up.add_argument("--cosines", type=_shares, default=[0.07, 0.04], metavar="X,Y", help=cosines)
    return parser.parse_args(arguments)


def _scaling(settings: GradientsSection) -> str:
    """What a run does by default."""
    if settings.preconditioner != "none":
        return settings.preconditioner
    return "module" if settings.normalisation == "module" else "plain"


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is no positive number")
    return int(text)


def _numbers(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def _policies(text: str) -> list[str]:
    if unknown := [name for name in text.split(",") if name not in POLICIES]:
        raise argparse.ArgumentTypeError(f"no labels {', '.join(unknown)}; there are {', '.join(POLICIES)}")
    return text.split(",")


def _shares(text: str) -> list[float]:
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is no list of numbers") from error
    if not all(0 <= share <= 1 - SUBSPACE_ENERGY for share in shares):
        raise argparse.ArgumentTypeError(f"{text}: give cosines of 0 to {1 - SUBSPACE_ENERGY:g}")
    return shares


def planted(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The report of `--planted`: every size in a process of its own, so that each has its own peak of memory."""
    results = []
    for cosine, examples in product(options.cosines, options.sizes):
        task = Planted(examples, cosine, ClustersSection().max_count, options.neighbours, SEED)
        results.append(in_new_process("cluster_planted.py", task._asdict(), options.threads))
        console.print(f"{examples:,} examples: {results[-1]['seconds']:.1f} s")
    return {"planted": results}


def studied(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The report of all features."""
    first, *others = options.warm_up_steps
    labels = [policy for policy in options.labels if policy != "response"]
    passes = [Pass(first, "response"), *(Pass(first, policy) for policy in labels)]
    passes += [Pass(steps, "response") for steps in others]
    with tempfile.TemporaryDirectory(prefix="cluster-benchmark-", dir=options.scratch) as folder:
        data = options.data or mixture_folder(Path(folder), options.examples)
        rows = read_labelled_examples(data, options.examples, options.model)
        made = products_of_passes(options, rows, passes, Path(folder), console)
    tokens_N = np.array([len(row.example[0]) for row in rows])
    encoder = PromptEncoder(options.encoder, RouterSection().max_tokens)
    encodings_NH = encoder.encode([prompt_view(row.record.messages, RouterSection().view) for row in rows])
    features = all_features(made, options.scaling, encodings_NH, tokens_N)
    coordinates_NK = _named(features, DEFAULT)
    count, candidates = options.count, {}
    if not count:
        maximum = ClustersSection().max_count
        count, candidates = choose_count(coordinates_NK, maximum, "graph", options.neighbours, SEED)
    setting = Setting(
        domains=[row.record.domain for row in rows],
        response_tokens_N=np.array([sum(label != IGNORED for label in row.example[1]) for row in rows]),
        gradients_NK=_named(features, FULL),
        count=count,
        neighbours=options.neighbours,
    )
    report: dict[str, Any] = {
        "data": options.data,
        "model": options.model,
        "dtype": chosen_compute_dtype(options.dtype, "cpu"),
        "examples": len(rows),
        "tokens": int(tokens_N.sum()),
        "domains": setting.known,
        "scaling": options.scaling,
        "count": count,
        "candidates": candidates,
        "neighbours": options.neighbours,
        "variance_at_random": (len(rows) - count) / (len(rows) - 1),
        "length_explained_by_domains": setting.length_explained_by_domains(),
        "features": {},
    }
    for one in features:
        report["features"][one.name] = result = judged(one, setting)
        graph = result["methods"]["graph"]
        console.print(f"{one.name}: nn {_three(result['nn_purity'])}, NMI {_three(graph['nmi'])}")
    report["baselines"] = baselines(features, encodings_NH, tokens_N, setting)
    return report


def _named(features: Sequence[Features], name: str) -> np.ndarray:
    return next(one.made_NK[0] for one in features if one.name == name)


def products_of_passes(
    options: argparse.Namespace,
    rows: Sequence[LabelledExample],
    passes: Sequence[Pass],
    scratch: Path,
    console: Console,
) -> dict[Pass, dict[str, np.ndarray]]:
    """Products of every pass, kept in `--cache`."""
    dtype = chosen_compute_dtype(options.dtype, "cpu")
    facts = json.dumps([FACTS, model_fingerprint(options.model), dtype, [row.example for row in rows]])
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
                    unfinished = files[one].with_suffix(".unfinished.npz")
                    np.savez(unfinished, **products_of_pass(*arguments))
                    unfinished.replace(files[one])
    return {one: dict(np.load(file)) for one, file in files.items()}


class Setting(NamedTuple):
    """What every set of features is judged with."""

    domains: Sequence[str | None]
    response_tokens_N: np.ndarray
    gradients_NK: np.ndarray
    """Coordinates of the full gradients."""
    count: int
    neighbours: int

    @property
    def known(self) -> list[str]:
        """The domains there are."""
        return sorted({domain for domain in self.domains if domain})

    def length_explained_by_domains(self) -> float:
        """Share of the variance of log answer tokens that lies between the domains."""
        places = np.array([self.known.index(domain) if domain else -1 for domain in self.domains])
        return float(quality.length(places, self.response_tokens_N)["explained"])


def judged(features: Features, setting: Setting) -> dict[str, Any]:
    """One set of features under every method: means over the seeds that it was made with."""
    results = [_judged(feature_NK, setting) for feature_NK in features.made_NK]
    report = {"dimensions": features.dimensions, **_mean(results)}
    if len(results) > 1:
        report["nn_purity_of_seeds"] = [result["nn_purity"] for result in results]
    return report


def _judged(feature_NK: np.ndarray, setting: Setting) -> dict[str, Any]:
    methods = {}
    for method in METHODS:

        def clusters(chosen: np.ndarray, count: int, method: Method = method) -> np.ndarray:
            return clusters_of(feature_NK[chosen], min(count, len(chosen)), method, setting.neighbours, SEED)

        everything = np.arange(len(feature_NK))
        labels_N = clusters(everything, setting.count)
        repeated = partial(clusters, count=setting.count)
        methods[method] = {
            **_worth(labels_N, setting),
            "stability": quality.stability(labels_N, repeated, STABILITY_REPEATS, SEED),
            "at_domains": _agreement(clusters(everything, max(1, len(setting.known))), setting),
        }
    purity = quality.nearest_neighbour_purity(feature_NK, setting.domains, SEED)
    return {"nn_purity": purity, "methods": methods}


def _worth(labels_N: np.ndarray, setting: Setting) -> dict[str, Any]:
    return {
        **_agreement(labels_N, setting),
        "length_explained": quality.length(labels_N, setting.response_tokens_N)["explained"],
        "variance_inside": quality.variance_inside(setting.gradients_NK, labels_N)["share"],
    }


def _agreement(labels_N: np.ndarray, setting: Setting) -> dict[str, float | None]:
    """ARI, NMI and purity; None without domains."""
    return {"ari": None, "nmi": None, "purity": None, **quality.agreement(labels_N, setting.domains)}


def _mean(results: Sequence[Any]) -> Any:
    """Numbers at the same places, averaged."""
    if isinstance(results[0], dict):
        return {key: _mean([result[key] for result in results]) for key in results[0]}
    return results[0] if None in results or len(results) == 1 else type(results[0])(np.mean(results))


def baselines(
    features: Sequence[Features], encodings_NH: np.ndarray, tokens_N: np.ndarray, setting: Setting
) -> dict[str, dict[str, Any]]:
    """What `clusters.method` gives for each baseline."""
    labels = {
        "random": random_labels(len(tokens_N), setting.count, SEED),
        "length": length_labels(tokens_N, setting.count, SEED),
        "embedding": spherical_kmeans(encodings_NH, setting.count, SEED),
    }
    for one in features:
        if one.name.startswith("random_projection"):
            labels[one.name] = birch_labels(one.made_NK[0], setting.count, SEED)
    return {name: _worth(labels_N, setting) for name, labels_N in labels.items()}


def show(report: dict[str, Any], console: Console) -> None:
    """One table of features and methods, and a line for each baseline."""
    sizes = f"{report['examples']} examples, {report['tokens']} tokens, {len(report['domains'])} domains"
    title = f"{report['model']}, {report['dtype']}; {sizes}\n{report['count']} clusters, which at random leave"
    title += f" {report['variance_at_random']:.4f} of the variance inside; domains explain"
    title += f" {report['length_explained_by_domains']:.2f} of the length"
    table = Table(title=title, padding=(0, 0))
    table.add_column("features", no_wrap=True)
    headings = ["numbers", "nn", *(f"{method}\n{what}" for method in METHODS for what in ("NMI", "ARI", "stable"))]
    for heading in (*headings, "length", "inside"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, result in report["features"].items():
        cells = [name, str(result["dimensions"]), _three(result["nn_purity"])]
        for method in METHODS:
            cells += [_three(result["methods"][method][key]) for key in ("nmi", "ari", "stability")]
        graph = result["methods"]["graph"]
        table.add_row(*cells, f"{graph['length_explained']:.2f}", f"{graph['variance_inside']:.4f}")
    console.print(table)
    for name, result in report["baselines"].items():
        agreement = f"NMI {_three(result['nmi'])}, ARI {_three(result['ari'])}"
        console.print(f"baseline {name}: {agreement}, {result['variance_inside']:.4f} inside")


def _three(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    main()
