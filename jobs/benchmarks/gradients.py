"""Time the per-sample gradients against an ordinary backward pass, and against other ways to get them.

python jobs/benchmarks/gradients.py --json OUT

Every method computes the same [N, D] gradients of the same ragged examples in this process, each with its best
settings, found beforehand on a part of the examples. Then every round runs every method once, in an order that rotates.
The ratio to the floor is taken within a round, so that a machine that slows down favours nobody. MB and GB are decimal.
"""

import argparse
import gc
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from gradient_methods import ENGINE, FLOOR, METHODS, OWN, Settings, reference, why_not
from gradient_task import SHAPES, Task, TaskError, make_task
from rich.console import Console
from rich.table import Table

from gradientspace_ray.examples.formats import SourceError
from gradientspace_ray.models.attention import UnsupportedModelError
from gradientspace_ray.models.bundled import CHAT_MODEL
from gradientspace_ray.models.loading import ModelError, as_dtype

Results = dict[str, dict[str, Any]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write the JSON file, print a table."""
    options = parse(arguments)
    # Peers' hooks and PyTorch's missing batching rules warn; what they cost is measured.
    warnings.filterwarnings("ignore")
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        task = make_task(
            options.model,
            options.shape,
            options.data,
            options.examples,
            as_dtype(options.dtype),
            options.device,
            options.peers_head,
        )
    except (TaskError, SourceError, ModelError, UnsupportedModelError) as error:
        raise SystemExit(f"error: {error}") from error
    console = Console()
    methods, skipped = measure(task, options.methods, options.rounds, options.tokens_per_batch, console.print)
    if options.peak_tflops:
        for name in {FLOOR, ENGINE} & methods.keys():
            flops_per_second = 4 * task.multiplied_weights * task.tokens / methods[name]["seconds"]
            methods[name]["model_flops_utilisation"] = round(flops_per_second / (options.peak_tflops * 1e12), 4)
    report = {
        "machine": machine(task.device),
        "model": options.shape or options.model,
        "dtype": options.dtype,
        "peers_head": options.peers_head,
        "examples": len(task.examples),
        "tokens": task.tokens,
        "dimension": task.dimension,
        "methods": methods,
        "skipped": skipped,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=2) + "\n")
    show(report, console)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, metavar="OUT", help="where the results go")
    parser.add_argument(
        "--data", metavar="DIR", help="JSONL files to take the examples from; without, they are made up"
    )
    parser.add_argument("--model", default=CHAT_MODEL, metavar="NAME", help="a local folder, or a Hugging Face name")
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape instead of the model's")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and products")
    head = "where the peers compute logits: at all tokens, as their own pipelines do, or for labels; default: all"
    parser.add_argument("--peers-head", choices=("all", "labels"), default="all", help=head)
    parser.add_argument("--methods", type=_methods, default=[*METHODS], metavar="A,B", help=", ".join(METHODS))
    parser.add_argument("--examples", type=_positive, default=12, metavar="N", help="default: 12")
    parser.add_argument("--rounds", type=_positive, default=3, metavar="R", help="default: 3")
    packed = "tokens of a packed row; buckets are tried around it; default: 1024"
    parser.add_argument("--tokens-per-batch", type=_positive, default=1024, metavar="N", help=packed)
    parser.add_argument("--peak-tflops", type=float, metavar="X", help="the device's, to report the share that is used")
    parser.add_argument("--threads", type=_positive, metavar="N", help="PyTorch's, on the CPU")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("this process sees no CUDA GPU; leave --device out")
    return options


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is no positive number")
    return int(text)


def _methods(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in METHODS]:
        raise argparse.ArgumentTypeError(f"no method {', '.join(unknown)}; there are {', '.join(METHODS)}")
    return [name for name in METHODS if name in names]


def measure(
    task: Task, names: Sequence[str], rounds: int, tokens_per_batch: int, tell: Callable[[str], None]
) -> tuple[Results, dict[str, str]]:
    """Results by method, and why methods were left out. The floor always takes part.

    Args:
        task: model and examples.
        names: methods.
        rounds: calls of each that are timed.
        tokens_per_batch: of a packed row.
        tell: is told what has been done.
    """
    skipped = {name: reason for name in names if (reason := why_not(name))}
    tell(f"{len(task.examples)} examples of {min(task.lengths)} to {max(task.lengths)} tokens, {task.tokens} in all")
    expected_ND = reference(task)
    # Written to beforehand, so that nobody pays for the first touch of its pages.
    out_ND = torch.zeros_like(expected_ND)
    results: Results = {}
    for name in [FLOOR, *(name for name in names if name not in {FLOOR, *skipped})]:
        settings = best_settings(task, name, tokens_per_batch, out_ND)
        if settings is None:
            skipped[name] = "runs out of memory; lower --tokens-per-batch"
            continue
        error, peak = check(task, name, settings, expected_ND)
        results[name] = {"settings": settings, "max_relative_error": error, "peak_bytes": peak, "seconds": []}
        tell(f"{name}: ready")
    names = [*results]
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            seconds = timed(task, name, results[name]["settings"], out_ND[:0] if name == FLOOR else out_ND)
            results[name]["seconds"].append(seconds)
        tell(f"round {number + 1} of {rounds}: done")
    return {name: _summary(task, result, results[FLOOR]["seconds"]) for name, result in results.items()}, skipped


def _summary(task: Task, result: dict[str, Any], floor_seconds: list[float]) -> dict[str, Any]:
    seconds = statistics.median(result["seconds"])
    ratio = statistics.median(mine / its for mine, its in zip(result["seconds"], floor_seconds, strict=True))
    return {
        "seconds": round(seconds, 6),
        "tokens_per_second": round(task.tokens / seconds, 1),
        "ratio_to_floor": round(ratio, 4),
        "peak_mb": round(result["peak_bytes"] / 1e6, 3),
        "max_relative_error": float(f"{result['max_relative_error']:.3g}"),
        "settings": result["settings"],
    }


def best_settings(task: Task, name: str, tokens_per_batch: int, out_ND: torch.Tensor) -> Settings | None:
    """The settings that are fastest on a part of the examples; None when none of them fits into memory."""
    candidates = METHODS[name].settings(tokens_per_batch)
    if len(candidates) == 1:
        return candidates[0]
    part = middle_half(task)
    seconds: dict[int, float] = {}
    for number, settings in enumerate(candidates):
        try:
            if not seconds:
                timed(task.part([task.lengths.index(min(task.lengths))]), name, settings, out_ND[:1])
            seconds[number] = timed(part, name, settings, out_ND[: len(part.examples)])
        except torch.OutOfMemoryError:
            task.model.zero_grad()
    return candidates[min(seconds, key=lambda number: seconds[number])] if seconds else None


def middle_half(task: Task) -> Task:
    """Half of the tokens: examples next to one another in order of length, so that they pad as among all.

    A task of few examples is returned whole.
    """
    ordered = sorted(range(len(task.examples)), key=lambda index: task.lengths[index])
    ends = accumulate(task.lengths[index] for index in ordered)
    chosen = [
        index
        for index, end in zip(ordered, ends, strict=True)
        if task.tokens / 4 < end - task.lengths[index] / 2 < task.tokens * 3 / 4
    ]
    return task.part(chosen) if len(chosen) >= 4 else task


def timed(task: Task, name: str, settings: Settings, out_ND: torch.Tensor) -> float:
    """Seconds of one call; building and tearing down are outside of it."""
    with METHODS[name].open(task, **settings) as run:
        gc.collect()
        synchronise(task.device)
        start = time.perf_counter()
        run(out_ND)
        synchronise(task.device)
        return time.perf_counter() - start


def check(task: Task, name: str, settings: Settings, expected_ND: torch.Tensor) -> tuple[float, int]:
    """Largest relative error of an example, and peak bytes with the result; it is the method's warm-up, too."""
    if name == FLOOR:
        expected_ND = expected_ND.sum(0, keepdim=True)
    sum_1D = torch.empty_like(expected_ND[:1])
    results_ND: list[torch.Tensor] = []

    def call() -> None:
        # An ordinary backward pass has no matrix to make.
        results_ND[:] = [sum_1D if name == FLOOR else torch.empty_like(expected_ND)]
        # What is not written is noticed.
        run(results_ND[0].fill_(torch.nan))

    with METHODS[name].open(task, **settings) as run:
        if task.device.type == "cuda":
            # Libraries keep the workspaces that a first call makes.
            call()
            results_ND.clear()
        peak = peak_bytes(call, task.device)
    errors = [(ours - its).norm() / its.norm() for ours, its in zip(results_ND[0], expected_ND, strict=True)]
    return float(torch.stack(errors).max()), peak


def synchronise(device: torch.device) -> None:
    """Wait for the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Most bytes of tensors that were alive during the call, beyond those that were alive before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _without_stderr(), torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


@contextmanager
def _without_stderr() -> Iterator[None]:
    """The profiler's C++ code announces itself there."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def show(report: dict[str, Any], console: Console) -> None:
    """A table of the results, and the sentence that they come down to."""
    methods: Results = report["methods"]
    sizes = f"{report['examples']} examples, {report['tokens']} tokens, {report['dimension']} LoRA weights"
    table = Table(title=f"{report['model']}, {report['dtype']}, {report['machine']['device']}\n{sizes}")
    table.add_column("method")
    utilised = "model_flops_utilisation" in methods[FLOOR]
    for heading in ("seconds", "tokens/s", "x floor", "peak MB", "error", *(["MFU"] if utilised else []), "batch"):
        table.add_column(heading, justify="right")
    for name, result in methods.items():
        numbers = [
            f"{result['seconds']:.4g}",
            f"{result['tokens_per_second']:.0f}",
            f"{result['ratio_to_floor']:.3f}",
            f"{result['peak_mb']:.0f}",
            f"{result['max_relative_error']:.0e}",
        ]
        if utilised:
            numbers.append(f"{share:.1%}" if (share := result.get("model_flops_utilisation")) else "")
        table.add_row(name, *numbers, _batch(result["settings"]))
    console.print(table)
    for name, reason in report["skipped"].items():
        console.print(f"{name} left out: {reason}")
    if ENGINE in methods:
        console.print(closing_line(methods))


def _batch(settings: Settings) -> str:
    tokens = settings.get("tokens_per_batch", 1)
    return str(tokens) if tokens > 1 else "single"


def closing_line(methods: Results) -> str:
    """How the engine stands to the floor and to the fastest peer."""
    ours = methods[ENGINE]["ratio_to_floor"]
    line = f"engine is {ours:.2f} x floor"
    peers = {name: result["ratio_to_floor"] for name, result in methods.items() if name not in OWN}
    if not peers:
        return line
    best = min(peers, key=lambda name: peers[name])
    return f"{line}, and {peers[best] / ours:.2f} x as fast as the best peer ({best})"


if __name__ == "__main__":
    main()
