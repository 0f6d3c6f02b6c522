"""The study of experts: which examples its contenders train on, that their budgets are equal, and what it reports."""

import asyncio
import io
import itertools
import json

import pytest
from benchmark_scripts import imported
from hypothesis import given
from hypothesis import strategies as st
from reference_training import adamw, plain_training, random_examples
from rich.console import Console

from gradientspace_ray.examples.rendering import Rendered
from gradientspace_ray.models.loading import add_lora, load_base
from gradientspace_ray.training.schedule import plan_steps

with imported():  # without names they stay: the tests below are made of them
    import expert_study
    import expert_study_data
    from expert_study_contenders import LEARNING_RATES, SETTINGS, Setting, Study
    from expert_study_data import Labelled, Parts, between, by_group, even_counts, read_parts
    from expert_study_desk import Desk
    from expert_study_worker import Clusters, Finetune, Losses, Place, Route, key_of, perform
    from gradient_task import LORA_ALPHA, LORA_RANK, SEED, TaskError

lengths_of_domains = st.dictionaries(
    st.sampled_from("abcd"), st.lists(st.integers(1, 50), max_size=12).map(sorted), min_size=1
)


@given(lengths_of_domains, st.data())
def test_domains_get_about_as_many_tokens_of_their_shortest_examples(lengths, data):
    count = data.draw(st.integers(0, sum(map(len, lengths.values()))))
    counts = even_counts(lengths, count)
    assert sum(counts.values()) == count
    tokens = {domain: sum(lengths[domain][: counts[domain]]) for domain in lengths}
    for one, other in itertools.permutations(lengths, 2):
        if counts[one] and counts[other] < len(lengths[other]):  # before its last example, it had no more than another
            assert tokens[one] - lengths[one][counts[one] - 1] <= tokens[other]


def test_too_few_examples_are_refused():
    with pytest.raises(TaskError, match="there are 3 examples to train on, needed are 4"):
        even_counts({"a": [1, 2], "b": [5]}, 4)


@given(st.integers(1, 60), st.sampled_from(SETTINGS), st.data())
def test_generalist_and_experts_share_out_every_example_once(count, setting, data):
    groups = data.draw(st.lists(st.sampled_from("xyz"), min_size=count, max_size=count))
    generalist = between(count, 0, setting.generalist)
    experts = by_group(between(count, setting.generalist, 1), groups)
    assert sorted([*generalist, *itertools.chain(*experts.values())]) == list(range(count))
    assert all(groups[place] == group for group, places in experts.items() for place in places)
    assert set(experts) == set(groups)


class Words:
    """A tokenizer stand-in: a token for each word of the answer, and one for the prompt."""

    def example(self, messages):
        words = messages[-1]["content"].split()
        return Rendered("", [1, *range(2, len(words) + 2)], [-100, *range(2, len(words) + 2)])


def write(folder, name, domain, lengths):
    rows = [
        {"messages": [{"role": "user", "content": f"{name} {n}"}, {"role": "assistant", "content": "w " * n}]}
        | ({"domain": domain} if domain else {})
        for n in lengths
    ]
    (folder / name).write_text("\n".join(map(json.dumps, rows)) + "\nno JSON\n")


@pytest.fixture
def words(monkeypatch):
    monkeypatch.setattr(expert_study_data, "load_tokenizer", lambda name: name)
    monkeypatch.setattr(expert_study_data, "Renderer", lambda tokenizer: Words())


@pytest.mark.usefixtures("words")
def test_parts_are_the_shortest_of_each_domain_and_disjoint(tmp_path):
    write(tmp_path, "a.train.jsonl", "sums", range(1, 30))
    write(tmp_path, "b.train.jsonl", None, range(2, 40, 2))
    write(tmp_path, "a.test.jsonl", "sums", range(30, 20, -1))
    write(tmp_path, "b.test.jsonl", None, range(3, 9))
    parts = read_parts(str(tmp_path), "model", examples=9, validation=3, held_out=4)
    assert parts.domains == ["b", "sums"]
    assert [(row.domain, row.tokens - 1) for row in parts.held_out] == [
        *(("b", n) for n in (3, 4, 5, 6)),
        *(("sums", n) for n in (21, 22, 23, 24)),
    ]
    used = parts.training + parts.validation
    assert len(parts.training) == 9
    assert len({row.prompt for row in used}) == len(used) == 15
    for domain, shortest in (("sums", range(1, 30)), ("b", range(2, 40, 2))):
        assert sum(row.domain == domain for row in parts.validation) == 3
        lengths = sorted(row.tokens - 1 for row in used if row.domain == domain)
        assert lengths == list(shortest)[: len(lengths)]
    assert parts == read_parts(str(tmp_path), "model", examples=9, validation=3, held_out=4)


@pytest.mark.usefixtures("words")
def test_without_test_files_a_fifth_is_held_out(tmp_path):
    write(tmp_path, "a.jsonl", None, range(1, 51))
    parts = read_parts(str(tmp_path), "model", examples=35, validation=5, held_out=10)
    prompts = [row.prompt for part in parts for row in part]
    assert len(set(prompts)) == len(prompts) == 50
    with pytest.raises(TaskError, match="10 held-out rows of a, needed are 11"):
        read_parts(str(tmp_path), "model", examples=1, validation=1, held_out=11)


def labelled(number, domain):
    return Labelled(([number] * (1 + number % 5), [-100] + [number] * (number % 5)), domain, f"{domain} {number}")


PARTS = Parts(
    [labelled(number, "ab"[number % 3 == 0]) for number in range(40)],
    [labelled(100 + number, "ab"[number >= 2]) for number in range(4)],
    [labelled(200 + number, "ab"[number >= 3]) for number in range(6)],
)


class Clerk(Desk):
    """Answers at once: the loss under an adapter is how far from the best its learning rate was.

    The best is so many times the second one that is tried.
    """

    def __init__(self, best=1.0):
        self.best = best
        self.finetunes = {}
        self.asked = []

    def loss(self, finetune):
        if not finetune:
            return 2.0
        batch = finetune.examples_per_step
        return abs(finetune.learning_rate / LEARNING_RATES[batch][1] - self.best) + batch / 100

    async def do(self, urgency, name, task):
        key = key_of(Place("model", "float32", ""), task)
        self.asked.append((urgency, name, task))
        match task:
            case Finetune():
                self.finetunes[key] = task
                tokens = sum(len(ids) for ids, _ in task.examples)
                return key, {"steps": -(-len(task.examples) // task.examples_per_step), "tokens": tokens}
            case Losses():
                return key, {"nll": [self.loss(self.finetunes.get(task.adapter))] * len(task.examples)}
            case Clusters():
                return key, {"labels": [number % 2 for number in range(len(task.examples))], "energy": 0.5}
            case Route():
                return key, {"labels": [number % 2 for number in range(len(task.asked))], "accuracy": None}


@pytest.fixture(scope="module")
def done():
    clerk = Clerk()
    study = Study(PARTS, SETTINGS, clerk, lambda line: None)
    asyncio.run(study.run())
    return study, clerk


def test_every_contender_trains_on_equally_many_tokens(done):
    study, _ = done
    budget = sum(row.tokens for row in PARTS.training)
    judged = {name: one for name, one in study.contenders.items() if not name.startswith(("base", "generalist"))}
    assert len(judged) == 2 + 3 * len(SETTINGS)
    assert {one.tokens for one in judged.values()} == {budget}
    assert {one.losses_N.shape for one in judged.values()} == {(len(PARTS.held_out),)}


def test_the_learning_rate_of_experts_is_the_baselines_best_scaled_to_their_steps(done):
    study, clerk = done
    assert {whose: len(tried) for whose, tried in study.tries.items()} == {
        "single LoRA, 8 a step": 3,
        "single LoRA, 2 a step": 3,
    }
    finetunes = [(name, task) for _, name, task in clerk.asked if isinstance(task, Finetune)]
    chosen = {8: LEARNING_RATES[8][1], 2: LEARNING_RATES[8][1] / 2}
    for name, task in finetunes:
        if name.startswith("expert "):
            assert task.learning_rate == pytest.approx(chosen[task.examples_per_step])
        if name.startswith("generalist"):
            assert task.learning_rate == chosen[8]
        if name.startswith("single"):
            assert task.learning_rate == LEARNING_RATES[task.examples_per_step][1]


@pytest.mark.parametrize(
    ("best", "tried", "chosen"),
    [(10, [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2], 1.6e-2), (0.1, [1e-3, 2e-3, 4e-3, 5e-4, 2.5e-4, 1.25e-4], 2.5e-4)],
)
def test_learning_rates_are_tried_until_the_best_has_worse_on_both_sides(best, tried, chosen):
    setting = Setting(0.5, 8)
    study = Study(PARTS, [setting], Clerk(best), lambda line: None)
    asyncio.run(study.run())
    assert set(study.tries) == {"single LoRA, 8 a step"}
    assert all(list(losses) == [f"{rate:g}" for rate in sorted(tried)] for losses in study.tries.values())
    tuned = ("single LoRA, 8 a step", "generalist 0.5", f"domains: {setting}")
    assert [study.contenders[name].learning_rate for name in tuned] == [chosen] * 3


def test_experts_start_from_the_generalist_and_see_what_it_has_not_seen(done):
    _, clerk = done
    for setting in SETTINGS:
        experts = [
            task
            for _, name, task in clerk.asked
            if name.startswith("expert ") and name.endswith(str(setting)) and isinstance(task, Finetune)
        ]
        assert len(experts) == 4
        for expert in experts:
            assert (expert.start is None) == (not setting.generalist)
            generalist = clerk.finetunes[expert.start] if expert.start else None
            # Together they go along one cosine.
            assert expert.cosine == (generalist.cosine[1] if generalist else 0.0, 1.0)
            seen = generalist.examples if generalist else []
            assert not any(example in seen for example in expert.examples)


def test_the_report_is_json_and_is_shown_in_order(done):
    study, _ = done
    report = {"data": "d", "model": "m", "dtype": "float32", **expert_study.report(study)}
    report = json.loads(json.dumps(report))
    assert list(report["contenders"]) == [
        "base",
        "generalist 0.25",
        "generalist 0.5",
        "generalist 0.75",
        "single LoRA, 2 a step",
        "single LoRA, 8 a step",
        *(f"{kind}: {one}" for one in SETTINGS for kind in ("domains", "clusters, routed", "clusters, oracle")),
    ]
    assert report["baseline"] == "single LoRA, 2 a step"
    base = report["contenders"]["base"]
    assert base["losses"] == {"a": 2.0, "b": 2.0, "mean": 2.0}
    assert base["difference"]["mean"] == pytest.approx(2 - 0.02)
    console = Console(width=200, record=True, file=io.StringIO())
    expert_study.show_study(report, console)
    assert "fresh adapters, experts 1, 2 a step" in console.export_text()


def test_a_finetune_continues_another_as_one_plain_loop_does(tiny_model_dir, tmp_path):
    place = Place(str(tiny_model_dir), "float32", str(tmp_path))
    examples = random_examples(10)
    first = Finetune(None, examples[:6], 3, 2e-2, (0.0, 0.5))
    second = Finetune(key_of(place, first), examples[6:], 2, 1e-2, (0.5, 1.0))
    made = [perform(place, key_of(place, task), task) for task in (first, second)]
    model = add_lora(load_base(str(tiny_model_dir)), LORA_RANK, LORA_ALPHA, "all-linear", SEED)
    model.set_attn_implementation("eager")
    optimizer = adamw(model)
    for task, rise, answer in zip((first, second), (0.1, 0.0), made, strict=True):
        steps = plan_steps(len(task.examples), task.examples_per_step, 1, SEED)
        schedule = {"peak": task.learning_rate, "warmup_share": rise, "cosine": task.cosine}
        losses = plain_training(model, task.examples, steps, **schedule, optimizer=optimizer)
        assert answer["losses"] == pytest.approx(losses, abs=1e-4)


def test_a_task_is_known_by_all_that_decides_it():
    place = Place("model", "float32", "cache")
    one = Finetune(None, [PARTS.training[1].example], 8, 1e-3)
    keys = {key_of(place, one), key_of(Place("model", "bfloat16", "cache"), one)}
    keys |= {key_of(place, one._replace(start="x")), key_of(place, one._replace(learning_rate=2e-3))}
    keys |= {key_of(place, Losses(None, one.examples)), key_of(place, Clusters("x", one.examples))}
    keys.add(key_of(place, one._replace(cosine=(0.0, 0.5))))
    assert len(keys) == 7
    assert key_of(place, one) == key_of(Place("model", "float32", "elsewhere"), Finetune(*one))


def test_settings_say_what_they_are():
    assert str(Setting(0.25, 2)) == "generalist 0.25, experts 0.75, 2 a step"
    assert all(setting.examples_per_step in LEARNING_RATES for setting in SETTINGS)
