"""Per-sample LoRA gradients at full dimension, for the price of one ordinary backward pass.

Examples are read in packed rows (`packed.py`), or, by models whose attention cannot be kept within segments, in padded
batches (`padded.py`). Either way a backward pass writes every example's gradient into its row of one preallocated
result: no `.grad` is made, and nothing is differentiated below the first adapted layer.

Shapes: N examples, D LoRA parameters.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Literal, get_args

import torch
from peft import PeftModel
from torch import nn

from gradientspace_ray.examples.packing import IGNORED, Example, pack, plan_batches
from gradientspace_ray.gradients.budget import MemoryMeter, largest_budget
from gradientspace_ray.gradients.coverage import LoraSite, check_coverage
from gradientspace_ray.gradients.layout import Batch, Column, columns_of, targets_of
from gradientspace_ray.gradients.packed import PackedLayer
from gradientspace_ray.gradients.padded import PaddedLayer
from gradientspace_ray.gradients.preconditioner import Kind, Preconditioner
from gradientspace_ray.models.attention import SEGMENTED, UnsupportedModelError
from gradientspace_ray.models.checkpointing import activation_checkpointing
from gradientspace_ray.models.losses import Reduction, example_nll, label_nll
from gradientspace_ray.models.moments import AdamMoments
from gradientspace_ray.models.reading import (
    check_packing,
    check_padding,
    is_out_of_memory,
    padded_attention,
    with_attention,
)

LabelPolicy = Literal["response", "instruction", "all"]
Normalisation = Literal["example", "module", "none"]
Path = Literal["auto", "packed", "padded"]
CHOICES = {"labels": LabelPolicy, "loss": Reduction, "normalisation": Normalisation, "path": Path}
DTYPES = {"dtype": (torch.float32, torch.bfloat16, torch.float64), "compute_dtype": (torch.float32, torch.bfloat16)}
log = logging.getLogger(__name__)


class ExampleTooLargeError(torch.OutOfMemoryError):
    """An example that does not fit into memory even alone; `row` is its index among the examples of the call."""

    def __init__(self, row: int, reason: str) -> None:
        super().__init__(f"example {row}: {reason}")
        self.row, self.reason = row, reason


class PerSampleGradients:
    """Gradients of each example's loss with respect to one adapter's weights.

    Attributes:
        columns: the weights that make up a gradient, in the order of `model.named_parameters()`.
        dimension: D, their total size.
        path: how examples are read, `packed` or `padded`.
        tokens_per_batch: of the next row; None until the first row has shown how many fit.
    """

    def __init__(
        self,
        model: PeftModel,
        adapter: str = "default",
        *,
        labels: LabelPolicy = "response",
        loss: Reduction = "mean",
        normalisation: Normalisation = "none",
        preconditioner: Kind | Literal["none"] = "none",
        moments: AdamMoments | None = None,
        dtype: torch.dtype = torch.float32,
        compute_dtype: torch.dtype = torch.float32,
        checkpointing: bool = False,
        tokens_per_batch: int | Literal["auto"] = "auto",
        path: Path = "auto",
    ) -> None:
        """Check that the adapter is covered, lay out the columns, and choose the path.

        Args:
            model: a PEFT model; it is used as it is, and left as it was after each call.
            adapter: the active adapter.
            labels: tokens whose loss counts: `response` as given; `instruction`, every other token before the last
                response token; or `all`.
            loss: an example's loss is the mean or the sum over these tokens, in nats.
            normalisation: `example` scales each gradient to unit length; `module` scales the part of each adapted layer
                to one length, so that all count alike, and the whole to unit length. What is zero stays zero.
            preconditioner: `adam` or `less`, see `Preconditioner`; applied before the normalisation.
            moments: of the optimizer that trained the adapter, see `load_moments`; a preconditioner needs them.
            dtype: of the result: float32, bfloat16, or float64 for a model in float64.
            compute_dtype: see `label_nll`.
            checkpointing: keep only each layer's input for the backward pass, and run its forward pass once more.
            tokens_per_batch: tokens of one packed row, or of one padded batch; a longer example has one of its own.
                `auto` is the largest number that fits. Where memory runs out all the same, it is halved.
            path: `auto` packs where the model keeps the examples of a packed row apart, and logs why it does not.

        Raises:
            CoverageError: see `check_coverage`.
            MomentsError: see `Preconditioner`.
            UnsupportedModelError: the model can be read on neither path, or not on the one that was asked for.
            ValueError: an option has no such value, or there is a preconditioner without moments.
        """
        choices = {"labels": labels, "loss": loss, "normalisation": normalisation, "path": path}
        _check_options(choices, {"dtype": dtype, "compute_dtype": compute_dtype}, tokens_per_batch)
        self._model, self._adapter = model, adapter
        self._labels, self._loss = labels, loss
        self._normalisation = normalisation
        self._dtype, self._compute_dtype = dtype, compute_dtype
        self._checkpointing = checkpointing
        self.tokens_per_batch = None if tokens_per_batch == "auto" else tokens_per_batch
        self.columns: tuple[Column, ...] = columns_of(check_coverage(model, adapter))
        self.dimension = sum(rows * width for _, _, (rows, width) in self.columns)
        self._preconditioner = None
        if preconditioner != "none":
            if preconditioner not in get_args(Kind):
                raise ValueError(f"preconditioner={preconditioner!r}: give none, {', '.join(get_args(Kind))}")
            if moments is None:
                raise ValueError(f"preconditioner {preconditioner!r} needs the optimizer's moments; give moments=")
            self._preconditioner = Preconditioner(preconditioner, moments, self.columns, _device(model))
        self.path = _choose_path(model.get_base_model(), path, compute_dtype)

    @torch.inference_mode(False)
    def gradients(
        self,
        examples: Sequence[Example],
        out: torch.Tensor | None = None,
        on_batch: Callable[[Sequence[int]], None] | None = None,
    ) -> torch.Tensor:
        """One gradient a row, in the order of the examples.

        Args:
            examples: (input_ids, labels) of any lengths: lists, or arrays or tensors of one dimension. An example's
                row does not depend on the others.
            out: [N, D] of the engine's dtype on the model's device, each row contiguous; made anew when None.
            on_batch: called after each batch with the indices of its examples, for those who wait.

        Returns:
            [N, D]: `out`.

        Raises:
            CoverageError: the model has changed since (mode, active adapter), or routes tokens so that a layer does
                not see the whole row.
            ValueError: an example has no label that counts, or a token that the model does not know, or `out` does not
                fit.
            ExampleTooLargeError: one example alone does not fit into memory.

        After an error in the middle, some rows of `out` are written.
        """
        sites = check_coverage(self._model, self._adapter)
        labelled = [_labelled(example, self._labels, index) for index, example in enumerate(examples)]
        _check_vocabulary(self._model, labelled)
        gradients_ND = self._check_out(out, len(examples))
        kind = PackedLayer if self.path == "packed" else PaddedLayer
        targets = targets_of(self.columns, gradients_ND)
        layers = [kind(site, self._adapter, target) for site, target in zip(sites, targets, strict=True)]
        base = self._model.get_base_model()
        attention = SEGMENTED if self.path == "packed" else padded_attention(base)
        checkpointed = activation_checkpointing(base) if self._checkpointing else nullcontext()
        with (
            torch.enable_grad(),
            with_attention(base, attention),
            checkpointed,
            _standing_in(sites, layers),
        ):
            waiting = list(range(len(examples)))
            while waiting:
                waiting = self._run(labelled, waiting, layers, on_batch)
        if self._preconditioner:
            self._preconditioner.apply(gradients_ND)
        normalise(gradients_ND, self.columns, self._normalisation)
        return gradients_ND

    def _run(
        self,
        examples: list[Example],
        waiting: list[int],
        layers: Sequence[Any],
        on_batch: Callable[[Sequence[int]], None] | None,
    ) -> list[int]:
        """Go through the examples until all are done, or the token budget changes. Returns those that still wait."""
        lengths = [len(examples[index][0]) for index in waiting]
        budget = self.tokens_per_batch or 1  # one: the longest example alone, which shows what a token takes
        done: set[int] = set()
        for positions in plan_batches(lengths, budget, padded=self.path == "padded"):
            rows = [waiting[position] for position in positions]
            failure = self._backward(examples, rows, layers)
            if failure:
                self._shrink(failure, rows, [lengths[position] for position in positions])
                break
            done.update(rows)
            if on_batch:
                on_batch(rows)
            if budget != self.tokens_per_batch:
                break
        return [index for index in waiting if index not in done]

    def _backward(self, examples: list[Example], rows: list[int], layers: Sequence[Any]) -> str:
        """Write the gradients of one batch. Returns the message of the error if memory ran out."""
        packed = pack([examples[row] for row in rows])
        device = _device(self._model)
        meter = MemoryMeter(device) if self.tokens_per_batch is None else None
        batch = Batch(rows, packed.lengths, torch.tensor(rows).to(device), packed.cu_seqlens[1:].to(device))
        try:
            for layer in layers:
                layer.begin(batch)
            with meter.measuring() if meter else nullcontext():
                nll_L = label_nll(self._model, packed, self._compute_dtype)
                example_nll(nll_L, packed.label_examples, len(rows), self._loss).sum().backward()
            for layer in layers:
                layer.end()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            # The text alone: the error holds the frames, and they the tensors that have to go.
            return str(error).splitlines()[0]
        if meter:
            # This first batch holds one example, so its tokens are the same on both paths.
            self.tokens_per_batch = largest_budget(meter.peak_bytes / sum(packed.lengths), device)
        return ""

    def _shrink(self, failure: str, rows: list[int], lengths: list[int]) -> None:
        """Go on with half of what did not fit, from now on; an example that was alone cannot be helped."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(rows) == 1:
            mend = "lower data.max_tokens" if self._checkpointing else "set gradients.checkpointing to true"
            reason = f"its {lengths[0]} tokens do not fit into memory alone ({failure}); {mend}"
            raise ExampleTooLargeError(rows[0], reason)
        tokens = sum(lengths) if self.path == "packed" else len(lengths) * max(lengths)
        self.tokens_per_batch = max(*lengths, tokens // 2)
        log.warning("out of memory; going on with %d tokens at once", self.tokens_per_batch)

    def _check_out(self, out: torch.Tensor | None, count: int) -> torch.Tensor:
        device = _device(self._model)
        if out is None:
            return torch.empty(count, self.dimension, dtype=self._dtype, device=device)
        fits = out.shape == (count, self.dimension) and out.dtype == self._dtype and out.device == device
        if not fits or (count and out.stride(1) != 1):
            raise ValueError(
                f"out is {out.dtype} {tuple(out.shape)} on {out.device}; needed: "
                f"{str(self._dtype).removeprefix('torch.')} {(count, self.dimension)} on {device} with contiguous rows"
            )
        return out


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def normalise(gradients_ND: torch.Tensor, columns: Sequence[Column], kind: Normalisation) -> None:
    """Scale gradients in place; see `PerSampleGradients`."""
    if kind == "module":
        # A and B of a layer stand side by side.
        starts = [offset for _, offset, _ in columns[::2]]
        ends = [*starts[1:], gradients_ND.shape[1]]
        for start, end in zip(starts, ends, strict=True):
            _to_unit_length(gradients_ND[:, start:end])
    if kind != "none":
        _to_unit_length(gradients_ND)


def _to_unit_length(rows_ND: torch.Tensor) -> None:
    # Row by row: a narrow type is promoted to take the norm, and one row's copy is small beside the result.
    for row_D in rows_ND:
        norm = torch.linalg.vector_norm(row_D, dtype=torch.promote_types(row_D.dtype, torch.float32))
        row_D.mul_(torch.where(norm == 0, 1.0, norm.reciprocal()))


def _check_options(
    choices: Mapping[str, str], dtypes: dict[str, torch.dtype], tokens_per_batch: int | Literal["auto"]
) -> None:
    for name, value in choices.items():
        if value not in get_args(CHOICES[name]):
            raise ValueError(f"{name}={value!r}: give one of {', '.join(get_args(CHOICES[name]))}")
    for name, dtype in dtypes.items():
        if dtype not in DTYPES[name]:
            raise ValueError(f"{name}={dtype}: give one of {', '.join(map(str, DTYPES[name]))}")
    if tokens_per_batch != "auto" and tokens_per_batch < 1:
        raise ValueError(f"tokens_per_batch={tokens_per_batch}: give a positive number, or auto")


def _check_vocabulary(model: PeftModel, examples: Sequence[Example]) -> None:
    """Refuse what a GPU would answer with an error that ends the process."""
    base: Any = model.get_base_model()
    words = base.get_input_embeddings().weight.shape[0]
    for index, (input_ids, _) in enumerate(examples):
        if not 0 <= min(input_ids) <= max(input_ids) < words:
            raise ValueError(
                f"example {index}: has token {max(input_ids, key=abs)}, the model knows 0 to {words - 1}; "
                "use the model's own tokenizer"
            )


def _labelled(example: Example, policy: LabelPolicy, index: int) -> Example:
    """The example with the labels that count, cut after the last of them: later tokens cannot change its gradient."""
    input_ids, labels = (part.tolist() if hasattr(part, "tolist") else list(part) for part in example)
    if len(input_ids) != len(labels):
        raise ValueError(f"example {index}: {len(input_ids)} input_ids but {len(labels)} labels")
    response_end = max((place + 1 for place, label in enumerate(labels) if label != IGNORED), default=0)
    if policy == "all":
        labels = list(input_ids)
    elif policy == "instruction":
        prompt = zip(input_ids[:response_end], labels[:response_end], strict=True)
        labels = [token if label == IGNORED else IGNORED for token, label in prompt]
    # The first token has no predecessor that could predict it.
    end = max((place + 1 for place, label in enumerate(labels) if place and label != IGNORED), default=0)
    if not end:
        raise ValueError(f"example {index}: no token counts under labels={policy!r}; leave it out")
    return input_ids[:end], labels[:end]


def _choose_path(base: nn.Module, wanted: Path, compute_dtype: torch.dtype) -> Literal["packed", "padded"]:
    """The path that was asked for, if the model can be read so; `auto` prefers packed rows."""
    if wanted != "padded":
        try:
            with with_attention(base, SEGMENTED):
                check_packing(base, compute_dtype)
        except UnsupportedModelError as error:
            if wanted == "packed":
                raise
            log.warning("per-sample gradients on the padded path: %s", error)
        else:
            return "packed"
    with with_attention(base, padded_attention(base)):
        check_padding(base, compute_dtype)
    return "padded"


@contextmanager
def _standing_in(sites: Sequence[LoraSite], layers: Sequence[Any]) -> Iterator[None]:
    """While the block runs, `layers` compute in the place of the LoRA layers; afterwards those are as they were."""
    with ExitStack() as stack:
        for site, layer in zip(sites, layers, strict=True):
            own = vars(site.module)
            stack.callback(own.pop, "forward")
            own["forward"] = layer.forward
        yield
