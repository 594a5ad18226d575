"""Messages reach the template in the form that it takes."""

from typing import Any

import pytest

from renderer.conversation import ChatRequest, ImagePart, Message, TextPart
from renderer.errors import RequestError
from renderer.messages import template_messages, template_tools, template_variables
from renderer.template import ChatTemplate

PARTS = ChatTemplate("{% for m in messages %}{% for part in m.content %}{{ part }}{% endfor %}{% endfor %}")
STRINGS = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
DEVELOPERS = ChatTemplate("{% for m in messages %}{{ m.role == 'developer' }}{% endfor %}")
FIRST, SECOND = ImagePart(data=b"1"), ImagePart(data=b"2")
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}


def content(message: Message, template: ChatTemplate) -> Any:
    return template_messages([message], template, "<image>")[0]["content"]


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


@pytest.mark.parametrize(
    ("given", "parts", "string"),
    [
        ("hi", [text("hi")], "hi"),
        ("", [text("")], ""),
        (None, [], ""),
        ((), [], ""),
        ((TextPart("a"), TextPart("b")), [text("a"), text("b")], "a\nb"),
        ((TextPart("a"), FIRST, TextPart("b")), [text("a"), {"type": "image"}, text("b")], "<image>\na\nb"),
        ((TextPart("a"), FIRST, SECOND), [text("a"), {"type": "image"}, {"type": "image"}], "<image>\n<image>\na"),
        ((FIRST,), [{"type": "image"}], "<image>"),
    ],
)
def test_content_becomes_parts_or_one_text(given: Any, parts: list[dict[str, str]], string: str) -> None:
    message = Message("user", given)
    assert content(message, PARTS) == parts
    assert content(message, STRINGS) == string


def test_a_tools_answer_is_one_text_whatever_the_template() -> None:
    message = Message("tool", (TextPart("rain"), TextPart("later")), {"tool_call_id": "c1"})
    for template in (PARTS, STRINGS):
        rendered = template_messages([message], template, None)[0]
        assert rendered == {"role": "tool", "content": "rain\nlater", "tool_call_id": "c1"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [('{"x": 1}', {"x": 1}), ({"x": 1}, {"x": 1}), ("{broken", {}), ("[1]", {}), ("", {}), (None, {}), (7, {})],
)
def test_arguments_of_tool_calls_become_objects(arguments: Any, expected: Any) -> None:
    call = {**CALL, "function": {"name": "f", "arguments": arguments}}
    rendered = template_messages([Message("assistant", None, {"tool_calls": [call]})], PARTS, None)[0]
    assert rendered["tool_calls"] == [{**CALL, "function": {"name": "f", "arguments": expected}}]
    assert call["function"] == {"name": "f", "arguments": arguments}


@pytest.mark.parametrize("role", ["assistant", "user"])
def test_no_tool_calls_are_none(role: str) -> None:
    rendered = template_messages([Message(role, "hi", {"tool_calls": []})], STRINGS, None)[0]
    assert rendered == {"role": role, "content": "hi"}


@pytest.mark.parametrize("call", ["f", {"id": "c1"}, {"function": "f"}])
def test_a_tool_call_without_a_function_is_refused(call: Any) -> None:
    with pytest.raises(RequestError, match="needs a function"):
        template_messages([Message("assistant", None, {"tool_calls": [call]})], PARTS, None)


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_reaches_the_template_under_both_its_names(name: str) -> None:
    rendered = template_messages([Message("assistant", "4", {name: "2 + 2"})], STRINGS, None)[0]
    assert (rendered["reasoning"], rendered["reasoning_content"]) == ("2 + 2", "2 + 2")


def test_developers_stay_where_the_template_knows_them() -> None:
    messages = [Message("developer", "Be brief."), Message("user", "Hi")]
    assert [message["role"] for message in template_messages(messages, DEVELOPERS, None)] == ["developer", "user"]


def test_a_single_developer_message_in_front_becomes_the_system_message() -> None:
    messages = [Message("developer", (TextPart("Be brief."),)), Message("user", "Hi")]
    assert template_messages(messages, PARTS, None)[0] == {"role": "system", "content": [text("Be brief.")]}


def test_developer_messages_join_the_system_message_in_front() -> None:
    messages = [
        Message("system", "One."),
        Message("user", "Hi"),
        Message("developer", (TextPart("Two,"), TextPart("three."))),
    ]
    rendered = template_messages(messages, PARTS, None)
    assert rendered[0] == {"role": "system", "content": "One.\n\nTwo,\nthree."}
    assert [message["role"] for message in rendered] == ["system", "user"]


def test_tools_have_their_keys_in_one_order_and_no_others() -> None:
    given: list[dict[str, Any]] = [
        {"function": {"parameters": {"b": 1, "a": 2}, "extra": 1, "name": "f"}, "type": "function", "more": 2},
        {"type": "function", "function": {"strict": True, "name": "g", "description": "d"}},
    ]
    tools = template_tools(given)
    assert tools is not None
    assert [list(tool["function"].items()) for tool in tools] == [
        [("name", "f"), ("description", None), ("parameters", {"b": 1, "a": 2})],
        [("name", "g"), ("description", "d"), ("parameters", None), ("strict", True)],
    ]
    assert template_tools(None) is None


@pytest.mark.parametrize("tool", [{}, {"function": {}}, {"function": "f"}])
def test_a_tool_without_a_named_function_is_refused_by_its_place(tool: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        template_tools([{"function": {"name": "f"}}, tool])
    assert caught.value.param == "tools.1.function"


def test_a_template_sees_special_tokens_its_arguments_and_the_request() -> None:
    request = ChatRequest((), add_generation_prompt=False, chat_template_kwargs={"thinking": True})
    assert template_variables(request, {"bos_token": "<s>"}) == {
        "bos_token": "<s>", "tools": None, "documents": None, "add_generation_prompt": False, "thinking": True
    }  # fmt: skip


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt"])
def test_arguments_cannot_take_the_place_of_the_request(name: str) -> None:
    with pytest.raises(RequestError) as caught:
        template_variables(ChatRequest((), chat_template_kwargs={name: 1}), {})
    assert caught.value.param == "chat_template_kwargs"


def test_a_role_is_the_apis_or_the_templates() -> None:
    judges = ChatTemplate("{% for m in messages %}{{ m.role == 'judge' }}{% endfor %}")
    for role in ("system", "developer", "user", "assistant", "tool", "function"):
        template_messages([Message(role, "hi")], STRINGS, None)
    template_messages([Message("judge", "hi")], judges, None)
    with pytest.raises(RequestError, match="'wizard' is unknown") as refused:
        template_messages([Message("user", "hi"), Message("wizard", "hi")], judges, None)
    assert refused.value.param == "messages.1.role"


HEADER = "x-anthropic-billing-header: cch=1;"


@pytest.mark.parametrize(
    ("given", "parts", "string"),
    [
        (f"{HEADER}\nbe brief", [text("be brief")], "be brief"),
        (HEADER, [], ""),
        ((TextPart(HEADER), TextPart("a")), [text("a")], "a"),
        (f" {HEADER}", [text(f" {HEADER}")], f" {HEADER}"),
    ],
)
def test_the_billing_line_of_a_system_prompt_is_dropped(given: Any, parts: list[Any], string: str) -> None:
    assert content(Message("system", given), PARTS) == parts
    assert content(Message("system", given), STRINGS) == string
    assert content(Message("user", HEADER), STRINGS) == HEADER
