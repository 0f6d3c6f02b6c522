"""Ways to a few directions out of a stream of gradients, each measured in a process of its own.

The gradients are in a file, and a method reads them by ordinary file reads, whole rows or blocks of columns at a time:
pages of the file are nobody's memory, what has been read is the method's own. Its seconds leave the reads out, which in
a real run the model's backward passes stand for. Its peak is that of the process, beyond what the process had when the
method began: batches, buffers and results all count.

What a method found is judged afterwards, from the gradients themselves, by products of K x K alone.

Shapes: N gradients, D entries of each, K directions of a method, C columns of a block, B gradients of a batch.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from sklearn.decomposition import IncrementalPCA

from gradientspace_ray.sketch.directions import blocks_of, column_blocks, gram, rotate
from gradientspace_ray.sketch.online_svd import OnlineSVD
from gradientspace_ray.sketch.refinement import Refinement, refined_directions
from gradientspace_ray.sketch.tree import Node, merge_tree

COLUMNS = 2**15
EXACT, OURS = "exact", ("online_svd", "online_svd_refined")
LEDGER_TOLERANCE = 1e-4
USABLE_MEMORY = 0.9
"""Share of the free memory that a method may take; what wants more fails, instead of pushing others out."""


class MethodError(RuntimeError):
    """A method that did not come to its end; the message says why in one line."""


class Settings(NamedTuple):
    """What a method is given."""

    gradients: str
    """File of N x D float32."""
    examples: int
    dimension: int
    rank: int
    oversampling: int | None
    """Of `OnlineSVD`."""
    shard_size: int
    batch_rows: int
    """Gradients that are read at once."""
    exact_rows: str
    """File of the exact directions, K x D float32; the exact method writes it, the others are compared with it."""
    threads: int


class RowFile:
    """A matrix of float32 in a file, read without mapping it into memory."""

    def __init__(self, path: str, rows: int, width: int) -> None:
        self.path, self.count, self.width = path, rows, width
        self.reading_s = self.reading_cpu_s = 0.0
        self._batch = np.empty(0, dtype=np.float32)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Some of the rows, in memory that the next call uses again."""
        stop = min(stop, self.count)
        size = (stop - start) * self.width
        if self._batch.size < size:
            self._batch = np.empty(size, dtype=np.float32)
        return self._read([start * self.width], self._batch[None, :size]).view(stop - start, self.width)

    def columns(self, columns: slice) -> torch.Tensor:
        """A block of columns, of all rows."""
        starts = [row * self.width + columns.start for row in range(self.count)]
        return self._read(starts, np.empty((self.count, columns.stop - columns.start), dtype=np.float32))

    def _read(self, starts: list[int], found: np.ndarray) -> torch.Tensor:
        began, began_cpu = time.perf_counter(), time.process_time()
        with open(self.path, "rb", buffering=0) as file:
            for start, piece in zip(starts, found, strict=True):
                file.seek(start * found.itemsize)
                left = memoryview(piece).cast("B")
                while left:
                    size = file.readinto(left)
                    if not size:
                        raise MethodError(f"{self.path} ends before {self.count} rows of {self.width} numbers")
                    left = left[size:]
        self.reading_s += time.perf_counter() - began
        self.reading_cpu_s += time.process_time() - began_cpu
        return torch.from_numpy(found)


class Found(NamedTuple):
    """What a method came to."""

    block: Callable[[slice], torch.Tensor]
    """Some of the columns of its directions, K x C: rows that span them."""
    ledger: float | None = None
    """The share of the energy that it says it holds."""
    coordinates_NK: torch.Tensor | None = None
    """U: the gradients are close to U times the directions."""
    spare_rows: int = 0
    """The last of the directions, which are beyond `rank`."""


def online_svd(gradients: RowFile, settings: Settings) -> Found:
    """The sketch of each shard, merged along the tree as soon as two siblings are there.

    It is the run's tree with all sketches in memory, where the gradient stage keeps them in files and holds a single
    one beside a block of columns of two others; so here they count, one for each level of the tree.
    """
    sketch = _sketch(gradients, settings)
    return Found(lambda columns: sketch.rows[:, columns], sketch.energy.share, sketch.coordinates)


def online_svd_refined(gradients: RowFile, settings: Settings) -> Found:
    """The same, and a second pass over the gradients with all rows that the first one carried."""
    refinement = Refinement(_sketch(gradients, settings).carried_rows)
    for batch_BD in _batches(gradients, range(gradients.count), settings.batch_rows):
        refinement.update(batch_BD)
    projections_NK = refinement.projections
    turn_KR, singular_values_R = refined_directions(
        gram([refinement.sums]), projections_NK.T @ projections_NK, settings.rank
    )
    rows_RD = refinement.sums[: turn_KR.shape[1]]
    for columns in blocks_of(rows_RD):
        rows_RD[:, columns] = rotate([refinement.sums[:, columns]], turn_KR)
    captured = float(singular_values_R.square().sum()) / refinement.energy_total
    return Found(lambda columns: rows_RD[:, columns], captured, projections_NK @ turn_KR)


def _sketch(gradients: RowFile, settings: Settings) -> OnlineSVD:
    shards = [
        range(start, min(start + settings.shard_size, gradients.count))
        for start in range(0, gradients.count, settings.shard_size)
    ]

    def made(node: Node) -> OnlineSVD:
        if node.children:
            first, *others = node.children
            sketch = made(first)
            for other in others:
                sketch.merge(made(other))
            return sketch
        sketch = OnlineSVD(settings.rank, oversampling=settings.oversampling)
        for batch_BD in _batches(gradients, shards[int(node.name)], settings.batch_rows):
            sketch.update(batch_BD)
        return sketch

    return made(merge_tree([str(index) for index in range(len(shards))]))


def multiply_adds(rows: int, batch_rows: int, carried: int) -> float:
    """Those of `OnlineSVD`, for each column, to sketch so many rows in batches of at most `carried`, and to show them.

    A batch that fits beside what is carried is put there: its squares are summed, and it is scaled. Another one, and in
    the end rows that were only put there, take a Gram matrix of all that is stacked, and the turn to what is carried.
    """
    total = 0.0
    for start in range(0, rows, batch_rows):
        added = min(batch_rows, rows - start)
        stacked = min(carried, start) + added
        total += 2 * added if stacked <= carried else (stacked / 2 + carried) * stacked
    return total + (1.5 * rows**2 if rows <= carried else 0.0)


def exact(gradients: RowFile, settings: Settings) -> Found:
    """The leading right singular vectors, from the N x N Gram matrix in float64: the optimum of this rank.

    The gradients are read twice, a block of columns of all of them at a time, so all must be kept.
    """
    gram_NN = torch.zeros(gradients.count, gradients.count, dtype=torch.float64)
    for columns in column_blocks(gradients.width, COLUMNS):
        block_NC = gradients.columns(columns).double()
        gram_NN.addmm_(block_NC, block_NC.T)
    values_N, vectors_NN = torch.linalg.eigh(gram_NN)
    turn_NK = vectors_NN[:, -settings.rank :].flip(1)
    with open(settings.exact_rows, "wb") as file:
        file.truncate(turn_NK.shape[1] * gradients.width * 4)
        for columns in column_blocks(gradients.width, COLUMNS):
            block_KC = (turn_NK.T @ gradients.columns(columns).double()).float().numpy()
            for row, piece in enumerate(block_KC):
                file.seek((row * gradients.width + columns.start) * 4)
                file.write(piece.tobytes())
    rows = RowFile(settings.exact_rows, turn_NK.shape[1], gradients.width)
    return Found(rows.columns, float(values_N[-settings.rank :].sum() / gram_NN.trace()), turn_NK)


def incremental_pca(gradients: RowFile, settings: Settings) -> Found:
    """Scikit-learn's `IncrementalPCA`, in batches as large as may be.

    It subtracts the mean of the data, which is its nature, so its components leave the mean out. It is judged twice:
    by the components alone, and, with one direction more than the others have, by components and mean.
    """
    pca = IncrementalPCA(n_components=settings.rank, copy=False)
    # Equal batches: none may have fewer rows than there are components.
    pieces = max(1, min(-(-gradients.count // settings.batch_rows), gradients.count // settings.rank))
    borders = [gradients.count * piece // pieces for piece in range(pieces + 1)]
    for start, stop in pairwise(borders):
        pca.partial_fit(gradients.rows(start, stop).numpy())
    components_KD, mean_1D = torch.from_numpy(pca.components_), torch.from_numpy(pca.mean_)[None]
    return Found(lambda columns: torch.cat([components_KD[:, columns], mean_1D[:, columns]]), spare_rows=1)


def random_projection(gradients: RowFile, settings: Settings) -> Found:
    """A Gaussian random projection to `rank` numbers; its matrix is made again, block by block, for every batch.

    It keeps distances, roughly, and is not meant to keep energy: of the gradients projected on the space that the rows
    of its matrix span, there is K / D.
    """

    def block(columns: slice) -> torch.Tensor:
        generator = torch.Generator().manual_seed(columns.start)
        return torch.randn(settings.rank, columns.stop - columns.start, generator=generator)

    projected_NK = torch.zeros(gradients.count, settings.rank, dtype=torch.float64)
    for start in range(0, gradients.count, settings.batch_rows):
        batch_BD = gradients.rows(start, start + settings.batch_rows)
        for columns in column_blocks(gradients.width, COLUMNS):
            projected_NK[start : start + len(batch_BD)] += batch_BD[:, columns] @ block(columns).T
    return Found(block)


METHODS: dict[str, Callable[[RowFile, Settings], Found]] = {
    EXACT: exact,
    "online_svd": online_svd,
    "online_svd_refined": online_svd_refined,
    "incremental_pca": incremental_pca,
    "random_projection": random_projection,
}
PASSES = {EXACT: "all kept", "online_svd": "1", "online_svd_refined": "2", "incremental_pca": "1"}
PASSES["random_projection"] = "1"


def _batches(gradients: RowFile, rows: range, size: int) -> Iterator[torch.Tensor]:
    for start in range(rows.start, rows.stop, size):
        yield gradients.rows(start, min(start + size, rows.stop))


def judge(found: Found, gradients: RowFile, exact_rows: RowFile) -> dict[str, Any]:
    """What a method found, compared with the gradients and with the exact directions.

    Returns:
        `row_space_captured`: ||G V^T||^2 / ||G||^2, V an orthonormal basis of its `rank` directions (and
        `row_space_captured_with_mean`, V of all, where there are more); `largest_angle_degrees`, between what V and the
        exact directions span, and `shared`, the mean squared cosine of all the angles; with coordinates,
        `direct_captured`: 1 - ||G - U R||^2 / ||G||^2 by the very rows R that it holds.
    """
    sums: dict[str, Any] = {"rows": 0, "projections": 0, "cross": 0, "exact": 0, "total": 0.0, "missed": 0.0}
    for columns in column_blocks(gradients.width, COLUMNS):
        gradients_NC, exact_KC = gradients.columns(columns).double(), exact_rows.columns(columns).double()
        rows_KC = found.block(columns).double()
        sums["rows"] += rows_KC @ rows_KC.T
        sums["exact"] += exact_KC @ exact_KC.T
        sums["cross"] += rows_KC @ exact_KC.T
        sums["projections"] += gradients_NC @ rows_KC.T
        sums["total"] += float(gradients_NC.square().sum())
        if found.coordinates_NK is not None:
            sums["missed"] += float(gradients_NC.addmm(found.coordinates_NK, rows_KC, alpha=-1).square().sum())
    rank = len(sums["rows"]) - found.spare_rows

    def captured(count: int) -> float:
        basis = whitened(sums["rows"][:count, :count])
        return float((sums["projections"][:, :count] @ basis).square().sum()) / sums["total"]

    cosines = torch.linalg.svdvals(
        whitened(sums["rows"][:rank, :rank]).T @ sums["cross"][:rank] @ whitened(sums["exact"])
    ).clamp(max=1)
    facts = {
        "row_space_captured": captured(rank),
        "largest_angle_degrees": float(cosines.min().acos().rad2deg()),
        "shared": float(cosines.square().mean()),
    }
    if found.spare_rows:
        facts["row_space_captured_with_mean"] = captured(rank + found.spare_rows)
    if found.coordinates_NK is not None:
        facts["direct_captured"] = 1 - sums["missed"] / sums["total"]
    return facts


def whitened(gram_KK: torch.Tensor) -> torch.Tensor:
    """W such that W^T rows is an orthonormal basis of what the rows of this Gram matrix span."""
    values_K, vectors_KK = torch.linalg.eigh(gram_KK)
    independent = values_K > values_K[-1] * 1e-12
    return vectors_KK[:, independent] * values_K[independent].rsqrt()


def measure(name: str, settings: Settings) -> dict[str, Any]:
    """Run one method in this process, which should be new, and judge what it found.

    Raises:
        MethodError: its ledger is not what the gradients say.
    """
    torch.set_num_threads(settings.threads)
    # Thread pools, and what libraries set up at their first call, are there in any process.
    torch.linalg.eigh(torch.eye(256, dtype=torch.float64) @ torch.eye(256, dtype=torch.float64))
    process = psutil.Process()
    limit_memory(int(USABLE_MEMORY * psutil.virtual_memory().available))
    gradients = RowFile(settings.gradients, settings.examples, settings.dimension)
    before, began, began_cpu = process.memory_info().rss, time.perf_counter(), time.process_time()
    found = METHODS[name](gradients, settings)
    seconds = time.perf_counter() - began - gradients.reading_s
    cpu_seconds = time.process_time() - began_cpu - gradients.reading_cpu_s
    peak, reading_s = peak_rss_bytes() - before, gradients.reading_s
    exact_rows = RowFile(settings.exact_rows, min(settings.rank, settings.examples), settings.dimension)
    facts = judge(found, gradients, exact_rows)
    captured = facts["row_space_captured"]
    if name in OURS:
        assert found.ledger is not None
        facts["ledger_captured"] = captured = found.ledger
        if abs(captured - facts["direct_captured"]) > LEDGER_TOLERANCE:
            direct = facts["direct_captured"]
            raise MethodError(f"{name} says that it holds {captured:.6f} of the energy, the gradients say {direct:.6f}")
    numbers = {"seconds": seconds, "cpu_seconds": cpu_seconds, "reading_seconds": reading_s, "peak_mb": peak / 1e6}
    return {"captured": captured, **facts, **numbers, "passes": PASSES[name], "batch_rows": settings.batch_rows}


def peak_rss_bytes() -> int:
    """Most memory that this process ever held."""
    # Not `ru_maxrss`, which on Linux a new process inherits from the one that started it.
    if peak := _status_bytes("VmHWM"):
        return peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def limit_memory(size_bytes: int) -> None:
    """Let this process take so much more memory; then it fails, before the machine does."""
    with suppress(ValueError, OSError):
        soft, hard = _status_bytes("VmData") + size_bytes, resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _status_bytes(field: str) -> int:
    """A size that Linux knows of this process; 0 elsewhere."""
    with suppress(FileNotFoundError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return 0


def in_new_process(script: str, arguments: Any, threads: int) -> dict[str, Any]:
    """Run a script beside this one, and return what it answers.

    Args:
        script: file name.
        arguments: JSON, its only argument.
        threads: of every library.

    Raises:
        MethodError: it failed.
    """
    variables = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script)), json.dumps(arguments)],
        env={**os.environ, **dict.fromkeys(variables, str(threads))},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise MethodError(f"its process ended with status {done.returncode}")
    answer = json.loads(done.stdout.splitlines()[-1])
    if "error" in answer:
        raise MethodError(answer["error"])
    return answer


def answer(call: Callable[[], dict[str, Any]]) -> None:
    """What a script that `in_new_process` runs does: print the result, or why there is none."""
    try:
        result = call()
    except (MethodError, MemoryError, RuntimeError, OSError) as error:
        result = {"error": (str(error).splitlines() or ["it runs out of memory"])[0]}
    print(json.dumps(result))


if __name__ == "__main__":
    method, fields = json.loads(sys.argv[1])
    answer(lambda: measure(method, Settings(**fields)))
