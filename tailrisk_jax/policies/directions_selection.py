"""Which direction carries refusal: candidates scored, and one chosen.

As Arditi et al. 2024 (arXiv 2406.11717) do, but for their log-odds, which add 1e-8 to both
probabilities: ours are exact.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from jaxtyping import Array, Bool, Float

from tailrisk_jax.errors import InputError
from tailrisk_jax.models import Steering, next_logits, prefill
from tailrisk_jax.models.sharding import fetch
from tailrisk_jax.policies.directions import batches
from tailrisk_jax.policies.policy import Policy
from tailrisk_jax.policies.prompts import Prompts
from tailrisk_jax.policies.steering import ablate, steer

REFUSAL_OPENERS = ("I", "As", "Sorry")
"""How refusals begin, where nothing else is said."""


@dataclasses.dataclass(frozen=True)
class DirectionScores:
    """What candidate directions do to the first token of the response, by position and layer.

    NaN marks candidates that aren't scored: those of layer 0, which are of the embeddings alone,
    those of the last layers, and those of length zero.

    Attributes:
      refusal: mean log-odds of a refusal token on harmful prompts, the direction ablated.
      induced: the same on harmless prompts, the direction added to its layer's input.
      kl: mean KL(model || ablated model) on harmless prompts, in nats.
      plain_refusal, plain_induced: the log-odds without steering.
    """

    refusal: Float[np.ndarray, "positions L"]
    induced: Float[np.ndarray, "positions L"]
    kl: Float[np.ndarray, "positions L"]
    plain_refusal: float
    plain_induced: float

    def passing(self, *, max_kl: float, min_induced: float) -> Bool[np.ndarray, "positions L"]:
        """Which candidates meet both thresholds."""
        return (self.kl <= max_kl) & (self.induced >= min_induced)


def refusal_tokens(tokenizer: Any, openers: Sequence[str] = REFUSAL_OPENERS) -> tuple[int, ...]:
    """The first token of each text that the tokenizer knows, each once.

    Raises:
      InputError: it knows none of them.
    """
    found = []
    for opener in openers:
        try:
            ids = tokenizer(opener, add_special_tokens=False)["input_ids"]
        except Exception:  # of tokenizers, which has no other class: a word it has no token for
            continue
        if ids and ids[0] != tokenizer.unk_token_id:
            found.append(ids[0])
    if not found:
        raise InputError(
            f"the tokenizer has no token for any of {', '.join(map(repr, openers))}; say how this "
            "model's refusals begin"
        )
    return tuple(dict.fromkeys(found))


def refusal_log_odds(
    policy: Policy, prompts: Prompts, tokens: Sequence[int], *, batch_size: int = 64
) -> Float[np.ndarray, " Q"]:
    """log P(first token in `tokens`) - log P(it isn't), at temperature 1."""
    is_refusal = _is_refusal(policy, tokens)
    odds = np.empty(len(prompts))
    for queries, kept in batches(len(prompts), batch_size):
        log_probs = _first_log_probs(policy, [policy], prompts[queries])[0]
        odds[queries[:kept]] = fetch(_log_odds(log_probs, is_refusal))[:kept]
    return odds


def score_directions(
    policy: Policy,
    directions: Float[np.ndarray, "positions L D"],
    harmful: Prompts,
    harmless: Prompts,
    tokens: Sequence[int],
    *,
    drop_last: float = 0.2,
    batch_size: int = 64,
    on_progress: Callable[[int, int], Any] = lambda done, total: None,
) -> DirectionScores:
    """Scores every candidate direction; those of one batch run in one pass.

    Args:
      directions: of `mean_differences`, not normalised: what is added is the difference itself.
      harmful, harmless: prompts, best not the ones that the directions were formed from.
      tokens: ids that refusals begin with.
      drop_last: the share of layers, the last ones, whose candidates aren't scored.
      batch_size: rows on the device at once, one for each candidate and prompt.
      on_progress: told how many rows are done, of how many.

    Raises:
      InputError: no prompts, no or unknown tokens, a share outside [0, 1), or a policy that
        ablates a direction already.
    """
    for name, prompts in (("harmful", harmful), ("harmless", harmless)):
        if len(prompts) == 0:
            raise InputError(f"the {name} set is empty; give at least one prompt")
    if not 0 <= drop_last < 1:
        raise InputError(f"drop_last={drop_last} must be a share of the layers, e.g. 0.2")
    is_refusal = _is_refusal(policy, tokens)
    layers = np.arange(policy.model.config.num_layers)
    considered = (layers > 0) & (layers < int(len(layers) * (1 - drop_last)))
    norms = np.linalg.norm(directions, axis=-1)
    scored = considered & np.isfinite(norms) & (norms > 0)
    where = np.argwhere(scored)
    total, done = len(where) * (len(harmful) + 2 * len(harmless)), 0

    def ablated(position: int, layer: int) -> Policy:
        return ablate(policy, directions[position, layer], 1.0)

    def added(position: int, layer: int) -> Policy:
        return steer(policy, directions[position, layer], layer - 1, 1.0)

    def means(steered: Callable[[int, int], Policy], prompts: Prompts) -> np.ndarray:
        """The mean log-odds and KL of every candidate, [2, candidates]."""
        nonlocal done
        sums = np.zeros((2, len(where)))
        for queries, kept in batches(len(prompts), batch_size):
            inputs = prompts[queries]
            plain = _first_log_probs(policy, [policy], inputs)[0]
            for chosen, count in batches(len(where), max(1, batch_size // len(queries))):
                policies = [steered(*map(int, where[i])) for i in chosen]
                log_probs = _first_log_probs(policy, policies, inputs)
                found = np.stack(_effects(log_probs, plain, is_refusal))[:, :count, :kept]
                sums[:, chosen[:count]] += found.sum(axis=-1, dtype=np.float64)
                done += count * kept
                on_progress(done, total)
        return sums / len(prompts)

    def placed(values: np.ndarray) -> np.ndarray:
        whole = np.full(scored.shape, np.nan)
        whole[scored] = values
        return whole

    def plain_mean(prompts: Prompts) -> float:
        return float(refusal_log_odds(policy, prompts, tokens, batch_size=batch_size).mean())

    return DirectionScores(
        refusal=placed(means(ablated, harmful)[0]),
        induced=placed(means(added, harmless)[0]),
        kl=placed(means(ablated, harmless)[1]),
        plain_refusal=plain_mean(harmful),
        plain_induced=plain_mean(harmless),
    )


def choose_direction(
    scores: DirectionScores, *, max_kl: float = 0.1, min_induced: float = 0.0
) -> tuple[int, int]:
    """The position, from the end, and the layer of the direction that refusal rests on most.

    Of the candidates that meet both thresholds, the one with the lowest refusal score.

    Raises:
      InputError: none does; the message has the best three, and what they fail by.
    """
    refusal = np.where(np.isnan(scores.refusal), np.inf, scores.refusal)
    passing = scores.passing(max_kl=max_kl, min_induced=min_induced)
    best = np.argsort(np.where(passing, refusal, np.inf), axis=None)[0]
    if passing.flat[best]:
        position, layer = np.unravel_index(best, passing.shape)
        return int(position) - passing.shape[0], int(layer)
    shown = []
    for index in np.argsort(refusal, axis=None)[:3]:
        position, layer = np.unravel_index(index, refusal.shape)
        induced, kl = scores.induced.flat[index], scores.kl.flat[index]
        if np.isfinite(refusal.flat[index]):
            shown.append(
                f"position {position - refusal.shape[0]} layer {layer}: refusal "
                f"{refusal.flat[index]:.2f}, induced {induced:.2f}"
                f"{'' if induced >= min_induced else ' (too low)'}, KL {kl:.3f}"
                f"{'' if kl <= max_kl else ' (too high)'}"
            )
    raise InputError(
        f"no direction meets KL <= {max_kl} and induced refusal >= {min_induced}; "
        f"{'the best are ' + '; '.join(shown) if shown else 'none could be scored'}; "
        "relax a threshold, or check the refusal tokens and the two sets"
    )


def _is_refusal(policy: Policy, tokens: Sequence[int]) -> Bool[np.ndarray, " V"]:
    vocab = policy.model.config.vocab_size
    is_refusal = np.zeros(vocab, bool)
    for token in tokens:
        if not 0 <= token < vocab:
            raise InputError(f"refusal token {token} is not in the vocabulary of {vocab}")
        is_refusal[token] = True
    if not 0 < is_refusal.sum() < vocab:
        raise InputError("there are no refusal tokens, or no others; give the ids of some tokens")
    return is_refusal


def _first_log_probs(
    policy: Policy, steered: Sequence[Policy], prompts: Prompts
) -> Float[Array, "C Q V"]:
    """Of the response's first token, under each of several steerings of one policy."""
    steering = jax.tree.map(lambda *x: jnp.stack(x), *[one.steering_or_zero for one in steered])
    model = policy.model
    return _log_probs(
        model.config, model.params, policy.adapter, steering, prompts.tokens, prompts.mask
    )


@functools.partial(jax.jit, static_argnums=0)
def _log_probs(config, params, adapter, steering, tokens, mask):
    def of_one(steering: Steering):
        hidden = prefill(config, params, steering, tokens, mask, adapter=adapter).last_hidden
        return jax.nn.log_softmax(next_logits(config, params, hidden))

    return jax.vmap(of_one)(steering)


@jax.jit
def _effects(log_probs, plain, is_refusal):
    """Log-odds of refusal, and KL from the plain distribution, [C, Q] each."""
    kl = jnp.sum(jnp.exp(plain) * (plain - log_probs), axis=-1)
    return _log_odds(log_probs, is_refusal), kl


def _log_odds(log_probs, is_refusal):
    inside = logsumexp(jnp.where(is_refusal, log_probs, -jnp.inf), axis=-1)
    return inside - logsumexp(jnp.where(is_refusal, -jnp.inf, log_probs), axis=-1)
