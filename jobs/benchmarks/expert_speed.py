"""How fast adapters are trained: the project's loop beside other trainers, and experts at once or one after the other.

Each trainer has its best settings, found beforehand on some of the steps; the project's has the recipe's. Then every
round runs every trainer once, in an order that rotates, each time in a new process. Ratios are taken within a round, so
that a machine that slows down favours nobody.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from expert_trainers import OURS, TRANSFORMERS, TRL, Job, Settings
from gradient_task import SHAPES, made_up_examples, mixture_folder, random_base, read_examples
from rich.console import Console
from rich.table import Table
from sketch_methods import MethodError, in_new_process
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from gradientspace_ray.examples.packing import Example
from gradientspace_ray.models.loading import as_dtype, without_progress_bars
from gradientspace_ray.training.schedule import plan_steps

TUNING_STEPS = 3
COMPARED_STEPS = 1 + TUNING_STEPS
"""Losses of so many first steps are compared; rounding errors grow with every step."""
LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}
"""Nats: differences that rounding may make; larger ones are another loss."""
NEEDS = {OURS: (), TRL: ("trl", "datasets"), TRANSFORMERS: ("accelerate",)}
Tell = Callable[[str], None]


def study(options: argparse.Namespace, console: Console, scratch: Path) -> dict[str, Any]:
    """Parts of the report: `speed`, `start_seconds` and `concurrent`.

    Raises:
        TaskError: there are too few examples.
        MethodError: a process failed, or two trainers do not compute the same.
    """
    model = options.model
    if options.shape:
        model = str(write_model(scratch / "model", options.shape, as_dtype(options.dtype), options.device))
    count = max(options.examples, options.experts * options.expert_examples)
    if options.shape:
        examples = made_up_examples(count, SHAPES[options.shape]["vocab_size"])
    else:
        examples = read_examples(options.data or mixture_folder(scratch, count), count, model)
    tell = console.print
    report: dict[str, Any] = {
        "model": options.shape or options.model,
        "data": options.data,
        "dtype": options.dtype,
        "device": options.device,
        "examples": options.examples,
        "examples_per_step": options.examples_per_step,
        "start_seconds": {},
    }
    if "speed" in options.parts:
        report |= speed(options, model, examples[: options.examples], scratch, tell)
    if "concurrent" in options.parts:
        own = examples[: options.experts * options.expert_examples]
        report["concurrent"], start = concurrent(options, model, own, scratch, tell)
        report["start_seconds"]["stage"] = start
    return report


def write_model(folder: Path, shape: str, dtype: Any, device: str = "cpu") -> Path:
    """A model of random weights, drawn on `device`, with a tokenizer that knows its numbers."""
    with without_progress_bars():
        random_base(shape, dtype, device).save_pretrained(folder)
    words = {str(number): number for number in range(SHAPES[shape]["vocab_size"])}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="0")))
    tokenizer.eos_token = "1"
    tokenizer.save_pretrained(folder)
    return folder


def speed(
    options: argparse.Namespace, model: str, examples: Sequence[Example], scratch: Path, tell: Tell
) -> dict[str, Any]:
    """Every trainer: `tokens`, `speed`, `start_seconds`, and why trainers were left out (`skipped`)."""
    file = scratch / "speed.json"
    order = [index for step in plan_steps(len(examples), options.examples_per_step, 1, 0) for index in step]
    file.write_text(json.dumps([examples[index] for index in order]))
    lengths = [len(ids) for ids, _ in examples]
    tell(f"{len(examples)} examples of {min(lengths)} to {max(lengths)} tokens, {sum(lengths)} in all")

    def measured(trainer: str, candidates: list[Settings], steps: int | None) -> dict[str, Any]:
        job = Job(
            trainer=trainer,
            model=model,
            examples=str(file),
            examples_per_step=options.examples_per_step,
            dtype=options.dtype,
            device=options.device,
            threads=options.threads,
            candidates=candidates,
            steps=steps,
            spawned=time.time(),
        )
        return in_new_process("expert_trainers.py", job._asdict(), options.threads)

    results: dict[str, dict[str, Any]] = {}
    skipped = {name: reason for name in options.trainers if (reason := why_not(name))}
    for name in [name for name in options.trainers if name not in skipped]:
        settings = candidates_of(name, options.examples_per_step, max(options.tokens_per_batch, max(lengths)))
        tried = tuned(name, measured(name, settings, TUNING_STEPS)["runs"])
        results[name] = {"settings": tried[0]["settings"], "tried": tried, "rounds": []}
        # So many steps have a schedule of their own: they are compared among themselves.
        differences = loss_differences(tried, results[OURS]["tried"][0], options.dtype)
        results[name]["differences"] = differences
        tell(f"{name}: {described(results[name]['settings'])}")
    names = [*results]
    for number in range(options.rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            answer = measured(name, [results[name]["settings"]], None)
            (made,) = answer.pop("runs")
            if "error" in made:
                raise MethodError(f"{name}: {made['error']}")
            results[name]["rounds"].append(answer | made)
            differences = loss_differences([made], results[OURS]["rounds"][0], options.dtype)
            results[name]["differences"] += differences
        tell(f"round {number + 1} of {options.rounds}: done")
    return {
        "tokens": sum(lengths),
        "speed": {name: summary(result, results[OURS]) for name, result in results.items()},
        "start_seconds": {name: started(result["rounds"]) for name, result in results.items()},
        "skipped": skipped,
    }


def candidates_of(trainer: str, examples_per_step: int, tokens_per_batch: int) -> list[Settings]:
    """What a trainer may be set to, with the same examples in a step, or as many.

    Args:
        trainer: its name.
        examples_per_step: in a step.
        tokens_per_batch: of a packed row; no example is longer.
    """
    if trainer == OURS:
        return [{"tokens_per_batch": tokens_per_batch}]
    batches = [size for size in (2, 4, 8, 16) if examples_per_step % size == 0 and size <= examples_per_step]
    settings: list[Settings] = [{"rows": "padded", "batch": 1, "order": "step"}]
    settings += [{"rows": "padded", "batch": size, "order": order} for order in ("step", "length") for size in batches]
    settings += [{"rows": "flat", "batch": size, "order": "step"} for size in batches]
    if trainer == TRL:
        settings += [{"rows": "packed", "batch": 1, "length": tokens_per_batch}]
    return settings


def why_not(trainer: str) -> str | None:
    """Why a trainer cannot run here, with the mend; None when it can."""
    missing = [package for package in NEEDS[trainer] if find_spec(package) is None]
    if not missing:
        return None
    return f"{' and '.join(missing)} cannot be imported; `make peers` installs it, into an environment of its own"


def tuned(trainer: str, runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Candidates with their speed, the fastest first, those that failed last.

    Raises:
        MethodError: all failed.
    """
    made = [run | {"tokens_per_second": run["tokens"] / run["seconds"]} for run in runs if "error" not in run]
    failed = [run for run in runs if "error" in run]
    if not made:
        raise MethodError(f"{trainer}: {failed[0]['error']}")
    return sorted(made, key=lambda run: -run["tokens_per_second"]) + failed


def loss_differences(runs: Sequence[dict[str, Any]], ours: dict[str, Any], dtype: str) -> list[float]:
    """Nats between the first losses of runs that make our steps and those of `ours`.

    Raises:
        MethodError: the losses are not the same.
    """
    differences: list[float] = []
    for run in runs:
        if "error" in run or not keeps_steps(run["settings"]):
            continue
        pairs = zip(run["losses"][:COMPARED_STEPS], ours["losses"], strict=False)
        own = [abs(its - wanted) for its, wanted in pairs]
        if not all(difference <= LOSS_TOLERANCE[dtype] for difference in own):
            raise MethodError(
                f"{described(run['settings'])}: a loss is {max(own):.2g} nats from ours; they differ in more than speed"
            )
        differences += own
    return differences


def summary(result: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Medians over the rounds, the speed beside that of `ours`, and how far the losses are from its own."""
    rounds, differences = result["rounds"], result["differences"]
    speeds = [run["tokens"] / run["seconds"] for run in rounds]
    own_speeds = [run["tokens"] / run["seconds"] for run in ours["rounds"]]
    ratios = [own / its for own, its in zip(own_speeds, speeds, strict=True)]
    return {
        "tokens_per_second": round(statistics.median(speeds), 1),
        "tokens_per_second_by_round": [round(value, 1) for value in speeds],
        "ours_is_faster_by": round(statistics.median(ratios), 4),
        "seconds": round(statistics.median(run["seconds"] for run in rounds), 3),
        "peak_mb": round(max(run["peak_bytes"] for run in rounds) / 1e6, 1),
        "losses": rounds[0]["losses"],
        "compared_losses": len(differences),
        "max_loss_difference": float(f"{max(differences):.3g}"),
        "settings": result["settings"],
        "tried": [
            {"settings": run["settings"]}
            | ({"error": run["error"]} if "error" in run else {"tokens_per_second": round(run["tokens_per_second"], 1)})
            for run in result["tried"]
        ],
    }


def keeps_steps(settings: Settings) -> bool:
    """Whether each step has the examples that it has with the project's loop."""
    return settings.get("order", "step") == "step" and settings.get("rows") != "packed"


def started(rounds: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Medians of the seconds from nothing to the first step."""
    parts = {part: statistics.median(run["start"][part] for run in rounds) for part in ("imports", "model", "trainer")}
    return {name: round(seconds, 2) for name, seconds in (parts | {"all": sum(parts.values())}).items()}


def described(settings: Settings) -> str:
    """Settings in a few words."""
    if "tokens_per_batch" in settings:
        return f"packed rows of {settings['tokens_per_batch']} tokens"
    if settings["rows"] == "packed":
        return f"packing to {settings['length']} tokens"
    grouped = ", grouped by length" if settings["order"] == "length" else ""
    return f"{settings['rows']}, {settings['batch']} at once{grouped}"


def concurrent(
    options: argparse.Namespace, model: str, examples: Sequence[Example], scratch: Path, tell: Tell
) -> tuple[dict[str, Any], dict[str, float]]:
    """Experts at once beside one after the other, and the seconds that a finetune takes around its training."""
    file = scratch / "experts.json"
    file.write_text(json.dumps(list(examples)))
    arguments = {
        "model": model,
        "examples": str(file),
        "experts": options.experts,
        "examples_per_step": options.examples_per_step,
        "tokens_per_batch": options.tokens_per_batch,
        "dtype": options.dtype,
        "at_once": sorted({options.experts, min(options.experts, options.threads), 1}, reverse=True),
        "rounds": options.concurrent_rounds,
        "scratch": str(scratch / "runs"),
    }
    tell(f"{options.experts} experts of {options.expert_examples} examples, on a local Ray")
    found = in_new_process("expert_stage.py", arguments, options.threads)
    return arranged(found["arrangements"], found["cpus"], options.experts), {
        "ray": round(found["ray_seconds"], 2),
        "around_training": round(
            statistics.median(run["seconds"] - run["training_seconds"] for run in found["alone"]), 2
        ),
    }


def arranged(runs: Sequence[dict[str, Any]], cpus: int, experts: int) -> dict[str, Any]:
    """Each arrangement: medians over the rounds, and how much faster it is than one expert after the other."""
    seconds = {count: [run["seconds"] for run in runs if run["at_once"] == count] for count in _counts(runs)}
    arrangements = []
    for count, own in seconds.items():
        faster = statistics.median(alone / its for alone, its in zip(seconds[1], own, strict=True))
        training = [sum(run["training_seconds"]) for run in runs if run["at_once"] == count]
        arrangements.append(
            {
                "at_once": count,
                "cpus_each": cpus / count,
                "seconds": round(statistics.median(own), 2),
                "training_seconds": round(statistics.median(training), 2),
                "faster_than_one_after_the_other": round(faster, 3),
            }
        )
    return {"cpus": cpus, "experts": experts, "tokens": runs[0]["tokens"], "arrangements": arrangements}


def _counts(runs: Sequence[dict[str, Any]]) -> list[int]:
    return sorted({run["at_once"] for run in runs})


def show_speed(report: dict[str, Any], console: Console) -> None:
    """Tables of the results, and the sentences that they come down to."""
    machine = report["machine"]
    where = machine["device"] if report["device"] == "cuda" else f"{machine['threads']} threads"
    title = f"{report['model']}, {report['dtype']}, {where}"
    if "speed" in report:
        console.print(_trainers_table(report, title))
        for name, reason in report["skipped"].items():
            console.print(f"{name} left out: {reason}")
        for name, result in report["speed"].items():
            if name != OURS and OURS in report["speed"]:
                console.print(f"ours is {result['ours_is_faster_by']:.2f} x as fast as {name}")
    if "concurrent" in report:
        found = report["concurrent"]
        table = Table(title=f"{found['experts']} experts, {found['tokens']} tokens, {found['cpus']} CPUs: the stage")
        for heading in ("at once", "CPUs each", "seconds", "of training, summed", "x one after the other"):
            table.add_column(heading, justify="right")
        for row in found["arrangements"]:
            table.add_row(
                str(row["at_once"]),
                f"{row['cpus_each']:g}",
                f"{row['seconds']:.1f}",
                f"{row['training_seconds']:.1f}",
                f"{row['faster_than_one_after_the_other']:.2f}",
            )
        console.print(table)
        start = report["start_seconds"]["stage"]
        console.print(
            f"Ray starts in {start['ray']:.1f} s; a finetune takes {start['around_training']:.1f} s around its training"
        )


def _trainers_table(report: dict[str, Any], title: str) -> Table:
    sizes = f"{report['examples']} examples, {report['tokens']} tokens, {report['examples_per_step']} examples a step"
    table = Table(title=f"{title}\n{sizes}")
    table.add_column("trainer")
    table.add_column("settings")
    headings = ("tokens/s", "ours is x", "peak MB", "loss differs by", "start s", "imports", "model", "trainer")
    for heading in headings:
        table.add_column(heading, justify="right")
    for name, result in report["speed"].items():
        start = report["start_seconds"][name]
        table.add_row(
            name,
            described(result["settings"]),
            f"{result['tokens_per_second']:.0f}",
            f"{result['ours_is_faster_by']:.2f}",
            f"{result['peak_mb']:.0f}",
            f"{result['max_loss_difference']:.0e}" if name != OURS else "",
            *(f"{start[part]:.1f}" for part in ("all", "imports", "model", "trainer")),
        )
    return table
