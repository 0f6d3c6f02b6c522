import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import byte_tokenizer

from gradientspace_ray.examples.rendering import IGNORED, Renderer, RenderingError, example_id, prompt_view

TOKENIZER = byte_tokenizer()
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)


def conversation(texts, system=None):
    roles = ("user", "assistant")
    messages = [{"role": roles[index % 2], "content": text} for index, text in enumerate(texts)]
    return ([{"role": "system", "content": system}] if system else []) + messages


@settings(deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3), st.none() | TEXTS)
def test_the_prompt_s_tokens_are_where_the_example_begins(turns, system):
    messages = conversation([text for turn in turns for text in turn], system)
    renderer = Renderer(TOKENIZER)
    example, prompt = renderer.example(messages), renderer.prompt(messages[:-1])
    assert example.input_ids[: len(prompt)] == prompt
    assert example.labels[: len(prompt)].count(IGNORED) < len(prompt) or len(turns) == 1
    assert example.labels[len(prompt) :] == example.input_ids[len(prompt) :]
    assert TOKENIZER.decode(example.input_ids) == example.text


def test_labels_are_the_answers_and_their_ends_of_turn():
    messages = conversation(["one?", "first", "two?", "second"])
    rendered = Renderer(TOKENIZER).example(messages)
    labelled = [id_ for id_ in rendered.labels if id_ != IGNORED]
    assert TOKENIZER.decode(labelled) == "first<|im_end|>second<|im_end|>"
    assert all(label in (IGNORED, id_) for label, id_ in zip(rendered.labels, rendered.input_ids, strict=True))


def test_what_follows_the_last_answer_is_left_out():
    messages = conversation(["one?", "first", "two?"])
    assert Renderer(TOKENIZER).example(messages) == Renderer(TOKENIZER).example(messages[:2])
    with pytest.raises(RenderingError, match="no message of the assistant"):
        Renderer(TOKENIZER).example(messages[:1])


def test_a_tokenizer_without_a_template_gets_a_plain_one():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    renderer, messages = Renderer(tokenizer), conversation(["one?", "first"])
    rendered = renderer.example(messages)
    assert rendered.text == f"User:\none?\n\nAssistant:\nfirst{tokenizer.eos_token}"
    assert rendered.input_ids[: len(renderer.prompt(messages[:1]))] == renderer.prompt(messages[:1])


def test_a_template_that_rewrites_earlier_text_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(RenderingError, match="writes a prompt differently"):
        Renderer(tokenizer).example(conversation(["one?", "first"]))


@pytest.mark.parametrize("view", ["last_user", "first_user", "conversation"])
def test_training_and_server_show_the_router_the_same_text(view):
    for texts in (["one?", "first"], ["one?", "first", "two?", "second"]):
        for system in (None, "Be brief."):
            messages = conversation(texts, system)
            assert prompt_view(messages, view) == prompt_view(messages[:-1], view)


def test_the_views():
    messages = conversation(["one?", "first", "two?", "second"])
    assert prompt_view(messages, "first_user") == "one?"
    assert prompt_view(messages, "last_user") == "two?"
    assert prompt_view(messages, "conversation") == "user: one?\n\nassistant: first\n\nuser: two?"
    assert prompt_view(messages[:2], "conversation") == "one?"


def test_ids_follow_the_text():
    assert example_id("a") == example_id("a") != example_id("b")
    assert len(example_id("a")) == 16
