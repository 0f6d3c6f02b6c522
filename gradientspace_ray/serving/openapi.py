"""The OpenAPI 3.1 document of the HTTP interface; the bodies' schemas are those of the models that check them."""

from typing import Any

from pydantic.json_schema import models_json_schema

from gradientspace_ray.serving.openai_requests import ChatRequest, CompletionRequest

Schema = dict[str, Any]

_PREFIX = "#/components/schemas/"
_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
# Status -> what it means, of any request that asks for an answer.
_ERRORS = {
    "400": "The request is malformed or asks for what is not served; `param` names the field.",
    "401": "No API key, or a wrong one.",
    "403": "The API key may not do this.",
    "404": "No such model.",
    "408": "The body did not come in time.",
    "413": "The body is too large.",
    "415": "The body is of another type than JSON.",
    "429": "Too many requests; `retry-after` says when to try again.",
    "500": "The server failed.",
    "503": "The server cannot take the request; `retry-after` says when to try again.",
}


def openapi_document(version: str) -> Schema:
    """Describe the interface.

    Args:
        version: of this package.
    """
    modes = [(ChatRequest, "validation"), (CompletionRequest, "validation")]
    _, requests = models_json_schema(modes, ref_template=_PREFIX + "{model}")  # type: ignore[arg-type]
    return {
        "openapi": "3.1.0",
        "info": {"title": "gradientspace", "version": version},
        "security": [{"key": []}],
        "paths": {
            "/v1/chat/completions": {"post": _generation("Answer a conversation", "ChatRequest", "ChatCompletion")},
            "/v1/completions": {"post": _generation("Continue a text", "CompletionRequest", "Completion")},
            "/v1/models": {"get": _look_up("List what may be asked for", "ModelList", ("401", "429"))},
            "/v1/models/{model_id}": {
                "parameters": [{"name": "model_id", "in": "path", "required": True, "schema": _TEXT}],
                "get": _look_up("One model, by name or `name@digest`", "Model", ("401", "404", "429")),
            },
            "/health": {"get": _look_up("Whether requests are taken", "Health", ()) | {"security": []}},
        },
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": {**requests["$defs"], **_answers()},
        },
    }


def _generation(summary: str, request: str, answer: str) -> Schema:
    content = {"application/json": {"schema": _reference(answer)}, "text/event-stream": {"schema": _TEXT}}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": _reference(request)}}},
        "responses": {
            "200": {"description": "The answer, whole or as events.", "content": content},
            **_errors(_ERRORS),
        },
    }


def _look_up(summary: str, answer: str, errors: tuple[str, ...]) -> Schema:
    content = {"application/json": {"schema": _reference(answer)}}
    return {
        "summary": summary,
        "responses": {"200": {"description": summary + ".", "content": content}, **_errors(errors)},
    }


def _errors(statuses: Any) -> Schema:
    content = {"application/json": {"schema": _reference("Error")}}
    return {status: {"description": _ERRORS[status], "content": content} for status in statuses}


def _reference(name: str) -> Schema:
    return {"$ref": _PREFIX + name}


def _object(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _nullable(kind: str) -> Schema:
    return {"type": [kind, "null"]}


def _answers() -> Schema:
    usage = _object(
        prompt_tokens=_COUNT,
        completion_tokens=_COUNT,
        total_tokens=_COUNT,
        prompt_tokens_details=_object(cached_tokens=_COUNT),
    )
    model = _object(id=_TEXT, object={"const": "model"}, created=_COUNT, owned_by=_TEXT)
    error = _object(message=_TEXT, type=_TEXT, param=_nullable("string"), code=_nullable("string"))
    message = _object(role={"const": "assistant"}, content=_TEXT, refusal=_nullable("string"))
    return {
        "Error": _object(error=error),
        "Model": model,
        "ModelList": _object(object={"const": "list"}, data=_list(_reference("Model"))),
        "Health": _object(status=_TEXT),
        "ChatCompletion": _answer("chat.completion", usage, message=message),
        "Completion": _answer("text_completion", usage, text=_TEXT),
    }


def _answer(kind: str, usage: Schema, **said: Schema) -> Schema:
    choice = _object(index=_COUNT, **said, logprobs=_nullable("object"), finish_reason={"enum": ["stop", "length"]})
    return _object(
        id=_TEXT,
        object={"const": kind},
        created=_COUNT,
        model=_TEXT,
        system_fingerprint=_TEXT,
        choices=_list(choice),
        usage=usage,
    )
