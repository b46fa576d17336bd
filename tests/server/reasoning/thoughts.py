"""Answers with reasoning in the format of each family, with what they mean."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from pla_serve.server.reasoning.formats import BY_NAME, Beginning, ReasoningFormat


@dataclass(frozen=True, slots=True)
class Thought:
    """One answer.

    Attributes:
        text: as the model writes it.
        beginning: how it begins.
        reasoning, content: what it means, without white space at the ends.
    """

    text: str
    beginning: Beginning
    reasoning: str
    content: str


REASONINGS = (
    "I think.",
    "The user wants <b>, so 1 < 2.\n\nThen a <thing> and </think",
    "好的 😀 [THIN] {x}",
    "Here is my",
    "a",
)
CONTENTS = (
    "Paris.",
    "It is </b> and\n\n  indented <th",
    "{}",
    "Ja, 好 😀.",
    "Here is my reply: [/THINK",
    "",
)
FAMILIES = ("qwen3", "deepseek_r1", "granite", "mistral")


def draw_thought(rng: Random, form: ReasoningFormat) -> Thought:
    """An answer that the family can write: with the opening marker, without it where the prompt has
    it, cut within the reasoning, or without reasoning."""
    reasoning, content = rng.choice(REASONINGS), rng.choice(CONTENTS)
    before, after = rng.choice(("", "\n")), rng.choice(("", "\n", "\n\n"))
    opening, closing = rng.choice(form.opens), rng.choice(form.closes)
    kind = rng.choice(("whole", "whole", "opened", "cut", "plain"))
    if kind == "opened" and form.name in ("granite", "mistral"):
        kind = "whole"
    if kind == "plain":
        return Thought(content, Beginning.ANSWER, "", content)
    begins = Beginning.EITHER if kind == "whole" else Beginning.REASONING
    text = (opening if kind != "opened" else "") + before + reasoning
    if kind == "cut":
        return Thought(text, begins, reasoning, "")
    return Thought(text + before + closing + after + content, begins, reasoning, content)


def forms() -> list[ReasoningFormat]:
    """The formats whose markers stand around the reasoning."""
    return [BY_NAME[name] for name in FAMILIES]
