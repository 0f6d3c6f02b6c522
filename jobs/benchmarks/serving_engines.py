"""Who answers the requests: the engine, and other ways to generate with experts.

All of them compute with the same weights, greedily, with as many threads; one has its turn at a time. They are opened
on a thread that ends, see `gradientspace_ray.engine.threads`. Static batches are the way of `generate`: requests that
wait are taken together, the batch runs until its longest answer is done, and who comes meanwhile waits.

Shapes: K experts of an ensemble, P requests, N rows of a batch, T tokens, I and O input and output width of a layer,
R LoRA rank, V vocabulary.
"""

import asyncio
import copy
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from serving_load import Answer, AnswerError, Request
from torch import Tensor, nn
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.generation.streamers import BaseStreamer

from gradientspace_ray.engine.adapters import AdapterFiles, read_adapter
from gradientspace_ray.engine.contract import Sampling
from gradientspace_ray.engine.scheduler import Engine
from gradientspace_ray.engine.slots import Slots
from gradientspace_ray.engine.threads import in_passing_thread
from gradientspace_ray.models.loading import load_adapter, load_base, load_tokenizer
from gradientspace_ray.models.reading import set_attention

GATHER_S = 0.002
"""So long a static batch waits for requests that come at the same time."""
PAGE_TOKENS = 256
SEED = 0
Step = Callable[[int], None]
"""Is told after each token how many every row has."""
Generate = Callable[[Sequence[Request], Step], None]


@dataclass(frozen=True)
class Setup:
    """What the contenders share."""

    name: str
    """Of the base model."""
    folders: tuple[Path, ...]
    """PEFT folder of each expert."""
    rows: int
    """Most rows of a batch."""
    slots: int
    """Adapters that the engine holds at once."""
    ensemble: int
    """K, experts that an ensemble mixes: the first of the folders."""
    threads: int
    scratch: Path
    longest: int
    """Most tokens of a prompt and its answer."""

    @cached_property
    def model(self) -> PreTrainedModel:
        """The bare base model, loaded when it is first asked for."""
        return load_base(self.name)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's."""
        return load_tokenizer(self.name)


def copy_of(model: PreTrainedModel, attention: str | None = None) -> PreTrainedModel:
    """Another model with the same weights, not copied, so that its layers can be wrapped.

    Args:
        model: it stays as it is.
        attention: the copy's; None keeps it.
    """
    kept = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    made: PreTrainedModel = copy.deepcopy(model, kept)
    if attention:
        set_attention(made, attention)
    # Without an end-of-text token: answers have the length that is asked for.
    made.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    return made


@asynccontextmanager
async def engine(setup: Setup, base_only: bool = False) -> AsyncIterator[Answer]:
    """The project's engine. Its prefix cache is off: the others have none.

    Args:
        setup: see there.
        base_only: answer every request with the base model, whatever expert it asks for.
    """

    def start() -> Engine:
        model = copy_of(setup.model)
        slots = Slots.like(model, setup.folders[0], setup.slots)
        return Engine(model, setup.tokenizer, slots, max_rows=setup.rows, prefix_tokens=0)

    made = in_passing_thread(start)
    adapters = [AdapterFiles(f"{folder.name}@{number}", folder) for number, folder in enumerate(setup.folders)]

    async def answer(request: Request) -> AsyncGenerator[int, None]:
        sampling = Sampling(request.max_tokens, temperature=0.0, ignore_eos=True)
        adapter = None if base_only else adapters[request.expert]
        async with aclosing(made.submit(request.prompt.ids, sampling, adapter)) as pieces:
            async for piece in pieces:
                yield piece.completion_tokens

    try:
        yield answer
    finally:
        made.close()


@dataclass(eq=False)
class _Waiting:
    request: Request
    counts: asyncio.Queue[int | BaseException]
    wanted: bool = True


@asynccontextmanager
async def static_batches(generate: Generate, most: int) -> AsyncIterator[Answer]:
    """Answers by whole batches of at most so many requests; `generate` runs on a thread of its own."""
    waiting: asyncio.Queue[_Waiting] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    async def answer(request: Request) -> AsyncGenerator[int, None]:
        own = _Waiting(request, asyncio.Queue())
        waiting.put_nowait(own)
        try:
            count = 0
            while count < request.max_tokens:
                came = await own.counts.get()
                if isinstance(came, BaseException):
                    raise AnswerError(str(came)) from came
                yield (count := came)
        finally:
            own.wanted = False

    def tell(batch: Sequence[_Waiting], came: int | BaseException) -> None:
        for own in batch:
            if isinstance(came, BaseException) or came <= own.request.max_tokens:
                own.counts.put_nowait(came)

    def run(batch: Sequence[_Waiting]) -> None:
        def step(count: int) -> None:
            if not any(own.wanted for own in batch):
                raise AnswerError("nobody waits for this batch any more")
            loop.call_soon_threadsafe(tell, batch, count)

        with torch.inference_mode():
            generate([own.request for own in batch], step)

    async def work(thread: ThreadPoolExecutor) -> None:
        while True:
            batch = [await waiting.get()]
            await asyncio.sleep(GATHER_S)
            while not waiting.empty() and len(batch) < most:
                batch.append(waiting.get_nowait())
            if batch := [own for own in batch if own.wanted]:
                (failure,) = await asyncio.gather(loop.run_in_executor(thread, run, batch), return_exceptions=True)
                if failure is not None:
                    tell(batch, failure)

    with ThreadPoolExecutor(1, thread_name_prefix="static-batches") as thread:
        worker = asyncio.create_task(work(thread))
        try:
            yield answer
        finally:
            worker.cancel()
            with suppress(asyncio.CancelledError):
                await worker


class _Steps(BaseStreamer):
    """Counts what `generate` streams: the prompts, then one token of each row at a time."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self._count = -1

    def put(self, value: Tensor) -> None:
        self._count += 1
        if self._count:
            self._step(self._count)

    def end(self) -> None:
        pass


def left_padded(requests: Sequence[Request]) -> tuple[Tensor, Tensor]:
    """Tokens and mask [P, T] of prompts that all end in the last column."""
    width = max(len(request.prompt.ids) for request in requests)
    ids_PT = torch.zeros(len(requests), width, dtype=torch.long)
    mask_PT = torch.zeros_like(ids_PT)
    for row, request in enumerate(requests):
        ids_PT[row, width - len(request.prompt.ids) :] = torch.tensor(request.prompt.ids)
        mask_PT[row, width - len(request.prompt.ids) :] = 1
    return ids_PT, mask_PT


def longest_answer(requests: Sequence[Request]) -> int:
    """Tokens that a static batch generates for each of its rows."""
    return max(request.max_tokens for request in requests)


@asynccontextmanager
async def transformers_generate(setup: Setup) -> AsyncIterator[Answer]:
    """The bare base model, by `generate` of transformers."""
    model: Any = in_passing_thread(lambda: copy_of(setup.model, "sdpa"))

    def generate(requests: Sequence[Request], step: Step) -> None:
        ids_PT, mask_PT = left_padded(requests)
        longest = longest_answer(requests)
        model.generate(ids_PT, attention_mask=mask_PT, max_new_tokens=longest, streamer=_Steps(step))

    async with static_batches(generate, setup.rows) as answer:
        yield answer


@asynccontextmanager
async def peft_mixed(setup: Setup) -> AsyncIterator[Answer]:
    """PEFT's mixed batches: all adapters are loaded, and each row of `generate` names its own."""

    def loaded() -> Any:
        model: Any = copy_of(setup.model, "sdpa")
        for number, folder in enumerate(setup.folders):
            model = load_adapter(model, folder, f"expert{number}")
        return model

    model = in_passing_thread(loaded)

    def generate(requests: Sequence[Request], step: Step) -> None:
        ids_PT, mask_PT = left_padded(requests)
        model.generate(
            input_ids=ids_PT,
            attention_mask=mask_PT,
            max_new_tokens=longest_answer(requests),
            adapter_names=[f"expert{request.expert}" for request in requests],
            streamer=_Steps(step),
        )

    async with static_batches(generate, setup.rows) as answer:
        yield answer


class EnsembleLinear(nn.Module):
    """A linear layer for rows in K groups, one after the other, each with an adapter of its own.

    Groups multiply with their expert's matrices where they are: no copies, whatever the number of rows.
    """

    def __init__(self, base: nn.Linear, a_KRI: Tensor, b_KOR: Tensor) -> None:
        super().__init__()
        self.base = base
        self.a_KIR = a_KRI.mT.contiguous()
        self.b_KRO = b_KOR.mT.contiguous()

    def forward(self, x_NTI: Tensor) -> Tensor:
        """[N, T, I] -> [N, T, O], N = K P."""
        y_NTO: Tensor = self.base(x_NTI)
        experts = len(self.a_KIR)
        grouped = torch.bmm(x_NTI.reshape(experts, -1, x_NTI.shape[-1]), self.a_KIR)
        return torch.baddbmm(y_NTO.view(experts, -1, y_NTO.shape[-1]), grouped, self.b_KRO).view_as(y_NTO)


def ensemble_model(setup: Setup) -> PreTrainedModel:
    """The base model whose layers hold the first K experts side by side."""
    model = copy_of(setup.model, "sdpa")
    experts = [read_adapter(folder) for folder in setup.folders[: setup.ensemble]]
    for name in experts[0]:
        layer: Any = model.get_submodule(name)
        matrices = [torch.stack([expert[name][side] for expert in experts]) for side in (0, 1)]
        model.set_submodule(name, EnsembleLinear(layer, *matrices))
    return model


def router_weights(request: Request, experts: int) -> np.ndarray:
    """How much each expert counts for a request [K]: made up, of sum 1; the cost does not depend on them."""
    return np.random.default_rng([SEED, request.number]).dirichlet(np.ones(experts))


def mixed_generation(model: PreTrainedModel, experts: int, requests: Sequence[Request], step: Step) -> Tensor:
    """Greedy answers [P, T] of an ensemble as in ELREA (arXiv 2501.19144).

    Every expert reads every token, and the next one is the most likely in the weighted mean of their distributions.

    Args:
        model: see `ensemble_model`.
        experts: K.
        requests: read and answered together, K rows each.
        step: see `Step`.
    """
    ids_PT, mask_PT = left_padded(requests)
    weights_KP1 = torch.tensor(np.stack([router_weights(request, experts) for request in requests], 1)[..., None])
    cache = DynamicCache(config=model.config)
    input_NT, mask_NT = ids_PT.repeat(experts, 1), mask_PT.repeat(experts, 1)
    positions_NT = (mask_NT.cumsum(1) - 1).clamp(min=0)
    chosen = []
    for count in range(1, longest_answer(requests) + 1):
        output = model(
            input_NT,
            attention_mask=mask_NT,
            position_ids=positions_NT,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        probabilities_KPV = torch.softmax(output.logits[:, -1], dim=-1).unflatten(0, (experts, -1))
        tokens_P = (weights_KP1.to(probabilities_KPV) * probabilities_KPV).sum(0).argmax(-1)
        chosen.append(tokens_P)
        step(count)
        input_NT, positions_NT = tokens_P.repeat(experts)[:, None], positions_NT[:, -1:] + 1
        mask_NT = torch.cat([mask_NT, mask_NT.new_ones(len(mask_NT), 1)], dim=1)
    return torch.stack(chosen, 1)


@asynccontextmanager
async def ensemble(setup: Setup, requests_at_once: int | None = None) -> AsyncIterator[Answer]:
    """Every request is K rows, and their distributions are averaged at every token; see `mixed_generation`.

    Args:
        setup: see there.
        requests_at_once: of a batch; None fits as many as do not have more rows than the others' batches.
    """
    model = in_passing_thread(lambda: ensemble_model(setup))
    most = requests_at_once or max(1, setup.rows // setup.ensemble)

    def generate(requests: Sequence[Request], step: Step) -> None:
        mixed_generation(model, setup.ensemble, requests, step)

    async with static_batches(generate, most) as answer:
        yield answer


@asynccontextmanager
async def continuous_batching(setup: Setup) -> AsyncIterator[Answer]:
    """The bare base model, by transformers' own continuous batching. It has no adapter per request."""
    pages = setup.rows * (2 + setup.longest // PAGE_TOKENS)
    settings = ContinuousBatchingConfig(
        page_size=PAGE_TOKENS,
        num_blocks=pages,
        max_requests_per_batch=setup.rows,
        allow_block_sharing=False,
        auto_switch_to_flash=False,
    )
    model: Any = in_passing_thread(lambda: copy_of(setup.model, "sdpa"))
    manager = model.init_continuous_batching(
        GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0), settings
    )
    numbers = iter(range(10**9))

    async def answer(request: Request) -> AsyncGenerator[int, None]:
        name = f"request{next(numbers)}"
        outputs: asyncio.Queue[Any] = asyncio.Queue()
        manager.register_result_handler(name, outputs.put_nowait)
        manager.add_request(
            list(request.prompt.ids), name, max_new_tokens=request.max_tokens, streaming=True, eos_token_id=-1
        )
        finished = False
        try:
            while not finished:
                output = await outputs.get()
                if output.error:
                    raise AnswerError(output.error)
                finished = output.is_finished()
                yield len(output.generated_tokens)
        finally:
            if not finished:
                manager.cancel_request(name)

    manager.start()
    try:
        yield answer
    finally:
        await asyncio.to_thread(manager.stop, hard_stop=True)
        manager.destroy()
