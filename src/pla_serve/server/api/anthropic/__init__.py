"""Anthropic's ``/v1/messages``: its bodies, answers, events and errors.

A body is translated into a `ChatRequest` (`translate`) and goes the way of every chat; what is read
out of the answer becomes content blocks (`blocks`), whole or as events.
"""
