"""Per-sample LoRA gradients at full dimension, for the price of one ordinary backward pass.

Examples are read in packed rows (`packed.py`), or, by models whose attention cannot be kept within segments, in padded
batches (`padded.py`). Either way a backward pass writes every example's gradient into its row of one preallocated
result: no `.grad` is made, and nothing is differentiated below the first adapted layer.

Shapes: N examples, D LoRA parameters.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import nn

from gradientspace_ray.examples.packing import IGNORED, Example, pack, plan_batches
from gradientspace_ray.gradients.budget import SavedBytes, is_out_of_memory, largest_budget
from gradientspace_ray.gradients.coverage import LoraSite, check_coverage
from gradientspace_ray.gradients.layout import Column, columns_of, targets_of
from gradientspace_ray.gradients.packed import PackedLayer
from gradientspace_ray.gradients.padded import PaddedLayer
from gradientspace_ray.gradients.preconditioner import Kind, Preconditioner
from gradientspace_ray.models.attention import SEGMENTED, UnsupportedModelError
from gradientspace_ray.models.checkpointing import activation_checkpointing
from gradientspace_ray.models.losses import Reduction, example_nll, label_nll
from gradientspace_ray.models.moments import AdamMoments
from gradientspace_ray.models.reading import check_packing, check_padding, padded_attention, with_attention

LabelPolicy = Literal["response", "instruction", "all"]
Normalisation = Literal["example", "module", "none"]
Path = Literal["auto", "packed", "padded"]
log = logging.getLogger(__name__)


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
            dtype: of the result, float32 or bfloat16. Sums over tokens are accumulated in float32 either way.
            compute_dtype: see `label_nll`.
            checkpointing: keep only each layer's input for the backward pass, and run its forward pass once more.
            tokens_per_batch: tokens of one packed row, or of one padded batch; a longer example has one of its own.
                `auto` is the largest number that fits. Where memory runs out all the same, it is halved.
            path: `auto` packs where the model keeps the examples of a packed row apart, and logs why it does not.

        Raises:
            CoverageError: see `check_coverage`.
            MomentsError: see `Preconditioner`.
            UnsupportedModelError: the model can be read on neither path, or not on the one that was asked for.
            ValueError: there is a preconditioner without moments.
        """
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
            if moments is None:
                raise ValueError(f"preconditioner {preconditioner!r} needs the optimizer's moments; give moments=")
            self._preconditioner = Preconditioner(preconditioner, moments, self.columns, _device(model))
        self.path = _choose_path(model.get_base_model(), path)

    def gradients(self, examples: Sequence[Example], out: torch.Tensor | None = None) -> torch.Tensor:
        """One gradient a row, in the order of the examples.

        Args:
            examples: (input_ids, labels) of any lengths. An example's row does not depend on the others.
            out: [N, D] of the engine's dtype on the model's device, each row contiguous; made anew when None.

        Returns:
            [N, D]: `out`.

        Raises:
            CoverageError: the model has changed since (mode, active adapter), or routes tokens so that a layer does
                not see the whole row.
            ValueError: an example has no label that counts, or `out` does not fit.
            torch.OutOfMemoryError: one example alone does not fit into memory.
        """
        sites = check_coverage(self._model, self._adapter)
        labelled = [_labelled(example, self._labels, index) for index, example in enumerate(examples)]
        gradients_ND = self._check_out(out, len(examples))
        kind = PackedLayer if self.path == "packed" else PaddedLayer
        targets = targets_of(self.columns, gradients_ND)
        layers = [kind(site, self._adapter, target) for site, target in zip(sites, targets, strict=True)]
        base = self._model.get_base_model()
        attention = SEGMENTED if self.path == "packed" else padded_attention(base)
        checkpointed = activation_checkpointing(base) if self._checkpointing else nullcontext()
        with with_attention(base, attention), checkpointed, _standing_in(sites, layers), torch.enable_grad():
            waiting = list(range(len(examples)))
            while waiting:
                waiting = self._run(labelled, waiting, layers)
        if self._preconditioner:
            self._preconditioner.apply(gradients_ND)
        normalise(gradients_ND, self.columns, self._normalisation)
        return gradients_ND

    def _run(self, examples: list[Example], waiting: list[int], layers: Sequence[Any]) -> list[int]:
        """Go through the examples until all are done, or the token budget changes. Returns those that still wait."""
        lengths = [len(examples[index][0]) for index in waiting]
        budget = self.tokens_per_batch or 1  # one: the longest example alone, which shows what a token takes
        done: set[int] = set()
        for positions in plan_batches(lengths, budget, padded=self.path == "padded"):
            rows = [waiting[position] for position in positions]
            failure = self._backward(examples, rows, layers)
            if failure:
                self._shrink(failure, rows, max(lengths[position] for position in positions), len(rows))
                break
            done.update(rows)
            if budget != self.tokens_per_batch:
                break
        return [index for index in waiting if index not in done]

    def _backward(self, examples: list[Example], rows: list[int], layers: Sequence[Any]) -> str:
        """Write the gradients of one batch. Returns the message of the error if memory ran out."""
        packed = pack([examples[row] for row in rows])
        saved = SavedBytes()
        try:
            for layer in layers:
                layer.begin(rows, packed)
            with saved.counting(self._model) if self.tokens_per_batch is None else nullcontext():
                nll_L = label_nll(self._model, packed, self._compute_dtype)
            example_nll(nll_L, packed.label_examples, len(rows), self._loss).sum().backward()
            for layer in layers:
                layer.end()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            # The text alone: the error holds the frames, and they the tensors that have to go.
            return str(error).splitlines()[0]
        if self.tokens_per_batch is None:
            # This first batch holds one example, so its tokens are the same on both paths.
            self.tokens_per_batch = largest_budget(saved.total / sum(packed.lengths), _device(self._model))
        return ""

    def _shrink(self, failure: str, rows: list[int], longest: int, count: int) -> None:
        """Halve the token budget after memory ran out; an example that was alone cannot be helped."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if count == 1:
            mend = "lower data.max_tokens" if self._checkpointing else "set gradients.checkpointing to true"
            raise torch.OutOfMemoryError(
                f"example {rows[0]}: its {longest} tokens do not fit into memory alone ({failure}); {mend}"
            )
        assert self.tokens_per_batch is not None
        self.tokens_per_batch = max(longest, self.tokens_per_batch // 2)
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
    norms_N = torch.linalg.vector_norm(rows_ND, dim=1, keepdim=True, dtype=torch.float32)
    rows_ND.mul_(torch.where(norms_N == 0, 1.0, norms_N.reciprocal()))


def _labelled(example: Example, policy: LabelPolicy, index: int) -> Example:
    """The example with the labels that count, cut after the last of them: later tokens cannot change its gradient."""
    input_ids, labels = list(example[0]), list(example[1])
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


def _choose_path(base: nn.Module, wanted: Path) -> Literal["packed", "padded"]:
    """The path that was asked for, if the model can be read so; `auto` prefers packed rows."""
    if wanted != "padded":
        try:
            with with_attention(base, SEGMENTED):
                check_packing(base)
        except UnsupportedModelError as error:
            if wanted == "packed":
                raise
            log.warning("per-sample gradients on the padded path: %s", error)
        else:
            return "packed"
    with with_attention(base, padded_attention(base)):
        check_padding(base)
    return "padded"


@contextmanager
def _standing_in(sites: Sequence[LoraSite], layers: Sequence[Any]) -> Iterator[None]:
    """While the block runs, `layers` compute in the place of the LoRA layers; afterwards those are as they were."""
    with ExitStack() as stack:
        for site, layer in zip(sites, layers, strict=True):
            own = site.module.__dict__
            if "forward" in own:
                stack.callback(own.__setitem__, "forward", own["forward"])
            else:
                stack.callback(own.pop, "forward")
            own["forward"] = layer.forward
        yield
