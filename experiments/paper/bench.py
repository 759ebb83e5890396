"""Runs of one model, and what an experiment looks at in them."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from experiments.paper.setting import Options
from tailrisk_jax.cli import estimate as command
from tailrisk_jax.cli.inputs import Inputs, StudyOptions, load_inputs
from tailrisk_jax.cli.tune import Tune, tune_from
from tailrisk_jax.estimators import Estimate, Interval, Report, explain
from tailrisk_jax.organisms import (
    OrganismHarm,
    PersonaTrait,
    load_organism,
    load_persona_organism,
)
from tailrisk_jax.policies import at_temperature
from tailrisk_jax.studies import (
    Observations,
    Study,
    observations,
    read_samples,
    read_study,
    report_of,
)
from tailrisk_jax.studies.provenance import content_hash
from tailrisk_jax.studies.store import is_run
from tailrisk_jax.studies.tuning import PROPOSAL

Method = Literal["choose", "search", "windows"]
LEVEL = 0.95
LEAST_HITS = 10  # of Monte Carlo, for a query that its estimate can tell
_NOT_OF_DRAWS = {"batch_size", "weights_cache", "candidates", "pilot", "pilot_share"}


@dataclasses.dataclass(frozen=True, eq=False)
class Drawn:
    """A run: `proposal` in plain terms."""

    folder: Path
    study: Study
    observed: Observations

    @property
    def proposal(self) -> str:
        """What was drawn from."""
        return self.study.identity["proposal"]["text"]

    def report(self, size: int | None = None) -> Report:
        """Of the first `size` draws, or of all, [Q]."""
        observed = self.observed
        if size is not None and size < observed.scores.shape[1]:
            observed = first(observed, size)
        return report_of(observed, self.study.weighting, level=LEVEL)

    def parts(self, size: int) -> Report:
        """Of parts of `size` draws, [Q, R]."""
        return report_of(self.observed, self.study.weighting, level=LEVEL, size=size)

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "proposal": self.proposal,
            "samples": int(self.observed.present.sum(axis=1).max()),
            "seed": self.study.settings.seed,
            "estimand": self.study.estimand,
            "tokens": int(self.observed.lengths.sum()),
            "unscored": int(np.isnan(self.observed.scores[self.observed.present]).sum()),
        }


_EMBEDDED = {
    "organism": (load_organism, OrganismHarm),
    "organism:persona": (load_persona_organism, PersonaTrait),
}


class Bench:
    """A model, queries and a judge, loaded once for all runs of an experiment.

    Attributes:
      truth: bounds [Q, 2] on each query's risk, NaN where it isn't known.
      runs: what was drawn, by name, for the record.
    """

    def __init__(self, options: Options):
        self.options = options
        self.inputs: Inputs = load_inputs(options, quiet=options.quiet)
        self.queries = self.inputs.selection.queries
        self.truth = self._truth()
        self.runs: dict[str, Drawn] = {}

    @property
    def truth_known(self) -> bool:
        """Of every query."""
        return bool(np.isfinite(self.truth).all())

    def run(
        self,
        name: str,
        proposal: str,
        samples: int,
        *,
        temperature: float | None = None,
        offset: int = 0,
    ) -> Drawn:
        """Draws, judges and estimates what isn't there yet.

        A run that holds more answers already is taken up to `samples`.

        Args:
          temperature: of the target, in place of its own.
          offset: of the seed, so that runs share no draws.
        """
        options, inputs = self._at(temperature)
        seed = (options.seed + offset) % 2**32
        fields = {one.name: getattr(options, one.name) for one in dataclasses.fields(StudyOptions)}
        fields |= {"seed": seed, "candidates": (), "pilot": None, "pilot_share": None}
        own = command.Estimate(
            **fields, out=self._folder(options, proposal, {"seed": seed}), proposal=proposal,
            samples=samples, level=LEVEL, chunk_size=options.chunk_size, quiet=options.quiet,
            mesh=options.mesh,
        )  # fmt: skip
        assert own.out is not None
        held = read_study(own.out).settings.num_samples if is_run(own.out) else 0
        if not options.quiet:
            asked = f"{samples:,} answers to each of {len(self.queries)} queries"
            print(f"{name}: {asked} from {proposal}", file=sys.stderr, flush=True)
        command.estimate_from(
            inputs, dataclasses.replace(own, samples=max(samples, held)), show=False
        )
        assert own.out is not None
        study = read_study(own.out)
        observed = first(observations(study.queries, read_samples(own.out)), samples)
        self.runs[name] = Drawn(own.out, study, observed)
        return self.runs[name]

    def tuned(self, method: Method, **changes: Any) -> str:
        """tuned:FOLDER, what `tailrisk tune` finds by a pilot.

        Args:
          changes: of its options.
        """
        options = self.options
        fields = {one.name: getattr(options, one.name) for one in dataclasses.fields(StudyOptions)}
        folder = self._folder(options, f"tuned-{method}", changes)
        if not (folder / PROPOSAL).is_file():
            quiet = options.quiet
            own = Tune(**fields | changes, method=method, out=folder, quiet=quiet)
            tune_from(self.inputs, own)
        return f"tuned:{folder}"

    def monte_carlo(self, samples: int) -> Drawn:
        """The target itself, with a seed of its own."""
        return self.run("Monte Carlo", "target", samples, offset=1)

    def decades(self, reference: np.ndarray) -> np.ndarray:
        """d where 10^d <= reference < 10^(d + 1), NaN for 0 or unknown."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(reference > 0, np.floor(np.log10(reference)), np.nan)

    def _at(self, temperature: float | None) -> tuple[Options, Inputs]:
        if temperature is None:
            return self.options, self.inputs
        options = dataclasses.replace(self.options, temperature=temperature)
        return options, dataclasses.replace(
            self.inputs,
            options=dataclasses.replace(self.inputs.options, temperature=temperature),
            target=at_temperature(self.inputs.target, temperature),
        )

    def _folder(self, options: Options, proposal: str, more: Mapping[str, Any]) -> Path:
        """One for everything that figures depend on."""
        names = {one.name for one in dataclasses.fields(StudyOptions)} - _NOT_OF_DRAWS
        study = {name: str(getattr(options, name)) for name in sorted(names)}
        tag = content_hash({**study, "proposal": proposal, **more})[:8]
        short = re.sub(r"[^\w.@+*-]+", "_", proposal)[:40]
        return options.out / "runs" / f"{short}-{tag}"

    def _truth(self) -> np.ndarray:
        unknown = np.full((len(self.queries), 2), np.nan)
        options, embedded = self.options, _EMBEDDED.get(str(self.options.model))
        if embedded is None or options.temperature != 1:
            return unknown
        load, judge = embedded
        organism = load()
        if options.cut != organism.max_new_tokens or not isinstance(self.inputs.judge, judge):
            return unknown
        shipped = {str(query): (query.lower, query.upper) for query in organism.queries}
        rows = [shipped.get(query.text, (np.nan, np.nan)) for query in self.queries]
        return np.array(rows)


def first(observed: Observations, size: int) -> Observations:
    """The first draws of each query."""
    arrays = {
        field.name: getattr(observed, field.name)[..., :size]
        for field in dataclasses.fields(observed)
        if field.name != "queries"
    }
    return dataclasses.replace(observed, **arrays)


def words(report: Report) -> np.ndarray:
    """The verdicts' words, in the report's shape."""
    return np.array([one.word for one in explain(report.verdict)]).reshape(
        np.shape(report.verdict.code)
    )


def limits_of(lower: Any, upper: Any) -> Interval:
    """An interval of arrays of any kind."""
    return Interval(lower=lower, upper=upper)


def holds(limits: Interval | Estimate, truth: np.ndarray) -> np.ndarray:
    """Whether each interval holds the truth, which has bounds [.., 2] itself."""
    lower, upper = truth[..., 0], truth[..., 1]
    return np.asarray((limits.lower <= upper) & (lower <= limits.upper))


def middle(truth: np.ndarray) -> np.ndarray:
    """Geometric mean of the bounds, [Q]."""
    return np.sqrt(truth[:, 0] * truth[:, 1])
