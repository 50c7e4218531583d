"""Every interleaving of a protocol, by breadth-first search over its states."""

from collections.abc import Iterator
from typing import Any, Protocol

State = Any  # nested tuples: hashable


class Violation(Exception):
    """A move that must never be possible: a value of another step, a write into what is gone."""


class Model(Protocol):
    def initial(self) -> State: ...

    def representative(self, state: State) -> State:
        """The state itself, or one that differs from it by names alone."""
        ...

    def moves(self, state: State) -> Iterator[tuple[str, State]]:
        """What any thread or any store under way can do next, with a name; raises Violation."""
        ...

    def finished(self, state: State) -> bool:
        """Whether everyone has ended and nothing is under way."""
        ...


class Fault(AssertionError):
    """What went wrong, after the shortest run that leads there."""

    def __init__(self, what: str, run: list[str]) -> None:
        super().__init__(f"{what}, after: {', '.join(run)}")
        self.what, self.run = what, run


def explore(model: Model, limit: int = 2_000_000) -> int:
    """Tries every order of the moves of `model`.

    Returns:
        The number of states that can be reached.

    Raises:
        Fault: a violation, a state from which nothing moves before all have finished, or more
            than `limit` states.
    """
    start = model.initial()
    came: dict[State, tuple[State, str] | None] = {start: None}
    frontier = [start]
    while frontier:
        following = []
        for state in frontier:
            stuck = True
            try:
                for name, reached in model.moves(state):
                    stuck, after = False, model.representative(reached)
                    if after not in came:
                        came[after] = (state, name)
                        following.append(after)
            except Violation as error:
                raise Fault(str(error), _run(came, state)) from None
            if stuck and not model.finished(state):
                raise Fault("deadlock", _run(came, state))
        if len(came) > limit:
            raise Fault(f"more than {limit} states", [])
        frontier = following
    return len(came)


def _run(came: dict[State, tuple[State, str] | None], state: State) -> list[str]:
    names = []
    while (step := came[state]) is not None:
        state, name = step
        names.append(name)
    return names[::-1]


def replaced(items: tuple, at: int, item: Any) -> tuple:
    return (*items[:at], item, *items[at + 1 :])
