"""The steps of a model for many requests: a part of one prompt, or one token of every row.

Shapes: N rows, T tokens of a step, C tokens that the longest row holds, V vocabulary.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from gradientspace_ray.engine.cache import RowCache
from gradientspace_ray.engine.slots import BASE_SLOT, Slots
from gradientspace_ray.models.attention import UnsupportedModelError, check_layer_types
from gradientspace_ray.models.loading import ModelError

FULL, SLIDING = "full_attention", "sliding_attention"
# The check's logits may differ by this part of their spread: rounding is less, another token more.
TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-2}
HALF_TOLERANCE = 0.3
MEND = "serve a base model of another architecture"
CHECKED_PROMPTS = ([3, 5, 7, 11, 13, 17, 19], [2, 4, 8])


def context_tokens(config: PreTrainedConfig) -> int:
    """The longest text that the model reads in one way.

    LongRoPE (arXiv 2402.13753) turns to other frequencies for all rows of a batch where the longest passes the length
    that the model was first trained for, so no row may.

    Raises:
        ModelError: the model does not tell.
    """
    config = config.get_text_config()
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    longest: int | None = getattr(config, "max_position_embeddings", None)
    if longest is None:
        raise ModelError(f"{config.model_type}: its configuration has no max_position_embeddings; {MEND}")
    for parameters in (rope, *(kind for kind in rope.values() if isinstance(kind, dict))):
        if parameters.get("rope_type") == "longrope":
            longest = min(longest, parameters.get("original_max_position_embeddings", longest))
    return longest


class BatchedModel:
    """A base model, its slots and the cache of its rows; use it from one thread, in inference mode."""

    def __init__(
        self, model: PreTrainedModel, slots: Slots, max_rows: int, max_cache_tokens: int, compute_dtype: torch.dtype
    ) -> None:
        """Take a model whose layers `slots` wrapped.

        Args:
            model: the base model.
            slots: where its adapters are held.
            max_rows: see `RowCache`.
            max_cache_tokens: see `RowCache`.
            compute_dtype: type of the matrix products, by autocast; float32 leaves them in the type of the weights.

        Raises:
            ModelError: a batch of rows would not give the model's own logits.
        """
        self._model, self._slots = model, slots
        config = model.config.get_text_config()
        self.context_tokens = context_tokens(model.config)
        self.vocabulary: int = config.vocab_size
        self._device = model.device
        self._compute_dtype = compute_dtype
        self._autocasts = compute_dtype != torch.float32
        self._windows = _windows(config)
        self._arguments: dict[str, Any] = {"use_cache": True}
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            self._arguments["logits_to_keep"] = 1
        held = compute_dtype if self._autocasts else None
        longest = max(map(len, CHECKED_PROMPTS))
        self.cache = RowCache(len(CHECKED_PROMPTS), longest, len(CHECKED_PROMPTS) * longest, held)
        self._check()
        self.cache = RowCache(max_rows, self.context_tokens, max_cache_tokens, held)

    def prefill(self, row: int, slot: int, start: int, tokens: Sequence[int]) -> Tensor:
        """Read a part of a prompt into a row, from position `start` on; the logits [V] after it."""
        self.cache.at(row, start, len(tokens))
        positions_NT = torch.arange(start, start + len(tokens), device=self._device)[None]
        return self._forward([list(tokens)], positions_NT, [slot])[0]

    def decode(self, tokens: Sequence[int], positions: Sequence[int], slots: Sequence[int]) -> Tensor:
        """One token in each of the first rows, row i's at `positions[i]` with slot `slots[i]`; the logits [N, V]."""
        self.cache.at_ends(positions, self._device)
        positions_NT = torch.tensor(positions, device=self._device)[:, None]
        return self._forward([[token] for token in tokens], positions_NT, slots)

    def _forward(self, tokens: list[list[int]], positions_NT: Tensor, slots: Sequence[int]) -> Tensor:
        with self._slots.rows(slots), self._products():
            output = self._model(
                input_ids=torch.tensor(tokens, device=self._device),
                attention_mask=self._masks(positions_NT),
                position_ids=positions_NT,
                past_key_values=self.cache,
                **self._arguments,
            )
        return output.logits[:, -1]

    @contextmanager
    def _products(self) -> Iterator[None]:
        with torch.autocast(self._device.type, dtype=self._compute_dtype, enabled=self._autocasts):
            yield

    def _masks(self, positions_NT: Tensor) -> Tensor | dict[str, Tensor]:
        """What is added to the scores [N, 1, T, C]: 0 for what a token sees, minus infinity for the rest.

        With four dimensions, transformers takes them as they are. Models of several kinds of layers take one of each.
        """
        keys_C = torch.arange(self.cache.get_seq_length() + positions_NT.shape[1], device=self._device)
        behind_NTC = positions_NT[..., None] - keys_C
        masks = {}
        for kind, window in self._windows.items():
            hidden_NTC = behind_NTC < 0 if window is None else (behind_NTC < 0) | (behind_NTC >= window)
            mask_NTC = torch.zeros(hidden_NTC.shape, dtype=self._model.dtype, device=self._device)
            masks[kind] = mask_NTC.masked_fill_(hidden_NTC, -torch.inf)[:, None]
        return masks if len(masks) > 1 else next(iter(masks.values()))

    @torch.inference_mode()
    def _check(self) -> None:
        """Compare two rows, one read in two parts, with the model's plain reading of each text alone.

        Raises:
            ModelError: they differ, or the model cannot be called so.
        """
        name = self._model.name_or_path or type(self._model).__name__
        first, second = CHECKED_PROMPTS
        try:
            check_layer_types(self._model.config)
            with self._products():
                prompts = [torch.tensor([ids], device=self._device) for ids in CHECKED_PROMPTS]
                plain = [self._model(input_ids, use_cache=False).logits[0, -1] for input_ids in prompts]
            expected_NV = torch.stack(plain).float()
            self.cache.reserve(2, len(first))
            self.prefill(0, BASE_SLOT, 0, first[:3])
            self.prefill(0, BASE_SLOT, 3, first[3:-1])
            self.prefill(1, BASE_SLOT, 0, second[:-1])
            ends = [first[-1], second[-1]], [len(first) - 1, len(second) - 1]
            # Rows of two slots, as of two adapters; one that nothing was loaded into changes nothing either.
            got_NV = self.decode(*ends, [BASE_SLOT, min(1, self._slots.capacity)]).float()
        except UnsupportedModelError as error:
            raise ModelError(f"{name}: {error}; {MEND}") from error
        except (TypeError, ValueError, IndexError, RuntimeError, AttributeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelError(f"{name}: rows of several requests cannot share a step ({reason}); {MEND}") from error
        exact = not self._autocasts and self._model.dtype in TOLERANCE
        tolerance = TOLERANCE[self._model.dtype] if exact else HALF_TOLERANCE
        if not bool((got_NV - expected_NV).abs().max() <= tolerance * expected_NV.std()):
            raise ModelError(f"{name}: rows of several requests change each other's logits; {MEND}")


def _windows(config: PreTrainedConfig) -> dict[str, int | None]:
    """Kind of layer -> the latest tokens that it sees, itself included; None is all."""
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds:
        return {FULL: None} if window is None else {SLIDING: window}
    return {kind: window if kind == SLIDING else None for kind in sorted(kinds)}
