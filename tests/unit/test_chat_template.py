"""Chat templates: what Hugging Face models expect of the environment, and what it must not allow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pdserve.errors import ConfigError, RequestError
from proxy.chat_template import ChatTemplate

MESSAGES = [{"role": "system", "content": "S"}, {"role": "user", "content": "<b>&"}]


def test_chatml_is_rendered_as_transformers_renders_it() -> None:
    source = (
        "{% for message in messages %}\n"
        "    {% if loop.first and messages[0]['role'] != 'system' %}{{ 'none' }}{% endif %}\n"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}\n"
        "{% endfor %}\n"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    from transformers.utils.chat_template_utils import render_jinja_template

    theirs, _ = render_jinja_template([MESSAGES], chat_template=source, add_generation_prompt=True)
    assert ChatTemplate(source, {}).render(MESSAGES) == theirs[0]


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ messages | tojson }}", json.dumps(MESSAGES, ensure_ascii=False)),
        ("{% for m in messages %}{% if m.role == 'user' %}{% break %}{% endif %}{{ m.content }}{% endfor %}", "S"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "S"),
        ("{{ bos_token }}{{ eos_token }}", "<s></s>"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ thinking }}", "on"),
    ],
)
def test_the_environment_has_what_templates_use(source: str, text: str) -> None:
    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    assert template.render(MESSAGES, {"thinking": "on"}) == text


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[7].content.foo }}",
        "{{ messages + 1 }}",
        "{{ messages.__class__.__mro__ }}{{ ''.__class__.__subclasses__() }}",
        "{{ messages.append(1) }}",
    ],
)
def test_what_a_template_refuses_is_the_clients_mistake(source: str) -> None:
    with pytest.raises(RequestError) as caught:
        ChatTemplate(source, {}).render(MESSAGES)
    assert caught.value.param == "messages"


def test_the_file_wins_over_the_tokenizer_config(tmp_path: Path) -> None:
    settings = {
        "bos_token": {"content": "<s>"},
        "chat_template": [{"name": "default", "template": "old{{ bos_token }}"}],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    old = ChatTemplate.load(tmp_path)
    assert old is not None
    assert old.render(MESSAGES) == "old<s>"
    (tmp_path / "chat_template.jinja").write_text("new{{ bos_token }}")
    new = ChatTemplate.load(tmp_path)
    assert new is not None
    assert new.render(MESSAGES) == "new<s>"


def test_a_folder_without_template_has_none_and_a_broken_one_is_fatal(tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path) is None
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(ConfigError):
        ChatTemplate.load(tmp_path)
