"""Reasoning through the official client, from an engine that echoes answers of each family."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import openai
import pytest

from pla_serve.server.reasoning.formats import BY_NAME
from tests.server.reasoning.thoughts import FAMILIES, draw_thought
from tests.server.server_harness import MODEL, Live

ECHO_LAST = "{# tools #}{{ messages[-1].content }}{{ '<think>' if open_now }}"
"""The engine echoes the prompt, so an answer is the last message as it stands."""
SWITCHED = (
    "{% for m in messages %}[{{ m.role }}]{{ m.reasoning_content }}|{{ m.content }}{% endfor %}"
    "{% if reasoning_effort %} effort={{ reasoning_effort }}{% endif %}"
    "{% if enable_thinking is defined %} on={{ enable_thinking }}{% endif %}"
)
HM = "<think>\nhm\n</think>\n\nYes."
CALL = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
NOW: Any = {"type": "function", "function": {"name": "now"}}


@pytest.fixture(scope="module")
def qwen() -> Iterator[openai.OpenAI]:
    live = Live(reasoning_parser="qwen3", tool_parser="hermes", chat_template=ECHO_LAST)
    live.wait_ready()
    with live.client() as client:
        yield client
    live.close()


@pytest.fixture(scope="module")
def switched() -> Iterator[openai.OpenAI]:
    live = Live(reasoning_parser="qwen3", chat_template=SWITCHED)
    live.wait_ready()
    with live.client() as client:
        yield client
    live.close()


def ask(client: openai.OpenAI, text: str, **fields: Any) -> Any:
    messages: Any = [{"role": "user", "content": text}]
    return client.chat.completions.create(model=MODEL, messages=messages, **fields)


def both(message: Any) -> tuple[str, str]:
    """Reasoning and content of a message or a delta; the two names of the reasoning agree."""
    fields = message.model_dump()
    reasoning = fields.get("reasoning_content") or ""
    assert (fields.get("reasoning") or "") == reasoning
    return reasoning, message.content or ""


def collect(stream: Any) -> tuple[str, str]:
    reasoning, content = "", ""
    for chunk in stream:
        for choice in chunk.choices:
            more_reasoning, more_content = both(choice.delta)
            assert not (reasoning and content and more_reasoning), "reasoning after the answer"
            reasoning, content = reasoning + more_reasoning, content + more_content
    return reasoning, content


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_whole_and_streamed(serve: Callable[..., Live], name: str) -> None:
    live, rng = serve(reasoning_parser=name, chat_template=ECHO_LAST), Random(7)
    thoughts = [draw_thought(rng, BY_NAME[name]) for _ in range(20)]
    with live.client() as client:
        for thought in thoughts:
            prompt = thought.text.rstrip()
            own = thought.beginning is BY_NAME[name].begins and not prompt.endswith(
                (*BY_NAME[name].opens, *BY_NAME[name].closes)
            )
            if not own or not prompt:
                continue
            whole = both(ask(client, prompt).choices[0].message)
            assert whole[0].strip() == thought.reasoning
            assert whole[1].strip() == thought.content.strip()
            assert collect(ask(client, prompt, stream=True)) == whole


def test_tokens_of_reasoning_are_counted(qwen: openai.OpenAI) -> None:
    usage = ask(qwen, HM).usage
    assert usage.completion_tokens == len(HM) + 1
    assert usage.completion_tokens_details.reasoning_tokens == len("\nhm\n")
    options: Any = {"include_usage": True}
    *_, last = ask(qwen, HM, stream=True, stream_options=options)
    assert last.usage.completion_tokens_details == usage.completion_tokens_details


def test_a_model_without_reasoning_says_nothing_of_it(client: openai.OpenAI) -> None:
    answer = ask(client, HM)
    assert answer.usage.completion_tokens_details is None
    assert HM in answer.choices[0].message.content


def test_several_choices(qwen: openai.OpenAI) -> None:
    answer = ask(qwen, HM, n=3)
    assert [both(choice.message) for choice in answer.choices] == [("hm", "Yes.")] * 3
    assert answer.usage.completion_tokens_details.reasoning_tokens == 3 * len("\nhm\n")


def test_cut_within_the_reasoning(qwen: openai.OpenAI) -> None:
    choice = ask(qwen, HM, max_tokens=10).choices[0]
    assert choice.finish_reason == "length"
    assert both(choice.message) == ("hm", "")
    assert choice.message.content is None


def test_a_stop_string_within_the_reasoning(qwen: openai.OpenAI) -> None:
    choice = ask(qwen, HM, stop="m\n").choices[0]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", "m\n")
    assert both(choice.message) == ("h", "")


def test_reasoning_and_calls(qwen: openai.OpenAI) -> None:
    for text in (f"<think>\nhm\n</think>\n\n{CALL}", f"<think>\nhm\n{CALL}"):
        choice = ask(qwen, text, tools=[NOW]).choices[0]
        assert both(choice.message) == ("hm", "")
        assert [call.function.name for call in choice.message.tool_calls] == ["now"]
        assert choice.finish_reason == "tool_calls"


def test_the_prompt_begins_the_reasoning(serve: Callable[..., Live]) -> None:
    """The echo begins with what the template wrote, the marker that opens it included."""
    live = serve(reasoning_parser="qwen3", chat_template="{{ messages[-1].content }}<think>\n")
    with live.client() as client:
        assert both(ask(client, "hm</think>Yes.").choices[0].message)[0] == "hm"


def test_the_prompt_ends_the_reasoning(serve: Callable[..., Live]) -> None:
    template = "{{ messages[-1].content }}<think>\n\n</think>\n\n"
    live = serve(reasoning_parser="deepseek_r1", chat_template=template)
    with live.client() as client:
        reasoning, content = both(ask(client, "Yes.").choices[0].message)
        assert (reasoning, content[:4]) == ("", "Yes.")


def test_reasoning_may_be_left_out(qwen: openai.OpenAI) -> None:
    extra: Any = {"include_reasoning": False}
    answer = ask(qwen, HM, extra_body=extra)
    assert both(answer.choices[0].message) == ("", "Yes.")
    assert answer.usage.completion_tokens_details.reasoning_tokens == 4
    assert collect(ask(qwen, HM, extra_body=extra, stream=True)) == ("", "Yes.")


def test_reasoning_may_stay_in_the_content(qwen: openai.OpenAI) -> None:
    extra: Any = {"separate_reasoning": False}
    assert both(ask(qwen, HM, extra_body=extra).choices[0].message) == ("", HM)


def test_the_effort_goes_to_the_template(switched: openai.OpenAI) -> None:
    content = ask(switched, "x", reasoning_effort="high").choices[0].message.content
    assert content.endswith("effort=high on=True")
    content = ask(switched, "x", reasoning_effort="none").choices[0].message.content
    assert content.endswith("effort=none on=False")
    extra: Any = {"chat_template_kwargs": {"enable_thinking": False}}
    content = (
        ask(switched, "x", reasoning_effort="low", extra_body=extra).choices[0].message.content
    )
    assert content.endswith("effort=low on=False")


def test_a_template_that_does_not_know_the_effort(qwen: openai.OpenAI) -> None:
    assert both(ask(qwen, HM, reasoning_effort="high").choices[0].message) == ("hm", "Yes.")


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_comes_back_in_the_next_turn(switched: openai.OpenAI, name: str) -> None:
    messages: Any = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", name: "hm"},
        {"role": "user", "content": "c"},
    ]
    answer = switched.chat.completions.create(model=MODEL, messages=messages)
    assert answer.choices[0].message.content == "[user]|a[assistant]hm|b[user]|c"


def test_a_continued_message_may_have_begun_its_reasoning(serve: Callable[..., Live]) -> None:
    live = serve(reasoning_parser="qwen3", chat_template="{{ messages[-1].content }}")
    extra: Any = {"add_generation_prompt": False, "continue_final_message": True}
    with live.client() as client:
        for said, expected in (("<think>hm", ("hm", "")), ("Yes", ("", "Yes"))):
            messages: Any = [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": said},
            ]
            answer = client.chat.completions.create(
                model=MODEL, messages=messages, extra_body=extra
            )
            assert both(answer.choices[0].message) == expected


def test_a_budget_needs_a_token_that_ends_the_reasoning(qwen: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="no single token"):
        ask(qwen, HM, extra_body={"thinking_token_budget": 5})
