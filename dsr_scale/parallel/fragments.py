"""What this rank's ZeRO partition holds of every parameter, as pieces of the whole network.

DeepSpeed flattens parameters and cuts the result; this module is the only place that knows how, for
each stage. Others see pieces: a parameter's global name and shape, a box of it, and a view of the
live fp32 state. So a checkpoint is written and read without gathering anything, and does not depend
on how many ranks wrote it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dsr_scale.base.boxes import Box, Piece, Split, pieces_of

WEIGHTS = "weights"


def master_partitions(zero_optimizer: Any) -> list[Tensor]:
    """The flat fp32 weights that this rank updates."""
    if hasattr(zero_optimizer, "fp32_partitioned_groups_flat"):
        return list(zero_optimizer.fp32_partitioned_groups_flat)
    inner = zero_optimizer.optimizer
    return [partition for group in inner.param_groups for partition in group["params"]]


def parameter_pieces(
    zero_optimizer: Any,
    parameters: Mapping[str, nn.Parameter],
    splits: Mapping[str, Split | None],
    kinds: tuple[str, ...],
) -> Iterator[Piece]:
    """Pieces `kind.name` of every kind and parameter that this rank's partition touches."""
    for name, parameter in parameters.items():
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        for kind in kinds:
            found = _fragment(zero_optimizer, parameter, kind)
            if found is not None:
                start, flat = found
                yield from pieces_of(f"{kind}.{name}", shape, splits[name], start, flat)


def buffer_pieces(network: nn.Module, names: list[str]) -> Iterator[Piece]:
    """Pieces `buffers.name`, each a whole buffer."""
    for name in names:
        tensor = network.get_buffer(name)
        shape = tuple(tensor.shape)
        yield Piece(f"buffers.{name}", shape, Box((0,) * len(shape), shape), tensor.view(-1))


def persistent_buffers(network: nn.Module) -> list[str]:
    """Names of buffers that belong to a checkpoint."""
    saved = network.state_dict().keys()
    return [name for name, _ in network.named_buffers() if name in saved]


def _fragment(zero_optimizer: Any, parameter: Any, kind: str) -> tuple[int, Tensor] | None:
    """First element of this rank's range of the flat parameter, and its state there."""
    key = None if kind == WEIGHTS else kind
    if hasattr(parameter, "ds_tensor"):
        # The last ranks' shares may reach into padding or lie in it whole.
        share = parameter.ds_tensor.ds_numel
        start = zero_optimizer._get_param_partition_rank(parameter) * share
        held = min(share, parameter.ds_numel - start)
        if held <= 0:
            return None
        state, _ = zero_optimizer._get_fp32_opt_state_partition(parameter, True, key)
        return start, state.detach().narrow(0, 0, held)
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    return mapping.lp_fragment_address.start, mapping.get_hp_fragment(key).detach().view(-1)


@torch.no_grad()
def refresh_weights(zero_optimizer: Any) -> None:
    """Makes the weights that the network computes with follow the fp32 master again. A collective."""
    if not hasattr(zero_optimizer, "fp32_partitioned_groups_flat"):
        zero_optimizer.update_lp_params()
        return
    for number in range(len(zero_optimizer.fp16_groups)):
        zero_optimizer._reassign_or_swap_out_partitioned_parameters(number)
    persistent = zero_optimizer.persistent_parameters
    if persistent:
        persistent[0].all_gather(persistent)
