"""Sources -> examples: read, render, reject, and split, once and before anything is trained."""

import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from gradientspace_ray.examples.formats import Record, Rejected, read_source
from gradientspace_ray.examples.rendering import IGNORED, Message, Renderer, RenderingError, example_id, prompt_view
from gradientspace_ray.examples.splits import hashed_position
from gradientspace_ray.models.bundled import is_installed
from gradientspace_ray.models.loading import load_tokenizer
from gradientspace_ray.recipe import DataSection, Recipe
from gradientspace_ray.run import RunDirectory, Summary, digest_of
from gradientspace_ray.stages.progress import Bars

SPLITS = ("train", "validation", "test")
SAMPLE_PURPOSE = 3
"""Second part of the seed of the sample that `data.max_examples` keeps."""
REPORT_EVERY = 100
CLOCK_INTERVAL_S = 1.0
CONVERTING_AFTER_S = 5.0
"""A bundled model whose tokenizer loads longer than this is being converted, which happens once on a machine."""
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
        "input_ids": pa.list_(pa.int32()),
        "labels": pa.list_(pa.int32()),
        "prompt": pa.string(),
        "tokens": pa.int32(),
        "label_tokens": pa.int32(),
        "source": pa.string(),
        "domain": pa.string(),
        "group": pa.string(),
        "split_key": pa.string(),
    }
)
DECISIVE = ("id", "input_ids", "labels", "prompt", "domain", "split_key")
"""Columns that later stages compute with: a change in one of them makes their outputs stale."""


class DataError(ValueError):
    """A dataset that cannot be trained on; the message names the place and the mend in one line."""


def prepare(recipe: Recipe, run: RunDirectory) -> Summary:
    """Commit `examples/{train,validation,test}.parquet` and `examples/rejected.jsonl`.

    Raises:
        SourceError: a source cannot be read.
        DataError: too little is left to train on.
    """
    rows: dict[str, dict[str, Any]] = {}
    rejected: list[Rejected] = []
    items = itertools.chain.from_iterable(read_source(source, recipe.seed) for source in recipe.data.sources)
    with Bars() as bars:
        with _clock(bars, recipe.model.name):
            renderer = Renderer(load_tokenizer(recipe.model.name))
        for count, item in enumerate(items, start=1):
            result = _row(item, renderer, recipe)
            if isinstance(result, Rejected):
                rejected.append(result)
            elif result["id"] in rows:
                rejected.append(Rejected(result["place"], "duplicate", f"same text as {rows[result['id']]['place']}"))
            else:
                rows[result["id"]] = result
            if count % REPORT_EVERY == 0:
                bars.update("reading", count, count, f"{len(rejected)} rejected")
    lines = (json.dumps(asdict(rejection), ensure_ascii=False) + "\n" for rejection in rejected)
    run.write_bytes("examples/rejected.jsonl", "".join(lines).encode())
    reasons = Counter(rejection.reason for rejection in rejected)
    splits: dict[str, list[dict[str, Any]]] = {name: [] for name in SPLITS}
    for row in _sample(sorted(rows.values(), key=lambda row: row["id"]), recipe):
        splits[split_of(row["split_key"], recipe.data)].append(row)
    _check(splits, recipe.data, reasons, run)
    for name, members in splits.items():
        columns = {column: [row[column] for row in members] for column in SCHEMA.names}
        run.write_table(f"examples/{name}.parquet", pa.table(columns, SCHEMA))
    return _summary(splits, rejected, reasons)


def split_key(messages: Sequence[Message], group: str | None) -> str:
    """What decides an example's split: its group, else the first message of its user.

    System prompts, later turns, answers and what the router reads have no say.
    """
    return group if group is not None else prompt_view(messages, "first_user")


def split_of(key: str, data: DataSection) -> str:
    """The split of every example with this key (see `split_key`): decided by a hash of its words alone.

    Keys that differ in case or spacing stay together; no other example has a say.
    """
    position = hashed_position(key)
    if position < data.test_share:
        return "test"
    return "validation" if position < data.test_share + data.validation_share else "train"


@contextmanager
def _clock(bars: Bars, model_name: str) -> Iterator[None]:
    """Show at once, and then every second, that the tokenizer is being loaded."""
    loaded = threading.Event()

    def show() -> None:
        started = time.monotonic()
        is_loaded = False
        while not is_loaded:
            seconds = time.monotonic() - started
            converting = seconds > CONVERTING_AFTER_S and is_installed(model_name)
            note = f"{seconds:.0f} s{', converting the model (once)' if converting else ''}"
            bars.update("loading the tokenizer", 0, 1, note)
            is_loaded = loaded.wait(CLOCK_INTERVAL_S)
        bars.update("loading the tokenizer", 1, 1, note)

    thread = threading.Thread(target=show, name="clock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        loaded.set()
        thread.join()


def _row(item: Record | Rejected, renderer: Renderer, recipe: Recipe) -> dict[str, Any] | Rejected:
    if isinstance(item, Rejected):
        return item
    try:
        rendered = renderer.example(item.messages)
    except RenderingError as error:
        return Rejected(item.place, "not_rendered", str(error))
    tokens, limit = len(rendered.input_ids), recipe.data.max_tokens
    if tokens > limit:
        return Rejected(item.place, "too_long", f"{tokens} tokens, more than data.max_tokens {limit}")
    return {
        "id": example_id(rendered.text),
        "messages": item.messages,
        "input_ids": rendered.input_ids,
        "labels": rendered.labels,
        "prompt": prompt_view(item.messages, recipe.router.view),
        "tokens": tokens,
        "label_tokens": sum(label != IGNORED for label in rendered.labels),
        "source": item.source,
        "domain": item.domain,
        "group": item.group,
        "split_key": split_key(item.messages, item.group),
        "place": item.place,
    }


def _sample(rows: list[dict[str, Any]], recipe: Recipe) -> list[dict[str, Any]]:
    limit = recipe.data.max_examples
    if limit is None or len(rows) <= limit:
        return rows
    kept = np.random.default_rng([recipe.seed, SAMPLE_PURPOSE]).choice(len(rows), limit, replace=False)
    return [rows[index] for index in sorted(kept)]


def _check(
    splits: dict[str, list[dict[str, Any]]], data: DataSection, reasons: Counter[str], run: RunDirectory
) -> None:
    total = sum(map(len, splits.values()))
    keys = len({" ".join(row["split_key"].lower().split()) for rows in splits.values() for row in rows})
    found = f"{total} in {keys} groups" if keys < total else str(total)
    sources = ", ".join(data.sources)
    if total < len(SPLITS):
        listed = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
        why = f"; rejected: {listed}, see {run.path('examples/rejected.jsonl')}" if reasons else ""
        raise DataError(f"{sources}: {total} usable examples, at least {len(SPLITS)} are needed{why}; give more data")
    shares = {"validation": data.validation_share, "test": data.test_share}
    for name, share in shares.items():
        if share and not splits[name]:
            raise DataError(f"{sources}: no {name} examples out of {found}; raise data.{name}_share or give more data")
    if not splits["train"]:
        raise DataError(f"{sources}: no training examples left; lower data.validation_share and data.test_share")


def _summary(splits: dict[str, list[dict[str, Any]]], rejected: list[Rejected], reasons: Counter[str]) -> Summary:
    sizes = {name: len(rows) for name, rows in splits.items()}
    tokens = sum(row["tokens"] for rows in splits.values() for row in rows)
    made = f"{sum(sizes.values())} examples ({', '.join(f'{size} {name}' for name, size in sizes.items())})"
    if rejected:
        made += f", {len(rejected)} rejected"
    return Summary(
        made=f"{made}, {tokens:,} tokens",
        counts={
            "examples": sum(sizes.values()),
            **sizes,
            "tokens": tokens,
            "label_tokens": sum(row["label_tokens"] for rows in splits.values() for row in rows),
            "rejected": len(rejected),
            "rejected_by_reason": dict(sorted(reasons.items())),
        },
        output=digest_of({name: [_row_digest(row) for row in rows] for name, rows in splits.items()}),
    )


def _row_digest(row: dict[str, Any]) -> str:
    return digest_of([row[column] for column in DECISIVE])
