"""Requests, errors and the interface's description; tests/test_openai_answers.py has the answers."""

import copy
import inspect
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from openai.resources.chat.completions import Completions as ChatResource
from openai.resources.completions import Completions as CompletionResource
from openai.types.shared import ErrorObject
from pydantic import ValidationError

from gradientspace_ray.engine.contract import Sampling
from gradientspace_ray.serving import api_errors
from gradientspace_ray.serving.api_errors import ApiError
from gradientspace_ray.serving.openai_parsing import (
    RequestLimits,
    check_limits,
    parse_chat_request,
    parse_completion_request,
)
from gradientspace_ray.serving.openai_requests import ChatRequest, CompletionRequest
from gradientspace_ray.serving.openapi import openapi_document

HELLO = [{"role": "user", "content": "hello"}]
PARSE = {"messages": parse_chat_request, "prompt": parse_completion_request}
SHARED = {
    "max_tokens": 5,
    "max_completion_tokens": 7,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 40,
    "seed": 3,
    "n": 2,
    "stop": ["a", "b"],
    "presence_penalty": 1.5,
    "frequency_penalty": -1,
    "logit_bias": {"5": -100, "17": 0.5},
    "ignore_eos": True,
    "stream": True,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": False},
    "gradientspace": {"explain": True},
    "model": "auto",
}
MESSAGES = [
    {"role": "developer", "content": "be brief", "name": "dev"},
    {"role": "user", "content": [{"type": "text", "text": "two "}, {"type": "text", "text": "parts"}]},
    {"role": "assistant", "content": "yes", "refusal": None, "tool_calls": [], "annotations": []},
    {"role": "user", "content": ""},
]
CHAT = SHARED | {"messages": MESSAGES, "logprobs": True, "top_logprobs": 4}
COMPLETION = SHARED | {"prompt": [[1, 2], [3]], "logprobs": 2}


def parse(**fields):
    return parse_chat_request(json.dumps({"model": "auto", "messages": HELLO, **fields}).encode())


def complete(**fields):
    return parse_completion_request(json.dumps({"model": "auto", "prompt": "once", **fields}).encode())


def checked(error):
    """A 400 that a client can read and that shows one printable line."""
    body = json.loads(json.dumps(error.body))
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    ErrorObject.model_validate(body["error"], strict=True)
    assert body["error"]["message"].isprintable()
    assert len(body["error"]["message"]) < 400
    body["error"]["message"].encode()
    return body["error"]


def refusal(body, parser=parse_chat_request):
    with pytest.raises(ApiError) as caught:
        parser(body if isinstance(body, bytes) else json.dumps(body).encode())
    assert caught.value.status == 400
    return checked(caught.value)


def test_messages_reach_the_model_as_training_examples_have_them():
    assert parse(messages=MESSAGES).prompts == [
        [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "two parts"},
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": ""},
        ]
    ]


@pytest.mark.parametrize(
    ("sent", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_a_prompt_is_a_text_or_token_ids_once_or_often(sent, prompts):
    request = complete(prompt=sent, n=3)
    assert request.prompts == prompts
    assert request.choices == 3 * len(prompts)


def test_what_is_asked_reaches_the_engine():
    expected = Sampling(
        max_tokens=7,
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        seed=3,
        stop=("a", "b"),
        presence_penalty=1.5,
        frequency_penalty=-1.0,
        logit_bias={5: -100.0, 17: 0.5},
        top_logprobs=4,
        ignore_eos=True,
    )
    chat = parse(**CHAT)
    assert chat.sampling(10) == expected
    assert chat.streams
    assert chat.includes_usage
    assert chat.counts_continuously
    assert chat.explains
    assert complete(**COMPLETION).sampling(10).top_logprobs == 2


def test_what_is_left_out_is_openai_s_default():
    assert parse().sampling(10) == Sampling(max_tokens=10, temperature=1.0, top_p=1.0)
    every_null = {name: None for name in CHAT if name not in ("model", "messages")}
    assert parse(**every_null).sampling(10) == Sampling(max_tokens=10)
    assert parse(top_k=-1).sampling(10).top_k == 0
    assert parse(logprobs=True).sampling(10).top_logprobs == 0
    assert complete(logprobs=0).sampling(10).top_logprobs == 0
    assert not parse(stream_options=None).includes_usage
    assert not parse(stream=True, stream_options={"continuous_usage_stats": True}).counts_continuously


def test_a_conversation_of_512_messages_is_read():
    assert len(parse(messages=HELLO * 512).conversation) == 512


def test_choices_have_seeds_in_a_row_whatever_the_other_prompts():
    request = complete(prompt=["a", "b"], n=3, seed=2**63 - 2)
    assert [request.sampling(1, choice).seed for choice in range(6)] == [2**63 - 2, 2**63 - 1, -(2**63)] * 2
    assert complete(n=3).sampling(1, 2).seed is None


@pytest.mark.parametrize(("sent", "read"), [(None, ()), ("END", ("END",)), (["a", "b"], ("a", "b")), ([], ())])
def test_stop_is_a_text_or_up_to_four(sent, read):
    assert parse(stop=sent).sampling(1).stop == read


@pytest.mark.parametrize(
    ("fields", "param"), [({"max_tokens": 11}, "max_tokens"), ({"max_completion_tokens": 11}, "max_completion_tokens")]
)
def test_a_token_limit_above_the_server_s_is_refused_by_its_name(fields, param):
    request = parse(**fields)
    assert request.sampling(11).max_tokens == request.sampling(0).max_tokens == 11
    assert parse().sampling(0).max_tokens == 0
    with pytest.raises(ApiError) as caught:
        request.sampling(10)
    assert checked(caught.value)["param"] == param


@pytest.mark.parametrize(
    ("request_", "param", "code"),
    [
        (parse(max_tokens=101), "max_tokens", "integer_above_max_value"),
        (parse(n=5), "n", "integer_above_max_value"),
        (complete(prompt=["a", "b"], n=3), "n", "integer_above_max_value"),
        (complete(prompt=["a"] * 5), "prompt", "array_above_max_length"),
        (parse(messages=[{"role": "user", "content": "x" * 6}] * 2), "messages", "context_length_exceeded"),
        (complete(prompt="x" * 11), "prompt", "context_length_exceeded"),
        (complete(prompt=[1] * 11), "prompt", "context_length_exceeded"),
        (complete(prompt=["x", "x" * 11]), "prompt[1]", "context_length_exceeded"),
    ],
)
def test_too_much_is_refused_by_name(request_, param, code):
    with pytest.raises(ApiError) as caught:
        check_limits(request_, RequestLimits(max_tokens=100, max_choices=4, max_prompt_characters=10))
    error = checked(caught.value)
    assert (error["param"], error["code"]) == (param, code)


def test_as_much_as_is_allowed_passes():
    limits = RequestLimits(max_tokens=100, max_choices=4, max_prompt_characters=10)
    check_limits(parse(max_tokens=100, n=4, messages=HELLO * 2), limits)
    check_limits(complete(prompt=["x" * 10, "y"], n=2), limits)


@pytest.mark.parametrize(("resource", "model"), [(ChatResource, ChatRequest), (CompletionResource, CompletionRequest)])
def test_every_parameter_of_the_client_is_served_accepted_or_refused_by_name(resource, model):
    transport = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
    parameters = set(inspect.signature(resource.create).parameters) - transport
    assert len(parameters) > 15
    assert parameters <= set(model.model_fields)


@pytest.mark.parametrize("model", [ChatRequest, CompletionRequest])
def test_what_is_not_served_is_refused_by_name_unless_it_asks_for_nothing(model):
    prompt = {"messages": HELLO} if model is ChatRequest else {"prompt": "x"}
    parser = PARSE[next(iter(prompt))]
    schema = openapi_document("1")["components"]["schemas"][model.__name__]["properties"]
    refused = {name: field["enum"] for name, field in schema.items() if "enum" in field}
    assert {"tools", "response_format", "echo", "suffix", "best_of", "min_p", "regex", "no_repeat_ngram_size"} <= set(
        refused
    )
    for name, neutral in refused.items():
        for value in neutral:
            parser(json.dumps({"model": "auto", **prompt, name: value}).encode())
        for value in (2, "x", [1], {"type": "json_object"}, not neutral[-1] if len(neutral) > 1 else False):
            error = refusal({"model": "auto", **prompt, name: value}, parser)
            assert (error["param"], error["code"]) == (name, "unsupported_parameter")


def test_what_changes_nothing_is_accepted_whatever_it_holds():
    harmless = ("metadata", "store", "user", "safety_identifier", "prompt_cache_key", "service_tier", "prediction")
    for value in (None, 5, "x", [{}], {"a": {"b": 1}}):
        for name in (*harmless, "parallel_tool_calls", "something_else"):
            assert parse(**{name: value}).sampling(1) == Sampling(max_tokens=1)


def test_load_generators_and_frameworks_are_understood():
    guidellm = {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        "max_completion_tokens": 4,
        "ignore_eos": True,
        "stop": None,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    assert parse(**guidellm).sampling(10).ignore_eos
    vllm_bench = {"temperature": 0.0, "repetition_penalty": 1.0, "max_tokens": 4, "logprobs": None, "stream": True}
    assert complete(**vllm_bench).sampling(10).temperature == 0


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"stream_options": {"include_usage": True}}, "stream_options", None),
        ({"top_logprobs": 3}, "top_logprobs", None),
        ({"temperature": 2.5}, "temperature", "decimal_above_max_value"),
        ({"temperature": 10**400}, "temperature", "invalid_type"),
        ({"top_p": -0.1}, "top_p", "decimal_below_min_value"),
        ({"max_tokens": 0}, "max_tokens", "integer_below_min_value"),
        ({"max_tokens": "5"}, "max_tokens", "invalid_type"),
        ({"max_tokens": True}, "max_tokens", "invalid_type"),
        ({"n": 1.0}, "n", "invalid_type"),
        ({"seed": 2**64}, "seed", "integer_above_max_value"),
        ({"stop": ["1", "2", "3", "4", "5"]}, "stop", "array_above_max_length"),
        ({"stop": ""}, "stop", "string_below_min_length"),
        ({"stop": ["a", 7]}, "stop[1]", "invalid_type"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x", "invalid_value"),
        ({"logit_bias": {"07": 1}}, "logit_bias.07", "invalid_value"),
        ({"logit_bias": {"7": 101}}, "logit_bias.7", "decimal_above_max_value"),
        ({"gradientspace": {"explain": 1}}, "gradientspace.explain", "invalid_type"),
        ({"gradientspace": {"expert": "x"}}, "gradientspace.expert", "unknown_parameter"),
        ({"messages": []}, "messages", "array_below_min_length"),
        ({"messages": HELLO * 513}, "messages", "array_above_max_length"),
        ({"logit_bias": {str(token): 0 for token in range(1025)}}, "logit_bias", "object_above_max_length"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "invalid_type"),
        ({"messages": [*HELLO, {"role": "tool", "content": "x"}]}, "messages[1].role", "invalid_value"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
            "invalid_value",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
            "messages[0].tool_calls",
            "unsupported_parameter",
        ),
        ({"messages": [{"role": "user", "content": "a\0b"}]}, "messages[0].content", "invalid_value"),
        ({"model": None}, "model", "invalid_type"),
        ({"model": "x" * 257}, "model", "string_above_max_length"),
    ],
)
def test_what_cannot_be_served_is_refused_with_its_name(change, param, code):
    error = refusal({"model": "auto", "messages": HELLO, **change})
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        (None, "prompt"),
        ("", "prompt"),
        ([], "prompt"),
        ([[]], "prompt[0]"),
        ([1, "a"], "prompt[1]"),
        (["a", [1]], "prompt[1]"),
        ([[1], [2, -1]], "prompt[1][1]"),
        ([True], "prompt"),
        ([2**31], "prompt[0]"),
        ({"a": 1}, "prompt"),
    ],
)
def test_what_is_no_prompt_is_refused(prompt, param):
    assert refusal({"model": "auto", "prompt": prompt}, parse_completion_request)["param"] == param


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"7",
        b"null",
        b'{"model": "auto"',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"model": "\\ud800"}',
        b'{"model": "\xed\xa0\x80"}',
        b'{"model": NaN}',
        b'{"model": 1' + b"0" * 5000 + b"}",
        b'{"model": "auto", "model": "base"}',
        b'{"' + b"k" * 10_000 + b'": 1, "' + b"k" * 10_000 + b'": 2}',
        b"\xef\xbb\xbf{}",
        '{"model": "auto"}'.encode("utf-16"),
    ],
    ids=lambda body: repr(body[:20]),
)
def test_what_is_no_json_object_is_refused(body):
    for parser in PARSE.values():
        assert refusal(body, parser)["param"] is None


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{}] * 10_000},
        {"messages": [{"role": "user", "content": [{}] * 10_000}]},
        {"prompt": [-1] * 10_000},
        {"prompt": [[]] * 10_000},
        {"prompt": [""] * 10_000, "stop": [""] * 10_000},
        *(
            {name: {str(key): None for key in range(10_000)}}
            for name in ("logit_bias", "stream_options", "gradientspace")
        ),
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_body_full_of_errors_costs_no_more_than_a_few_of_them(fields):
    kind = CompletionRequest if "prompt" in fields else ChatRequest
    with pytest.raises(ValidationError) as caught:
        kind.model_validate({"model": "auto", "messages": HELLO, **fields})
    assert caught.value.error_count() <= 5


def test_a_number_beyond_all_floats_is_refused():
    body = json.dumps({"model": "auto", "messages": HELLO, "temperature": 12345}).replace("12345", "1e400").encode()
    assert refusal(body)["param"] == "temperature"


def test_a_client_s_own_words_are_shown_short_and_printable():
    error = refusal({"model": "auto", "messages": HELLO, "logit_bias": {"\n\u202e" * 5000: 1}})
    assert error["param"].startswith("logit_bias.??")


def paths(tree, path=()):
    """Every place in a body that the schema declares."""
    yield path
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            if key not in ("name", "refusal", "annotations", "tool_calls"):
                yield from paths(value, (*path, key))


def name_of(path):
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


ODD = st.one_of(
    st.booleans(),
    st.integers(min_value=2**64) | st.integers(max_value=-(2**64)),
    st.floats(min_value=1e6, allow_infinity=False) | st.floats(max_value=-1e6, allow_infinity=False),
    st.text(max_size=3).map(lambda text: text + "\0"),
    st.just([]),
    st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=3),
    st.dictionaries(st.text(max_size=3), st.none(), min_size=1, max_size=2),
)


def mutated(base, path, value):
    tree = copy.deepcopy(base)
    node = tree
    for part in path[:-1]:
        node = node[part]
    if path:
        node[path[-1]] = value
    return tree if path else value


def means_something(path, value):
    """Values of `ODD` that are right in their place."""
    if isinstance(value, bool):
        return path[-1] in ("logprobs", "stream", "ignore_eos", "explain") or path[0] == "stream_options"
    return value == [] and path[-1] == "stop"


@pytest.mark.parametrize("base", [CHAT, COMPLETION], ids=["chat", "completion"])
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_wrong_value_anywhere_is_blamed_on_its_place(base, data):
    path = data.draw(st.sampled_from(list(paths(base))))
    value = data.draw(ODD)
    if path and means_something(path, value) and not (base is COMPLETION and path == ("logprobs",)):
        return
    parser = PARSE["messages" if base is CHAT else "prompt"]
    error = refusal(json.dumps(mutated(base, path, value)).encode(), parser)
    if path:
        place, parent = name_of(path), name_of(path[:-1])
        # A list that begins with something else is another kind of list, which is the whole list's fault.
        is_first = path[-1] == 0
        assert error["param"] in (place, parent if is_first else place) or error["param"].startswith(
            (f"{place}.", f"{place}[")
        )


@settings(max_examples=200, deadline=None)
@given(data=st.data(), parser=st.sampled_from(sorted(PARSE)))
def test_broken_bytes_are_refused_and_never_raise_anything_else(data, parser):
    body = json.dumps(CHAT if parser == "messages" else COMPLETION).encode()
    cut = data.draw(st.integers(0, len(body) - 1))
    assert refusal(body[:cut], PARSE[parser])["param"] is None
    noise = data.draw(st.binary(min_size=1, max_size=8))
    try:
        PARSE[parser](body[:cut] + noise + body[cut + len(noise) :])
    except ApiError as error:
        checked(error)


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (api_errors.bad_request("no"), 400, "invalid_request_error", None),
        (api_errors.unauthorised(), 401, "invalid_request_error", "invalid_api_key"),
        (api_errors.forbidden("no"), 403, "invalid_request_error", "insufficient_permissions"),
        (api_errors.unknown_model("a\n" * 999, ["b"]), 404, "invalid_request_error", "model_not_found"),
        (api_errors.unknown_path("GET", "/x"), 404, "invalid_request_error", "unknown_url"),
        (api_errors.method_not_allowed("PUT", "/x", ["GET"]), 405, "invalid_request_error", "method_not_supported"),
        (api_errors.too_large(9), 413, "invalid_request_error", "request_too_large"),
        (api_errors.rate_limited("slow down", 0.25), 429, "requests", "rate_limit_exceeded"),
        (api_errors.server_error(), 500, "server_error", "internal_error"),
        (api_errors.unavailable("later", 2), 503, "server_error", "service_unavailable"),
    ],
)
def test_errors_have_openai_s_shape(error, status, kind, code):
    body = checked(error)
    assert (error.status, body["type"], body["code"]) == (status, kind, code)


def test_when_to_try_again():
    assert api_errors.rate_limited("no", 0.25).headers == {"retry-after": "1", "retry-after-ms": "250"}
    assert api_errors.unavailable("no", 2).headers == {"retry-after": "2", "retry-after-ms": "2000"}
    assert api_errors.unavailable("no", None).headers == {"x-should-retry": "false"}
    assert api_errors.server_error(retry=False).headers == {"x-should-retry": "false"}
    assert api_errors.method_not_allowed("PUT", "/", ["POST", "GET"]).headers == {"allow": "GET, POST"}


def test_the_interface_s_description_accepts_what_the_server_does():
    document = openapi_document("1.2.3")
    assert document["openapi"].startswith("3.1")
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health"} < set(document["paths"])
    references = set(_references(document))
    assert references == {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    for name, schema in document["components"]["schemas"].items():
        Draft202012Validator.check_schema(schema)
        described = Draft202012Validator(document | {"$ref": f"#/components/schemas/{name}"})
        base = {"ChatRequest": CHAT, "CompletionRequest": COMPLETION}.get(name)
        if base is not None:
            assert described.is_valid(base)
            for change in (
                {"tools": [1]},
                {"temperature": 3},
                {"stop": [1]},
                {"logit_bias": {"x": 1}},
                {"model": "\0"},
            ):
                assert not described.is_valid(base | change), change


def _references(node):
    if isinstance(node, dict):
        yield from (value for key, value in node.items() if key == "$ref")
    for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _references(value)
