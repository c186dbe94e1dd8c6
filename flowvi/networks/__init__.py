"""Networks: Haiku modules, pure networks, and adapters for those of others."""

from flowvi.networks.adapters import as_network
from flowvi.networks.convolutional import ConvDecoder, ConvEncoder
from flowvi.networks.foreign import PlainNetwork
from flowvi.networks.made import MADE
from flowvi.networks.network import MLP, Network
from flowvi.networks.series import SeriesEncoder
from flowvi.networks.sets import SetEncoder

__all__ = [
    "MADE",
    "MLP",
    "ConvDecoder",
    "ConvEncoder",
    "Network",
    "PlainNetwork",
    "SeriesEncoder",
    "SetEncoder",
    "as_network",
]
