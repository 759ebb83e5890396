"""What a study's figures depend on, beside the policies, queries and judge."""

import dataclasses

from tailrisk_jax.errors import InputError

ALLOCATIONS = ("equal", "variance")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a study's figures depend on, beside the policies, queries and judge.

    Attributes:
      num_samples: N, responses per query; with `until`, per query and round.
      max_new_tokens: T, where responses are cut; part of the estimand.
      seed: of every draw.
      level: of the intervals.
      until: sample on, round by round, each query until its `watched_interval` is no wider than
        this share of its estimate to either side, or `max_samples` are drawn; None for one round.
      max_samples: responses per query at most, with `until`.
      allocation: how a later round is shared among the queries that still need it, "equal" or by
        "variance"; see `rounds.next_round`.
      replicates: how many times N responses are drawn and estimated from; all count together.
      chunk_size: responses that are drawn, judged and kept together; changes no response.
      batch_size: responses on the device at once, None for what fits; changes no figure.
      score_batch_size: the same for scoring them, by default `batch_size`.
    """

    num_samples: int = 500
    max_new_tokens: int = 64
    seed: int = 0
    level: float = 0.95
    until: float | None = None
    max_samples: int = 20_000
    allocation: str = "equal"
    replicates: int = 1
    chunk_size: int = 2000
    batch_size: int | None = None
    score_batch_size: int | None = None

    def __post_init__(self):
        for name in (
            "num_samples", "max_new_tokens", "max_samples", "replicates", "chunk_size",
            "batch_size", "score_batch_size",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}={value} must be at least 1")
        if not 0 < self.level < 1:
            raise InputError(f"level={self.level} must lie between 0 and 1, e.g. 0.95")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed={self.seed} must lie between 0 and 2**32 - 1")
        if self.allocation not in ALLOCATIONS:
            raise InputError(f"allocation={self.allocation!r} isn't one of {list(ALLOCATIONS)}")
        if self.until is None:
            return
        if not self.until > 0:
            raise InputError(f"until={self.until} must be above 0, e.g. 0.2 for 20%")
        if self.replicates > 1:
            raise InputError(
                f"until={self.until} with replicates={self.replicates}: replicates have a fixed "
                "number of samples; give one of the two"
            )
        if self.max_samples < self.num_samples:
            raise InputError(
                f"max_samples={self.max_samples} is below num_samples={self.num_samples}, "
                "which is one round; raise it or draw less a round"
            )
