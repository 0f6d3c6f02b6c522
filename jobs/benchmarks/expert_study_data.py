"""Whose losses the study of experts compares, and which examples each contender trains on: all pure functions.

Every contender sees each training example once, so that all train on equally many tokens, to the token. The examples
have one random order; a generalist of the share g takes the beginning, g of the examples, and the experts have the
rest, each those of its own domain or cluster.
"""

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from gradient_task import SEED, TaskError

from gradientspace_ray.examples.formats import Record, Rejected, read_source
from gradientspace_ray.examples.packing import Example
from gradientspace_ray.examples.rendering import Renderer, RenderingError, prompt_view
from gradientspace_ray.models.loading import load_tokenizer
from gradientspace_ray.recipe import RouterSection

TEST_FILE = ".test."
HELD_OUT_SHARE = 0.2
"""Of the rows of each domain, in a folder whose files do not say which are held out."""
Group = TypeVar("Group", str, int)


class Labelled(NamedTuple):
    """An example, what it is about, and what the router sees of it."""

    example: Example
    domain: str
    prompt: str

    @property
    def tokens(self) -> int:
        """Prompt and answer."""
        return len(self.example[0])


class Parts(NamedTuple):
    """Three disjoint parts of the data."""

    training: list[Labelled]
    """In the random order that decides who trains on what."""
    validation: list[Labelled]
    """What learning rates are chosen on: as many of each domain, as long as those trained on."""
    held_out: list[Labelled]
    """What the contenders are judged on: as many of each domain, in the order of the domains."""

    @property
    def domains(self) -> list[str]:
        """Names in the order of the alphabet."""
        return sorted({row.domain for row in self.training})


def read_parts(data: str, model: str, examples: int, validation: int, held_out: int) -> Parts:
    """The shortest examples of each domain, so that the study takes an hour and not four.

    Each domain gets about equally many training tokens: the next example goes to the domain that has the fewest so far,
    and is the shortest it has left. The held-out examples are the shortest of the files with `.test.` in their names;
    where there are none, of a random fifth of each domain's rows. A row without a domain is of the domain that its file
    is named after.

    Args:
        data: a folder of JSONL files.
        model: whose tokenizer reads them.
        examples: to train on, of all domains together.
        validation: of each domain.
        held_out: of each domain.

    Raises:
        TaskError: there are fewer.
        SourceError: `data` cannot be read.
    """
    training_rows, test_rows = _read(data, model)
    if not test_rows:
        training_rows, test_rows = _held_out(training_rows)
    lengths = {domain: [row.tokens for row in rows[validation:]] for domain, rows in training_rows.items()}
    counts = even_counts(lengths, examples)
    draw = random.Random(SEED)
    parts = Parts([], [], [])
    for domain, count in sorted(counts.items()):
        tests = test_rows.get(domain, [])
        if len(tests) < held_out:
            raise TaskError(f"{data}: {len(tests)} held-out rows of {domain}, needed are {held_out}")
        parts.held_out.extend(tests[:held_out])
        chosen = training_rows[domain][: count + validation]
        draw.shuffle(chosen)
        parts.validation.extend(chosen[:validation])
        parts.training.extend(chosen[validation:])
    draw.shuffle(parts.training)
    return parts


def _read(data: str, model: str) -> tuple[dict[str, list[Labelled]], dict[str, list[Labelled]]]:
    """Rows of files for training and of files for tests, by domain, the shortest first."""
    renderer = Renderer(load_tokenizer(model))
    found: tuple[dict[str, list[Labelled]], dict[str, list[Labelled]]] = (defaultdict(list), defaultdict(list))
    for row in read_source(data):
        if isinstance(row, Rejected):
            print(f"{row.place}: left out, {row.reason}")
            continue
        assert isinstance(row, Record)
        try:
            rendered = renderer.example(row.messages)
        except RenderingError as error:
            print(f"{row.place}: left out, {error}")
            continue
        domain = row.domain or Path(row.source).name.split(".")[0]
        prompt = prompt_view(row.messages, RouterSection().view)
        rows = found[TEST_FILE in Path(row.source).name][domain]
        rows.append(Labelled((rendered.input_ids, rendered.labels), domain, prompt))
    for part in found:
        for rows in part.values():
            rows.sort(key=lambda one: one.tokens)
    return found


def _held_out(rows: Mapping[str, list[Labelled]]) -> tuple[dict[str, list[Labelled]], dict[str, list[Labelled]]]:
    draw = random.Random(SEED)
    parts: tuple[dict[str, list[Labelled]], dict[str, list[Labelled]]] = ({}, {})
    for domain, ordered in sorted(rows.items()):
        taken = set(draw.sample(range(len(ordered)), round(HELD_OUT_SHARE * len(ordered))))
        for part, belongs in zip(parts, (False, True), strict=True):
            part[domain] = [row for place, row in enumerate(ordered) if (place in taken) == belongs]
    return parts


def even_counts(lengths: Mapping[str, Sequence[int]], count: int) -> dict[str, int]:
    """How many examples of each domain, so that all have about as many tokens.

    Args:
        lengths: tokens of each domain's examples, ascending.
        count: of all domains together.

    Raises:
        TaskError: there are fewer.
    """
    if count > sum(map(len, lengths.values())):
        raise TaskError(f"there are {sum(map(len, lengths.values()))} examples to train on, needed are {count}")
    counts, tokens = dict.fromkeys(lengths, 0), dict.fromkeys(lengths, 0)
    for _ in range(count):
        open_domains = [domain for domain in sorted(lengths) if counts[domain] < len(lengths[domain])]
        domain = min(open_domains, key=lambda domain: tokens[domain])
        tokens[domain] += lengths[domain][counts[domain]]
        counts[domain] += 1
    return counts


def between(count: int, start: float, stop: float) -> range:
    """Places of the examples from one share of all to another."""
    return range(round(count * start), round(count * stop))


def by_group(places: Sequence[int], groups: Sequence[Group]) -> dict[Group, list[int]]:
    """Group -> its places, in their order; a group that has none is there too, and empty.

    Args:
        places: of some of the examples.
        groups: of all examples.
    """
    found: dict[Group, list[int]] = {group: [] for group in sorted(set(groups))}
    for place in places:
        found[groups[place]].append(place)
    return found
