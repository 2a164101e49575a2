"""Loading a tokenizer from a checkpoint folder, and chat templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from tokenizers_for_tests import byte_level

from pageflight.core.errors import CheckpointError, InvalidArgument
from pageflight.text.chat_template import ChatTemplate
from pageflight.text.tokenizer import Tokenizer

TEMPLATE = """{%- for message in messages %}
    {%- if message.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}
{{ bos_token }}<{{ message.role }}>{{ message.content }}
{% endfor %}
{%- if add_generation_prompt %}<assistant>{% generation %}{% endgeneration %}{% endif %}"""


def write(folder: Path, name: str, data: Any) -> None:
    (folder / name).write_text(json.dumps(data), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_special_tokens_come_from_all_the_files(folder: Path) -> None:
    write(folder, "tokenizer_config.json", {"bos_token": {"content": "<s>"}, "eos_token": "</s>"})
    write(folder, "special_tokens_map.json", {"pad_token": "<unk>"})
    write(folder, "generation_config.json", {"eos_token_id": [7, 2]})
    special = Tokenizer.load(folder).special
    assert special.bos_id == 1 and special.pad_id == 0
    assert special.eos_ids == (7, 2), "chat models end with a token that only generation_config names"
    assert special.strings["bos_token"] == "<s>"


def test_the_post_processor_decides_about_the_first_token(folder: Path) -> None:
    plain = Tokenizer.load(folder)
    assert plain.encode("the") == plain.encode("the", add_special_tokens=False)
    tokenizer = byte_level().from_str(byte_level().to_str())
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    assert Tokenizer.load(folder).encode("the")[0] == 1
    assert Tokenizer.load(folder).encode("the", add_special_tokens=False)[0] != 1


def test_truncation_saved_with_the_tokenizer_does_not_cut_prompts(folder: Path) -> None:
    """A tokenizer.json saved after training often carries `truncation`; prompts were cut in silence."""
    tokenizer = byte_level().from_str(byte_level().to_str())
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(folder / "tokenizer.json"))
    loaded = Tokenizer.load(folder)
    text = "The quick brown fox jumps over the lazy dog."
    assert loaded.decode(loaded.encode(text)) == text


def test_a_missing_or_damaged_tokenizer_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tokenizer.load(tmp_path)


def test_a_template_renders_as_transformers_renders_it(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    write(folder, "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"})
    messages = [{"role": "user", "content": "hé <b>"}, {"role": "assistant", "content": "ok"}]
    template = ChatTemplate.load(folder, {"bos_token": "<s>"})
    assert template is not None
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))
    for prompt in (True, False):
        expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert template.render(messages, add_generation_prompt=prompt) == expected


def test_named_templates_and_tojson(folder: Path) -> None:
    named = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "{% for tool in tools %}{{ tool | tojson }}{% break %}{% endfor %}"},
    ]
    write(folder, "tokenizer_config.json", {"chat_template": named})
    template = ChatTemplate.load(folder, {})
    assert template is not None and template.names == ("default", "tool_use")
    assert template.render([]) == "plain"
    assert template.render([], tools=[{"name": "<é>"}, {}]) == '{"name": "<é>"}'
    with pytest.raises(InvalidArgument, match="default, tool_use"):
        template.render([], name="other")


def test_what_a_template_refuses_is_the_clients_error(folder: Path) -> None:
    write(folder, "tokenizer_config.json", {"chat_template": TEMPLATE})
    template = ChatTemplate.load(folder, {"bos_token": ""})
    assert template is not None
    with pytest.raises(InvalidArgument, match="no system here"):
        template.render([{"role": "system", "content": "x"}])


@pytest.mark.parametrize("attack", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}"])
def test_templates_run_in_a_sandbox(folder: Path, attack: str) -> None:
    template = ChatTemplate({"default": attack}, {})
    with pytest.raises(InvalidArgument):
        template.render([])


def test_a_template_that_is_not_jinja_is_the_checkpoints_error() -> None:
    with pytest.raises(CheckpointError, match="default"):
        ChatTemplate({"default": "{% for %}"}, {})


def test_no_template_is_none(folder: Path) -> None:
    assert ChatTemplate.load(folder, {}) is None
