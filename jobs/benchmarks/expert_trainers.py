"""Trainers of one LoRA adapter, measured in a process of its own: the project's, trl's, and transformers'.

All begin with the same weights, and see the same examples at the same learning rates. An optimizer step lowers the mean
loss over the label tokens of its examples. The first step is made twice, and the clock starts after the first time:
what libraries set up at their first call is not what a long training is made of.

The libraries are imported where a trainer needs them, because the imports are measured too.
"""

import gc
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

OURS, TRL, TRANSFORMERS = "ours", "trl", "transformers"
TRAINERS = (OURS, TRL, TRANSFORMERS)
LEARNING_RATE = 5e-4
Settings = dict[str, Any]
"""Ours: `tokens_per_batch`. Others: `rows` (padded, flat or packed), `batch` of them in one pass, `order`, `length`."""
Row = dict[str, list[int]]
"""`input_ids` and `labels`; a packed one has the `seq_lengths` of its examples, too."""


class Job(NamedTuple):
    """What a trainer is given."""

    trainer: str
    model: str
    """A local folder, or a Hugging Face name."""
    examples: str
    """JSON file of token ids and labels, in the order of the steps."""
    examples_per_step: int
    dtype: str
    """Of the base's weights and of the products; the adapter is float32."""
    device: str
    """`cpu`, or `cuda`."""
    threads: int
    candidates: list[Settings]
    """Tried one after the other, each with a model of its own."""
    steps: int | None
    """So many, from the beginning, or of those sorted by length from the middle; null makes all."""
    spawned: float
    """Time when this process was asked for."""


class Trained(NamedTuple):
    """What a trainer did."""

    losses: list[float]
    """Mean over the label tokens of each step, before its update."""
    ends: list[float]
    """When each step had been made."""


Train = Callable[[], Trained]
Build = Callable[[Any, Settings, Sequence[Sequence[Row]]], Train]
"""(adapted model, settings, rows of every step) -> the training."""


def run(job: Job) -> dict[str, Any]:
    """Train with every candidate: seconds, tokens, losses and peak of this process, or of its memory on the GPU."""
    # On several GPUs the others would put copies of the model, and see as many times the examples in a step.
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    load, build = {OURS: ours, TRL: trl, TRANSFORMERS: transformers}[job.trainer](job)
    start = {"imports": time.time() - job.spawned}
    torch = import_module("torch")
    torch.set_num_threads(job.threads)
    examples = [{"input_ids": ids, "labels": labels} for ids, labels in json.loads(Path(job.examples).read_text())]
    runs: list[dict[str, Any]] = []
    for settings in job.candidates:
        steps = steps_of(examples, job.examples_per_step, settings, job.steps)
        began = time.perf_counter()
        model = train = None
        try:
            model = load()
            loaded = time.perf_counter()
            train = build(model, settings, [steps[0], *steps])
            built = time.perf_counter()
            start = {"model": loaded - began, "trainer": built - loaded} | start
            trained = train()
        except (RuntimeError, ValueError) as error:
            runs.append({"settings": settings, "error": (str(error).splitlines() or [type(error).__name__])[0]})
            continue
        finally:
            # The trainers refer to themselves, and the next one needs their memory.
            del model, train
            gc.collect()
        seconds = trained.ends[-1] - trained.ends[0]
        tokens = sum(len(row["input_ids"]) for rows in steps for row in rows)
        runs.append({"settings": settings, "seconds": seconds, "tokens": tokens, "losses": trained.losses})
    peak = torch.cuda.max_memory_allocated() if job.device == "cuda" else peak_bytes()
    return {"start": start, "runs": runs, "peak_bytes": peak}


def peak_bytes() -> int:
    """Most memory that this process ever held."""
    with suppress(FileNotFoundError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    resource = import_module("resource")
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


def steps_of(examples: Sequence[Row], examples_per_step: int, settings: Settings, count: int | None) -> list[list[Row]]:
    """Rows of every optimizer step, as they pad least.

    Args:
        examples: in the order of the steps.
        examples_per_step: in a step.
        settings: their `order` is `step`, which keeps each step's examples, or `length`, which puts examples of like
            length into one step, as trainers do that group by length; their `rows` may be packed ones, which change the
            steps, too. Ours have neither.
        count: so many of the steps, see `Job.steps`; None keeps all.
    """
    if settings.get("rows") == "packed":
        rows = packed(examples, settings["length"])
        size = rows_per_step(len(rows), -(-len(examples) // examples_per_step))
        return cut(rows, size)[:count]
    steps = cut(examples, examples_per_step)
    if settings.get("order") == "length":
        steps = cut(sorted(examples, key=_length, reverse=True), examples_per_step)
        start = max(0, len(steps) - (count or len(steps))) // 2
        return steps[start:][:count]
    if settings.get("order") == "step":
        steps = [sorted(rows, key=_length, reverse=True) for rows in steps]
    return steps[:count]


def cut(rows: Sequence[Row], size: int) -> list[list[Row]]:
    """Pieces of so many rows; the last may have fewer."""
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]


def rows_per_step(rows: int, steps: int) -> int:
    """So many packed rows that there are about as many steps as without packing."""
    return max(1, round(rows / steps))


def packed(examples: Sequence[Row], length: int) -> list[Row]:
    """Rows of at most so many tokens, by trl's own packing: best fit decreasing."""
    datasets, library = import_module("datasets"), import_module("trl")
    rows: list[Row] = library.pack_dataset(datasets.Dataset.from_list(list(examples)), length, "bfd").to_list()
    return rows


def _length(row: Row) -> int:
    return len(row["input_ids"])


def ours(job: Job) -> tuple[Callable[[], Any], Build]:
    """The loop on a DeepSpeed engine of ZeRO 1, as a worker of the stage has it, which imports Ray."""
    os.environ |= {"DS_ACCELERATOR": job.device, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    torch = import_module("torch")
    import_module("deepspeed")
    import_module("gradientspace_ray.stages.finetune_worker")
    engines = import_module("gradientspace_ray.stages.deepspeed_engine")
    loading = import_module("gradientspace_ray.models.loading")
    loop = import_module("gradientspace_ray.training.loop")
    budget = import_module("gradientspace_ray.training.budget")
    distributed = torch.distributed

    def load() -> Any:
        return _adapted(loading.load_base(job.model, job.dtype, job.device))

    def build(model: Any, settings: Settings, steps: Sequence[Sequence[Row]]) -> Train:
        if not distributed.is_initialized():
            backend = "nccl" if job.device == "cuda" else "gloo"
            distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
        section = budget.TrainingSettings(
            learning_rate=LEARNING_RATE, examples_per_step=job.examples_per_step, **settings
        )
        engine = engines.DeepSpeedEngine(model, section, loading.as_dtype(job.dtype))
        # A row that comes again, as those of the first step do, is the same example again.
        examples = [(row["input_ids"], row["labels"]) for rows in steps for row in rows]
        ends = [sum(map(len, steps[: number + 1])) for number in range(len(steps))]
        plan = [list(range(end - len(rows), end)) for rows, end in zip(steps, ends, strict=True)]

        def train() -> Trained:
            trained = Trained([], [])
            for step in loop.train(
                engine,
                examples,
                plan,
                peak=section.learning_rate,
                warmup_share=section.warmup_share,
                tokens_per_batch=section.tokens_per_batch,
            ):
                trained.losses.append(step.loss)
                trained.ends.append(_now(job.device))
            return trained

        return train

    return load, build


def trl(job: Job) -> tuple[Callable[[], Any], Build]:
    """Trl's SFTTrainer. Packed rows are made beforehand, so that the clock knows how many a step has."""
    library = _library("trl", "SFTTrainer")
    datasets = import_module("datasets")
    _library("peft")
    tokenizer = _tokenizer(job)

    def build(model: Any, settings: Settings, steps: Sequence[Sequence[Row]]) -> Train:
        flat = settings["rows"] != "padded"
        arguments = library.SFTConfig(max_length=None, padding_free=flat, **_arguments(job, settings, steps))
        trainer = library.SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=datasets.Dataset.from_list([row for rows in steps for row in rows]),
            processing_class=tokenizer(),
            optimizers=_optimizers(model, len(steps)),
        )
        return _watched(trainer, job.device)

    return _plain_model(job), build


def transformers(job: Job) -> tuple[Callable[[], Any], Build]:
    """The Trainer of transformers, with its own collators and the model's own loss."""
    library = _library("transformers", "Trainer")
    _library("peft")
    tokenizer = _tokenizer(job)

    def build(model: Any, settings: Settings, steps: Sequence[Sequence[Row]]) -> Train:
        collators = {
            "padded": lambda: library.DataCollatorForSeq2Seq(tokenizer(), padding=True),
            "flat": library.DataCollatorWithFlattening,
        }
        trainer = library.Trainer(
            model=model,
            args=library.TrainingArguments(**_arguments(job, settings, steps)),
            data_collator=collators[settings["rows"]](),
            train_dataset=[row for rows in steps for row in rows],
            optimizers=_optimizers(model, len(steps)),
        )
        return _watched(trainer, job.device)

    return _plain_model(job), build


def _library(name: str, needed: str = "") -> Any:
    """The package, quiet, and telling nobody that it is used; what is needed of it is imported, too."""
    os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error"}
    logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    library = import_module(name)
    if needed:
        getattr(library, needed)
    return library


def _plain_model(job: Job) -> Callable[[], Any]:
    loading = import_module("gradientspace_ray.models.loading")
    library = import_module("transformers")

    def load() -> Any:
        with loading.without_progress_bars():
            base = library.AutoModelForCausalLM.from_pretrained(
                loading.resolve_model(job.model), dtype=loading.as_dtype(job.dtype), attn_implementation="sdpa"
            )
        return _adapted(base.to(job.device))

    return load


def _adapted(base: Any) -> Any:
    recipe = import_module("gradientspace_ray.recipe")
    loading = import_module("gradientspace_ray.models.loading")
    lora = recipe.LoraSection()
    return loading.add_lora(base.requires_grad_(False), lora.rank, lora.alpha, lora.target_modules, seed=0)


def _tokenizer(job: Job) -> Callable[[], Any]:
    loading = import_module("gradientspace_ray.models.loading")

    def load() -> Any:
        tokenizer = loading.load_tokenizer(job.model)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        return tokenizer

    return load


def _arguments(job: Job, settings: Settings, steps: Sequence[Sequence[Row]]) -> dict[str, Any]:
    """Those that both trainers know."""
    return {
        "output_dir": str(Path(job.examples).with_name("unused")),
        "per_device_train_batch_size": settings["batch"],
        "gradient_accumulation_steps": -(-len(steps[0]) // settings["batch"]),
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
        "max_grad_norm": import_module("gradientspace_ray.recipe").TrainingSection().max_grad_norm,
        "use_cpu": job.device == "cpu",
        "bf16": job.dtype == "bfloat16",
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def _optimizers(model: Any, steps: int) -> tuple[Any, Any]:
    """Those of the loop: AdamW, a linear rise and a cosine."""
    torch = import_module("torch")
    learning_rate = import_module("gradientspace_ray.training.schedule").learning_rate
    section = import_module("gradientspace_ray.recipe").TrainingSection()
    weights: Iterable[Any] = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=section.weight_decay)

    def share(step: int) -> float:
        rate: float = learning_rate(min(step, steps - 1), steps, LEARNING_RATE, section.warmup_share)
        return rate / LEARNING_RATE

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def _watched(trainer: Any, device: str) -> Train:
    """The training of a trainer of transformers' kind, whose steps are clocked."""
    library = import_module("transformers")
    trained = Trained([], [])

    class Clock(library.TrainerCallback):  # type: ignore[name-defined]
        """Notes when a step ends, and its loss."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trained.ends.append(_now(device))

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if "loss" in logs:
                trained.losses.append(logs["loss"])

    trainer.remove_callback(library.PrinterCallback)
    trainer.add_callback(Clock)

    def train() -> Trained:
        trainer.train()
        return trained

    return train


def _now(device: str) -> float:
    """The time when all that was asked for is done."""
    if device == "cuda":
        import_module("torch").cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    print(json.dumps(run(Job(**json.loads(sys.argv[1])))))
