"""Training curves: what a reader would read off the figure is what the records say."""

import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_run import synthetic_recipe, synthetic_run

from gradientspace_ray.report import figures
from gradientspace_ray.report.figures import Curve, curves, smoothed
from gradientspace_ray.report.page import Page, render
from gradientspace_ray.report.training import how_it_went
from gradientspace_ray.run import RunDirectory
from gradientspace_ray.stages import report

EVIL = "</svg><script>alert('1')</script>&\"'"
SVG = "{http://www.w3.org/2000/svg}"
losses = st.lists(st.floats(0, 20), min_size=1, max_size=60)
RECORD = {
    "key": "0" * 16,
    "name": "expert-a",
    "cluster": 0,
    "examples": 40,
    "tokens": 5000,
    "steps": 4,
    "seconds": 2.5,
    "workers": 1,
    "zero_stage": 1,
    "losses": [4.0, 3.0, 2.5, 2.0],
    "heldout": [[2, 2.75], [4, 3.0]],
    "best_step": 2,
}


def parsed(svg):
    assert not re.search(r"\b(nan|inf)\b", svg)
    return ElementTree.fromstring(svg)


def panels_of(tree):
    return [group for group in tree.iter(f"{SVG}g") if group.get("class") == "curve"]


def points(panel, kind):
    """[P, 2] of the panel's polyline of this kind; None where it has none."""
    for line in panel.iter(f"{SVG}polyline"):
        if line.get("class") == kind:
            return np.array([[float(number) for number in point.split(",")] for point in line.get("points").split()])
    return None


def dots(panel, kind):
    found = [circle for circle in panel.iter(f"{SVG}circle") if circle.get("class") == kind]
    return [(float(circle.get("cx")), float(circle.get("cy")), circle.get("data-tip")) for circle in found]


def read_off(tree):
    """Loss at a height of the only panel, by the two outermost labels of its axis."""
    labels = [node for node in tree.iter(f"{SVG}text") if node.get("x") == "40.0"]
    ticks = sorted((float(node.get("y")) - 4, float(node.text)) for node in labels)
    (y_high, high), (y_low, low) = ticks[0], ticks[-1]
    return lambda y: high + (y - y_high) * (low - high) / (y_low - y_high)


@settings(max_examples=40, deadline=None)
@given(losses)
def test_the_moving_average_is_the_mean_of_the_steps_around(values):
    half = len(values) // 20
    expected = [np.mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
    np.testing.assert_allclose(smoothed(values), expected, rtol=1e-9, atol=1e-9)


def test_the_losses_can_be_read_off_the_curve():
    values = (2 + np.sin(np.arange(150) / 9)).tolist()
    heldout = [(50, 2.5), (100, 1.25), (150, 2.0)]
    tree = parsed(curves([Curve("math", "var(--c1)", values, heldout, 100)], "curves"))
    loss_at = read_off(tree)
    (panel,) = panels_of(tree)
    assert panel.get("style") == "--a:var(--c1)"
    mean = points(panel, "mean")
    np.testing.assert_allclose([loss_at(y) for y in mean[:, 1]], smoothed(values), atol=0.005)
    np.testing.assert_allclose([loss_at(y) for y in points(panel, "raw")[:, 1]], values, atol=0.005)
    np.testing.assert_allclose(mean[:, 0], np.linspace(mean[0, 0], mean[-1, 0], 150), atol=0.051)
    np.testing.assert_allclose(points(panel, "heldout")[:, 0], mean[[49, 99, 149], 0], atol=0.051)
    np.testing.assert_allclose([loss_at(y) for y in points(panel, "heldout")[:, 1]], [2.5, 1.25, 2.0], atol=0.005)
    ((x, _, tip),) = dots(panel, "kept")
    assert (x, tip) == (pytest.approx(mean[99, 0], abs=0.051), "math, after 100 steps: held-out loss 1.2500, kept")
    assert len(dots(panel, "heldout")) == 2
    texts = [node.text for node in panel.iter(f"{SVG}text")]
    ends = smoothed(values)
    assert texts == ["math", f"{ends[0]:.3f} → {ends[-1]:.3f}", "1", "150 steps", "1.250"]


panel_lists = st.lists(
    st.tuples(losses, st.lists(st.tuples(st.integers(0, 60), st.floats(0, 20)), max_size=5)), min_size=1, max_size=14
)


@settings(deadline=None, max_examples=40)
@given(panel_lists, st.booleans())
def test_every_panel_stays_in_its_place(found, equal):
    drawn = []
    for index, (values, heldout) in enumerate(found):
        at = dict((min(step, len(values)), loss) for step, loss in heldout)
        values = [values[0]] * len(values) if equal else values
        drawn.append(Curve(f"expert {index}", figures.colour(index), values, sorted(at.items())))
    tree = parsed(curves(drawn, "curves"))
    high = float(tree.get("viewBox").split()[3])
    panels = panels_of(tree)
    assert len(panels) == len(drawn)
    boxes = []
    for curve, panel in zip(drawn, panels, strict=True):
        places = points(panel, "mean")
        assert len(places) == len(curve.losses)
        hits = [rect for rect in panel.iter(f"{SVG}rect") if rect.get("class") == "hit"]
        x = min(float(hit.get("x")) for hit in hits)
        end = max(float(hit.get("x")) + float(hit.get("width")) for hit in hits)
        y, tall = float(hits[0].get("y")), float(hits[0].get("height"))
        boxes.append((x, y, end, y + tall))
        marks = [places, *([points(panel, "heldout")] if curve.heldout else [])]
        marks += [np.array([[a, b]]) for kind in ("raw", "heldout", "kept") for a, b, _ in dots(panel, kind)]
        everything = np.concatenate(marks)
        assert np.all((everything[:, 0] >= 0) & (everything[:, 0] <= figures.WIDTH))
        assert np.all((everything[:, 1] >= y - 0.1) & (everything[:, 1] <= y + tall + 0.1))
        assert y + tall <= high
    for place, (x, y, end, bottom) in enumerate(boxes):
        for other_x, other_y, other_end, other_bottom in boxes[place + 1 :]:
            assert end <= other_x or other_end <= x or bottom <= other_y or other_bottom <= y


def test_ten_thousand_steps_are_thinned_but_keep_their_extremes():
    values = 2 + np.random.default_rng(0).normal(scale=0.1, size=10_000)
    values[[1234, 8765]] = 1.55, 2.45
    heldout = [(step, 2.0 + step / 1e5) for step in range(20, 10_001, 20)]
    tree = parsed(curves([Curve("math", "var(--c0)", values.tolist(), heldout, 20)], "curves"))
    (panel,) = panels_of(tree)
    raw = points(panel, "raw")
    assert len(raw) <= figures.CURVE_POINTS
    assert len(points(panel, "mean")) <= figures.CURVE_POINTS
    assert len(points(panel, "heldout")) <= figures.CURVE_POINTS
    assert np.all(np.diff(raw[:, 0]) >= 0)
    # Most parts reach far beyond the average on both sides, as the steps do.
    loss_at = read_off(tree)
    seen = np.array([loss_at(y) for y in raw[:, 1]])
    assert (seen > 2.1).sum() >= 100
    assert (seen < 1.9).sum() >= 100
    assert len(dots(panel, "kept")) == 1
    assert dots(panel, "heldout") == []
    hits = [rect.get("data-tip") for rect in panel.iter(f"{SVG}rect")]
    assert len(hits) == figures.CURVE_HITS
    assert hits[0] == f"math, steps 1 to 334: loss {values[:334].mean():.4f}"


def test_forty_experts_have_a_panel_each():
    panels = [Curve(f"expert-with-a-long-name-{index}", figures.colour(index), [3.0, 2.0]) for index in range(40)]
    tree = parsed(curves(panels, "curves"))
    titles = [node for node in tree.iter(f"{SVG}text") if node.get("class") == "title"]
    assert [node.get("data-tip") for node in titles] == [panel.name for panel in panels]
    assert len({node.get("x") for node in titles}) == 4
    assert all(len(node.text) <= 21 for node in titles)


def test_one_step_is_a_dot():
    (panel,) = panels_of(parsed(curves([Curve("math", "var(--c0)", [2.0])], "curves")))
    assert len(dots(panel, "raw")) == 1


def test_names_are_escaped():
    svg = curves([Curve(EVIL, "var(--c0)", [2.0, 1.0], [(2, 1.5)])], EVIL)
    parsed(svg)
    assert "<script" not in svg


def row(section, name):
    (found,) = [row for row in section.table.rows if row[0] == name]
    return dict(zip(section.table.columns, found, strict=True))


def test_the_table_says_what_the_records_say():
    other = RECORD | {
        "name": "expert-b",
        "cluster": 1,
        "tokens": 3000,
        "seconds": 1.5,
        "steps": 2,
        "losses": [2.0, 1.0],
    }
    single = RECORD | {"name": "single_lora", "cluster": None, "heldout": [[4, 2.5]], "best_step": None}
    generalist = RECORD | {"name": "generalist", "cluster": None, "heldout": [], "best_step": None}
    section = how_it_went(generalist, [other | {"heldout": [[2, 1.5]], "best_step": None}, RECORD], single)
    names = ["generalist", "expert-a", "expert-b", "experts together", "single LoRA"]
    assert [row[0] for row in section.table.rows] == names
    assert row(section, "expert-a") == {
        "finetune": "expert-a",
        "examples": "40",
        "tokens": "5,000",
        "steps": "4",
        "time": "2.5 s",
        "tokens/s": "2,000",
        "loss, first → last": "4.000 → 2.000",
        "held-out loss": "2.750",
        "kept step": "2",
    }
    together = row(section, "experts together")
    assert (together["examples"], together["tokens"], together["steps"]) == ("80", "8,000", "6")
    assert (together["time"], together["tokens/s"], together["held-out loss"]) == ("4.0 s", "2,000", "·")
    assert (row(section, "single LoRA")["held-out loss"], row(section, "single LoRA")["kept step"]) == ("2.500", "4")
    assert row(section, "generalist")["held-out loss"] == "·"
    colours = [panel.get("style") for panel in panels_of(parsed(section.figures[0].svg))]
    assert colours == ["--a:var(--muted)", "--a:var(--c0)", "--a:var(--c1)", "--a:var(--muted)"]
    assert "held-out" in section.figures[0].caption


def test_without_held_out_examples_nothing_is_said_of_them():
    section = how_it_went(None, [{**RECORD, "heldout": [], "best_step": None}], None)
    assert section.table.columns[-1] == "loss, first → last"
    assert "held-out" not in section.figures[0].caption
    assert [row[0] for row in section.table.rows] == ["expert-a"]


def test_where_nothing_was_trained_there_is_no_section():
    assert how_it_went(None, [], None) is None
    assert how_it_went({**RECORD, "losses": []}, [], None) is None


@settings(max_examples=40, deadline=None)
@given(st.sets(st.sampled_from(sorted(set(RECORD) - {"name", "cluster"}))))
def test_records_of_any_age_are_shown(kept):
    record = {key: RECORD[key] for key in {*kept, "name", "cluster"}}
    section = how_it_went(None, [record, record | {"cluster": 1}], None)
    assert (section is None) == ("losses" not in kept)
    html = render(Page(name="", subtitle="", summary="", training=section))
    assert ('<section id="training">' in html) == ("#training" in html) == (section is not None)


def test_the_page_shows_every_finetune_of_a_run(tiny_model_dir, tiny_encoder_dir, tmp_path):
    recipe = synthetic_recipe(tiny_model_dir, tiny_encoder_dir)
    run = synthetic_run(tmp_path, tiny_model_dir)
    folder = next(name for name in run.names("experts") if name.startswith("expert-b"))
    record = run.read_json(f"experts/{folder}/training.json")
    run.write_json(f"experts/{folder}/training.json", record | {"losses": [3.5, 2.0], "heldout": [[2, 2.25]]})
    report.report(recipe, run)
    html = run.read_bytes("report.html").decode()
    section = html.partition('<section id="training">')[2].partition("</section>")[0]
    svg = parsed(section[section.index("<svg") : section.index("</svg>") + 6])
    titles = [node.text for node in svg.iter(f"{SVG}text") if node.get("class") == "title"]
    assert titles == ["generalist", "expert-a", "expert-b", "single LoRA"]
    assert "<td>3.500 → 2.000</td><td>2.250</td><td>2</td>" in section
    assert '<a href="#training">Training</a>' in html


def test_a_run_before_its_finetunes_has_no_curves(tiny_model_dir, tiny_encoder_dir, tmp_path):
    run = RunDirectory(tmp_path)
    run.write_bytes("generalist/adapter_config.json", json.dumps({}).encode())
    report.report(synthetic_recipe(tiny_model_dir, tiny_encoder_dir), run)
    assert '<section id="training">' not in run.read_bytes("report.html").decode()
