"""Chat templates: what Hugging Face models expect of the environment, and what it must not allow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from pdserve.errors import ConfigError, RequestError
from pdserve.text.tokenizer import Tokenizer
from proxy.chat_template import ChatTemplate
from tests.fakes.proxy_cluster import byte_level_tokenizer

ALL = "{{ messages | map(attribute='content') | join }}"
MESSAGES = [{"role": "system", "content": "S"}, {"role": "user", "content": "<b>&"}]


def test_chatml_is_rendered_as_transformers_renders_it() -> None:
    source = (
        "{% for message in messages %}\n"
        "    {% if loop.first and messages[0]['role'] != 'system' %}{{ 'none' }}{% endif %}\n"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}\n"
        "{% endfor %}\n"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    theirs, _ = render_jinja_template([MESSAGES], chat_template=source, add_generation_prompt=True)
    assert ChatTemplate(source, {}).render(MESSAGES) == theirs[0]


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ messages | tojson }}", json.dumps(MESSAGES, ensure_ascii=False)),
        ("{% for m in messages %}{% if m.role == 'user' %}{% break %}{% endif %}{{ m.role }}{% endfor %}", "system"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "S"),
        ("{{ bos_token }}{{ eos_token }}", "<s></s>"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ thinking }}", "on"),
        ("{% if tools is not none or documents is not none %}{{ tools | length }}{% endif %}", ""),
    ],
)
def test_the_environment_has_what_templates_use(source: str, text: str) -> None:
    template = ChatTemplate(source + ALL, {"bos_token": "<s>", "eos_token": "</s>"})
    assert template.render(MESSAGES, {"thinking": "on"}) == text + "S<b>&"


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


# The templates of well-known models, as they are published (Llama 2's with its system block shortened).
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
QWEN2_5 = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant") %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\\n' + message['content'] + "
    "eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\\n'  + message['content'] + eos_token }}\n"
    "{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
PHI3 = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') %}"
    "{{'<|user|>' + '\n' + message['content'] + '<|end|>' + '\n' + '<|assistant|>' + '\n'}}"
    "{% elif (message['role'] == 'assistant') %}{{message['content'] + '<|end|>' + '\n'}}{% endif %}{% endfor %}"
)
KNOWS_DEVELOPER = (
    "{% for m in messages %}{% if m.role == 'developer' %}<|developer|># Instructions: {{ m.content }}"
    "{% elif m.role == 'system' %}"
    "<|system|>{{ m.content }}{% else %}<|{{ m.role }}|>{{ m.content }}{% endif %}{% endfor %}"
)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def chat(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": f"text {index}"} for index, role in enumerate(roles)]


@pytest.mark.parametrize("source", [CHATML, QWEN2_5, LLAMA2, ZEPHYR, KNOWS_DEVELOPER])
def test_known_roles_are_rendered_as_transformers_renders_them(source: str) -> None:
    template = ChatTemplate(source, SPECIAL)
    for roles in (("user",), ("system", "user"), ("system", "user", "assistant", "user")):
        theirs, _ = render_jinja_template(
            [chat(*roles)], chat_template=source, add_generation_prompt=True, tools=None, documents=None, **SPECIAL
        )
        assert template.render(chat(*roles)) == theirs[0]


@pytest.mark.parametrize("source", [CHATML, QWEN2_5, LLAMA2, ZEPHYR])
@pytest.mark.parametrize("more", [(), ("assistant", "user")])
def test_a_developer_reaches_the_model_as_system_where_the_template_lacks_the_role(
    source: str, more: tuple[str, ...]
) -> None:
    template = ChatTemplate(source, SPECIAL)
    assert template.render(chat("developer", "user", *more)) == template.render(chat("system", "user", *more))
    assert "text 0" in template.render(chat("developer", "user", *more))


def test_a_developer_stays_where_the_template_knows_the_role() -> None:
    assert (
        ChatTemplate(KNOWS_DEVELOPER, {}).render(chat("developer", "user"))
        == "<|developer|># Instructions: text 0<|user|>text 1"
    )


@pytest.mark.parametrize(
    ("source", "roles", "lost"),
    [
        (QWEN2_5, ("critic", "user"), 0),
        (ZEPHYR, ("user", "tool"), 1),
        (LLAMA2, ("user", "critic"), 1),
        (PHI3, ("system", "user"), 0),
        (PHI3, ("user", "assistant", "developer"), 2),
        ("{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}{{ messages[-1].content }}",
         ("system", "user", "assistant", "system", "user"), 1),
    ],
)  # fmt: skip
def test_a_message_that_the_template_leaves_out_is_refused_by_its_role(
    source: str, roles: tuple[str, ...], lost: int
) -> None:
    template = ChatTemplate(source, SPECIAL)
    for _ in range(2):
        with pytest.raises(RequestError, match=f"leaves out a {roles[lost]} message") as caught:
            template.render(chat(*roles))
        assert (caught.value.param, caught.value.status) == (f"messages.{lost}.role", 400)


def test_what_a_template_refuses_itself_keeps_its_own_words() -> None:
    with pytest.raises(RequestError, match="System role not supported"):
        ChatTemplate(GEMMA, SPECIAL).render(chat("system", "user"))


def test_what_a_template_makes_of_roles_may_depend_on_its_variables() -> None:
    template = ChatTemplate("{% for m in messages if m.role != 'system' or keep %}{{ m.content }};{% endfor %}", {})
    assert template.render(chat("system", "user"), {"keep": True}) == "text 0;text 1;"
    with pytest.raises(RequestError, match="leaves out a system message"):
        template.render(chat("system", "user"), {"keep": False})


def test_contents_that_a_template_shortens_are_not_taken_for_lost_messages() -> None:
    source = "{% for m in messages %}{{ m.content.split('</think>')[-1] | trim }};{% endfor %}"
    messages = [{"role": "user", "content": " "}, {"role": "assistant", "content": "<think>long</think> short"}]
    assert ChatTemplate(source, {}).render(messages) == ";short;"


def test_a_long_conversation_is_checked_whole_and_not_kept() -> None:
    template = ChatTemplate(QWEN2_5, {})
    roles = ("user", "assistant") * 200
    assert "text 399" in template.render(chat(*roles))
    with pytest.raises(RequestError, match=r"messages\.400\.role"):
        template.render(chat(*roles, "critic"))
    assert template._roles._kept.cache_info().currsize == 0


TOKENIZER = Tokenizer(byte_level_tokenizer())  # 0 to 2 are <|end|>, <|im_start|>, <|im_end|>


def write(folder: Path, **files: Any) -> None:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


NAMES = "{{ bos_token }},{{ eos_token }},{{ image_token }}" + ALL
ADDED = {"0": {"content": "<|end|>", "special": True}}
TOKEN_FILES: dict[str, dict[str, Any]] = {
    "one file": {
        "tokenizer_config": {
            "bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>", "__type": "AddedToken"},
        },
    },
    "only the map": {
        "tokenizer_config": {},
        "special_tokens_map": {"bos_token": {"content": "<|im_start|>", "lstrip": False}, "eos_token": "<|im_end|>"},
    },
    "the map wins": {
        "tokenizer_config": {"bos_token": "<|end|>", "eos_token": "<|end|>"},
        "special_tokens_map": {"eos_token": "<|im_end|>"},
    },
    "the map loses to a file with its added tokens": {
        "tokenizer_config": {"bos_token": "<|im_start|>", "added_tokens_decoder": ADDED},
        "special_tokens_map": {"bos_token": "<|end|>", "eos_token": "<|im_end|>"},
    },
    "null is a word": {
        "tokenizer_config": {"bos_token": None, "eos_token": "<|im_end|>"},
        "config": {"model_type": "qwen2", "bos_token_id": 1, "eos_token_id": 2},
    },
    "tokens of other names": {
        "tokenizer_config": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "image_token": "<|end|>"},
    },
    "extra tokens with names": {
        "tokenizer_config": {
            "bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "extra_special_tokens": {"image_token": "<|end|>"},
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("case", TOKEN_FILES)
def test_special_tokens_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, **TOKEN_FILES[case])
    (tmp_path / "chat_template.jinja").write_text(NAMES)
    ours = ChatTemplate.load(tmp_path, TOKENIZER)
    assert ours is not None
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert ours.render(MESSAGES) == theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)


def test_where_no_file_names_the_tokens_the_models_configuration_does(tmp_path: Path) -> None:
    write(tmp_path, tokenizer_config={}, config={"bos_token_id": 1, "eos_token_id": [2, 0]})
    (tmp_path / "chat_template.jinja").write_text(NAMES)
    template = ChatTemplate.load(tmp_path, TOKENIZER)
    assert template is not None
    assert template.render(MESSAGES).startswith("<|im_start|>,<|im_end|>,S")
    write(tmp_path, config={"bos_token_id": 70, "eos_token_id": None})
    template = ChatTemplate.load(tmp_path, TOKENIZER)
    assert template is not None
    assert template.render(MESSAGES).startswith(",,S"), "70 is an ordinary token"


def test_the_file_wins_over_the_tokenizer_config(tmp_path: Path) -> None:
    settings = {
        "bos_token": {"content": "<s>"},
        "chat_template": [{"name": "default", "template": f"old{{{{ bos_token }}}}{ALL}"}],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    old = ChatTemplate.load(tmp_path, TOKENIZER)
    assert old is not None
    assert old.render(MESSAGES) == "old<s>S<b>&"
    (tmp_path / "chat_template.jinja").write_text("new{{ bos_token }}" + ALL)
    new = ChatTemplate.load(tmp_path, TOKENIZER)
    assert new is not None
    assert new.render(MESSAGES) == "new<s>S<b>&"


def test_a_folder_without_template_has_none_and_a_broken_one_is_fatal(tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path, TOKENIZER) is None
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(ConfigError):
        ChatTemplate.load(tmp_path, TOKENIZER)


def test_the_last_place_of_a_template_and_names_without_a_default(tmp_path: Path) -> None:
    write(tmp_path, chat_template={"chat_template": "legacy" + ALL})
    template = ChatTemplate.load(tmp_path, TOKENIZER)
    assert template is not None
    assert template.render(MESSAGES) == "legacyS<b>&"
    write(tmp_path, tokenizer_config={"chat_template": [{"name": "rag", "template": ALL}]})
    with pytest.raises(ConfigError, match="rag"):
        ChatTemplate.load(tmp_path, TOKENIZER)
