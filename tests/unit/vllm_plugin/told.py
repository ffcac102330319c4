"""A device that is not there, and what is asked of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Told:
    """A device whose streams and events write down what is asked of them."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.streams = 0
        self.events = 0

    def Stream(self) -> Any:
        return self._stream("own")

    def current_stream(self) -> Any:
        return self._stream("the model's")

    def Event(self) -> Any:
        self.events += 1
        return self._event(self.events)

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.said.append(f"on {stream.name} stream")
        yield
        self.said.append(f"off {stream.name} stream")

    def _stream(self, name: str) -> Any:
        def wait_event(event: Any) -> None:
            self.said.append(f"{name} stream waits for event {event.number}")

        return type("Stream", (), {"name": name, "wait_event": staticmethod(wait_event)})

    def _event(self, number: int) -> Any:
        def record(stream: Any) -> None:
            self.said.append(f"event {number} is behind {stream.name} work")

        def synchronize() -> None:
            self.said.append(f"waited for event {number}")

        methods = {"record": staticmethod(record), "synchronize": staticmethod(synchronize)}
        return type("Event", (), {"number": number, **methods})
