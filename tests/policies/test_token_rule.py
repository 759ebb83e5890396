"""The token rule: the distribution drawn from is the one recorded, against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from tailrisk_jax.policies import draw, log_distribution, token_log_prob
from tailrisk_jax.policies.token_rule import _invert, block_size
from tests.oracles import frequency_p_value

SIZES = (1, 2, 3, 4, 5, 97)
DRAWS = 100_000  # in every call, which therefore share a compilation
ONE = jnp.float32(1)
_draw = jax.jit(draw)


def random_logits(size: int, kind: str) -> np.ndarray:
    rng = np.random.default_rng(size)
    logits = rng.normal(size=size).astype(np.float32) * 2
    if kind == "extreme":
        logits = logits * 1e4 + 1e6
    if kind == "some-impossible":
        logits[rng.random(size) < 0.5] = -np.inf
        logits[rng.integers(size)] = 0.0
    if kind == "one-possible":
        logits[:] = -np.inf
        logits[rng.integers(size)] = -3e4
    return logits


def inverse_cdf(uniforms: np.ndarray, logits: np.ndarray):
    """Block and token by inversion in float64, and the distance to the nearest other outcome."""
    probabilities = scipy.special.softmax(logits.astype(np.float64))
    size = block_size(len(logits))
    blocks = np.pad(probabilities, (0, -len(logits) % size)).reshape(-1, size)

    def invert(u, masses):
        cumulative = np.cumsum(masses, axis=-1) / np.sum(masses, axis=-1, keepdims=True)
        margin = np.abs(cumulative - u[:, None]).min(axis=-1)
        return np.sum(cumulative <= u[:, None], axis=-1), margin

    block, margin = invert(uniforms[:, 0], np.tile(blocks.sum(1), (len(uniforms), 1)))
    within, other = invert(uniforms[:, 1], blocks[block])
    return block * size + within, np.minimum(margin, other)


@pytest.mark.parametrize("kind", ["ordinary", "extreme", "some-impossible", "one-possible"])
@pytest.mark.parametrize("size", SIZES)
def test_draw_is_the_float64_inverse_cdf(size, kind):
    logits = random_logits(size, kind)
    uniforms = np.random.default_rng(1).random((DRAWS, 2), np.float32)
    tokens, log_probs = _draw(uniforms, logits[None], ONE)
    wanted, margin = inverse_cdf(uniforms.astype(np.float64), logits)
    clear = margin > 1e-6
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(np.asarray(tokens)[clear], wanted[clear])
    exact = scipy.special.log_softmax(logits.astype(np.float64))[np.asarray(tokens)]
    assert np.all(np.isfinite(exact))
    np.testing.assert_allclose(log_probs, exact, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("size", SIZES[1:])
def test_draws_have_the_distribution_that_is_recorded(size, temperature):
    logits = random_logits(size, "ordinary")
    uniforms = jax.random.uniform(jax.random.key(size), (DRAWS, 2))
    tokens, log_probs = _draw(uniforms, logits[None], jnp.float32(temperature))
    counts = np.bincount(tokens, minlength=size)
    exact = scipy.special.softmax(logits.astype(np.float64) / temperature)
    assert frequency_p_value(counts, exact) > 1e-3
    recorded = np.asarray(log_distribution(logits, jnp.float32(temperature)))
    assert recorded.dtype == np.float32
    np.testing.assert_allclose(np.exp(recorded, dtype=np.float64), exact, rtol=2e-6)
    np.testing.assert_allclose(log_probs, recorded[np.asarray(tokens)], atol=1e-6)
    scored = token_log_prob(
        np.broadcast_to(logits, (size, size)), jnp.arange(size), jnp.float32(temperature)
    )
    np.testing.assert_allclose(scored, recorded, atol=1e-6)


@pytest.mark.parametrize("size", SIZES[1:])
def test_impossible_tokens_are_never_drawn(size):
    """Every set of impossible tokens on the edges, at the smallest and largest uniforms."""
    edge = np.float32([0, 2**-24, 2**-23, 0.5, 1 - 2**-23, 1 - 2**-24])
    uniforms = np.resize(np.stack(np.meshgrid(edge, edge), axis=-1), (DRAWS, 2))
    for possible in ([0], [size - 1], [size // 2], [0, size - 1]):
        logits = np.full(size, -np.inf, np.float32)
        logits[possible] = np.float32([3.0, -20.0])[: len(possible)]
        tokens, log_probs = _draw(uniforms, logits[None], ONE)
        assert set(np.asarray(tokens).tolist()) <= set(possible)
        assert np.all(np.isfinite(log_probs))


def test_rounding_of_the_cumulative_sum_never_picks_a_zero_mass():
    """Uniforms on both sides of every step of cumulative sums as long as a 130k vocabulary's.

    A parallel cumulative sum is rounded differently at each index: it moves where the mass is
    zero, up or down.
    """
    rng = np.random.default_rng(0)
    masses = np.exp(3 * rng.normal(size=(100, 360))).astype(np.float32)
    masses[rng.random(masses.shape) < 0.5] = 0
    cumulative = np.cumsum(masses.astype(np.float64), axis=-1)
    steps = np.round(cumulative / cumulative[:, -1:] * 2**23)
    invert = jax.jit(jax.vmap(_invert, in_axes=(1, None), out_axes=1))
    for offset in (-2, -1, 0, 1, 2):
        uniforms = np.clip((steps + offset) / 2**23, 0, 1 - 2**-23).astype(np.float32)
        picked = np.asarray(invert(uniforms, masses))
        assert np.all(np.take_along_axis(masses, picked, axis=1) > 0)


def test_rows_do_not_depend_on_each_other():
    logits = np.random.default_rng(0).normal(size=(6, 97)).astype(np.float32)
    uniforms = np.random.default_rng(1).random((6, 2), np.float32)
    together, _ = _draw(uniforms, logits, ONE)
    apart = [int(_draw(u[None], x[None], ONE)[0][0]) for u, x in zip(uniforms, logits, strict=True)]
    assert np.asarray(together).tolist() == apart
