"""Tokenises texts and messages, off the event loop if that takes long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from pla_serve.server.api.schema import ChatRequest
from pla_serve.server.api.template_messages import template_messages
from pla_serve.server.errors import invalid, too_long, unsupported
from pla_serve.server.reasoning.effort import effort_variables
from pla_serve.server.reasoning.formats import HARMONY

Result = TypeVar("Result")

INLINE_CHARACTERS = 2_000
"""Shorter texts are tokenised on the event loop: a thread's hand-over costs more (about 0.1 ms)."""
INLINE_BYTES = 4_000
"""Conversations in bodies up to this size are rendered and tokenised there as well."""
INLINE_TOKENS = 16_000
LARGE = 64_000
"""Characters, bytes or tokens above which a text waits for others of its size only."""
PROBE_CHARACTERS_PER_TOKEN = 8
"""Longer texts than this times the limit are tokenised in slices first, of this size each."""
WIDEST = 4
"""How many times shorter a normaliser may make a text before it is cut into tokens."""
CUT_TOKENS = 32
"""How many tokens more a cut in the middle of a word may make of two slices."""
ENDING = 256
"""Characters at the end of a prompt that tell whether it has begun the model's reasoning."""
PROTECTED_KWARGS = {"tokenize", "chat_template", "conversation", "messages", "tools"}


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A conversation as a prompt."""

    tokens: list[int]
    ending: str
    """Last characters of its text."""


class PromptEncoder:
    """Tokenises, and renders the chat template. Holds the tokenizer and a few threads.

    The tokenizer is a fast one of transformers; its backend releases the GIL while it encodes.
    """

    def __init__(
        self, tokenizer: Any, *, chat_template: str | None = None, threads: int = 2
    ) -> None:
        self._tokenizer = tokenizer
        template = chat_template or tokenizer.chat_template
        several = template if isinstance(template, dict) else {"default": template}
        self._template: str | None = several.get("default")
        self.tool_template: str | None = several.get("tool_use", self._template)
        """Template of requests that offer tools; some models have one of its own for them."""
        self._longest_token = max(map(len, tokenizer.get_vocab()), default=1)
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="tokenize")
        self._large = ThreadPoolExecutor(1, thread_name_prefix="tokenize-large")

    def close(self) -> None:
        for pool in (self._threads, self._large):
            pool.shutdown(wait=False, cancel_futures=True)

    async def text(self, text: str, *, limit: int, add_special_tokens: bool) -> list[int]:
        """Raises:
        ApiError: more than ``limit`` tokens.
        """
        return await self._run(
            len(text),
            len(text) <= INLINE_CHARACTERS,
            lambda: self._encode(text, limit, add_special_tokens),
        )

    async def several(
        self,
        prompts: Sequence[str | list[int]],
        *,
        vocab_size: int,
        limit: int,
        special: bool,
    ) -> list[list[int]]:
        """Return the tokens of all prompts. Others get their turn between two of them.

        Raises:
            ApiError: an id outside the vocabulary, or more than ``limit`` tokens in one.
        """
        found = []
        for prompt in prompts:
            if isinstance(prompt, list):
                found.append(await self.tokens(prompt, vocab_size=vocab_size, limit=limit))
            else:
                found.append(await self.text(prompt, limit=limit, add_special_tokens=special))
            if len(prompts) > 1:
                await asyncio.sleep(0)
        return found

    async def spellings(self, tokens: list[int]) -> list[str]:
        """Return each token as the vocabulary spells it, in a thread if they are many."""

        def work() -> list[str]:
            return list(self._tokenizer.convert_ids_to_tokens(tokens))

        return await self._run(len(tokens), len(tokens) <= INLINE_CHARACTERS, work)

    async def detokenize(self, tokens: list[int]) -> str:
        """Return the text of tokens, in a thread if they are many."""
        inline = len(tokens) <= INLINE_CHARACTERS
        return await self._run(len(tokens), inline, lambda: self.decode(tokens))

    async def tokens(
        self, tokens: list[int], *, vocab_size: int, limit: int, param: str = "prompt"
    ) -> list[int]:
        """The same tokens, checked. ``param`` is their field in the request.

        Raises:
            ApiError: an id outside the vocabulary, or more than ``limit`` of them.
        """
        return await self._run(
            len(tokens),
            len(tokens) <= INLINE_TOKENS,
            lambda: check_tokens(tokens, vocab_size, limit, param),
        )

    async def chat(self, request: ChatRequest, *, limit: int, size: int) -> RenderedChat:
        """Render a conversation, and return its prompt.

        Args:
            limit: most tokens of the prompt.
            size: bytes of the body. A template may show any part of it, so a large one is rendered
                in a thread.

        Raises:
            ApiError: no template, a template that refuses the messages, more than ``limit`` tokens.
        """

        def work() -> RenderedChat:
            text = self.render(request)
            tokens = self._encode(text, limit, request.add_special_tokens)
            return RenderedChat(tokens, text[-ENDING:])

        return await self._run(size, size <= INLINE_BYTES, work)

    async def texts(self, prompts: list[str | list[int]]) -> list[str]:
        """Texts of prompts, for ``echo``; tokens are decoded in a thread."""

        def work() -> list[str]:
            return [item if isinstance(item, str) else self.decode(item) for item in prompts]

        return await self._run(LARGE, all(isinstance(item, str) for item in prompts), work)

    def render(self, request: ChatRequest) -> str:
        """Return the conversation as the chat template writes it.

        Raises:
            ApiError: 400, there is no template, or it refuses the messages.
        """
        template = self.tool_template if request.tools else self._template
        if not template:
            raise invalid(
                "this model has no chat template: use /v1/completions, or start the server with "
                "--chat-template FILE",
                "messages",
            )
        if request.tool_choice == "none" and request.tools and "tools" not in template:
            raise unsupported("tools", "this model's chat template does not show tools")
        kwargs = request.chat_template_kwargs or {}
        if PROTECTED_KWARGS & kwargs.keys():
            name = min(PROTECTED_KWARGS & kwargs.keys())
            raise unsupported("chat_template_kwargs", f"{name} cannot be set by a request")
        if request.reasoning_effort == "none" and HARMONY.fits(template):
            raise unsupported("reasoning_effort", "this model always reasons; ask for low")
        messages = template_messages(request, template)
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages,
                tools=[tool.shown() for tool in request.tools] or None,
                chat_template=template,
                tokenize=False,
                **{
                    "add_generation_prompt": request.add_generation_prompt,
                    "continue_final_message": request.continue_final_message,
                    **effort_variables(template, request.reasoning_effort),
                    **kwargs,
                },
            )
        except Exception as error:
            # A template may raise anything, in transformers' sandbox, and it is about the messages.
            raise invalid(f"the chat template refuses the messages: {error}", "messages") from None
        return text

    def decode(self, tokens: list[int]) -> str:
        """Return the text of a prompt given as tokens, for ``echo``."""
        text: str = self._tokenizer.decode(tokens)
        return text

    async def _run(self, size: int, inline: bool, work: Callable[[], Result]) -> Result:
        if inline:
            return work()
        pool = self._threads if size < LARGE else self._large
        return await asyncio.get_running_loop().run_in_executor(pool, work)

    def _encode(self, text: str, limit: int, special: bool) -> list[int]:
        """A text that cannot fit costs no more than a few times one that fills the context."""
        if len(text) > WIDEST * self._longest_token * limit:
            raise too_long(limit + 1, limit, at_least=True)
        probe = PROBE_CHARACTERS_PER_TOKEN * limit
        if len(text) > 2 * probe:
            tokens = 0
            for start in range(0, len(text), probe):
                found = len(self._ids(text[start : start + probe], special))
                tokens += max(0, found - CUT_TOKENS)
                if tokens > limit:
                    raise too_long(tokens, limit, at_least=True)
        ids = self._ids(text, special)
        if len(ids) > limit:
            raise too_long(len(ids), limit)
        return ids

    def _ids(self, text: str, special: bool) -> list[int]:
        backend = self._tokenizer.backend_tokenizer
        ids: list[int] = backend.encode_batch_fast([text], add_special_tokens=special)[0].ids
        return ids


def check_tokens(
    tokens: list[int], vocab_size: int, limit: int, param: str = "prompt"
) -> list[int]:
    """Raises:
    ApiError: an id outside the vocabulary, or more than ``limit`` of them.
    """
    if len(tokens) > limit:
        raise too_long(len(tokens), limit)
    if tokens and not (min(tokens) >= 0 and max(tokens) < vocab_size):
        bad = next(token for token in tokens if not 0 <= token < vocab_size)
        raise invalid(f"token ids must lie in 0 to {vocab_size - 1}, not {bad}", param)
    return tokens
