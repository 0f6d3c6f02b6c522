"""`transformers serve` as a child process, asked over HTTP."""

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx
from serving_engines import Setup, copy_of
from serving_load import Answer, AnswerError, Request

from gradientspace_ray.models.loading import without_progress_bars

START_S = 180.0
STOP_S = 10.0
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def saved_base(setup: Setup) -> Path:
    """A folder with the base model that never ends an answer by itself: the server has no option for that."""
    folder = setup.scratch / "endless-base"
    if not folder.exists():
        model = copy_of(setup.model)
        model.config.eos_token_id = None
        with without_progress_bars():
            model.save_pretrained(folder)
            setup.tokenizer.save_pretrained(folder)
    return folder


@asynccontextmanager
async def transformers_serve(setup: Setup, flags: Sequence[str] = ()) -> AsyncIterator[Answer]:
    """The base model behind `transformers serve`; it has no LoRA. Times include HTTP on this machine.

    Raises:
        AnswerError: the server does not start.
    """
    folder = str(saved_base(setup))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    words = ["serve", folder, "--host", "127.0.0.1", "--port", port, "--device", "cpu", "--dtype", "float32", *flags]
    log = setup.scratch / f"transformers-serve-{port}.log"
    environment = os.environ | dict.fromkeys(THREAD_VARIABLES, str(setup.threads)) | {"HF_HUB_OFFLINE": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "transformers.cli.transformers", *words],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=None) as client:
            await _answering(client, process, log)

            async def answer(request: Request) -> AsyncGenerator[int, None]:
                body = {"model": folder, "messages": request.prompt.messages, "max_tokens": request.max_tokens}
                async for count in streamed_counts(client, body):
                    yield count

            yield answer
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(process.wait, STOP_S)
        process.kill()
        process.wait()


async def _answering(client: httpx.AsyncClient, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(int(START_S / 0.2)):
        if process.poll() is not None:
            break
        with suppress(httpx.TransportError):
            if (await client.get("/health")).is_success:
                return
        await asyncio.sleep(0.2)
    last = (log.read_text().strip().splitlines() or ["it says nothing"])[-1]
    raise AnswerError(f"transformers serve does not start: {last}")


async def streamed_counts(client: httpx.AsyncClient, body: dict[str, object]) -> AsyncGenerator[int, None]:
    """Tokens so far of a streamed chat completion: one for each chunk with text, and at the end what `usage` says.

    Raises:
        AnswerError: an error came instead of an answer.
        httpx.HTTPError: the connection failed.
    """
    count = 0
    async with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as response:
        if not response.is_success:
            text = (await response.aread()).decode(errors="replace")
            raise AnswerError(f"status {response.status_code}: {text[:200]}")
        async for line in response.aiter_lines():
            data = line.removeprefix("data: ")
            if data == line or data == "[DONE]":
                continue
            chunk = json.loads(data)
            if "error" in chunk:
                raise AnswerError(str(chunk["error"]))
            if any(choice["delta"].get("content") for choice in chunk["choices"]):
                count += 1
                yield count
            usage = chunk.get("usage") or {}
            if usage.get("completion_tokens", 0) > count:
                count = usage["completion_tokens"]
                yield count
