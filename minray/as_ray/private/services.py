"""``ray._private.services``: the address of this machine."""

from minray.util import get_node_ip_address

__all__ = ["get_node_ip_address"]
