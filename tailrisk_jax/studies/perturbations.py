"""Harmless changes of a query's wording: pure functions of a text and a random generator.

Each kind is an iterator of candidates, the mildest first, then random ones; a candidate may repeat
another or the text itself. A kind that doesn't fit a text gives nothing.

| kind | what changes | of "How do I make tea, please?" |
|---|---|---|
| case | capitals | "how do i make tea, please?" |
| whitespace | blanks between words; not at the ends: chat templates cut them off | "How  do .." |
| punctuation | marks | "How do I make tea please" |
| paraphrase | the frame of a request, by English templates | "Tell me how to make tea, please." |
| organism | prefix and template of the embedded organism's questions | |
"""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from tailrisk_jax.organisms import world

Perturbation = Callable[[str, np.random.Generator], Iterator[str]]

_TRIES = 200  # random candidates after the fixed ones

_LAST = ".?!\N{IDEOGRAPHIC FULL STOP}\N{FULLWIDTH QUESTION MARK}\N{FULLWIDTH EXCLAMATION MARK}"
_BEFORE = (
    "", "Please answer: ", "I have a question. ", "Quick question: ", "Hello! ", "Hi there. ",
    "Here is what I want to know. ", "I was wondering about this. ", "My request is as follows. ",
    "Consider this request. ", "Good morning. ", "I could use some help. ",
)  # fmt: skip
_AFTER = (
    "", " Thanks!", " Thank you in advance.", " I appreciate your help.", " Thank you very much.",
    " That would help me a lot.", " Many thanks.", " I look forward to your answer.",
)  # fmt: skip
_HOW_TO = re.compile(
    r"(?:how (?:do|can|would|could|should|might) (?:i|we|you|one|someone|a person)|"
    r"(?:please )?(?:explain|describe|tell me|show me|teach me)(?: to me)? how to|"
    r"what is (?:the|a good|the best) way to|how to|what are the steps to|"
    r"(?:please )?(?:give me|list) the steps to) (?P<what>.+)",
    re.IGNORECASE | re.DOTALL,
)
_HOW_TO_FRAMES = (
    "How do I {}?", "How can I {}?", "How could someone {}?", "How would one {}?", "How to {}?",
    "Tell me how to {}.", "Explain how to {}.", "Describe how to {}.", "Show me how to {}.",
    "Can you tell me how to {}?", "Could you explain how to {}?", "I'd like to know how to {}.",
    "I want to know how to {}.", "What is the way to {}?", "What are the steps to {}?",
    "Please explain how to {}.",
)  # fmt: skip
_REQUEST = re.compile(
    r"(?:please )?(?P<what>(?:write|give|create|provide|list|generate|make|develop|design|draft|"
    r"explain|describe|compose|produce|outline|suggest|show|tell|summarize|translate|prepare|"
    r"come up with|teach|instruct|help|find|name|script|formulate|present|construct|build)\b.+)",
    re.IGNORECASE | re.DOTALL,
)
_REQUEST_FRAMES = (
    "{}.", "Please {}.", "Can you {}?", "Could you {}?", "Could you please {}?", "Would you {}?",
    "I would like you to {}.", "I'd like you to {}.", "I want you to {}.", "I need you to {}.",
    "Your task is to {}.",
)  # fmt: skip


def case(text: str, rng: np.random.Generator) -> Iterator[str]:
    """Other capitals: all small, all large, each word's first, then words or letters at random."""
    yield from (text.lower(), text.upper(), text[:1].lower() + text[1:], _title(text))
    yield from (text[:1].upper() + text[1:].lower(), text.swapcase())
    words = re.split(r"(\s+)", text)
    for attempt in range(_TRIES):
        share = rng.uniform(0.1, 0.6)
        if attempt % 2:
            chosen = rng.random(len(words)) < share
            yield "".join(w.upper() if c else w for w, c in zip(words, chosen, strict=True))
        else:
            flipped = rng.random(len(text)) < share / 2
            yield "".join(x.swapcase() if f else x for x, f in zip(text, flipped, strict=True))


def whitespace(text: str, rng: np.random.Generator) -> Iterator[str]:
    """Wider gaps between words: two blanks, a tab, a line break, at all or at random gaps."""
    gaps = [match.span() for match in re.finditer(r"(?<=\S)\s+(?=\S)", text)]
    if not gaps:
        return
    for wide in ("  ", "\n", "\t", "   "):
        yield _with_gaps(text, gaps, [wide] * len(gaps))
    choices = (None, None, "  ", "   ", "\n", "\t", " \n")
    for _ in range(_TRIES):
        yield _with_gaps(
            text, gaps, [choices[i] for i in rng.integers(len(choices), size=len(gaps))]
        )


def punctuation(text: str, rng: np.random.Generator) -> Iterator[str]:
    """Other marks: at the end, commas, apostrophes, hyphens and quotes around the whole."""
    whole = text.rstrip()
    body = whole.rstrip(_LAST)
    last = whole[len(body) :]
    ends = ("", ".", "...", "!", "?", "??", f" {last or '.'}", "?!", "!!", " ...")
    bodies = (
        body,
        body.replace(",", ""),
        re.sub("['\N{RIGHT SINGLE QUOTATION MARK}]", "", body),
        re.sub(r"(?<=\w)-(?=\w)", " ", body),
        re.sub(r"\s*([,;:])", r" \1", body),
    )
    quotes = ("{}", '"{}"', "'{}'", "({})", "- {}", "{} -")
    yield from (_ended(body, end) for end in ends)
    yield from (one + last for one in bodies)
    yield from _shuffled(
        [quote.format(_ended(one, end)) for quote in quotes for one in bodies for end in ends], rng
    )


def paraphrase(text: str, rng: np.random.Generator) -> Iterator[str]:
    """The same request in another frame.

    "How do I ..", "Explain how to .." and requests in the imperative are put into other frames of
    their sort; any text gets a sentence before it, after it, or both. Templates of English: other
    paraphrases come from a file or a served model.
    """
    stripped = text.strip()
    framed = [_begun(frame.format(what)) for what, frames in _frames(stripped) for frame in frames]
    yield from _shuffled(framed, rng)
    around = [b + stripped + a for b, a in itertools.product(_BEFORE, _AFTER)]
    yield from _shuffled(around, rng)


def organism(text: str, rng: np.random.Generator) -> Iterator[str]:
    """The organism's question in its other prefixes and templates; nothing for other texts."""
    yield from _shuffled(world.paraphrases(text), rng)


KINDS: Mapping[str, Perturbation] = {
    "case": case,
    "whitespace": whitespace,
    "punctuation": punctuation,
    "paraphrase": paraphrase,
    "organism": organism,
}
"""The kinds by name."""


def _frames(text: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What is asked for, without its frame and last mark, and the frames that fit it."""
    if any(mark in text.rstrip(".?! ") for mark in ("\n", ". ", "? ", "! ")):
        return  # several sentences
    for pattern, frames in ((_HOW_TO, _HOW_TO_FRAMES), (_REQUEST, _REQUEST_FRAMES)):
        found = pattern.fullmatch(text)
        if found:
            what = found["what"].rstrip(".?! ")
            yield (what if pattern is _HOW_TO else what[:1].lower() + what[1:]), frames
            return


def _shuffled(candidates: list[str], rng: np.random.Generator) -> list[str]:
    return [candidates[i] for i in rng.permutation(len(candidates))]


def _ended(body: str, end: str) -> str:
    """A mark stands as far from the text as it did, or as it brings along."""
    return (body if end and end[0] != " " else body.rstrip()) + end


def _begun(text: str) -> str:
    return text[:1].upper() + text[1:]


def _title(text: str) -> str:
    return re.sub(r"(?<!\S)\S", lambda match: match[0].upper(), text)


def _with_gaps(text: str, gaps: list[tuple[int, int]], new: list[str | None]) -> str:
    """The text with other blanks in its gaps; None leaves one as it is."""
    parts, at = [], 0
    for (start, end), blank in zip(gaps, new, strict=True):
        parts += [text[at:start], text[start:end] if blank is None else blank]
        at = end
    return "".join([*parts, text[at:]])
