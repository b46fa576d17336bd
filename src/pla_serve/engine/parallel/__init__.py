"""One model over several devices: each rank computes a share of every layer's products."""
