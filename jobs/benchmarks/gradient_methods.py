"""Ways to the same [N, D] matrix of per-sample LoRA gradients, and the ordinary backward pass as their floor.

Every way is a context manager that takes a task and settings and yields `run(out_ND)`, which fills the matrix. What is
built once (hooks, modes) is built on entry and undone on exit, so that no way slows another.

The ways that pad sort the examples by length and cut them into buckets of at most `tokens_per_batch` padded tokens.
Padding is on the right and there is no mask: a causal model's tokens do not see what follows them. The peers compute
the head at every token, as their own pipelines do, or, as `Task.peers_head` says, where an example of the bucket
predicts a label.

Shapes: N examples, D LoRA parameters; of a bucket: B examples, T padded tokens, K places with logits, V words.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, NamedTuple

import torch
from gradient_task import Task
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from gradientspace_ray.examples.packing import IGNORED, pack, plan_batches
from gradientspace_ray.gradients.layout import Column
from gradientspace_ray.gradients.per_sample import PerSampleGradients
from gradientspace_ray.models.attention import SEGMENTED
from gradientspace_ray.models.losses import example_nll, label_nll
from gradientspace_ray.models.reading import with_attention

FLOOR, ENGINE = "floor", "engine"
Run = Callable[[torch.Tensor], None]
Settings = dict[str, Any]


class Bucket(NamedTuple):
    """Some of the examples, right-padded."""

    rows_B: torch.Tensor
    input_ids_BT: torch.Tensor
    places_K: torch.Tensor
    """Where logits are computed."""
    targets_BK: torch.Tensor
    """What they predict there, -100 for nothing."""


def _buckets(task: Task, tokens_per_batch: int) -> Iterator[Bucket]:
    for rows in plan_batches(task.lengths, tokens_per_batch, padded=True):
        yield _bucket(task, rows)


def _bucket(task: Task, rows: list[int]) -> Bucket:
    ids, labels = ([torch.tensor(task.examples[row][part]) for row in rows] for part in (0, 1))
    labels_BT = pad_sequence(labels, batch_first=True, padding_value=IGNORED)
    # The first token has no predecessor that could predict it.
    labelled = labels_BT[:, 1:] != IGNORED
    places_K = (labelled.any(0) if task.peers_head == "labels" else torch.ones(labelled.shape[1])).nonzero()[:, 0]
    parts = (torch.tensor(rows), pad_sequence(ids, batch_first=True), places_K, labels_BT[:, places_K + 1])
    return Bucket(*(part.to(task.device) for part in parts))


def _losses_B(model: nn.Module, task: Task, bucket: Bucket) -> torch.Tensor:
    with task.autocast():
        logits_BKV = model(input_ids=bucket.input_ids_BT, logits_to_keep=bucket.places_K, use_cache=False).logits
    return _mean_nll_B(logits_BKV, bucket.targets_BK)


def _mean_nll_B(logits_BKV: torch.Tensor, targets_BK: torch.Tensor) -> torch.Tensor:
    nll = cross_entropy(logits_BKV.float().flatten(0, 1), targets_BK.flatten(), reduction="none")
    return nll.view_as(targets_BK).sum(1) / (targets_BK != IGNORED).sum(1)


def _store(out_ND: torch.Tensor, bucket: Bucket, column: Column, gradients_B: torch.Tensor) -> None:
    rows, width = column.shape
    columns = slice(column.offset, column.offset + rows * width)
    out_ND[:, columns].index_copy_(0, bucket.rows_B, gradients_B.flatten(1).to(out_ND.dtype))


@contextmanager
def floor(task: Task, tokens_per_batch: int) -> Iterator[Run]:
    """An ordinary LoRA forward and backward pass over packed rows: PEFT's own layers, gradients summed in `.grad`.

    There are no gradients of single examples: their sum goes into the matrix if it has a row for it.
    """
    weights = task.weights.values()

    def run(out_ND: torch.Tensor) -> None:
        for batch in plan_batches(task.lengths, tokens_per_batch):
            packed = pack([task.examples[index] for index in batch])
            nll_L = label_nll(task.model, packed, task.compute_dtype)
            example_nll(nll_L, packed.label_examples, len(batch)).sum().backward()
        if len(out_ND):
            torch.cat([weight.grad.flatten() for _, weight in weights], out=out_ND[0])
        for _, weight in weights:
            weight.grad = None

    with with_attention(task.model.get_base_model(), SEGMENTED):
        yield run


@contextmanager
def engine(task: Task, tokens_per_batch: int, path: Literal["packed", "padded"] = "packed") -> Iterator[Run]:
    """The project's own."""
    gradients = PerSampleGradients(
        task.model, tokens_per_batch=tokens_per_batch, compute_dtype=task.compute_dtype, path=path
    )

    def run(out_ND: torch.Tensor) -> None:
        gradients.gradients(task.examples, out=out_ND)

    yield run


def padded(task: Task, tokens_per_batch: int) -> AbstractContextManager[Run]:
    """The project's own for models that cannot read packed rows."""
    return engine(task, tokens_per_batch, path="padded")


@contextmanager
def loop(task: Task) -> Iterator[Run]:
    """One example at a time by autograd, as LESS does it."""
    weights = [weight for _, weight in task.weights.values()]

    def run(out_ND: torch.Tensor) -> None:
        for row in range(len(task.examples)):
            loss = _losses_B(task.model, task, _bucket(task, [row])).sum()
            torch.cat([part.flatten() for part in torch.autograd.grad(loss, weights)], out=out_ND[row])

    yield run


@contextmanager
def vectorised(task: Task, tokens_per_batch: int) -> Iterator[Run]:
    """`torch.func`: vmap over the gradient function, a bucket at a time, as TRAK and dattri do it."""
    weights = task.weights
    trained = {name: weight.detach() for name, (_, weight) in weights.items()}

    def loss(
        trained: dict[str, torch.Tensor], ids_T: torch.Tensor, targets_K: torch.Tensor, places_K: torch.Tensor
    ) -> torch.Tensor:
        arguments = {"input_ids": ids_T[None], "logits_to_keep": places_K, "use_cache": False}
        with task.autocast():
            logits_BKV = functional_call(task.model, trained, kwargs=arguments).logits
        return _mean_nll_B(logits_BKV, targets_K[None])[0]

    per_sample = vmap(grad(loss), in_dims=(None, 0, 0, None))

    def run(out_ND: torch.Tensor) -> None:
        for bucket in _buckets(task, tokens_per_batch):
            found = per_sample(trained, bucket.input_ids_BT, bucket.targets_BK, bucket.places_K)
            for name, (column, _) in weights.items():
                _store(out_ND, bucket, column, found.pop(name))

    yield run


@contextmanager
def opacus(task: Task, tokens_per_batch: int) -> Iterator[Run]:
    """Opacus: full backward hooks that leave `grad_sample` on the weights."""
    from opacus import GradSampleModule

    weights = task.weights.values()
    task.model.train()  # its hooks ignore a model in eval mode
    model = GradSampleModule(task.model, batch_first=True, loss_reduction="sum", strict=False)

    def run(out_ND: torch.Tensor) -> None:
        for bucket in _buckets(task, tokens_per_batch):
            _losses_B(model, task, bucket).sum().backward()
            for column, weight in weights:
                _store(out_ND, bucket, column, weight.grad_sample)
                weight.grad = weight.grad_sample = None

    try:
        yield run
    finally:
        model.to_standard_module()
        task.model.eval()


@contextmanager
def bergson(task: Task, tokens_per_batch: int) -> Iterator[Run]:
    """Bergson: hooks on lora_A and lora_B, without projection, gradients kept on the model's device.

    Its worker freezes the adapter and lets the input embeddings require gradients, so that there is a graph at all: a
    gradient as large as the vocabulary for every bucket, and with tied weights the head's too. The adapter is trainable
    here, as it is under Bergson's callback for training, which makes a graph for far less. Its products need factors of
    one type, so that under autocast the adapter is in autocast's type, as Bergson's worker loads it.
    """
    from bergson import GradientProcessor
    from bergson.collector.gradient_collectors import TraceCollector
    from bergson.utils.worker_utils import extract_peft_target_modules

    columns = {
        name.removeprefix("base_model.").removesuffix(".weight"): column for name, (column, _) in task.weights.items()
    }
    kept = {weight: weight.data for _, weight in task.weights.values()}
    for weight, data in kept.items():
        weight.data = data.to(task.compute_dtype)
    collector = TraceCollector(
        model=task.model.base_model,
        target_modules=extract_peft_target_modules(task.model),
        processor=GradientProcessor(projection_dim=None),
        device=task.device,
        dtype=torch.float32,
    )

    def run(out_ND: torch.Tensor) -> None:
        for bucket in _buckets(task, tokens_per_batch):
            _losses_B(task.model, task, bucket).sum().backward()
            task.model.zero_grad()
            for name, column in columns.items():
                _store(out_ND, bucket, column, collector.mod_grads[name].pop())

    try:
        with collector.with_batch(None):
            yield run
    finally:
        for weight, data in kept.items():
            weight.data = data


@contextmanager
def dattri_llm(task: Task, tokens_per_batch: int) -> Iterator[Run]:
    """dattri-LLM: hooks, and linear layers that leave out the weight gradient."""
    from dattri_llm.gradient.hooks import HookManager, HookManagerConfig

    columns = {name.removesuffix(".weight"): column for name, (column, _) in task.weights.items()}
    config = HookManagerConfig(invasive_linear_io=[r"lora_[AB]\."], capture_style="materialized")
    manager = HookManager(task.model, config=config)

    def run(out_ND: torch.Tensor) -> None:
        with manager.collect():
            for bucket in _buckets(task, tokens_per_batch):
                _losses_B(task.model, task, bucket).sum().backward()
                found = manager.get_gradient().data
                for name, column in columns.items():
                    _store(out_ND, bucket, column, found[name])
                del found  # before the next bucket's activations

    try:
        yield run
    finally:
        manager.remove()


class Method(NamedTuple):
    """One way, and what it may be set to."""

    open: Callable[..., AbstractContextManager[Run]]
    settings: Callable[[int], list[Settings]]
    """Tokens of a packed row -> the settings to choose from."""
    package: str | None = None
    """What must be installed for it."""


def _rows(tokens_per_batch: int) -> list[Settings]:
    return [{"tokens_per_batch": tokens_per_batch}]


def _budgets(tokens_per_batch: int) -> list[Settings]:
    """The first means one example at a time, which needs no padding."""
    budgets = (1, tokens_per_batch // 2, tokens_per_batch, 2 * tokens_per_batch)
    return [{"tokens_per_batch": budget} for budget in budgets]


METHODS: dict[str, Method] = {
    FLOOR: Method(floor, _rows),
    ENGINE: Method(engine, _rows),
    "padded": Method(padded, _budgets),
    "loop": Method(loop, lambda tokens_per_batch: [{}]),
    "vmap": Method(vectorised, _budgets),
    "opacus": Method(opacus, _budgets, "opacus"),
    "bergson": Method(bergson, _budgets, "bergson"),
    "dattri_llm": Method(dattri_llm, _budgets, "dattri_llm"),
}
OWN = (FLOOR, ENGINE, "padded")
"""All others are peers."""


def why_not(name: str) -> str | None:
    """Why a method cannot run here, with the mend; None when it can."""
    package = METHODS[name].package
    if package is None:
        return None
    try:
        importlib.import_module(package)
    except ImportError as error:
        return f"{package} cannot be imported ({error}); `make peers` installs it, into an environment of its own"
    return None


def reference(task: Task) -> torch.Tensor:
    """[N, D]: one example at a time by autograd, in float32, without anything of the project's.

    Only the loss is in float64: on CPUs the softmax of PyTorch's cross entropy is off by 1e-5 for a large vocabulary,
    all words in the same direction, which the head makes an error of 1e-4 in a gradient.
    """
    weights = [weight for _, weight in task.weights.values()]
    dtypes = {parameter: parameter.dtype for parameter in task.model.parameters()}
    task.model.float()
    gradients_ND = torch.empty(len(task.examples), task.dimension, device=task.device)
    for row, (ids, labels) in enumerate(task.examples):
        input_ids, targets = torch.tensor([ids], device=task.device), torch.tensor(labels[1:], device=task.device)
        logits = task.model(input_ids=input_ids, use_cache=False).logits[0, :-1]
        gradients = torch.autograd.grad(cross_entropy(logits.double(), targets), weights)
        torch.cat([gradient.flatten() for gradient in gradients], out=gradients_ND[row])
    for parameter, dtype in dtypes.items():
        parameter.data = parameter.data.to(dtype)
    return gradients_ND
