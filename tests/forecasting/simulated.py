"""Groups of variants drawn from the model that the estimators assume; one shape for all tests."""

import numpy as np

QUERIES, VARIANTS, KINDS = 40, 13, 3
SD = 0.5  # between variants of one query


def simulate(seed, *, sd=SD, between=1.0, shifts=(0.0, 0.0, 0.0)):
    """True values, estimates, standard errors, kinds and a mask with gaps."""
    draw = np.random.default_rng(seed)
    shape = QUERIES, VARIANTS
    kinds = np.broadcast_to(np.arange(VARIANTS) % KINDS, shape)
    truth = -3 + between * draw.normal(size=(QUERIES, 1)) + sd * draw.normal(size=shape)
    truth = truth + np.asarray(shifts)[kinds]
    stderr = draw.uniform(0.05, 0.4, shape)
    mask = draw.random(shape) > 0.15
    mask[:, 0] = True
    return truth, truth + stderr * draw.normal(size=shape), stderr, kinds, mask
