"""Experts against the single LoRA at equal training tokens, for several settings of the budget: held-out losses.

The budget is one pass over the training examples. The single LoRA spends it in one piece, from a fresh adapter; the
others give a share of it to a generalist, and the rest to experts that continue it, its optimizer and its learning
rate. A domain's expert serves the domain's held-out examples, as if the router were perfect. Those of the gradient
clusters are served by a router that learned from the training prompts, and by an oracle, which takes the lowest loss of
the experts, example by example, and which no router can be.

The learning rate is the baseline's best: it is chosen on a validation part, by runs of the single LoRA on a share of
the budget, for each size of its steps. Three are tried, and twice or half as much while the best is the highest or the
lowest. The generalist has that of its own steps, and the experts the generalist's, scaled to theirs as a recipe does.
The clusters are those found at the generalist that had half of the examples.

    python jobs/benchmarks/expert_study.py --data DIR --cache DIR

Shapes: N held-out examples.
"""

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any

from expert_study_contenders import SETTINGS, Contender, Setting, Study
from expert_study_data import Parts, read_parts
from expert_study_desk import Desk, Tell
from expert_study_worker import Place
from gradient_task import SEED, TaskError
from rich.console import Console
from rich.table import Table

from gradientspace_ray.evaluation.intervals import bootstrap_intervals
from gradientspace_ray.examples.formats import SourceError
from gradientspace_ray.models.bundled import CHAT_MODEL
from gradientspace_ray.models.loading import ModelError, chosen_compute_dtype, resolve_model
from gradientspace_ray.training.engine import TrainingError

CONFIDENCE = 0.95
SINGLE = "single LoRA"


def main(arguments: Sequence[str] | None = None) -> None:
    """Study, print the table, and write the JSON file where one is wanted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="OUT", help="where the results go, beside the table")
    parser.add_argument("--data", required=True, metavar="DIR", help="JSONL files whose rows have domains")
    parser.add_argument("--model", default=CHAT_MODEL, metavar="NAME", help="a local folder, or a Hugging Face name")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="default: auto")
    add_options(parser)
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        report = study(options, console)
    except (TaskError, SourceError, ModelError, TrainingError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    show_study(report, console)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The study's own options, beside `--data`, `--model` and `--dtype`."""
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--examples", type=int, default=1000, metavar="N", help="to train on; default: 1000")
    parser.add_argument("--validation", type=int, default=20, metavar="N", help="of each domain; default: 20")
    parser.add_argument("--held-out", type=int, default=40, metavar="N", help="of each domain; default: 40")
    settings = f"of the budget, the first of {len(SETTINGS)}; default: all"
    parser.add_argument("--settings", type=int, default=len(SETTINGS), metavar="N", help=settings)
    parser.add_argument("--cache", type=Path, required=True, metavar="DIR", help="where what is done is kept")
    parser.add_argument("--processes", type=int, default=cores, metavar="N", help=f"of one thread; default: {cores}")


def study(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The report, for `show_study` and as JSON. Results are printed as they come.

    Args:
        options: `data`, `model`, `dtype`, and those of `add_options`.
        console: where lines go.

    Raises:
        TaskError: there are too few examples, or a process died.
        SourceError: `data` cannot be read.
        ModelError: there is no such model.
        TrainingError: a loss was not finite.
    """

    def tell(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    resolve_model(options.model)  # a bundled model is unpacked once, and not by all processes at the same time
    parts = read_parts(options.data, options.model, options.examples, options.validation, options.held_out)
    place = Place(options.model, chosen_compute_dtype(options.dtype, "cpu"), str(options.cache))
    tell(f"{len(parts.training)} training examples, {sum(row.tokens for row in parts.training)} tokens")
    try:
        done = asyncio.run(_studied(parts, SETTINGS[: options.settings], place, options.processes, tell))
    except BrokenExecutor as error:
        raise TaskError("a process died, perhaps for want of memory; the same command goes on from there") from error
    return {"data": options.data, "model": options.model, "dtype": place.dtype, **report(done)}


async def _studied(parts: Parts, settings: Sequence[Setting], place: Place, processes: int, tell: Tell) -> Study:
    desk = Desk(place, processes, tell)
    try:
        done = Study(parts, settings, desk, tell)
        await done.run()
        return done
    finally:
        desk.close()


def report(done: Study) -> dict[str, Any]:
    """All that was found, as JSON; differences are to the single LoRA that has the lower loss on what is held out."""
    contenders, domains = done.contenders, [row.domain for row in done.parts.training]
    baseline = min((name for name in contenders if name.startswith(SINGLE)), key=lambda name: done.means(name)["mean"])
    differences = {name: one.losses_N - contenders[baseline].losses_N for name, one in contenders.items()}
    intervals = bootstrap_intervals(differences, CONFIDENCE, SEED)
    return {
        "training": {domain: domains.count(domain) for domain in done.parts.domains},
        "tokens": sum(row.tokens for row in done.parts.training),
        "held_out": len(done.parts.held_out),
        "domains": done.parts.domains,
        "baseline": baseline,
        "learning_rates": done.tries,
        "clusters": done.clusters,
        "contenders": {
            name: {
                "losses": done.means(name),
                "difference": vars(intervals[name]),
                "setting": one.setting._asdict() if one.setting else None,
                "learning_rate": one.learning_rate,
                "tokens": one.tokens,
                "steps": one.start.steps,
                "expert_steps": {group: expert.steps for group, expert in one.experts.items()},
            }
            for name, one in sorted(contenders.items(), key=lambda item: _order(*item))
        },
    }


def _order(name: str, contender: Contender) -> tuple[int, str]:
    """What all settings share comes first, then setting by setting."""
    if contender.setting:
        return 3 + SETTINGS.index(contender.setting), "" if name.startswith("domains") else name[::-1]
    return ("base", "generalist", SINGLE).index(name.split(",")[0].rstrip(" .0123456789")), name


def show_study(report: dict[str, Any], console: Console) -> None:
    """One table: contenders and settings by domains, what each has been trained with; then rates and clusters."""
    examples = ", ".join(f"{domain} {number}" for domain, number in report["training"].items())
    title = f"{report['model']}, {report['dtype']}; budget {report['tokens']} tokens: {examples}\n"
    title += f"nats per label token, {report['held_out']} held-out examples; difference to {report['baseline']}"
    table = Table(title=title, padding=(0, 0))
    table.add_column("contender")
    for heading in (*report["domains"], "mean", "difference, 95 %", "rate", "steps", "tokens"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, one in report["contenders"].items():
        gap, rate = one["difference"], one["learning_rate"]
        difference = f"{gap['mean']:+.3f} {gap['low']:+.3f}..{gap['high']:+.3f}" if name != report["baseline"] else ""
        steps = "/".join(map(str, one["expert_steps"].values()))
        table.add_row(
            name,
            *(f"{loss:.3f}" for loss in one["losses"].values()),
            difference,
            f"{rate:g}" if rate else "",
            f"{one['steps']}+{steps}" if steps else str(one["steps"]),
            str(one["tokens"]),
        )
    console.print(table)
    for whose, losses in report["learning_rates"].items():
        told = ", ".join(f"{rate} {loss:.3f}" for rate, loss in losses.items())
        console.print(f"learning rates of {whose}, on validation: {told}", highlight=False)
    for label, domains in report["clusters"]["domains_of"].items():
        told = ", ".join(f"{domain} {number}" for domain, number in domains.items())
        console.print(f"cluster {label}: {told}", highlight=False)


if __name__ == "__main__":
    main()
