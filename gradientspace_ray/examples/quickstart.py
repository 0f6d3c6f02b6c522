"""The built-in mixture: four skills, written here, seeded, small enough for two CPU cores.

Every skill has many templates and vocabularies, so that its examples do not all look alike. Answers are computed, not
typed; functions run. Texts are short, because a run's time is nearly proportional to its tokens. `domain` is a label
for the evaluation only; `group` keeps near-duplicates in one split.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from gradientspace_ray.examples.quickstart_functions import FUNCTIONS, source_code
from gradientspace_ray.examples.quickstart_stories import (
    FIGURE_PROMPTS,
    FIGURES,
    HAPPENINGS,
    PLACE_OPENINGS,
    PLACE_PROMPTS,
    PLACES,
    WEATHER_OPENINGS,
    WEATHERS,
)

EXAMPLES_PER_SKILL = 120
Pair = tuple[str, str]
"""Prompt and response."""

NAMES = (
    *("Anna", "Boris", "Clara", "David", "Elena", "Frank", "Greta", "Hugo", "Iris", "Jonas", "Kim", "Luis"),
    *("Maria", "Nils", "Olga", "Paul", "Rita", "Rosa", "Sam", "Tom", "Uma", "Victor", "Wanda", "Zoe"),
)
GOODS = (
    *("apples", "notebooks", "candles", "pencils", "marbles", "lemons", "stamps", "postcards", "muffins", "tulips"),
    *("batteries", "buttons", "balloons", "cookies", "ribbons", "shells"),
)
WARES = ("lamp", "coat", "chair", "bicycle", "tent", "camera", "guitar", "clock", "table", "radio", "kettle", "carpet")
COMPANIES = (
    *("Alder Foods", "Baltic Shipping", "Copper Mining", "Delta Paper", "Ember Energy", "North Seafood"),
    *("Granite Homes", "Harbor Hotels", "Iris Optics", "Juniper Health", "Falcon Air", "Lumen Grid"),
)
STATEMENTS = (
    ("Cash", "Inventory", "Goodwill", "Land", "Buildings", "Securities"),
    ("Salaries", "Travel", "Research", "Marketing", "Energy", "Insurance"),
    ("Credit", "Bonds", "Mortgages", "Pensions", "Taxes", "Deposits"),
    ("Sales", "Services", "Interest", "Licenses", "Grants", "Dividends"),
)
"""Items that may stand in one table: assets, costs, debts, income."""
PERIODS = (
    *(("Q1", "Q2", "Q3"), ("Q2", "Q3", "Q4"), ("January", "February", "March"), ("April", "May", "June")),
    *(("July", "August", "September"), ("October", "November", "December")),
)
UNITS = (("$ million", "million"), ("EUR million", "million"), ("$ thousand", "thousand"))
"""As a table's heading and as an answer say it."""


class Drawn(NamedTuple):
    """One example, and the name that it shares with its near-duplicates."""

    prompt: str
    response: str
    group: str


def quickstart_examples(seed: int) -> list[dict[str, object]]:
    """The mixture: `EXAMPLES_PER_SKILL` distinct examples of each skill.

    Args:
        seed: another seed draws other numbers, names and sentences.

    Returns:
        Rows with `messages` (one question, one answer), the hidden `domain`, and `group`. No two prompts are equal,
        and equal answers have the same group, so that a split by group holds out answers that training never shows.
    """
    rows: list[dict[str, object]] = []
    for number, (domain, draw) in enumerate(SKILLS.items()):
        rng = np.random.default_rng([seed, number])
        prompts: set[str] = set()
        groups: dict[str, str] = {}
        while len(prompts) < EXAMPLES_PER_SKILL:
            prompt, response, group = draw(rng, len(prompts))
            if prompt in prompts or groups.setdefault(response, group) != group:
                continue
            prompts.add(prompt)
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            rows.append({"messages": messages, "domain": domain, "group": f"quickstart/{domain}/{group}"})
    return rows


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _two(rng: np.random.Generator, options: tuple[str, ...]) -> tuple[str, str]:
    first, second = rng.choice(len(options), 2, replace=False)
    return options[int(first)], options[int(second)]


def _integers(rng: np.random.Generator, *ranges: tuple[int, int]) -> tuple[int, ...]:
    """One number from each range, both ends included."""
    return tuple(int(rng.integers(low, high + 1)) for low, high in ranges)


def _arithmetic(rng: np.random.Generator, index: int) -> Drawn:
    """A word problem with its worked answer; the same computation told with other names is a near-duplicate."""
    prompt, response = PROBLEMS[index % len(PROBLEMS)](rng)
    return Drawn(prompt, response, group=" ".join(response.split()))


def _shopping(rng: np.random.Generator) -> Pair:
    count, price = _integers(rng, (3, 12), (2, 6))
    cost = count * price
    paid = next(note for note in (20, 50, 100) if note > cost)
    return (
        f"{_pick(rng, NAMES)} buys {count} {_pick(rng, GOODS)} at ${price} each. What is the change from ${paid}?",
        f"{count}*{price}={cost}\n{paid}-{cost}={paid - cost}\nAnswer: ${paid - cost}",
    )


def _sharing(rng: np.random.Generator) -> Pair:
    people, each, left = _integers(rng, (3, 9), (3, 14), (1, 2))
    shared = people * each
    return (
        f"{_pick(rng, NAMES)} shares {shared + left} {_pick(rng, GOODS)} among {people} friends. "
        "How many are left over?",
        f"{people}*{each}={shared}\n{shared + left}-{shared}={left}\nAnswer: {left}",
    )


def _travel(rng: np.random.Generator) -> Pair:
    hours, tens, more = _integers(rng, (2, 6), (4, 10), (5, 40))
    first = hours * tens * 10
    return (
        f"{_pick(rng, NAMES)} drives {hours} hours at {tens * 10} km/h, then {more} km more. How far is that?",
        f"{hours}*{tens * 10}={first}\n{first}+{more}={first + more}\nAnswer: {first + more} km",
    )


def _ages(rng: np.random.Generator) -> Pair:
    older, younger = _two(rng, NAMES)
    age, gap = _integers(rng, (5, 30), (2, 15))
    return (
        f"{younger} is {age}. {older} is {gap} years older. How old are they together?",
        f"{age}+{gap}={age + gap}\n{age}+{age + gap}={2 * age + gap}\nAnswer: {2 * age + gap}",
    )


def _discount(rng: np.random.Generator) -> Pair:
    price, percent = (number * scale for number, scale in zip(_integers(rng, (2, 12), (1, 10)), (20, 5), strict=True))
    off = price * percent // 100
    return (
        f"A {_pick(rng, WARES)} costs ${price}. What does it cost at {percent}% off?",
        f"{price}*{percent}/100={off}\n{price}-{off}={price - off}\nAnswer: ${price - off}",
    )


def _fence(rng: np.random.Generator) -> Pair:
    width, more, cost = _integers(rng, (3, 9), (1, 6), (2, 9))
    length = width + more
    around = 2 * (length + width)
    return (
        f"A garden is {length} m by {width} m. What does a fence at ${cost} a metre cost?",
        f"2*({length}+{width})={around}\n{around}*{cost}={around * cost}\nAnswer: ${around * cost}",
    )


def _saving(rng: np.random.Generator) -> Pair:
    start, weekly, weeks = _integers(rng, (10, 60), (3, 12), (3, 9))
    missing = weekly * weeks
    return (
        f"{_pick(rng, NAMES)} has ${start} and saves ${weekly} a week. How many weeks until ${start + missing}?",
        f"{start + missing}-{start}={missing}\n{missing}/{weekly}={weeks}\nAnswer: {weeks} weeks",
    )


def _seats(rng: np.random.Generator) -> Pair:
    rows, width, empty = _integers(rng, (4, 9), (8, 20), (3, 30))
    seats = rows * width
    return (
        f"A hall has {rows} rows of {width} seats. {empty} are empty. How many are taken?",
        f"{rows}*{width}={seats}\n{seats}-{empty}={seats - empty}\nAnswer: {seats - empty}",
    )


def _jar(rng: np.random.Generator) -> Pair:
    fives, twos = _integers(rng, (2, 15), (2, 15))
    money = 5 * fives + 2 * twos
    return (
        f"{_pick(rng, NAMES)} has {fives} notes of $5 and {twos} coins of $2. How much money is that?",
        f"{fives}*5={5 * fives}\n{twos}*2={2 * twos}\n{5 * fives}+{2 * twos}={money}\nAnswer: ${money}",
    )


def _baking(rng: np.random.Generator) -> Pair:
    eggs, cakes, left = _integers(rng, (2, 6), (2, 9), (1, 20))
    used = cakes * eggs
    return (
        f"A cake takes {eggs} eggs. How many of {used + left} eggs are left after {cakes} cakes?",
        f"{cakes}*{eggs}={used}\n{used + left}-{used}={left}\nAnswer: {left}",
    )


def _average(rng: np.random.Generator) -> Pair:
    mean, below, above = _integers(rng, (10, 60), (1, 9), (1, 9))
    first, second, third = mean - below, mean + above, mean + below - above
    return (
        f"{_pick(rng, NAMES)} scores {first}, {second} and {third} points. What is the average?",
        f"{first}+{second}+{third}={3 * mean}\n{3 * mean}/3={mean}\nAnswer: {mean}",
    )


def _tank(rng: np.random.Generator) -> Pair:
    fill, leak, minutes = _integers(rng, (10, 30), (2, 8), (3, 9))
    gain = fill - leak
    return (
        f"A tank gains {fill} litres and loses {leak} every minute. How much does it gain in {minutes} minutes?",
        f"{fill}-{leak}={gain}\n{minutes}*{gain}={minutes * gain}\nAnswer: {minutes * gain} litres",
    )


def _reading(rng: np.random.Generator) -> Pair:
    read, daily, days = _integers(rng, (11, 60), (4, 12), (3, 9))
    rest = daily * days
    return (
        f"{_pick(rng, NAMES)} is on page {read} of {read + rest} and reads {daily} a day. How many days are left?",
        f"{read + rest}-{read}={rest}\n{rest}/{daily}={days}\nAnswer: {days} days",
    )


def _wages(rng: np.random.Generator) -> Pair:
    hours, wage, rent = _integers(rng, (2, 9), (10, 25), (3, 19))
    earned = hours * wage
    return (
        f"{_pick(rng, NAMES)} works {hours} hours at ${wage} and spends ${rent}. How much is left?",
        f"{hours}*{wage}={earned}\n{earned}-{rent}={earned - rent}\nAnswer: ${earned - rent}",
    )


PROBLEMS: tuple[Callable[[np.random.Generator], Pair], ...] = (
    *(_shopping, _sharing, _travel, _ages, _discount, _fence, _saving, _seats, _jar, _baking, _average, _tank),
    *(_reading, _wages),
)

PYTHON_PROMPTS = (
    "Write a Python function that {task}.",
    "Implement `{name}` in Python: it {task}.",
    "I need a Python function that {task}.",
    "Python: define {name}, which {task}.",
    "Show me Python code that {task}.",
    "Define a Python function {name} that {task}.",
)


def _python(rng: np.random.Generator, index: int) -> Drawn:
    """A small function from its description; the same function asked for in other words is a near-duplicate."""
    name, task, body = FUNCTIONS[index % len(FUNCTIONS)]
    prompt = _pick(rng, PYTHON_PROMPTS).format(name=name, task=task)
    return Drawn(prompt, f"```python\n{source_code(name, body)}\n```", group=name)


class Table(NamedTuple):
    """Three figures of one company: one item over time, or three items at one time."""

    title: str
    labels: tuple[str, str, str]
    amounts: tuple[int, ...]
    """No two are equal."""
    group: str

    def text(self, company: str, heading: str, layout: tuple[str, str]) -> str:
        """A line for the title, then the figures."""
        cell, between = layout
        cells = [cell.format(*figure) for figure in zip(self.labels, self.amounts, strict=True)]
        return f"{company}, {self.title}, {heading}\n{between.join(cells)}"


def _amounts(rng: np.random.Generator) -> tuple[int, ...]:
    return tuple(int(amount) for amount in rng.choice(np.arange(31, 100), 3, replace=False))


def _over_time(rng: np.random.Generator) -> tuple[Table, tuple[int, int]]:
    """One item in three periods, and two of the periods, the earlier one first."""
    item = _pick(rng, STATEMENTS[int(rng.integers(len(STATEMENTS)))])
    start, end = sorted(int(place) for place in rng.choice(3, 2, replace=False))
    return Table(item.lower(), PERIODS[int(rng.integers(len(PERIODS)))], _amounts(rng), item), (start, end)


def _by_item(rng: np.random.Generator) -> tuple[Table, tuple[int, int]]:
    """Three items in one period, and two of the items."""
    chosen = rng.permutation(STATEMENTS[int(rng.integers(len(STATEMENTS)))]).tolist()[:3]
    period = _pick(rng, PERIODS[int(rng.integers(len(PERIODS)))])
    one, other = (int(place) for place in rng.choice(3, 2, replace=False))
    return Table(period, tuple(chosen), _amounts(rng), "+".join(sorted(chosen))), (one, other)


def _time_question(kind: int, table: Table, places: tuple[int, int], unit: str) -> Pair:
    """A question on one item over time."""
    start, end = (table.amounts[place] for place in places)
    before, after = (table.labels[place] for place in places)
    item, total, highest = table.title, sum(table.amounts), max(table.amounts)
    terms = "+".join(map(str, table.amounts))
    return (
        (f"What is the change from {before} to {after}?", f"{end}-{start}={end - start} {unit}"),
        (
            f"By what percentage did {item} change from {before} to {after}?",
            f"({end}-{start})/{start}={(end - start) / start:.1%}",
        ),
        ("What is the average?", f"({terms})/3={total / 3:.1f} {unit}"),
        ("What is the total?", f"{terms}={total} {unit}"),
        ("Which figure is the highest?", f"{table.labels[table.amounts.index(highest)]}, with {highest} {unit}."),
        (
            f"Did {item} rise or fall from {before} to {after}?",
            f"{item.capitalize()} {'rose' if end > start else 'fell'} by {abs(end - start)} {unit}.",
        ),
        (f"What is the figure for {after}?", f"{end} {unit}"),
        (f"What would {after} be with 10% more?", f"{end}*1.1={end * 1.1:.1f} {unit}"),
    )[kind]


def _item_question(kind: int, table: Table, places: tuple[int, int], unit: str) -> Pair:
    """A question on items beside each other."""
    one, other = (table.amounts[place] for place in places)
    first, second = (table.labels[place].lower() for place in places)
    more, less, total, highest = max(one, other), min(one, other), sum(table.amounts), max(table.amounts)
    terms = "+".join(map(str, table.amounts))
    return (
        (f"What is the gap between {first} and {second}?", f"{more}-{less}={more - less} {unit}"),
        (f"What is the ratio of {first} to {second}?", f"{one}/{other}={one / other:.2f}"),
        (f"What is the share of {first} in the total?", f"{one}/({terms})={one / total:.1%}"),
        (f"What do {first} and {second} add up to?", f"{one}+{other}={one + other} {unit}"),
        ("Which item is the largest?", f"{table.labels[table.amounts.index(highest)]}, with {highest} {unit}."),
        (
            f"Which is larger, {first} or {second}?",
            f"{(first if one > other else second).capitalize()}, by {more}-{less}={more - less} {unit}.",
        ),
        (f"What is the figure for {first}?", f"{one} {unit}"),
        ("What is the total of all items?", f"{terms}={total} {unit}"),
    )[kind]


QUESTION_KINDS = 8
"""Of each of the two shapes of table."""
TABLE_LAYOUTS = (("{}|{}", "\n"), ("{} {}", " | "))
"""A cell, and what stands between cells."""
FINANCE_LAYOUTS = ("{table}\n{question}", "{question}\n{table}", "{table}\n\n{question}", "{question}\n\n{table}")


def _finance(rng: np.random.Generator, index: int) -> Drawn:
    """A question on a small table, answered with the computation; a company's same items are near-duplicates."""
    company, (heading, unit) = _pick(rng, COMPANIES), UNITS[int(rng.integers(len(UNITS)))]
    kind, is_by_item = divmod(index % (2 * QUESTION_KINDS), 2)
    table, places = _by_item(rng) if is_by_item else _over_time(rng)
    question, answer = (_item_question if is_by_item else _time_question)(kind, table, places, unit)
    text = table.text(company, heading, TABLE_LAYOUTS[int(rng.integers(len(TABLE_LAYOUTS)))])
    prompt = _pick(rng, FINANCE_LAYOUTS).format(table=text, question=question)
    return Drawn(prompt, answer, group=f"{company}/{table.group}")


def _story(rng: np.random.Generator, index: int) -> Drawn:
    """The opening of a story; one that begins in the same way with the same figure is a near-duplicate."""
    figure, place, weather = _pick(rng, FIGURES), _pick(rng, PLACES), _pick(rng, WEATHERS)
    prompts = (*PLACE_PROMPTS, *FIGURE_PROMPTS)
    prompt = prompts[index % len(prompts)]
    # Who asks for a place gets an opening that names it.
    openings = PLACE_OPENINGS if prompt in PLACE_PROMPTS else (*PLACE_OPENINGS, *WEATHER_OPENINGS)
    opening = _pick(rng, openings).replace("{figure}", figure)
    start = opening.format(place=place, weather=weather)
    response = f"{start[0].upper()}{start[1:]} {_pick(rng, HAPPENINGS)}"
    return Drawn(prompt.format(figure=figure, place=place), response, group=opening)


SKILLS: dict[str, Callable[[np.random.Generator, int], Drawn]] = {
    "arithmetic": _arithmetic,
    "python": _python,
    "finance": _finance,
    "story": _story,
}
