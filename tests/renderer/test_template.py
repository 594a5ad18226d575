"""Templates give what Hugging Face gives, and tell how they take content."""

from typing import Any

import jinja2
import pytest
from transformers import AutoTokenizer

from renderer.errors import ConfigError, RequestError
from renderer.renderer import Renderer
from renderer.template import ChatTemplate, ChatTemplates
from tests.renderer.builders import DEMO, chat

HF = AutoTokenizer.from_pretrained(str(DEMO))
SPEAK = "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}\n{% endfor %}"

FORMATS = {
    "openai": [
        "{% for m in messages %}{% for part in m['content'] %}{{ part.text }}{% endfor %}{% endfor %}",
        "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}",
        "{% for m in messages %}{% for part in m.content | list %}{{ part.text }}{% endfor %}{% endfor %}",
        "{% for m in messages %}{% for part in m.content[1:] %}{{ part.text }}{% endfor %}{% endfor %}",
        "{% for m in messages %}{% set c = m.content %}{% for part in c %}{{ part.text }}{% endfor %}{% endfor %}",
        "{% set rest = messages[1:] %}{% for m in rest %}{% for p in m.content %}{{ p }}{% endfor %}{% endfor %}",
        "{% for part in messages[0].content %}{{ part }}{% endfor %}",
        "{% set first = messages[0] %}{% for part in first['content'] %}{{ part }}{% endfor %}",
        "{% macro show(c) %}{% for part in c %}{{ part }}{% endfor %}{% endmacro %}"
        "{% for m in messages %}{{ show(m.content) }}{% endfor %}",
        "{% macro show(x, c=none) %}{% for part in c %}{{ part }}{% endfor %}{% endmacro %}"
        "{% for m in messages %}{{ show(1, c=m['content']) }}{% endfor %}",
        "{% for m in messages %}{% generation %}{% for part in m.content %}{{ part }}{% endfor %}{% endgeneration %}"
        "{% endfor %}",
        HF.chat_template,
    ],
    "string": [
        "",
        SPEAK,
        "{% for m in messages %}{{ m.content }}{% for call in m.tool_calls %}{{ call }}{% endfor %}{% endfor %}",
        "{% for m in messages %}{% for line in m.content.split('\n') %}{{ line }}{% endfor %}{% endfor %}",
        "{% macro show(content) %}{% for x in content %}{{ x }}{% endfor %}{% endmacro %}"
        "{% for m in messages %}{{ show(m.tool_calls) }}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% for tool in tools %}{{ tool }}{% endfor %}",
    ],
}


def render(source: str, messages: list[dict[str, Any]], continue_: bool = False, **variables: Any) -> str:
    return ChatTemplate(source).render(messages, continue_final_message=continue_, variables=variables)


@pytest.mark.parametrize(
    ("form", "source"), [(form, source) for form, sources in FORMATS.items() for source in sources]
)
def test_the_content_format_is_told_from_the_template(form: str, source: str) -> None:
    assert ChatTemplate(source).content_format == form


@pytest.mark.parametrize(
    "source",
    [
        HF.chat_template,
        SPEAK,
        "  {% if true %}\n  x\n  {% endif %}\n{% for m in messages %}\n  {{ m.content }}\n{% endfor %}",
        "{{ messages | tojson }} {{ messages | tojson(indent=2) }}",
        "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    ],
)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_text_is_hugging_faces(source: str, add_generation_prompt: bool) -> None:
    messages = [
        {"role": "system", "content": "Be <kind> & brief."},
        {"role": "user", "content": " Grüße! "},
        {"role": "assistant", "content": "Hi"},
    ]
    expected = HF.apply_chat_template(
        messages, chat_template=source, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    own = render(source, messages, add_generation_prompt=add_generation_prompt, **HF.special_tokens_map)
    assert own == expected


@pytest.mark.parametrize("source", [HF.chat_template, SPEAK, SPEAK.replace(" | trim", "")])
@pytest.mark.parametrize("last", ["It is a", "It is a ", " It\n"])
def test_a_final_message_to_continue_ends_the_text_as_in_hugging_face(source: str, last: str) -> None:
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": last}]
    expected = HF.apply_chat_template(
        messages, chat_template=source, tokenize=False, continue_final_message=True, add_generation_prompt=False
    )
    assert render(source, messages, continue_=True, add_generation_prompt=False) == expected


def test_the_last_text_part_is_the_one_to_continue() -> None:
    parts = [{"type": "text", "text": "One. "}, {"type": "text", "text": "Two"}]
    messages = [{"role": "assistant", "content": parts}]
    assert render(HF.chat_template, messages, continue_=True).endswith("assistant\nOne. Two")


@pytest.mark.parametrize("content", [[], [{"type": "image"}], None])
def test_a_final_message_without_text_cannot_be_continued(content: Any) -> None:
    with pytest.raises(RequestError, match="final message with text"):
        render(HF.chat_template, [{"role": "assistant", "content": content}], continue_=True)


def test_a_template_that_drops_the_final_message_cannot_continue_it() -> None:
    with pytest.raises(RequestError, match="drops the final message"):
        render("nothing", [{"role": "assistant", "content": "x"}], continue_=True)


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[7].content }}{{ messages[7].content.x }}",
        "{{ ''.__class__.__mro__ }}{{ messages.append(1) }}",
        "{{ 1 / 0 }}",
        "{% for i in range(999999999) %}{% endfor %}",
        "{{ messages[0].content + 1 }}",
    ],
)
def test_a_template_that_fails_on_the_messages_is_the_callers_fault(source: str) -> None:
    with pytest.raises(RequestError) as caught:
        render(source, [{"role": "user", "content": "x"}])
    assert caught.value.param == "messages"


def test_the_reason_that_a_template_gives_is_passed_on() -> None:
    with pytest.raises(RequestError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}", [])


def test_a_template_that_does_not_compile_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not compile"):
        ChatTemplate("{% for %}")


def test_the_role_developer_is_known_where_it_is_quoted() -> None:
    assert ChatTemplate("{% if m.role == 'developer' %}{% endif %}").mentions("developer")
    assert ChatTemplate('{% if m.role == "developer" %}{% endif %}').mentions("developer")
    assert not ChatTemplate("{# for developers #}").mentions("developer")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sources that are compiled from now on."""
    sources: list[str] = []
    compile_ = jinja2.Environment.compile

    def noted(environment: jinja2.Environment, source: Any, *arguments: Any, **options: Any) -> Any:
        sources.append(source)
        return compile_(environment, source, *arguments, **options)

    monkeypatch.setattr(jinja2.Environment, "compile", noted)
    return sources


def test_a_models_templates_compile_once_however_many_requests_they_render(compiled: list[str]) -> None:
    plain, tools = "{{ messages[0].content }}", "{{ messages[0].content }} with tools"
    templates = ChatTemplates({"default": plain, "tool_use": tools})
    assert compiled == [plain, tools]
    for with_tools in (False, True) * 3:
        template = templates.choose(None, with_tools)
        template.render([{"role": "user", "content": "a"}], continue_final_message=False, variables={})
    assert compiled == [plain, tools]


def test_a_template_that_requests_bring_compiles_once_too(compiled: list[str]) -> None:
    templates = ChatTemplates("{{ 1 }}")
    for _ in range(3):
        for brought in ("{{ 2 }}", "{{ 3 }}"):
            templates.choose(brought, with_tools=False)
    assert compiled == ["{{ 1 }}", "{{ 2 }}", "{{ 3 }}"]


def test_rendering_compiles_nothing(shared: Renderer, compiled: list[str]) -> None:
    for text in ("a", "b"):
        shared.render_chat(chat(text))
        shared.layout(chat(text))
    assert compiled == []
