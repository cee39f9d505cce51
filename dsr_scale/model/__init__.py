"""The diffusion transformer, written for one device: it knows no rank and no process group.

`build.build_model` makes one from a `ModelShape`; `dit.DiT` is the network; `conditioning.Condition`
is what a batch is conditioned on.
"""
