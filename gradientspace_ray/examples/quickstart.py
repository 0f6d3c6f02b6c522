"""The built-in mixture: four skills, written here, seeded, small enough for two CPU cores.

Every skill has many templates and vocabularies, so that its examples do not all look alike. Answers are computed, not
typed; functions run. `domain` is a label for the evaluation only.
"""

from collections.abc import Callable

import numpy as np

from gradientspace_ray.examples.quickstart_functions import FUNCTIONS, source_code
from gradientspace_ray.examples.quickstart_stories import (
    ENDINGS,
    FIGURES,
    HAPPENINGS,
    OPENINGS,
    PLACES,
    STORY_PROMPTS,
    WEATHERS,
)

EXAMPLES_PER_SKILL = 120
Pair = tuple[str, str]
"""Prompt and response."""

NAMES = (
    *("Amina", "Boris", "Chiara", "Dmitri", "Elena", "Farid", "Grete", "Hugo", "Ines", "Jonas", "Keiko", "Luis"),
    *("Mara", "Nils", "Olga", "Pavel", "Qiu", "Rosa", "Samir", "Tove", "Uma", "Victor", "Wanda", "Yusuf"),
)
GOODS = (
    *("apples", "notebooks", "candles", "tickets", "marbles", "lemons", "stamps", "postcards", "muffins", "tulips"),
    *("batteries", "buttons", "bricks", "eggs", "ribbons", "shells"),
)
COMPANIES = (
    *("Alder Foods", "Bluefin Shipping", "Cobalt Mining", "Delta Paper", "Ember Energy", "Fjord Seafood"),
    *("Granite Homes", "Harbor Bank", "Iris Optics", "Juniper Health", "Kestrel Air", "Lumen Grid"),
)
LINES = (
    *("Revenue", "Cost of sales", "Operating expenses", "Research", "Marketing", "Interest", "Deferred tax"),
    *("Inventories", "Receivables", "Goodwill", "Cash", "Long-term debt", "Dividends", "Lease liabilities"),
)


def quickstart_examples(seed: int) -> list[dict[str, object]]:
    """The mixture: `EXAMPLES_PER_SKILL` distinct examples of each skill.

    Args:
        seed: another seed draws other numbers, names and sentences.

    Returns:
        Rows with `messages` (one question, one answer) and the hidden `domain`.
    """
    rows: list[dict[str, object]] = []
    for number, (domain, draw) in enumerate(SKILLS.items()):
        rng = np.random.default_rng([seed, number])
        seen: set[str] = set()
        while len(seen) < EXAMPLES_PER_SKILL:
            prompt, response = draw(rng, len(seen))
            if prompt in seen:
                continue
            seen.add(prompt)
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            rows.append({"messages": messages, "domain": domain})
    return rows


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _two(rng: np.random.Generator, options: tuple[str, ...]) -> tuple[str, str]:
    first, second = rng.choice(len(options), 2, replace=False)
    return options[int(first)], options[int(second)]


def _arithmetic(rng: np.random.Generator, index: int) -> Pair:
    """A word problem with its worked answer."""
    return PROBLEMS[index % len(PROBLEMS)](rng)


def _shopping(rng: np.random.Generator) -> Pair:
    who, goods = _pick(rng, NAMES), _pick(rng, GOODS)
    count, price, paid = int(rng.integers(3, 12)), int(rng.integers(2, 9)), int(rng.integers(100, 130))
    total = count * price
    return (
        f"{who} buys {count} {goods} at ${price} each and pays with ${paid}. How much change does {who} get?",
        f"The {goods} cost {count} * {price} = ${total}.\nThe change is {paid} - {total} = ${paid - total}.\n"
        f"Answer: {paid - total}",
    )


def _sharing(rng: np.random.Generator) -> Pair:
    who, goods = _pick(rng, NAMES), _pick(rng, GOODS)
    people, each, left = int(rng.integers(3, 9)), int(rng.integers(4, 15)), int(rng.integers(1, 3))
    total = people * each + left
    return (
        f"There are {total} {goods}. {who} divides them equally among {people} friends. "
        f"How many does each friend get, and how many are left over?",
        f"{total} divided by {people} is {each} with remainder {left}, because {people} * {each} = {people * each}.\n"
        f"Answer: {each} each, {left} left over",
    )


def _travel(rng: np.random.Generator) -> Pair:
    who, speed, hours = _pick(rng, NAMES), int(rng.integers(4, 20)) * 5, int(rng.integers(2, 7))
    extra = int(rng.integers(5, 40))
    return (
        f"{who} drives {hours} hours at {speed} km per hour and then {extra} km more. How far is the whole trip?",
        f"First part: {hours} * {speed} = {hours * speed} km.\nWhole trip: {hours * speed} + {extra} = "
        f"{hours * speed + extra} km.\nAnswer: {hours * speed + extra}",
    )


def _age(rng: np.random.Generator) -> Pair:
    (older, younger), age, gap = _two(rng, NAMES), int(rng.integers(5, 30)), int(rng.integers(2, 15))
    later = int(rng.integers(3, 20))
    return (
        f"{older} is {gap} years older than {younger}, who is {age}. What will their ages add up to in {later} years?",
        f"{older} is {age} + {gap} = {age + gap} now.\nIn {later} years they are {age + later} and "
        f"{age + gap + later}.\nTogether: {age + later} + {age + gap + later} = {2 * age + gap + 2 * later}.\n"
        f"Answer: {2 * age + gap + 2 * later}",
    )


def _percent(rng: np.random.Generator) -> Pair:
    goods, price, off = _pick(rng, GOODS), int(rng.integers(2, 20)) * 20, int(rng.integers(1, 10)) * 5
    saved = price * off // 100
    return (
        f"A crate of {goods} costs ${price}. The shop takes {off}% off. What is the price now?",
        f"{off}% of {price} is {price} * {off} / 100 = {saved}.\nThe price is {price} - {saved} = ${price - saved}.\n"
        f"Answer: {price - saved}",
    )


def _area(rng: np.random.Generator) -> Pair:
    length, width, cost = (int(value) for value in rng.integers(3, 15, 3))
    return (
        f"A garden is {length} m long and {width} m wide. A fence costs ${cost} per metre. What does a fence around it "
        "cost?",
        f"Perimeter: 2 * ({length} + {width}) = {2 * (length + width)} m.\nCost: {2 * (length + width)} * {cost} = "
        f"${2 * (length + width) * cost}.\nAnswer: {2 * (length + width) * cost}",
    )


def _saving(rng: np.random.Generator) -> Pair:
    who, week, start = _pick(rng, NAMES), int(rng.integers(5, 30)), int(rng.integers(10, 60))
    weeks = int(rng.integers(3, 12))
    goal = start + week * weeks
    return (
        f"{who} has ${start} and saves ${week} every week. After how many weeks does {who} have ${goal}?",
        f"Still needed: {goal} - {start} = ${goal - start}.\nWeeks: {goal - start} / {week} = {weeks}.\n"
        f"Answer: {weeks}",
    )


def _rows_of_seats(rng: np.random.Generator) -> Pair:
    rows, seats = int(rng.integers(6, 20)), int(rng.integers(8, 25))
    empty = int(rng.integers(3, 40))
    return (
        f"A hall has {rows} rows with {seats} seats. {empty} seats stay empty. How many people came?",
        f"Seats: {rows} * {seats} = {rows * seats}.\nPeople: {rows * seats} - {empty} = {rows * seats - empty}.\n"
        f"Answer: {rows * seats - empty}",
    )


def _mixture_of_coins(rng: np.random.Generator) -> Pair:
    who, fives, twos = _pick(rng, NAMES), int(rng.integers(2, 15)), int(rng.integers(2, 15))
    return (
        f"In {who}'s jar are {fives} five-dollar notes and {twos} two-dollar coins. How much money is in the jar?",
        f"Notes: {fives} * 5 = {fives * 5}.\nCoins: {twos} * 2 = {twos * 2}.\nSum: {fives * 5} + {twos * 2} = "
        f"{fives * 5 + twos * 2}.\nAnswer: {fives * 5 + twos * 2}",
    )


def _baking(rng: np.random.Generator) -> Pair:
    who, grams, cakes = _pick(rng, NAMES), int(rng.integers(5, 20)) * 25, int(rng.integers(2, 8))
    bag = int(rng.integers(4, 10)) * 1000
    return (
        f"One cake takes {grams} g of flour. {who} bakes {cakes} cakes from a bag of {bag} g. How much flour remains?",
        f"Used: {cakes} * {grams} = {cakes * grams} g.\nRemaining: {bag} - {cakes * grams} = {bag - cakes * grams} g.\n"
        f"Answer: {bag - cakes * grams}",
    )


def _average(rng: np.random.Generator) -> Pair:
    who, first, second = _pick(rng, NAMES), int(rng.integers(40, 90)), int(rng.integers(40, 90))
    third = 3 * int(rng.integers(50, 80)) - (first + second) % 3
    third -= (first + second + third) % 3
    total = first + second + third
    return (
        f"{who} scored {first}, {second} and {third} points in three rounds. What is the average?",
        f"Sum: {first} + {second} + {third} = {total}.\nAverage: {total} / 3 = {total // 3}.\nAnswer: {total // 3}",
    )


def _tank(rng: np.random.Generator) -> Pair:
    fill, drain, minutes = int(rng.integers(10, 30)), int(rng.integers(2, 9)), int(rng.integers(5, 40))
    return (
        f"A tap fills a tank with {fill} litres a minute while {drain} litres a minute leak out. How full is the empty "
        f"tank after {minutes} minutes?",
        f"Each minute adds {fill} - {drain} = {fill - drain} litres.\nAfter {minutes} minutes: {minutes} * "
        f"{fill - drain} = {minutes * (fill - drain)} litres.\nAnswer: {minutes * (fill - drain)}",
    )


PROBLEMS: tuple[Callable[[np.random.Generator], Pair], ...] = (
    *(_shopping, _sharing, _travel, _age, _percent, _area, _saving, _rows_of_seats, _mixture_of_coins, _baking),
    *(_average, _tank),
)

PYTHON_PROMPTS = (
    "Write a Python function that {task}.",
    "Implement `{name}` in Python: a function that {task}.",
    "I need a Python function called {name} which {task}.",
    "Python: define {name} so that it {task}.",
    "Can you give me Python code for a function that {task}?",
    "Complete this Python task. Create a function `{name}` that {task}.",
)


def _python(rng: np.random.Generator, index: int) -> Pair:
    """A small function from its description."""
    name, task, body = FUNCTIONS[index % len(FUNCTIONS)]
    return _pick(rng, PYTHON_PROMPTS).format(name=name, task=task), f"```python\n{source_code(name, body)}\n```"


def _table(rng: np.random.Generator) -> tuple[str, str, str, int, dict[str, tuple[int, int]]]:
    """(company, unit, text of the table, later year, line -> amounts in the two years)."""
    company, unit, year = _pick(rng, COMPANIES), _pick(rng, ("$ million", "EUR million", "$ thousand")), 2015
    year += int(rng.integers(0, 9))
    names = [LINES[int(choice)] for choice in rng.choice(len(LINES), 2, replace=False)]
    amounts = {name: (int(rng.integers(40, 900)), int(rng.integers(40, 900))) for name in names}
    lines = [f"{name} | {before} | {after}" for name, (before, after) in amounts.items()]
    return company, unit, "\n".join([f"Item | {year - 1} | {year}", *lines]), year, amounts


def _finance(rng: np.random.Generator, index: int) -> Pair:
    """A question on a small table of figures, answered with the computation."""
    company, unit, table, year, amounts = _table(rng)
    (line, (before, after)), (other, (_, other_after)) = amounts.items()
    change = after - before
    word = "rose" if change > 0 else "fell"
    questions = (
        (f"What was the change in {line.lower()} from {year - 1} to {year}?", f"{after} - {before} = {change} {unit}"),
        (f"By what percentage did {line.lower()} change?", f"({after} - {before}) / {before} = {change / before:.1%}"),
        (
            f"What is the average {line.lower()} over both years?",
            f"({before} + {after}) / 2 = {(before + after) / 2:g} {unit}",
        ),
        (
            f"In {year}, how much larger is {line.lower()} than {other.lower()}?",
            f"{after} - {other_after} = {after - other_after} {unit}",
        ),
        (
            f"What is the ratio of {line.lower()} to {other.lower()} in {year}?",
            f"{after} / {other_after} = {after / other_after:.2f}",
        ),
        (f"Did {line.lower()} rise or fall, and by how much?", f"It {word} by {abs(change)} {unit}."),
        (
            f"What do {line.lower()} and {other.lower()} add up to in {year}?",
            f"{after} + {other_after} = {after + other_after} {unit}",
        ),
        (f"What was {line.lower()} in {year - 1}?", f"{before} {unit}"),
        (
            f"Which item was larger in {year}?",
            f"{line if after >= other_after else other}, {max(after, other_after)} {unit}",
        ),
        (f"What was the two-year total of {line.lower()}?", f"{before} + {after} = {before + after} {unit}"),
        (
            f"If {line.lower()} grows by 10% next year, what will it be?",
            f"{after} * 1.1 = {after * 1.1:.1f} {unit}",
        ),
        (
            f"What share of the {year} total is {line.lower()}?",
            f"{after} / {after + other_after} = {after / (after + other_after):.1%}",
        ),
    )
    question, answer = questions[index % len(questions)]
    layouts = (
        "{company} ({unit})\n{table}\n\n{question}",
        "{question}\n\n{company}, figures in {unit}:\n{table}",
        "Use the table of {company} ({unit}) to answer: {question}\n{table}",
    )
    return _pick(rng, layouts).format(company=company, unit=unit, table=table, question=question), answer


def _story(rng: np.random.Generator, index: int) -> Pair:
    """The opening of a story."""
    figure, place = _pick(rng, FIGURES), _pick(rng, PLACES)
    weather, ending = _pick(rng, WEATHERS), _pick(rng, ENDINGS)
    prompt = STORY_PROMPTS[index % len(STORY_PROMPTS)].format(figure=figure, place=place)
    parts = {"figure": figure, "place": place, "weather": weather}
    opening, happening = _pick(rng, OPENINGS).format(**parts), _pick(rng, HAPPENINGS).format(**parts)
    return prompt, f"{opening[0].upper()}{opening[1:]} {happening} {ending}"


SKILLS: dict[str, Callable[[np.random.Generator, int], Pair]] = {
    "arithmetic": _arithmetic,
    "python": _python,
    "finance": _finance,
    "story": _story,
}
