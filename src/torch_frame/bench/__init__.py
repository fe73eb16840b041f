"""How fast a device is: matrix products, memory, and known networks that train."""
