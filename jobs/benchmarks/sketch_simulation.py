"""Merge made-up sketches of shards as the gradient stage does, to see what it takes beyond this machine's models.

The sketches are saved by the functions that a run uses, in its format, and merged by the function that it uses. Their
rows are random and orthogonal, made block by block, each sketch just before it is needed; two siblings are merged as
soon as both are there, and their blocks removed. A sketch is of exactly as many gradients as it has rows (its
coordinates are the identity), so its ledger is exact, and that of the root is checked: it holds no more than there was,
its rows have the norms that its record says, and its coordinates are orthonormal.

Files are written and read through the page cache of one machine; a shared file system or an object store is slower.
"""

import json
import math
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import psutil
import torch
from rich.console import Console
from rich.table import Table
from sketch_methods import MethodError, answer, limit_memory, peak_rss_bytes

from gradientspace_ray.run import RunDirectory
from gradientspace_ray.sketch.columns import (
    BLOCK_COLUMNS,
    COORDINATES,
    SavedSketch,
    SketchRecord,
    save_block,
    save_record,
)
from gradientspace_ray.sketch.directions import column_blocks
from gradientspace_ray.sketch.merging import PART_BLOCKS, coordinates_of, merge_saved
from gradientspace_ray.sketch.tree import Node, merge_tree

BYTES = {"float32": 4, "bfloat16": 2}
ROUNDING = {"float32": 1e-5, "bfloat16": 1e-3}
"""How far the norm of a saved row may be from its singular value, beside the largest."""
MARGIN = 1.1
MODELS = {
    "135M": (134_515_008, 2_442_240),
    "1B": (1_235_814_400, 5_636_096),
    "8B": (7_504_924_672, 20_971_520),
}
"""SmolLM2-135M, Llama-3.2-1B, Llama-3.1-8B: weights that a token is multiplied with, and LoRA weights of rank 8 on all
linear layers."""
LARGE_MODEL = "8B"
TYPICAL_TOKENS = 200.0


class Simulation(NamedTuple):
    """What is simulated."""

    shards: int
    dimension: int
    """D of the tree of `shards` sketches."""
    large_dimension: int
    """D of one pair."""
    rows: int
    """K of every sketch."""
    dtype: str
    """Of the rows on disk; `auto`: float32 where the disk has room, else bfloat16."""
    memory_gb: float
    """The most that the process may take."""
    scratch: str | None
    """Where the files go; None: the system's place for such."""
    threads: int
    examples_per_shard: int
    gpus: int
    gpu_tokens_per_second: float
    tokens_per_example: float
    run_examples: int
    """Of the run whose cost is worked out."""


class CountingStore:
    """A run directory that counts what passes, and knows how much it holds."""

    def __init__(self, folder: str) -> None:
        self._run = RunDirectory(folder)
        self._held: dict[str, int] = {}
        self.read = self.written = self.held = self.peak = 0

    def read_view(self, name: str) -> memoryview:
        """See `Store`."""
        data = self._run.read_view(name)
        self.read += len(data)
        return data

    def write_bytes(self, name: str, data: bytes) -> None:
        """See `Store`."""
        self._run.write_bytes(name, data)
        self.written += len(data)
        self.held += len(data) - self._held.get(name, 0)
        self._held[name] = len(data)
        self.peak = max(self.peak, self.held)

    def sizes(self, name: str) -> dict[str, int]:
        """See `Store`."""
        return self._run.sizes(name)

    def delete_blocks(self, folder: str) -> None:
        """Remove the rows of a sketch."""
        for name in [name for name in self._held if name.startswith(f"{folder}/block-")]:
            self._run.delete(name)
            self.held -= self._held.pop(name)


def simulate(settings: Simulation) -> dict[str, Any]:
    """Merge a tree of sketches, and one pair of large ones.

    Raises:
        MethodError: the disk has no room, or the ledger of a root is not right.
    """
    torch.set_num_threads(settings.threads)
    limit_memory(int(settings.memory_gb * 1e9) - psutil.Process().memory_info().rss)
    result: dict[str, Any] = {"rows": settings.rows, "memory_limit_gb": settings.memory_gb}
    cases = {"tree": (settings.shards, settings.dimension), "pair": (2, settings.large_dimension)}
    for name, (shards, dimension) in cases.items():
        with tempfile.TemporaryDirectory(prefix="sketch-simulation-", dir=settings.scratch) as folder:
            dtype = chosen_dtype(settings, folder, shards, dimension)
            result[name] = merged(folder, shards, dimension, settings.rows, dtype)
    result["peak_rss_mb"] = peak_rss_bytes() / 1e6
    result["arithmetic"] = arithmetic(settings, result["tree"])
    return result


def chosen_dtype(settings: Simulation, folder: str, shards: int, dimension: int) -> str:
    """The type of rows on disk for which there is room.

    Raises:
        MethodError: there is none.
    """
    sketches = math.ceil(math.log2(shards)) + 2
    free = shutil.disk_usage(folder).free
    for dtype in ("float32", "bfloat16") if settings.dtype == "auto" else (settings.dtype,):
        needed = sketches * settings.rows * dimension * BYTES[dtype]
        _tell(f"{shards} sketches of {settings.rows} x {dimension}: {needed / 1e9:.3g} GB at most in {dtype}")
        if needed * MARGIN < free:
            return dtype
        _tell(f"the disk has {free / 1e9:.3g} GB free, which is too few")
    raise MethodError(
        f"no room for {shards} sketches of {settings.rows} x {dimension}: give --scratch, or smaller ones"
    )


def merged(folder: str, shards: int, dimension: int, rows: int, dtype: str) -> dict[str, Any]:
    """Make and merge sketches along the tree, one after the other; what every level took."""
    store = CountingStore(folder)
    levels: dict[int, dict[str, Any]] = defaultdict(
        lambda: {"merges": 0, "bytes_read": 0, "bytes_written": 0, "seconds": 0.0}
    )
    making_s, made = 0.0, 0
    root = merge_tree([str(index) for index in range(shards)])
    for level, node in _from_below(root):
        read, written, began = store.read, store.written, time.perf_counter()
        if not node.children:
            write_sketch(store, node, made, dimension, rows, dtype)
            made += 1
            making_s += time.perf_counter() - began
            continue
        record = merge_saved(store, node)
        for child in node.children:
            store.delete_blocks(child.folder)
        numbers = levels[level]
        numbers["merges"] += 1
        numbers["bytes_read"] += store.read - read
        numbers["bytes_written"] += store.written - written
        numbers["seconds"] += time.perf_counter() - began
        _tell(f"level {level}: {numbers['merges']} merged, {time.perf_counter() - began:.1f} s")
    return {
        "shards": shards,
        "dimension": dimension,
        "dtype": dtype,
        "sketch_bytes": rows * dimension * BYTES[dtype],
        "making_seconds": making_s,
        "levels": [{"level": level, **numbers} for level, numbers in sorted(levels.items())],
        "merge_seconds": sum(numbers["seconds"] for numbers in levels.values()),
        "peak_storage_bytes": store.peak,
        **checked(store, root, record),
    }


def _from_below(node: Node) -> Iterator[tuple[int, Node]]:
    """Children before parents, with their height."""
    heights = [-1]
    for child in node.children:
        for height, below in _from_below(child):
            yield height, below
        heights.append(height)
    yield max(heights) + 1, node


def write_sketch(store: CountingStore, node: Node, seed: int, dimension: int, rows: int, dtype: str) -> None:
    """Save a sketch of random, orthogonal rows of falling length."""
    lengths_K = torch.linspace(1.5, 0.5, rows)
    squares_K = torch.zeros(rows, dtype=torch.float64)
    files = {}
    for index, columns in enumerate(column_blocks(dimension, BLOCK_COLUMNS)):
        generator = torch.Generator().manual_seed(seed << 20 | index)
        width = columns.stop - columns.start
        random_CK = torch.empty(width, rows).uniform_(-1, 1, generator=generator)
        block_KC = torch.linalg.qr(random_CK).Q.T * lengths_K[: min(rows, width), None] * math.sqrt(width / dimension)
        # A last block that is narrower than there are rows has none for the shortest.
        block_KC = torch.nn.functional.pad(block_KC, (0, 0, 0, rows - block_KC.shape[0])).to(getattr(torch, dtype))
        squares_K += torch.linalg.vector_norm(block_KC, dim=1).double().square()
        name = f"block-{index:05d}.safetensors"
        files[name] = save_block(store, node.folder, name, {"rows": block_KC})
    small = {"coordinates": torch.eye(rows, dtype=torch.float64), "row_energies": squares_K}
    files[COORDINATES] = save_block(store, node.folder, COORDINATES, small)
    record = SketchRecord(
        name=node.name,
        kind="svd",
        rank=rows,
        oversampling=0,
        rows=rows,
        dimension=dimension,
        dtype=dtype,
        block_columns=BLOCK_COLUMNS,
        examples=rows,
        energy_total=float(squares_K.sum()),
        energy_captured=float(squares_K.sum()),
        singular_values=squares_K.sqrt().tolist(),
        ids=[f"{seed}-{row}" for row in range(rows)],
        files=files,
    )
    save_record(store, node.folder, record)


def checked(store: CountingStore, root: Node, record: SketchRecord) -> dict[str, Any]:
    """What the root says of itself, compared with its files.

    Raises:
        MethodError: it is not right.
    """
    squares_K = torch.zeros(record.rows, dtype=torch.float64)
    for name in record.blocks:
        rows_KC = SavedSketch(store, root.folder, record).block(name)
        squares_K += torch.linalg.vector_norm(rows_KC, dim=1, dtype=torch.float64).square()
    values_K = torch.tensor(record.singular_values, dtype=torch.float64)
    norms_off = float((squares_K.sqrt() - values_K).abs().max() / values_K[0])
    coordinates_NK = torch.cat([shard.coordinates_NK for shard in coordinates_of(store, root)])
    identity_KK = torch.eye(record.rows, dtype=torch.float64)
    coordinates_off = float((coordinates_NK.T @ coordinates_NK - identity_KK).abs().max())
    captured = record.energy_captured or 0.0
    right = captured <= record.energy_total * (1 + 1e-9)
    if not right or norms_off > ROUNDING[record.dtype] or coordinates_off > 1e-9:
        raise MethodError(
            f"the merged sketch holds {captured} of {record.energy_total}; its rows' norms are off by {norms_off:.1e}, "
            f"the products of its coordinates by {coordinates_off:.1e}"
        )
    return {
        "energy_total": record.energy_total,
        "energy_captured": captured,
        "norms_off": norms_off,
        "coordinates_off": coordinates_off,
    }


def arithmetic(settings: Simulation, tree: dict[str, Any]) -> dict[str, Any]:
    """What the merges of a large run take, at the speed at which those of the tree were done here.

    Its files fit into the page cache, as a large run's fit into the memory of many machines. A merge on one worker is
    assumed to take as long as here; `seconds_spread` has the parts of the columns, which the stage gives to different
    workers, done at once by those that the level's merges leave free.
    """
    large_dimension = MODELS[LARGE_MODEL][1]
    sketch_bytes = settings.rows * large_dimension * BYTES[tree["dtype"]]
    merge_s = tree["merge_seconds"] / (tree["shards"] - 1) * large_dimension / tree["dimension"]
    parts = math.ceil(math.ceil(large_dimension / BLOCK_COLUMNS) / PART_BLOCKS)
    shards = math.ceil(settings.run_examples / settings.examples_per_shard)
    levels, nodes = [], shards
    while nodes > 1:
        merges = nodes // 2
        rounds, workers = math.ceil(merges / settings.gpus), max(1, min(parts, settings.gpus // merges))
        whole_s = rounds * merge_s
        levels.append({"merges": merges, "seconds": whole_s, "seconds_spread": whole_s / workers})
        nodes -= merges
    work_s = (shards - 1) * merge_s
    gradient_s = settings.run_examples * settings.tokens_per_example / settings.gpu_tokens_per_second / settings.gpus
    written = (2 * shards - 1) * sketch_bytes
    return {
        "model": LARGE_MODEL,
        "dimension": large_dimension,
        "dtype": tree["dtype"],
        "examples": settings.run_examples,
        "tokens_per_example": settings.tokens_per_example,
        "gpus": settings.gpus,
        "gpu_tokens_per_second": settings.gpu_tokens_per_second,
        "examples_per_shard": settings.examples_per_shard,
        "shards": shards,
        "levels": levels,
        "merge_seconds": merge_s,
        "bytes_written": written,
        "bytes_written_per_gpu": written / settings.gpus,
        "bytes_read": 4 * (shards - 1) * sketch_bytes,
        "gradient_seconds": gradient_s,
        "merge_share": work_s / settings.gpus / gradient_s,
        "last_path_seconds": sum(level["seconds_spread"] for level in levels),
        # One that waits on each level, one that each worker has just written, and the one that a merge writes.
        "peak_storage_bytes": (len(levels) + settings.gpus + 1) * sketch_bytes,
    }


def model_costs(carried_rows: int, buffer_rows: int, measured: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The sketch's share of the gradient stage for models of three sizes.

    An example of T tokens takes 4 N T FLOP (forward pass, and backward pass to the activations), and its part of an
    update of b buffered beside c carried rows ((c + b)^2 / 2 + c (c + b)) D / b multiply-adds, see `OnlineSVD`.

    Args:
        carried_rows: c.
        buffer_rows: b.
        measured: what a gradient stage took, for tokens and FLOP/s.
    """
    tokens = measured["tokens_per_example"] if measured else TYPICAL_TOKENS
    costs = []
    for model, (weights, dimension) in MODELS.items():
        gradient = 4 * weights * tokens
        stacked = carried_rows + buffer_rows
        sketch = 2 * (stacked / 2 + carried_rows) * stacked * dimension / buffer_rows
        slower = measured["gradient_flops_per_second"] / measured["sketch_flops_per_second"] if measured else None
        costs.append(
            {
                "model": model,
                "weights": weights,
                "dimension": dimension,
                "tokens_per_example": tokens,
                "gradient_flop": gradient,
                "sketch_flop": sketch,
                "share_at_equal_flops": sketch / (gradient + sketch),
                "share_at_measured_flops": slower and sketch * slower / (gradient + sketch * slower),
            }
        )
    return costs


def show_simulation(report: dict[str, Any], console: Console) -> None:
    """Tables of the levels, and what a large run would take."""
    for name in ("tree", "pair"):
        case = report[name]
        title = f"{case['shards']} sketches of {report['rows']} x {case['dimension']}, {case['dtype']}"
        table = Table(title=f"{title}, {case['sketch_bytes'] / 1e9:.3g} GB each")
        for heading in ("level", "merges", "GB read", "GB written", "seconds"):
            table.add_column(heading, justify="right")
        for level in case["levels"]:
            sizes = [f"{level[key] / 1e9:.3g}" for key in ("bytes_read", "bytes_written")]
            table.add_row(str(level["level"]), str(level["merges"]), *sizes, f"{level['seconds']:.1f}")
        console.print(table)
        sketches = case["peak_storage_bytes"] / case["sketch_bytes"]
        console.print(f"peak storage {case['peak_storage_bytes'] / 1e9:.3g} GB, {sketches:.1f} sketches")
    console.print(f"peak memory {report['peak_rss_mb']:.0f} MB of {report['memory_limit_gb']:g} GB")
    large = report["arithmetic"]
    levels = Table(
        title=f"{large['examples']} examples of an {large['model']} model, worked out: {large['shards']} shards"
    )
    for heading in ("level", "merges", "seconds", "seconds, spread over workers"):
        levels.add_column(heading, justify="right")
    for number, level in enumerate(large["levels"], 1):
        levels.add_row(str(number), str(level["merges"]), f"{level['seconds']:.0f}", f"{level['seconds_spread']:.0f}")
    console.print(levels)
    written, each = large["bytes_written"], large["bytes_written_per_gpu"]
    console.print(
        f"one merge {large['merge_seconds']:.0f} s at the speed measured here; written {written / 1e12:.3g} TB in all, "
        f"{each / 1e9:.3g} GB for each of {large['gpus']} GPUs; peak storage {large['peak_storage_bytes'] / 1e9:.0f} GB"
    )
    speed, tokens = large["gpu_tokens_per_second"], large["tokens_per_example"]
    console.print(
        f"gradients take {large['gradient_seconds']:.0f} s, assuming {speed:.0f} tokens/s of a GPU and {tokens:.0f} "
        f"tokens of an example; merging, which goes on meanwhile, is {large['merge_share']:.1%} of that, and the way "
        f"from the last shard to the root {large['last_path_seconds']:.0f} s"
    )


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    fields = json.loads(sys.argv[1])
    answer(lambda: simulate(Simulation(**fields)))
