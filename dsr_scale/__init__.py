"""dsr_scale: distributed pretraining of text-to-image diffusion transformers with Dual-Stage Registers."""

__version__ = "0.1.0"
