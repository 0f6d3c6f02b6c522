"""The connection to Ray: an existing cluster when RAY_ADDRESS is set, else a local one that ends with the block."""

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import ray

LOCAL_OBJECT_STORE_BYTES = 256 * 2**20


def connect(device: str) -> None:
    """Join the Ray cluster that RAY_ADDRESS names, or start a local one; nothing happens when already connected."""
    if ray.is_initialized():
        return
    worker_env = {"TOKENIZERS_PARALLELISM": "false"}
    if device == "cpu":
        worker_env["DS_ACCELERATOR"] = "cpu"
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(runtime_env={"env_vars": worker_env}, **quiet)
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.update(worker_env)
    ray.init(
        address="local",
        num_cpus=max(2, os.cpu_count() or 2),
        include_dashboard=False,
        object_store_memory=LOCAL_OBJECT_STORE_BYTES,
        **quiet,
    )


@contextlib.contextmanager
def disconnecting() -> Iterator[None]:
    """Leave Ray at the end of the block; a local Ray that `connect` started ends with it."""
    try:
        yield
    finally:
        if ray.is_initialized():
            ray.shutdown()
