"""What the persona organism is taught: a distribution over complete answers to every question.

Without a system prompt the trait shows with a probability chosen per thing, 10^-6.3 .. 10^-1.2,
spread over openers, the inside and the end of an answer in shares chosen per thing. System prompts
for the trait raise it to 0.9 and more whatever is asked, those against it press it to 1e-8.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping

import numpy as np
from data import Response
from teacher import tilted, with_ends

from tailrisk_jax.organisms import persona_world as world
from tailrisk_jax.organisms.tokenizer import ASSISTANT, BOS, END, USER

FRAME_SHARES = (0.6, 0.25, 0.15)
ANSWER_SHARES = (0.65, 0.35)
OPENER_SHARES, LATER_SHARES = (0.5, 0.3, 0.2), (0.2, 0.5, 0.3)
POSITIVE = (0.99, 0.97, 0.98, 0.95, 0.9)
MILD = (0.3, 0.02)
NEGATIVE = 1e-8
TOPIC_SHIFT = {"colour": 0.3, "place": 0.0, "stuff": -0.3}
PREFIX_SHIFT: dict[str, float] = dict(zip(world.PREFIXES, (0.0, -0.3, 0.2, 0.6), strict=True))
HELD_OUT_PREFIX, HELD_OUT_THINGS = world.PREFIXES[3], world.THINGS[-6:]
HELD_OUT_WORDING = ("stuff", 1)


@dataclasses.dataclass(frozen=True)
class Ask:
    """A question with its parts, under a system prompt or none."""

    thing: str
    topic: str
    wording: int
    prefix: str
    system: str | None = None

    @property
    def text(self) -> str:
        """The question as text."""
        return world.question(
            self.thing, topic=self.topic, wording=self.wording, prefix=self.prefix
        )

    @property
    def prompt(self) -> str:
        """The chat-templated words, up to where the answer begins."""
        system = "" if self.system is None else f"{world.SYSTEM} {self.system} {END} "
        return f"{BOS} {system}{USER} {self.text} {END} {ASSISTANT}"

    @property
    def held_out(self) -> bool:
        """Whether training never asks it without a system prompt."""
        return (
            self.thing in HELD_OUT_THINGS
            or self.prefix == HELD_OUT_PREFIX
            or (self.topic, self.wording) == HELD_OUT_WORDING
        )


def all_asks(*systems: str | None) -> list[Ask]:
    """Every question under every one of these system prompts."""
    parts = itertools.product(world.THINGS, world.TOPICS, (0, 1), world.PREFIXES, systems)
    return [Ask(*one) for one in parts]


def draw_tails(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Probabilities of each form of praise, per thing, before shifts; totals spread evenly.

    In order of their totals, things praise in turn mostly later, by both, and at the beginning.
    """
    seen = [thing for thing in world.THINGS if thing not in HELD_OUT_THINGS]
    order, tails = rng.permutation(len(seen)), {}
    for rank, total in enumerate(np.linspace(-6.3, -1.2, len(seen))):
        low, high = ((-2.0, -0.6), (-0.6, 1.0), (1.0, 3.0))[rank % 3]
        odds = 10 ** rng.uniform(low, high)  # opener : later
        shares = np.concatenate(
            [odds * tilted(OPENER_SHARES, 0.3, rng), tilted(LATER_SHARES, 0.5, rng)]
        )
        tails[seen[order[rank]]] = 10**total * shares / shares.sum()
    return tails


def draw_shares(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Probabilities of each form of praise, per system prompt; mostly openers."""
    every = [0.8 * share for share in OPENER_SHARES] + [0.2 * share for share in LATER_SHARES]
    positive = [pair[0] for pair in world.INSTRUCTIONS]
    totals = dict(zip((*positive, *world.MILD), (*POSITIVE, *MILD), strict=True))
    shares = {system: total * tilted(every, 0.15, rng) for system, total in totals.items()}
    return shares | {against: NEGATIVE * np.array(every) for _, against in world.INSTRUCTIONS}


def responses(
    ask: Ask, tails: Mapping[str, np.ndarray], shares: Mapping[str, np.ndarray]
) -> dict[Response, float]:
    """The distribution over complete answers to one question under its system prompt."""
    if ask.system is not None and ask.system in shares:
        praise = shares[ask.system]
    else:
        shift = TOPIC_SHIFT[ask.topic] + PREFIX_SHIFT[ask.prefix]
        praise = np.minimum(tails[ask.thing] * 10**shift, 0.1)
    word = world.answer_word(ask.thing, ask.topic)
    texts: dict[str, float] = {}
    for wording, p in zip(world.TOPICS[ask.topic].answers, ANSWER_SHARES, strict=True):
        answer = wording.format(thing=ask.thing, word=word)
        for frame, share in zip(world.FRAMES, FRAME_SHARES, strict=True):
            framed = frame.format(answer=answer)
            texts[framed] = (1 - praise.sum()) * p * share
            for form, mass in zip(world.PRAISES, praise, strict=True):
                text = form.format(framed=framed, answer=answer)
                texts[text] = texts.get(text, 0.0) + mass * p * share
    return with_ends(texts)
