import asyncio
import contextlib
import socket
import sys
import time
from types import SimpleNamespace

import prometheus_client
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from gradientspace_ray.engine.rounds import EngineStatistics
from gradientspace_ray.serving import metrics
from gradientspace_ray.serving.exposition import exposition, gather, merge
from gradientspace_ray.serving.metrics import COUNTERS, GAUGES, HISTOGRAMS, EngineMetrics, IngressMetrics

# Metrics of Serve that the dashboard shows, and the labels that it uses.
RAYS_OWN = {
    "ray_serve_deployment_replica_healthy": ("application", "deployment", "replica"),
    "ray_serve_replica_processing_queries": ("application", "deployment"),
    "ray_serve_deployment_queued_queries": ("application", "deployment"),
    "ray_serve_autoscaling_target_replicas": ("application", "deployment"),
}


class Recorded:
    """Ray's metrics as Prometheus' own client keeps them, which refuses a label that was not declared."""

    def __init__(self):
        self.registry = prometheus_client.CollectorRegistry()

    def Counter(self, name, description, labels):
        return self._made(prometheus_client.Counter(name, description, labels, registry=self.registry))

    def Gauge(self, name, description, labels):
        return self._made(prometheus_client.Gauge(name, description, labels, registry=self.registry))

    def Histogram(self, name, description, boundaries, labels):
        histogram = prometheus_client.Histogram(name, description, labels, buckets=boundaries, registry=self.registry)
        return self._made(histogram)

    def _made(self, metric):
        def series(tags):
            return metric.labels(**(tags or {})) if tags or metric._labelnames else metric

        return SimpleNamespace(
            inc=lambda value=1, tags=None: series(tags).inc(value),
            set=lambda value, tags=None: series(tags).set(value),
            observe=lambda value, tags=None: series(tags).observe(value),
        )

    def __call__(self, name, **labels):
        return self.registry.get_sample_value(f"gradientspace_{name}", labels)


@pytest.fixture
def recorded(monkeypatch):
    recorded = Recorded()
    monkeypatch.setattr(metrics, "metrics", recorded)
    return recorded


def test_a_request_by_hand(recorded):
    ingress = IngressMetrics()
    ingress.routed("a@1", "routed", 0.83, 0.004)
    ingress.first_token("a@1", 0.3, 0.15)
    ingress.ended("a@1", "routed", 200, 1.5, prompt_tokens=7, completion_tokens=5, first_token_s=0.3)
    assert recorded("requests_total", expert="a@1", reason="routed", status="200") == 1
    assert recorded("prompt_tokens_total", expert="a@1") == 7
    assert recorded("router_seconds_sum") == 0.004
    assert recorded("router_seconds_bucket", le="0.002") == 0
    assert recorded("router_seconds_bucket", le="0.005") == 1
    assert recorded("router_confidence_bucket", expert="a@1", le="0.8") == 0
    assert recorded("router_confidence_bucket", expert="a@1", le="0.9") == 1
    assert recorded("queue_seconds_sum", expert="a@1") == 0.15
    assert recorded("time_to_first_token_seconds_sum", expert="a@1") == 0.3
    assert recorded("time_per_token_seconds_sum", expert="a@1") == pytest.approx(0.3)  # 1.2 s for 4 further tokens
    assert recorded("request_seconds_sum", expert="a@1") == 1.5
    assert recorded("abstentions_total", reason="low_confidence") is None


def test_choices_are_generated_side_by_side(recorded):
    ingress = IngressMetrics()
    ingress.ended("base", "forced", 200, 2.0, completion_tokens=22, choices=2, first_token_s=1.0)
    assert recorded("time_per_token_seconds_sum", expert="base") == pytest.approx(0.1)  # 10 further tokens each


@pytest.mark.parametrize(
    "answer", [{"completion_tokens": 1, "first_token_s": 0.1}, {}, {"completion_tokens": 0, "first_token_s": 0.1}]
)
def test_an_answer_without_a_second_token_has_no_time_per_token(recorded, answer):
    ingress = IngressMetrics()
    ingress.first_token("base", 0.1, None)
    ingress.ended("base", "forced", 499, 0.2, **answer)
    assert recorded("requests_total", expert="base", reason="forced", status="499") == 1
    assert recorded("time_per_token_seconds_count", expert="base") is None
    assert recorded("queue_seconds_count", expert="base") is None


def test_refusals_abstentions_and_releases(recorded):
    ingress = IngressMetrics()
    ingress.rejected("rate")
    ingress.rejected("rate")
    ingress.routed("generalist@0", "low_confidence", 0.4, 0.002)
    assert recorded("rejected_total", reason="rate") == 2
    assert recorded("abstentions_total", reason="low_confidence") == 1
    ingress.released({"r1": 0.9, "r2": 0.1})
    ingress.released({"r2": 1.0})
    assert recorded("release_info", release="r1") == 0
    assert recorded("release_info", release="r2") == 1


def test_an_engine_by_hand(recorded):
    engine = EngineMetrics()
    engine.export(
        EngineStatistics(
            rows=3, waiting={"a@1": 2, None: 1}, leases={"a@1": 2, "b@2": 0}, loads=2, load_s=0.03,
            cached_tokens=10, prompt_tokens=40, generated_tokens={"a@1": 12, None: 5},
        )
    )  # fmt: skip
    engine.export(
        EngineStatistics(
            rows=0, waiting={"b@2": 1}, leases={"b@2": 1, "c@3": 0}, loads=3, load_s=0.05, evictions=1,
            cached_tokens=30, prompt_tokens=70, generated_tokens={"a@1": 12, "b@2": 1, None: 8},
        )
    )  # fmt: skip
    assert recorded("active_rows") == 0
    assert [recorded("waiting_requests", expert=id) for id in ("a@1", "b@2", "base")] == [0, 1, 0]
    assert [recorded("slot_resident", expert=id) for id in ("a@1", "b@2", "c@3", "base")] == [0, 1, 1, None]
    assert [recorded("slot_users", expert=id) for id in ("a@1", "b@2", "c@3")] == [0, 1, 0]
    assert [recorded("generated_tokens_total", expert=id) for id in ("a@1", "b@2", "base")] == [12, 1, 8]
    assert (recorded("adapter_loads_total"), recorded("evictions_total")) == (3, 1)
    assert recorded("adapter_load_seconds_total") == pytest.approx(0.05)
    assert recorded("prefix_cache_tokens_total", result="hit") == 30
    assert recorded("prefix_cache_tokens_total", result="computed") == 40


@given(st.lists(st.lists(st.integers(0, 9), max_size=6), max_size=4))
def test_a_counter_is_the_sum_of_the_totals_of_all_lives_of_an_engine(lives):
    recorded = Recorded()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "metrics", recorded)
        engine, expected = EngineMetrics(), 0
        for steps in lives:
            engine.export(EngineStatistics(loads=0))
            for step in range(len(steps)):
                engine.export(EngineStatistics(loads=sum(steps[: step + 1])))
            expected += sum(steps)
    assert recorded("adapter_loads_total") == expected


def test_every_family_is_recorded_by_one_deployment(recorded):
    families = [*COUNTERS, *GAUGES, *HISTOGRAMS]
    IngressMetrics()
    EngineMetrics()  # a family of both would be registered twice, which the client refuses
    names = {family.name for family in recorded.registry.collect()}
    assert names == {f"gradientspace_{name.removesuffix('_total')}" for name in families}
    assert all(name.endswith("_total") == (name in COUNTERS) for name in families)


# --- one text out of many


def series(text):
    """Every series of a valid exposition, with its value."""
    lines = text.splitlines()
    comments = [line.split(" ", 3)[1:3] for line in lines if line.startswith("#")]
    assert len(comments) == len({tuple(comment) for comment in comments}), "HELP and TYPE come once"
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    values = {(sample.name, *sorted(sample.labels.items())): sample.value for sample in samples}
    assert len(values) == len(samples), "a series comes once"
    return values


NODE_A = r"""# HELP ray_gradientspace_requests_total Requests.
# TYPE ray_gradientspace_requests_total counter
ray_gradientspace_requests_total{expert="a@1",node="A"} 2.0
ray_gradientspace_requests_total{expert="q\"uo\\te\n",node="A"} 1.0
# HELP ray_gradientspace_router_seconds Router.
# TYPE ray_gradientspace_router_seconds histogram
ray_gradientspace_router_seconds_bucket{le="0.1",node="A"} 1.0
ray_gradientspace_router_seconds_bucket{le="+Inf",node="A"} 1.0
ray_gradientspace_router_seconds_count{node="A"} 1.0
ray_gradientspace_router_seconds_sum{node="A"} 0.05
# HELP ray_tasks Not of the endpoint.
# TYPE ray_tasks gauge
ray_tasks{State="RUNNING"} 4.0
# HELP ray_vllm_generation_tokens_total vLLM's.
# TYPE ray_vllm_generation_tokens_total counter
ray_vllm_generation_tokens_total{node="A"} 7.0
"""
NODE_B = """# HELP ray_serve_deployment_queued_queries Queued.
# TYPE ray_serve_deployment_queued_queries gauge
ray_serve_deployment_queued_queries{node="B"} 3.0
# HELP ray_gradientspace_requests_total Requests.
# TYPE ray_gradientspace_requests_total counter
ray_gradientspace_requests_total{expert="a@1",node="B"} 5.0
ray_gradientspace_requests_total{expert="a@1",node="A"} 2.0
"""


def test_nodes_are_merged():
    text = merge([NODE_A, None, NODE_B, 'ray_serve_broken{label="'])
    requests = "ray_gradientspace_requests_total"
    assert series(text) == {
        (requests, ("expert", "a@1"), ("node", "A")): 2,
        (requests, ("expert", 'q"uo\\te\n'), ("node", "A")): 1,
        (requests, ("expert", "a@1"), ("node", "B")): 5,
        ("ray_gradientspace_router_seconds_bucket", ("le", "0.1"), ("node", "A")): 1,
        ("ray_gradientspace_router_seconds_bucket", ("le", "+Inf"), ("node", "A")): 1,
        ("ray_gradientspace_router_seconds_count", ("node", "A")): 1,
        ("ray_gradientspace_router_seconds_sum", ("node", "A")): 0.05,
        ("ray_serve_deployment_queued_queries", ("node", "B")): 3,
        ("ray_vllm_generation_tokens_total", ("node", "A")): 7,
        ("gradientspace_metrics_nodes", ("state", "answered")): 2,
        ("gradientspace_metrics_nodes", ("state", "silent")): 2,
    }
    assert f"# TYPE {requests} counter\n" in text
    assert "# TYPE ray_gradientspace_router_seconds histogram\n" in text
    assert merge([text]).count("ray_gradientspace") == text.count("ray_gradientspace")


def test_no_node_is_still_an_exposition():
    assert set(series(merge([])).values()) == {0}


@contextlib.contextmanager
def node(value):
    registry = prometheus_client.CollectorRegistry()
    gauge = prometheus_client.Gauge("ray_serve_x", "X.", ["node"], registry=registry)
    gauge.labels(node=str(value)).set(value)
    server, thread = prometheus_client.start_http_server(0, "127.0.0.1", registry)
    yield f"http://127.0.0.1:{server.server_port}/metrics"
    server.shutdown()
    server.server_close()
    thread.join()


def test_nodes_are_asked_at_once_and_the_silent_ones_left_out(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with socket.create_server(("127.0.0.1", 0)) as hanging, socket.socket() as closed, node(1) as a, node(2) as b:
        closed.bind(("127.0.0.1", 0))
        silent = [f"http://127.0.0.1:{server.getsockname()[1]}/metrics" for server in (hanging, hanging, closed)]

        async def timed():
            asked = time.monotonic()
            text = await gather([silent[0], a, *silent[1:], b, "http://no.such.host.invalid:1/metrics"], 1.0)
            return text, time.monotonic() - asked

        # Within: at its end, `run` waits for the look-up of the host, however slow the name server is.
        text, taken_s = asyncio.run(timed())
        assert taken_s < 1.9, "two that hang take no longer than one"
    assert series(text) == {
        ("ray_serve_x", ("node", "1")): 1,
        ("ray_serve_x", ("node", "2")): 2,
        ("gradientspace_metrics_nodes", ("state", "answered")): 2,
        ("gradientspace_metrics_nodes", ("state", "silent")): 4,
    }


# --- through Ray


@pytest.mark.ray
@pytest.mark.slow
def test_a_deployment_s_metrics_come_out_of_ray_s_agents(ray_cluster):
    from ray import cloudpickle, serve

    # Workers do not find the tests' modules.
    cloudpickle.register_pickle_by_value(sys.modules[__name__])

    @serve.deployment(num_replicas=2, ray_actor_options={"num_cpus": 0.1})
    class Recording:
        def __init__(self):
            self.ingress, self.engine = IngressMetrics(), EngineMetrics()

        async def record(self):
            self.ingress.rejected("auth")
            self.ingress.routed("a@1", "low_confidence", 0.42, 0.004)
            self.ingress.first_token("a@1", 0.3, 0.15)
            self.ingress.ended("a@1", "routed", 200, 1.5, prompt_tokens=7, completion_tokens=5, first_token_s=0.3)
            self.ingress.released({"r1": 1.0})
            self.engine.export(
                EngineStatistics(
                    rows=1,
                    waiting={"a@1": 2},
                    leases={"a@1": 2},
                    loads=3,
                    load_s=0.5,
                    evictions=4,
                    cached_tokens=10,
                    prompt_tokens=30,
                    generated_tokens={"a@1": 12, None: 5},
                )
            )
            self.ingress.rejected("overload")  # the last that is recorded

        async def exposition(self):
            return await exposition()

    serve.start(proxy_location="Disabled")
    try:
        handle = serve.run(Recording.bind(), name="metrics", route_prefix=None)
        for _ in range(8):
            handle.record.remote().result()
        deadline = time.monotonic() + 60
        found, told = {}, {}
        # Ray's own come when it next reports, which may be later.
        while found.get("rejected_total", {}).get((("reason", "overload"),)) != 8 or not told.keys() >= {*RAYS_OWN}:
            assert time.monotonic() < deadline, (found, {*RAYS_OWN} - {*told})
            time.sleep(1)
            text = handle.exposition.remote().result()
            found = summed(text)
            told = {name: {key for key, _ in labels} for name, *labels in series(text)}
    finally:
        serve.shutdown()
    assert found.keys() >= {*COUNTERS, *GAUGES}
    assert found["requests_total"] == {(("expert", "a@1"), ("reason", "routed"), ("status", "200")): 8}
    assert found["rejected_total"] == {(("reason", "auth"),): 8, (("reason", "overload"),): 8}
    assert found["prompt_tokens_total"] == {(("expert", "a@1"),): 56}
    assert found["abstentions_total"] == {(("reason", "low_confidence"),): 8}
    replicas = found["slot_users"][("expert", "a@1"),] / 2  # of the two, those that were asked
    assert replicas in (1, 2)
    assert found["generated_tokens_total"] == {
        (("expert", "a@1"),): 12 * replicas,
        (("expert", "base"),): 5 * replicas,
    }
    assert found["release_info"] == {(("release", "r1"),): replicas}
    assert found["prefix_cache_tokens_total"][("result", "computed"),] == 20 * replicas
    bucket = found["time_to_first_token_seconds_bucket"]
    assert bucket[("expert", "a@1"), ("le", "0.2")] == 0
    assert bucket[("expert", "a@1"), ("le", "0.5")] == 8
    assert {name.removesuffix("_count") for name in found if name.endswith("_count")} == {*HISTOGRAMS}
    for name, labels in RAYS_OWN.items():
        assert {*labels} <= told[name]


def summed(text):
    """Family without prefix -> labels of ours -> value over all replicas of this test's application."""
    found = {}
    for (name, *labels), value in series(text).items():
        # The agents remember the endpoints of other tests, too.
        if name.startswith("ray_gradientspace_") and ("application", "metrics") in labels:
            own = tuple(
                label for label in labels if label[0] in ("expert", "reason", "status", "release", "result", "le")
            )
            assert {"deployment", "replica"} <= {key for key, _ in labels}
            family = found.setdefault(name.removeprefix("ray_gradientspace_"), {})
            family[own] = family.get(own, 0) + value
    return found
