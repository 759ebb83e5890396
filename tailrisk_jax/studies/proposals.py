"""Proposals written as text, such as "0.1*target + 0.9*ablation:direction.safetensors:0.5"."""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tailrisk_jax.errors import InputError
from tailrisk_jax.models import Model, load_model, locate, read_adapter
from tailrisk_jax.policies import (
    Component,
    Mixture,
    Policy,
    ablate,
    at_temperature,
    in_context,
    in_int8,
    intensity_for,
    interpolate,
    logit_path,
    mixture,
    steer,
    switch,
    token_mixture,
    vector_of_layer,
    window,
    with_adapter,
)
from tailrisk_jax.studies.artefacts import read_direction, vector_file

GRAMMAR = (
    "'W*TERM + W*TERM', each TERM a policy: target | checkpoint:FOLDER_OR_HUB_ID | "
    "interpolation:FOLDER_OR_HUB_ID:SHARE | ablation:DIRECTION:INTENSITY (or EFFECTtotal) | "
    "addition:VECTOR:LAYER:COEFFICIENT | adapter:FOLDER_OR_HUB_ID[:STRENGTH] | "
    "system:FILE_OR_'TEXT' | messages:FILE | prefix:FILE_OR_'TEXT' | suffix:FILE_OR_'TEXT' | int8, "
    "several changes of one policy as 'A & B', and @T at its end for a temperature of its own; or "
    "a policy beside the target, token by token: bias:SHARE(POLICY) | "
    "switch:STEP[:SHARE](POLICY) | window:START-STOP(POLICY) | path:SHARE(POLICY)"
)

_BESIDE = re.compile(r"(bias|switch|window|path):([^()'\"]*)\((.*)\)", re.DOTALL)
_WEIGHTED = re.compile(r"([^\s*:()'\"]+)\s*\*\s*(.*)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Proposal:
    """What a text describes.

    Attributes:
      policy: to draw from.
      names: of its components.
      files: what was read for it, by the name in the text: files, and folders of checkpoints and
        adapters.
    """

    policy: Component | Mixture
    names: list[str]
    files: dict[str, Path]


def parse_proposal(
    text: str,
    target: Policy,
    *,
    vectors: Mapping[str, Any] | None = None,
    checkpoints: Mapping[str, Policy] | None = None,
    load: Callable[[Path], Model] = load_model,
) -> Proposal:
    """The proposal that a text describes.

    Args:
      text: one term of the grammar above, or a weighted sum of several (a sequence-level mixture).
        A policy that is named twice is one policy, which is scored once. Texts in quotes stand for
        themselves, others are names of files.
      target: what all changes start from, and the term "target".
      vectors: named directions and vectors, looked up before files (see artefacts.py).
      checkpoints: named policies, looked up before folders and hub ids.
      load: reads the folder of a checkpoint, each once.

    Raises:
      InputError: text outside the grammar, an unreadable file, a wrong width.
    """
    parser = _Parser(text, target, vectors or {}, checkpoints or {}, load)
    names, weights = [], []
    for term in parser.split(text, " + "):
        weighted = _WEIGHTED.fullmatch(term.strip())
        names.append(weighted[2] if weighted else term.strip())
        weights.append(_number(weighted[1], "weight", text) if weighted else None)
    if len(names) > 1 and None in weights:
        raise InputError(f"proposal {text!r} needs a weight before each of its terms: 'W*TERM'")
    policies = [parser.component(name) for name in names]
    if len(policies) == 1 and weights[0] in (None, 1.0):
        return Proposal(policies[0], names, parser.files)
    whole = mixture(policies, [weight for weight in weights if weight is not None])
    return Proposal(whole, names, parser.files)


class _Parser:
    """Terms of one text to policies; remembers the files that were read."""

    def __init__(
        self,
        text: str,
        target: Policy,
        vectors: Mapping[str, Any],
        checkpoints: Mapping[str, Policy],
        load: Callable[[Path], Model],
    ):
        self.text, self.target, self.load = text, target, load
        self.vectors, self.checkpoints = vectors, checkpoints
        self.files: dict[str, Path] = {}
        self.policies: dict[str, Policy] = {}
        self.models: dict[str, Model] = {}
        self.quantised: list[tuple[Model, Model]] = []

    def component(self, term: str) -> Component:
        """A policy, or one beside the target."""
        beside = _BESIDE.fullmatch(term)
        if beside is None:
            return self.policy(term)
        kind, setting, inner = beside.groups()
        policy, numbers = self.policy(inner.strip()), setting.split(":")
        match kind, numbers:
            case "bias", [share]:
                share = self._number(share, "share")
                if not 0 <= share <= 1:
                    raise InputError(f"proposal {self.text!r}: share {share} is not in [0, 1]")
                return token_mixture([policy, self.target], [share, 1 - share])
            case "switch", [step]:
                return switch(policy, self.target, self._whole(step, "step"))
            case "switch", [step, share]:
                step, share = self._whole(step, "step"), self._number(share, "share")
                return switch(policy, self.target, step, share)
            case "window", [bounds] if "-" in bounds:
                start, _, stop = bounds.partition("-")
                start, stop = self._whole(start, "start"), self._whole(stop, "stop")
                return window(policy, self.target, start, stop)
            case "path", [share]:
                share = self._number(share, "share")
                return logit_path([policy, self.target], [share, 1 - share])
        raise self._unknown(term)

    def policy(self, term: str) -> Policy:
        """The target with changes, made once for each text."""
        if term not in self.policies:
            *parts, last = self.split(term, "@")
            policy = self.target
            for number, part in enumerate(self.split("@".join(parts) if parts else last, " & ")):
                policy = self._changed(policy, part.strip(), number == 0)
            if parts:
                policy = at_temperature(policy, self._number(last, "temperature"))
            self.policies[term] = policy
        return self.policies[term]

    def _changed(self, policy: Policy, part: str, first: bool) -> Policy:
        kind, _, rest = part.partition(":")
        match kind, rest.split(":"):
            case "target", [""] if first and part == "target":
                return policy
            case "checkpoint", _ if rest and first:
                return self._named(rest) or Policy(self._model(rest))
            case "interpolation", [*name, share] if name:
                number, other = self._number(share, "share"), ":".join(name)
                named = self._named(other)
                return interpolate(policy, named.model if named else self._model(other), number)
            case "ablation", [*name, intensity] if name:
                direction = self._vector(":".join(name))
                if intensity.endswith("total"):
                    total = self._number(intensity.removesuffix("total"), "total effect")
                    return ablate(
                        policy, direction, intensity_for(total, policy.model.config.num_layers)
                    )
                return ablate(policy, direction, self._number(intensity, "intensity"))
            case "addition", [*name, layer, coefficient] if name:
                vector, index = self._vector(":".join(name)), self._whole(layer, "layer")
                scale = self._number(coefficient, "coefficient")
                if np.ndim(vector) == 2:
                    vector = vector_of_layer(vector, index, policy.model.config.num_layers)
                return steer(policy, vector, index, scale)
            case "adapter", [*name, strength] if name and _is_number(strength):
                return with_adapter(policy, self._adapter(":".join(name)), float(strength))
            case "adapter", _ if rest:
                return with_adapter(policy, self._adapter(rest))
            case "int8", [""] if part == "int8":
                return self._in_int8(policy)
            case "messages", _ if rest:
                return in_context(policy, before=self._messages(rest))
            case (("system" | "prefix" | "suffix"), _) if rest:
                given: Any = {kind: self._text_of(rest)}
                return in_context(policy, **given)
        raise self._unknown(part)

    def split(self, text: str, separator: str) -> list[str]:
        """The parts between separators that stand outside of parentheses and quoted texts."""
        parts, start, depth, quote = [], 0, 0, ""
        for i, character in enumerate(text):
            if quote:
                quote = "" if character == quote else quote
            elif character in "'\"" and text[i - 1 : i] == ":":
                quote = character
            elif character in "()":
                depth += 1 if character == "(" else -1
            elif depth == 0 and i >= start and text.startswith(separator, i):
                parts.append(text[start:i])
                start = i + len(separator)
            if depth < 0:
                break
        if depth or quote:
            what = f"a text that starts with {quote} and doesn't end" if quote else "( without )"
            raise InputError(f"proposal {self.text!r} has {what}")
        return [*parts, text[start:]]

    def _unknown(self, term: str) -> InputError:
        return InputError(f"proposal {term!r} isn't understood; give {GRAMMAR}")

    def _whole(self, value: str, name: str) -> int:
        number = self._number(value, name)
        if number != int(number):
            raise InputError(f"proposal {self.text!r}: {name} {value} is no whole number")
        return int(number)

    def _number(self, value: str, name: str) -> float:
        return _number(value, name, self.text)

    def _named(self, name: str) -> Policy | None:
        return self.checkpoints.get(name)

    def _model(self, name: str) -> Model:
        if name not in self.models:
            self.files[name] = locate(name)
            self.models[name] = self.load(self.files[name])
        return self.models[name]

    def _in_int8(self, policy: Policy) -> Policy:
        """With one quantised copy of each model, so that its policies share a pass."""
        for original, quantised in self.quantised:
            if original.params is policy.model.params:
                return dataclasses.replace(policy, model=quantised)
        changed = in_int8(policy)
        self.quantised.append((policy.model, changed.model))
        return changed

    def _adapter(self, name: str) -> dict[str, Any]:
        self.files[name] = locate(name)
        return read_adapter(self.target.model, self.files[name])

    def _text_of(self, value: str) -> str:
        if value[0] in "'\"":
            if len(value) < 2 or value[-1] != value[0]:
                raise InputError(f"proposal {self.text!r}: nothing may follow the text in {value}")
            return value[1:-1]
        return self._read(value, str)

    def _messages(self, name: str) -> list[dict[str, str]]:
        messages = self._read(name, json.loads)
        if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
            raise InputError(
                f"message file {name!r} holds no list of messages; give a JSON list of "
                '{"role": .., "content": ..}'
            )
        return messages

    def _read(self, name: str, parse: Callable[[str], Any]) -> Any:
        self.files[name] = Path(name)
        try:
            return parse(Path(name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"file {name!r} of proposal {self.text!r} can't be read ({error}); "
                "check the path, and put a text in quotes"
            ) from error

    def _vector(self, name: str) -> Any:
        if name in self.vectors:
            return self.vectors[name]
        self.files[name] = vector_file(name)
        return _load_vector(name, self.vectors)


def _number(value: str, name: str, text: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = np.nan
    if not np.isfinite(number):
        raise InputError(f"proposal {text!r}: {name} {value!r} is not a finite number")
    return number


def _is_number(value: str) -> bool:
    try:
        return bool(np.isfinite(float(value)))
    except ValueError:
        return False


def _load_vector(name: str, vectors: Mapping[str, Any]) -> Any:
    if not Path(name).exists():
        known = f" (named here: {', '.join(vectors)})" if vectors else ""
        raise InputError(f"direction file {name!r} does not exist{known}; check the path")
    return read_direction(name).vector
