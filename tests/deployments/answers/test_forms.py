import pytest

from deployments.answers.forms import AnswerForm, answer_form


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        (None, "json"),
        ("", "json"),
        ("*/*", "json"),
        ("application/json", "json"),
        ("application/x-msgpack", "msgpack"),
        ("Application/MsgPack", "msgpack"),
        ("application/vnd.msgpack;q=0.2, text/html", "msgpack"),
        ("application/x-msgpack, */*;q=0.1", "msgpack"),
        ("application/json, application/x-msgpack", "json"),
        ("application/json;q=0.5, application/x-msgpack;q=0.9", "msgpack"),
        ("application/json; q=0.9, application/x-msgpack; q=0.5", "json"),
        ("application/x-msgpack;q=0", "json"),
        ("application/x-msgpack;q=much", "json"),
        ("text/x-msgpack", "json"),
    ],
)
def test_messagepack_for_clients_that_ask_for_it_and_json_for_all_others(accept: str | None, form: AnswerForm) -> None:
    assert answer_form(accept) == form
