"""A conversation that is written span by span is what the chat template makes of the finished conversation."""

from itertools import zip_longest

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import character_tokenizer
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from lightning_qat.generation.sample import ASSISTANT, USER
from lightning_qat.generation.scripts.chat import Chat, ChatTemplate

CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are Qwen.<|im_end|>\n' }}{% endif %}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# An empty think block goes into answers after the last question, and the thinking of earlier answers is dropped.
QWEN3 = """
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(last_query=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set ns.last_query = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\n' + message.content + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set answer = message.content.split('</think>')[-1].lstrip('\n') %}
        {%- set thought = message.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in message.content else '' %}
        {{- '<|im_start|>assistant\n' + ('<think>\n' + thought + '\n</think>\n\n' if loop.index0 > ns.last_query else '') + answer }}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""
DEEPSEEK = (  # the roles' tokens are no special ones, and the generation prompt opens the think block
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '<User>' + message['content'] }}{% else %}"
    "{{ '<Assistant>' + message['content'].split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<Assistant><think>\n' }}{% endif %}"
)
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "1 Jan 1970" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\nToday: " + date_string + "\n\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
GEMMA3 = """{{ bos_token }}
{%- set first_user_prefix = "" -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- set messages = messages[1:] -%}
{%- endif -%}
{%- for message in messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate") }}
    {%- endif -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}{{ message['content'] | trim }}{{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}
"""
MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- bos_token }}
{%- for message in messages %}
    {%- if (message["role"] == "user") != (loop.index0 % 2 == 0) %}{{- raise_exception("roles must alternate") }}{%- endif %}
    {%- if message["role"] == "user" %}
        {{- "[INST] " + (system_message + "\n\n" if loop.last and system_message is defined else "") + message["content"] + "[/INST]" }}
    {%- else %}
        {{- " " + message["content"]|trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
LLAMA2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)

# template, its special tokens, tokens that are only added, what ends a user's message, what ends an answer
FAMILIES = {
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"], [], "<|im_end|>", "<|im_end|>"),
    "qwen3": (QWEN3, ["<|im_start|>", "<|im_end|>"], ["<think>", "</think>"], "<|im_end|>", "<|im_end|>"),
    "llama3": (LLAMA3, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], [], "<|eot_id|>", "<|eot_id|>"),
    "gemma3": (GEMMA3, ["<start_of_turn>", "<end_of_turn>"], ["\n\n"], "<end_of_turn>", "<end_of_turn>"),
    "mistral": (MISTRAL, ["[INST]", "[/INST]"], [], "[/INST]", "</s>"),
    "zephyr": (ZEPHYR, [], [], "</s>", "</s>"),
    "deepseek": (DEEPSEEK, [], ["<User>", "<Assistant>", "<think>", "</think>"], "<Assistant>", "</s>"),
}
each_family = pytest.mark.parametrize("family", FAMILIES)


def dress(tokenizer, template, special=(), added=()):
    tokenizer.add_special_tokens({"eos_token": "</s>", "additional_special_tokens": list(special)})
    tokenizer.add_tokens(["\n", *added])
    tokenizer.chat_template = template
    return tokenizer


def tokenizer_of(family):
    template, special, added, *_ = FAMILIES[family]
    return dress(character_tokenizer(), template, special, added)


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def rendered(tokenizer, messages, system=None, **variables):
    chat = [{"role": ("user", "assistant")[i % 2], "content": message} for i, message in enumerate(messages)]
    chat = chat if system is None else [{"role": "system", "content": system}, *chat]
    return tokenizer.apply_chat_template(chat, return_dict=False, date_string="26 Jul 2024", **variables)


def chat_of(tokenizer, turns, ends=(), system=None):
    return Chat(ChatTemplate.from_tokenizer(tokenizer, system), turns, list(ends), vocab_size=len(tokenizer), max_length=1000)


def played(script, messages, ends):
    """The sample of a teacher that writes these messages, each as ids and an end token; what it writes must be its turn to write."""
    sample = []
    for place, (span, message, end) in enumerate(zip_longest(script.spans(0), messages, ends)):
        assert span.role == (USER, ASSISTANT)[place % 2]
        assert span.greedy == 0
        assert end in span.ends
        assert span.ends.isdisjoint(message)
        sample += [*span.forced, *message, end]
    return sample


def said(tokenizer, family, messages):
    """What the teacher writes for a message, and with what it ends it."""
    ends = [tokenizer.convert_tokens_to_ids(end) for end in FAMILIES[family][3:]]
    space = " " if family == "mistral" else ""  # in front of an answer; the template does not ask for it, the teacher writes it
    return [ids(tokenizer, space * (place % 2) + text) for place, text in enumerate(messages)], [ends[i % 2] for i in range(len(messages))]


# ---------------------------------------------------------------- the oracle: the template itself

KEEP_HISTORY = ["chatml", "llama3", "gemma3", "mistral", "zephyr"]
HAVE_SYSTEM = ["chatml", "llama3", "gemma3", "zephyr"]


@pytest.mark.parametrize(("family", "system"), [*((name, None) for name in KEEP_HISTORY), *((name, "Be brief.") for name in HAVE_SYSTEM)])
def test_a_sample_is_what_the_template_makes_of_the_finished_conversation(family, system):
    tokenizer = tokenizer_of(family)
    messages = ["Hi", "Hello! How can I help?", "Name 2 trees.", "Oak, elm.", "7?", "8"]
    sample = played(chat_of(tokenizer, 3, system=system), *said(tokenizer, family, messages))
    whole = rendered(tokenizer, messages, system)
    assert sample == whole[: len(sample)]
    assert tokenizer.decode(whole[len(sample) :]).strip() == ""


@each_family
def test_the_first_answer_begins_where_the_template_asks_for_one(family):
    tokenizer = tokenizer_of(family)
    (message, _), (end, _) = said(tokenizer, family, ["Hi there", ""])
    question, answer = chat_of(tokenizer, 1).spans(0)
    assert [*question.forced, *message, end, *answer.forced] == rendered(tokenizer, ["Hi there"], add_generation_prompt=True)


PREPARED = {name: (tokenizer := tokenizer_of(name), chat_of(tokenizer, 3)) for name in KEEP_HISTORY}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text("abc XYZ09.,?!'", min_size=1).map(str.strip).filter(bool), min_size=6, max_size=6))
def test_any_messages(messages):
    for family, (tokenizer, script) in PREPARED.items():
        sample = played(script, *said(tokenizer, family, messages))
        assert sample == rendered(tokenizer, messages)[: len(sample)]


# ---------------------------------------------------------------- thinking


def test_thinking_stays_where_the_template_would_drop_it():
    tokenizer = tokenizer_of("qwen3")
    thought = "<think>\nhm, 2\n</think>\n\nTwo."
    sample = played(chat_of(tokenizer, 2), *said(tokenizer, "qwen3", ["1+1?", thought, "Sure?", "<think>\n\n</think>\n\nYes"]))
    text = (
        f"<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n{thought}<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nYes<|im_end|>"
    )
    assert sample == ids(tokenizer, text)
    assert "<think>" not in tokenizer.decode(rendered(tokenizer, ["1+1?", thought, "Sure?"]))  # the template would have dropped it


def test_a_think_block_that_the_generation_prompt_opens_is_given():
    tokenizer = tokenizer_of("deepseek")
    sample = played(chat_of(tokenizer, 2), *said(tokenizer, "deepseek", ["1+1?", "hm\n</think>\n\n2", "Sure?", "</think>Yes"]))
    text = "<s><User>1+1?<Assistant><think>\nhm\n</think>\n\n2</s><User>Sure?<Assistant><think>\n</think>Yes</s>"
    assert sample == ids(tokenizer, text)


# ---------------------------------------------------------------- ends


def test_an_end_token_of_the_model_stands_for_the_templates():
    tokenizer = tokenizer_of("chatml")
    end, other = tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>"])
    sample = played(chat_of(tokenizer, 2, ends=[other]), [ids(tokenizer, text) for text in "abcd"], [end, other, other, end])
    text = "<|im_start|>{}\n{}{}\n<|im_start|>{}\n{}{}\n<|im_start|>{}\n{}{}\n<|im_start|>{}\n{}{}"
    wanted = text.format("user", "a", "<|im_end|>", "assistant", "b", "</s>", "user", "c", "</s>", "assistant", "d", "<|im_end|>")
    assert sample == ids(tokenizer, "<|im_start|>system\nYou are Qwen.<|im_end|>\n" + wanted)


@each_family
def test_ends_are_the_templates_and_the_models(family):
    tokenizer = tokenizer_of(family)
    ends = tokenizer.convert_tokens_to_ids(FAMILIES[family][3:])
    for place, span in enumerate(chat_of(tokenizer, 2, ends=[5, 9]).spans(3)):
        assert span.ends == {5, 9, ends[place % 2]}


def test_white_space_in_front_of_the_end_token_is_not_given_after_it():
    """Llama 2 writes ' </s>' behind an answer."""
    template = LLAMA2.replace("' [/INST]'", "'<|end|>'")
    tokenizer = dress(character_tokenizer(), template, ["<|end|>"])
    end, eos = tokenizer.convert_tokens_to_ids(["<|end|>", "</s>"])
    sample = played(chat_of(tokenizer, 2), [ids(tokenizer, text) for text in "abcd"], [end, eos, end, eos])
    assert sample == ids(tokenizer, "<s>[INST] a<|end|>b</s><s>[INST] c<|end|>d</s>")


# ---------------------------------------------------------------- seams


def joining_tokenizer():
    """A space joins the letter behind it, as in the tokenizers of Llama 2, Mistral and Gemma."""
    letters = [chr(code) for code in range(33, 127)]
    names = ["<pad>", "<s>", "▁", *letters, *("▁" + letter for letter in letters)]
    tokenizer = Tokenizer(BPE({name: i for i, name in enumerate(names)}, [("▁", letter) for letter in letters], unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>")


def test_a_space_that_joins_the_message_is_left_to_the_teacher():
    tokenizer = dress(joining_tokenizer(), MISTRAL, ["[INST]", "[/INST]"])
    bos, inst, close, eos = tokenizer.convert_tokens_to_ids(["<s>", "[INST]", "[/INST]", "</s>"])
    script = chat_of(tokenizer, 2)
    assert [span.forced for span in script.spans(0)] == [[bos, inst], [], [inst], []]
    messages = ["Hi", "Hello you", "7?", "8"]
    sample = played(script, [ids(tokenizer, " " + message) for message in messages], [close, eos] * 2)
    assert sample == rendered(tokenizer, messages)
    assert tokenizer.convert_tokens_to_ids("▁H") in sample


# ---------------------------------------------------------------- the same on every day


def test_the_day_is_fixed():
    tokenizer = tokenizer_of("llama3")
    assert "Today: 26 Jul 2024\n" in tokenizer.decode(ChatTemplate.from_tokenizer(tokenizer).head)
    tokenizer.chat_template = LLAMA3.replace("%d %b %Y", "%Y-%m-%d")
    assert "Today: 2024-07-26\n" in tokenizer.decode(ChatTemplate.from_tokenizer(tokenizer).head)


@pytest.mark.parametrize("start", ["\n", "   {% if true %}{% endif %}", "  x", "{% if true %}\n{% endif %}\n"])
def test_fixing_the_day_changes_nothing_else(start):
    tokenizer = dress(character_tokenizer(), start + CHATML, ["<|im_start|>", "<|im_end|>"])
    sample = played(chat_of(tokenizer, 1), *said(tokenizer, "chatml", ["Hi", "Hello"]))
    assert sample == rendered(tokenizer, ["Hi", "Hello"])[: len(sample)]


# ---------------------------------------------------------------- identity


def test_the_identity_follows_the_template_and_the_ends():
    tokenizer = tokenizer_of("chatml")
    found = [
        chat_of(tokenizer, 1),
        chat_of(tokenizer, 1, system="Be brief."),
        chat_of(tokenizer, 1, ends=[3]),
        chat_of(tokenizer_of("zephyr"), 1),
    ]
    assert len({str(script.identity) for script in found}) == 4
    assert chat_of(tokenizer_of("chatml"), 1).identity == found[0].identity
    assert all(script.keeps_roles for script in found)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("template", "system", "message"),
    [
        (None, None, "mode: got 'chat', but the tokenizer has no chat template; use a chat-tuned teacher, or mode='hybrid'"),
        (LLAMA2, None, r"ordinary text behind a user's message, ' \[/INST\]', so no token shows that it is over"),
        (MISTRAL, "Be brief.", r"other tokens around the same turn in a longer conversation, perhaps because of `system`; leave it out"),
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}",
            "x",
            "fails: no system role; leave out `system`",
        ),
        ("{{ messages.content.nothing }}", None, "chat template fails: .*; use mode='hybrid'"),
        ("{{ '<s>' + messages[-1].content }}</s>", None, "leaves messages out"),
        ("{% for message in messages %}{{ message.content }}</s>{% endfor %}", None, "nothing in front of a user's message"),
        (
            "{{ messages|length }}{% for message in messages %}{{ message.content }}</s>{% endfor %}",
            None,
            "other tokens around the same turn",
        ),
        (
            "{% for message in messages %}<s>{{ message.content }}</s>{{ loop.index if loop.index0 % 2 }}{% endfor %}",
            None,
            "other tokens around the same turn",
        ),
        ("{% if", None, "chat template fails"),
    ],
)
def test_templates_that_cannot_work_are_refused(template, system, message):
    tokenizer = dress(character_tokenizer(), template, ["[INST]", "[/INST]"] if template == MISTRAL else [])
    with pytest.raises(ValueError, match=message):
        ChatTemplate.from_tokenizer(tokenizer, system)


def test_no_tokenizer_is_refused():
    with pytest.raises(ValueError, match="tokenizer: needed with mode='chat'"):
        ChatTemplate.from_tokenizer(None)


def test_templates_that_do_not_fit_the_teacher_are_refused():
    tokenizer = tokenizer_of("zephyr")
    template = ChatTemplate.from_tokenizer(tokenizer)
    length = len("<|user|>\n")
    assert next(Chat(template, 1, [], vocab_size=99, max_length=length + 1).spans(0)).forced == list(template.head)
    with pytest.raises(ValueError, match=f"max_length: got {length}, expected more than the {length} tokens before a user's message"):
        Chat(template, 1, [], vocab_size=99, max_length=length)
    with pytest.raises(ValueError, match="tokenizer: got token 98 in its chat template, expected 0 to 97"):
        Chat(template, 1, [], vocab_size=98, max_length=length + 1)


def test_an_answer_that_nothing_ends_is_refused():
    tokenizer = dress(
        character_tokenizer(), "{% for message in messages %}#{{ message.content }}{{ '</s>' if loop.index0 % 2 == 0 }}{% endfor %}"
    )
    with pytest.raises(ValueError, match="neither the chat template nor the model has a token that ends an answer"):
        chat_of(tokenizer, 1)
    script = chat_of(tokenizer, 2, ends=[7])
    assert [span.forced for span in script.spans(0)] == [ids(tokenizer, "#"), [], ids(tokenizer, "#"), []]
