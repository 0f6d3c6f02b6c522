"""Names that a request has and the interface has not; tests/test_openai_api.py has those that it knows."""

import json

import pytest

from gradientspace_ray.serving.api_errors import ApiError
from gradientspace_ray.serving.openai_parsing import parse_chat_request, parse_completion_request

HELLO = [{"role": "user", "content": "hello"}]


def parse(**fields):
    return parse_chat_request(json.dumps({"model": "auto", "messages": HELLO, **fields}).encode())


def complete(**fields):
    return parse_completion_request(json.dumps({"model": "auto", "prompt": "once", **fields}).encode())


def refusal(body, parser=parse_chat_request):
    with pytest.raises(ApiError) as caught:
        parser(json.dumps(body).encode())
    assert caught.value.status == 400
    return caught.value.body["error"]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        *(
            ("temprature", "temperature"),
            ("Temperature", "temperature"),
            ("topP", "top_p"),
            ("maxTokens", "max_tokens"),
        ),
        *(("max_new_tokens", "max_tokens"), ("max_token", "max_tokens"), ("stops", "stop"), ("streaming", "stream")),
        *(("respons_format", "response_format"), ("modle", "model"), ("logitBias", "logit_bias"), ("top_k_", "top_k")),
    ],
)
def test_a_misspelt_name_is_refused_with_the_one_that_is_meant(name, meant):
    for parser, prompt in ((parse_chat_request, {"messages": HELLO}), (parse_completion_request, {"prompt": "x"})):
        error = refusal({"model": "auto", **prompt, name: 1}, parser)
        assert (error["param"], error["code"]) == (name, "unknown_parameter")
        assert error["message"].endswith(f"did you mean {meant}?")


def test_names_that_mean_something_elsewhere_are_no_misspelt_ones():
    elsewhere = """
    priority request_id rid cache_salt kv_transfer_params mm_processor_kwargs documents return_token_ids prompt_embeds
    return_tokens_as_token_ids extra_body timeout api_key num_retries tags session_id include_reasoning reasoning
    separate_reasoning stream_reasoning thinking provider route transforms input details return_hidden_states use_cache
    pad_token_id prompt_lookup_num_tokens metdata user_id x messages_count priority_level
    """
    for name in elsewhere.split():
        assert parse(**{name: 1}).choices == complete(**{name: 1}).choices == 1, name
    assert parse(prompt="x").conversation == HELLO
    assert complete(messages=HELLO).prompts == ["once"]


def test_names_without_end_are_refused():
    assert parse(**{f"x-{number}": 0 for number in range(32)}).choices == 1
    assert parse(**{"temperature" * 9: 0}).choices == 1
    body = {"model": "auto", "messages": HELLO, **{f"x-{number}": 0 for number in range(33)}}
    assert refusal(body)["code"] == "unknown_parameter"
