import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import BYTES, byte_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast, TemperatureLogitsWarper, TopPLogitsWarper

from gradientspace_ray.engine.contract import Sampling
from gradientspace_ray.engine.sampling import MIN_TEMPERATURE, Sampler
from gradientspace_ray.engine.text import StopMatcher, TextDecoder

TOKENIZER = byte_tokenizer()
VOCABULARY = len(BYTES) + 3


def sentencepiece_tokenizer():
    """As Llama 2's: words begin with a mark, unknown characters are bytes, and the first space is stripped."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "\u2581a", "a", "b\u2581"]
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, [], byte_fallback=True))
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>"), len(pieces)


def decode_in_steps(tokens, tokenizer=TOKENIZER):
    decoder = TextDecoder(tokenizer)
    return [decoder.push(token) for token in tokens] + [decoder.flush()]


@given(st.lists(st.integers(0, VOCABULARY - 1), max_size=30))
def test_any_tokens_decode_to_the_same_text_in_steps_as_at_once(tokens):
    assert "".join(decode_in_steps(tokens)) == TOKENIZER.decode(tokens, skip_special_tokens=True)


SENTENCEPIECE, PIECES = sentencepiece_tokenizer()


@given(st.lists(st.one_of(st.sampled_from([1, *range(PIECES - 4, PIECES)]), st.characters(codec="utf-8")), max_size=20))
def test_tokenizers_that_strip_spaces_and_fall_back_to_bytes_decode_in_steps_too(parts):
    tokens = []
    for part in parts:
        tokens += [part] if isinstance(part, int) else [2 + byte for byte in part.encode()]
    expected = SENTENCEPIECE.decode(tokens, skip_special_tokens=True)
    assert "".join(decode_in_steps(tokens, SENTENCEPIECE)) == expected


@given(st.text(max_size=20))
def test_characters_are_never_split(text):
    pieces = decode_in_steps(TOKENIZER(text)["input_ids"])
    assert "".join(pieces) == text
    assert "\N{REPLACEMENT CHARACTER}" in text or not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_an_unfinished_character_comes_out_at_the_end():
    tokens = TOKENIZER("aé")["input_ids"][:-1]
    assert decode_in_steps(tokens) == ["a", "", "\N{REPLACEMENT CHARACTER}"]


@given(
    st.text(alphabet="ab\n", max_size=25),
    st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=4),
    st.lists(st.integers(0, 25), max_size=8),
)
def test_stop_texts_are_found_across_the_borders_of_pieces(text, stop, cuts):
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in itertools.pairwise(borders)]
    matcher, shown, end = StopMatcher(stop), "", 0
    for piece in pieces:
        end += len(piece)
        shown += matcher.push(piece)
        assert text.startswith(shown)
        if matcher.found:
            break
    shown += matcher.flush()
    # With all text known: it ends before the stop text that begins first among those complete when one was first seen.
    starts = [text[:end].find(ending) for ending in stop if ending in text[:end]]
    assert matcher.found == bool(starts) == any(ending in text for ending in stop)
    assert shown == (text[: min(starts)] if starts else text)


def test_text_that_may_begin_a_stop_text_is_held_back():
    matcher = StopMatcher(("END", "##"))
    assert [matcher.push(piece) for piece in ("go E", "N", "x#", "1", "EN", "D later")] == [
        "go ",
        "",
        "ENx",
        "#1",
        "",
        "",
    ]
    assert matcher.found
    assert matcher.push("more") == ""


def logits(seed=0):
    return torch.randn(50, generator=torch.Generator().manual_seed(seed)) * 2


def test_temperature_zero_is_greedy():
    sampler = Sampler(Sampling(max_tokens=1, temperature=0, seed=3))
    assert [sampler.choose(logits(seed)) for seed in range(5)] == [int(logits(seed).argmax()) for seed in range(5)]


@given(
    st.floats(0, 2),
    st.floats(0, 1),
    st.none() | st.integers(-(2**63), 2**63 - 1),
    st.sampled_from([1.0, 1e-3, 100.0, 1e5]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_every_setting_that_the_api_takes_chooses_a_token(temperature, top_p, seed, scale, dtype):
    scaled_V = (logits() * scale).to(dtype)
    token = Sampler(Sampling(max_tokens=1, temperature=temperature, top_p=top_p, seed=seed)).choose(scaled_V)
    assert 0 <= token < len(scaled_V)
    if temperature < MIN_TEMPERATURE:
        assert token == int(scaled_V.argmax())


def test_a_vanishing_nucleus_is_greedy():
    assert Sampler(Sampling(max_tokens=1, top_p=0)).choose(logits()) == int(logits().argmax())


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8), (1.5, 0.3)])
def test_frequencies_follow_transformers_warpers(temperature, top_p):
    draws = 20_000
    sampler = Sampler(Sampling(max_tokens=1, temperature=temperature, top_p=top_p, seed=1))
    counts = torch.bincount(torch.tensor([sampler.choose(logits()) for _ in range(draws)]), minlength=50)
    warped = TemperatureLogitsWarper(temperature)(None, logits()[None])
    expected = TopPLogitsWarper(top_p)(None, warped)[0].softmax(-1)
    # Five standard deviations of a binomial share.
    deviation = (expected * (1 - expected) / draws).sqrt()
    assert ((counts / draws - expected).abs() <= 5 * deviation + 1e-6).all()


def test_seeds_decide_and_requests_do_not_share_a_random_state():
    def answer(seed, between=lambda: None):
        sampler = Sampler(Sampling(max_tokens=1, seed=seed))
        tokens = []
        for _ in range(10):
            between()
            tokens.append(sampler.choose(torch.zeros(50)))  # uniform: equal answers are no accident
        return tokens

    assert answer(7) == answer(7, between=lambda: torch.rand(3))
    assert answer(7) != answer(8)
    assert answer(None) != answer(None)
