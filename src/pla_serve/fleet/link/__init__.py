"""The router's connections to its instances: our own protocol, vLLM, SGLang."""
