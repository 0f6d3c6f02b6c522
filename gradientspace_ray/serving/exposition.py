"""`/metrics`: what the Ray cluster's metrics agents hold about the endpoint, as one text for Prometheus.

Every node has an agent, which collects from the processes there every `metrics_report_interval_ms` (10 s by default).
"""

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import httpx
import ray
from prometheus_client import Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
TIMEOUT_S = 2.0
FAMILIES = ("ray_gradientspace_", "ray_serve_", "ray_vllm_")
NODES = "gradientspace_metrics_nodes"


async def exposition(timeout_s: float = TIMEOUT_S) -> str:
    """The endpoint's metrics, Serve's and vLLM's, from all nodes of the Ray cluster that this process is connected to.

    A node that does not answer is left out, and counted in `gradientspace_metrics_nodes{state="silent"}`.

    Args:
        timeout_s: limit for each node; all are asked at once.
    """
    addresses = await asyncio.to_thread(agent_addresses)
    return await gather(addresses, timeout_s)


async def gather(addresses: Sequence[str], timeout_s: float) -> str:
    """`exposition` of the agents at these URLs."""
    # Agents speak plain HTTP inside the cluster: no certificates to load, and a proxy would not find them.
    async with httpx.AsyncClient(verify=False, trust_env=False) as client:
        texts = await asyncio.gather(*(_fetch(client, address, timeout_s) for address in addresses))
    return await asyncio.to_thread(merge, texts)


def agent_addresses() -> list[str]:
    """URLs of the metrics agents of the nodes that are alive."""
    return [
        str(httpx.URL(scheme="http", host=node["NodeManagerAddress"], port=node["MetricsExportPort"], path="/metrics"))
        for node in ray.nodes()
        if node["Alive"] and node["MetricsExportPort"] > 0
    ]


def merge(texts: Iterable[str | None]) -> str:
    """One exposition out of several; each family has its HELP and TYPE once, each series its first value.

    Args:
        texts: in Prometheus' text format; None, or what is not in that format, is a node that does not answer.
    """
    merged: dict[str, Metric] = {}
    seen: set[tuple[str, frozenset[tuple[str, str]]]] = set()
    states = {"answered": 0, "silent": 0}
    for text in texts:
        families = _parse(text)
        states["silent" if families is None else "answered"] += 1
        for family in families or ():
            target = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                series = (sample.name, frozenset(sample.labels.items()))
                if series not in seen:
                    seen.add(series)
                    target.samples.append(sample)
    nodes = Metric(NODES, "Nodes of the Ray cluster, by whether their metrics agent answered.", "gauge")
    for state, count in states.items():
        nodes.add_sample(NODES, {"state": state}, count)
    return generate_latest(_Collected([*(merged[name] for name in sorted(merged)), nodes])).decode()


@dataclass(frozen=True)
class _Collected(Collector):
    """Families as the writer of the text format takes them."""

    families: list[Metric]

    def collect(self) -> Iterator[Metric]:
        return iter(self.families)


async def _fetch(client: httpx.AsyncClient, address: str, timeout_s: float) -> str | None:
    try:
        response = await asyncio.wait_for(client.get(address, timeout=None), timeout_s)
    except (httpx.HTTPError, asyncio.TimeoutError):
        return None
    return response.text if response.is_success else None


def _parse(text: str | None) -> list[Metric] | None:
    """The families of interest: an agent tells about all of Ray, and reading that takes most of a second."""
    if text is None:
        return None
    comments = tuple(f"# {kind} {family}" for kind in ("HELP", "TYPE") for family in FAMILIES)
    lines = [line for line in text.split("\n") if line.startswith((*FAMILIES, *comments))]
    try:
        return list(text_string_to_metric_families("\n".join([*lines, ""])))
    except ValueError:
        return None
