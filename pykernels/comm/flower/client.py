"""The client's side: a mod that encodes what training changed."""

from __future__ import annotations

from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable, Mod
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, RECORD_KEY_STATE

from pykernels.comm.flower.payload import DTYPES, Arrays, encode, numpy
from pykernels.ops.compress import CODECS

RESIDUALS, ROUND = "pykernels.residuals", "pykernels.round"  # records of the client's state
SERVER_ROUND = "server-round"


def only(content: RecordDict, what: str) -> tuple[str, ArrayRecord]:
    """The one ArrayRecord of a message, and its name.

    Raises:
        ValueError: there are others.
    """
    if len(content.array_records) != 1:
        raise ValueError(f"pykernels: {what} must hold one ArrayRecord, not {len(content.array_records)}")
    return next(iter(content.array_records.items()))


def _check_alike(before: Arrays, after: Arrays) -> None:
    """Names and shapes of a reply are those that were sent; dtypes become so, since averages of integers are float64.

    Raises:
        ValueError: they are not, or a dtype would lose something that no codec loses.
    """
    for name in {**before, **after}:
        came, goes = before.get(name), after.get(name)
        if came is None or goes is None or came.shape != goes.shape or not _castable(goes.dtype, came.dtype):
            told, wanted = ("nothing" if x is None else f"{x.dtype} {list(x.shape)}" for x in (goes, came))
            raise ValueError(f"pykernels: {name}: the reply has {told}, {wanted} was sent")
        after[name] = goes.astype(came.dtype, copy=False)


def _castable(goes: np.dtype[Any], came: np.dtype[Any]) -> bool:
    return np.can_cast(goes, came, "same_kind" if came.name in DTYPES and goes.kind == "f" else "safe")


def _refuse_secure_aggregation(*places: RecordDict) -> None:
    for place in places:
        if RECORD_KEY_CONFIGS in place or RECORD_KEY_STATE in place:
            raise ValueError(
                "pykernels: compress: not together with secure aggregation (secaggplus_mod): it sums masked integers, "
                "which no codec may change. Take one of the two"
            )


def compress(codec: str = "int8", *, error_feedback: bool = True, forget_after: int | None = None) -> Mod:
    """A client mod that sends what training changed through `codec`.

    It acts on training messages, of ``@app.train()`` and of a ``client_fn``. Put it first, so that it encodes what
    other mods (differential privacy) leave; one that comes before it finds other arrays than it expects, and answers
    with an error.

    Args:
        codec: a name in ``pykernels.ops.compress.CODECS``.
        error_feedback: keep what was not sent in the client's state, fp32, as large as the compressed arrays.
        forget_after: rounds after which this residual is dropped. Where clients are sampled, it comes from a model that
            the others have moved on from since: it is right in sum, and late. None: it is kept.

    Raises:
        ValueError: an unknown codec; `forget_after` that is no integer of at least 1; in a message: secure aggregation
            is used as well, not one ArrayRecord came or goes, names, shapes or dtypes of what goes are not those of
            what came; `forget_after` is given and no config record says ``server-round``.
    """
    if codec not in CODECS:
        raise ValueError(f"pykernels: codec must be one of {', '.join(CODECS)}, not {codec!r}")
    if forget_after is not None and (not isinstance(forget_after, int) or forget_after < 1):
        raise ValueError(f"pykernels: forget_after must be an integer of at least 1, not {forget_after!r}")

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        if message.metadata.message_type.split(".")[0] != "train":
            return call_next(message, context)
        _refuse_secure_aggregation(message.content, context.state)
        now = _round(message.content)
        if forget_after is not None and now is None:
            raise ValueError(f"pykernels: forget_after: no config record of the message says {SERVER_ROUND}")
        _, came = only(message.content, "a training message")
        before = numpy(came)
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        _refuse_secure_aggregation(reply.content)
        key, goes = only(reply.content, "the reply")
        after = numpy(goes)
        _check_alike(before, after)
        residuals = _residuals(context.state, now, forget_after) if error_feedback else None
        sent, kept = encode(before, after, codec, residuals)
        if error_feedback:
            context.state[RESIDUALS] = ArrayRecord({name: Array(array) for name, array in kept.items()})
            context.state[ROUND] = ConfigRecord({SERVER_ROUND: now if now is not None else 0})
        reply.content[key] = ArrayRecord({"payload": sent})
        return reply

    return mod


def _round(content: RecordDict) -> int | None:
    for record in content.config_records.values():
        if isinstance(value := record.get(SERVER_ROUND), int):
            return value
    return None


def _residuals(state: RecordDict, now: int | None, forget_after: int | None) -> Arrays:
    record = state.array_records.get(RESIDUALS)
    if record is None:
        return {}
    since: Any = state.config_records[ROUND][SERVER_ROUND]
    if forget_after is not None and now is not None and now - since > forget_after:
        return {}
    return numpy(record)
