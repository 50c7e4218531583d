"""How the blocks that share a recurrent layer pass h on, or parts of dh, in every order that can
happen.

The protocols are those of csrc/core/cuda; tests/protocols has them as small models. What a model
cannot show, that the kernels do what it says, is the emulator's to show (test_cuda_kernels.py).
"""

import pytest

from tests.protocols.cluster import Cluster
from tests.protocols.grid import Grid
from tests.protocols.model import Fault, explore

SOUND = [
    Grid(2, 5),
    Grid(2, 4, threads=2),
    Grid(3, 4),
    Grid(4, 3),
    Grid(2, 4, slots=3),
    Cluster(2, 6),
    Cluster(2, 5, threads=2),
    Cluster(3, 4),
    Cluster(4, 3),
    Cluster(2, 1),
    Cluster(2, 6, scattered=True),
    Cluster(2, 4, threads=2, scattered=True),
    Cluster(2, 3, threads=3, scattered=True),
    Cluster(3, 3, threads=2, scattered=True),
    Cluster(3, 4, scattered=True),
    Cluster(4, 3, scattered=True),
]


@pytest.mark.parametrize("model", SOUND, ids=str)
def test_no_order_blocks_or_gives_a_value_of_another_step(model) -> None:
    assert explore(model) > model.members


FAULTS = [
    # A fast member overwrites the word that a slow one still waits for.
    (Grid(2, 4, slots=1), "deadlock"),
    (Grid(2, 4, threads=2, barrier=False), "deadlock"),
    # The tag of a slot never changes, or not before it was used twice.
    (Grid(2, 4, tags=1), "takes the value of step 0 for that of 1"),
    (Grid(2, 4, tags=2), "takes the value of step 0 for that of 2"),
    (Grid(2, 3, whole=False), "takes the value of step 0 for that of 1"),
    (Grid(2, 3, cleared=False), "takes the value of step -1 for that of 1"),
    (Cluster(2, 4, slots=1), "reads the h of step 1 for that of 0"),
    (Cluster(2, 4, threads=2, after_reading=False), "reads the h of step"),
    (Cluster(3, 4, barriers=1), "reads the h of step"),
    (Cluster(2, 3, together=False), "deadlock"),
    (Cluster(2, 3, last_is_stored=True), "into the memory of"),
    (Cluster(2, 3, surplus=1), "deadlock"),
    (Cluster(3, 3, surplus=-1), "reads the h of step"),
    (Cluster(2, 4, slots=1, scattered=True), "reads the h of step 1 for that of 0"),
    (Cluster(2, 4, threads=2, after_reading=False, scattered=True), "reads the h of step"),
    (Cluster(3, 4, barriers=1, scattered=True), "reads the h of step"),
    (Cluster(2, 3, together=False, scattered=True), "deadlock"),
    (Cluster(2, 3, last_is_stored=True, scattered=True), "into the memory of"),
    (Cluster(2, 3, surplus=-1, scattered=True), "reads the h of step"),
]


@pytest.mark.parametrize(("model", "what"), FAULTS, ids=str)
def test_what_the_protocols_leave_out_would_be_missed(model, what) -> None:
    with pytest.raises(Fault, match=what):
        explore(model)


def test_a_fault_comes_with_the_shortest_run_to_it() -> None:
    with pytest.raises(Fault) as caught:
        explore(Grid(2, 3, cleared=False))
    assert caught.value.run == ["0.0 publishes 1"]


def test_more_states_than_allowed_are_said() -> None:
    with pytest.raises(Fault, match="more than 10 states"):
        explore(Grid(2, 5), limit=10)
