"""The networks that judge images, with random weights, saved as the published ones are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_language_models import save_tiny


def save_random_inception(path: Path) -> Path:
    """Writes Inception weights of the library's names, variances off 1; returns the path."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    library: Any = FeatureExtractorInceptionV3
    with pytest.MonkeyPatch.context() as patch:
        # The library has no way to make the network without weights.
        patch.setattr(library, "load_state_dict", lambda self, state: None)
        patch.setattr(torch, "load", lambda path, weights_only: {})
        network = library("random", ["2048"], feature_extractor_weights_path="none")
    generator = torch.Generator().manual_seed(0)
    state = network.state_dict()
    for name, tensor in state.items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.dim() == 4:
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
    torch.save(state, path)
    return path


def save_tiny_clip(directory: Path) -> Path:
    """Writes a CLIP model with tokenizer and image processor; returns the directory."""
    import transformers

    save_tiny(directory, "clip")
    transformers.CLIPImageProcessor(
        size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}
    ).save_pretrained(directory)
    return directory
