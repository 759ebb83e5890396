"""What is measured: a base point, and the axes along which one size at a time departs from it."""

from __future__ import annotations

import dataclasses
from typing import Any

from tailrisk_jax.models import ModelConfig
from tailrisk_jax.planning import Layout, Phase, Workload, phases, published

AXES = ("samples", "queries", "prompt", "new_tokens", "layers")
LONG = "samples, long prompt"


@dataclasses.dataclass(frozen=True)
class Point:
    """N responses of T tokens to each of Q prompts of P tokens, by a model of L layers.

    Attributes:
      rows: how often the base's rows run at once; on a CPU always 1.
    """

    samples: int
    queries: int
    prompt: int
    new_tokens: int
    layers: int
    rows: float = 1

    def __str__(self) -> str:
        text = f"N{self.samples} Q{self.queries} P{self.prompt} T{self.new_tokens} L{self.layers}"
        return text if self.rows == 1 else f"{text} rows x{self.rows:g}"


def along(base: Point, axis: str, values: tuple[float, ...]) -> list[Point]:
    """The base with other values on one axis."""
    return [dataclasses.replace(base, **{axis: value}) for value in values]


@dataclasses.dataclass(frozen=True)
class OnCpu:
    """A random Llama in float32, its target scored beside a proposal that ablates a direction."""

    base: Point = Point(samples=64, queries=4, prompt=64, new_tokens=32, layers=2)
    samples: tuple[int, ...] = (32, 64, 128, 256)
    queries: tuple[int, ...] = (1, 2, 4, 8)
    prompt: tuple[int, ...] = (32, 64, 128, 256)
    new_tokens: tuple[int, ...] = (16, 32, 64, 128)
    layers: tuple[int, ...] = (1, 2, 4, 8)
    depths: tuple[int, ...] = (1, 4, 16, 64)
    width: int = 256
    heads: int = 8
    kv_heads: int = 4
    mlp: int = 512
    vocab: int = 1024
    intensity: float = 0.5
    seed: int = 0

    @classmethod
    def of(cls, fields: dict[str, Any]) -> OnCpu:
        """From JSON, as `dataclasses.asdict` writes it."""
        own: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in fields.items()
        }
        own["base"] = Point(**fields["base"])
        return cls(**own)

    def config(self, layers: int) -> ModelConfig:
        """Its end token is beyond the vocabulary: every response runs until it is cut."""
        return ModelConfig(
            family="llama",
            vocab_size=self.vocab,
            num_layers=layers,
            width=self.width,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.width // self.heads,
            mlp_width=self.mlp,
            end_ids=(self.vocab,),
        )

    @property
    def series(self) -> dict[str, list[Point]]:
        """One per axis, and the samples once more at a long prompt."""
        found = {axis: along(self.base, axis, getattr(self, axis)) for axis in AXES}
        long = dataclasses.replace(self.base, prompt=max(self.prompt))
        return found | {LONG: along(long, "samples", self.samples)}

    @property
    def points(self) -> list[Point]:
        """Of all series, each once."""
        return list(dict.fromkeys(point for series in self.series.values() for point in series))

    @property
    def compiled(self) -> list[Point]:
        """At which compilation is timed: as little to run as the programs allow."""
        least = Point(samples=8, queries=1, prompt=16, new_tokens=16, layers=1)
        return along(least, "layers", self.depths)


QUICK = OnCpu(
    base=Point(samples=4, queries=2, prompt=4, new_tokens=4, layers=2),
    samples=(2, 4, 8, 16), queries=(1, 2), prompt=(4, 8), new_tokens=(2, 4), layers=(1, 2),
    depths=(1, 2), width=16, heads=2, kv_heads=1, mlp=32, vocab=64,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class OnTpu:
    """Llama 3.1 8B's shapes in bfloat16 on a slice, with a mesh and rows that all points fit.

    Not every value is compiled. Samples and queries need no compilation of their own: where they
    are more than run at once, the programs are those of the base, which is checked.
    """

    model: str = "Llama-3.1-8B"
    topology: str = "v5e:4x4"
    layout: Layout = dataclasses.field(default_factory=lambda: Layout(data=8, tensor=2))
    base: Point = Point(samples=512, queries=256, prompt=256, new_tokens=128, layers=32)
    policies: int = 2
    draw_rows: int = 1024
    score_rows: int = 256

    @property
    def series(self) -> dict[str, list[Point]]:
        """One per axis; the last varies how many responses run at once."""
        values: dict[str, tuple[float, ...]] = {
            "samples": (128, 512, 2048),
            "queries": (64, 256, 1024),
            "prompt": (64, 256, 1024),
            "new_tokens": (32, 128, 512),
            "layers": (8, 16, 32),
            "rows": (1 / 4, 1, 4),
        }
        return {axis: along(self.base, axis, own) for axis, own in values.items()}

    @property
    def points(self) -> list[Point]:
        """Of all series, each once, the base first."""
        found = [point for series in self.series.values() for point in series]
        return list(dict.fromkeys([self.base, *found]))

    def config(self, layers: int) -> ModelConfig:
        """The model's, with another depth."""
        config = published(self.model)
        assert config is not None
        return dataclasses.replace(config, num_layers=layers)

    def workload(self, point: Point) -> Workload:
        """As `planning` writes it."""
        return Workload(
            queries=point.queries,
            samples=point.samples,
            prompt=point.prompt,
            length=point.new_tokens,
            policies=self.policies,
            itemsize=2,
        )

    def phases(self, point: Point) -> list[Phase]:
        """Its four programs, and what they take by formula."""
        return phases(
            self.config(point.layers),
            self.workload(point),
            self.layout,
            draw_rows=round(self.draw_rows * point.rows),
            score_rows=round(self.score_rows * point.rows),
        )
