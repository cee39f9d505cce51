"""Imported once by the fork server of `ranks`: what every rank would import again."""

from __future__ import annotations

import warnings

from dsr_scale.base.torchvision_operators import declare_torchvision_operators

declare_torchvision_operators()
# Megatron says at import that optional kernels are missing, which no benchmark here uses.
warnings.filterwarnings("ignore", module="megatron")

import deepspeed  # noqa: E402, F401
import megatron.core.tensor_parallel  # noqa: E402, F401
import torch.distributed.checkpoint  # noqa: E402
import torch.distributed.pipelining  # noqa: E402, F401
