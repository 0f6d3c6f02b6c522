"""Measure the online SVD of real per-sample gradients beside the exact one and other ways to a few directions.

python jobs/benchmarks/sketch.py [--data DIR] [--json OUT]
python jobs/benchmarks/sketch.py --simulate [--json OUT]

The gradients are those of a base model with a LoRA adapter after a short warm-up on other examples (at B = 0 half of
every gradient is zero), scaled to unit length, in a file (float32: examples x weights x 4 bytes of the disk). Meanwhile
they go through the sketch as in the gradient stage, one after the other, which tells the sketch's share of that
stage. Then every method reads the same file in the same order, each in a process of its own.

* captured: the share of the energy (sum of squared norms) that a method's directions hold. Of the online SVDs it is
  the ledger's, ||U U^T G||^2 / ||G||^2, which a run writes to spectrum.json; it is compared with the gradients, and the
  benchmark stops where they differ by 1e-4. Of the others, which have no ledger, it is ||G V^T||^2 / ||G||^2, V being
  an orthonormal basis of their directions. That is no smaller: the JSON file has it for all, as `row_space_captured`.
* of the optimum: beside the exact SVD's at the same rank.
* angle: the largest one between what the directions span and what the exact ones do. Where neighbouring singular
  values are nearly equal, as in the flat spectrum of gradients, the last directions are a matter of chance, so that it
  may be large without harm; `shared` in the JSON file is the mean squared cosine of all angles.
* IncrementalPCA subtracts the mean, which is its nature, so its components leave it out; the JSON file also has what
  components and mean hold together.
* CPU s: processor time, which other users of the machine do not lengthen; of one thread it is what it takes alone.
* peak MB: memory of the process beyond what it had before, with the batch of gradients that is read, without the file.

`--simulate` merges made-up sketches of a large run instead; see sketch_simulation.py. MB and GB are decimal.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from gradient_task import LORA_ALPHA, LORA_RANK, SEED, Task, TaskError, mixture_folder, read_examples
from gradients import machine
from rich.console import Console
from rich.table import Table
from sketch_methods import EXACT, METHODS, MethodError, Settings, in_new_process, multiply_adds
from sketch_simulation import Simulation, model_costs, show_simulation

from gradientspace_ray.examples.formats import SourceError
from gradientspace_ray.examples.packing import Example, pack
from gradientspace_ray.gradients.per_sample import PerSampleGradients
from gradientspace_ray.models.attention import UnsupportedModelError
from gradientspace_ray.models.bundled import CHAT_MODEL
from gradientspace_ray.models.loading import ModelError, add_lora, as_dtype, chosen_compute_dtype, load_base
from gradientspace_ray.models.losses import label_nll
from gradientspace_ray.run import RunDirectory
from gradientspace_ray.sketch.columns import save_sketch
from gradientspace_ray.sketch.merging import merge_saved
from gradientspace_ray.sketch.online_svd import OnlineSVD
from gradientspace_ray.sketch.tree import merge_tree, missing

WARM_UP_BATCH, WARM_UP_RATE = 8, 5e-4
Tell = Callable[[str], None]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print tables, and write the JSON file where one is wanted."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    console = Console(width=None if sys.stdout.isatty() else 100)
    try:
        report = simulated(options) if options.simulate else measured(options, console.print)
    except (TaskError, MethodError, SourceError, ModelError, UnsupportedModelError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    (show_simulation if options.simulate else show)(report, console)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="OUT", help="where the results go, beside the tables printed")
    parser.add_argument("--data", metavar="DIR", help="JSONL files, mixed evenly; without, the built-in mixture")
    parser.add_argument("--model", default=CHAT_MODEL, metavar="NAME", help="a local folder, or a Hugging Face name")
    dtypes = ("auto", "bfloat16", "float32")
    parser.add_argument("--dtype", choices=dtypes, default="auto", help="of the model's products; default: auto")
    parser.add_argument("--examples", type=_positive, default=500, metavar="N", help="default: 500")
    parser.add_argument("--warm-up-steps", type=_positive, default=24, metavar="N", help="of 8 examples; default: 24")
    parser.add_argument("--rank", type=_positive, default=64, metavar="K", help="directions; default: 64")
    carried = "rows that the online SVD carries beyond these; default: as many more"
    parser.add_argument("--oversampling", type=int, metavar="P", help=carried)
    parser.add_argument("--shard-size", type=_positive, default=512, metavar="N", help="examples; default: 512")
    parser.add_argument("--methods", type=_methods, default=[*METHODS], metavar="A,B", help=", ".join(METHODS))
    cache = "keep the gradients there, and what they took in FILE.json; when it is there, they are not made again"
    parser.add_argument("--cache", type=Path, metavar="FILE", help=cache)
    parser.add_argument("--scratch", metavar="DIR", help="for all other files; default: the system's place for such")
    parser.add_argument("--threads", type=_positive, default=torch.get_num_threads(), metavar="N", help="PyTorch's")
    large = parser.add_argument_group("simulation")
    large.add_argument("--simulate", action="store_true", help="merge made-up sketches instead")
    large.add_argument("--simulate-shards", type=_positive, default=64, metavar="N", help="default: 64")
    large.add_argument("--simulate-dimension", type=_positive, default=2_000_000, metavar="D", help="default: 2000000")
    pair = "of one more pair; default: 20000000"
    large.add_argument("--simulate-large-dimension", type=_positive, default=20_000_000, metavar="D", help=pair)
    carried = "that every sketch carries; default: 128, as of rank 64 with as many beside, or of 128 with none"
    large.add_argument("--rows", type=_positive, default=128, metavar="K", help=carried)
    rows = "of the rows on disk; default: float32 where there is room, else bfloat16"
    large.add_argument("--rows-dtype", choices=dtypes, default="auto", help=rows)
    large.add_argument("--memory-gb", type=float, default=8.0, metavar="X", help="the most it may take; default: 8")
    large.add_argument("--gpus", type=_positive, default=64, metavar="N", help="of the large run; default: 64")
    speed = "gradients of the 8B model on one GPU, assumed; default: 10000"
    large.add_argument("--gpu-tokens-per-second", type=float, default=10_000.0, metavar="X", help=speed)
    tokens = "of the large run, assumed; default: 300"
    large.add_argument("--tokens-per-example", type=float, default=300.0, metavar="X", help=tokens)
    large.add_argument("--run-examples", type=_positive, default=1_000_000, metavar="N", help="default: 1000000")
    large.add_argument("--examples-per-shard", type=_positive, default=2048, metavar="N", help="default: 2048")
    options = parser.parse_args(arguments)
    if options.examples <= options.rank:
        parser.error(f"{options.examples} examples have no more than {options.rank} directions; lower --rank")
    if options.simulate_shards < 2:
        parser.error("--simulate-shards: one sketch cannot be merged")
    return options


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is no positive number")
    return int(text)


def _methods(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in METHODS]:
        raise argparse.ArgumentTypeError(f"no method {', '.join(unknown)}; there are {', '.join(METHODS)}")
    # All others are compared with the exact one.
    return [name for name in METHODS if name in names or name == EXACT]


def simulated(options: argparse.Namespace) -> dict[str, Any]:
    """The report of `--simulate`."""
    given = vars(options)
    names = {name: name for name in Simulation._fields} | {
        "shards": "simulate_shards",
        "dimension": "simulate_dimension",
        "large_dimension": "simulate_large_dimension",
        "dtype": "rows_dtype",
    }
    settings = Simulation(**{field: given[name] for field, name in names.items()})
    result = in_new_process("sketch_simulation.py", settings._asdict(), options.threads)
    return {"machine": machine(torch.device("cpu")), **result}


def measured(options: argparse.Namespace, tell: Tell) -> dict[str, Any]:
    """The report of all methods."""
    with tempfile.TemporaryDirectory(prefix="sketch-benchmark-", dir=options.scratch) as scratch:
        path = options.cache or Path(scratch) / "gradients.f32"
        made, cached = gradients_in(path, options, Path(scratch), tell)
        buffer_rows = OnlineSVD(options.rank, oversampling=options.oversampling).buffer_rows
        settings = Settings(
            gradients=str(path),
            examples=options.examples,
            dimension=made["dimension"],
            rank=options.rank,
            oversampling=options.oversampling,
            shard_size=options.shard_size,
            batch_rows=min(options.shard_size, buffer_rows),
            exact_rows=str(Path(scratch) / "exact.f32"),
            threads=options.threads,
        )
        methods, failed = run_methods(options.methods, settings, tell)
    report = {"machine": machine(torch.device("cpu")), **made["of"], "gradients_were_cached": cached}
    report |= {"dimension": made["dimension"], "rank": options.rank, "carried_rows": carried_rows(options)}
    report |= {"shard_size": options.shard_size, "methods": methods, "failed": failed, "gradient_stage": made["stage"]}
    stage = made["stage"] if made["stage"] and made["stage"]["sketch_of"] == _sketch_of(options) else None
    report["share_of_gradient_stage"] = stage and stage["sketch_seconds"] / stage["seconds"]
    report["arithmetic"] = model_costs(carried_rows(options), buffer_rows, made["stage"])
    return report


def carried_rows(options: argparse.Namespace) -> int:
    """Rows of a sketch before the last merge."""
    return OnlineSVD(options.rank, oversampling=options.oversampling).carried


def _sketch_of(options: argparse.Namespace) -> dict[str, int]:
    return {"rank": options.rank, "carried_rows": carried_rows(options), "shard_size": options.shard_size}


def run_methods(
    names: Sequence[str], settings: Settings, tell: Tell
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Results by method, and why others have none."""
    methods: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    for name in names:
        try:
            result = _attempt(name, settings, tell)
        except MethodError as error:
            if name == EXACT:
                raise
            failed[name] = str(error)
            tell(f"{name} failed: {error}")
            continue
        optimum = methods[EXACT]["captured"] if methods else result["captured"]
        methods[name] = {"captured": result.pop("captured"), "captured_of_optimum": 0.0, **result}
        methods[name]["captured_of_optimum"] = methods[name]["captured"] / optimum
        line = f"{name}: {methods[name]['captured']:.6f} of the energy, {result['seconds']:.1f} s"
        if "ledger_captured" in result:
            line += f"; its ledger says so, the gradients themselves say {result['direct_captured']:.6f}"
        tell(line)
    return methods, failed


def _attempt(name: str, settings: Settings, tell: Tell) -> dict[str, Any]:
    try:
        return in_new_process("sketch_methods.py", [name, settings._asdict()], settings.threads)
    except MethodError as error:
        smaller = settings._replace(batch_rows=settings.batch_rows // 2)
        if name != "incremental_pca" or smaller.batch_rows < settings.rank:
            raise
        tell(f"{name} failed with batches of {settings.batch_rows} rows ({error}); trying {smaller.batch_rows}")
    return _attempt(name, smaller, tell)


def gradients_in(path: Path, options: argparse.Namespace, scratch: Path, tell: Tell) -> tuple[dict[str, Any], bool]:
    """What is known of the gradients at `path`, and whether they were there; else they are made.

    Raises:
        TaskError: they were made of something else, or there are too few examples.
    """
    facts_path = path.with_name(f"{path.name}.json")
    dtype = chosen_compute_dtype(options.dtype, "cpu")
    of = {"model": options.model, "data": options.data, "dtype": dtype, "examples": options.examples}
    of["warm_up_steps"] = options.warm_up_steps
    if facts_path.exists() and path.exists():
        facts = json.loads(facts_path.read_text())
        if facts["of"] != of:
            raise TaskError(f"{path} holds the gradients of {facts['of']}, wanted are {of}; name another --cache")
        return facts, True
    warm_up = options.warm_up_steps * WARM_UP_BATCH
    wanted = options.examples + warm_up
    examples = read_examples(options.data or mixture_folder(scratch, wanted), wanted, options.model)
    model = add_lora(load_base(options.model, "float32"), LORA_RANK, LORA_ALPHA, "all-linear", SEED)
    engine = PerSampleGradients(model, compute_dtype=as_dtype(dtype))
    task = Task(model, examples[warm_up:], engine.columns, as_dtype(dtype))
    needed = options.examples * task.dimension * 4
    if needed > shutil.disk_usage(scratch if not options.cache else path.parent).free:
        raise TaskError(f"the gradients take {needed / 1e9:.3g} GB, more than the disk has; lower --examples")
    tell(f"{options.examples} examples, {task.tokens} tokens; {task.dimension} LoRA weights, {needed / 1e9:.3g} GB")
    train(task, examples[:warm_up], tell)
    stage = extract(task, engine, path, options, scratch, tell)
    facts = {"of": of, "dimension": task.dimension, "stage": stage}
    facts_path.write_text(json.dumps(facts, indent=2) + "\n")
    return facts, False


def train(task: Task, examples: Sequence[Example], tell: Tell) -> None:
    """A short warm-up of the adapter."""
    weights = [weight for _, weight in task.weights.values()]
    optimizer = torch.optim.AdamW(weights, lr=WARM_UP_RATE)
    losses = []
    for start in range(0, len(examples), WARM_UP_BATCH):
        batch = examples[start : start + WARM_UP_BATCH]
        for example in batch:
            loss = label_nll(task.model, pack([example]), task.compute_dtype).mean() / len(batch)
            loss.backward()
            losses.append(float(loss.detach()) * len(batch))
        optimizer.step()
        optimizer.zero_grad()
    third = max(1, len(losses) // 3)
    first, last = sum(losses[:third]) / third, sum(losses[-third:]) / third
    tell(f"warm-up: loss {first:.3f} in the first third, {last:.3f} in the last")


def extract(
    task: Task, engine: PerSampleGradients, path: Path, options: argparse.Namespace, scratch: Path, tell: Tell
) -> dict[str, Any]:
    """Write all gradients to `path`, and sketch them on the way as the gradient stage does; what each part took.

    Writing to `path` is not counted. A shard's sketch is saved, and the saved ones are merged. What a sketch leaves to
    who asks for its rows, which is the saving there, counts as an update: it is arithmetic, and the rest is writing.
    """
    seconds: Counter[str] = Counter()

    @contextmanager
    def timed(part: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        seconds[part] += time.perf_counter() - began

    run = RunDirectory(scratch / "run")
    names = [str(index) for index in range(-(-len(task.examples) // options.shard_size))]
    root = merge_tree(names)
    leaves = {leaf.name: leaf for leaf in root.leaves}
    sketch_multiply_adds = 0.0
    buffer_BD = torch.empty(0)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        for index, name in enumerate(names):
            shard = task.examples[index * options.shard_size : (index + 1) * options.shard_size]
            sketch = OnlineSVD(options.rank, oversampling=options.oversampling)
            if not len(buffer_BD):
                buffer_BD = torch.empty(min(sketch.buffer_rows, options.shard_size), task.dimension)
            for start in range(0, len(shard), len(buffer_BD)):
                part = shard[start : start + len(buffer_BD)]
                with timed("gradient"):
                    gradients_BD = engine.gradients(part, out=buffer_BD[: len(part)])
                with timed("update"):
                    sketch.update(gradients_BD, normalise=True)
                for row_D in gradients_BD:
                    file.write((row_D / torch.linalg.vector_norm(row_D, dtype=torch.float64)).numpy().tobytes())
            with timed("update"):
                _ = sketch.carried_rows
            sketch_multiply_adds += multiply_adds(len(shard), len(buffer_BD), sketch.carried) * task.dimension
            with timed("save"):
                save_sketch(run, leaves[name].folder, sketch, [f"{name}-{row}" for row in range(len(shard))], name=name)
            tell(f"shard {index + 1} of {len(names)}: {seconds['gradient']:.0f} s of gradients so far")
    partial.replace(path)
    del buffer_BD
    for node in missing(root, lambda _: False, lambda _: False):
        if node.children:
            with timed("merge"):
                merge_saved(run, node)
    sketching_s = seconds["update"] + seconds["save"] + seconds["merge"]
    return {
        "sketch_of": _sketch_of(options),
        "tokens": task.tokens,
        "weights": task.multiplied_weights,
        "threads": torch.get_num_threads(),
        "seconds": seconds["gradient"] + sketching_s,
        "sketch_seconds": sketching_s,
        **{f"{part}_seconds": seconds[part] for part in ("gradient", "update", "save", "merge")},
        "gradient_flops_per_second": 4 * task.multiplied_weights * task.tokens / seconds["gradient"],
        "sketch_flops_per_second": 2 * sketch_multiply_adds / seconds["update"],
        "tokens_per_example": task.tokens / len(task.examples),
    }


def show(report: dict[str, Any], console: Console) -> None:
    """A table of the methods, and what the sketch costs."""
    sizes = f"{report['examples']} gradients of {report['dimension']} numbers, {report['rank']} directions"
    kept = ", gradients of an earlier call" if report["gradients_were_cached"] else ""
    table = Table(title=f"{report['model']}, {report['dtype']}{kept}\n{sizes}")
    table.add_column("method")
    for heading in ("captured", "of the optimum", "angle", "seconds", "CPU s", "peak MB", "passes"):
        table.add_column(heading, justify="right")
    for name, result in report["methods"].items():
        table.add_row(
            name,
            f"{result['captured']:.4f}",
            f"{result['captured_of_optimum']:.4f}",
            f"{result['largest_angle_degrees']:.1f}",
            f"{result['seconds']:.1f}",
            f"{result['cpu_seconds']:.1f}",
            f"{result['peak_mb']:.0f}",
            result["passes"],
        )
    console.print(table)
    for name, reason in report["failed"].items():
        console.print(f"{name} failed: {reason}")
    if stage := report["gradient_stage"]:
        parts = ", ".join(
            f"{part} {stage[f'{part}_seconds']:.1f} s" for part in ("gradient", "update", "save", "merge")
        )
        console.print(f"the gradient stage: {parts}; {stage['threads']} threads")
    if share := report["share_of_gradient_stage"]:
        console.print(f"sketching takes {share:.1%} of the gradient stage")
    for cost in report["arithmetic"]:
        line = f"{cost['model']}: at {cost['tokens_per_example']:.0f} tokens an example the sketch is "
        line += f"{cost['share_at_equal_flops']:.2%} of the stage's FLOP"
        if cost["share_at_measured_flops"] is not None:
            line += f", {cost['share_at_measured_flops']:.1%} of its time at the FLOP/s measured here"
        console.print(line)


if __name__ == "__main__":
    main()
