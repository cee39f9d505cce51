"""The parts of `tools/demonstration.py`: sizes, stages, reconstructions, and the page of results."""
