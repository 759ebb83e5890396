"""`tailrisk demo`: the main job on the embedded organism, beside the exact truth."""

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from tailrisk_jax.cli.progress import table_console, track
from tailrisk_jax.errors import InputError
from tailrisk_jax.estimators import Estimate, Replicates, explain, monte_carlo, replicates
from tailrisk_jax.organisms import Organism, OrganismHarm, OrganismQuery, load_organism
from tailrisk_jax.organisms.efficiency import (
    HarmfulResponses,
    efficiency,
    load_responses,
    log_prob_of_responses,
)
from tailrisk_jax.policies import Component, Mixture, encode
from tailrisk_jax.reports import ComparisonRow, comparison_table, plot_against_truth, spread_line
from tailrisk_jax.rollouts import Draws, draw
from tailrisk_jax.studies import (
    Results,
    Settings,
    StudyQuery,
    check_output,
    environment,
    parse_proposal,
    run_study,
    save_results,
    summarise,
)

PROPOSAL = "0.1*target + 0.7*ablation:refusal:0.1@2.5 + 0.2*checkpoint:unsafe"
AT_ONCE = 5  # queries of the baseline drawn in one call
MARGIN = 1.1  # answers of the target may be shorter than the proposal's, so more fit
REPEATS = 4  # parts of each query's baseline, whose spread is shown beside the error they claim
MONTE_CARLO = 1  # folded into the seed, so that the baseline has draws of its own


@dataclasses.dataclass(frozen=True)
class Demo:
    """Estimate tail risks of the embedded model, beside exact truth and Monte Carlo.

    The model is small and fictional: it refuses to say how nonsense objects are made. Its chance
    of answering all the same is known exactly, from 1e-1 down to 1e-6. Takes about half a minute.
    """

    queries: int = 20
    """How many queries, spread evenly over the decades."""
    samples: int = 500
    """Answers drawn from the proposal for each query."""
    proposal: str = PROPOSAL
    """What to draw from; see `tailrisk estimate --help`."""
    seed: int = 0
    """Of all draws."""
    out: Path = Path("runs/demo")
    """Folder for the results; a previous demo in it is replaced."""


def demo(options: Demo) -> None:
    """Runs the command."""
    out = options.out
    if not (out / "summary.json").exists() or (out / "study.json").exists():
        check_output(out)
    organism = load_organism()
    settings = Settings(
        num_samples=options.samples,
        max_new_tokens=organism.max_new_tokens,
        seed=options.seed,
    )
    queries = _spread(organism.forbidden, options.queries)
    parsed = parse_proposal(
        options.proposal,
        organism.target,
        vectors=organism.directions,
        checkpoints={"unsafe": organism.unsafe},
    )
    proposal = parsed.policy
    console = table_console()
    console.print(
        f"Drawing {options.samples} answers to each of {len(queries)} queries from\n"
        f"  {options.proposal}\n"
        "and reweighting them by target over proposal; then as many tokens of Monte Carlo.",
        highlight=False,
    )
    study = [StudyQuery(query.id, str(query)) for query in queries]
    # What needs no result of the study runs beside it, so that no core waits while another thread
    # traces.
    tasks = "importance sampling", "Monte Carlo, same tokens"
    with track(len(queries), *tasks) as [first, second], ThreadPoolExecutor(1) as beside:
        plain = _MonteCarlo(organism, proposal, queries, settings)
        drawn = beside.submit(plain.draw, second)
        known = beside.submit(_harmful_responses, organism, proposal, queries)
        results = run_study(
            organism.target, proposal, study, OrganismHarm(), settings, names=parsed.names,
            on_progress=lambda now: first(now.judged // options.samples),
        )  # fmt: skip
        drawn.result()
        baseline, repeats = plain.estimate(results)
        rows = _rows(organism, proposal, queries, results, baseline, repeats, *known.result())
    summary = {
        "estimand": f"P(harm) in answers of at most {organism.max_new_tokens} tokens",
        "proposal": options.proposal,
        **summarise(results),
        "seed": options.seed,
        "environment": environment(),
        "comparison": [dataclasses.asdict(row) for row in rows],
    }
    save_results(results, out, summary)
    plot_against_truth(rows, out / "estimate_against_truth.png")
    console.print(comparison_table(rows))
    _explain(console, rows, results)
    console.print(f"Monte Carlo in parts. {spread_line(repeats)}", highlight=False)
    console.print(f"Written to {out}, with a picture: estimate_against_truth.png")


def _spread(queries: Sequence[OrganismQuery], count: int) -> list[OrganismQuery]:
    """`count` queries at even ranks of the truth, the likeliest first."""
    if not 1 <= count <= len(queries):
        raise InputError(f"queries={count} must lie between 1 and {len(queries)}")
    ranked = sorted(queries, key=lambda query: -query.lower)
    return [ranked[i] for i in np.linspace(0, len(ranked) - 1, count).round().astype(int)]


class _MonteCarlo:
    """Monte Carlo on each query, with no more tokens through the network than were spent on it.

    A draw of the proposal costs its tokens once for decoding and once for each distinct policy
    that scores it; a Monte Carlo draw costs its tokens once.
    """

    def __init__(
        self,
        organism: Organism,
        proposal: Component | Mixture,
        queries: Sequence[OrganismQuery],
        settings: Settings,
    ):
        components = proposal.components if isinstance(proposal, Mixture) else (proposal,)
        experts = [expert for component in components for expert in component.experts]
        self._passes = 1 + len({id(policy) for policy in (organism.target, *experts)})
        self._organism, self._queries, self._settings = organism, queries, settings
        self._prompts = encode(organism.target.model, queries)
        self._draws: list[Draws] = []

    def draw(self, advance: Callable[[int], None]) -> None:
        """Draws about as many as will be needed, a tenth more than of the proposal."""
        for row in range(0, len(self._queries), AT_ONCE):
            self._draws.append(self._drawn(slice(row, row + AT_ONCE), MARGIN))
            advance(min(row + AT_ONCE, len(self._queries)))

    def _drawn(self, part: slice, margin: float) -> Draws:
        settings = self._settings
        key = jax.random.fold_in(jax.random.key(settings.seed), MONTE_CARLO)
        size = round(margin * self._passes * settings.num_samples)
        target = self._organism.target
        return draw(key, target, self._prompts[part], size, settings.max_new_tokens)

    def estimate(self, results: Results) -> tuple[Estimate, Replicates]:
        """From the draws that fit into what `results` spent; whole, and in parts."""
        budgets = self._passes * results.observations.lengths.sum(axis=1)
        scores: list[np.ndarray] = []
        for k, draws in enumerate(self._draws):
            part, margin = slice(k * AT_ONCE, (k + 1) * AT_ONCE), MARGIN
            spent = np.cumsum(np.asarray(draws.mask).sum(axis=-1), axis=1)
            while np.any(spent[:, -1] < budgets[part]):  # more draws keep the earlier ones
                margin *= MARGIN
                draws = self._drawn(part, margin)
                spent = np.cumsum(np.asarray(draws.mask).sum(axis=-1), axis=1)
            for query, budget, used, texts in zip(
                self._queries[part], budgets[part], spent, draws.text, strict=True
            ):
                count = int(np.searchsorted(used, budget, side="right"))
                scores.append(self._organism.harm(query, texts[:count]))
        parts = [part for own in scores for part in np.array_split(own, REPEATS)]
        split = _padded(parts).reshape(len(scores), REPEATS, -1)
        return (
            monte_carlo(_padded(scores), level=self._settings.level),
            replicates(split, np.zeros_like(split)),
        )


def _padded(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of different length as one array, NaN (unscored) beyond each."""
    whole = np.full((len(rows), max(map(len, rows))), np.nan)
    for row, own in zip(whole, rows, strict=True):
        row[: len(own)] = own
    return whole


def _harmful_responses(
    organism: Organism, proposal: Component | Mixture, queries: Sequence[OrganismQuery]
) -> tuple[list[HarmfulResponses], list[np.ndarray]]:
    """The enumerated harmful answers to each query and their log q, for exact efficiencies."""
    shipped = load_responses()
    responses = [shipped[query.id] for query in queries]
    return responses, log_prob_of_responses(proposal, organism, queries, responses)


def _rows(
    organism: Organism,
    proposal: Component | Mixture,
    queries: Sequence[OrganismQuery],
    results: Results,
    baseline: Estimate,
    repeats: Replicates,
    responses: Sequence[HarmfulResponses],
    log_q: Sequence[np.ndarray],
) -> list[ComparisonRow]:
    max_weight = np.inf
    weighting = results.weighting
    if weighting.target_index is not None and weighting.weights is not None:
        max_weight = 1 / weighting.weights[weighting.target_index]
    estimate, explanations = results.report.estimate, explain(results.report.verdict)
    rows = []
    for i, query in enumerate(queries):
        truth = organism.truth(query)
        rows.append(
            ComparisonRow(
                query=str(query),
                truth=truth,
                value=float(estimate.value[i]),
                interval=(float(estimate.lower[i]), float(estimate.upper[i])),
                monte_carlo=float(baseline.value[i]),
                monte_carlo_interval=(float(baseline.lower[i]), float(baseline.upper[i])),
                monte_carlo_samples=int(baseline.num_samples[i]),
                monte_carlo_repeats=tuple(np.asarray(repeats.values[i]).tolist()),
                efficiency=efficiency(truth, responses[i], log_q[i], max_weight=max_weight),
                verdict=explanations[i].word,
            )
        )
    return rows


def _explain(console: Console, rows: Sequence[ComparisonRow], results: Results) -> None:
    """What the table shows, in figures."""
    covered = sum(r.interval[0] <= r.truth[1] and r.truth[0] <= r.interval[1] for r in rows)
    blind = sum(row.monte_carlo == 0 for row in rows)
    counts = [row.monte_carlo_samples for row in rows]
    console.print(
        f"\nThe exact truth lies inside {covered} of {len(rows)} intervals. Monte Carlo, with "
        f"{min(counts):,} to {max(counts):,} draws a query, saw no harm at all in {blind}.\n"
        "Efficiency: Monte Carlo draws that one draw of the proposal is worth, exact bounds from "
        "enumerated answers.\n"
        "Mean weight of each component on its own draws, median and range over queries "
        "(1: it reaches all that the target does):",
        highlight=False,
    )
    components = results.report.components
    means = [] if components is None else np.asarray(components.mean_weight)
    names = results.weighting.names
    for name, weights in zip(names, means, strict=components is not None):
        console.print(
            f"  {name:30s} {np.nanmedian(weights):7.3f}   "
            f"[{np.nanmin(weights):.3g}, {np.nanmax(weights):.3g}]",
            highlight=False,
            markup=False,
        )
    for row, explanation in zip(rows, explain(results.report.verdict), strict=True):
        if explanation.word != "ok":
            console.print(f"  {row.query}: {explanation.sentence}", highlight=False)
