"""What prefill, decoding and scoring take on one device: memory, operations, bytes, by formula.

Sizes are those of the functions in `rollouts`: attention runs over every position of prompt and
ring, whether masked or not; a prompt is not split over the `data` axis; the head runs on each
position once. A matrix product of [m, k] and [k, n] counts 2 m k n operations.

How often an activation is read or written, and how many are held at once, is what XLA makes of the
code: the constants below are taken from programs compiled for TPU v5e. A layer's traffic in
prefill and in scoring is within 10% of the compiler's own count. Caches are padded as a TPU pads
them, which for heads of less than 128 is more than a GPU needs.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import traverse_util
from jax.sharding import AbstractMesh, AxisType

from tailrisk_jax.models import ModelConfig
from tailrisk_jax.models.sharding import parameter_specs, partition_spec
from tailrisk_jax.models.transformer import parameter_shapes
from tailrisk_jax.planning.hardware import Chip
from tailrisk_jax.policies.token_rule import block_size
from tailrisk_jax.rollouts.blocks import TURNS, cut
from tailrisk_jax.rollouts.score import chunk_size

AXES = ("data", "fsdp", "tensor")

# How often a layer reads or writes, for each new token: the residual stream [D], the MLP's inner
# activations [F] and, in float32, attention scores [H, context]; and how many exist at once.
RESIDUAL_PASSES, MLP_PASSES, ATTENTION_PASSES = 20, 8, 10
RESIDUAL_HELD, MLP_HELD, ATTENTION_HELD = 3, 3, 2
# The same of float32 logits [V], where a token is drawn from them and where one is scored.
DRAWING_PASSES, DRAWING_HELD = 8, 7
SCORING_PASSES, SCORING_HELD = 4, 2
STATES_HELD = 2  # copies of the final states [T, D] of the rows that are scored
GATHERED_HELD = 3.5  # more of the residual stream, where products run beside gathering parameters
DRAWN_HELD = 2  # copies of what the rows of a block draw: carried by the loop, and returned

_ONE_DEVICE = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,))


@dataclasses.dataclass(frozen=True)
class Workload:
    """N responses of T tokens to each of Q prompts of P tokens, scored under K policies.

    Every response is taken to run until it is cut. K policies share their parameters.

    Attributes:
      itemsize: bytes of a parameter, and of a number in caches and activations.
    """

    queries: int
    samples: int
    prompt: int
    length: int
    policies: int
    itemsize: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of the mesh axes."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    @property
    def axes(self) -> dict[str, int]:
        """By name."""
        return dataclasses.asdict(self)

    @property
    def devices(self) -> int:
        """Their product."""
        return self.data * self.fsdp * self.tensor

    def __str__(self) -> str:
        used = [f"{name}={size}" for name, size in self.axes.items() if size > 1]
        return ", ".join(used) or "one device"


@dataclasses.dataclass(frozen=True)
class Work:
    """What one device does.

    Attributes:
      flops: operations.
      bytes: read from or written to its memory.
      weights: of these, parameters.
      sent: bytes to other devices.
    """

    flops: float = 0.0
    bytes: float = 0.0
    weights: float = 0.0
    sent: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.weights + other.weights,
            self.sent + other.sent,
        )

    def __mul__(self, times: float) -> "Work":
        return Work(self.flops * times, self.bytes * times, self.weights * times, self.sent * times)

    def seconds(self, chip: Chip) -> dict[str, float]:
        """By what each resource alone would take; the largest bounds the time from below."""
        return {
            "compute": self.flops / chip.flops,
            "memory": self.bytes / chip.bandwidth,
            "links": self.sent / chip.links,
        }


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    parameters: float
    caches: float
    temporaries: float

    @property
    def total(self) -> float:
        """All three."""
        return self.parameters + self.caches + self.temporaries


@dataclasses.dataclass(frozen=True)
class Phase:
    """One compiled function of a study, and how it is called.

    Attributes:
      name: "prefill", "decode", "prefill to score" or "score".
      queries: in a call.
      rows: of each query, on all devices together; 1 for prefill.
      policies: that run side by side; None for one, without an axis of its own.
      runs: calls for the whole study.
      steps: of the loop over tokens in a call; 1 where there is none.
      chunks: that the head takes in a call; 1 where it isn't cut.
      memory: while it runs.
      work: of a call.
    """

    name: str
    queries: int
    rows: int
    policies: int | None
    runs: int
    steps: int
    chunks: int
    memory: Memory
    work: Work

    @property
    def prefills(self) -> bool:
        """Whether it runs prompts, not responses."""
        return self.name.startswith("prefill")


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Bytes of parameters on one device.

    Attributes:
      resident: all of them.
      layers, head: as they are read: whole along `fsdp`, over which they are gathered for use.
    """

    resident: float
    layers: float
    head: float


def parameter_count(config: ModelConfig) -> int:
    """Numbers in the parameter tree."""
    return sum(math.prod(leaf.shape) for leaf in _shapes(config).values())


@functools.cache
def matrix_count(config: ModelConfig) -> int:
    """Numbers in the kernels of one layer: each is multiplied once for a token."""
    return sum(
        math.prod(leaf.shape[1:]) for path, leaf in _shapes(config).items() if path[-1] == "kernel"
    )


@functools.cache
def parameters(config: ModelConfig, layout: Layout, itemsize: int) -> Parameters:
    """What one device holds and reads, by the rules that lay parameters out."""

    def leaf_bytes(axes: Mapping[str, int]) -> dict[tuple[str, ...], float]:
        specs = traverse_util.flatten_dict(parameter_specs(config, axes))
        return {
            path: itemsize * math.prod(leaf.shape) / _shards(specs[path], axes)
            for path, leaf in _shapes(config).items()
        }

    held = leaf_bytes(layout.axes)
    read = leaf_bytes(layout.axes | {"fsdp": 1})
    head = ("embedding",) if config.tie_embeddings else ("lm_head",)
    return Parameters(
        resident=sum(held.values()),
        layers=sum(size for path, size in read.items() if path[0] == "layers"),
        head=read[head],
    )


def phases(
    config: ModelConfig, study: Workload, layout: Layout, *, draw_rows: int, score_rows: int
) -> list[Phase]:
    """The four phases of a study in their order.

    Args:
      draw_rows, score_rows: responses at once, as `batch_size` of `sample` and `log_prob`.
    """
    device = _Device(config, study, layout)
    drawn = _calls(study.queries, study.samples, draw_rows, TURNS)
    scored = _calls(study.queries, study.samples, score_rows, 1)
    return [
        device.prefill("prefill", drawn, None),
        device.decode(drawn),
        device.prefill("prefill to score", scored, study.policies),
        device.score(scored),
    ]


@dataclasses.dataclass(frozen=True)
class _Calls:
    """Blocks of one shape, in groups of the same queries, and a slot's turns in the longest."""

    queries: int
    slots: int
    groups: int
    blocks: int
    turns: int


@functools.cache
def _calls(queries: int, samples: int, rows: int, turns: int) -> _Calls:
    with jax.sharding.use_abstract_mesh(_ONE_DEVICE):  # on a mesh, blocks run one after another
        shape = cut(queries, samples, rows, turns=turns)
    groups = math.ceil(queries / shape.group)
    return _Calls(
        queries=shape.group,
        slots=shape.slots,
        groups=groups,
        blocks=groups * math.ceil(samples / shape.span),
        turns=math.ceil(shape.span / shape.slots),
    )


class _Device:
    """The work and memory of one device of a layout."""

    def __init__(self, config: ModelConfig, study: Workload, layout: Layout):
        self.config, self.study, self.layout = config, study, layout
        self.parameters = parameters(config, layout, study.itemsize)
        per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * study.itemsize
        self.kv_bytes = per_token / self._cut("kv_heads", config.num_kv_heads)
        self.heads = config.num_heads / self._cut("heads", config.num_heads)
        self.mlp = config.mlp_width / self._cut("mlp", config.mlp_width)
        self.vocab = config.vocab_size / self._cut("vocab", config.vocab_size)

    def prefill(self, name: str, calls: _Calls, policies: int | None) -> Phase:
        """Prompts of a group of queries; every device of an axis other than `tensor` runs all."""
        study, fsdp = self.study, self.layout.fsdp
        tokens = (policies or 1) * calls.queries * study.prompt
        caches = tokens * self.kv_bytes
        # Rows are not split, so XLA splits the products over `fsdp` rather than gather parameters.
        work = self._layers(tokens, study.prompt)
        work = Work(work.flops / fsdp, work.bytes / fsdp + caches, work.weights / fsdp, work.sent)
        temporaries = self._activations(tokens, study.prompt) / fsdp
        return Phase(
            name, calls.queries, 1, policies, calls.groups, 1, 1,
            self._memory(caches, temporaries), work,
        )  # fmt: skip

    def decode(self, calls: _Calls) -> Phase:
        """Blocks of rows that draw one sample after another."""
        study = self.study
        ring = max(study.length - 1, 1)
        rows = calls.queries * calls.slots / self._cut("samples", calls.slots)
        prefixes = calls.queries * study.prompt * self.kv_bytes
        suffixes = rows * ring * self.kv_bytes
        # Drawing cuts the vocabulary into blocks; what doesn't cut alike is gathered for it.
        whole = math.ceil(self.config.vocab_size / block_size(self.config.vocab_size))
        gathered = self.config.vocab_size / math.gcd(
            whole, round(self.config.vocab_size / self.vocab)
        )
        logits = 4 * rows * gathered
        step = self._layers(rows, study.prompt + ring + 1) + self._head(rows)
        step += Work(
            bytes=prefixes + suffixes + DRAWING_PASSES * logits,
            sent=4 * rows * (gathered - self.vocab),
        )
        steps = calls.turns * (study.length - 1)
        drawn = 2 * 4 * rows * TURNS * _padded(study.length, 128)
        dim = self.config.head_dim
        tiled = min(  # memory holds tiles of 16 x 128, either way round
            _padded(ring, 16) * _padded(dim, 128), _padded(ring, 128) * _padded(dim, 16)
        )
        padded = suffixes * tiled / (ring * dim)
        temporaries = DRAWING_HELD * logits + DRAWN_HELD * drawn + self._activations(rows, ring)
        return Phase(
            "decode", calls.queries, calls.slots, None, calls.blocks, steps, 1,
            self._memory(prefixes + padded, temporaries), step * steps,
        )  # fmt: skip

    def score(self, calls: _Calls) -> Phase:
        """Blocks of rows, under all policies at once."""
        study = self.study
        rows = calls.queries * calls.slots / self._cut("samples", calls.slots) * study.policies
        size = chunk_size(calls.queries * calls.slots, study.length)
        chunks = math.ceil(study.length / size)
        tokens, context = rows * (study.length - 1), study.prompt + study.length - 1
        prefixes = study.policies * calls.queries * study.prompt * self.kv_bytes
        logits = 4 * rows * size * self.vocab
        work = self._layers(tokens, context) + Work(bytes=prefixes)
        work += (self._head(rows * size) + Work(bytes=SCORING_PASSES * logits)) * chunks
        hidden = STATES_HELD * rows * study.length * self.config.width * study.itemsize
        temporaries = max(self._activations(tokens, context), hidden + SCORING_HELD * logits)
        return Phase(
            "score", calls.queries, calls.slots, study.policies, calls.blocks, 1, chunks,
            self._memory(prefixes, temporaries), work,
        )  # fmt: skip

    def _layers(self, tokens: float, context: float) -> Work:
        """All layers on new tokens that attend to `context` positions; keys' bytes not included."""
        config, item, fsdp = self.config, self.study.itemsize, self.layout.fsdp
        weights, layers = self.parameters.layers, config.num_layers
        kernels = matrix_count(config) / self._cut("mlp", config.mlp_width)
        attention = 4 * self.heads * config.head_dim * context
        passes = item * (RESIDUAL_PASSES * config.width + MLP_PASSES * self.mlp)
        passes += 4 * ATTENTION_PASSES * self.heads * context
        gathered = weights * (fsdp - 1) / fsdp
        moved = weights if fsdp == 1 else 2 * weights + weights / fsdp
        tensor = self.layout.tensor
        reduced = 2 * (tensor - 1) / tensor * tokens * config.width * item
        return Work(
            flops=layers * tokens * (2 * kernels + attention),
            bytes=moved + layers * tokens * passes,
            weights=moved,
            sent=gathered + (2 * layers + 1) * reduced,
        )

    def _head(self, positions: float) -> Work:
        flops = 2 * self.config.width * self.vocab * positions
        return Work(flops=flops, bytes=self.parameters.head, weights=self.parameters.head)

    def _activations(self, tokens: float, context: float) -> float:
        """Held at once, in one layer."""
        config, item = self.config, self.study.itemsize
        copies = RESIDUAL_HELD + (GATHERED_HELD if self.layout.fsdp > 1 else 0)
        mixed = copies * config.width * item
        wide = max(
            MLP_HELD * self.mlp * item, ATTENTION_HELD * 4 * self.heads * _padded(context, 128)
        )
        return tokens * (mixed + wide)

    def _memory(self, caches: float, temporaries: float) -> Memory:
        return Memory(self.parameters.resident, caches, temporaries)

    def _cut(self, logical: str, size: int) -> int:
        """Into how many parts an axis of this size is cut."""
        axes = self.layout.axes
        return _shards(partition_spec((logical,), (size,), axes), axes)


def _shapes(config: ModelConfig) -> dict[tuple[str, ...], Any]:
    """Of the parameters, by their path in the tree."""
    return traverse_util.flatten_dict(nn.meta.unbox(parameter_shapes(config)))


def _shards(spec, axes: Mapping[str, int]) -> int:
    """Into how many parts a PartitionSpec cuts an array."""
    names = [
        name for entry in spec if entry for name in ((entry,) if isinstance(entry, str) else entry)
    ]
    return math.prod(axes[name] for name in names)


def _padded(size: float, multiple: int) -> float:
    return math.ceil(size / multiple) * multiple
