"""Which steps run in int8: the least latency whose errors sum to no more than a limit, as an exact integer program.

A step is int8 or float, a binary variable x. A value is wanted in 8 bits (q) when an int8 step reads it. Conversions
are products of these, made linear: one to 8 bits is made where a value is wanted so and its producer is float, one
back where an int8 step has written 8 bits and a float step reads them. A conversion serves all who read the value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["StepCost", "Table", "ValueCost"]


@dataclass(frozen=True)
class StepCost:
    """A step.

    Attributes:
        seconds: in float, and in int8.
        error: what its int8 weights add to the relative squared error of the answer.
        reads: values that it reads in 8 bits when it is int8, by their places.
        writes: the value that it makes, if somebody may want that in 8 bits.
        follows: it is int8 only where what it reads was made in 8 bits; any other step converts what it reads.
        only_bytes: in int8 it writes nothing but 8 bits, so it is int8 only where these are wanted.
    """

    seconds: tuple[float, float]
    error: float = 0.0
    reads: tuple[int, ...] = ()
    writes: int | None = None
    follows: bool = False
    only_bytes: bool = False


@dataclass(frozen=True)
class ValueCost:
    """What flows between steps.

    Attributes:
        error: what its rounding to 8 bits adds to the relative squared error of the answer.
        quantize, dequantize: seconds of the conversions.
        as_float: seconds that an int8 producer takes longer to write floats.
        float_reader: it is read as float whatever is chosen.
        keeps: an int8 producer gives it the scale of what that has read, so that nothing is rounded again.
    """

    error: float = 0.0
    quantize: float = 0.0
    dequantize: float = 0.0
    as_float: float = 0.0
    float_reader: bool = False
    keeps: bool = False


@dataclass
class Table:
    """All costs of a network. An assignment is a list of booleans, whether each step is int8."""

    steps: Sequence[StepCost]
    values: Sequence[ValueCost]
    producers: list[int | None] = field(init=False)
    readers: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self.producers = [None] * len(self.values)
        self.readers = [[] for _ in self.values]
        for i, step in enumerate(self.steps):
            if step.writes is not None:
                self.producers[step.writes] = i
            for value in step.reads:
                self.readers[value].append(i)

    def allowed(self, int8: Sequence[bool]) -> bool:
        """Whether kernels can run this assignment."""
        return all(self._runs(i, int8) for i, chosen in enumerate(int8) if chosen)

    def without(self, int8: Sequence[bool], place: int) -> list[bool]:
        """The assignment with this step in float, and every step that cannot be int8 then."""
        found = list(int8)
        found[place] = False
        while not self.allowed(found):
            for i in range(len(found)):
                found[i] = found[i] and self._runs(i, found)
        return found

    def seconds(self, int8: Sequence[bool]) -> float:
        """The latency of an assignment, conversions included."""
        total = sum(step.seconds[chosen] for step, chosen in zip(self.steps, int8, strict=True))
        for place, value in enumerate(self.values):
            producer, wanted = self.producers[place], self._wanted(place, int8)
            made = producer is not None and int8[producer]
            if wanted and not made:
                total += value.quantize
            elif wanted and (value.float_reader or not all(int8[i] for i in self.readers[place])):
                total += value.dequantize
            elif made and not wanted:
                total += value.as_float
        return total

    def error(self, int8: Sequence[bool]) -> float:
        """The relative squared error of an assignment, as far as errors add up."""
        total = sum(step.error for step, chosen in zip(self.steps, int8, strict=True) if chosen)
        for place, value in enumerate(self.values):
            producer = self.producers[place]
            kept = value.keeps and producer is not None and int8[producer]
            if self._wanted(place, int8) and not kept:
                total += value.error
        return total

    def _runs(self, place: int, int8: Sequence[bool]) -> bool:
        """Whether this step can be int8 beside the others."""
        step = self.steps[place]
        if step.only_bytes and step.writes is not None and not self._wanted(step.writes, int8):
            return False
        made = [self.producers[value] for value in step.reads] if step.follows else []
        return all(producer is None or int8[producer] for producer in made)

    def _wanted(self, value: int, int8: Sequence[bool]) -> bool:
        return any(int8[i] for i in self.readers[value])

    def solve(self, limit: float | None = None) -> list[bool]:
        """The quickest assignment whose error is at most `limit`, above 0; None: whatever its error.

        Raises:
            ImportError: highspy is not installed.
        """
        try:
            import highspy
        except ImportError:
            raise ImportError(
                "precision: 'auto' solves an integer program with highspy: pip install 'pykernels[compress]'"
            ) from None

        model = highspy.Highs()
        model.silent()
        for option, setting in {"mip_rel_gap": 0.0, "mip_abs_gap": 0.0, "threads": 1, "random_seed": 0}.items():
            model.setOptionValue(option, setting)
        x = [model.addBinary() for _ in self.steps]
        wanted = [model.addBinary() for _ in self.values]
        latency = [1e6 * (step.seconds[1] - step.seconds[0]) * x[i] for i, step in enumerate(self.steps)]
        error = [step.error / limit * x[i] for i, step in enumerate(self.steps) if limit and step.error]

        def product(*bounds: object) -> object:
            """A variable that is at least each of these expressions, and as small as it can be."""
            found = model.addVariable(lb=0, ub=1)
            for bound in bounds:
                model.addConstr(found >= bound)
            return found

        for place, value in enumerate(self.values):
            q, producer, readers = wanted[place], self.producers[place], self.readers[place]
            for i in readers:
                model.addConstr(q >= x[i])
            model.addConstr(q <= sum((x[i] for i in readers), start=0 * q))
            made = 0 * q if producer is None else 1 * x[producer]
            to_bytes = product(q - made)
            latency.append(1e6 * value.quantize * to_bytes)
            if producer is not None:
                others = [made + q - x[i] - 1 for i in readers]
                if value.float_reader:
                    others.append(made + q - 1)
                latency.append(1e6 * value.dequantize * product(*others))
                latency.append(1e6 * value.as_float * product(made - q))
            if limit and value.error:
                error.append(value.error / limit * (to_bytes if value.keeps else q))
        for i, step in enumerate(self.steps):
            for producer in [self.producers[read] for read in step.reads] if step.follows else []:
                if producer is not None:
                    model.addConstr(x[i] <= x[producer])
            if step.only_bytes and step.writes is not None:
                model.addConstr(x[i] <= wanted[step.writes])
        if error:
            model.addConstr(sum(error) <= 1)
        model.minimize(sum(latency))
        if model.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            raise RuntimeError(f"precision: the integer program ended as {model.getModelStatus()}")
        return [round(model.val(variable)) == 1 for variable in x]
