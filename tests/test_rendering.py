import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import byte_tokenizer
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

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
    assert example.labels[len(prompt) :] == example.input_ids[len(prompt) :]
    assert TOKENIZER.decode(example.input_ids) == example.text
    labelled = [label for label in example.labels if label != IGNORED]
    assert TOKENIZER.decode(labelled) == "".join(f"{answer}<|im_end|>" for _, answer in turns)
    for turn in range(len(turns)):
        before = renderer.prompt(messages[: (system is not None) + 2 * turn + 1])
        assert example.input_ids[: len(before)] == before
        assert example.labels[len(before) - 1] == IGNORED != example.labels[len(before)]


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


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"])
def test_a_token_never_spans_the_border_of_prompt_and_answer(template):
    state = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    state["model"]["vocab"]["ĊĊ"] = 999
    state["model"]["merges"] = [["Ċ", "Ċ"]]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<|im_end|>")
    tokenizer.chat_template = template
    renderer, messages = Renderer(tokenizer), conversation(["one?", "\nfirst"])
    example, prompt = renderer.example(messages), renderer.prompt(messages[:1])
    assert tokenizer.encode(example.text, add_special_tokens=False)[: len(prompt)] != prompt
    assert example.input_ids[: len(prompt)] == prompt
    assert tokenizer.decode(example.input_ids) == example.text


def test_the_plain_template_begins_once_with_the_token_that_the_tokenizer_begins_with():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    bos = ("<|im_start|>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[bos])
    example = Renderer(tokenizer).example(conversation(["one?", "first", "two?", "second"], "Be brief."))
    assert example.input_ids[0] == tokenizer.bos_token_id
    assert example.input_ids.count(tokenizer.bos_token_id) == 1
    assert example.text.startswith("<|im_start|>System:\nBe brief.\n\nUser:\none?\n\nAssistant:\nfirst<|im_end|>\n\n")
    labelled = [label for label in example.labels if label != IGNORED]
    assert tokenizer.decode(labelled) == "first<|im_end|>second<|im_end|>"


def test_a_conversation_that_the_template_refuses_is_one_line():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(
        RenderingError, match=r"^the chat template does not allow the roles user \(roles must alt"
    ) as caught:
        Renderer(tokenizer).example(conversation(["one?", "first"]))
    assert "\n" not in str(caught.value)


CLOCKS = (
    "{{ 'Now: ' + strftime_now('%A %d %B %Y %H:%M:%S.%f') + '\\n' }}",
    "{%- macro now() -%}{{ strftime_now('%Y-%m-%d, second %S.%f') }}{%- endmacro -%}\n{{ now() }}",
    "{% if strftime_now is defined %}{% set date_string = strftime_now('%d %b %Y %f') %}{% endif %}{{ date_string }}",
)


@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("named", [False, True])
def test_a_template_with_a_clock_gives_the_same_text_at_any_time(clock, named):
    tokenizer = byte_tokenizer()
    template = clock + tokenizer.chat_template
    tokenizer.chat_template = {"default": template, "tool_use": template} if named else template
    messages = conversation(["one?", "first"])
    renderer = Renderer(tokenizer)
    example = renderer.example(messages)
    assert example.text == Renderer(tokenizer).example(messages).text
    assert example.input_ids[: len(renderer.prompt(messages[:1]))] == renderer.prompt(messages[:1])
    assert "26" in example.text.partition("<|im_start|>")[0]
    assert "2024" in example.text.partition("<|im_start|>")[0]
    assert tokenizer.apply_chat_template(messages, tokenize=False) not in (example.text, f"{example.text}\n")


@pytest.mark.parametrize(
    "template", ["\n  {% if true %}x{% endif %}", "   {% if true %}x{% endif %}", "{%- if true %}\nx{% endif %}", "  x"]
)
def test_the_fixed_clock_leaves_white_space_as_it_was(template):
    plain, clocked = byte_tokenizer(), byte_tokenizer()
    rest = "{% for m in messages %}{{ m['content'] }}{{ '<|im_end|>' }}{% endfor %}"
    plain.chat_template = template + "26" + rest
    clocked.chat_template = template + "{{ strftime_now('%d') }}" + rest
    messages = conversation(["one?", "first"])
    assert Renderer(clocked).example(messages) == Renderer(plain).example(messages)


def test_a_conversation_that_begins_with_an_answer_is_refused_up_front():
    renderer, messages = Renderer(TOKENIZER), conversation(["one?", "first", "two?", "second"])[1:]
    for render in (renderer.example, renderer.prompt):
        with pytest.raises(RenderingError, match=r"^a conversation begins with a system or user message$"):
            render(messages)


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
    with_system = conversation(["one?", "first"], "Be brief.")
    assert prompt_view(with_system, "conversation") == "system: Be brief.\n\nuser: one?"
    assert prompt_view(with_system, "first_user") == prompt_view(with_system, "last_user") == "one?"
    assert prompt_view([], "conversation") == prompt_view(with_system[:1], "last_user") == ""


def test_ids_follow_the_text():
    assert example_id("a") == example_id("a") != example_id("b")
    assert len(example_id("a")) == 16
