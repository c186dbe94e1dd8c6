"""Networks: Haiku modules, pure networks, and adapters for those of others."""

from flowvi.networks.adapters import HaikuNetwork, PlainNetwork, as_network
from flowvi.networks.made import MADE
from flowvi.networks.mlp import MLP
from flowvi.networks.network import Network

__all__ = ["MADE", "MLP", "HaikuNetwork", "Network", "PlainNetwork", "as_network"]
