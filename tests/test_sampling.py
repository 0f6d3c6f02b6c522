import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import BYTES, byte_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from gradientspace_ray.engine.contract import Sampling, TokenLogprob
from gradientspace_ray.engine.sampling import MIN_TEMPERATURE, Sampler, choose_tokens, token_logprob
from gradientspace_ray.engine.text import AnswerText, StopMatcher, TextDecoder, token_bytes

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


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k", "vocabulary"),
    [
        (1.0, 1.0, 0, 50),
        (0.7, 0.8, 0, 50),
        (1.5, 0.3, 0, 50),
        (1.0, 1.0, 7, 50),
        (1.2, 0.7, 10, 50),
        (2.0, 0.9, 0, 600),
    ],
)
def test_frequencies_follow_transformers_warpers(temperature, top_p, top_k, vocabulary):
    """The last nucleus is larger than what is sorted first."""
    draws = 4_000
    raw_V = torch.randn(vocabulary, generator=torch.Generator().manual_seed(0)) * (2 if vocabulary == 50 else 0.5)
    sampler = Sampler(Sampling(max_tokens=1, temperature=temperature, top_p=top_p, top_k=top_k, seed=1))
    drawn = torch.tensor([sampler.choose(raw_V) for _ in range(draws)])
    counts = torch.bincount(drawn, minlength=vocabulary)
    warped = TemperatureLogitsWarper(temperature)(None, raw_V[None])
    if top_k:
        warped = TopKLogitsWarper(top_k)(None, warped)
    expected = TopPLogitsWarper(top_p)(None, warped)[0].softmax(-1)
    assert (expected > 0).sum() > 256 or vocabulary == 50
    # Five standard deviations of a binomial share.
    deviation = (expected * (1 - expected) / draws).sqrt()
    assert ((counts / draws - expected).abs() <= 5 * deviation + 1e-6).all()


@given(
    st.lists(st.integers(0, 49), max_size=12),
    st.dictionaries(st.integers(0, 49), st.floats(-100, 100), max_size=4),
    st.floats(-2, 2),
    st.floats(-2, 2),
)
def test_penalties_and_biases_follow_openai_s_formula(answer, bias, presence, frequency):
    sampling = Sampling(
        max_tokens=1, temperature=0, presence_penalty=presence, frequency_penalty=frequency, logit_bias=bias
    )
    sampler = Sampler(sampling)
    for token in answer:
        sampler.count(token)
    expected = logits().double()
    for token in range(50):
        count = answer.count(token)
        expected[token] += bias.get(token, 0) - count * frequency - (count > 0) * presence
    assert expected.max() - expected[sampler.choose(logits())] < 1e-4


def test_rows_of_a_batch_choose_by_their_own_wishes():
    batch_NV = torch.stack([logits(seed) for seed in range(4)])
    wishes = [
        Sampling(max_tokens=1, temperature=0),
        Sampling(max_tokens=1, seed=5),
        Sampling(max_tokens=1, temperature=0, logit_bias={3: 100.0}),
        Sampling(max_tokens=1, temperature=0, presence_penalty=2.0, frequency_penalty=50.0),
    ]
    samplers = [Sampler(sampling) for sampling in wishes]
    first, second = choose_tokens(batch_NV, samplers), choose_tokens(batch_NV, samplers)
    alone = Sampler(wishes[1])
    assert [first[1], second[1]] == [alone.choose(batch_NV[1]), alone.choose(batch_NV[1])]
    assert first[0] == second[0] == int(batch_NV[0].argmax())
    assert first[2] == second[2] == 3
    assert [first[3], second[3]] == batch_NV[3].topk(2).indices.tolist(), "the first token was not counted"


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


def test_log_probabilities_are_those_of_the_model_s_own_logits():
    entry = token_logprob(logits(), 7, 20, token_bytes(TOKENIZER))
    expected = torch.log_softmax(logits().double(), -1)
    assert entry.logprob == pytest.approx(float(expected[7]), abs=1e-5)
    assert [other.logprob for other in entry.top] == pytest.approx(expected.topk(20).values.tolist(), abs=1e-5)
    best = int(expected.argmax())
    assert (entry.top[0].token, entry.top[0].bytes) == (TOKENIZER.decode([best]), tuple(entry.top[0].token.encode()))


@given(st.text(max_size=20))
def test_the_bytes_of_tokens_are_the_bytes_of_their_text(text):
    of_token = token_bytes(TOKENIZER)
    assert b"".join(map(of_token, TOKENIZER(text)["input_ids"])) == text.encode()
    of_piece = token_bytes(SENTENCEPIECE)
    assert b"".join(of_piece(2 + byte) for byte in text.encode()) == text.encode()


def test_special_pieces_have_bytes_too():
    of_piece = token_bytes(SENTENCEPIECE)
    assert [of_piece(token) for token in (1, PIECES - 4, PIECES - 3, PIECES - 2, PIECES + 5)] == [
        b"</s>",
        b" ",
        b" a",
        b"a",
        b"",
    ]
    assert token_bytes(TOKENIZER)(len(BYTES)) == b"<|im_start|>"


@given(st.text(alphabet="abé", max_size=12), st.lists(st.text(alphabet="abé", min_size=1, max_size=3), max_size=2))
def test_every_log_probability_comes_once_and_with_the_text_of_its_token(text, stop):
    tokens = TOKENIZER(text)["input_ids"]
    of_token = token_bytes(TOKENIZER)
    answer, shown, entries = AnswerText(TOKENIZER, stop), "", []
    for number, token in enumerate(tokens):
        piece, logprobs = answer.push(token, TokenLogprob("", -float(number), tuple(of_token(token))))
        shown, entries = shown + piece, entries + list(logprobs)
        covered = bytes(byte for entry in entries for byte in entry.bytes).decode()  # no character is half covered
        assert covered == shown
        if answer.stopped:
            break
    piece, logprobs = answer.flush()
    shown, entries = shown + piece, entries + list(logprobs)
    assert [-entry.logprob for entry in entries] == list(range(len(entries)))
    assert bytes(byte for entry in entries for byte in entry.bytes).decode() == shown
    assert answer.stopped or shown == text
