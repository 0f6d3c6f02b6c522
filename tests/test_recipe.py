import pytest
import yaml
from pydantic import ValidationError

from gradientspace_ray.recipe import RecipeError, dump_recipe, load_recipe, packaged_recipes, parse_recipe


@pytest.mark.parametrize("name", ["quickstart", "tiny", "gpu"])
def test_packaged_recipes_are_valid(name):
    assert name in packaged_recipes()
    assert load_recipe(name).name == name


def test_a_resolved_recipe_reads_back_equal(tmp_path):
    recipe = load_recipe("quickstart", ["experts.epochs=2", "clusters.count=4", "warmup.learning_rate=1e-4"])
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    assert load_recipe(str(path)) == recipe
    assert recipe.experts.epochs == 2
    assert recipe.clusters.count == 4
    assert recipe.warmup.learning_rate == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("experts.epoch=2", "unknown key experts.epoch; did you mean epochs?"),
        ("sketchs.rank=2", "unknown key sketchs; did you mean sketch?"),
        ("experts.zero_stage=7", "experts.zero_stage"),
        ("clusters.count=many", "clusters.count"),
        ("data.sources=[]", "data.sources"),
        ("model.name.deep=1", "name is a value"),
        ("compute.device=cuda", "compute.device cuda needs compute.gpus_per_worker above 0, such as 1"),
        ("experts.epochs", "section.key=value"),
    ],
)
def test_a_bad_key_or_value_is_one_line_that_names_it(override, message):
    with pytest.raises(RecipeError) as caught:
        load_recipe("quickstart", [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_recipe_names_the_packaged_ones():
    with pytest.raises(RecipeError, match=r"quickstart"):
        load_recipe("no-such-recipe")


def test_broken_yaml_names_the_line(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("name: x\ndata: [\n")
    with pytest.raises(RecipeError, match=r"broken\.yaml:\d+"):
        load_recipe(str(path))


def test_a_recipe_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"name: \xe9")
    with pytest.raises(RecipeError, match=r"latin\.yaml: not a text in UTF-8"):
        load_recipe(str(path))


def test_recipes_are_frozen():
    recipe = load_recipe("quickstart")
    with pytest.raises(ValidationError):
        recipe.seed = 1


def test_a_recipe_needs_a_model_and_data():
    with pytest.raises(RecipeError, match="model is missing"):
        parse_recipe(yaml.safe_load("name: x"))
