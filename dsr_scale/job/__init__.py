"""What a cluster job needs around training: its record, its preflight, how it ended, what comes next.

Nothing here imports torch before it must or knows Slurm's commands: launchers call `scontrol` and `srun`, this
room reads and writes files in the run directory and decides.
"""
