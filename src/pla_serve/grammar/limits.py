"""How much one grammar may cost."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GrammarLimits:
    """Bounds on one grammar; beyond any of them the request that brought it fails alone.

    CPU time is counted by the kernel, which ends the worker; so a limit holds inside the library
    too. The library's own limits are beside the compiler.
    """

    characters: int = 256 * 1024
    """Length of the grammar's text."""
    nesting: int = 100
    """Brackets inside brackets: of a schema, of a regular expression, of a Lark rule."""
    definitions: int = 1500
    """Rules and terminals of a Lark grammar, and ``$ref`` entries of a schema. Each may lead to the
    next one, and the compiler follows them by recursion; its stack ends near 2,900."""
    compile_seconds: float = 1.0
    """CPU time until the grammar is compiled and has its first mask."""
    step_seconds: float = 0.25
    """CPU time for one token: going past it, and the mask after it."""
    wall_seconds: float = 4.0
    """Time that one of these steps may take at all, on however busy a machine. Compiling has this
    on top of its CPU time."""
    memory_bytes: int = 96 * 2**20
    """Memory of a worker beyond what an idle one has."""
    total_bytes: int = 112 * 2**20
    """Memory of all workers of one process together, beyond what idle ones have. Beyond that the
    largest worker is ended."""

    def replay_seconds(self, tokens: int) -> float:
        """CPU time to compile a grammar and go past ``tokens`` tokens that were made already."""
        return self.compile_seconds + self.step_seconds + tokens * TOKEN_SECONDS


TOKEN_SECONDS = 0.01
"""CPU time for each token that one text may take on average. Hostile texts take more."""
ALLOWANCE_SECONDS = 0.5
"""CPU time that one text may take on top of that."""
GRAMMARS_A_WORKER = 8
"""Compiled grammars that one worker keeps."""
