import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel, AutoTokenizer

from gradientspace_ray.models.loading import ModelError
from gradientspace_ray.router.encoder import PromptEncoder, RememberingEncoder, pool

PROMPTS = ["one", "Write a poem about the sea.", "", "3 + 4 =", "a much longer prompt " * 12, "one"]


@pytest.fixture(scope="module")
def encoder(tiny_encoder_dir):
    return PromptEncoder(str(tiny_encoder_dir), 64)


def test_encodings_are_the_mean_of_the_states_of_each_prompt_alone(encoder, tiny_encoder_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder_dir)
    model = AutoModel.from_pretrained(tiny_encoder_dir).eval()
    expected = []
    for prompt in PROMPTS:
        tokens = tokenizer(prompt, truncation=True, max_length=64, return_tensors="pt")
        with torch.no_grad():
            mean = model(**tokens).last_hidden_state[0].mean(dim=0)
        expected.append((mean / mean.norm()).numpy())
    encodings = encoder.encode(PROMPTS)
    assert encodings.dtype == np.float32
    np.testing.assert_allclose(encodings, expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(encodings, axis=1), 1, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.text(max_size=80), max_size=40), st.randoms(use_true_random=False))
def test_a_prompt_keeps_its_encoding_in_any_company(encoder, prompts, random):
    order = list(range(len(prompts)))
    random.shuffle(order)
    shuffled = encoder.encode([prompts[index] for index in order])
    np.testing.assert_allclose(shuffled, encoder.encode(prompts)[order], atol=1e-5)


def test_pooling_ignores_what_the_mask_hides():
    states = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [50.0, 50.0]]])
    pooled = pool(states, torch.tensor([[1, 1, 0]]))
    torch.testing.assert_close(pooled, torch.full((1, 2), 0.5**0.5))


def test_no_prompt_gives_no_row(encoder):
    assert encoder.encode([]).shape == (0, encoder.width)


def test_a_limit_above_the_encoders_own_is_lowered(tiny_encoder_dir):
    encoder = PromptEncoder(str(tiny_encoder_dir), 10_000)
    assert encoder.max_tokens == 512
    assert encoder.encode(["word " * 2000]).shape == (1, 32)


def test_an_unknown_encoder_is_named_in_one_line():
    with pytest.raises(ModelError, match="no/such-encoder") as caught:
        PromptEncoder("no/such-encoder", 64)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_read_does_not_decide_the_encoding(encoder):
    long = "word " * 10_000
    np.testing.assert_array_equal(encoder.encode([long + "1", long + "2"])[0], encoder.encode([long])[0])
    assert len(encoder.readable(long)) == 64 * encoder.max_tokens
    np.testing.assert_array_equal(encoder.encode(["half \ud83d of"]), encoder.encode(["half ? of"]))


class Counted:
    """An encoder, and all that it was asked to encode."""

    def __init__(self, encoder):
        self.encoder, self.asked, self.width, self.readable = encoder, [], encoder.width, encoder.readable

    def encode(self, prompts):
        self.asked += prompts
        return self.encoder.encode(prompts)


@given(st.lists(st.lists(st.sampled_from("abcdef"), max_size=8), max_size=12))
def test_what_was_encoded_lately_is_not_encoded_again(encoder, batches):
    counted = Counted(encoder)
    remembering = RememberingEncoder(counted, capacity=3)
    known = []
    for batch in batches:
        missing = [prompt for prompt in dict.fromkeys(batch) if prompt not in known]
        counted.asked.clear()
        np.testing.assert_allclose(remembering.encode(batch), encoder.encode(batch), atol=1e-6)
        assert counted.asked == missing
        for prompt in batch:
            known = [*(other for other in known if other != prompt), prompt]
        known = known[-3:]
        assert all(row.base is None for row in remembering._known.values())


def test_a_remembered_prompt_is_known_by_what_is_read_of_it(encoder):
    counted = Counted(encoder)
    remembering = RememberingEncoder(counted, capacity=3)
    long = "word " * 10_000
    remembering.encode(["\ud83d", long + "1", long + "2"])
    assert len(counted.asked) == 2
