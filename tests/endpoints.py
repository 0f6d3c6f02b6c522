"""Endpoints for the tests' modules: real Serve, real HTTP, on the tests' Ray; and what their answers must equal."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml
from peft import PeftModel
from tiny_run import make_run

from gradientspace_ray.examples.rendering import IGNORED, Message, Renderer
from gradientspace_ray.models.loading import load_base, load_tokenizer
from gradientspace_ray.registry import read_registry, router_digest, write_registry
from gradientspace_ray.router.classifier import load_head, save_router
from gradientspace_ray.run import RunDirectory
from gradientspace_ray.serving.app import build, endpoint, reserved_port
from gradientspace_ray.serving.arguments import ServeArguments
from gradientspace_ray.serving.key_file import ADMIN_KEY_ENV, API_KEY_ENV

# The tiny run's router gives no prompt more than 0.501; at this temperature it can be sure.
SHARP = 0.002
ERROR_FIELDS = {"message", "type", "param", "code"}


def make_decided_run(root: Path, model_dir: Path, encoder_dir: Path) -> RunDirectory:
    """The tiny run with a router that is sure of some prompts, so that a conversation can change its expert."""
    run = make_run(root, model_dir, encoder_dir)
    head, settings = load_head(root / "router")
    save_router(root / "router", head, settings.model_copy(update={"temperature": SHARP}))
    registry = read_registry(run)
    write_registry(run, registry.model_copy(update={"router_digest": router_digest(root / "router")}))
    return run


@contextlib.contextmanager
def serving(run: RunDirectory, host: str = "127.0.0.1", **arguments: Any) -> Iterator[str]:
    """The endpoint of a run for the length of the block, without keys unless `arguments` name some.

    Yields:
        Its base URL, without `/v1`.
    """
    with pytest.MonkeyPatch.context() as patch:
        # As on a Ray cluster that lives on: Serve ends with the block.
        patch.setenv("RAY_ADDRESS", "auto")
        patch.delenv(API_KEY_ENV, raising=False)
        patch.delenv(ADMIN_KEY_ENV, raising=False)
        application = build(ServeArguments(run_dir=run.uri, **arguments))
        with reserved_port(host, 0) as port, endpoint(application, host, port) as url:
            yield url


def write_keys(path: Path, **sections: list[dict[str, Any]]) -> str:
    """A file for `keys_file` that only its owner reads."""
    path.write_text(yaml.safe_dump(sections))
    path.chmod(0o600)
    return str(path)


def peft_answer(run: RunDirectory, model_id: str, messages: list[Message], tokens: int) -> tuple[int, str]:
    """Prompt tokens and greedy text of plain transformers and PEFT, from training's own rendering."""
    registry = read_registry(run)
    tokenizer = load_tokenizer(registry.base_model)
    model = load_base(registry.base_model)
    adapter = registry.resolve(model_id)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, run.fetch(adapter.folder)).eval()
    example = Renderer(tokenizer).example([*messages, {"role": "assistant", "content": "x"}])
    prompt_ids = example.input_ids[: max(index for index, label in enumerate(example.labels) if label == IGNORED) + 1]
    ids = torch.tensor([list(prompt_ids)])
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return len(prompt_ids), tokenizer.decode(output[0, len(prompt_ids) :], skip_special_tokens=True)


def assert_openai_error(answer: httpx.Response) -> dict[str, Any]:
    """The error of an answer that has OpenAI's shape and nothing of the server's inside."""
    body = answer.json()
    assert set(body) == {"error"}, answer.text
    error = body["error"]
    assert set(error) == ERROR_FIELDS, answer.text
    assert isinstance(error["message"], str)
    assert error["message"]
    assert "\n" not in error["message"]
    assert isinstance(error["type"], str)
    assert isinstance(error["param"], str | None)
    assert isinstance(error["code"], str | None)
    assert "Traceback" not in answer.text
    return error
