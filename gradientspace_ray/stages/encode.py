"""Encodings of prompts by the router's encoder, made by workers on Ray."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import ray

from gradientspace_ray.recipe import Recipe
from gradientspace_ray.router.encoder import PromptEncoder
from gradientspace_ray.run import RunDirectory
from gradientspace_ray.stages.progress import watched_board

PROMPTS_AT_ONCE = 64
"""Prompts that are encoded together, by whichever worker."""


def encodings(recipe: Recipe, run: RunDirectory, splits: Sequence[str]) -> list[np.ndarray]:
    """Encodings of the prompts of each split, [N, H] float32 of unit length, in the order of its file.

    Which prompts share a batch, which decides their last bits, depends on the splits and on nothing else.

    Args:
        recipe: names the encoder and the workers.
        run: holds the examples.
        splits: at least one of `train`, `validation` and `test`.
    """
    counts = [run.read_table(f"examples/{split}.parquet", ["id"]).num_rows for split in splits]
    task = _encode.options(
        num_cpus=recipe.compute.cpus_per_worker,
        num_gpus=recipe.compute.gpus_per_worker,
        max_retries=recipe.compute.retries,
        retry_exceptions=[OSError],
    )
    total = sum(counts)
    chunks = -(-total // PROMPTS_AT_ONCE)
    workers = max(1, min(recipe.evaluate.workers, chunks))
    with watched_board() as board:
        borders = [
            min(part * PROMPTS_AT_ONCE, total) for part in np.linspace(0, chunks, workers + 1).astype(int).tolist()
        ]
        lines = [f"encoding prompts {i + 1}/{workers}" for i in range(workers)]
        running = [
            task.remote(recipe, run.uri, splits, start, stop, board, line)
            for start, stop, line in zip(borders, borders[1:], lines, strict=False)
        ]
        encodings_NH = np.concatenate(ray.get(running))
    return np.split(encodings_NH, np.cumsum(counts)[:-1])


@ray.remote
def _encode(
    recipe: Recipe, run_uri: str, splits: Sequence[str], start: int, stop: int, board: Any, line: str
) -> np.ndarray:
    """Encodings of prompts `start` to `stop`, counted over the examples of all splits."""
    run = RunDirectory(run_uri)
    prompts = [
        prompt
        for split in splits
        for prompt in run.read_table(f"examples/{split}.parquet", ["prompt"])["prompt"].to_pylist()
    ][start:stop]
    board.report.remote(line, 0, len(prompts), "loading")
    encoder = PromptEncoder(recipe.router.encoder, recipe.router.max_tokens, recipe.compute.device)
    chunks = [np.zeros((0, encoder.width), np.float32)]
    for first in range(0, len(prompts), PROMPTS_AT_ONCE):
        chunk = prompts[first : first + PROMPTS_AT_ONCE]
        chunks.append(encoder.encode(chunk))
        board.report.remote(line, first + len(chunk), len(prompts))
    return np.concatenate(chunks)
