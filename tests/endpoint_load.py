"""Load on an endpoint: requests over HTTP, many at once, what became of each, and what each should have become."""

import asyncio
import contextlib
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import aiohttp
import psutil
import torch
from peft import PeftModel
from ray import serve

from gradientspace_ray.models.loading import load_base, load_tokenizer
from gradientspace_ray.registry import Adapter, read_registry
from gradientspace_ray.run import RunDirectory
from gradientspace_ray.serving.app import APPLICATION, build, endpoint, reserved_port
from gradientspace_ray.serving.arguments import ServeArguments

TOKENS = 12
BOUND_S = 90.0
"""No request may take longer, whatever happens: a replica that died is there again after about 20 s."""
PATIENCE_S = 150.0
RUN_CHANGED = "503 run_changed"
DEPLOYMENTS = ("Experts", "PromptRouter", "Ingress")


@dataclass(frozen=True)
class Ask:
    """A greedy request."""

    model: str
    prompt: str
    stream: bool = False
    max_tokens: int = TOKENS
    ignore_eos: bool = False

    @property
    def body(self) -> dict[str, Any]:
        messages = [{"role": "user", "content": self.prompt}]
        body = {"model": self.model, "messages": messages, "stream": self.stream}
        # No parameter of OpenAI's: their client takes it only where it is needed.
        further = {"ignore_eos": True} if self.ignore_eos else {}
        return {**body, "max_tokens": self.max_tokens, "temperature": 0, **further}


@dataclass(frozen=True)
class Outcome:
    """What became of a request."""

    ask: Ask
    began_s: float
    ended_s: float
    """`time.monotonic`, as `began_s`."""
    error: str | None
    """None: the answer is whole. Otherwise the HTTP status or `stream`, and the error's code or class."""
    may_retry: bool
    """Whether the error tells the `openai` client, or the reader of a stream that broke off, to try again."""
    model: str
    """`name@digest` or `base`, as the answer says; empty where there is none."""
    text: str
    """For a stream that broke off, what came of it."""
    release: str


async def ask_once(session: aiohttp.ClientSession, url: str, ask: Ask) -> Outcome:
    """Ask without retries; no error is raised."""
    began_s, parts, model, release = time.monotonic(), [], "", ""

    def outcome(error: str | None, may_retry: bool = True) -> Outcome:
        return Outcome(ask, began_s, time.monotonic(), error, may_retry, model, "".join(parts), release)

    try:
        async with session.post(f"{url}/v1/chat/completions", json=ask.body) as answer:
            release = answer.headers.get("x-gradientspace-release", "")
            if answer.status != 200:
                retries = answer.status in (408, 409, 429) or answer.status >= 500
                allowed = answer.headers.get("x-should-retry") != "false"
                return outcome(f"{answer.status} {_code(await answer.text())}", retries and allowed)
            if not ask.stream:
                body = await answer.json()
                model = body["model"]
                parts.append(body["choices"][0]["message"]["content"])
            else:
                async for line in answer.content:
                    if line.startswith(b"data: {"):
                        event = json.loads(line.removeprefix(b"data: "))
                        if "error" in event:
                            return outcome(f"stream {event['error']['code']}")
                        model = event["model"]
                        parts += [choice["delta"].get("content") or "" for choice in event["choices"]]
                    elif line == b"data: [DONE]\n":
                        break
                else:
                    return outcome("stream without its end")
            expert = answer.headers["x-gradientspace-expert"]
            assert model.partition("@")[0] == expert, f"the body names {model}, the header {expert}"
            return outcome(None)
    except asyncio.TimeoutError:
        return outcome("hung", may_retry=False)
    except aiohttp.ClientError as error:
        return outcome(f"{'stream' if model else 'no answer'} {type(error).__name__}")


def _code(body: str) -> str:
    try:
        return str(json.loads(body)["error"]["code"])
    except (ValueError, LookupError, TypeError):
        return repr(body[:60])


class Load:
    """Clients that ask one request after another, from `with` to its end, in a thread of their own."""

    def __init__(self, url: str, asks: Iterable[Ask], clients: int) -> None:
        self.outcomes: list[Outcome] = []
        self._url, self._asks, self._clients = url, iter(asks), clients
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Load":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        assert self._failure is None, f"a client failed: {self._failure!r}"

    def more(self, count: int) -> None:
        """Until so many further requests have ended."""
        before = len(self.outcomes)
        wait_until(lambda: len(self.outcomes) >= before + count or self._failure, f"{count} more requests")

    def _run(self) -> None:
        try:
            asyncio.run(self._ask_all())
        except BaseException as error:  # noqa: BLE001 - said at the end
            self._failure = error

    async def _ask_all(self) -> None:
        connector = aiohttp.TCPConnector(limit=self._clients)
        timeout = aiohttp.ClientTimeout(total=BOUND_S)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            await asyncio.gather(*(self._client(session) for _ in range(self._clients)))

    async def _client(self, session: aiohttp.ClientSession) -> None:
        while not self._stop.is_set() and (ask := next(self._asks, None)) is not None:
            outcome = await ask_once(session, self._url, ask)
            self.outcomes.append(outcome)
            if outcome.error:
                await asyncio.sleep(0.2)


def wait_until(holds: Callable[[], object], what: str, patience_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < deadline, f"no {what} in {patience_s:g} s"
        time.sleep(0.05)


def report(line: str) -> None:
    """A line beside the test's result, with `pytest -s` or when it fails."""
    print(line)  # noqa: T201


def check(outcomes: list[Outcome], texts: dict[tuple[str, str], str], refused: bool = False) -> Counter:
    """Every answer is that of the model it names, every error may pass, and none hung.

    Args:
        outcomes: what a load gave.
        texts: see `greedy_texts`.
        refused: whether models may be refused for good, because their files are not there.

    Returns:
        How many requests ended in each way; None is a whole answer.
    """
    for outcome in outcomes:
        ask, model = outcome.ask, outcome.model
        assert outcome.error != "hung", ask
        if outcome.error is None:
            assert ask.model in ("auto", model, model.partition("@")[0]), outcome
            assert outcome.text == texts[model, ask.prompt], outcome
        else:
            assert outcome.may_retry or (refused and outcome.error == RUN_CHANGED), outcome
            assert not outcome.text or texts[model, ask.prompt].startswith(outcome.text), outcome
    return Counter(outcome.error for outcome in outcomes)


def greedy_texts(run: RunDirectory, prompts: Iterable[str], tokens: int = TOKENS) -> dict[tuple[str, str], str]:
    """(`name@digest` or `base`, prompt) -> greedy text of PEFT's `generate`, for all models of a run."""
    registry = read_registry(run)
    tokenizer = load_tokenizer(registry.base_model)
    texts = {}
    adapters: list[Adapter | None] = [None, *registry.adapters]
    for adapter in adapters:
        model = load_base(registry.base_model)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, run.fetch(adapter.folder)).eval()
        for prompt in prompts:
            messages = [{"role": "user", "content": prompt}]
            ids = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=False
            )
            answer = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
            )
            text = tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)
            texts[adapter.id if adapter else "base", prompt] = text
    return texts


@contextlib.contextmanager
def served(run: RunDirectory, **arguments: Any) -> Iterator[str]:
    """URL of an endpoint on the Ray cluster that this process is connected to; afterwards Serve is gone from it."""
    before = os.environ.get("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = "auto"
    try:
        application = build(ServeArguments(run_dir=run.uri, **arguments))
        with reserved_port("127.0.0.1", 0) as port, endpoint(application, "127.0.0.1", port) as url:
            yield url
    finally:
        if before is None:
            del os.environ["RAY_ADDRESS"]
        else:
            os.environ["RAY_ADDRESS"] = before


def replicas(deployment: str) -> dict[int, psutil.Process]:
    """Processes of a deployment's replicas, on the Ray cluster that this process started, by process id."""
    found, title = {}, f"ServeReplica:{APPLICATION}:{deployment}"
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if title in " ".join(process.cmdline()):
                found[process.pid] = process
    return found


def kill(deployment: str, count: int = 1) -> list[int]:
    """SIGKILL to replicas. Returns their process ids."""
    doomed = list(replicas(deployment))[:count]
    assert len(doomed) == count
    for pid in doomed:
        os.kill(pid, signal.SIGKILL)
    return doomed


def wait_until_whole(deployment: str, count: int, without: Iterable[int]) -> float:
    """Until a deployment has so many replicas that serve, none of them among the dead. Returns seconds."""
    began_s, dead = time.monotonic(), set(without)

    def is_whole() -> bool:
        states = serve.status().applications[APPLICATION].deployments[deployment].replica_states
        alive = replicas(deployment).keys()
        return states.get("RUNNING", 0) == sum(states.values()) == len(alive) == count and not alive & dead

    wait_until(is_whole, f"whole {deployment}")
    return time.monotonic() - began_s


def leases() -> dict[str, int]:
    """Adapter -> requests that use it, as one replica of the experts says."""
    counts: dict[str, int] = serve.get_deployment_handle("Experts", APPLICATION).leases.remote().result(timeout_s=30)
    return counts
