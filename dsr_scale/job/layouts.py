"""How many nodes a run can use: those at which whole replicas and the global batch divide.

What is learned does not depend on the number of devices, so a run may go on with fewer nodes. Every
number is tried against the rules of `config.checks`, one millisecond each, rather than solved for:
a rule added there holds here.
"""

from __future__ import annotations

from dsr_scale.base.errors import InputError
from dsr_scale.config.checks import check_run
from dsr_scale.config.run import AnyRun


def valid_nodes(run: AnyRun, most: int, devices_per_node: int) -> list[int]:
    """Numbers of nodes up to `most`, ascending, on which `run` fits together."""
    return [nodes for nodes in range(1, most + 1) if _fits(run, nodes * devices_per_node)]


def nodes_to_use(run: AnyRun, available: int, devices_per_node: int) -> int:
    """`available` where the run fits on so many nodes; with `recovery.shrink` the most that do.

    Raises InputError that names numbers of nodes which fit, or, where none does, what is wrong.
    """
    if _fits(run, available * devices_per_node):
        return available
    valid = valid_nodes(run, 2 * available, devices_per_node)
    if not valid:
        check_run(run, devices=available * devices_per_node)
    fewer = [nodes for nodes in valid if nodes < available]
    if fewer and run.recovery.shrink:
        return fewer[-1]
    remedy = "ask for one of these"
    if fewer:
        remedy += f", or set recovery.shrink to true to go on with {fewer[-1]}"
    raise InputError(
        found=f"{available} nodes with {devices_per_node} devices each, parallel.tp = "
        f"{run.parallel.tp}, parallel.pp = {run.parallel.pp}, training.global_batch_images = "
        f"{run.training.global_batch_images}",
        required="nodes over which tp · pp and the global batch divide: "
        + ", ".join(map(str, valid[-12:])),
        remedy=remedy,
    )


def _fits(run: AnyRun, devices: int) -> bool:
    try:
        check_run(run, devices=devices)
    except InputError:
        return False
    return True
