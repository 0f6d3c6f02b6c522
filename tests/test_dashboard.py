import json
import re
from pathlib import Path

import pytest
from test_metrics import RAYS_OWN

from gradientspace_ray.serving.metrics import COUNTERS, GAUGES, HISTOGRAMS

DASHBOARD = json.loads((Path(__file__).parents[1] / "serve_configs/grafana-dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
TARGETS = {f"{panel['title']} {target['refId']}": target for panel in PANELS for target in panel["targets"]}
VARIABLES = [variable["name"] for variable in DASHBOARD["templating"]["list"]]
# Labels of every metric recorded inside a replica.
SERVE = {"application", "deployment", "replica"}
OURS = "ray_gradientspace_"
COUNTED = {f"{OURS}{name}": {*labels} for name, (_, labels) in COUNTERS.items()}
COUNTED |= {f"{OURS}{name}_count": {*labels} for name, (_, labels, _) in HISTOGRAMS.items()}
COUNTED |= {f"{OURS}{name}_bucket": {*labels, "le"} for name, (_, labels, _) in HISTOGRAMS.items()}
MEASURED = {f"{OURS}{name}": {*labels} for name, (_, labels) in GAUGES.items()}
MEASURED |= {name: {*labels} - SERVE for name, labels in RAYS_OWN.items()}
WORDS = {"sum", "max", "by", "rate", "histogram_quantile", "ignoring", "group_left"}
SELECTOR = r"(\w+)\{([^}]*)\}(\[[^\]]*\])?"


def metrics_in(expression):
    """Name, label matchers and window of every metric."""
    return re.findall(SELECTOR, expression)


def kept_labels(expression):
    return {label for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(", ")}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_an_expression_names_metrics_and_labels_that_exist(target):
    expression, labels = target["expr"], set(SERVE)
    assert metrics_in(expression)
    for name, matchers, _ in metrics_in(expression):
        own = SERVE | (COUNTED | MEASURED)[name]
        assert set(re.findall(r'(\w+)(?:=~|=)"', matchers)) <= own
        assert 'application=~"$application"' in matchers
        labels |= own
    kept = kept_labels(expression)
    assert kept <= labels
    assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) == kept - {"le"}
    rest = re.sub(r"(by|ignoring|group_left) \([^)]*\)", "", re.sub(SELECTOR, "", expression))
    assert set(re.findall(r"[A-Za-z_]\w*", rest)) <= WORDS, "a metric without matchers, or an unknown function"
    assert expression.count("(") == expression.count(")")


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_what_is_counted_is_shown_as_a_rate_and_buckets_as_quantiles(target):
    expression = target["expr"]
    for name, _, window in metrics_in(expression):
        assert window == ("[$__rate_interval]" if name in COUNTED else "")
        assert (f"(rate({name}{{" in expression) == (name in COUNTED)
        if name.endswith("_bucket"):
            assert expression.startswith("histogram_quantile(")
            assert "le" in kept_labels(expression)


def test_every_metric_of_ours_is_on_a_panel():
    shown = {name for target in TARGETS.values() for name, *_ in metrics_in(target["expr"])}
    assert shown & MEASURED.keys() == MEASURED.keys()
    for name in COUNTERS:
        assert f"{OURS}{name}" in shown
    for name in HISTOGRAMS:
        assert f"{OURS}{name}_bucket" in shown


def test_only_variables_that_exist_are_used():
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD)))
    assert used - {"__rate_interval", "__all"} == set(VARIABLES)
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            metric, label = re.fullmatch(
                r"label_values\((\w+)(?:\{.*\})?, (\w+)\)", variable["query"]["query"]
            ).groups()
            assert label in COUNTED[metric] | SERVE


def test_panels_lie_beside_each_other():
    assert DASHBOARD["schemaVersion"] >= 39
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    cells = [
        (x, y)
        for panel in DASHBOARD["panels"]
        for place in [panel["gridPos"]]
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
