import jax
import pytest


@pytest.fixture(autouse=True)
def strict_promotion():
    """Broadcasts of unequal rank and silent dtype promotion are errors in this room."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


def _transformed(fn):
    def run(*args):
        batched = jax.tree.map(lambda x: jax.numpy.stack([x, x]), args)
        return jax.tree.map(lambda x: x[1], jax.jit(jax.vmap(fn))(*batched))

    return run


@pytest.fixture(params=["direct", "jit of vmap"])
def transform(request):
    """Turns a function of arrays into itself, or into one row of its jitted vmap."""
    return {"direct": lambda fn: fn, "jit of vmap": _transformed}[request.param]
