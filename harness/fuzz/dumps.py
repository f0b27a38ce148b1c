"""A recorded call to spoil: cutlass_fused_moe as FlashInfer's flight recorder writes it (harness/dump/read.py)."""

from __future__ import annotations

import io
import json
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from harness.dump.read import METADATA, read
from harness.dump.readers import call_of
from harness.fuzz.mutate import json_text, spoiled

INPUTS = "inputs.pt"
NAMES = ("input", "token_selected_experts", "token_final_scales", "fc1_expert_weights", "fc2_expert_weights")


def tensors() -> dict[str, Tensor]:
    """Two tokens, two experts, hidden 8, inter 8; by the recorder's keys."""
    ids = torch.tensor([[0], [1]], dtype=torch.int32)
    shapes = {"input": (2, 8), "fc1_expert_weights": (2, 16, 8), "fc2_expert_weights": (2, 8, 8)}
    found = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    found |= {"token_selected_experts": ids, "token_final_scales": torch.ones(2, 1)}
    return {f"arg_{index}": found[name] for index, name in enumerate(NAMES)}


def record() -> dict[str, Any]:
    """The metadata of that call, which never returned."""
    details = {key: {"shape": [*t.shape], "stride": [*t.stride()], "device": "cuda:0"} for key, t in tensors().items()}
    dtype, scales = {"type": "torch.dtype", "value": "torch.bfloat16"}, {"type": "list", "items": []}
    return {
        "function_name": "cutlass_fused_moe",
        "function_signature": f"({', '.join(NAMES)}, output_dtype, quant_scales, activation_type=3)",
        "input_metadata": {"kwarg_output_dtype": dtype, "kwarg_quant_scales": scales, "kwarg_activation_type": 3},
        "tensor_details": details,
        "execution_status": "inputs_saved",
        "versions": {"flashinfer": "0.7.2.post1", "torch": "2.13.0"},
    }


def spoil(random: Random, folder: Path) -> None:
    """Write the call, its metadata, its tensors or their bytes spoiled."""
    given, kind = tensors(), random.randrange(4)
    if kind == 0:
        key = random.choice(sorted(given))
        given[key] = random.choice((given[key][:1], given[key].float(), given[key].flatten(), given[key][..., :0]))
    buffer = io.BytesIO()
    torch.save(given, buffer)
    data, text = buffer.getvalue(), json.dumps(record()).encode()
    (folder / INPUTS).write_bytes(spoiled(random, data) if kind == 1 else data)
    (folder / METADATA).write_bytes(json_text(random, text) if kind > 1 else text)


def judge(folder: Path) -> None:
    """What import-dump does before it asks a child."""
    assert call_of(read(folder)).case.id
