"""The exchange through the shared memory of a cluster's blocks.

Every member has `slots` copies of all h and one mbarrier for each. It stores its piece of h into
the copy of every other member, and a store counts its bytes (here: 1) on the barrier there when it
arrives. A thread of the owner arms the barrier anew for each use, by an arrival that names how
many bytes to expect; a phase ends when that arrival and all bytes were seen, in either order.
Threads wait for a phase by its parity. All threads of a member read, one of them stores: the least
that a block's barrier between the two must hold together.

In the backward (`scattered`) the pieces are parts of sums: each member has one for every member,
itself included, and each of its threads stores those for some of them, when it comes to it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from tests.protocols.model import Violation, replaced

# What a thread does next.
SET_UP, WAIT, ARM, READ, STORE, GONE = range(6)
Thread = tuple[int, int]  # step, and what it does next
Barrier = tuple[int, bool, int]  # phases that ended, armed, bytes expected less bytes seen
Copy = tuple[int, ...]  # the step of each member's piece of h
Member = tuple[tuple[Thread, ...], tuple[Barrier, ...], tuple[Copy, ...]]
Store = tuple[int, int, int]  # to whom, from whom, step
State = tuple[tuple[Member, ...], tuple[Store, ...]]


@dataclass(frozen=True)
class Cluster:
    members: int
    steps: int
    threads: int = 1
    slots: int = 2
    barriers: int = 2
    scattered: bool = False
    together: bool = True  # all have set up their barriers before anyone stores
    after_reading: bool = True  # a block stores only when all its threads have read
    last_is_stored: bool = False  # also h after the last step, which nobody awaits
    surplus: int = 0  # bytes expected beyond those that come

    def initial(self) -> State:
        first = READ if self.together else SET_UP
        threads = ((0, first), *((0, READ),) * (self.threads - 1))
        barrier = self._armed() if self.together else (-1, False, 0)
        copies = ((0,) * self.members, *((-1,) * self.members,) * (self.slots - 1))
        return ((threads, (barrier,) * self.barriers, copies),) * self.members, ()

    def finished(self, state: State) -> bool:
        return not state[1] and all(self._gone(member) for member in state[0])

    def representative(self, state: State) -> State:
        """Members differ by their number alone, so one order of them stands for all; but not where
        the number says which thread stores."""
        if self.scattered and self.threads > 1:
            return state
        members, stores = state

        def seen(m: int) -> tuple:
            threads, barriers, copies = members[m]
            found = tuple(tuple(sorted(copy)) for copy in copies)
            come = tuple(step for to, _, step in stores if to == m)
            sent = tuple(sorted(step for _, source, step in stores if source == m))
            return threads, barriers, found, come, sent

        order = sorted(range(self.members), key=seen)
        number = {m: i for i, m in enumerate(order)}
        renamed = tuple(
            (*members[m][:2], tuple(tuple(copy[j] for j in order) for copy in members[m][2]))
            for m in order
        )
        return renamed, tuple(sorted((number[a], number[b], step) for a, b, step in stores))

    def moves(self, state: State) -> Iterator[tuple[str, State]]:
        for m, (threads, barriers, copies) in enumerate(state[0]):
            for w, (step, doing) in enumerate(threads):
                if doing == SET_UP:
                    fresh = (self._armed(),) * self.barriers
                    yield "set up", self._after(state, m, w, (step, READ), fresh)
                elif doing == WAIT:
                    if self._ended(barriers, step):
                        # The earliest that it can read; the move READ is the latest.
                        self._check(copies[step % self.slots], m, step)
                        then = ARM if w == 0 else READ
                        yield f"{m}.{w} waited for {step}", self._after(state, m, w, (step, then))
                elif doing == ARM:
                    yield f"{m} arms", self._arms(state, m, step)
                elif doing == READ:
                    self._check(copies[step % self.slots], m, step)
                    yield f"{m}.{w} has read {step}", self._after(state, m, w, (step, STORE))
                elif doing == STORE and (
                    not self._receivers(m, w) or self._may_store(threads, step)
                ):
                    yield f"{m}.{w} ends {step}", self._stores(state, m, w, step)
        yield from self._arrivals(state)

    def _armed(self) -> Barrier:
        return 0, True, self.members - (not self.scattered) + self.surplus

    def _receivers(self, m: int, w: int) -> list[int]:
        """To whom thread `w` of member `m` stores."""
        if self.scattered:
            return list(range(w, self.members, self.threads))
        return [j for j in range(self.members) if j != m and w == 0]

    def _gone(self, member: Member) -> bool:
        return all(doing == GONE for _, doing in member[0])

    def _ended(self, barriers: tuple[Barrier, ...], step: int) -> bool:
        """As mbarrier.try_wait.parity: whether the phase under way has another parity."""
        awaited = (step - 1) // self.barriers
        return barriers[step % self.barriers][0] % 2 != awaited % 2

    def _check(self, copy: Copy, m: int, step: int) -> None:
        for source, found in enumerate(copy):
            if (self.scattered or source != m) and found != step:
                raise Violation(f"{m} reads the h of step {found} for that of {step}")

    def _may_store(self, threads: tuple[Thread, ...], step: int) -> bool:
        return not self.after_reading or all(
            (s, doing) >= (step, STORE) or doing == GONE for s, doing in threads
        )

    def _stores(self, state: State, m: int, w: int, step: int) -> State:
        last = step + 1 == self.steps
        members, stores = self._after(state, m, w, (step + 1, GONE if last else WAIT))
        if last and not self.last_is_stored:
            return members, stores
        new = ((j, m, step + 1) for j in self._receivers(m, w))
        return members, tuple(sorted((*stores, *new)))

    def _arms(self, state: State, m: int, step: int) -> State:
        barriers = state[0][m][1]
        which = step % self.barriers
        ended, armed, bytes_left = barriers[which]
        if armed:
            raise Violation(f"{m} arms a barrier twice in a phase")
        barrier = self._complete((ended, True, bytes_left + self._armed()[2]))
        return self._after(state, m, 0, (step, READ), replaced(barriers, which, barrier))

    def _complete(self, barrier: Barrier) -> Barrier:
        ended, armed, left = barrier
        return (ended + 1, False, 0) if armed and left == 0 else barrier

    def _arrivals(self, state: State) -> Iterator[tuple[str, State]]:
        members, stores = state
        for i, (to, source, step) in enumerate(stores):
            threads, barriers, copies = members[to]
            if self._gone(members[to]):
                raise Violation(f"a store of step {step} into the memory of {to}, which has ended")
            slot, which = step % self.slots, step % self.barriers
            copies = replaced(copies, slot, replaced(copies[slot], source, step))
            ended, armed, left = barriers[which]
            if ended >= 0:  # else the count is lost
                barrier = self._complete((ended, armed, left - 1))
                barriers = replaced(barriers, which, barrier)
            after = replaced(members, to, (threads, barriers, copies))
            yield f"{step} of {source} arrives at {to}", (after, stores[:i] + stores[i + 1 :])

    def _after(
        self,
        state: State,
        m: int,
        w: int,
        thread: Thread,
        barriers: tuple[Barrier, ...] | None = None,
    ) -> State:
        members, stores = state
        threads, old, copies = members[m]
        member = (replaced(threads, w, thread), barriers or old, copies)
        return replaced(members, m, member), stores
