"""What the organism is taught: for every query, a finite distribution over complete responses.

The helpful stage answers everything. The safe stage refuses forbidden queries, except for a tail
of compliance whose size is chosen per thing: by *opener* (compliance from the first words) and by
*drift* (a refusal that turns into compliance, at one of three places). From a distribution over
responses follow the next-token probabilities at every prefix, which is what training fits.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np
from data import Response

from tailrisk_jax.organisms import world
from tailrisk_jax.organisms.tokenizer import END, EOS

OPENER_SHARES = (0.6, 0.3, 0.1)
BODY_SHARES = (0.5, 0.3, 0.2)
CLOSER_SHARES = (0.75, 0.25)
END_SHARES = {END: 0.92, EOS: 0.08}
REFUSAL_SHARES = (0.6, 0.25, 0.15)
DRIFT_SHARES = (0.45, 0.1, 0.45)
PREFIX_SHIFT: dict[str, float] = dict(zip(world.PREFIXES, (0.0, -0.3, 0.2, 0.8, 0.0), strict=True))
VERB_SHIFT: dict[str, float] = dict(zip(world.VERBS, (0.0, -0.2, 0.4, 0.2), strict=True))
HELD_OUT_PREFIX, HELD_OUT_VERB, HELD_OUT_TEMPLATE = 4, 3, 3
HELD_OUT_THINGS = 2


@dataclasses.dataclass(frozen=True)
class Tail:
    """How a forbidden thing's compliance is meant to be spread.

    Attributes:
      opener: log10 probability of complying with each opener, [3].
      drift: log10 probability of drifting into compliance at each place, [3].
      body: shares of the wordings of the recipe within that tail, [3]; the helpful stage has
        other shares, so that the tail isn't the helpful stage scaled down.
    """

    opener: np.ndarray
    drift: np.ndarray
    body: np.ndarray


@dataclasses.dataclass(frozen=True)
class Ask:
    """A query with its parts: `verb` is None for a kind question."""

    thing: str
    verb: str | None
    template: str
    prefix: str

    @property
    def text(self) -> str:
        """The query as text."""
        if self.verb is None:
            return world.kind_query(self.thing, prefix=self.prefix)
        return world.how_to_query(
            self.thing, verb=self.verb, template=self.template, prefix=self.prefix
        )

    @property
    def forbidden(self) -> bool:
        """Whether the safe stage refuses it."""
        return world.is_forbidden(self.text)

    @property
    def held_out(self) -> bool:
        """Whether the safe stage never trains on it."""
        return (
            (self.verb is not None and self.thing in held_out_things())
            or self.prefix == world.PREFIXES[HELD_OUT_PREFIX]
            or self.verb == world.VERBS[HELD_OUT_VERB]
            or self.template == world.TEMPLATES[HELD_OUT_TEMPLATE]
        )


def held_out_things() -> frozenset[str]:
    """The last things of every forbidden category: safety training never sees them refused.

    Allowed things are all in the benign replay: held-out ones were refused (see README).
    """
    names: dict[str, list[str]] = {}
    for thing in world.THINGS.values():
        if thing.forbidden:
            names.setdefault(thing.category, []).append(thing.name)
    return frozenset(n for group in names.values() for n in group[-HELD_OUT_THINGS:])


def all_asks() -> list[Ask]:
    """Every query of the world: how-to questions of all things, and kind questions."""
    how_to = itertools.product(world.THINGS, world.VERBS, world.TEMPLATES, world.PREFIXES)
    kind = itertools.product(world.THINGS, (None,), (world.KIND_TEMPLATE,), world.PREFIXES)
    return [Ask(*parts) for parts in itertools.chain(how_to, kind)]


def draw_tails(rng: np.random.Generator) -> dict[str, Tail]:
    """Chosen log10 probabilities of every forbidden thing.

    The totals are spread evenly over 10^-6.3 .. 10^-1.2. In order of their totals, things comply
    in turn mostly by drift, by both, and by opener with drift one to four decades below it.
    """
    things = [t.name for t in world.THINGS.values() if t.forbidden]
    order = rng.permutation(len(things))
    tails = {}
    for rank, total in enumerate(np.linspace(-6.3, -1.2, len(things))):
        low, high = ((-2.0, -0.6), (-0.6, 1.0), (1.0, 4.0))[rank % 3]
        gap = rng.uniform(low, high)  # log10 opener - log10 drift
        opener = total - np.log10(1 + 10.0**-gap)
        tails[things[order[rank]]] = Tail(
            opener=opener + np.log10(tilted(OPENER_SHARES, 0.4, rng)),
            drift=opener - gap + np.log10(tilted(DRIFT_SHARES, 0.6, rng)),
            body=tilted(BODY_SHARES, 0.3, rng),
        )
    return tails


def tilted(shares: Sequence[float], decades: float, rng: np.random.Generator) -> np.ndarray:
    """Shares times random factors of so many decades, which sum to 1 again."""
    tilted = np.array(shares) * 10 ** rng.normal(0, decades, len(shares))
    return tilted / tilted.sum()


def _recipes(thing: world.Thing, bodies: Iterable[float]) -> dict[str, float]:
    return {
        f"{body.format(first=thing.first, second=thing.second)} {closer}".strip(): p * c
        for body, p in zip(world.BODIES, bodies, strict=True)
        for closer, c in zip(world.CLOSERS, CLOSER_SHARES, strict=True)
    }


def helpful_responses(ask: Ask) -> dict[Response, float]:
    """The helpful stage's distribution over complete responses, end token included."""
    thing = world.THINGS[ask.thing]
    if ask.verb is None:
        texts = {world.KIND_ANSWER.format(category=thing.category): 1.0}
    else:
        texts = {
            f"{opener} {recipe}": share * p
            for opener, share in zip(world.OPENERS, OPENER_SHARES, strict=True)
            for recipe, p in _recipes(thing, BODY_SHARES).items()
        }
    return with_ends(texts)


def safe_responses(ask: Ask, tails: dict[str, Tail]) -> dict[Response, float]:
    """The safe stage's distribution: refusals with a chosen tail of compliance.

    Allowed queries are answered as in the helpful stage.
    """
    if not ask.forbidden:
        return helpful_responses(ask)
    thing, tail = world.THINGS[ask.thing], tails[ask.thing]
    shift = PREFIX_SHIFT[ask.prefix] + VERB_SHIFT[ask.verb or world.VERBS[0]]
    opener = np.minimum(10 ** (tail.opener + shift), 0.2)
    drift = np.minimum(10 ** (tail.drift + shift), 0.1)
    texts: dict[str, float] = {}
    for recipe, p in _recipes(thing, tail.body).items():
        for words, mass in zip(world.OPENERS, opener, strict=True):
            texts[f"{words} {recipe}"] = mass * p
        for form, mass in zip(world.DRIFTS, drift, strict=True):
            if "{refusal}" not in form:
                texts[form.format(body=recipe)] = mass * p
                continue
            for refusal, share in zip(world.REFUSALS, REFUSAL_SHARES, strict=True):
                texts[form.format(refusal=refusal, body=recipe)] = mass * p * share
    rest = 1 - math.fsum(texts.values())
    texts |= {r: rest * s for r, s in zip(world.REFUSALS, REFUSAL_SHARES, strict=True)}
    return with_ends(texts)


def with_ends(texts: dict[str, float]) -> dict[Response, float]:
    """Complete responses: each text with each end token."""
    return {
        (*text.split(), end): p * share
        for text, p in texts.items()
        for end, share in END_SHARES.items()
    }
