"""--mesh: which devices a command computes on; meshes of several are in studies/test_processes."""

import jax
import pytest

from tailrisk_jax import InputError
from tailrisk_jax.cli.mesh import on_mesh
from tailrisk_jax.models.sharding import current_mesh, own_mesh
from tests.studies.runs import refused


def test_one_device_needs_no_mesh_and_can_be_one():
    with on_mesh(None):
        assert current_mesh() is None and own_mesh() is None
    with on_mesh("tensor=1"):
        mesh = current_mesh()
        assert mesh is not None and mesh.shape == {"data": 1, "fsdp": 1, "tensor": 1}
        assert own_mesh() is mesh
    assert current_mesh() is None


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("data=3", "has 3 devices, this process has 1; give sizes"),
        ("data=0", "can't be read"),
        ("rows=2", "sizes of data, fsdp and tensor"),
        ("8", "such as data=1,tensor=1"),
    ],
)
def test_other_sizes_are_refused(spec, said):
    with pytest.raises(InputError, match=said):
        on_mesh(spec)
    assert jax.sharding.get_mesh().empty


def test_a_command_refuses_them_before_anything_is_written(tmp_path, capsys):
    argv = ["estimate", "--model=organism", "--proposal=target", "--mesh=data=2"]
    assert "--mesh 'data=2' has 2 devices" in refused([*argv, f"--out={tmp_path / 'run'}"], capsys)
    assert not list(tmp_path.iterdir())
