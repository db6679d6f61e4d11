"""Streams and events of a simulated GPU, as vector clocks, and their shared memory.

The clock of a stream has a time for each stream that it has waited for. Using memory that another stream has written later than that is out
of order.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import count

import torch

GPU = torch.device("cuda", 0)
Clock = dict[int, int]
_NUMBERS = count()
_NOW: Clock = {}  # the time of every stream


class Stream:
    """torch.cuda.Stream."""

    def __init__(self, device: torch.device | None = None, priority: int = 0):
        self.number, self.device = next(_NUMBERS), GPU
        self.waited: Clock = {self.number: 0}

    def tick(self) -> None:
        """Add an operation to the stream."""
        self.waited[self.number] += 1
        _NOW[self.number] = self.waited[self.number]

    def has_seen(self, clock: Clock) -> bool:
        """Whether everything before `clock` has happened when the next operation runs."""
        return all(self.waited.get(number, 0) >= time for number, time in clock.items())

    def wait_for(self, clock: Clock) -> None:
        """The next operations run after everything before `clock`."""
        for number, time in clock.items():
            self.waited[number] = max(self.waited.get(number, 0), time)

    def wait_for_all(self) -> None:
        """The next operations run after everything so far."""
        self.wait_for(_NOW)

    def wait_stream(self, other: "Stream") -> None:
        """As in torch."""
        self.wait_for(other.waited)

    def wait_event(self, event: "Event") -> None:
        """As in torch."""
        self.wait_for(event.clock)

    def record_event(self, event: "Event | None" = None) -> "Event":
        """As in torch."""
        event = Event() if event is None else event
        event.record(self)
        return event

    def synchronize(self) -> None:
        """As in torch."""
        STREAMS.host_waits("Stream.synchronize")

    def query(self) -> bool:
        """As in torch."""
        return True

    def __enter__(self) -> "Stream":
        STREAMS.stack.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        STREAMS.stack.pop()


class Event:
    """torch.cuda.Event."""

    def __init__(self, *_: object, **__: object):
        self.clock: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        """As in torch."""
        self.clock = dict((stream or STREAMS.current()).waited)

    def wait(self, stream: Stream | None = None) -> None:
        """As in torch."""
        (stream or STREAMS.current()).wait_event(self)

    def synchronize(self) -> None:
        """As in torch."""
        STREAMS.host_waits("Event.synchronize")

    def query(self) -> bool:
        """As in torch."""
        return True

    def elapsed_time(self, other: "Event") -> float:
        """Work takes no time on a simulated GPU."""
        return 0.0


class Streams:
    """The default stream and the current ones; `host_waits` is called with the function in which the host waits."""

    def __init__(self) -> None:
        self.stack = [Stream()]
        self.host_waits: Callable[[str], None] = lambda what: None

    def current(self, device: object = None) -> Stream:
        """torch.cuda.current_stream."""
        return self.stack[-1]

    def default(self, device: object = None) -> Stream:
        """torch.cuda.default_stream."""
        return self.stack[0]

    def chosen(self, stream: Stream | None) -> "Stream | nullcontext[None]":
        """torch.cuda.stream."""
        return nullcontext() if stream is None else stream


STREAMS = Streams()


@dataclass(eq=False)
class Memory:
    """The memory of one storage: the stream that allocated it, its last write and last reads, and the streams that it is recorded for.

    Memory returns to its own stream when its tensors are deleted, so other streams that use it must be recorded (Tensor.record_stream).
    """

    storage: int
    owner: Stream = field(default_factory=STREAMS.current)
    written: Clock = field(default_factory=dict)
    read: Clock = field(default_factory=dict)
    recorded: set[Stream] = field(default_factory=set)

    def use(self, writes: bool) -> str | None:
        """Use it on the current stream; returns None, or a description of what is out of order."""
        stream = STREAMS.current()
        in_order = stream.has_seen(self.written) and (not writes or stream.has_seen(self.read))
        if writes:
            self.written, self.read = {stream.number: stream.waited[stream.number]}, {}
        else:
            self.read[stream.number] = stream.waited[stream.number]
        if not in_order:
            return "does not wait for the stream that used it before"
        return None if stream is self.owner or stream in self.recorded else "is not recorded for this stream"
