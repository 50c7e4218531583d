"""The exchange through global memory: words that carry the step beside the value.

Each member is a block of `threads` threads. Thread w publishes word w of its member's h for a step,
and polls one word of each other member, whose place differs from member to member, until it
carries that step. A block's barrier lies
between its reads of one step and its stores of the next. A store becomes visible at any later time,
before or after other stores of the same thread; to one word, in order.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from tests.protocols.model import Violation, replaced

Thread = tuple[int, tuple[int, ...]]  # the step whose words it awaits; the members still missing
Word = tuple[int, int]  # the step of the value, and that of the tag
Store = tuple[int, int, str, int]  # slot, place, part of the word, step
State = tuple[tuple[tuple[Thread, ...], ...], tuple[tuple[Word, ...], ...], tuple[Store, ...]]


@dataclass(frozen=True)
class Grid:
    members: int
    steps: int
    threads: int = 1
    slots: int = 2
    barrier: bool = True  # between a block's reads of one step and its stores of the next
    whole: bool = True  # a word's value and tag are one store
    tags: int = 0  # the tag is the step modulo this; 0: the step itself
    cleared: bool = True  # the words of an earlier launch are gone

    def initial(self) -> State:
        # All know the state before the first step.
        blocks = (((0, ()),) * self.threads,) * self.members
        words = [(0, 0)] * self.slots
        if not self.cleared:
            for step in range(1, self.steps):
                words[step % self.slots] = (-step, step)
        places = self.members * self.threads
        return blocks, tuple((word,) * places for word in words), ()

    def finished(self, state: State) -> bool:
        last = self.steps - 1
        return not state[2] and all(t == (last, ()) for block in state[0] for t in block)

    def representative(self, state: State) -> State:
        return state

    def moves(self, state: State) -> Iterator[tuple[str, State]]:
        for m, block in enumerate(state[0]):
            for w, thread in enumerate(block):
                if thread[1]:
                    yield from self._reads(state, m, w)
                elif thread[0] + 1 < self.steps and self._may_publish(block, w):
                    yield self._publish(state, m, w)
        yield from self._arrivals(state)

    def _may_publish(self, block: tuple[Thread, ...], w: int) -> bool:
        step = block[w][0]
        return not self.barrier or all(s > step or (s == step and not left) for s, left in block)

    def _publish(self, state: State, m: int, w: int) -> tuple[str, State]:
        blocks, memory, stores = state
        step = blocks[m][w][0] + 1
        slot, place = step % self.slots, m * self.threads + w
        parts = ("word",) if self.whole else ("value", "tag")
        stores += tuple((slot, place, part, step) for part in parts)
        thread = (step, tuple(j for j in range(self.members) if j != m))
        blocks = replaced(blocks, m, replaced(blocks[m], w, thread))
        return f"{m}.{w} publishes {step}", (blocks, memory, stores)

    def _reads(self, state: State, m: int, w: int) -> Iterator[tuple[str, State]]:
        blocks, memory, stores = state
        step, left = blocks[m][w]
        for j in left:
            value, tag = memory[step % self.slots][j * self.threads + (w + m) % self.threads]
            if tag % self.tags != step % self.tags if self.tags else tag != step:
                continue
            if value != step:
                raise Violation(f"{m}.{w} takes the value of step {value} for that of {step}")
            thread = (step, tuple(k for k in left if k != j))
            after = replaced(blocks, m, replaced(blocks[m], w, thread))
            yield f"{m}.{w} reads {step} of {j}", (after, memory, stores)

    def _arrivals(self, state: State) -> Iterator[tuple[str, State]]:
        blocks, memory, stores = state
        for i, (slot, place, part, step) in enumerate(stores):
            if any(s[:3] == (slot, place, part) for s in stores[:i]):
                continue  # an older store to the same place comes first
            value, tag = memory[slot][place]
            word = (value if part == "tag" else step, tag if part == "value" else step)
            after = replaced(memory, slot, replaced(memory[slot], place, word))
            left = stores[:i] + stores[i + 1 :]
            yield f"{part} {step} of {place // self.threads} arrives", (blocks, after, left)
