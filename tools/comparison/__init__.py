"""Several run files at small scale, several seeds of each, measured alike and compared.

`runs` plans and trains, `measures` asks every trained network the same questions, `table` does the
arithmetic, `report` draws it. `tools/ablate.py` and `tools/demonstration.py` are built of these.
"""
