"""What an experiment takes on hardware that need not be there, by the formulas of planning."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp

from experiments.paper.setting import Options
from tailrisk_jax.cli.loading import resolved_dtype
from tailrisk_jax.cli.plan import read_config
from tailrisk_jax.errors import InputError
from tailrisk_jax.planning import Workload, choose, phase_seconds, topology
from tailrisk_jax.studies import read_queries


@dataclasses.dataclass(frozen=True)
class Planned:
    """Draws that an experiment makes, of each query.

    Attributes:
      policies: that score each draw; 0 for Monte Carlo, whose draws need no scoring.
    """

    name: str
    samples: int
    policies: int


def policies_of(proposal: str) -> int:
    """How many policies score a draw of a proposal: its terms, and the target."""
    terms = [term.partition("*")[2] or term for term in proposal.split(" + ")]
    return len({"target", *(term.strip() for term in terms)})


def expected(options: Options, planned: Sequence[Planned]) -> list[str]:
    """Lines to print: the time of each part at peak rates, a lower bound.

    Raises:
      InputError: no topology, or one that is unknown or too small for the model.
    """
    if options.topology is None or options.model is None:
        raise InputError(
            "--only-plan needs --model and --topology, such as h100:1 or v5e:4x4; give them"
        )
    where = topology(options.topology)
    name, config = read_config(options.model)
    dtype = resolved_dtype(options.dtype)
    if options.dtype == "auto" and not options.on_organism:
        dtype = "bfloat16"  # as it would be there
    queries = _queries(options)
    lines, total, answers = [], 0.0, 0
    for part in planned:
        study = Workload(
            queries=queries,
            samples=part.samples,
            prompt=options.prompt_tokens,
            length=options.cut,
            policies=max(part.policies, 1),
            itemsize=jnp.dtype(dtype).itemsize,
        )
        best = choose(config, study, where, name=name)[0]
        phases = best.phases if part.policies else best.phases[:2]
        seconds = sum(phase_seconds(phase, where) for phase in phases)
        total, answers = total + seconds, answers + queries * part.samples
        lines.append(
            f"{part.name}: {part.samples:,} answers to each of {queries} queries, scored under "
            f"{part.policies} policies: at least {seconds / 3600:.2g} h (mesh {best.layout})"
        )
    hours = total / 3600
    chips = f"{where.count * hours:.2g} chip-hours"
    lines.append(
        f"{name} on {where.name}: at least {hours:.2g} h, {chips}, for {answers:,} answers of up "
        f"to {options.cut} tokens. By formula, at peak rates; judging them is not counted."
    )
    return lines


def _queries(options: Options) -> int:
    """How many; --where, --exclude and lengths are not looked at."""
    count = options.usual_queries
    if options.queries is not None:
        count = len(read_queries(options.queries, options.query_column).queries)
    return min(count, options.first or count)
