"""The text encoder in front of the router: prompt -> unit vector; and a memory of the latest ones.

Shapes: N prompts, T tokens of the longest prompt in a batch, H width of the encoder.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional
from transformers import AutoModel

from gradientspace_ray.models.loading import load_tokenizer, resolve_model, without_progress_bars

PROMPTS_PER_BATCH = 32
CHARACTERS_PER_TOKEN = 64
"""More than any text has, on average: what lies behind the last token that is read need not be tokenised."""


class PromptEncoder:
    """A frozen transformers encoder with mean pooling, as the sentence-transformers models use it."""

    def __init__(self, name: str, max_tokens: int, device: str | torch.device = "cpu") -> None:
        """Load the encoder in float32.

        Args:
            name: a local folder or a Hugging Face name; see `models.loading.resolve_model`.
            max_tokens: longest prompt in the encoder's own tokens; the end of a longer one is cut off.
            device: where the weights live.

        Raises:
            ModelError: the encoder cannot be found.
        """
        self.name = name
        self._tokenizer = load_tokenizer(name)
        with without_progress_bars():
            model = AutoModel.from_pretrained(resolve_model(name), dtype=torch.float32)
        self._model = model.to(device).eval().requires_grad_(False)
        positions = getattr(model.config, "max_position_embeddings", max_tokens)
        self.max_tokens = min(max_tokens, positions, self._tokenizer.model_max_length)

    @property
    def width(self) -> int:
        """H, the length of an encoding."""
        return self._model.config.hidden_size

    def readable(self, prompt: str) -> str:
        """What of a prompt decides its encoding: its beginning, with `?` for the halves of characters JSON may hold."""
        return prompt[: self.max_tokens * CHARACTERS_PER_TOKEN].encode(errors="replace").decode()

    def encode(self, prompts: Sequence[str]) -> np.ndarray:
        """Encodings [N, H], float32, unit length; but for rounding, a prompt's own does not depend on the others."""
        prompts = [self.readable(prompt) for prompt in prompts]
        encodings_NH = np.zeros((len(prompts), self.width), dtype=np.float32)
        # Prompts of like length share a batch, so that little of it is padding.
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        for start in range(0, len(order), PROMPTS_PER_BATCH):
            batch = order[start : start + PROMPTS_PER_BATCH]
            encodings_NH[batch] = self._encode_batch([prompts[index] for index in batch])
        return encodings_NH

    def _encode_batch(self, prompts: list[str]) -> np.ndarray:
        tokens = self._tokenizer(
            prompts, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(self._model.device)
        with torch.inference_mode():
            states_NTH = self._model(**tokens).last_hidden_state
        return pool(states_NTH, tokens["attention_mask"]).cpu().numpy()


class RememberingEncoder:
    """An encoder that keeps its latest encodings, so that a conversation costs one at each turn.

    Several threads may call at once.
    """

    def __init__(self, encoder: PromptEncoder, capacity: int) -> None:
        """Remember as many prompts as `capacity`: at a width of 384, two KB each."""
        self._encoder = encoder
        self._capacity = capacity
        self._known: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def encode(self, prompts: Sequence[str]) -> np.ndarray:
        """As `PromptEncoder.encode`; equal prompts are encoded once."""
        # A prompt itself may be as large as a request.
        keys = [hashlib.sha256(self._encoder.readable(prompt).encode()).digest() for prompt in prompts]
        with self._lock:
            found = {key: self._known[key] for key in keys if key in self._known}
        missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in found}
        # Copies: a view would keep its whole batch in memory.
        encoded = (row_H.copy() for row_H in self._encoder.encode(list(missing.values())))
        found |= dict(zip(missing, encoded, strict=True))
        with self._lock:
            for key in keys:
                self._known[key] = found[key]
                self._known.move_to_end(key)
            while len(self._known) > self._capacity:
                self._known.popitem(last=False)
        return np.stack([found[key] for key in keys]) if keys else np.zeros((0, self._encoder.width), np.float32)


def pool(states_NTH: torch.Tensor, mask_NT: torch.Tensor) -> torch.Tensor:
    """Mean of the states under the mask, scaled to unit length: [N, H] float32."""
    weights_NT1 = mask_NT[..., None].to(torch.float32)
    means_NH = (states_NTH.float() * weights_NT1).sum(1) / weights_NT1.sum(1).clamp(min=1)
    return functional.normalize(means_NH, dim=-1)
