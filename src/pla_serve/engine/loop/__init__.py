"""The engine's loop: requests in, batches decided and run, tokens out."""
