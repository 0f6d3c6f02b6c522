"""Packed rows: several examples one after another in one row, without padding.

Shapes: n examples, T tokens of the row, L label tokens of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn.utils.rnn import pad_sequence

from gradientspace_ray.examples.rendering import IGNORED

Example = tuple[Sequence[int], Sequence[int]]
"""Token ids and labels, of equal length."""


@dataclass(frozen=True)
class Packed:
    """One packed row. Attention must stay within the segments that `cu_seqlens` borders."""

    input_ids: torch.Tensor
    """[1, T] int64."""
    position_ids: torch.Tensor
    """[1, T] int64, from 0 in each example."""
    labels: torch.Tensor
    """[1, T] int64, aligned with `input_ids` (not shifted); -100 where no loss is taken."""
    cu_seqlens: torch.Tensor
    """[n + 1] int32 borders of the examples, from 0 to T."""

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return torch.diff(self.cu_seqlens).tolist()

    @cached_property
    def label_positions(self) -> torch.Tensor:
        """[L] int64, ascending: the positions whose logits predict a label, each one before its label token."""
        return (self.labels[0, 1:] != IGNORED).nonzero().squeeze(1)

    @cached_property
    def label_ids(self) -> torch.Tensor:
        """[L] int64: the token that each of `label_positions` has to predict."""
        return self.labels[0, self.label_positions + 1]

    @cached_property
    def label_examples(self) -> torch.Tensor:
        """[L] int64: the example, 0 to n - 1, of each label token."""
        return torch.searchsorted(self.cu_seqlens, self.label_positions.to(torch.int32), right=True) - 1

    def to(self, device: torch.device | str) -> "Packed":
        """The same row on another device."""
        tensors = (self.input_ids, self.position_ids, self.labels, self.cu_seqlens)
        return Packed(*(tensor.to(device) for tensor in tensors))


def pack(examples: Sequence[Example]) -> Packed:
    """Put examples into one row, in the order given.

    The label of an example's first token is dropped: the token before it belongs to another example.

    Args:
        examples: (input_ids, labels) of each, -100 where no loss is taken.

    Raises:
        ValueError: there is no example, or one is empty, or its labels are not as many as its tokens.
    """
    if not examples:
        raise ValueError("pack: no examples")
    borders = [0]
    input_ids: list[int] = []
    position_ids: list[int] = []
    labels: list[int] = []
    for index, (example_ids, example_labels) in enumerate(examples):
        length = len(example_ids)
        if length == 0 or length != len(example_labels):
            raise ValueError(f"pack: example {index} has {length} tokens and {len(example_labels)} labels")
        input_ids.extend(example_ids)
        position_ids.extend(range(length))
        labels.append(IGNORED)
        labels.extend(example_labels[1:])
        borders.append(borders[-1] + length)
    return Packed(
        input_ids=torch.tensor([input_ids], dtype=torch.int64),
        position_ids=torch.tensor([position_ids], dtype=torch.int64),
        labels=torch.tensor([labels], dtype=torch.int64),
        cu_seqlens=torch.tensor(borders, dtype=torch.int32),
    )


def pad(packed: Packed) -> torch.Tensor:
    """[n, longest] int64: the row's examples below one another, padded on the right with token 0."""
    return pad_sequence(list(packed.input_ids[0].split(packed.lengths)), batch_first=True)


def plan_batches(lengths: Sequence[int], tokens_per_batch: int, padded: bool = False) -> list[list[int]]:
    """Divide examples into packed rows, or padded batches, of similar lengths.

    Longest first, so that a row which does not fit into memory fails at once and not at the end.

    Args:
        lengths: tokens of each example.
        tokens_per_batch: most tokens of a row; an example longer than this has a row of its own.
        padded: count each example as long as the longest beside it.

    Returns:
        Indices of each row's examples; each index occurs once, and equal lengths keep their order.
    """
    batches: list[list[int]] = []
    used = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        takes = lengths[batches[-1][0] if padded and batches else index]
        if not batches or used + takes > tokens_per_batch:
            batches.append([])
            used, takes = 0, lengths[index]
        batches[-1].append(index)
        used += takes
    return batches
