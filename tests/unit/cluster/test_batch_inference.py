"""Tables through real Ray Data: results, environment, deaths, and errors with their types."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pyarrow
import pytest
import ray

from distill_system.cluster import ClusterSession
from distill_system.cluster.batch_inference import infer_batches
from distill_system.config.pools import DeadlinesConfig, PoolConfig
from distill_system.errors import ModelError, ResourceError, WorkerError

# Ray Data 2.60 warns of the defaults that it sets itself.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")

DEADLINES = DeadlinesConfig(resources_seconds=30.0)


class Doubler:
    """Doubles numbers; 13 is a model that does not fit, 14 a bug, 15 a death, the first time."""

    def __init__(self, *, marks: str) -> None:
        self.marks = Path(marks)

    def __call__(self, batch: pyarrow.Table) -> pyarrow.Table:
        numbers = batch["number"].to_pylist()
        if 13 in numbers:
            raise ModelError("teacher.path: 13 brings bad luck")
        if 14 in numbers:
            raise ZeroDivisionError("nothing goes into 14")
        if 15 in numbers and not (self.marks / "died").exists():
            (self.marks / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        doubled = [2 * number for number in numbers]
        room = [os.environ["ROOM"]] * len(numbers)
        return pyarrow.table({"doubled": pyarrow.array(doubled, pyarrow.int32()), "room": room})


def infer(numbers, marks, pool=None, deadlines=DEADLINES):
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    return list(
        infer_batches(
            [pyarrow.table({"number": numbers[at : at + 3]}) for at in range(0, len(numbers), 3)],
            Doubler,
            {"marks": str(marks)},
            pool=pool or PoolConfig(count=2, cpus=0.1),
            environment={"ROOM": "kitchen"},
            deadlines=deadlines,
        )
    )


def test_every_batch_comes_back_once_also_of_a_worker_that_died(
    session: ClusterSession, tmp_path: Path
) -> None:
    numbers = [*range(12), 15]
    tables = infer(numbers, tmp_path)
    assert (tmp_path / "died").exists()
    assert len(tables) == 5, "one table for each batch"
    rows = pyarrow.concat_tables(tables)
    assert sorted(rows["doubled"].to_pylist()) == [2 * number for number in numbers]
    assert rows.schema.field("doubled").type == pyarrow.int32()
    assert set(rows["room"].to_pylist()) == {"kitchen"}


def test_what_a_worker_raises_comes_as_it_was_raised(
    session: ClusterSession, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"^teacher\.path: 13 brings bad luck$"):
        infer([1, 13], tmp_path)
    with pytest.raises(WorkerError, match=r"Doubler failed:\n(.|\n)*nothing goes into 14"):
        infer([1, 14], tmp_path)


def test_workers_without_a_place_are_told_in_time(session: ClusterSession, tmp_path: Path) -> None:
    soon = DeadlinesConfig(resources_seconds=2.0)
    with pytest.raises(ResourceError, match="did not place 1 workers of 999 CPUs"):
        infer([1], tmp_path, PoolConfig(cpus=999.0), soon)
