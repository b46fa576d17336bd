"""The policies of the engine against a model of the machine, on virtual time."""
