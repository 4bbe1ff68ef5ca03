"""How many bytes of requests may be in memory at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from pykernels.serve.errors import Overloaded, TooLarge

__all__ = ["Budget", "Held"]


class Budget:
    """Bytes of requests, of one and of all together.

    Args:
        request: the most of one.
        all: the most of all that are being read or answered.
    """

    def __init__(self, request: int, all: int) -> None:
        self.request, self.all = request, all
        self.used = 0

    @contextlib.contextmanager
    def hold(self) -> Iterator[Held]:
        """What one request holds, until it is answered."""
        held = Held(self)
        try:
            yield held
        finally:
            self.used -= held.bytes


class Held:
    """What one request holds of a budget."""

    def __init__(self, budget: Budget) -> None:
        self.budget, self.bytes = budget, 0

    def grow(self, bytes: int) -> None:
        """So many bytes more.

        Raises:
            TooLarge: the request has more than one may.
            Overloaded: all together would have.
        """
        budget = self.budget
        if self.bytes + bytes > budget.request:
            raise TooLarge(f"the request is larger than {budget.request} bytes")
        if budget.used + bytes > budget.all:
            raise Overloaded("the requests that are being answered fill the memory for requests", retry_after=1)
        self.bytes += bytes
        budget.used += bytes
