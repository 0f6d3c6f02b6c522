"""Measure how fast answers come from many experts at once, beside other ways to generate with them.

python jobs/benchmarks/serving.py [--data DIR] [--json OUT] [--quick]

Random LoRA experts on real prompts, greedy answers of given lengths. Every contender gets the same requests: first in
bursts, all due at once, where the speed of decoding is read while the batch is full; then in an open loop, a Poisson
process at a rate that is stated, where latencies are read. Contenders take turns within a round, those whose speed may
depend on who asks for which expert next to each other under each workload, and ratios are taken within a round, so that
a machine that slows down favours nobody. Each has a process of its own.

  engine           the project's engine, every row with its own expert
  base_only        the same engine and requests, all answered by the base model
  peft_mixed       PEFT's adapter_names: static batches by generate
  ensemble         as ELREA does: K experts read every token and their distributions are averaged; K rows a request,
                   in stacked matrices, which is faster than PEFT's mixed batch, and no more rows than the others have
  ensemble_wide    the same with K times the rows of the others, for reference
  transformers_*   the base model alone, by transformers' generate, continuous batching, and server: for reference

Then how long an adapter takes into a slot, and, over HTTP through the real application on a local Ray, how much later
the first token of a routed request comes than one of the base model's.
"""

import argparse
import json
import statistics
import sys
import tempfile
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import serving_report
import torch
from gradient_task import TaskError
from gradients import machine
from rich.console import Console
from serving_engines import Setup
from serving_load import MORE_EXPERTS, ROUND_ROBIN, WORKLOADS, Prompt
from serving_setup import read_prompts, write_adapters, write_run
from serving_workloads import CONTENDERS, Plan, compare, slot_loads, verdict
from sketch_methods import MethodError, in_new_process
from transformers.utils import logging as transformers_logging

from gradientspace_ray.examples.formats import SourceError
from gradientspace_ray.models.bundled import CHAT_MODEL, ENCODER
from gradientspace_ray.models.loading import ModelError, load_base

LOAD, SLOTS, ENDPOINT = "load", "slots", "endpoint"
PARTS = (LOAD, SLOTS, ENDPOINT)
SLOT_LOAD_LIMIT_MS = 30.0
SLOT_ROUNDS = 4
ENDPOINT_RATE = 1.0
"""Requests per second where the part that measures one is left out."""
PACKAGES = ("torch", "transformers", "peft", "ray")
QUICK = {
    "workloads": [ROUND_ROBIN, MORE_EXPERTS],
    "burst": 10,
    "requests": 10,
    "rounds": 1,
    "tokens": (12, 20),
    "endpoint_pairs": 9,
}
SETTINGS = ("experts", "many_experts", "slots", "rows", "ensemble", "burst", "requests", "tokens", "rounds")
SEED = 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print tables, and write the JSON file where one is wanted."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    # Peers warn about what they were asked for.
    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity_error()
    console = Console(width=None if sys.stdout.isatty() else 140)
    try:
        with tempfile.TemporaryDirectory(prefix="serving-benchmark-", dir=options.scratch) as scratch:
            report = measured(options, console, Path(scratch))
    except (TaskError, MethodError, SourceError, ModelError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    serving_report.show(report, console)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="OUT", help="where the results go, beside the tables printed")
    parser.add_argument("--data", metavar="DIR", help="JSONL files, mixed evenly; without, the built-in mixture")
    parser.add_argument("--model", default=CHAT_MODEL, metavar="NAME", help="a local folder, or a Hugging Face name")
    parser.add_argument("--encoder", default=ENCODER, metavar="NAME", help="of the endpoint's router")
    parser.add_argument("--quick", action="store_true", help="a few minutes: fewer workloads, requests and rounds")
    parser.add_argument("--parts", type=_chosen(PARTS), default=[*PARTS], metavar="A,B", help=", ".join(PARTS))
    parser.add_argument(
        "--workloads", type=_chosen(WORKLOADS), default=[*WORKLOADS], metavar="A,B", help=", ".join(WORKLOADS)
    )
    parser.add_argument(
        "--contenders",
        type=_chosen(tuple(CONTENDERS)),
        default=[*CONTENDERS],
        metavar="A,B",
        help=", ".join(CONTENDERS),
    )
    parser.add_argument("--experts", type=_positive, default=8, metavar="N", help="no more than slots; default: 8")
    parser.add_argument(
        "--many-experts", type=_positive, default=24, metavar="N", help=f"of {MORE_EXPERTS}; default: 24"
    )
    parser.add_argument("--slots", type=_positive, default=8, metavar="N", help="of the engine; default: 8")
    parser.add_argument("--rows", type=_positive, default=8, metavar="N", help="of a batch; default: 8")
    parser.add_argument("--ensemble", type=_positive, metavar="K", help="its experts; default: all of --experts")
    parser.add_argument("--burst", type=_positive, default=12, metavar="N", help="requests of a burst; default: 12")
    parser.add_argument("--requests", type=_positive, default=16, metavar="N", help="of the open loop; default: 16")
    parser.add_argument("--tokens", type=_range, default=(24, 40), metavar="A-B", help="of an answer; default: 24-40")
    parser.add_argument("--rounds", type=_positive, default=3, metavar="N", help="bursts; default: 3")
    parser.add_argument("--rate", type=float, metavar="X", help="requests a second; default: 0.6 of what base_only can")
    parser.add_argument("--endpoint-pairs", type=_positive, default=100, metavar="N", help="prompts; default: 100")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="for adapters; default: the system's place")
    parser.add_argument("--threads", type=_positive, default=torch.get_num_threads(), metavar="N", help="PyTorch's")
    if parser.parse_args(arguments).quick:
        parser.set_defaults(**QUICK)
    options = parser.parse_args(arguments)
    options.ensemble = options.ensemble or options.experts
    if options.experts > options.slots:
        parser.error(f"--experts {options.experts}: no more than --slots {options.slots}; --many-experts may be more")
    if options.ensemble > max(options.experts, options.many_experts):
        parser.error(f"--ensemble {options.ensemble}: there are {max(options.experts, options.many_experts)} experts")
    return options


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is no positive number")
    return int(text)


def _range(text: str) -> tuple[int, int]:
    shortest, _, longest = text.partition("-")
    found = _positive(shortest), _positive(longest or shortest)
    if not 2 <= found[0] <= found[1]:
        raise argparse.ArgumentTypeError(f"{text}: give A-B, both at least 2, the smaller first")
    return found


def _chosen(known: Sequence[str]) -> Any:
    def choose(text: str) -> list[str]:
        if unknown := [name for name in text.split(",") if name not in known]:
            raise argparse.ArgumentTypeError(f"no {', '.join(unknown)}; there are {', '.join(known)}")
        return [name for name in known if name in text.split(",")]

    return choose


def measured(options: argparse.Namespace, console: Console, scratch: Path) -> dict[str, Any]:
    """The whole report.

    Raises:
        TaskError: there are too few examples.
        MethodError: the endpoint's process or a contender's failed.
    """
    needed = options.rounds * options.burst + options.requests + options.rows
    prompts = read_prompts(options.data, needed + options.endpoint_pairs, options.model, scratch)
    lengths = [len(prompt.ids) for prompt in prompts]
    console.print(f"{len(prompts)} prompts of {min(lengths)} to {max(lengths)} tokens, {sum(lengths)} in all")
    setup = Setup(
        name=options.model,
        folders=write_adapters(
            load_base(options.model), scratch / "adapters", max(options.experts, options.many_experts)
        ),
        rows=options.rows,
        slots=options.slots,
        ensemble=options.ensemble,
        threads=options.threads,
        scratch=scratch,
        longest=max(lengths) + options.tokens[1],
    )
    report: dict[str, Any] = {
        "machine": machine(torch.device("cpu")),
        "versions": {name: version(name) for name in PACKAGES},
        "model": options.model,
        "data": options.data,
        "dtype": "float32",
        "settings": {name: getattr(options, name) for name in SETTINGS},
        "mean_prompt_tokens": round(statistics.mean(lengths), 1),
        "ratios": [],
    }
    rate = options.rate or ENDPOINT_RATE
    if LOAD in options.parts:
        plan = plan_of(options, prompts[:needed])
        report |= compare(setup, plan, options.contenders, console.print)
        failed = sum(found["errors"] for contenders in report["workloads"].values() for found in contenders.values())
        report["ratios"].append(verdict("requests that failed", failed, 0, at_least=False))
        rate = report["rate_per_second"]
    if SLOTS in options.parts:
        report["slot_load_ms"] = slot_loads(setup, SLOT_ROUNDS)
        report["ratios"] += [
            verdict(f"slot load from {source}, {number}, ms", found[number], SLOT_LOAD_LIMIT_MS, at_least=False)
            for source, found in report["slot_load_ms"].items()
            for number in ("p50", "max")
        ]
    if ENDPOINT in options.parts:
        report["routed_ttft"] = routed(options, setup, prompts[needed:], rate, scratch)
        report["ratios"] += [
            verdict(f"routed / (router + 1.1 base), time to first token, {name}", value, 1.0, at_least=False)
            for name in ("alone", "open_loop")
            for value in [report["routed_ttft"][name]["routed_to_allowed"]]
        ]
    return report


def plan_of(options: argparse.Namespace, prompts: Sequence[Prompt]) -> Plan:
    """What the contenders are asked."""
    return Plan(
        workloads=options.workloads,
        experts=options.experts,
        many_experts=options.many_experts,
        prompts=prompts,
        burst=options.burst,
        requests=options.requests,
        tokens=options.tokens,
        rounds=options.rounds,
        rate=options.rate,
        seed=SEED,
    )


def routed(
    options: argparse.Namespace, setup: Setup, prompts: Sequence[Prompt], rate: float, scratch: Path
) -> dict[str, Any]:
    """Times to the first token through the real application, which runs in processes of its own."""
    run = write_run(scratch / "run", options.model, options.encoder, setup.folders[: options.experts], prompts)
    job = {
        "run_dir": run.uri,
        "prompts": [prompt.messages for prompt in prompts],
        "max_tokens": options.tokens[0],
        "slots": options.slots,
        "threads": options.threads,
        "rate": rate,
    }
    file = scratch / "endpoint.json"
    file.write_text(json.dumps(job))
    return in_new_process("serving_endpoint.py", str(file), options.threads)


if __name__ == "__main__":
    main()
