"""Requests and answers in vLLM's terms: `Sampling` to its parameters, its tokens to pieces.

vLLM gives tokens alone. Text, stop texts and the bytes of tokens come from `engine.text`, so that an answer reads the
same whichever engine generated it.
"""

from collections.abc import Mapping
from itertools import repeat
from typing import Any, cast, get_args

from transformers import PreTrainedTokenizerBase

from gradientspace_ray.engine.contract import FinishReason, Piece, Sampling, TokenLogprob
from gradientspace_ray.engine.text import AnswerText, token_bytes

MIN_TEMPERATURE = 1e-5
"""Less is greedy, as for the other engine; vLLM would raise it to 0.01 and draw."""


def sampling_fields(sampling: Sampling, room: int) -> dict[str, Any]:
    """Arguments of vLLM's `SamplingParams`, but for the kind of output.

    Args:
        sampling: what the request asks for, `max_tokens` resolved.
        room: tokens that the model's context has left.
    """
    return {
        "max_tokens": min(sampling.max_tokens, room),
        "temperature": 0.0 if sampling.temperature < MIN_TEMPERATURE else sampling.temperature,
        # No share of the probability leaves the most likely token alone; vLLM takes no 0.
        "top_p": sampling.top_p or 1.0,
        "top_k": sampling.top_k if sampling.top_p else 1,
        # vLLM draws a fresh one for -1.
        "seed": None if sampling.seed is None else sampling.seed % 2**63,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "logit_bias": dict(sampling.logit_bias) or None,
        "logprobs": sampling.top_logprobs,
        "ignore_eos": sampling.ignore_eos,
        "detokenize": False,
    }


class Answer:
    """One answer's pieces, made from vLLM's outputs (`RequestOutput`, kind DELTA) in their order.

    After a piece with a `finish_reason` there is none; where a stop text is the reason, vLLM does not know it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, sampling: Sampling) -> None:
        self._text = AnswerText(tokenizer, sampling.stop)
        self._bytes_of = token_bytes(tokenizer)
        self._top_logprobs = sampling.top_logprobs
        self._tokens = 0
        self._begun = False

    def piece(self, output: Any) -> Piece | None:
        """The output's piece; None where it has nothing to say yet.

        Raises:
            RuntimeError: vLLM gave the request up.
        """
        completion = output.outputs[0]
        finish_reason = _finish_reason(completion.finish_reason)
        text = ""
        logprobs: tuple[TokenLogprob, ...] = ()
        # vLLM stops at an end-of-text token alone, which is no part of the text.
        end = 1 if finish_reason == "stop" else 0
        tokens = completion.token_ids[: len(completion.token_ids) - end]
        for token, found in zip(tokens, completion.logprobs or repeat(None), strict=False):
            self._tokens += 1
            shown, ready = self._text.push(token, self._logprob(token, found) if found is not None else None)
            text, logprobs = text + shown, logprobs + ready
            if self._text.stopped:
                finish_reason, end = "stop", 0
                break
        self._tokens += end
        if finish_reason is not None:
            shown, ready = self._text.flush()
            text, logprobs = text + shown, logprobs + ready
            finish_reason = "stop" if self._text.stopped else finish_reason
        if not (text or finish_reason or logprobs):
            return None
        queued_s = None if self._begun else _queued_s(output.metrics)
        self._begun = True
        return Piece(text, finish_reason, self._tokens, logprobs, output.num_cached_tokens or 0, queued_s)

    def _logprob(self, token: int, found: Mapping[int, Any]) -> TokenLogprob:
        """A position's entries: the chosen token, and the most likely ones by their ranks, which begin at 1."""
        ranked = sorted(found.items(), key=lambda entry: entry[1].rank)
        top = [entry for entry in ranked if entry[1].rank <= (self._top_logprobs or 0)]
        return self._entry(token, found[token].logprob, tuple(self._entry(id_, it.logprob) for id_, it in top))

    def _entry(self, token: int, logprob: float, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
        content = self._bytes_of(token)
        return TokenLogprob(content.decode(errors="replace"), logprob, tuple(content), top)


def _finish_reason(reason: str | None) -> FinishReason | None:
    if reason is None:
        return None
    if reason in get_args(FinishReason):
        return cast(FinishReason, reason)
    raise RuntimeError(f"vLLM ended the answer early ({reason})")


def _queued_s(metrics: Any) -> float | None:
    """Between the request's arrival in the engine and its first step, by the engine's clock."""
    return metrics.scheduled_ts - metrics.queued_ts if metrics is not None and metrics.scheduled_ts else None
