"""Flow matching between data (t = 0) and noise (t = 1): path, timesteps, loss, guidance, solvers.

It takes any callable for the network and imports no model.
"""
