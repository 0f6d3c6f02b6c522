"""The page: what a run found, as one HTML file that needs nothing else."""

from dataclasses import dataclass, field

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

ENVIRONMENT = Environment(
    loader=PackageLoader("gradientspace_ray", "report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


@dataclass(frozen=True)
class Headline:
    """A number that a reader should see first."""

    value: str
    label: str
    note: str = ""


@dataclass(frozen=True)
class Legend:
    """A colour and what it stands for."""

    name: str
    colour: str
    group: int


@dataclass(frozen=True)
class Typical:
    """A typical example of a cluster, shortened."""

    prompt: str
    response: str


@dataclass(frozen=True)
class ClusterCard:
    """One cluster for people."""

    name: str
    colour: str
    size: int
    share: float
    tokens: int | None = None
    terms: tuple[str, ...] = ()
    coherence: float | None = None
    note: str = ""
    """A sentence on what sets it apart, when that is not its words."""
    composition: tuple[tuple[str, str, float], ...] = ()
    """(domain, colour, share), the largest first."""
    typical: tuple[Typical, ...] = ()


@dataclass(frozen=True)
class Figure:
    """An SVG with a heading and a sentence on how to read it."""

    title: str
    svg: str
    caption: str = ""


@dataclass(frozen=True)
class Table:
    """Texts under headings; the first of a row names it."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page that shows facts side by side, and figures one below the other, then a table."""

    anchor: str
    title: str
    text: str = ""
    figures: tuple[Figure, ...] = ()
    facts: tuple[Headline, ...] = ()
    table: Table | None = None


@dataclass(frozen=True)
class Map:
    """The map of gradient space with its legends."""

    svg: str
    caption: str
    clusters: tuple[Legend, ...]
    domains: tuple[Legend, ...] = ()


@dataclass(frozen=True)
class Page:
    """Everything that the page shows; what is empty is left out."""

    name: str
    subtitle: str
    summary: str
    headlines: tuple[Headline, ...] = ()
    results: Section | None = None
    map: Map | None = None
    spectrum: Section | None = None
    clusters: tuple[ClusterCard, ...] = ()
    worth: Section | None = None
    training: Section | None = None
    matrix: Section | None = None
    router: Section | None = None
    stages: Section | None = None
    footer: tuple[tuple[str, str], ...] = field(default=())
    """Facts at the foot, as (name, value)."""


def render(page: Page) -> str:
    """The whole HTML document; every text is escaped, figures are inserted as they are."""
    return ENVIRONMENT.get_template("page.html").render(page=page, Markup=Markup)


def duration(seconds: float) -> str:
    """A time as people say it."""
    return f"{seconds / 60:.1f} min" if seconds >= 100 else f"{seconds:.1f} s"


def shorten(text: str, characters: int) -> str:
    """The text, or as much of it as leaves room for an ellipsis."""
    return text if len(text) <= characters else text[: characters - 1].rstrip() + "…"
