"""Formats of reasoning: the markers between which each family of models reasons."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from pla_serve.server.tools.formats.harmony import CHANNEL, ENDS, MARKERS, MESSAGE, START


class Beginning(enum.Enum):
    """Says how an answer begins, as far as its prompt tells."""

    REASONING = "reasoning"
    """The prompt has begun the reasoning, so the answer goes on with it."""
    EITHER = "either"
    """The answer begins with the opening marker if the model reasons."""
    ANSWER = "answer"
    """The prompt has ended the reasoning, or has begun the text of the answer."""


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """Markers between which a family of models writes its reasoning.

    Attributes:
        name: for ``--reasoning-parser``.
        signs: the format is chosen for a template that contains all texts of one of these groups.
        opens: markers that may open the reasoning.
        closes: markers that close it.
        calls: markers of tool calls that close it as well, and stay in the text.
        begins: how an answer begins if the prompt ends with neither marker.
        repeats: reasoning may come again after text, up to the first call.
    """

    name: str
    signs: tuple[tuple[str, ...], ...] = ()
    opens: tuple[str, ...] = ()
    closes: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()
    begins: Beginning = Beginning.EITHER
    repeats: bool = False

    def fits(self, template: str) -> bool:
        """Whether a model with this chat template reasons so."""
        return any(all(sign in template for sign in group) for group in self.signs)

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that may be single tokens of a vocabulary."""
        return MARKERS if self is HARMONY else (*self.opens, *self.closes)


NO_REASONING = ReasoningFormat("none")
"""Answers are left as they are."""
HARMONY = ReasoningFormat(
    "harmony",
    ((CHANNEL, MESSAGE),),
    opens=(f"{CHANNEL}analysis{MESSAGE}",),
    closes=(*ENDS, START),
    repeats=True,
)
"""gpt-oss; `HarmonyReader` reads its reasoning together with its calls."""
FORMATS = (
    HARMONY,
    ReasoningFormat(
        "mistral",
        (("[THINK]",),),
        opens=("[THINK]",),
        closes=("[/THINK]",),
        calls=("[TOOL_CALLS]",),
        repeats=True,
    ),
    ReasoningFormat(
        "granite",
        (("Here is my thought process:",),),
        opens=("Here is my thought process:", "Here's my thought process:"),
        closes=("Here is my response:", "Here's my response:"),
    ),
    ReasoningFormat(
        "deepseek_r1",
        (("<｜Assistant｜><think>",),),
        opens=("<think>",),
        closes=("</think>",),
        begins=Beginning.REASONING,
    ),
    ReasoningFormat(
        "qwen3",
        (("</think>",),),
        opens=("<think>",),
        closes=("</think>",),
        calls=("<tool_call>",),
    ),
    NO_REASONING,
)
"""The first one that fits is chosen, so those with rarer signs stand before the others."""
BY_NAME = {known.name: known for known in FORMATS}
ALIASES = {"openai_gptoss": "harmony", "gpt-oss": "harmony"}


def choose_reasoning(template: str, name: str = "auto") -> ReasoningFormat:
    """Return the format called ``name``, or for "auto" the one that ``template`` shows.

    Raises:
        ValueError: there is no such format; the message lists those there are.
    """
    if name != "auto":
        try:
            return BY_NAME[ALIASES.get(name, name)]
        except KeyError:
            known = ", ".join(["auto", *BY_NAME, *ALIASES])
            raise ValueError(
                f"there is no reasoning format {name!r}; choose one of {known}"
            ) from None
    return next((known for known in FORMATS if known.fits(template)), NO_REASONING)
