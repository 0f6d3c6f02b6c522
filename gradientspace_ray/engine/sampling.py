"""From logits to tokens: each row of a batch by the wishes of its own request.

Shapes: N rows of a batch, V vocabulary.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradientspace_ray.engine.contract import Sampling, TokenLogprob

# Below this a temperature is greedy: logits divided by less leave float32's range.
MIN_TEMPERATURE = 1e-5
# The likeliest tokens that are sorted first to find a nucleus: nearly always enough, and much faster than sorting all.
NUCLEUS_GUESS = 256


class Sampler:
    """Chooses the tokens of one answer, with a random state of its own."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._counts: Counter[int] = Counter()
        """How often the answer has each token."""
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)
        self._penalized = bool(sampling.presence_penalty or sampling.frequency_penalty)

    @property
    def plain(self) -> bool:
        """Whether the next token is the likeliest of the model's own logits."""
        return self._greedy and not self._penalized and not self._sampling.logit_bias

    @property
    def _greedy(self) -> bool:
        return self._sampling.temperature < MIN_TEMPERATURE

    def count(self, token: int) -> None:
        """Tell of a token that the answer has from now on."""
        if self._penalized:
            self._counts[token] += 1

    def choose(self, logits_V: Tensor) -> int:
        """The next token. Draws happen on the CPU in float32, so that a seed means the same on every device."""
        logits_V = self._adjusted(logits_V.float().cpu())
        if self._greedy:
            return int(logits_V.argmax())
        if 0 < self._sampling.top_k < len(logits_V):
            logits_V, tokens_V = logits_V.topk(self._sampling.top_k)
            return int(tokens_V[self._draw(logits_V)])
        return self._draw(logits_V)

    def _adjusted(self, logits_V: Tensor) -> Tensor:
        """OpenAI's formula: mu_j - c_j * frequency_penalty - [c_j > 0] * presence_penalty + logit_bias_j."""
        changes = dict(self._sampling.logit_bias)
        for token, count in self._counts.items():
            penalty = count * self._sampling.frequency_penalty + self._sampling.presence_penalty
            changes[token] = changes.get(token, 0.0) - penalty
        if not changes:
            return logits_V
        return logits_V.index_add(0, torch.tensor(list(changes)), torch.tensor(list(changes.values())))

    def _draw(self, logits_V: Tensor) -> int:
        """Position of the drawn token: one uniform number a token, so that a seed does not depend on the nucleus."""
        probabilities_V = torch.softmax(logits_V / self._sampling.temperature, dim=-1)
        uniform = torch.rand((), generator=self._generator, dtype=torch.float64)
        if self._sampling.top_p >= 1:
            return _at(probabilities_V, uniform)
        for size in sorted({min(NUCLEUS_GUESS, len(probabilities_V)), len(probabilities_V)}):
            sorted_V, tokens_V = probabilities_V.topk(size)
            before_V = sorted_V.cumsum(0, dtype=torch.float64) - sorted_V
            if before_V[-1] >= self._sampling.top_p:
                break
        nucleus = max(1, int((before_V < self._sampling.top_p).sum()))
        return int(tokens_V[_at(sorted_V[:nucleus], uniform)])


def _at(weights_V: Tensor, uniform: Tensor) -> int:
    """The position that a number in [0, 1) falls on, positions being as wide as their weights."""
    ends_V = weights_V.cumsum(0, dtype=torch.float64)
    position = int(torch.searchsorted(ends_V, uniform * ends_V[-1], right=True))
    return min(position, len(weights_V) - 1)


def choose_tokens(logits_NV: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """The next token of every row; greedy rows are decided together, on the device of the logits."""
    tokens = logits_NV.argmax(-1).tolist()
    drawn = [row for row, sampler in enumerate(samplers) if not sampler.plain]
    if drawn:
        rows_NV = (logits_NV if len(drawn) == len(samplers) else logits_NV[drawn]).float().cpu()
        for row, logits_V in zip(drawn, rows_NV, strict=True):
            tokens[row] = samplers[row].choose(logits_V)
    for token, sampler in zip(tokens, samplers, strict=True):
        sampler.count(token)
    return tokens


def token_logprob(logits_V: Tensor, token: int, top: int, bytes_of: Callable[[int], bytes]) -> TokenLogprob:
    """How likely the model held a token, by its own logits: before temperature, penalties and biases.

    Args:
        logits_V: the model's.
        token: what was chosen.
        top: how many alternatives to tell.
        bytes_of: see `token_bytes`.
    """
    logprobs_V = torch.log_softmax(logits_V.float(), dim=-1)
    best = logprobs_V.topk(min(top, len(logprobs_V)))
    likeliest = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    alternatives = tuple(_entry(other, logprob, bytes_of) for other, logprob in likeliest)
    return _entry(token, float(logprobs_V[token]), bytes_of, alternatives)


def _entry(
    token: int, logprob: float, bytes_of: Callable[[int], bytes], top: tuple[TokenLogprob, ...] = ()
) -> TokenLogprob:
    raw = bytes_of(token)
    return TokenLogprob(raw.decode(errors="replace"), logprob, tuple(raw), top)
