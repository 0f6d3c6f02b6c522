"""Measure how fast adapters are trained, beside other trainers, and what experts are worth.

python jobs/benchmarks/experts.py [--data DIR] [--json OUT]

Speed: real tokens per second, padding not counted, and the peak memory, of the process or on the GPU. The project's
loop on a DeepSpeed engine (`ours`), trl's SFTTrainer and transformers' Trainer have the same base, adapter, examples,
optimizer, schedule and types. The others have the fastest of their own settings; all losses must be the same up to
rounding. Their start is apart: imports, the model, and all until the first step. Then the stage itself trains several
experts at once and one after the other, on a local Ray, each time with all CPUs.

`--study` measures held-out losses of experts instead, and has options of its own; see expert_study.py.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import expert_speed
import torch
from expert_trainers import OURS, TRAINERS
from gradient_task import SHAPES, TaskError
from gradients import machine
from rich.console import Console
from sketch_methods import MethodError

from gradientspace_ray.examples.formats import SourceError
from gradientspace_ray.models.attention import UnsupportedModelError
from gradientspace_ray.models.bundled import CHAT_MODEL
from gradientspace_ray.models.loading import ModelError
from gradientspace_ray.recipe import TrainingSection

SPEED = "speed"
PARTS = (SPEED, "concurrent")
STUDY = "--study"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print tables, and write the JSON file where one is wanted."""
    words = [*(sys.argv[1:] if arguments is None else arguments)]
    if STUDY in words:
        words.remove(STUDY)
        import_module("expert_study").main(words)
        return
    options = parse(words)
    torch.set_num_threads(options.threads)
    console = Console(width=None if sys.stdout.isatty() else 140)
    try:
        report = measured(options, console)
    except (TaskError, MethodError, SourceError, ModelError, UnsupportedModelError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    report = {"machine": machine(torch.device(options.device)), **report}
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    expert_speed.show_speed(report, console)


def measured(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The report, without the machine."""
    with tempfile.TemporaryDirectory(prefix="expert-benchmark-", dir=options.scratch) as scratch:
        return expert_speed.study(options, console, Path(scratch))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    defaults = TrainingSection()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="OUT", help="where the results go, beside the tables printed")
    parser.add_argument("--data", metavar="DIR", help="JSONL files, mixed evenly; without, the built-in mixture")
    parser.add_argument("--model", default=CHAT_MODEL, metavar="NAME", help="a local folder, or a Hugging Face name")
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape, and examples that are made up")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of base and products")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the trainers; default: cpu")
    parser.add_argument("--parts", type=_parts, default=[*PARTS], metavar="A,B", help=f"default: {','.join(PARTS)}")
    parser.add_argument("--trainers", type=_trainers, default=[*TRAINERS], metavar="A,B", help=", ".join(TRAINERS))
    parser.add_argument("--examples", type=_positive, default=64, metavar="N", help="of the trainers; default: 64")
    parser.add_argument("--examples-per-step", type=_positive, default=defaults.examples_per_step, metavar="N")
    parser.add_argument("--tokens-per-batch", type=_positive, default=defaults.tokens_per_batch, metavar="N")
    parser.add_argument("--rounds", type=_positive, default=3, metavar="R", help="of the trainers; default: 3")
    parser.add_argument("--experts", type=_positive, default=4, metavar="N", help="default: 4")
    parser.add_argument("--expert-examples", type=_positive, default=24, metavar="N", help="of each; default: 24")
    parser.add_argument("--concurrent-rounds", type=_positive, default=1, metavar="R", help="default: 1")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="for run directories; default: the system's place")
    parser.add_argument("--threads", type=_positive, default=torch.get_num_threads(), metavar="N", help="PyTorch's")
    options = parser.parse_args(arguments)
    if options.examples % options.examples_per_step:
        parser.error(
            f"--examples {options.examples}: give a multiple of --examples-per-step {options.examples_per_step}"
        )
    if options.device == "cuda" and options.parts != [SPEED]:
        parser.error(f"--device cuda: give --parts {SPEED}; the stage is measured on CPUs")
    return options


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is no positive number")
    return int(text)


def _parts(text: str) -> list[str]:
    return _chosen(text, PARTS)


def _trainers(text: str) -> list[str]:
    # All are compared with it.
    return _chosen(f"{OURS},{text}", TRAINERS)


def _chosen(text: str, known: Sequence[str]) -> list[str]:
    if unknown := [name for name in text.split(",") if name not in known]:
        raise argparse.ArgumentTypeError(f"no {', '.join(unknown)}; there are {', '.join(known)}")
    return [name for name in known if name in text.split(",")]


if __name__ == "__main__":
    main()
