"""Parts of the abuse campaign: what hostile clients send, each grown from a seed."""
