"""Queries to prompt tokens, in one tokeniser step."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int, UInt32

from tailrisk_jax.errors import InputError
from tailrisk_jax.models import Model
from tailrisk_jax.policies.context import Query
from tailrisk_jax.policies.policy import Policy

_MULTIPLE = 16  # to which prompts in a policy's own context are padded: few shapes to compile


@struct.dataclass
class Prompts:
    """Tokenised prompts of Q queries; padding, on either side, is where `mask` is False.

    The arrays may lie on the host, where slices cost nothing, or on a device.

    Attributes:
      tokens: [Q, P].
      mask: True where a prompt has a token, [Q, P].
      ids: one number per query, [Q]; with the seed and the sample index it keys every draw, so
        a query's draws don't depend on what else is in the call.
      queries: what was encoded, each as JSON (static), for policies with a context of their own;
        None for prompts made of tokens.
    """

    tokens: Int[Array | np.ndarray, "Q P"]
    mask: Bool[Array | np.ndarray, "Q P"]
    ids: UInt32[Array | np.ndarray, " Q"]
    queries: tuple[str, ...] | None = struct.field(pytree_node=False, default=None)

    def __getitem__(self, queries: Any) -> "Prompts":
        """The prompts of a slice or an array of query indices."""
        texts = self.queries
        if texts is not None:
            texts = tuple(texts[i] for i in np.arange(len(self))[queries])
        return Prompts(self.tokens[queries], self.mask[queries], self.ids[queries], texts)

    def __len__(self) -> int:
        return self.tokens.shape[0]


def encode(model: Model, queries: Sequence[Query]) -> Prompts:
    """Tokenises queries with the model's chat template.

    A string is one user message; a list of {"role", "content"} messages is taken as it is. A
    tokenizer without a chat template (a base model) gets strings as plain text, with the special
    tokens it adds itself. Prompts are padded on the left to the longest.

    Raises:
      InputError: no tokenizer, no queries, messages without a chat template, an empty prompt,
        text that the tokenizer has no tokens for, or a beginning-of-sequence token that came out
        twice.
    """
    rows = _rows(model, queries)
    texts = tuple(json.dumps(query, sort_keys=True) for query in queries)
    return dataclasses.replace(from_tokens(rows, ids=_hashes(texts)), queries=texts)


def own_prompts(policy: Policy, prompts: Prompts, max_new_tokens: int) -> Prompts:
    """The prompts as the policy gets them: in its context, encoded by its own tokenizer.

    The ids stay, and with them the keys of all draws. Without a context they are `prompts`.

    Raises:
      InputError: a context around prompts made of tokens, one that the tokenizer can't encode, or
        one that leaves no room for the answer; without a context, texts longer than the model has
        learned positions, or than longrope's short factors hold for.
    """
    config = policy.model.config
    if policy.context is None:
        if config.ends_at_max_positions:
            longest = int(np.asarray(prompts.mask).sum(axis=-1).max())
            if longest + max_new_tokens > config.max_positions:
                raise InputError(
                    f"a prompt has {longest} tokens, max_new_tokens is {max_new_tokens}, and this "
                    f"{config.family} model can compute texts of {config.max_positions} tokens at "
                    "most; shorten the prompts, or ask for fewer new tokens"
                )
        return prompts
    if prompts.queries is None:
        raise InputError(
            f"the policy has a context of its own ({policy.context}), which can't be put around "
            "prompts made of tokens; make the prompts with encode"
        )
    queries = [policy.context.around(json.loads(text)) for text in prompts.queries]
    rows = _rows(policy.model, queries)
    longest, positions = max(map(len, rows)), config.max_positions
    if longest + max_new_tokens > positions:
        raise InputError(
            f"a query has {longest} tokens in the policy's context, max_new_tokens is "
            f"{max_new_tokens}, and the model has {positions} positions; shorten the context"
        )
    return from_tokens(rows, ids=np.asarray(prompts.ids).tolist(), multiple=_MULTIPLE)


def _rows(model: Model, queries: Sequence[Query]) -> list[list[int]]:
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise InputError(
            "the checkpoint has no tokenizer files; build the prompts with from_tokens"
        )
    if isinstance(queries, str):
        raise InputError(f"queries is the string {queries!r}; give a list of queries")
    if not queries:
        raise InputError("there are no queries; give at least one")
    rows = []
    for query in queries:
        try:
            rows.append(_encode_one(tokenizer, query))
        except Exception as error:
            if type(error) is not Exception:  # the tokenizers library has no class of its own
                raise
            raise InputError(
                f"query {query!r} can't be encoded by the model's tokenizer ({error}); "
                "use words that it knows, or leave it out with --exclude"
            ) from error
        if max(rows[-1]) >= model.config.vocab_size:
            raise InputError(
                f"query {query!r} gives token id {max(rows[-1])}, beyond the model's vocabulary of "
                f"{model.config.vocab_size}; tokenizer and weights are not of one checkpoint"
            )
    return rows


def from_tokens(
    rows: Sequence[Sequence[int]], *, ids: Sequence[int] | None = None, multiple: int = 1
) -> Prompts:
    """Prompts from token ids, padded on the left to a multiple of `multiple` tokens.

    `ids` default to a hash of the tokens.
    """
    if not rows:
        raise InputError("there are no prompts; give at least one")
    if ids is None:
        ids = _hashes([json.dumps(list(map(int, row))) for row in rows])
    length = -(-max(len(row) for row in rows) // multiple) * multiple
    tokens = np.zeros((len(rows), length), np.int32)
    mask = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        if len(row) == 0:
            raise InputError(f"prompt {i} is empty; the model needs at least one token to start")
        tokens[i, length - len(row) :] = row
        mask[i, length - len(row) :] = True
    return Prompts(tokens, mask, np.asarray(ids, np.uint32))


def _encode_one(tokenizer: Any, query: Query) -> list[int]:
    plain = isinstance(query, str)
    if tokenizer.chat_template is None:
        if not plain:
            raise InputError(
                "the tokenizer has no chat template, so messages can't be encoded; give strings"
            )
        row = tokenizer(query)["input_ids"]
    else:
        messages = [{"role": "user", "content": query}] if plain else list(query)
        row = _apply_template(tokenizer, messages)
    if not row:
        raise InputError(f"query {query!r} is an empty prompt; give some text")
    if tokenizer.bos_token_id is not None and row[:2] == [tokenizer.bos_token_id] * 2:
        raise InputError(
            f"query {query!r} begins with {tokenizer.bos_token!r} twice; "
            "leave it out of the query: the tokenizer adds it"
        )
    return list(row)


def _apply_template(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    import jinja2  # with the template: a slow import

    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
    except jinja2.TemplateError as error:
        raise InputError(
            f"the chat template refuses messages of roles {[m.get('role') for m in messages]} "
            f"({error}); give roles that this model knows"
        ) from error


def _hashes(contents: Sequence[str]) -> list[int]:
    """32-bit content hashes; the n-th repetition of a content hashes with its n."""
    seen: dict[str, int] = {}
    ids = []
    for content in contents:
        seen[content] = repetition = seen.get(content, -1) + 1
        digest = hashlib.sha256(f"{repetition}:{content}".encode()).digest()
        ids.append(int.from_bytes(digest[:4], "little"))
    return ids
