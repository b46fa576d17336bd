"""Which format a model writes its calls in, from its chat template."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pla_serve.server.tools.events import AnswerReader
from pla_serve.server.tools.formats.deepseek import MARKERS as DEEPSEEK_MARKERS
from pla_serve.server.tools.formats.deepseek import DeepSeekReader
from pla_serve.server.tools.formats.gemma import FUNCTION_GEMMA, GEMMA_4, GemmaReader
from pla_serve.server.tools.formats.granite import MARKERS as GRANITE_MARKERS
from pla_serve.server.tools.formats.granite import GraniteReader
from pla_serve.server.tools.formats.harmony import MARKERS as HARMONY_MARKERS
from pla_serve.server.tools.formats.harmony import HarmonyReader
from pla_serve.server.tools.formats.hermes import CLOSE, OPEN, HermesReader
from pla_serve.server.tools.formats.llama import TAG, LlamaJsonReader
from pla_serve.server.tools.formats.mistral import ARGUMENTS, CALL_ID, MARKER, MistralReader
from pla_serve.server.tools.formats.plain import PlainJsonReader
from pla_serve.server.tools.formats.pythonic import END, START, PythonicReader
from pla_serve.server.tools.formats.qwen_coder import QwenCoderReader
from pla_serve.server.tools.tool import Tools


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One way of writing calls.

    Attributes:
        name: for ``--tool-parser``.
        signs: the format is chosen for a template that contains all texts of one of these groups.
        markers: texts of the format that may be single special tokens of a vocabulary. They have to
            stay in the text that the reader gets.
        reader: a fresh reader for one answer.
    """

    name: str
    signs: tuple[tuple[str, ...], ...]
    markers: tuple[str, ...]
    reader: Callable[[Tools], AnswerReader]

    def fits(self, template: str) -> bool:
        """Whether a model with this chat template writes its calls so."""
        return any(all(sign in template for sign in group) for group in self.signs)


def _gemma_markers(index: int) -> tuple[str, ...]:
    tags = (FUNCTION_GEMMA, GEMMA_4)[index]
    return (tags.open, tags.close, tags.quote)


PLAIN = ToolFormat("plain_json", (), (), lambda tools: PlainJsonReader())
"""For templates that show no tools, and for those whose format is not known."""
FORMATS = (
    ToolFormat(
        "harmony",
        (("<|channel|>", "<|message|>"),),
        HARMONY_MARKERS,
        lambda tools: HarmonyReader(),
    ),
    ToolFormat(
        "deepseek", (("<｜tool▁calls▁begin｜>",),), DEEPSEEK_MARKERS, lambda tools: DeepSeekReader()
    ),
    ToolFormat(
        "gemma4", (("<|tool_call>",),), _gemma_markers(1), lambda tools: GemmaReader(GEMMA_4)
    ),
    ToolFormat(
        "function_gemma",
        (("<start_function_call>",),),
        _gemma_markers(0),
        lambda tools: GemmaReader(FUNCTION_GEMMA),
    ),
    ToolFormat(
        "mistral",
        (("[TOOL_CALLS]",),),
        (MARKER, CALL_ID, ARGUMENTS),
        lambda tools: MistralReader(),
    ),
    ToolFormat("qwen3_coder", (("<function=", "<parameter="),), (OPEN, CLOSE), QwenCoderReader),
    ToolFormat(
        "granite",
        (("<|tool_call|>",), ("<|start_of_role|>", "<tool_call>[")),
        GRANITE_MARKERS,
        lambda tools: GraniteReader(),
    ),
    ToolFormat("hermes", ((OPEN,),), (OPEN, CLOSE), lambda tools: HermesReader()),
    ToolFormat(
        "pythonic",
        (("<|python_start|>",), ("tools", "[func_name1(params_name1=")),
        (START, END),
        lambda tools: PythonicReader(),
    ),
    ToolFormat(
        "llama3_json",
        (("<|python_tag|>",), ("<|start_header_id|>", "tools", '"parameters"')),
        (TAG,),
        lambda tools: LlamaJsonReader(),
    ),
    PLAIN,
)
"""The first one that fits is chosen, so those with rarer signs stand before the others."""
BY_NAME = {known.name: known for known in FORMATS}


def choose_format(template: str, name: str = "auto") -> ToolFormat:
    """The format called ``name``, or for "auto" the one that ``template`` shows.

    Raises:
        ValueError: there is no such format; the message lists those there are.
    """
    if name != "auto":
        try:
            return BY_NAME[name]
        except KeyError:
            known = ", ".join(["auto", *BY_NAME])
            raise ValueError(f"there is no tool format {name!r}; choose one of {known}") from None
    return next((known for known in FORMATS if known.fits(template)), PLAIN)
