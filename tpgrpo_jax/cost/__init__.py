"""What work amounts to: operations, devices, bytes between them."""
