"""Random adapter folders as peft writes them, and the PyTorch model with the adapter merged."""

import copy
import json
from collections.abc import Mapping

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers.pytorch_utils import Conv1D

# What peft writes beside what is adapted.
SETTINGS = {
    "alpha_pattern": {}, "auto_mapping": None, "base_model_name_or_path": "org/base",
    "bias": "none", "corda_config": None, "eva_config": None, "exclude_modules": None,
    "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
    "layer_replication": None, "layers_pattern": None, "layers_to_transform": None,
    "loftq_config": {}, "lora_alpha": 8, "lora_bias": False, "lora_dropout": 0.1,
    "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None,
    "peft_type": "LORA", "qalora_group_size": 16, "r": 8, "rank_pattern": {}, "revision": None,
    "task_type": "CAUSAL_LM", "trainable_token_indices": None, "use_dora": False,
    "use_qalora": False, "use_rslora": False,
}  # fmt: skip


def write_adapter(
    folder, model, settings: Mapping, adapted: Mapping[str, tuple[int, float]], *, infix: str = ""
):
    """Writes an adapter of `model` and returns the model with W + scale * B A in place of W.

    Args:
      settings: changes to `SETTINGS`.
      adapted: module -> (rank, scale), as `settings` ought to be understood.
      infix: the adapter's name in the keys, as some tools leave it there.
    """
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(SETTINGS | settings))
    merged, rng, tensors = copy.deepcopy(model), np.random.default_rng(5), {}
    for module, (rank, scale) in adapted.items():
        layer = merged.get_submodule(module)
        weight, transposed = layer.weight, isinstance(layer, Conv1D)
        outputs, inputs = weight.T.shape if transposed else weight.shape
        a = rng.normal(size=(rank, inputs)).astype(np.float32) / np.sqrt(inputs)
        b = rng.normal(size=(outputs, rank)).astype(np.float32) / np.sqrt(rank)
        for factor, tensor in (("A", a), ("B", b)):
            key = f"base_model.model.{module}.lora_{factor}{infix}.weight"
            tensors[key] = tensor.astype(np.float32)
        with torch.no_grad():
            change = scale * torch.tensor(b @ a, dtype=torch.float32)
            weight += change.T if transposed else change
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return merged
