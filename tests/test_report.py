import re
from typing import get_args
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors
from synthetic_run import synthetic_recipe, synthetic_run

from gradientspace_ray.clusters.methods import Method
from gradientspace_ray.recipe import ClusterMethod
from gradientspace_ray.report import clusters, figures
from gradientspace_ray.report.figures import Cell, Range
from gradientspace_ray.report.page import ClusterCard, Headline, Legend, Map, Page, Section, Typical, render
from gradientspace_ray.report.projection import project
from gradientspace_ray.run import RunDirectory
from gradientspace_ray.stages import report

EVIL = "</svg><script>alert('1')</script>&\"'"
SVG = "{http://www.w3.org/2000/svg}"
values = st.floats(-1e3, 1e3, allow_nan=False)


def parsed(svg):
    """The figure as XML; every number in it finite."""
    assert not re.search(r"\b(nan|inf)\b", svg)
    return ElementTree.fromstring(svg)


def tips(tree):
    return [node.get("data-tip") for node in tree.iter() if node.get("data-tip")]


@given(st.lists(st.tuples(values, st.floats(0, 50), st.floats(0, 50)), min_size=1, max_size=8), st.booleans())
def test_ranges_keep_their_order_on_the_axis(rows, zero):
    ranges = [Range(f"row {i}", mean, mean - low, mean + high) for i, (mean, low, high) in enumerate(rows)]
    tree = parsed(figures.ranges(ranges, "nats", zero))
    places = [float(circle.get("cx")) for circle in tree.iter(f"{SVG}circle")]
    order = np.argsort([row.mean for row in ranges], kind="stable")
    assert np.all(np.diff(np.array(places)[order]) >= 0)
    assert all(0 <= place <= figures.WIDTH for place in places)


@pytest.mark.parametrize(
    "row",
    [(0.0, -5e-324, 0.0), (0.0, 0.0, 0.0), (2.0, 2.0, 2.0 + 1e-15), (1e20, 1e20, 1e20 + 1e5), (1e-200, 0, 2e-200)],
)
@pytest.mark.parametrize("zero", [False, True])
def test_a_range_without_width_is_drawn(row, zero):
    tree = parsed(figures.ranges([Range("a", *row)], "x", zero))
    assert all(0 <= float(circle.get("cx")) <= figures.WIDTH for circle in tree.iter(f"{SVG}circle"))


@pytest.mark.parametrize("value", [0.0, 5e-324, 2e-162, 1e-80])
def test_a_spectrum_without_energy_is_drawn(value):
    assert tips(parsed(figures.spectrum([value], 1.0)))[0] == "direction 1: 0.00% of the energy"


@given(st.lists(st.floats(0, 100), min_size=1, max_size=40), st.floats(0, 1000))
def test_the_spectrum_shows_the_shares_and_their_sum(singular_values, rest):
    total = float(np.square(singular_values).sum() + rest)
    tree = parsed(figures.spectrum(singular_values, total))
    shown = tips(tree)
    assert len(shown) == 2 * len(singular_values)
    captured = np.square(singular_values).sum() / total if total else 0
    what, _, share = shown[-1].partition(": ")
    assert what == f"first {len(singular_values)} directions"
    assert float(share.removesuffix("% of the energy")) == pytest.approx(100 * captured, abs=0.0051)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), max_size=60), st.floats(0, 1))
def test_the_histogram_counts_every_prompt(confidences, threshold):
    tree = parsed(figures.histogram(np.array(confidences), threshold))
    assert sum(int(tip.split(": ")[1].split()[0]) for tip in tips(tree)) == len(confidences)


def test_the_map_places_and_colours_each_example():
    points_N2 = np.array([[0, 0], [1, 1], [0.5, 0.5], [0.2, 0.2]])
    tree = parsed(figures.scatter(points_N2, [0, 1, 13, figures.LEFT_OUT], ["a", "b", EVIL, ""], [2, 2, 0, 0]))
    dots = list(tree.iter(f"{SVG}circle"))
    assert [dot.get("style") for dot in dots] == [
        "--a:var(--c0);--b:var(--c2)",
        "--a:var(--c1);--b:var(--c2)",
        "--a:var(--c1);--b:var(--c0)",
        "--a:var(--none);--b:var(--c0)",
    ]
    assert dots[2].get("data-tip") == EVIL
    assert float(dots[0].get("cx")) < float(dots[2].get("cx")) < float(dots[1].get("cx"))


def test_figures_escape_what_comes_from_data():
    for svg in (
        figures.ranges([Range(EVIL, 1, 0, 2)], EVIL),
        figures.matrix([EVIL], [EVIL], [[Cell(EVIL, -1, True, EVIL)]], EVIL),
        figures.bars([(EVIL, 1.0, EVIL)], EVIL),
    ):
        parsed(svg)
        assert "<script" not in svg


def test_a_matrix_fits_its_page_whatever_the_names():
    columns = [f"a-rather-long-expert-name-{index}" for index in range(14)]
    tree = parsed(figures.matrix(["row"], columns, [[Cell("1.234") for _ in columns]], "losses"))
    right = [float(rect.get("x")) + float(rect.get("width")) for rect in tree.iter(f"{SVG}rect")]
    assert max(right) <= figures.WIDTH


def test_bars_of_nothing_are_drawn():
    parsed(figures.bars([("prepare", 0.0, "0 s")], "time"))


def test_the_projection_keeps_neighbours():
    generator = np.random.default_rng(0)
    groups = np.arange(90) % 3
    coordinates = generator.normal(size=(90, 12)) * 0.5 + 4 * np.eye(12)[groups]
    # The length of a gradient says nothing about its direction.
    coordinates *= generator.uniform(0.1, 10, size=(90, 1))
    points = project(coordinates, seed=0)
    assert points.min() == 0
    assert points.max() == 1
    neighbours = NearestNeighbors(n_neighbors=6).fit(points).kneighbors(points, return_distance=False)[:, 1:]
    assert (groups[neighbours] == groups[:, None]).mean() > 0.95
    np.testing.assert_array_equal(points, project(coordinates, seed=0))


@pytest.mark.parametrize("shape", [(0, 4), (1, 4), (2, 4), (5, 1), (30, 1), (21, 2)])
def test_small_runs_are_projected_too(shape):
    points = project(np.random.default_rng(0).normal(size=shape), seed=0)
    assert points.shape == (shape[0], 2)
    assert np.isfinite(points).all()


def test_equal_gradients_are_projected():
    assert np.isfinite(project(np.ones((25, 3)), seed=0)).all()
    assert np.isfinite(project(np.zeros((5, 3)), seed=0)).all()


def test_the_page_escapes_text_and_loads_nothing():
    card = ClusterCard(EVIL, "var(--c0)", 3, 0.5, terms=(EVIL,), note=EVIL, typical=(Typical(EVIL, EVIL),))
    worth = Section("worth", EVIL, EVIL, facts=(Headline(EVIL, EVIL, EVIL),))
    drawn = Map(svg="<svg></svg>", caption=EVIL, clusters=(Legend(EVIL, "var(--c0)", 0),))
    page = Page(EVIL, EVIL, EVIL, clusters=(card,), worth=worth, map=drawn, footer=((EVIL, EVIL),))
    html = render(page)
    assert html.count("<script") == 1
    assert "<svg></svg>" in html
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", html)
    assert "default-src 'none'" in html


def test_a_run_without_results_still_has_a_page(tiny_model_dir, tiny_encoder_dir, tmp_path):
    recipe = synthetic_recipe(tiny_model_dir, tiny_encoder_dir)
    empty = RunDirectory(tmp_path / "empty")
    report.report(recipe, empty)
    assert "Nothing has been clustered yet" in empty.read_bytes("report.html").decode()
    run = synthetic_run(tmp_path / "run", tiny_model_dir, single_lora=False)
    assert "report.html" in report.report(recipe, run).made
    html = run.read_bytes("report.html").decode()
    assert '<section id="map">' in html
    assert '<section id="results">' not in html
    run.delete("clusters/quality.json")
    run.delete("sketch/coordinates.parquet")
    report.report(recipe, run)
    html = run.read_bytes("report.html").decode()
    assert "cluster-1" in html
    assert '<section id="map">' not in html


def test_domains_take_the_colour_of_their_cluster():
    examples = {str(i): {"domain": domain} for i, domain in enumerate(["b", "b", "a", "b", "c"])}
    cluster_of = {"0": 0, "1": 0, "2": 1, "3": 1, "4": 1}
    assert clusters.ordered_domains(examples, cluster_of, 2) == ("b", "a", "c")
    assert clusters.ordered_domains({"0": {"domain": None}}, {"0": 0}, 1) == ()
    # The domain of left-out examples has a colour, but no cluster's.
    assert clusters.ordered_domains(examples, cluster_of | {"0": -1, "1": -1, "3": -1}, 2) == ("b", "a", "c")
    assert clusters.ordered_domains(examples, dict.fromkeys(examples, -1), 2) == ("a", "b", "c")


QUALITY = {
    "count": 2,
    "names": ["expert-a", "expert-b"],
    "terms": [["fox", "owl"], ["sum"]],
    "typical": [[], []],
    "sizes": [19, 20],
    "tokens": [1234, 567],
    "response_tokens": [1000, 100],
    "left_out": {"examples": 1, "tokens": 31, "response_tokens": 7},
    "coherence": [0.25, 0.125],
    "conflicting_pairs": {"inside": 0.031, "between": 0.414},
    "variance_inside": {"share": 0.871, "at_random": 0.974},
    "stability": 0.931,
    "length": {"explained": 0.62, "longer": [0.96, 0.04]},
    "called": ["long answers", ""],
    "ari": 0.9,
    "nmi": 0.8,
    "purity": 0.97,
    "nn_purity": 0.92,
    "chosen_count": 3,
    "candidates": {
        "2": {"score": 0.125, "stability": 0.5, "separation": 0.25},
        "3": {"score": 0.25, "stability": 1.0, "separation": 0.25},
        "10": {"score": -0.01, "stability": 0.1, "separation": -0.1},
    },
}


def test_a_run_with_left_out_examples_and_all_that_is_judged(tiny_model_dir, tiny_encoder_dir, tmp_path):
    run = synthetic_run(tmp_path, tiny_model_dir, single_lora=False)
    table = run.read_table("clusters/assignments.parquet")
    labels = table["cluster"].to_pylist()
    labels[0] = -1
    run.write_table("clusters/assignments.parquet", table.set_column(1, "cluster", pa.array(labels, pa.int32())))
    run.write_json("clusters/quality.json", QUALITY)
    report.report(synthetic_recipe(tiny_model_dir, tiny_encoder_dir), run)
    html = run.read_bytes("report.html").decode()
    assert "39 training examples fall into 2 groups" in html
    assert html.count('data-group="-1" data-other="0" style="--a:var(--none);--b:var(--c0)"') == 1
    assert '<li data-group="-1"><span class="swatch" style="background:var(--none)"></span>left out</li>' in html
    assert "left out · sums\n" in html
    assert "19 examples, 48% · 1,234 tokens · coherence 0.250" in html
    assert "20 examples, 50% · 567 tokens · coherence 0.125" in html
    note = (
        "Long answers: length tells this cluster from the others better than any word does; an answer of it is longer "
    )
    assert html.count(note + "than one of another cluster 96% of the time.") == 1
    section = html.partition('<section id="worth">')[2].partition("</section>")[0]
    values = re.findall(r'<div class="value">(.*?)</div><div class="label">(.*?)</div>', section)
    assert values == [
        ("0.93", "stability"),
        ("3% / 41%", "conflicts inside / between"),
        ("87.1%", "variance inside"),
        ("62%", "of answer length explained"),
        ("1", "example left out"),
        ("0.90", "ARI"),
        ("0.80", "NMI"),
        ("97%", "purity"),
        ("92%", "nearest-neighbour purity"),
    ]
    assert "at random would leave 97.4%" in section
    assert "in the directions it kept: a gradient&#39;s other energy is left out" in section
    assert "Hidden labels had no say" in section
    assert "random four fifths of the examples, or of 2,000 of them where there are more" in section
    assert "<h3>How many clusters the gradients&#39; graph has</h3>" in section
    assert "Empty and small clusters were then merged away, which leaves 2." in section
    svg = parsed(section[section.index("<svg") : section.index("</svg>") + 6])
    texts = [node.text for node in svg.iter(f"{SVG}text")]
    assert texts[::2] == ["2", "chosen: 3", "10"]
    widths = [float(bar.get("width")) for bar in svg.iter(f"{SVG}rect")]
    assert widths[0] == pytest.approx(widths[1] / 2, abs=0.1)
    assert widths[2] == 1


@pytest.mark.parametrize(
    ("method", "grouped_by"),
    [
        ("graph", "by what they do to the weights"),
        ("random_projection_64", "by what they do to the weights"),
        ("random", "at random"),
        ("length", "by the length of the examples"),
        ("embedding", "by embeddings of their prompts"),
    ],
)
def test_the_page_says_what_the_groups_are_by(tiny_model_dir, tiny_encoder_dir, tmp_path, method, grouped_by):
    run = synthetic_run(tmp_path, tiny_model_dir, single_lora=False)
    run.write_json("clusters/quality.json", QUALITY | {"method": method})
    report.report(synthetic_recipe(tiny_model_dir, tiny_encoder_dir), run)
    html = run.read_bytes("report.html").decode()
    assert f"40 training examples fall into 2 groups {grouped_by}. Each group trained" in html
    assert ("made otherwise, at the chosen number." in html) == (method != "graph")


def test_every_baseline_says_what_its_groups_are_by():
    of_gradients = {"graph", "kmeans", *(f"random_projection_{width}" for width in (64, 512, 8192))}
    assert set(report.GROUPED_BY) == set(get_args(ClusterMethod)) - of_gradients
    assert set(clusters.TRIED) == set(get_args(Method))


@given(st.sets(st.sampled_from(sorted(QUALITY))))
@settings(max_examples=60, deadline=None)
def test_quality_of_any_age_is_shown(kept):
    quality = {key: QUALITY[key] for key in kept}
    examples = {"a": {"domain": "x", "messages": []}, "b": {"domain": None, "messages": []}}
    cards = clusters.cluster_cards(quality, ["one", "two"], examples, {"a": 0, "b": 1, "c": -1}, ["x"])
    section = clusters.worth(quality, 2)
    html = render(Page(name="", subtitle="", summary="", clusters=cards, worth=section))
    assert ('<section id="worth">' in html) == ("#worth" in html) == (section is not None)
    shown = {"stability", "conflicting_pairs", "variance_inside", "length", "left_out", "ari", "nmi", "purity"}
    assert (section is not None) == bool(kept & (shown | {"nn_purity", "candidates"}))


def test_of_one_cluster_only_what_has_a_meaning_is_told():
    lonely = {
        "conflicting_pairs": {"inside": 0.2, "between": None},
        "variance_inside": {"share": 1.0, "at_random": 1.0},
        "stability": None,
        "length": {"explained": 0.0, "longer": [None]},
        "left_out": {"examples": 0, "tokens": 0, "response_tokens": 0},
        "candidates": {},
    }
    section = clusters.worth(lonely, 1)
    assert [(fact.value, fact.label) for fact in section.facts] == [("20%", "conflicts inside")]
    assert section.figures == ()
    del lonely["conflicting_pairs"]
    assert clusters.worth(lonely, 1) is None
