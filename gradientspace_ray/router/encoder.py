"""The text encoder in front of the router: prompt -> unit vector.

Shapes: N prompts, T tokens of the longest prompt in a batch, H width of the encoder.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional
from transformers import AutoModel

from gradientspace_ray.models.loading import load_tokenizer, resolve_model, without_progress_bars

PROMPTS_PER_BATCH = 32


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

    def encode(self, prompts: Sequence[str]) -> np.ndarray:
        """Encodings [N, H], float32, unit length; but for rounding, a prompt's own does not depend on the others."""
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


def pool(states_NTH: torch.Tensor, mask_NT: torch.Tensor) -> torch.Tensor:
    """Mean of the states under the mask, scaled to unit length: [N, H] float32."""
    weights_NT1 = mask_NT[..., None].to(torch.float32)
    means_NH = (states_NTH.float() * weights_NT1).sum(1) / weights_NT1.sum(1).clamp(min=1)
    return functional.normalize(means_NH, dim=-1)
