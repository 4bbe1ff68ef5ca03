"""What a call costs by its number of rows, as measured when a network is made ready."""

from __future__ import annotations

import bisect
from collections.abc import Mapping

__all__ = ["Costs", "sizes"]

KINDS = 8  # of sizes that are run: each is made ready before the first request, and plans keep 16 kinds of inputs


def sizes(most: int) -> list[int]:
    """Batch sizes that are run, ascending up to `most`: all of them, or 8 in ratios as equal as whole numbers allow.
    What lies between two is filled up to the larger one with rows whose answers nobody gets."""
    found = [1]
    while found[-1] < most:
        # As many steps as are left, in equal ratios, but never less than one row more.
        left = KINDS - len(found)
        ratio = (most / found[-1]) ** (1 / left) if left > 0 else most / found[-1]
        found.append(min(most, max(found[-1] + 1, round(found[-1] * ratio))))
    return found


class Costs:
    """Seconds of one call by its rows.

    Args:
        seconds: by batch size, for every size that is run.
    """

    def __init__(self, seconds: Mapping[int, float]) -> None:
        self._sizes = sorted(seconds)
        self._seconds = [seconds[size] for size in self._sizes]
        for i in reversed(range(len(self._sizes) - 1)):  # fewer rows do not take longer: that was another process
            self._seconds[i] = min(self._seconds[i], self._seconds[i + 1])

    @property
    def most(self) -> int:
        """The largest batch."""
        return self._sizes[-1]

    @property
    def seconds(self) -> dict[int, float]:
        """By batch size."""
        return dict(zip(self._sizes, self._seconds, strict=True))

    def size(self, rows: int) -> int:
        """The batch in which so many rows, at most `most`, are run."""
        return self._sizes[bisect.bisect_left(self._sizes, rows)]

    def of(self, rows: int) -> float:
        """Seconds of a call for so many rows."""
        return self._seconds[bisect.bisect_left(self._sizes, min(rows, self.most))]

    def best(self, counts: list[int]) -> int:
        """Of ascending numbers of rows the place of the one that costs least a row; of equals the largest."""
        return min(range(len(counts)), key=lambda i: (self.of(counts[i]) / counts[i], -counts[i]))

    def patience(self, rows: int, more: int) -> float:
        """For how long it pays to wait for `more` rows to join `rows`, an instance idle meanwhile: until the two
        together, waiting included, would cost as much a row as the first alone; 0 where they never cost less."""
        if rows + more > self.most:
            return 0.0
        return max(0.0, (rows + more) * self.of(rows) / rows - self.of(rows + more))
