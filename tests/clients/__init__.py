"""Clients that people use, each doing a whole task against a live server.

The model is a stand-in: it says what a script of the test tells it, in the format of a family of
models. So a task always takes the same way, and what is tested is the client and the server.
"""
