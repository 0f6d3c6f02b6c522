"""The serving benchmark: its numbers mean what they say, and its contenders do what their names say."""

import asyncio
import io
import json
import math
import statistics
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import pairwise

import psutil
import pytest
import torch
from benchmark_scripts import imported
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from gradientspace_ray.engine.adapters import read_adapter
from gradientspace_ray.models.loading import ModelError, load_adapter, load_base

MODULES = ("serving", "serving_report", "serving_workloads", "serving_endpoint", "serving_setup", "serving_peers")
MODULES += ("serving_engines", "serving_load", "serving_process", "gradients", "gradient_methods", "gradient_task")
MODULES += ("sketch_methods",)


@pytest.fixture(scope="module")
def modules():
    with imported(*MODULES) as found:
        yield found


@pytest.fixture(scope="module")
def load(modules):
    return modules["serving_load"]


@pytest.fixture(scope="module")
def setup(modules, tiny_model_dir, tmp_path_factory):
    scratch = tmp_path_factory.mktemp("serving-benchmark")
    return modules["serving_engines"].Setup(
        name=str(tiny_model_dir),
        folders=modules["serving_setup"].write_adapters(load_base(str(tiny_model_dir)), scratch / "adapters", 4),
        rows=3,
        slots=2,
        ensemble=3,
        threads=1,
        scratch=scratch,
        longest=80,
    )


def requests_of(load, *, lengths=(5, 9, 7, 4), tokens=(3, 6), experts=None):
    prompts = [load.Prompt([], tuple(range(7, 7 + length))) for length in lengths]
    return load.made_requests(prompts, experts or [*range(len(lengths))], tokens, None, 0)


def trace_of(load, times, counts=None, due=0.0):
    request = load.Request(0, load.Prompt([], (1,)), len(times), 0, due)
    return load.Trace(request, due, list(zip(times, counts or range(1, len(times) + 1), strict=True)))


def test_experts_are_asked_for_as_the_workload_says(load):
    count = 20000
    assert load.drawn_experts("round_robin", 3, 7, seed=0) == [0, 1, 2, 0, 1, 2, 0]
    assert load.drawn_experts("more_experts_than_slots", 24, 48, seed=0) == [*range(24), *range(24)]
    for workload, weights in (("uniform", [1, 1, 1, 1]), ("zipf", [1, 1 / 2, 1 / 3, 1 / 4])):
        drawn = load.drawn_experts(workload, 4, count, seed=1)
        assert drawn == load.drawn_experts(workload, 4, count, seed=1)
        shares = [Counter(drawn)[expert] / count for expert in range(4)]
        assert shares == pytest.approx([weight / sum(weights) for weight in weights], abs=0.015)


@given(st.integers(0, 2**20), st.integers(1, 30))
def test_only_the_experts_differ_between_workloads(load, seed, count):
    prompts = [load.Prompt([], (number,)) for number in range(count)]
    made = [load.made_requests(prompts, [expert] * count, (2, 5), 3.0, seed) for expert in (0, 1)]
    assert {request.expert for request in made[1]} == {1}
    for one, other in zip(*made, strict=True):
        assert (one.number, one.prompt, one.max_tokens, one.due_s) == (
            *(other.number, other.prompt, other.max_tokens, other.due_s),
        )
        assert 2 <= one.max_tokens <= 5
    assert made[0][0].due_s == 0
    assert all(request.due_s == 0 for request in load.made_requests(prompts, [0] * count, (2, 5), None, seed))


def test_arrivals_are_a_poisson_process(load):
    prompts = [load.Prompt([], (0,))] * 20000
    dues = [request.due_s for request in load.made_requests(prompts, [0] * 20000, (2, 2), 4.0, 0)]
    gaps = [end - start for start, end in pairwise(dues)]
    # Exponential: mean and deviation are 1 / rate, and a share of 1 / e is longer than that.
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.03)
    assert sum(gap > 0.25 for gap in gaps) / len(gaps) == pytest.approx(1 / math.e, abs=0.01)


@given(
    st.integers(1, 6),
    st.integers(2, 12),
    st.floats(0.01, 1.0),
    st.lists(st.floats(0, 0.4), min_size=6, max_size=6),
)
def test_rows_in_step_decode_as_many_tokens_as_rows_each_step(load, rows, tokens, step_s, shifts):
    """Also where the rows' tokens are written down a little after one another."""
    traces = [
        trace_of(load, [(number + shift) * step_s for number in range(tokens)]) for shift in sorted(shifts)[:rows]
    ]
    rate = load.decode_rate(traces, rows)
    assert rate.at_once == rows
    assert rate.tokens_per_second == pytest.approx(rows / step_s)


def test_only_times_with_a_full_batch_count(load):
    # Alone for four tokens a second, then with another in steps of half a second.
    long = trace_of(load, [0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5])
    short = trace_of(load, [1.0, 1.5, 2.0])
    rate = load.decode_rate([long, short], 2)
    assert (rate.tokens_per_second, rate.at_once, rate.seconds) == pytest.approx((4.0, 2, 1.0))
    # There are never three at once: two are the most there are.
    assert load.decode_rate([long, short], 3) == rate
    assert load.decode_rate([long, short], 1).tokens_per_second == pytest.approx(9 / 2.5)
    assert load.decode_rate([trace_of(load, [1.0]), trace_of(load, [])], 2).tokens_per_second == 0


def test_several_tokens_at_once_count_as_many(load):
    trace = trace_of(load, [1.0, 2.0, 2.0, 4.0], [1, 3, 4, 8], due=0.5)
    assert load.decode_rate([trace], 1).tokens_per_second == pytest.approx((2 + 4) / 3, rel=0.2)
    found = load.summary([[trace]], [trace], 1)
    assert found["ttft_p50_ms"] == 500
    assert found["itl_p50_ms"] == 500
    assert found["burst_tokens_per_second"] == pytest.approx(8 / 3.5, abs=1e-3)
    assert load.summary([[]], [], 1)["ttft_p99_ms"] is None


def test_the_load_is_open_and_what_fails_is_told(load):
    prompts = [load.Prompt([], (0,))] * 4
    requests = load.made_requests(prompts, [0, 1, 2, 3], (3, 3), None, 0)

    async def answer(request):
        await asyncio.sleep(0.1)
        yield 1
        if request.expert == 1:
            raise ValueError("a first line\nand more")
        if request.expert == 2:
            await asyncio.sleep(60)
        yield 2
        if request.expert != 3:
            yield 3

    started = time.perf_counter()
    traces = asyncio.run(load.play(requests, answer, limit_s=1.0))
    assert time.perf_counter() - started < 5
    assert [trace.error for trace in traces] == [
        None,
        "ValueError: a first line",
        "1 of 3 tokens within 1 s",
        "ended after 2 of 3 tokens",
    ]
    # Nobody waited for another, and times count from when a request was due.
    assert all(0.1 <= trace.ttft_s < 0.6 for trace in traces)
    found = load.summary([traces], traces, 2)
    assert (found["errors"], found["requests"]) == (6, 8)


def test_lateness_of_the_sender_counts(load):
    request = load.Request(0, load.Prompt([], (0,)), 1, 0, 0.0)

    async def answer(request):
        time.sleep(0.2)  # the whole event loop is late
        yield 1

    traces = asyncio.run(load.play([request, request], answer, limit_s=5))
    assert max(trace.ttft_s for trace in traces) >= 0.4


def in_process(modules):
    engines = modules["serving_engines"]
    return {
        "engine": engines.engine,
        "transformers_generate": engines.transformers_generate,
        "peft_mixed": engines.peft_mixed,
        "ensemble": engines.ensemble,
        "transformers_continuous_batching": engines.continuous_batching,
    }


@pytest.mark.parametrize(
    "name", ["engine", "transformers_generate", "peft_mixed", "ensemble", "transformers_continuous_batching"]
)
def test_every_contender_answers_with_as_many_tokens_as_asked(modules, load, setup, name):
    requests = requests_of(load)

    async def run():
        async with in_process(modules)[name](setup) as answer:
            return await load.play(requests, answer, limit_s=60)

    for trace in asyncio.run(run()):
        assert trace.error is None
        counts = [count for _, count in trace.events]
        assert counts == sorted(counts)
        assert counts[-1] == trace.request.max_tokens


@pytest.mark.slow
def test_a_contender_s_process_that_dies_or_cannot_begin_is_told(modules, load, setup):
    begin = partial(modules["serving_process"].ContenderProcess, "engine", modules["serving_engines"].engine)
    with pytest.raises(ModelError, match="nowhere"), begin(replace(setup, name="nowhere")):
        pass
    before = {*psutil.Process().children(recursive=True)}
    with ExitStack() as stack:
        contender = stack.enter_context(begin(setup))
        (trace,) = contender.play(requests_of(load, lengths=[3]), 60)
        assert trace.error is None
        for child in {*psutil.Process().children(recursive=True)} - before:
            if "spawn_main" in " ".join(child.cmdline()):
                child.kill()
        died = partial(pytest.raises, modules["sketch_methods"].MethodError, match="engine: its process ended")
        with died():
            contender.play(requests_of(load), 60)
        with died():
            stack.close()


def test_static_batches_are_full_and_run_to_their_longest_answer(modules, load):
    batches = []

    def generate(requests, step):
        batches.append([request.number for request in requests])
        for count in range(1, max(request.max_tokens for request in requests) + 1):
            step(count)

    async def run(requests):
        async with modules["serving_engines"].static_batches(generate, 3) as answer:
            return await load.play(requests, answer, limit_s=10)

    traces = asyncio.run(run(requests_of(load, lengths=[4] * 7)))
    assert batches == [[0, 1, 2], [3, 4, 5], [6]]
    assert all(trace.error is None for trace in traces)


def test_a_failed_or_abandoned_batch_is_told_and_the_next_one_runs(modules, load):
    steps = []

    def generate(requests, step):
        if requests[0].number == 0:
            raise ValueError("no memory")
        for count in range(1, 200):
            steps.append(count)
            time.sleep(0.01)
            step(count)

    async def run():
        async with modules["serving_engines"].static_batches(generate, 1) as answer:
            return await load.play(requests_of(load, lengths=[4, 4, 4], tokens=(190, 190)), answer, limit_s=0.3)

    traces = asyncio.run(run())
    assert traces[0].error == "AnswerError: no memory"
    assert [trace.error.endswith("of 190 tokens within 0.3 s") for trace in traces[1:]] == [True, True]
    # The second batch ended soon after nobody wanted it; the third never began.
    assert len(steps) < 150
    assert steps == [*range(1, len(steps) + 1)]


def test_the_ensemble_is_the_weighted_mean_of_its_experts(modules, load, setup):
    """Against one expert after the other in PEFT, the whole text again for each token, no padding, no cache."""
    engines = modules["serving_engines"]
    requests = requests_of(load, tokens=(6, 6))
    found = engines.mixed_generation(engines.ensemble_model(setup), setup.ensemble, requests, lambda count: None)
    model = engines.copy_of(setup.model, "sdpa")
    for number, folder in enumerate(setup.folders[: setup.ensemble]):
        model = load_adapter(model, folder, f"expert{number}")
    alone = []
    for request in requests:
        weights = engines.router_weights(request, setup.ensemble)
        assert weights.sum() == pytest.approx(1)
        text = list(request.prompt.ids)
        for _ in range(6):
            mixed_V = torch.zeros(())
            for number, weight in enumerate(weights):
                model.set_adapter(f"expert{number}")
                with torch.no_grad():
                    mixed_V = mixed_V + weight * model(torch.tensor([text])).logits[0, -1].softmax(-1)
            text.append(int(mixed_V.argmax()))
        alone.append(text[len(request.prompt.ids) :])
    assert found.tolist() == alone
    assert len({tuple(answer) for answer in alone}) > 1


def test_contenders_share_the_weights_and_leave_the_model_as_it_was(modules, setup):
    engines = modules["serving_engines"]
    before = {name: type(module) for name, module in setup.model.named_modules()}
    copied = engines.ensemble_model(setup)
    assert {name: type(module) for name, module in setup.model.named_modules()} == before
    pointers = {weight.data_ptr() for weight in setup.model.parameters()}
    assert {weight.data_ptr() for weight in copied.parameters()} == pointers
    assert setup.model.generation_config.eos_token_id is not None


def test_random_experts_differ_from_the_base_and_from_each_other(setup):
    experts = [read_adapter(folder) for folder in setup.folders]
    for name, (a_RI, b_OR) in experts[0].items():
        assert b_OR.abs().sum() > 0
        assert all(not torch.equal(a_RI, expert[name][0]) for expert in experts[1:])
        assert all(not torch.equal(b_OR, expert[name][1]) for expert in experts[1:])


def test_slot_loads_are_loads(modules, setup):
    found = modules["serving_workloads"].slot_loads(setup, 3)
    assert list(found) == ["memory", "file"]
    for times in found.values():
        # Four adapters in turn on two slots: each time another one has to go.
        assert times["loads"] == 3 * len(setup.folders)
        assert 0 < times["p50"] <= times["p99"] <= times["max"]


def test_ratios_are_taken_within_a_round(modules, load, setup):
    workloads = modules["serving_workloads"]

    def lockstep(step_s, rows):
        return [trace_of(load, [number * step_s for number in range(9)]) for _ in range(rows)]

    bursts = [
        {
            ("engine", "zipf"): lockstep(own_s, 3),
            ("base_only", "zipf"): lockstep(base_s, 3),
            ("ensemble", "all"): lockstep(ensemble_s, 1),
            ("ensemble_wide", "all"): lockstep(ensemble_s, 3),
        }
        for own_s, base_s, ensemble_s in ((0.1, 0.09, 0.1), (1.0, 0.5, 1.0), (0.2, 0.18, 0.4))
    ]
    found = {row["what"]: row for row in workloads.ratios(setup, "zipf", bursts)}
    assert set(found) == {f"engine / {other}, zipf" for other in ("base_only", "ensemble", "ensemble_wide")}
    assert found["engine / base_only, zipf"] == {
        "what": "engine / base_only, zipf",
        "value": 0.9,
        "bar": ">= 0.85",
        "ok": True,
    }
    assert found["engine / ensemble, zipf"]["value"] == 3
    assert found["engine / ensemble, zipf"]["ok"]
    wide = found["engine / ensemble_wide, zipf"]
    assert (wide["value"], wide["bar"], wide["ok"]) == (1, None, None)
    text = io.StringIO()
    report = {"model": "m", "dtype": "d", "machine": {"threads": 1}, "ratios": [*found.values()]}
    modules["serving_report"].show(report, Console(file=text, width=160))
    assert text.getvalue().count("for reference") == 1
    failed = [{("engine", "zipf"): [], ("base_only", "zipf"): lockstep(1, 3)}]
    assert workloads.ratios(setup, "zipf", failed) == []


def test_routed_requests_are_compared_with_the_router_and_the_base(modules):
    endpoint = modules["serving_endpoint"]
    pairs = [
        [endpoint.Reply("auto", routed, router, "a"), endpoint.Reply("base", base, 0.0, "base")]
        for routed, router, base in ((130, 10, 100), (120, 20, 90), (500, 15, 100))
    ]
    found = endpoint.compared(pairs)
    assert (found["routed_ttft_p50_ms"], found["router_p50_ms"], found["base_ttft_p50_ms"]) == (130, 15, 100)
    assert found["allowed_ms"] == pytest.approx(15 + 1.1 * 100)
    assert found["routed_to_allowed"] == pytest.approx(130 / 125)
    assert [endpoint.in_turn(number)[0] for number in range(3)] == ["base", "auto", "base"]


def test_options_that_cannot_be_are_refused(modules, capsys):
    parse = modules["serving"].parse
    assert parse(["--experts", "4"]).ensemble == 4
    quick = parse(["--quick", "--rounds", "2"])
    assert (quick.rounds, quick.workloads) == (2, ["round_robin", "more_experts_than_slots"])
    for words, message in (
        (["--experts", "9"], "--experts 9: no more than --slots 8"),
        (["--tokens", "9-4"], "give A-B"),
        (["--contenders", "magic"], "no magic; there are base_only, engine"),
        (["--ensemble", "25"], "there are 24 experts"),
    ):
        with pytest.raises(SystemExit):
            parse(words)
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_small_run_has_every_number(modules, tiny_model_dir, tmp_path):
    path = tmp_path / "made" / "serving.json"
    options = {"model": tiny_model_dir, "parts": "load,slots", "contenders": "engine,base_only,peft_mixed,ensemble"}
    options |= {"experts": 3, "many-experts": 5, "slots": 3, "rows": 3, "burst": 4, "requests": 5, "tokens": "3-5"}
    options |= {"rounds": 1, "rate": 50, "threads": 1, "json": path, "scratch": tmp_path}
    modules["serving"].main([word for name, value in options.items() for word in (f"--{name}", str(value))])
    report = json.loads(path.read_text())
    assert {"machine", "versions", "model", "settings", "rate_per_second", "skipped"} < set(report)
    assert list(report["workloads"]) == ["uniform", "zipf", "round_robin", "more_experts_than_slots"]
    numbers = {"decode_tokens_per_second", "ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms"}
    for contenders in report["workloads"].values():
        assert set(contenders) == {"engine", "base_only", "peft_mixed", "ensemble"}
        for name, found in contenders.items():
            assert found["errors"] == 0
            assert found["requests"] == (2 if name == "ensemble" else 9)
            assert min(found[number] for number in numbers) > 0
    assert len(report["ratios"]) == 4 * 3 + 1 + 4
    text = io.StringIO()
    modules["serving_report"].show(report, Console(file=text, width=160))
    assert "more_experts_than_slots" in text.getvalue()
    assert "slot load from memory" in text.getvalue()
