"""The layout is a contract: who may import whom, and where Ray and DeepSpeed may be named."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "gradientspace_ray"
NOUNS = {
    "recipe": set(),
    "errors": set(),
    "retries": set(),
    "run": {"retries"},
    "lease": {"run"},
    "registry": {"run"},
    "releases": {"run", "registry", "lease"},
    "publishing": {"run", "registry", "releases"},
    "release_client": {"run", "releases"},
    "examples": {"recipe"},
    "models": {"recipe", "examples"},
    "gradients": {"examples", "models"},
    "sketch": set(),
    "clusters": set(),
    "training": {"recipe", "examples", "models"},
    "router": {"models", "examples", "registry"},
    "engine": {"models"},
    "evaluation": {"models", "examples", "engine"},
    "report": set(),
}
STAGES = ("prepare", "train", "extract", "merge", "cluster", "route", "score", "report")
MAY_IMPORT = (
    NOUNS
    | {f"stages.{stage}": {*NOUNS, "stages.progress"} for stage in STAGES}
    | {
        "stages.progress": set(),
        "stages.encode": {*NOUNS, "stages.progress"},
        "stages.cluster": {*NOUNS, "stages.progress", "stages.encode"},
        "stages.route": {*NOUNS, "stages.progress", "stages.encode"},
        "stages.deepspeed_engine": {*NOUNS},
        "stages.finetune_worker": {*NOUNS, "stages.deepspeed_engine"},
        "stages.finetunes": {*NOUNS, "stages.progress", "stages.finetune_worker"},
        "stages.train": {*NOUNS, "stages.deepspeed_engine", "stages.finetune_worker", "stages.finetunes"},
        "stages.repair": {*NOUNS, "stages.progress"},
        "stages.conclude": {*NOUNS, "stages.progress", "stages.merge"},
        "stages.merge": {*NOUNS, "stages.progress", "stages.repair"},
        "serving": {"registry", "releases", "publishing", "run", "examples", "router", "engine", "models"},
        "pipeline": {
            "recipe",
            "errors",
            "run",
            "lease",
            "examples",
            "models",
            "stages.progress",
            "stages.conclude",
            *(f"stages.{stage}" for stage in STAGES),
        },
        "cli": {"recipe", "errors", "run", "pipeline", "release_client", "serving", "router", "stages.report"},
    }
)
# The distributed shell: the only places that may name these libraries.
MAY_IMPORT_RAY = {"serving", "pipeline", *(name for name in MAY_IMPORT if name.startswith("stages."))}
CLUSTER_LIBRARIES = {"ray", "deepspeed"}
# Imports inside functions are for optional packages, and for the command line, which parses before it imports.
OPTIONAL_PACKAGES = {"datasets", "faiss", "mlflow", "sqlalchemy", "vllm", "wandb"}
MAX_LINES = 400


def module_files():
    return [path for path in sorted((ROOT / PACKAGE).rglob("*.py")) if path.name != "__init__.py"]


def place(path):
    parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
    return ".".join(parts[:2]) if parts[0] == "stages" else parts[0]


def imported_names(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "use absolute imports"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_places(names):
    for name in names:
        parts = name.split(".")
        if parts[0] == PACKAGE and len(parts) > 1 and parts[1] != "__version__":
            yield ".".join(parts[1:3]) if parts[1] == "stages" else parts[1]


def test_every_module_is_in_the_contract():
    assert {place(path) for path in module_files()} == set(MAY_IMPORT)


def test_the_contract_has_no_cycle():
    remaining = {name: set(allowed) for name, allowed in MAY_IMPORT.items()}
    while remaining:
        free = {name for name, allowed in remaining.items() if not allowed & set(remaining)}
        assert free, f"cycle among {sorted(remaining)}"
        remaining = {name: allowed for name, allowed in remaining.items() if name not in free}


@pytest.mark.parametrize("path", module_files(), ids=lambda path: str(path.relative_to(ROOT / PACKAGE)))
def test_module_keeps_its_place(path):
    tree = ast.parse(path.read_text())
    names = list(imported_names(tree))
    here = place(path)
    assert set(own_places(names)) - {here} <= MAY_IMPORT[here]
    if here not in MAY_IMPORT_RAY:
        assert not CLUSTER_LIBRARIES & {name.split(".")[0] for name in names}, "a noun may not name Ray or DeepSpeed"
    assert len(path.read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", module_files(), ids=lambda path: str(path.relative_to(ROOT / PACKAGE)))
def test_no_import_hides_in_a_function(path):
    if place(path) == "cli":
        return
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            hidden = {name.split(".")[0] for name in imported_names(function)}
            assert hidden <= OPTIONAL_PACKAGES, f"{function.name} hides an import"


def test_a_module_inside_a_noun_is_not_in_an_import_cycle():
    graph = {}
    for path in module_files():
        name = ".".join((PACKAGE, *path.relative_to(ROOT / PACKAGE).with_suffix("").parts))
        graph[name] = set(imported_names(ast.parse(path.read_text())))
    graph = {
        name: {other for other in graph if other != name and any(f"{i}.".startswith(f"{other}.") for i in found)}
        for name, found in graph.items()
    }
    while graph:
        free = {name for name, needed in graph.items() if not needed & set(graph)}
        assert free, f"import cycle among {sorted(graph)}"
        graph = {name: needed for name, needed in graph.items() if name not in free}


def test_nouns_load_neither_ray_nor_deepspeed():
    modules = [
        ".".join((PACKAGE, *path.relative_to(ROOT / PACKAGE).with_suffix("").parts))
        for path in module_files()
        if place(path) in NOUNS
    ]
    code = (
        f"import sys, importlib\nfor name in {[PACKAGE, *modules]!r}: importlib.import_module(name)\n"
        "loaded = {'ray', 'deepspeed'} & set(sys.modules)\nassert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_init_files_hold_nothing_but_the_version_and_what_must_come_before_all_imports():
    for path in (ROOT / PACKAGE).rglob("__init__.py"):
        expected = {"Expr", "Assign", "Import"} if path.parent.name == PACKAGE else set()
        assert {type(node).__name__ for node in ast.parse(path.read_text()).body} <= expected, path


def test_jobs_are_thin():
    for path in (ROOT / "jobs").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 40, path
