"""Weights of 8 bits: rounding and scales, the product, and where they are refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from tailrisk_jax.errors import InputError
from tailrisk_jax.models import Int8, is_quantised, load_adapter, quantise, save_model
from tailrisk_jax.policies import Policy, in_int8, interpolate, logits
from tests.oracles import random_model, tiny_config

CONFIG = tiny_config()
MODEL = random_model(CONFIG)
TOKENS, MASK = np.array([[1, 2, 3, 0], [3, 1, 0, 2]]), np.ones((2, 4), bool)


def kernels(model) -> dict:
    leaves = traverse_util.flatten_dict(model.params)
    return {path: leaf for path, leaf in leaves.items() if path[-1] == "kernel"}


def rounded(model):
    """The model with every kernel replaced by what its Int8 stands for."""

    def dense(leaf):
        return leaf.values * leaf.scales[:, None] if isinstance(leaf, Int8) else leaf

    params = jax.tree.map(dense, model.params, is_leaf=lambda x: isinstance(x, Int8))
    return dataclasses.replace(model, params=params)


def test_kernels_are_rounded_to_the_nearest_multiple_of_their_channels_scale():
    model = dataclasses.replace(MODEL, params=jax.tree.map(jnp.copy, MODEL.params))
    zeroed = model.params["layers"]["mlp"]["up"]["kernel"].at[1, :, 3].set(0)
    model.params["layers"]["mlp"]["up"]["kernel"] = zeroed
    ours = quantise(model)
    assert is_quantised(ours) and not is_quantised(model)
    assert len(kernels(ours)) == 7
    for path, kernel in kernels(ours).items():
        exact = np.asarray(kernels(model)[path], np.float64)
        assert kernel.values.dtype == jnp.int8 and kernel.scales.dtype == jnp.float32
        largest = np.abs(exact).max(axis=1)
        np.testing.assert_allclose(kernel.scales, largest / 127, rtol=1e-6)
        assert np.all(np.abs(kernel.values).max(axis=1) == np.where(largest > 0, 127, 0))
        step = np.asarray(kernel.scales, np.float64)[:, None]
        error = np.abs(np.asarray(kernel.values) * step - exact)
        assert np.all(error <= step / 2 * (1 + 1e-5))


def test_the_rest_is_the_models_own():
    ours, theirs = (traverse_util.flatten_dict(m.params) for m in (quantise(MODEL), MODEL))
    others = {path for path in theirs if path[-1] != "kernel"}
    assert len(others) == 5
    assert all(ours[path] is theirs[path] for path in others)


def test_it_computes_what_the_rounded_kernels_do():
    ours = quantise(MODEL)
    got, wanted = (logits(Policy(model), TOKENS, MASK) for model in (ours, rounded(ours)))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    original = logits(Policy(MODEL), TOKENS, MASK)
    change = np.abs(got - original).max() / np.abs(original).max()
    assert 1e-4 < change < 0.1


def test_the_product_is_in_the_dtype_of_the_activations():
    """Integers to 127 are exact in bfloat16, so that only the product is rounded."""
    kernel = kernels(quantise(MODEL))["layers", "mlp", "up", "kernel"]
    one = Int8(kernel.values[0], kernel.scales[0])
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 8)), jnp.bfloat16)
    exact = np.asarray(x, np.float64) @ (np.asarray(one.values) * np.float64(one.scales))
    got = x @ one
    assert got.dtype == jnp.bfloat16 and got.shape == (3, 5, 12)
    np.testing.assert_allclose(np.float64(got), exact, rtol=0, atol=2**-7 * np.abs(exact).max())


def test_what_needs_the_original_is_refused(tmp_path):
    ours = quantise(MODEL)
    for call in (
        lambda: quantise(ours),
        lambda: save_model(ours, tmp_path / "out"),
        lambda: load_adapter(ours, tmp_path),
        lambda: interpolate(in_int8(Policy(MODEL)), MODEL, 0.5),
        lambda: interpolate(Policy(MODEL), ours, 0.5),
    ):
        with pytest.raises(InputError, match="int8"):
            call()
    assert not (tmp_path / "out").exists()
