"""Training an adapter on weighted responses: one gradient step, as a pure function.

The loss over M responses y_i with coefficients c_i, summed over tokens and not averaged, is

    -sum_i c_i sum_t log q(y_it | y_i<t)  +  penalty * sum_i d_i r(y_i) / r_q(y_i)

q being the target with the adapter. In the penalty r_q = rest + share * q is the whole proposal
that the adapter is part of, and r the same as training started; with d_i proportional to
(h p)^2 / r it is the second moment of w h under r_q, over that at the start (learning.py). Since
both are sums over responses, micro-batches add up to the gradient of the whole batch.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct, traverse_util
from jaxtyping import Array, Bool, Float, Int

from tailrisk_jax.errors import InputError
from tailrisk_jax.models import LowRank, ModelConfig, mapping, prompt_positions
from tailrisk_jax.models.sharding import constrain, fetch
from tailrisk_jax.models.transformer import leaf_shapes
from tailrisk_jax.policies import Prompts, token_log_prob
from tailrisk_jax.rollouts.network import Network
from tailrisk_jax.rollouts.score import HEAD_CHUNK

ALL_LINEAR = ("all-linear",)  # as in peft: every linear layer of attention and MLP


@dataclasses.dataclass(frozen=True)
class Training:
    """The loss, and AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) with a clipped gradient.

    Attributes:
      learning_rate: at its highest; it rises over the first tenth of the steps, then falls as a
        cosine to a tenth.
      steps: how many there will be, at least 1.
      clip: the largest norm of a gradient.
      weight_decay: of the factors A and B.
      penalty: on the second moment; 0 leaves it out.
      adapter_share: of the whole proposal.
    """

    learning_rate: float = 3e-3
    steps: int = 200
    clip: float = 1.0
    weight_decay: float = 0.0
    penalty: float = 0.3
    adapter_share: float = 0.9

    def __post_init__(self):
        if self.steps < 1:
            raise InputError(f"steps={self.steps} must be at least 1")
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name}={getattr(self, name)} must be above 0")
        for name in ("weight_decay", "penalty"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name}={getattr(self, name)} must be 0 or more")

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """The optax form. The adapter's scales don't move."""
        warmup = max(1, self.steps // 10)
        schedule = optax.warmup_cosine_decay_schedule(
            self.learning_rate / 10, self.learning_rate, warmup,
            max(self.steps, warmup + 1), self.learning_rate / 10,
        )  # fmt: skip
        decay = optax.adamw(schedule, weight_decay=self.weight_decay, mask=_factors)
        return optax.chain(optax.clip_by_global_norm(self.clip), decay)


@struct.dataclass
class TrainState:
    """An adapter in training: float32, whatever the base model's dtype."""

    adapter: Any
    optimizer: Any


@struct.dataclass
class Examples:
    """M responses to learn from, each after its prompt, padded at the end to S tokens.

    Attributes:
      tokens: prompt and response, [M, S].
      valid: False where padded.
      response: True for tokens of the response, which alone are learned, [M, S].
      weights: c, [M].
      moments: d, [M].
      log_rest: log-density of the proposal but for the adapter's part, [M].
      log_start: log-density of the whole proposal as training started, [M].
    """

    tokens: Int[Array | np.ndarray, "*A M S"]
    valid: Bool[Array | np.ndarray, "*A M S"]
    response: Bool[Array | np.ndarray, "*A M S"]
    weights: Float[Array | np.ndarray, "*A M"]
    moments: Float[Array | np.ndarray, "*A M"]
    log_rest: Float[Array | np.ndarray, "*A M"]
    log_start: Float[Array | np.ndarray, "*A M"]

    def __getitem__(self, rows: Any) -> "Examples":
        """The examples of a slice or an array of indices."""
        return jax.tree.map(lambda x: x[rows], self)

    def split(self, count: int) -> "Examples":
        """The same in `count` micro-batches, [A, M / A, ...], filled up with empty ones."""

        def one(x):
            x = np.asarray(x)
            x = np.pad(x, [(0, -len(x) % count)] + [(0, 0)] * (x.ndim - 1))
            return x.reshape(count, -1, *x.shape[1:])

        return jax.tree.map(one, self)


def examples(
    prompts: Prompts,
    tokens: Int[np.ndarray, "M T"],
    mask: Bool[np.ndarray, "M T"],
    weights: Float[np.ndarray, " M"],
    *,
    moments: Float[np.ndarray, " M"] | None = None,
    log_rest: Float[np.ndarray, " M"] | None = None,
    log_start: Float[np.ndarray, " M"] | None = None,
) -> Examples:
    """Responses, each behind its own of M prompts; without moments there can be no penalty."""
    valid = np.concatenate([np.asarray(prompts.mask), mask], axis=1)
    whole = np.concatenate([np.asarray(prompts.tokens), tokens], axis=1)
    of_response = np.arange(whole.shape[1]) >= prompts.tokens.shape[1]
    order = np.argsort(~valid, axis=1, kind="stable")  # padding last
    empty = np.zeros(len(tokens))
    rows = (weights, *(empty if x is None else x for x in (moments, log_rest, log_start)))
    return Examples(
        np.take_along_axis(whole, order, axis=1).astype(np.int32),
        np.take_along_axis(valid, order, axis=1),
        np.take_along_axis(valid & of_response, order, axis=1),
        *(np.asarray(row, np.float32) for row in rows),
    )


def init_adapter(
    key: Array,
    config: ModelConfig,
    *,
    rank: int = 8,
    alpha: float | None = None,
    targets: Sequence[str] = ALL_LINEAR,
) -> dict[str, Any]:
    """An adapter that changes nothing yet: A gaussian, B zero (Hu et al. 2021, arXiv 2106.09685).

    Args:
      key: of A, whose entries have variance 1 / in.
      rank: of every change.
      alpha: every change is scaled by alpha / rank; by default alpha is the rank.
      targets: modules by their last name in the checkpoint, such as q_proj; by default all linear
        layers of attention and MLP.

    Raises:
      InputError: a rank below 1, an alpha that isn't above 0, no target or an unknown one.
    """
    if rank < 1:
        raise InputError(f"adapter rank={rank} must be at least 1, e.g. 8")
    if alpha is not None and not alpha > 0:
        raise InputError(f"adapter alpha={alpha} must be above 0, e.g. the rank")
    shapes = leaf_shapes(config)
    modules: dict[str, list[mapping.Entry]] = {}
    for entry in mapping.entries(config):
        if mapping.is_linear(entry):
            modules.setdefault(entry.key.split(".")[-2], []).append(entry)
    targets = list(modules) if tuple(targets) == ALL_LINEAR else targets
    unknown = [name for name in targets if name not in modules]
    if unknown or not targets:
        raise InputError(
            f"adapter targets {unknown or list(targets)} name no linear layers of a "
            f"{config.family} model; give some of {', '.join(modules)}"
        )
    adapter = {}
    for name in dict.fromkeys(targets):
        for number, entry in enumerate(modules[name]):
            own = jax.random.fold_in(key, list(modules).index(name))
            own = jax.random.fold_in(own, number) if number else own
            layers, inputs, _ = shapes[entry.leaves[0]]
            a = jax.random.normal(own, (layers, rank, inputs)) / np.sqrt(inputs)
            for leaf in entry.leaves:
                adapter[leaf] = LowRank(
                    a=a,
                    b=jnp.zeros((layers, shapes[leaf][-1], rank)),
                    scale=jnp.full(layers, 1.0 if alpha is None else alpha / rank),
                )
    return traverse_util.unflatten_dict(adapter)


def start_training(training: Training, adapter: Any) -> TrainState:
    """The state before the first step."""
    return TrainState(adapter, training.optimizer.init(adapter))


@functools.partial(jax.jit, static_argnums=0)
def step(
    training: Training, net: Network, state: TrainState, batch: Examples
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """One step on a batch of micro-batches, [A, M, ...], whose gradients are added up.

    Args:
      net: the target without an adapter; it stays as it is.

    Returns: the state, and "nll", "moment" (the two parts of the loss, the second without its
      factor) and "gradient" (its norm before it is clipped).
    """

    def differentiate(examples):
        return jax.value_and_grad(loss, has_aux=True)(state.adapter, training, net, examples)

    def add(total, examples):
        return jax.tree.map(jnp.add, total, differentiate(examples)), None

    shapes = jax.eval_shape(differentiate, jax.tree.map(lambda x: x[0], batch))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    ((_, metrics), gradient), _ = jax.lax.scan(add, zero, batch)
    changes, new = training.optimizer.update(gradient, state.optimizer, state.adapter)
    adapter = optax.apply_updates(state.adapter, changes)
    squares = sum(jnp.vdot(x, x) for x in jax.tree.leaves(gradient))
    metrics = {**metrics, "gradient": jnp.sqrt(squares)}
    return TrainState(adapter, new), metrics


def fit(
    training: Training,
    net: Network,
    adapter: Any,
    data: Examples,
    *,
    odds: Float[np.ndarray, " M"],
    rows: int,
    micro_rows: int,
    seed: Sequence[int],
) -> tuple[Any, dict[str, Float[np.ndarray, " steps"]]]:
    """All steps, each on `rows` examples drawn with replacement.

    An example drawn with odds o counts c / (rows * o), so that every step's gradient is on average
    that of all examples.

    Args:
      odds: of being drawn, up to a factor; above 0 where weights or moments are.
      micro_rows: examples on the device at once.
      seed: of the draws.

    Returns: the adapter, and per step the metrics of `step` and the "tokens" it read.
    """
    odds = odds / odds.sum()
    rng, log = np.random.default_rng(list(seed)), []
    state = start_training(training, adapter)
    for _ in range(training.steps):
        picked = rng.choice(len(odds), rows, p=odds)
        factor = (1 / (odds[picked] * rows)).astype(np.float32)
        batch = data[picked]
        batch = batch.replace(  # type: ignore[attr-defined]
            weights=batch.weights * factor, moments=batch.moments * factor
        )
        state, metrics = step(training, net, state, batch.split(-(-rows // micro_rows)))
        log.append(metrics | {"tokens": batch.valid.sum()})
    return jax.tree.map(fetch, state.adapter), {
        name: np.array([fetch(one[name]) for one in log]) for name in log[0]
    }


def loss(
    adapter: Any, training: Training, net: Network, examples: Examples
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The loss of the module's docstring, and its two parts; a plain sum over examples."""
    log_q = response_log_probs(adapter, net, examples)
    whole = jnp.logaddexp(examples.log_rest, jnp.log(training.adapter_share) + log_q)
    ratios = jnp.where(examples.moments > 0, examples.log_start - whole, -jnp.inf)
    parts = {
        "nll": -jnp.sum(examples.weights * log_q),
        "moment": jnp.sum(examples.moments * jnp.exp(ratios)),
    }
    return parts["nll"] + training.penalty * parts["moment"], parts


def response_log_probs(adapter: Any, net: Network, examples: Examples) -> Float[Array, " M"]:
    """log q(y) of each response under the network with the adapter.

    Prompt and response run in one pass. Logits exist for about 256 positions at a time, and are
    computed once more for the gradient.
    """
    fixed = jax.lax.stop_gradient
    adapter = jax.tree.map(
        lambda one: one.replace(scale=fixed(one.scale)), adapter, is_leaf=_is_low_rank
    )
    net = dataclasses.replace(net, adapter=adapter)
    tokens = constrain(jnp.asarray(examples.tokens), "samples", "positions")
    hidden, _ = net.forward(
        tokens[:, None],
        prompt_positions(jnp.asarray(examples.valid))[:, None],
        response=examples.response[:, None],
        valid=examples.valid,
    )

    @jax.checkpoint
    def score(row):
        hidden, token = row
        return token_log_prob(net.logits(hidden), token, net.temperature)

    by_position = jnp.swapaxes(hidden[:, 0, :-1], 0, 1), tokens[:, 1:].T
    at_once = max(1, HEAD_CHUNK // tokens.shape[0])
    log_probs = jax.lax.map(score, by_position, batch_size=at_once)
    return jnp.sum(jnp.where(examples.response[:, 1:].T, log_probs, 0.0), axis=0)


def _is_low_rank(x: Any) -> bool:
    return isinstance(x, LowRank)


def _factors(adapter: Any) -> Any:
    """True for A and B, False for the scales."""
    return jax.tree.map(lambda _: LowRank(True, True, False), adapter, is_leaf=_is_low_rank)  # type: ignore[arg-type]
