"""Imported once by the fork server of `rank_processes`: what every process would import again."""

from __future__ import annotations

from dsr_scale.base.torchvision_operators import declare_torchvision_operators

declare_torchvision_operators()

import deepspeed  # noqa: E402, F401
import megatron.core.tensor_parallel  # noqa: E402, F401
import torch.distributed.checkpoint  # noqa: E402
import torch.distributed.pipelining  # noqa: E402, F401

import dsr_scale.encode_service.client  # noqa: E402
import dsr_scale.train.loop  # noqa: E402, F401
