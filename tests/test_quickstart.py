import math
import re
from collections import Counter

import pytest

from gradientspace_ray.examples.quickstart import EXAMPLES_PER_SKILL, quickstart_examples
from gradientspace_ray.examples.quickstart_functions import FUNCTIONS, source_code


def question_and_answer(row):
    question, answer = row["messages"]
    assert (question["role"], answer["role"]) == ("user", "assistant")
    return question["content"], answer["content"]


@pytest.fixture(scope="module")
def rows():
    return quickstart_examples(0)


def of(rows, domain):
    return [question_and_answer(row) for row in rows if row["domain"] == domain]


def test_four_skills_of_equal_size_all_questions_distinct(rows):
    assert Counter(row["domain"] for row in rows) == dict.fromkeys(
        ("arithmetic", "python", "finance", "story"), EXAMPLES_PER_SKILL
    )
    assert len({question_and_answer(row)[0] for row in rows}) == len(rows)


def test_a_seed_decides_the_mixture(rows):
    assert quickstart_examples(0) == rows
    assert quickstart_examples(1) != rows


def test_every_equation_of_the_arithmetic_answers_holds(rows):
    equations = 0
    for _, answer in of(rows, "arithmetic"):
        for left, right in re.findall(r"((?:\(?\d+\)?\s*[-+*/]\s*)+\(?[\d +]+\)?)\s*= \$?(-?\d+)", answer):
            assert math.isclose(eval(left), int(right)), answer
            equations += 1
        assert "Answer: " in answer
    assert equations > EXAMPLES_PER_SKILL


def test_every_computation_of_the_finance_answers_holds(rows):
    checked = 0
    for question, answer in of(rows, "finance"):
        assert "|" in question
        match = re.match(r"([-+*/(). \d]+) = (-?[\d.]+)(%?)", answer)
        if match:
            value = eval(match[1]) * (100 if match[3] else 1)
            assert math.isclose(value, float(match[2]), abs_tol=0.06), answer
            checked += 1
    assert checked > 80


CASES = {
    "text": "Never odd, 42 or even\nsecond line",
    "numbers": [3, -1, 4, 1, 5, 9, 2, 6, 5],
    "mapping": {"pear": 12, "apple": 3, "fig": 40},
    "n": 28,
}
EXPECTED = {
    "reverse_words": "line second even or 42 odd, Never",
    "count_vowels": 10,
    "second_largest": 6,
    "running_total": [3, 2, 6, 7, 12, 21, 23, 29, 34],
    "median": 4,
    "factorial": math.factorial(28),
    "fibonacci": 317811,
    "is_prime": False,
    "digit_sum": 10,
    "collatz_steps": 18,
    "divisors": [1, 2, 4, 7, 14, 28],
    "to_binary": "11100",
    "gcd_with_12": 4,
    "triangle": 406,
    "next_multiple": 30,
    "by_value": [("apple", 3), ("pear", 12), ("fig", 40)],
    "largest_key": "fig",
}


@pytest.mark.parametrize(("name", "task", "body"), FUNCTIONS, ids=[name for name, _, _ in FUNCTIONS])
def test_the_python_answers_run(name, task, body):
    code, namespace = source_code(name, body), {}
    exec(code, namespace)
    argument = re.match(rf"def {name}\((\w+)\)", code)[1]
    result = namespace[name](CASES[argument])
    if name in EXPECTED:
        assert result == EXPECTED[name]


def test_the_stories_are_varied(rows):
    stories = [answer for _, answer in of(rows, "story")]
    assert len(set(stories)) == len(stories)
    assert max(Counter(story.split(".")[0] for story in stories).values()) < 6
