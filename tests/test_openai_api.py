import json

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.model import Model

from gradientspace_ray.serving.openai_api import Answer, ApiError, event, model_object, parse_chat_request, server_error

HELLO = [{"role": "user", "content": "hello"}]


def parse(**fields):
    return parse_chat_request(json.dumps({"model": "auto", "messages": HELLO, **fields}).encode())


def refusal(body):
    with pytest.raises(ApiError) as caught:
        parse_chat_request(body if isinstance(body, bytes) else json.dumps(body).encode())
    error = caught.value
    assert set(error.body["error"]) == {"message", "type", "param", "code"}
    assert "\n" not in error.body["error"]["message"]
    return error.status, error.body["error"]["param"]


def test_messages_reach_the_model_as_training_examples_have_them():
    chat = parse(
        messages=[
            {"role": "developer", "content": "be brief", "name": "dev"},
            {"role": "user", "content": [{"type": "text", "text": "two "}, {"type": "text", "text": "parts"}]},
            {"role": "assistant", "content": "yes", "refusal": None, "tool_calls": []},
            {"role": "user", "content": ""},
        ]
    )
    assert chat.conversation == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "two parts"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": ""},
    ]


def test_both_names_of_the_token_limit():
    assert parse().token_limit is None
    assert parse(max_tokens=5).token_limit == 5
    assert parse(max_completion_tokens=7).token_limit == 7
    assert parse(max_tokens=5, max_completion_tokens=7).token_limit == 7


@pytest.mark.parametrize(("sent", "read"), [(None, ()), ("END", ("END",)), (["a", "b"], ("a", "b")), ([], ())])
def test_stop_is_a_text_or_up_to_four(sent, read):
    assert parse(stop=sent).stop == read


def test_what_changes_nothing_is_accepted():
    chat = parse(
        n=1,
        logprobs=False,
        tools=[],
        tool_choice="auto",
        response_format={"type": "text"},
        presence_penalty=0.0,
        logit_bias={},
        user="me",
        metadata={"a": "b"},
        store=True,
        ignore_eos=False,
        something_new=3,
        temperature=None,
        stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
    )
    assert chat.stream
    assert chat.includes_usage


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"n": 2}, "n"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"top_k": 40}, "top_k"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": -3}, "max_completion_tokens"),
        ({"seed": 2**64}, "seed"),
        ({"stop": ["1", "2", "3", "4", "5"]}, "stop"),
        ({"stop": ""}, "stop[0]"),
        ({"stop": 7}, "stop"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [*HELLO, {"role": "tool", "content": "x"}]}, "messages[1].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"model": None}, "model"),
    ],
)
def test_what_cannot_be_served_is_refused_with_its_name(change, param):
    status, blamed = refusal({"model": "auto", "messages": HELLO, **change})
    assert status == 400
    assert blamed == param or blamed.startswith(f"{param}.") or blamed.startswith(f"{param}[")


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff\xfe", b"[]", b"7", b'{"model": "auto"', b"[" * 100_000, b'{"model": "\\ud800"}']
)
def test_what_is_no_json_object_is_refused(body):
    assert refusal(body) == (400, None)


def test_missing_fields_are_named():
    assert refusal({"messages": HELLO}) == (400, "model")
    assert refusal({"model": "auto"}) == (400, "messages")


def test_answers_read_back_with_the_client_s_own_types():
    answer = Answer("story-door@12", "fp_12")
    whole = ChatCompletion.model_validate(answer.completion("hi", "stop", 3, 2))
    assert whole.choices[0].message.content == "hi"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (3, 2, 5)
    chunks = [
        answer.chunk({"role": "assistant", "content": ""}, with_usage=True),
        answer.chunk({"content": "hi"}, with_usage=True),
        answer.chunk({}, "stop", with_usage=True),
        answer.usage_chunk(3, 2),
    ]
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * 3
    assert chunks[-1]["choices"] == []
    parsed = [ChatCompletionChunk.model_validate(chunk) for chunk in chunks]
    assert {chunk.id for chunk in parsed} == {whole.id}
    assert parsed[-1].usage.total_tokens == 5
    assert "usage" not in answer.chunk({"content": "hi"})
    assert Model.model_validate(model_object("auto", 0, root="base")).id == "auto"


def test_an_event_is_one_line_whatever_the_text():
    text = 'line\nbreak \u2028 "quote" é'
    line, blank, end = event({"content": text}).split("\n")
    assert (blank, end) == ("", "")
    assert json.loads(line.removeprefix("data: "))["content"] == text


def test_errors_have_openai_s_shape():
    assert server_error().body["error"]["type"] == "server_error"
    error = ApiError(404, "no", code="model_not_found", param="model")
    assert error.body == {
        "error": {"message": "no", "type": "invalid_request_error", "param": "model", "code": "model_not_found"}
    }
