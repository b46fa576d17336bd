"""CPU kernels of our own: built at the first start, checked, used by attention and layers."""
