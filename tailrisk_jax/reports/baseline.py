"""What a run's page compares its estimates with."""

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class BaselinePoints:
    """Estimates made elsewhere, in the order of a run's queries; NaN where there is none.

    Attributes:
      name: where they are from, for people.
      value, lower, upper: the estimate and its interval.
      num_samples: what each rests on.
    """

    name: str
    value: Float[np.ndarray, " Q"]
    lower: Float[np.ndarray, " Q"]
    upper: Float[np.ndarray, " Q"]
    num_samples: Float[np.ndarray, " Q"]

    def agreement(self, columns: Mapping[str, np.ndarray]) -> list[tuple[str, str]]:
        """How it lies to a run's estimates, as names and figures for people.

        Args:
          columns: value, lower and upper of the run's estimates.
        """
        value = columns["value"]
        both = np.isfinite(value) & np.isfinite(self.value)
        hits = both & (value > 0) & (self.value > 0)
        overlap = both & (columns["lower"] <= self.upper) & (self.lower <= columns["upper"])
        ratio = np.log(value[hits] / self.value[hits])
        found = [
            ("queries with both", f"{both.sum()} of {len(value)}"),
            ("intervals that overlap", f"{overlap.sum()} of {both.sum()}"),
            ("without a hit in the baseline", f"{(both & (self.value == 0)).sum()}"),
            ("without a hit in the run", f"{(both & (value == 0)).sum()}"),
        ]
        if len(ratio):
            found += [
                ("estimate over baseline, median", f"{np.exp(np.median(ratio)):.3g}"),
                ("furthest apart", f"{np.exp(np.abs(ratio).max()):.3g} times"),
            ]
        return found
