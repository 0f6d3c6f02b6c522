"""Per-sample LoRA gradients at full dimension, for the price of one ordinary backward pass.

For a layer y = W x + s B A x with u = A x, d = dL/dy and v = s B^T d, example i has
    g_A = sum_t v_t x_t^T   [R, I]        g_B = s sum_t d_t u_t^T   [O, R]
with t over its tokens: the sums that the ordinary weight gradient takes over all tokens, cut at the examples' borders.
Examples are packed into one row, so each layer's sums are products of slices of the same matrices, written directly
into the rows of the result. No `.grad` is made, and nothing is differentiated below the first adapted layer.

Shapes: N examples, D LoRA parameters, T tokens of a packed row; of a layer: I inputs, O outputs, R its LoRA rank.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple

import torch
from peft import PeftModel
from torch.autograd.function import once_differentiable

from gradientspace_ray.examples.packing import IGNORED, Example, Packed, pack, plan_batches
from gradientspace_ray.gradients.coverage import CoverageError, LoraSite, check_coverage
from gradientspace_ray.models.losses import Reduction, example_nll, label_nll

LabelPolicy = Literal["response", "instruction", "all"]


class Column(NamedTuple):
    """Where one LoRA weight stands in a gradient."""

    name: str
    """As in PEFT's files, without the adapter's name."""
    offset: int
    shape: tuple[int, int]


class PerSampleGradients:
    """Gradients of each example's loss with respect to one adapter's weights.

    Attributes:
        columns: the weights that make up a gradient, in the order of `model.named_parameters()`.
        dimension: D, their total size.
    """

    def __init__(
        self,
        model: PeftModel,
        adapter: str = "default",
        *,
        labels: LabelPolicy = "response",
        loss: Reduction = "mean",
        tokens_per_batch: int = 1024,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        """Check that the adapter is covered, and lay out the columns.

        Args:
            model: a PEFT model whose base has "segmented" attention.
            adapter: the active adapter.
            labels: tokens whose loss counts: `response` as given; `instruction`, every other token before the last
                response token; or `all`.
            loss: an example's loss is the mean or the sum over these tokens, in nats.
            tokens_per_batch: tokens of one packed row; a longer example has a row of its own.
            compute_dtype: see `label_nll`. Gradients are accumulated and stored in float32.

        Raises:
            CoverageError: see `check_coverage`.
        """
        self._model = model
        self._adapter = adapter
        self._labels = labels
        self._loss: Reduction = loss
        self._tokens_per_batch = tokens_per_batch
        self._compute_dtype = compute_dtype
        self.columns = _columns(check_coverage(model, adapter))
        self.dimension = sum(rows * width for _, _, (rows, width) in self.columns)

    def gradients(self, examples: Sequence[Example], out: torch.Tensor | None = None) -> torch.Tensor:
        """One gradient a row, in the order of the examples.

        Args:
            examples: (input_ids, labels) of any lengths. An example's row does not depend on the others.
            out: float32 [N, D] on the model's device, each row contiguous; made anew when None.

        Returns:
            [N, D] float32: `out`.

        Raises:
            CoverageError: the model has changed since (mode, active adapter), or routes tokens so that a layer does
                not see the whole row.
            ValueError: an example has no label that counts, or `out` does not fit.
        """
        sites = check_coverage(self._model, self._adapter)
        labelled = [_labelled(example, self._labels, index) for index, example in enumerate(examples)]
        gradients_ND = self._check_out(out, len(examples))
        offsets = [column.offset for column in self.columns]
        writers = [
            _Writer(site, offset_a, offset_b, gradients_ND, self._adapter)
            for site, offset_a, offset_b in zip(sites, offsets[::2], offsets[1::2], strict=True)
        ]
        with _capturing(writers), torch.enable_grad():
            for batch in plan_batches([len(ids) for ids, _ in labelled], self._tokens_per_batch):
                packed = pack([labelled[index] for index in batch])
                self._backward(packed, batch, writers)
        return gradients_ND

    def _backward(self, packed: Packed, batch: list[int], writers: list["_Writer"]) -> None:
        borders = packed.cu_seqlens.tolist()
        for writer in writers:
            writer.begin(batch, borders)
        nll_L = label_nll(self._model, packed, self._compute_dtype)
        example_nll(nll_L, packed.label_examples, len(batch), self._loss).sum().backward()
        for writer in writers:
            writer.end()

    def _check_out(self, out: torch.Tensor | None, count: int) -> torch.Tensor:
        device = next(self._model.parameters()).device
        if out is None:
            return torch.empty(count, self.dimension, dtype=torch.float32, device=device)
        fits = out.shape == (count, self.dimension) and out.dtype == torch.float32 and out.device == device
        if not fits or (count and out.stride(1) != 1):
            raise ValueError(
                f"out is {out.dtype} {tuple(out.shape)} on {out.device}; "
                f"needed: float32 {(count, self.dimension)} on {device} with contiguous rows"
            )
        return out


class _Writer:
    """Takes one layer's backward pass and writes each example's gradient into its row."""

    def __init__(self, site: LoraSite, offset_a: int, offset_b: int, gradients_ND: torch.Tensor, adapter: str) -> None:
        self.site = site
        self.scaling = float(site.module.scaling[adapter])
        self._parts = ((offset_a, site.lora_a.shape), (offset_b, site.lora_b.shape))
        self._gradients_ND = gradients_ND
        self._rows: list[int] = []
        self._borders: list[int] = [0]
        self._written = False
        # The layer's input may need no gradient, and a loaded adapter is frozen: this connects the layer to the loss.
        self._anchor = torch.empty(0, requires_grad=True)

    def begin(self, rows: list[int], borders: list[int]) -> None:
        """Expect a packed row whose segments belong to these rows of the result."""
        self._rows, self._borders, self._written = rows, borders, False

    def end(self) -> None:
        """A layer that no token reached has gradient zero."""
        if not self._written:
            for index in range(len(self._rows)):
                self._target(index, 0).zero_()
                self._target(index, 1).zero_()

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The LoRA layer's forward pass."""
        result = self.site.module.base_layer(x, *args, **kwargs)
        tokens = x.numel() // x.shape[-1]
        if tokens != self._borders[-1]:
            raise CoverageError(
                f"{self.site.name}: sees {tokens} of {self._borders[-1]} tokens; a layer behind a router or a pooling "
                f"cannot tell whose they are, leave it out of target_modules"
            )
        return _LoraBranch.apply(result, x, self._anchor, self)

    def write(self, x_TI: torch.Tensor, su_TR: torch.Tensor, d_TO: torch.Tensor, v_TR: torch.Tensor) -> None:
        """Store g_A and g_B of every segment, summed in float32; a layer that is used twice adds up."""
        x, su, d, v = (matrix.float() for matrix in (x_TI, su_TR, d_TO, v_TR))
        beta = 1 if self._written else 0
        for index, (start, stop) in enumerate(zip(self._borders, self._borders[1:], strict=False)):
            for part, (left, right) in enumerate(((v, x), (d, su))):
                target = self._target(index, part)
                torch.addmm(target, left[start:stop].t(), right[start:stop], beta=beta, out=target)
        self._written = True

    def _target(self, index: int, part: int) -> torch.Tensor:
        offset, shape = self._parts[part]
        return self._gradients_ND[self._rows[index], offset : offset + shape.numel()].view(shape)


class _LoraBranch(torch.autograd.Function):
    """Adds s B A x to W x; its backward pass hands the per-token factors of the weight gradients to a writer.

    Writing happens in the backward pass only, so activation checkpointing, which runs the forward pass again, is safe.
    The scaling s always multiplies a [T, r] matrix, never one of the layer's width. The products are taken in the type
    that PEFT's own forward pass takes them in; it differs from the layer's output for a bfloat16 base without autocast.
    """

    @staticmethod
    def forward(ctx: Any, result: torch.Tensor, x: torch.Tensor, anchor: torch.Tensor, writer: _Writer) -> torch.Tensor:
        dtype = _branch_dtype(writer.site, x)
        with torch.autocast(x.device.type, enabled=False):
            a, b = (weight.detach().to(dtype) for weight in (writer.site.lora_a, writer.site.lora_b))
            x_TI, result_TO = _tokens(x), _tokens(result)
            su_TR = (x_TI.to(dtype) @ a.t()) * writer.scaling
            # x as it came, not its cast copy: the layers that share it share the memory too.
            ctx.save_for_backward(x, su_TR, a, b)
            ctx.writer = writer
            return torch.addmm(result_TO.to(dtype), su_TR, b.t()).to(result.dtype).view_as(result)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, su_TR, a, b = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            d_TO = _tokens(d).to(a.dtype)
            v_TR = (d_TO @ b) * ctx.writer.scaling
            ctx.writer.write(_tokens(x), su_TR, d_TO, v_TR)
            dx = (v_TR @ a).view_as(x).to(x.dtype) if ctx.needs_input_grad[1] else None
        return d, dx, None, None


def _branch_dtype(site: LoraSite, x: torch.Tensor) -> torch.dtype:
    """Type of PEFT's LoRA products: autocast's, or that of the LoRA weights, to which PEFT casts a layer's input."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return site.lora_a.dtype


def _tokens(matrix: torch.Tensor) -> torch.Tensor:
    """[..., width] -> [T, width]."""
    return matrix.reshape(-1, matrix.shape[-1])


def _columns(sites: Sequence[LoraSite]) -> tuple[Column, ...]:
    columns: list[Column] = []
    offset = 0
    for site in sites:
        for factor, weight in (("lora_A", site.lora_a), ("lora_B", site.lora_b)):
            rows, width = weight.shape
            columns.append(Column(f"{site.name}.{factor}.weight", offset, (rows, width)))
            offset += weight.numel()
    return tuple(columns)


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


@contextmanager
def _capturing(writers: list[_Writer]) -> Iterator[None]:
    """While the block runs, the LoRA layers compute through the writers; afterwards they are as they were."""
    with ExitStack() as stack:
        for writer in writers:
            own = writer.site.module.__dict__
            if "forward" in own:
                stack.callback(own.__setitem__, "forward", own["forward"])
            else:
                stack.callback(own.pop, "forward")
            own["forward"] = writer.forward
        yield
