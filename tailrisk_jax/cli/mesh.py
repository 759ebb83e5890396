"""Which devices a command computes on."""

import dataclasses
from typing import Annotated

import jax
import tyro
from jax.sharding import AxisType

from tailrisk_jax.errors import InputError
from tailrisk_jax.models.sharding import local_mesh
from tailrisk_jax.planning import Layout


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnMesh:
    """Options of commands that compute on devices."""

    mesh: Annotated[str | None, tyro.conf.arg(metavar="AXIS=SIZE[,..]")] = None
    """How the model lies on the devices, such as data=4,tensor=2: data shares out answers, tensor
    and fsdp the parameters too. By default data, over all devices of this process. With
    --processes it may name the devices of all. Changes no figure beyond rounding."""


def on_mesh(spec: str | None) -> jax.set_mesh:
    """The context of a mesh; of none for a single device.

    Raises:
      InputError: a text that isn't understood, or sizes that don't multiply to the devices of this
        process, or to those of all.
    """
    if spec is None:
        return jax.set_mesh(local_mesh())
    layout = parse_layout(spec, devices=jax.device_count())
    own, every = jax.local_device_count(), jax.device_count()
    if layout.devices not in (own, every):
        whose = f"this process has {own}" + (f", all have {every}" if every > own else "")
        raise InputError(
            f"--mesh {spec!r} has {layout.devices} devices, {whose}; give sizes that multiply to "
            "them"
        )
    devices = jax.devices() if layout.devices == every else jax.local_devices()
    kinds = (AxisType.Auto,) * len(layout.axes)
    sizes, names = tuple(layout.axes.values()), tuple(layout.axes)
    return jax.set_mesh(jax.make_mesh(sizes, names, kinds, devices=devices))


def parse_layout(text: str, *, devices: int) -> Layout:
    """The sizes of mesh axes in a text like "data=2,tensor=8".

    Args:
      devices: how many there are, for an example.

    Raises:
      InputError: another form, an unknown axis, a size below 1.
    """
    try:
        pairs = [part.split("=") for part in text.replace(" ", "").split(",")]
        layout = Layout(**{axis: int(size) for axis, size in pairs})
        if min(layout.axes.values()) < 1:
            raise ValueError("a size below 1")
    except (TypeError, ValueError) as error:
        raise InputError(
            f"--mesh {text!r} can't be read; give sizes of data, fsdp and tensor, such as "
            f"data=1,tensor={devices}"
        ) from error
    return layout
