"""The contenders of the study of experts, and which tasks make them.

Shapes: N held-out examples, E experts.
"""

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from expert_study_data import Labelled, Parts, between, by_group
from expert_study_desk import Desk, Tell
from expert_study_worker import TRAINING, Clusters, Finetune, Losses, Route

from gradientspace_ray.training.schedule import WHOLE_COSINE, scaled_rate

CLUSTERED_AT = 0.5
"""Share of the generalist whose gradients are clustered."""
LEARNING_RATES = {8: (1e-3, 2e-3, 4e-3), 2: (5e-4, 1e-3, 2e-3)}
"""Examples of an optimizer step -> what is tried first; while the best of all is at an end, the next one beyond."""
TRIED_SHARES = {8: 0.25, 2: 0.125}
"""Examples of an optimizer step -> share of the budget that a try has: of the smaller steps, it has twice as many."""
URGENT, SOON, LATE = 0, 2, 100


class Setting(NamedTuple):
    """How the budget is spent."""

    generalist: float
    """The generalist's share; 0: the experts begin with fresh adapters."""
    examples_per_step: int
    """Of the experts."""

    def __str__(self) -> str:
        start = f"generalist {self.generalist:g}" if self.generalist else "fresh adapters"
        return f"{start}, experts {1 - self.generalist:g}, {self.examples_per_step} a step"


SETTINGS = (Setting(0.5, 2), Setting(0.75, 2), Setting(0.25, 2), Setting(0.5, 8), Setting(0, 2))


class Adapter(NamedTuple):
    """A finetune that is done."""

    key: str | None = None
    """None: the base model."""
    steps: int = 0
    tokens: int = 0


class Contender(NamedTuple):
    """What served the held-out examples, and how it was made."""

    losses_N: np.ndarray
    learning_rate: float | None
    """Of the single LoRA, of the generalist alone, or of the experts; None: the base model."""
    start: Adapter
    """The single LoRA, or what the experts began with."""
    experts: Mapping[str, Adapter]
    setting: Setting | None = None

    @property
    def tokens(self) -> int:
        """Trained on, by all together."""
        return self.start.tokens + sum(expert.tokens for expert in self.experts.values())


class _Plan(NamedTuple):
    """What the experts of a setting need."""

    setting: Setting
    urgency: float
    start: Adapter
    learning_rate: float


class Study:
    """All contenders, made as their parts come to be.

    Attributes:
        contenders: by name, in the order in which they were done.
        tries: whose learning rate -> rate -> validation loss.
        clusters: what is known of them.
    """

    def __init__(self, parts: Parts, settings: Sequence[Setting], desk: Desk, tell: Tell) -> None:
        self.parts, self._settings = parts, settings
        self._desk, self._tell = desk, tell
        self.contenders: dict[str, Contender] = {}
        self.tries: dict[str, dict[str, float]] = {}
        self.clusters: dict[str, Any] = {}
        self._domains = [row.domain for row in parts.training]
        self._single_rates: dict[int, asyncio.Task[float]] = {}

    async def run(self) -> None:
        """Ask for everything at once; what comes first in the settings is the most urgent."""
        batches = [TRAINING.examples_per_step, *(setting.examples_per_step for setting in self._settings)]
        shares = [setting.generalist for setting in self._settings if setting.generalist]
        for place, batch in enumerate(dict.fromkeys(batches)):
            urgency = SOON + place if place else URGENT  # the generalist waits for the first
            self._single_rates[batch] = asyncio.create_task(self._single_rate(urgency, batch))
        labels = asyncio.create_task(self._cluster())
        work: list[Awaitable[Any]] = [labels, self._judge("base", None, Adapter(), SOON)]
        work += [self._single_lora(SOON + place, batch) for place, batch in enumerate(self._single_rates)]
        work += [self._generalist_alone(SOON + place, share) for place, share in enumerate(dict.fromkeys(shares))]
        for place, setting in enumerate(self._settings):
            # What the oracle needs goes before the last setting, and after all others.
            urgency = SOON + place + (2 * LATE if not setting.generalist else 0)
            work.append(self._setting(urgency, setting, labels))
        await asyncio.gather(*work)

    def means(self, name: str) -> dict[str, float]:
        """Domain -> a contender's mean loss, and `mean` over all held-out examples."""
        losses_N = self.contenders[name].losses_N
        domains_N = np.array([row.domain for row in self.parts.held_out])
        means = {domain: float(losses_N[domains_N == domain].mean()) for domain in self.parts.domains}
        return means | {"mean": float(losses_N.mean())}

    async def _finetune(
        self,
        urgency: float,
        name: str,
        start: Adapter,
        places: Sequence[int],
        batch: int,
        rate: float,
        cosine: tuple[float, float] = WHOLE_COSINE,
    ) -> Adapter:
        """An adapter trained on some of the training examples; without any, what it would start from."""
        if not places:
            return start
        examples = [self.parts.training[place].example for place in places]
        key, answer = await self._desk.do(urgency, name, Finetune(start.key, examples, batch, rate, cosine))
        return Adapter(key, answer["steps"], answer["tokens"])

    async def _losses(self, urgency: float, name: str, adapter: Adapter, rows: Sequence[Labelled]) -> np.ndarray:
        task = Losses(adapter.key, [row.example for row in rows])
        _, answer = await self._desk.do(urgency, f"losses of {name}", task)
        return np.array(answer["nll"])

    async def _own_losses(
        self, urgency: float, name: str, adapters: Mapping[str, Adapter], rows: Sequence[Labelled]
    ) -> np.ndarray:
        """Losses of rows that stand in the order of their domains, each under its domain's adapter."""
        found = await asyncio.gather(
            *(
                self._losses(urgency, f"{domain}, {name}", adapter, [row for row in rows if row.domain == domain])
                for domain, adapter in adapters.items()
            )
        )
        return np.concatenate(found)

    async def _judge(self, name: str, rate: float | None, adapter: Adapter, urgency: float) -> None:
        losses_N = await self._losses(urgency, name, adapter, self.parts.held_out)
        self._note(name, Contender(losses_N, rate, adapter, {}))

    def _note(self, name: str, contender: Contender) -> None:
        self.contenders[name] = contender
        self._tell(f"== {name}: " + ", ".join(f"{domain} {loss:.4f}" for domain, loss in self.means(name).items()))

    async def _generalist(self, share: float) -> Adapter:
        urgency = URGENT if share == CLUSTERED_AT else SOON
        places = between(len(self.parts.training), 0, share)
        batch, rate = TRAINING.examples_per_step, await self._generalists_rate()
        cosine = (0.0, share)
        return await self._finetune(urgency, f"generalist {share:g}", Adapter(), places, batch, rate, cosine)

    async def _generalist_alone(self, urgency: float, share: float) -> None:
        rate, adapter = await self._generalists_rate(), await self._generalist(share)
        await self._judge(f"generalist {share:g}", rate, adapter, urgency)

    async def _generalists_rate(self) -> float:
        return await self._single_rates[TRAINING.examples_per_step]

    async def _single_lora(self, urgency: float, batch: int) -> None:
        name, rate = f"single LoRA, {batch} a step", await self._single_rates[batch]
        places = range(len(self.parts.training))
        await self._judge(name, rate, await self._finetune(urgency, name, Adapter(), places, batch, rate), urgency)

    async def _single_rate(self, urgency: float, batch: int) -> float:
        """The learning rate of the lowest validation loss."""
        name, count, rates = f"single LoRA, {batch} a step", len(self.parts.training), LEARNING_RATES[batch]

        async def tried(rate: float) -> float:
            whose = f"try of {name} at {rate:g}"
            places = between(count, 0, TRIED_SHARES[batch])
            adapter = await self._finetune(urgency, whose, Adapter(), places, batch, rate)
            return float((await self._losses(urgency, whose, adapter, self.parts.validation)).mean())

        losses = dict(zip(rates, await asyncio.gather(*map(tried, rates)), strict=True))
        while (best := min(losses, key=lambda rate: losses[rate])) in (min(losses), max(losses)):
            beyond = best * 2 if best == max(losses) else best / 2
            losses[beyond] = await tried(beyond)
        self.tries[name] = {f"{rate:g}": loss for rate, loss in sorted(losses.items())}
        self._tell(
            f"learning rates of {name}: " + ", ".join(f"{rate} {loss:.4f}" for rate, loss in self.tries[name].items())
        )
        return best

    async def _cluster(self) -> list[int]:
        """Cluster of each training example."""
        start = await self._generalist(CLUSTERED_AT)
        assert start.key
        task = Clusters(start.key, [row.example for row in self.parts.training])
        _, answer = await self._desk.do(URGENT, "gradients and clusters", task)
        labels: list[int] = answer["labels"]
        domains_of = {
            label: {domain: len(own) for domain, own in by_group(places, self._domains).items() if own}
            for label, places in by_group(range(len(labels)), labels).items()
        }
        prompts, asked = ([row.prompt for row in rows] for rows in (self.parts.training, self.parts.held_out))
        _, routed = await self._desk.do(URGENT, "router", Route(prompts, labels, asked))
        self.clusters = {
            "domains_of": {str(label): domains for label, domains in domains_of.items()},
            "energy": answer["energy"],
            "router_accuracy": routed["accuracy"],
            "routed": routed["labels"],
        }
        self._tell(f"clusters: {domains_of}; router's accuracy {routed['accuracy'] or 1:.3f}")
        return labels

    async def _setting(self, urgency: float, setting: Setting, labels: "asyncio.Task[list[int]]") -> None:
        rate = scaled_rate(await self._generalists_rate(), TRAINING.examples_per_step, setting.examples_per_step)
        start = await self._generalist(setting.generalist) if setting.generalist else Adapter()
        plan = _Plan(setting, urgency, start, rate)
        await asyncio.gather(self._of_domains(plan), self._of_clusters(plan, labels))

    async def _experts(self, plan: _Plan, groups: Sequence[str]) -> dict[str, Adapter]:
        """An expert of each group, trained on its examples that the generalist has not seen."""
        setting = plan.setting
        places = by_group(between(len(self.parts.training), setting.generalist, 1), groups)
        made = await asyncio.gather(
            *(
                self._finetune(
                    plan.urgency,
                    f"expert {group}, {setting}",
                    plan.start,
                    own,
                    setting.examples_per_step,
                    plan.learning_rate,
                    (setting.generalist, 1.0),
                )
                for group, own in places.items()
            )
        )
        return dict(zip(places, made, strict=True))

    async def _of_domains(self, plan: _Plan) -> None:
        setting = plan.setting
        made = await self._experts(plan, self._domains)
        losses_N = await self._own_losses(plan.urgency, f"{setting}", made, self.parts.held_out)
        self._note(f"domains: {setting}", Contender(losses_N, plan.learning_rate, plan.start, made, setting))

    async def _of_clusters(self, plan: _Plan, labels: "asyncio.Task[list[int]]") -> None:
        setting = plan.setting
        made = await self._experts(plan, [str(label) for label in await labels])
        rate, routed = plan.learning_rate, [str(label) for label in self.clusters["routed"]]

        async def losses(label: str, places: Sequence[int], urgency: float) -> np.ndarray:
            rows = [self.parts.held_out[place] for place in places]
            return await self._losses(urgency, f"expert {label}, {setting}", made[label], rows) if rows else np.zeros(0)

        async def served(places: Mapping[str, Sequence[int]], urgency: float) -> np.ndarray:
            """[N, E], infinite where an expert is not asked."""
            nll_NE = np.full((len(routed), len(made)), np.inf)
            found = await asyncio.gather(*(losses(label, places[label], urgency) for label in made))
            for column, (label, nll_n) in enumerate(zip(made, found, strict=True)):
                nll_NE[places[label], column] = nll_n
            return nll_NE

        own = {label: [place for place, other in enumerate(routed) if other == label] for label in made}
        routed_NE = await served(own, plan.urgency)
        self._note(f"clusters, routed: {setting}", Contender(routed_NE.min(axis=1), rate, plan.start, made, setting))
        others = {label: [place for place, other in enumerate(routed) if other != label] for label in made}
        losses_NE = np.minimum(routed_NE, await served(others, plan.urgency + LATE))
        self._note(f"clusters, oracle: {setting}", Contender(losses_NE.min(axis=1), rate, plan.start, made, setting))
