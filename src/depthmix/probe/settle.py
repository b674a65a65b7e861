"""`k: auto` and `tuned_layers: auto`: what the probe recommends, put into the options of a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from depthmix.carry.run_record import RunRecord
from depthmix.probe.run import probe
from depthmix.train import output
from depthmix.train.arguments import AUTO, TrainArguments
from depthmix.train.checks import require_possible


def settled(arguments: TrainArguments) -> TrainArguments:
    """Return a run's options with numbers in the place of `auto`, and say why in two lines.

    A run that is resumed keeps what it had. Of several processes all probe, since the data is read
    together, and all take what the first one found.

    Raises:
        DepthmixError: as `probe`.
    """
    if not arguments.auto:
        return arguments
    chosen = _recorded(arguments) or _probed(arguments)
    k = chosen["k"] if "k" in arguments.auto else arguments.mode.k
    depth = chosen["tuned_layers"] if "tuned_layers" in arguments.auto else None
    return dataclasses.replace(
        arguments,
        auto=(),
        probed=chosen,
        mode=dataclasses.replace(arguments.mode, k=k),
        run=dataclasses.replace(
            arguments.run, tuned_layers=str(depth) if depth else arguments.run.tuned_layers
        ),
    )


def _recorded(arguments: TrainArguments) -> dict[str, Any] | None:
    """Return what the run that is to go on had, if there is one."""
    named = arguments.training.resume_from_checkpoint
    if not (named or arguments.run.resume):
        return None
    folder = Path(str(named)).parent if named else Path(str(arguments.training.output_dir))
    options = RunRecord.read(folder).options
    return {name: options[name] for name in AUTO} if options else None


def _probed(arguments: TrainArguments) -> dict[str, Any]:
    from accelerate.utils import broadcast_object_list

    require_possible(arguments)
    output.prepare(Path(str(arguments.training.output_dir)), arguments)  # room for the run
    found = probe(arguments)
    chosen = [{"rows": found.rows, **dataclasses.asdict(found.choice)}]
    broadcast_object_list(chosen)
    if arguments.training.process_index == 0:
        print(*chosen[0]["reasons"], sep="\n")
    return chosen[0]
