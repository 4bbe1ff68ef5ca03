"""Federated learning with Flower (``flwr``, extra ``federated``): clients send what they changed through a codec.

::

    app = ClientApp(mods=[comm.flower.compress("int8")])     # outermost, before mods of differential privacy
    strategy = comm.flower.Decompress(FedAvg())              # any strategy of flwr.serverapp, or of flwr.server

A client answers a training message with its arrays less those that it was sent, encoded with error feedback: what the
codec lost stays in the client's state and is added the next time. The server adds what it decodes to the arrays that it
sent, and hands the strategy replies as if nothing had been compressed; where the strategy averages as FedAvg does, it
decodes and sums all replies in one pass instead. The server knows names, shapes and dtypes from what it sent itself: of
a reply it reads a format's and a codec's name and as many bytes as these shapes take, whatever they hold.
"""

from pykernels.comm.flower.client import compress
from pykernels.comm.flower.fit import DecompressFit
from pykernels.comm.flower.server import Decompress

__all__ = ["Decompress", "DecompressFit", "compress"]
