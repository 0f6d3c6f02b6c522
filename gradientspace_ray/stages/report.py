"""The report: reads what the other stages wrote and commits `report.html`. A part that is not there yet is left out."""

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from gradientspace_ray.evaluation.losses import BASE
from gradientspace_ray.evaluation.strategies import GENERALIST, SINGLE_LORA
from gradientspace_ray.recipe import Recipe
from gradientspace_ray.report import figures
from gradientspace_ray.report.clusters import cluster_cards, ordered_domains, worth
from gradientspace_ray.report.figures import LEFT_OUT, Cell, Range, colour
from gradientspace_ray.report.page import (
    Figure,
    Headline,
    Legend,
    Map,
    Page,
    Section,
    duration,
    render,
    shorten,
)
from gradientspace_ray.report.projection import project
from gradientspace_ray.report.training import how_it_went
from gradientspace_ray.run import RunDirectory, Summary
from gradientspace_ray.stages.progress import Bars

MAX_DOTS = 3000
MIN_EXAMPLES_TO_JUDGE = 30
"""Bootstrap intervals of fewer examples are too narrow."""
TIP_CHARACTERS = 220
GROUPED_BY = {
    "random": "at random",
    "length": "by the length of the examples",
    "embedding": "by embeddings of their prompts",
}
"""Of `clusters.method`; all others read gradients."""
STRATEGIES = {
    BASE: "base model",
    GENERALIST: "generalist",
    SINGLE_LORA: "single LoRA",
    "best_single": "best single expert",
    "routed": "routed experts",
    "oracle": "oracle",
}


@dataclass(frozen=True)
class Findings:
    """What the run directory holds; empty where a stage has not run."""

    examples: dict[str, dict[str, Any]]
    """Training examples by id: messages, prompt, domain."""
    cluster_of: dict[str, int]
    """By id; `LEFT_OUT` where an example is in none."""
    quality: dict[str, Any]
    names: tuple[str, ...]
    """Names of the clusters."""
    domains: tuple[str, ...]
    """Hidden labels; each one's place is its colour, which is its majority cluster's where that is free."""
    spectrum: dict[str, Any]
    scores: dict[str, Any]
    router: dict[str, Any]


def report(recipe: Recipe, run: RunDirectory) -> Summary:
    """Write `report.html`: one page that needs no network and no other file."""
    found = _read(run)
    with Bars() as bars:
        bars.update("map", 0, 1, "placing the examples")
        drawn_map = _map(recipe, run, found)
        bars.update("map", 1, 1)
    page = Page(
        name=recipe.name,
        subtitle=f"gradientspace run · {recipe.model.name} · {time.strftime('%d %B %Y, %H:%M')}",
        summary=_summary(found),
        headlines=_headlines(found, run),
        results=_results(found),
        map=drawn_map,
        clusters=cluster_cards(found.quality, found.names, found.examples, found.cluster_of, found.domains),
        worth=worth(found.quality, len(found.names)),
        training=_training(run),
        matrix=_matrix(found),
        router=_router(run, found),
        spectrum=_spectrum(found),
        stages=_stages(run),
        footer=_footer(recipe, run),
    )
    html = render(page).encode()
    run.write_bytes("report.html", html)
    return Summary(made=f"report.html, {len(html) / 1024:.0f} kB", counts={"bytes": len(html)})


def _read(run: RunDirectory) -> Findings:
    def json_or_empty(name: str) -> dict[str, Any]:
        return run.read_json(name) if run.exists(name) else {}

    def table_or_empty(name: str, columns: list[str]) -> pa.Table:
        return run.read_table(name, columns) if run.exists(name) else pa.table({column: [] for column in columns})

    rows = table_or_empty("examples/train.parquet", ["id", "messages", "prompt", "domain"]).to_pylist()
    assigned = table_or_empty("clusters/assignments.parquet", ["id", "cluster"]).to_pydict()
    examples = {row["id"]: row for row in rows}
    cluster_of = dict(zip(assigned["id"], assigned["cluster"], strict=True))
    quality = json_or_empty("clusters/quality.json")
    count = max(cluster_of.values(), default=-1) + 1
    names = quality.get("names") or [f"cluster-{index}" for index in range(count)]
    return Findings(
        examples=examples,
        cluster_of=cluster_of,
        quality=quality,
        names=tuple(names),
        domains=ordered_domains(examples, cluster_of, len(names)),
        spectrum=json_or_empty("sketch/spectrum.json"),
        scores=json_or_empty("evaluation/scores.json"),
        router=json_or_empty("router/router.json"),
    )


def _summary(found: Findings) -> str:
    losses = found.scores.get("heldout_loss")
    if not found.cluster_of:
        return "Nothing has been clustered yet: run the recipe further and write this report again."
    placed = sum(cluster != LEFT_OUT for cluster in found.cluster_of.values())
    grouped_by = GROUPED_BY.get(found.quality.get("method", ""), "by what they do to the weights")
    text = (
        f"{placed} training examples fall into {len(found.names)} groups {grouped_by}. Each group trained one LoRA "
        "expert; a router reads a prompt and picks one of them."
    )
    if not losses:
        return text
    difference = found.scores["intervals"]["difference"]["routed - generalist"]
    verdict = "which is no clear difference on so few examples"
    if found.scores["examples"] < MIN_EXAMPLES_TO_JUDGE:
        verdict = "too few examples to judge by"
    elif difference["high"] < 0:
        verdict = "a difference beyond chance"
    elif difference["low"] > 0:
        verdict = "worse beyond chance"
    return (
        f"{text} On {found.scores['examples']} held-out examples the loss goes from {losses[BASE]:.3f} (base model) "
        f"through {losses[GENERALIST]:.3f} (generalist) to {losses['routed']:.3f} (routed experts), {verdict}."
    )


def _headlines(found: Findings, run: RunDirectory) -> tuple[Headline, ...]:
    headlines = []
    scores = found.scores
    if scores.get("heldout_loss"):
        losses = scores["heldout_loss"]
        note = f"generalist {losses[GENERALIST]:.3f}, base {losses[BASE]:.3f} nats per token"
        headlines.append(Headline(f"{losses['routed']:.3f}", "held-out loss, routed", note))
        if scores["gap_closed"] is not None:
            note = "of the way from the generalist to the oracle"
            headlines.append(Headline(f"{scores['gap_closed']:.0%}", "gap closed", note))
        if scores["router_domain_accuracy"] is not None:
            note = f"picks the expert of lowest loss for {scores['router_accuracy']:.0%}"
            headlines.append(
                Headline(f"{scores['router_domain_accuracy']:.0%}", "prompts sent to their own skill", note)
            )
        else:
            headlines.append(Headline(f"{scores['router_accuracy']:.0%}", "router picks the expert of lowest loss"))
    if found.names:
        agreement = found.quality.get("ari")
        note = f"agreement with the hidden labels (ARI) {agreement:.2f}" if agreement is not None else ""
        headlines.append(Headline(str(len(found.names)), "clusters", note))
    seconds = sum(record.seconds for record in run.manifest().stages.values())
    if seconds:
        headlines.append(Headline(duration(seconds), "from data to router", f"{len(found.examples)} training examples"))
    return tuple(headlines)


def _results(found: Findings) -> Section | None:
    if not found.scores.get("heldout_loss"):
        return None
    intervals = found.scores["intervals"]
    level = f"{intervals['confidence']:.0%}"
    losses = [
        Range(STRATEGIES[name], **intervals["heldout_loss"][name], strong=name == "routed")
        for name in STRATEGIES
        if name in intervals["heldout_loss"]
    ]
    differences = [
        Range(f"minus {STRATEGIES[name.partition(' - ')[2]]}", **interval, strong=True)
        for name, interval in intervals["difference"].items()
        if not name.endswith(BASE)
    ]
    unit = "nats per label token, mean over examples"
    return Section(
        "results",
        "Does it help?",
        "Every held-out example was scored under every adapter. Lower is better. The oracle picks the best adapter for "
        "each example after the fact, which no router can beat.",
        (
            Figure("Held-out loss", figures.ranges(losses, unit), f"Dot: mean. Whisker: {level} bootstrap interval."),
            Figure(
                "Routed experts against the rest",
                figures.ranges(differences, f"difference in {unit}", zero=True),
                f"Paired differences with {level} intervals: left of zero, the routed experts are better.",
            ),
        ),
    )


def _map(recipe: Recipe, run: RunDirectory, found: Findings) -> Map | None:
    if not found.cluster_of or not run.exists("sketch/coordinates.parquet"):
        return None
    table = run.read_table("sketch/coordinates.parquet", ["id", "coordinates"])
    known = np.array([id_ in found.cluster_of for id_ in table["id"].to_pylist()])
    table = table.filter(pa.array(known))
    if table.num_rows > MAX_DOTS:
        chosen = np.random.default_rng([recipe.seed, 12]).choice(table.num_rows, MAX_DOTS, replace=False)
        table = table.take(np.sort(chosen))
    ids = table["id"].to_pylist()
    if not ids:
        return None
    coordinates_NK = np.array(table["coordinates"].to_pylist(), dtype=np.float32)
    clusters = [found.cluster_of[id_] for id_ in ids]
    domains = [found.examples[id_]["domain"] if id_ in found.examples else None for id_ in ids]
    others = [found.domains.index(domain) if domain else LEFT_OUT for domain in domains]
    group_names = {**dict(enumerate(found.names)), LEFT_OUT: "left out"}
    tips = [
        f"{group_names[cluster]}{f' · {domain}' if domain else ''}\n"
        + shorten(found.examples.get(id_, {}).get("prompt", ""), TIP_CHARACTERS)
        for id_, cluster, domain in zip(ids, clusters, domains, strict=True)
    ]
    labelled = any(domains)
    return Map(
        svg=figures.scatter(project(coordinates_NK, recipe.seed), clusters, tips, others if labelled else None),
        caption=f"{len(ids)} of {len(found.cluster_of)} training examples; t-SNE of {coordinates_NK.shape[1]} sketch "
        "coordinates scaled to unit length. Neighbourhoods mean something, distances between groups little.",
        clusters=tuple(
            Legend(name, colour(group), group)
            for group, name in group_names.items()
            if group != LEFT_OUT or LEFT_OUT in clusters
        ),
        domains=tuple(Legend(name, colour(index), index) for index, name in enumerate(found.domains) if name),
    )


def _training(run: RunDirectory) -> Section | None:
    def record(folder: str) -> dict[str, Any] | None:
        file = f"{folder}/training.json"
        return run.read_json(file) if run.exists(file) else None

    experts = [found for name in run.names("experts") if (found := record(f"experts/{name}"))]
    return how_it_went(record(GENERALIST), experts, record(SINGLE_LORA))


def _matrix(found: Findings) -> Section | None:
    """Mean test loss of each group of examples under each adapter, tinted by the distance from the generalist."""
    table = found.scores.get("by_domain") or found.scores.get("by_routed")
    if not table:
        return None
    strategies = set(STRATEGIES) - {BASE, GENERALIST, SINGLE_LORA}
    columns = [name for name in next(iter(table.values())) if name not in strategies | {"examples"}]
    experts = [name for name in columns if name not in (BASE, GENERALIST)]
    scale = max((abs(row[name] - row[GENERALIST]) for row in table.values() for name in experts), default=0.0) or 1.0
    cells = []
    for group, row in table.items():
        best = min(columns, key=lambda name, row=row: row[name])  # type: ignore[misc]
        cells.append(
            [
                Cell(
                    text=f"{row[name]:.3f}",
                    tint=float(np.clip((row[name] - row[GENERALIST]) / scale, -1, 1)),
                    strong=name == best,
                    tip=f"{group} under {name}: {row[name]:.4f}\n"
                    f"{row[name] - row[GENERALIST]:+.4f} against the generalist",
                )
                for name in columns
            ]
        )
    rows = [f"{group} ({row['examples']})" for group, row in table.items()]
    what = "their hidden label" if found.scores.get("by_domain") else "the adapter that served them"
    svg = figures.matrix(rows, [STRATEGIES.get(name, name) for name in columns], cells, "Losses by group and adapter")
    return Section(
        "losses",
        "Who is good at what",
        f"Mean loss of the held-out examples, grouped by {what}, under every adapter.",
        (Figure("Loss matrix", svg, "Green: lower than the generalist. Red: higher. Framed: the lowest of the row."),),
    )


def _router(run: RunDirectory, found: Findings) -> Section | None:
    if not found.router or not run.exists("evaluation/losses.parquet"):
        return None
    losses = run.read_table("evaluation/losses.parquet", ["split", "domain", "routed", "confidence"])
    test = [row for row in losses.to_pylist() if row["split"] == "test"]
    if not test:
        return None
    confidence_N = np.array([row["confidence"] for row in test])
    histogram = figures.histogram(confidence_N, found.router["threshold"])
    abstained = sum(row["routed"] == GENERALIST for row in test) / len(test)
    threshold = found.router["threshold"]
    abstains = f"below {threshold:.2f} the generalist answers" if threshold <= 1 else "the generalist answers always"
    judges_likeness = found.router.get("min_similarity") is not None
    strangers = " Prompts unlike all of its training go to the generalist." if judges_likeness else ""
    parts = [Figure("How sure it is", histogram, f"{abstained:.0%} of the held-out prompts went to the generalist.")]
    if any(row["domain"] for row in test):
        parts.insert(0, _traffic(found, test))
    accuracy = found.router["calibration"].get("cross_validated_accuracy")
    told = f"In cross-validation it finds the cluster of {accuracy:.0%} of the training prompts. " if accuracy else ""
    text = (
        f"A linear head on {found.router['encoder']} reads the prompt only. {told}Its confidence is calibrated with "
        f"temperature {found.router['temperature']:.2f}; "
        f"{abstains if threshold else 'no confidence is too low'}.{strangers}"
    )
    return Section("router", "The router", text, tuple(parts))


def _traffic(found: Findings, test: list[dict[str, Any]]) -> Figure:
    """Which expert served the held-out prompts of each domain."""
    counts = Counter((row["domain"] or "none", row["routed"]) for row in test)
    rows = sorted({domain for domain, _ in counts})
    columns = [*found.router["labels"], GENERALIST]
    sizes = {domain: sum(counts[domain, name] for name in columns) for domain in rows}
    cells = [
        [
            Cell(
                text=str(counts[domain, name]) if counts[domain, name] else "·",
                tint=-counts[domain, name] / max(sizes[domain], 1),
                tip=f"{counts[domain, name]} of {sizes[domain]} prompts of {domain} were served by {name}",
            )
            for name in columns
        ]
        for domain in rows
    ]
    return Figure("Where the prompts of each hidden label went", figures.matrix(rows, columns, cells, "Traffic"))


def _spectrum(found: Findings) -> Section | None:
    spectrum = found.spectrum
    if not spectrum or not spectrum["singular_values"]:
        return None
    shares = spectrum["captured_share_of_example"]["quantiles"]
    return Section(
        "spectrum",
        "What the sketch kept",
        f"{spectrum['examples']} gradients of {spectrum['dimension']:,} numbers each went into a sketch of "
        f"{len(spectrum['singular_values'])} directions, which holds {spectrum['captured_share']:.1%} of their energy, "
        f"and of most gradients {shares['0.05']:.0%} to {shares['0.95']:.0%}.",
        (
            Figure(
                "Spectrum of the gradients",
                figures.spectrum(spectrum["singular_values"], spectrum["energy_total"]),
                "Left: share of the energy in each direction, largest first. Right: of all directions up to it.",
            ),
        ),
    )


def _stages(run: RunDirectory) -> Section | None:
    records = run.manifest().stages
    rows = [(name, record.seconds, duration(record.seconds)) for name, record in records.items() if record.seconds]
    if not rows:
        return None
    figure = Figure("Seconds of each stage", figures.bars(rows, "Time of each stage"))
    return Section("stages", "Where the time went", "", (figure,))


def _footer(recipe: Recipe, run: RunDirectory) -> tuple[tuple[str, str], ...]:
    versions = next((record.versions for record in run.manifest().stages.values() if record.versions), {})
    shown = [(name, versions[name]) for name in ("gradientspace-ray", "ray", "torch", "peft") if name in versions]
    return (("run directory", run.uri), ("base model", recipe.model.name), ("seed", str(recipe.seed)), *shown)
