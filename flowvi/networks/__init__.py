"""Networks: Haiku modules, pure networks, and adapters for those of others."""

from flowvi.networks.adapters import as_network
from flowvi.networks.convolutional import ConvDecoder, ConvEncoder
from flowvi.networks.equinox import EquinoxNetwork
from flowvi.networks.flax import LinenNetwork, NNXNetwork
from flowvi.networks.foreign import ForeignNetwork
from flowvi.networks.haiku import HaikuNetwork
from flowvi.networks.made import MADE
from flowvi.networks.mlp import MLP
from flowvi.networks.network import Network
from flowvi.networks.plain import PlainNetwork

__all__ = [
    "MADE",
    "MLP",
    "ConvDecoder",
    "ConvEncoder",
    "EquinoxNetwork",
    "ForeignNetwork",
    "HaikuNetwork",
    "LinenNetwork",
    "NNXNetwork",
    "Network",
    "PlainNetwork",
    "as_network",
]
