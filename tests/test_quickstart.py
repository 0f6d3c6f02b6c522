import math
import re
from collections import Counter

import pytest

from gradientspace_ray.examples.formats import read_source
from gradientspace_ray.examples.quickstart import EXAMPLES_PER_SKILL, quickstart_examples
from gradientspace_ray.examples.quickstart_functions import FUNCTIONS, source_code
from gradientspace_ray.examples.quickstart_stories import FIGURES, PLACES
from gradientspace_ray.recipe import load_recipe
from gradientspace_ray.stages.prepare import split_key, split_of


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


EQUATION = re.compile(r"([-+*/().\d]*\d[-+*/][-+*/().\d]+)=(-?\d+)(\.\d+)?(%?)")


def check_equations(answer):
    """Check that the printed value of every equation is the computed one, rounded; return how many there are."""
    found = EQUATION.findall(answer)
    assert len(found) == answer.count("="), answer
    for computation, whole, decimals, percent in found:
        value = eval(computation) * (100 if percent else 1)
        half_a_unit = 0.5 * 10.0 ** -len(decimals.removeprefix("."))
        tolerance = half_a_unit if decimals else 0.0
        assert math.isclose(value, float(whole + decimals), rel_tol=0, abs_tol=tolerance * (1 + 1e-9)), answer
    return len(found)


@pytest.mark.parametrize("wrong", ["31/59=0.58", "2*3=7", "(4-3)/3=33.4%", "4*1.1=4.5", "3+4 = 7", "1+1=2, 2+2=5"])
def test_a_wrong_equation_is_found(wrong):
    with pytest.raises(AssertionError):
        check_equations(wrong)
    assert check_equations("31/59=0.53") == check_equations("(4-3)/3=33.3%") == 1


def test_every_equation_of_the_arithmetic_answers_holds(rows):
    for _, answer in of(rows, "arithmetic"):
        assert check_equations(answer) >= 2
        result = re.search(r"=(\d+)\nAnswer: \$?(\d+)", answer)
        assert result[1] == result[2], answer


def test_no_amount_of_an_arithmetic_problem_is_negative(rows):
    for prompt, answer in of(rows, "arithmetic"):
        assert not re.search(r"(?:=| \$?)-\d", prompt + answer), answer


def figures(prompt):
    """Label -> amount of the table in a finance prompt."""
    return {label.lower(): int(amount) for label, amount in re.findall(r"(\w+)[| ](\d\d)(?: \||\n|$)", prompt)}


def test_every_finance_answer_holds_and_reads_the_table(rows):
    checked = 0
    for prompt, answer in of(rows, "finance"):
        assert "|" in prompt
        table = figures(prompt)
        assert len(table) == 3, prompt
        checked += check_equations(answer)
        terms = {int(term) for term in re.findall(r"\b\d+\b", answer.split("=")[0])} - {1, 3}
        if "rose" in answer or "fell" in answer:
            differences = {abs(one - other) for one in table.values() for other in table.values()}
            assert terms <= differences, answer
        else:
            assert terms <= set(table.values()), answer
        asked = [
            label for label in re.findall(r"\w+", next(line for line in prompt.split("\n") if "?" in line).lower())
        ]
        asked = [table[label] for label in asked if label in table]
        if "is larger" in prompt or "gap" in prompt:
            assert f"{max(asked)}-{min(asked)}={max(asked) - min(asked)} " in answer
        if "change from" in prompt:
            assert f"{asked[1]}-{asked[0]}" in answer
        if "rise or fall" in prompt:
            assert answer.split(" by ")[0].endswith("rose" if asked[1] > asked[0] else "fell")
        if "highest" in prompt or "largest" in prompt:
            label, amount = re.match(r"(\w+), with (\d+)", answer).groups()
            assert table[label.lower()] == int(amount) == max(table.values())
    assert checked > 80


CASES = {
    "text": "Never odd, 42 or even\nsecond line",
    "numbers": [3, -1, 4, 1, 5, 9, 2, 6, 5],
    "mapping": {"pear": 12, "apple": 3, "fig": 40},
    "n": 28,
}
EXPECTED = {
    "reverse_words": "line second even or 42 odd, Never",
    "is_palindrome": False,
    "capitalize_words": "Never Odd, 42 Or Even\nSecond Line",
    "remove_spaces": "Neverodd,42oreven\nsecondline",
    "longest_word": "second",
    "initials": "No4oesl",
    "strip_digits": "Never odd,  or even\nsecond line",
    "swap_case": "nEVER ODD, 42 OR EVEN\nSECOND LINE",
    "sorted_letters": "\n     ,24Ncdddeeeeeeilnnnooorrsvv",
    "count_lines": 2,
    "every_second": "Nvrod 2o vnscn ie",
    "unique_words": {"odd,", "Never", "second", "or", "even", "42", "line"},
    "word_lengths": {"Never": 5, "odd,": 4, "42": 2, "or": 2, "even": 4, "second": 6, "line": 4},
    "only_letters": "Neveroddorevensecondline",
    "count_words": 7,
    "shout": "NEVER ODD, 42 OR EVEN\nSECOND LINE!",
    "last_word": "line",
    "starts_and_ends": False,
    "has_digit": True,
    "code_points": list(CASES["text"].encode()),
    "sum_list": 34,
    "mean": 3.7777777777777777,
    "second_largest": 6,
    "evens": [4, 2, 6],
    "odds_squared": [9, 1, 1, 25, 81, 25],
    "count_positive": 8,
    "dedupe": [3, -1, 4, 1, 5, 9, 2, 6],
    "rotate_left": [-1, 4, 1, 5, 9, 2, 6, 5, 3],
    "is_sorted": False,
    "value_range": 10,
    "median": 4,
    "neighbours": [(3, -1), (-1, 4), (4, 1), (1, 5), (5, 9), (9, 2), (2, 6), (6, 5)],
    "index_of_max": 5,
    "clip_negative": [3, 0, 4, 1, 5, 9, 2, 6, 5],
    "most_common": 5,
    "split_half": ([3, -1, 4, 1], [5, 9, 2, 6, 5]),
    "descending": [9, 6, 5, 5, 4, 3, 2, 1, -1],
    "last_three": [2, 6, 5],
    "doubled": [6, -2, 8, 2, 10, 18, 4, 12, 10],
    "has_duplicates": True,
    "ends_sum": 8,
    "sum_of_absolutes": 36,
    "numbered": [(0, 3), (1, -1), (2, 4), (3, 1), (4, 5), (5, 9), (6, 2), (7, 6), (8, 5)],
    "largest": 9,
    "running_total": [3, 2, 6, 7, 12, 21, 23, 29, 34],
    "product": -32400,
    "char_counts": {
        "N": 1,
        "e": 6,
        "v": 2,
        "r": 2,
        " ": 5,
        "o": 3,
        "d": 3,
        ",": 1,
        "4": 1,
        "2": 1,
        "n": 3,
        "\n": 1,
        "s": 1,
        "c": 1,
        "l": 1,
        "i": 1,
    },
    "count_vowels": 10,
    "differences": [-4, 5, -3, 4, 4, -7, 4, -1],
    "factorial": math.factorial(28),
    "fibonacci": 317811,
    "is_prime": False,
    "digit_sum": 10,
    "is_leap_year": True,
    "divisors": [1, 2, 4, 7, 14, 28],
    "to_binary": "11100",
    "is_square": False,
    "countdown": [*range(1, 29)][::-1],
    "triangle": 406,
    "fizzbuzz": 28,
    "reverse_digits": 82,
    "next_ten": 30,
    "sum_of_squares": 7714,
    "times_table": [28, 56, 84, 112, 140, 168, 196, 224, 252, 280],
    "parity": "even",
    "to_celsius": -2.2222222222222223,
    "minutes_seconds": (0, 28),
    "stars": "*" * 28,
    "digits": [2, 8],
    "absolute": 28,
    "cube": 21952,
    "sum_to": 406,
    "invert": {12: "pear", 3: "apple", 40: "fig"},
    "largest_key": "fig",
    "drop_small": {"pear": 12, "fig": 40},
    "total_value": 55,
    "sorted_keys": ["apple", "fig", "pear"],
    "add_one": {"pear": 13, "apple": 4, "fig": 41},
    "by_value": [("apple", 3), ("pear", 12), ("fig", 40)],
}


@pytest.mark.parametrize(("name", "task", "body"), FUNCTIONS, ids=[name for name, _, _ in FUNCTIONS])
def test_the_python_answers_run(name, task, body):
    code, namespace = source_code(name, body), {}
    exec(code, namespace)
    argument = re.match(rf"def {name}\((\w+)\)", code)[1]
    result = namespace[name](CASES[argument])
    assert result == EXPECTED[name]
    assert type(result) is type(EXPECTED[name])


MORE = {
    "is_palindrome": ("level", True),
    "starts_and_ends": ("noon", True),
    "has_digit": ("none", False),
    "is_sorted": ([1, 1, 2], True),
    "has_duplicates": ([1, 2], False),
    "is_prime": (29, True),
    "is_leap_year": (1900, False),
    "is_square": (49, True),
    "fizzbuzz": (45, "FizzBuzz"),
    "next_ten": (30, 30),
    "parity": (7, "odd"),
    "to_celsius": (212, 100),
    "minutes_seconds": (125, (2, 5)),
    "absolute": (-3, 3),
}


@pytest.mark.parametrize(("name", "argument", "expected"), [(name, *case) for name, case in MORE.items()], ids=MORE)
def test_the_python_answers_are_right_on_the_other_side_too(name, argument, expected):
    [body] = [body for other, _, body in FUNCTIONS if other == name]
    namespace = {}
    exec(source_code(name, body), namespace)
    assert namespace[name](argument) == expected


def test_every_function_has_one_name_and_an_expectation():
    names = [name for name, _, _ in FUNCTIONS]
    assert len(set(names)) == len(names)
    assert set(names) == set(EXPECTED)


def test_the_stories_are_varied(rows):
    stories = [answer for _, answer in of(rows, "story")]
    assert len(set(stories)) == len(stories)
    assert max(Counter(story.split(".")[0] for story in stories).values()) < 6


@pytest.mark.parametrize("seed", range(3))
def test_a_story_is_about_what_was_asked_for(seed):
    for prompt, story in of(quickstart_examples(seed), "story"):
        assert "{" not in prompt + story
        # The first letter may be a capital in the story.
        for words in (*FIGURES, *PLACES):
            assert words not in prompt or words[1:] in story, (prompt, story)


@pytest.mark.parametrize("seed", range(8))
def test_no_held_out_answer_is_shown_in_training(seed):
    data = load_recipe("quickstart").data
    answers = {"train": set(), "validation": set(), "test": set()}
    sizes = Counter()
    for record in read_source("quickstart", seed):
        split = split_of(split_key(record.messages, record.group), data)
        answers[split].add(" ".join(record.messages[-1]["content"].split()))
        sizes[split] += 1
    assert not answers["train"] & (answers["validation"] | answers["test"])
    assert not answers["validation"] & answers["test"]
    assert abs(sizes["train"] - 370) <= 30
    assert abs(sizes["validation"] - 40) <= 15
    assert abs(sizes["test"] - 75) <= 20


def test_equal_answers_have_one_group_and_python_functions_too(rows):
    groups = {}
    for row in rows:
        question, answer = question_and_answer(row)
        assert groups.setdefault(answer, row["group"]) == row["group"], question
        if row["domain"] == "python":
            name = re.search(r"def (\w+)\(", answer)[1]
            assert row["group"] == f"quickstart/python/{name}"


def test_the_texts_are_short(rows):
    """A run's time is nearly proportional to its tokens: characters stand for them, digits count double."""
    texts = [text for row in rows for text in question_and_answer(row)]
    letters = sum(len(re.sub(r"\d", "", text)) for text in texts) / len(rows)
    digits = sum(len(re.findall(r"\d", text)) for text in texts) / len(rows)
    assert letters < 135
    assert digits < 9
