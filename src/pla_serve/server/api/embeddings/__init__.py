"""Vectors of texts: OpenAI's embeddings, and scores of pairs of texts by them."""
