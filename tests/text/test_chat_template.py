# ruff: noqa: E501  # templates, as they are
"""Chat templates: rendered as transformers does, chosen by name or file, and bounded in time and memory."""

from __future__ import annotations

import json
import resource
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, pre_tokenizers
from tokenizers.decoders import ByteLevel

from common import UserError
from common.text import chat_template, template_sandbox
from common.text.chat_template import gguf_templates, template_kwargs
from common.text.prompts import encode_prompt
from common.text.tokenizer import Tokenizer

USER = {"role": "user", "content": "Hi"}
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": '<b>Hi</b> & "bye" é 你好'},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello"},
    {"role": "user", "content": "  And now?\n"},
]
PARTS = [
    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "c"}], "name": "bot", "thinking": "first this"},
]
CALLS = [
    {"role": "user", "content": "Weather?", "name": "ann"},
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "look it up",
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}],
    },
    {"role": "tool", "tool_call_id": "1", "name": "weather", "content": '{"rain": true}'},
]
CONVERSATIONS = {"turns": TURNS, "no system": [USER], "parts": PARTS, "calls": CALLS}

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
DOCUMENTS = [{"title": "One", "text": "Text"}]

TEMPLATES = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + (m.content if m.content is string else '')"
    " + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "no tools": "{% if tools is not none %}tools!{% endif %}{% if documents is not none %}docs!{% endif %}"
    "{{ tools is defined }} {{ documents is defined }} {% if not tools %}none{% endif %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %}{% endfor %}",
    "tojson": "{{ messages|tojson }} {{ messages|tojson(indent=2) }} {{ messages|tojson(ensure_ascii=true) }} "
    "{{ {'b': 1, 'a': [none, true, 1.5]}|tojson(sort_keys=true, separators=(',', ':')) }}",
    "functions": "{{ strftime_now('%Y') | length }} {{ raise_exception is defined }} {{ range(3)|list }}",
    "special tokens": "{{ bos_token }}|{{ eos_token }}|{{ bos_token is defined }}|{{ pad_token is defined }}|"
    "{% if unk_token is not defined %}no unk{% endif %}",
    "variables": "{{ enable_thinking is defined }} {{ enable_thinking }} {{ depth|default(3) }}",
    "loop controls": "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}{{ m.role }}"
    "{% if loop.index0 == 2 %}{% break %}{% endif %}{% else %}empty{% endfor %}",
    "loop": "{% for m in messages %}{{ loop.index }}/{{ loop.length }} {{ loop.revindex0 }} {{ loop.first }} {{ loop.last }}"
    " {{ loop.previtem.role if loop.previtem is defined else '-' }} {{ (loop.nextitem or m).role }} "
    "{{ loop.changed(m.role) }} {{ loop.cycle('a', 'b') }};{% endfor %}",
    "filtered loop": "{% for m in messages if m.role != 'system' %}{{ loop.index }}{{ loop.length }}{{ m.role }}{% endfor %}",
    "recursion": "{% for x in [[1, [2, 3]], 4] recursive %}{% if x is iterable %}({{ loop(x) }}){% else %}{{ x }}"
    "{{ loop.depth }}{% endif %}{% endfor %}",
    "macros": "{% macro turn(m, end='.') %}{{ m.role|upper }}{{ caller() if caller }}{{ varargs }}{{ end }}{% endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{{ turn(m, end='!') }}{% call turn(m) %}in{% endcall %}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0, last='') %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% set ns.last = ns.last ~ m.role ~ ns.n ~ none %}{% endfor %}{{ ns.n }} {{ ns.last }} {{ ns.nothing is defined }}",
    "slices": "{{ messages[1:]|length }} {{ messages[::-1][0].role }} {{ messages[-1]['role'] }} {{ messages[0].role[:2] }}"
    " {{ messages[9] is defined }} {{ messages[0].nothing }} {{ (messages[1:] + messages[:1])|map(attribute='role')|list }}",
    "sets": "{% set a, b = 1, [2, 3] %}{% set c = {'k': (a, b), 4: {}} %}{{ a }}{{ b }}{{ c }}{{ c.k[1][0] }}{{ c.items()|list }}"
    "{% set text %}  block {{ a }}{% endset %}{{ text|trim }}{% for k, v in c.items() %}{{ k }}={{ v }}{% endfor %}"
    "{% with x = 5 %}{{ x }}{% endwith %}{{ dict(a=1, b=2) }}{{ dict(c).keys()|list }}",
    "strings": "{% for m in messages %}{% set t = m.content if m.content is string else 'x</think>y' %}"
    "{{ t.strip() }}{{ t.split('</think>')[-1].lstrip('\n') }}{{ t.startswith('<') }}{{ t.replace('\n', '\\n')|title }}"
    "{{ t|trim|upper }}{{ t|length }}{{ '%s-%05d' % (m.role, 7) }}{{ '{:>6}|{}'.format(m.role, 1) }}{{ '=' * 20 }}"
    "{{ t|indent(4, true) }}{{ '</think>' in t }}{{ t.rstrip('\n').rsplit('\n', 1)|join('+') }}{{ '%.2f' % 1.5 }}{% endfor %}",
    "filters": "{{ messages|selectattr('role', 'equalto', 'user')|list|length }} {{ messages|map(attribute='role')|join(', ') }}"
    " {{ messages|rejectattr('role', 'in', ['user'])|map(attribute='role')|list }} {{ (messages|first).role }} "
    "{{ (messages|last).role|capitalize|center(20) }} {{ nothing|default('d', true) }} {{ [3, 1, 2]|sort|join }} "
    "{{ [1, 2, 3]|sum }} {{ 'a,b'.split(',')|reverse|list }} {{ {'b': 1, 'a': 2}|dictsort }} {{ 3.7|int + '4'|int }} "
    "{{ messages|groupby('role')|map('first')|list }} {{ [1, 1, 2]|unique|list }} {{ range(5)|batch(2, 0)|list }} "
    "{{ '<b>'|e }} {{ 2.25|round(1) }} {{ 'a b'|urlencode }} {{ 'long text here'|truncate(8) }} {{ ['x']|map('upper')|list }}",
    "tests": "{{ messages[0] is mapping }} {{ messages is sequence }} {{ messages[0].content is string }} {{ 1 is number }} "
    "{{ none is none }} {{ messages[0].content is iterable }} {{ 4 is even }} {{ 'a' is in 'abc' }} {{ true is boolean }} "
    "{{ messages[0].tool_calls is defined }} {{ messages is callable }} {{ messages[0].content is none }}",
    "arithmetic": "{{ 7 // 2 }} {{ 7 % 3 }} {{ 2 ** 10 }} {{ 7 / 2 }} {{ -3 }} {{ 'a' ~ 1 ~ 'b' ~ none ~ true }} {{ 1 < 2 < 3 }}"
    " {{ 'x' if false else 'y' }} {{ 'x' if false }} {{ not true or false }} {{ [1] + [2] }} {{ 3 * 'ab' }}",
    "whitespace": "\n  {%- for m in messages %}\n    {{- m.role }}\n  {%+ if true %}\n  x\n  {% endif %}\n{%- endfor -%}\n  end\n\n",
    "comments and raw": "{# no #}a{% raw %}{{ b }}{% endraw %}{% filter upper %}c{{ messages|length }}{% endfilter %}\n",
    "parts": "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content or [] %}"
    "{% if p.type == 'text' %}{{ p.text }}{% else %}<{{ p['type'] }}>{% endif %}{% endfor %}{% endif %}{{ m.name }}{% endfor %}",
    "calls": "{% for m in messages %}{{ m.role }}{{ m.content is defined }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}{{ c.function.arguments|tojson }}{{ c['id'] }}{% endfor %}{{ m.tool_call_id }}{% endfor %}",
    "reasoning": "{% for m in messages %}{{ m.reasoning_content or '-' }}{{ m.thinking or '-' }}{% endfor %}",
    "raw values": "{{ messages }}{{ messages[0] }}{{ tools }}{{ namespace is defined }}{{ cycler is defined }}",
    "autoescape": "{% autoescape true %}{{ '<a>' ~ messages[0].content }}{{ '<b>'|safe }}{% endautoescape %}",
    "joiner and cycler": "{% set j = joiner(', ') %}{% set c = cycler('odd', 'even') %}{% for m in messages %}{{ j() }}"
    "{{ m.role }}{{ c.next() }}{% endfor %}{{ c.current }}",
    "blocks": "{% block a %}A{% endblock %}{{ self.a() }}",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    vocab = {piece: i for i, piece in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = FastTokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevel()
    backend.save(str(path / "tokenizer.json"))
    return path


def write(folder: Path, to: Path, **options: Any) -> Path:
    """A copy of the tokenizer with other options."""
    to.mkdir(exist_ok=True, parents=True)
    (to / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    usual = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": None}
    (to / "tokenizer_config.json").write_text(json.dumps({**usual, **options}))
    return to


def load(folder: Path, chosen: str | None = None) -> Tokenizer:
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer is not None
    tokenizer.use_template(chosen, {})
    return tokenizer


def render(template: str, messages: Any = (USER,), **variables: Any) -> str:
    return chat_template.render(template, messages, variables)


# -- as transformers ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(write(folder, tmp_path_factory.mktemp("plain")))


@pytest.fixture(scope="module")
def ours(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load(write(folder, tmp_path_factory.mktemp("plain")))


@pytest.mark.parametrize("given", ["nothing", "everything"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_renders_as_in_transformers(name: str, given: str, theirs: Any, ours: Tokenizer) -> None:
    ours.chat_template = TEMPLATES[name]
    more: dict[str, Any] = {} if given == "nothing" else {"tools": TOOLS, "documents": DOCUMENTS}
    variables = {} if given == "nothing" else {"enable_thinking": False, "bos_token": "<other>"}
    for kind, messages in CONVERSATIONS.items():
        expected: str | type[Exception]
        try:
            expected = theirs.apply_chat_template(
                messages, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=True, **more, **variables
            )
        except Exception:
            expected = Exception
        if isinstance(expected, str):
            assert ours.render(messages, variables, **more) == expected, kind
        else:
            with pytest.raises(UserError):
                ours.render(messages, variables, **more)


def test_the_set_of_templates_renders(theirs: Any) -> None:
    """So that the test above does not compare errors."""
    for name, template in TEMPLATES.items():
        assert theirs.apply_chat_template(TURNS, chat_template=template, tokenize=False) != "", name


def test_messages_are_left_as_they_were(ours: Tokenizer) -> None:
    messages = json.loads(json.dumps(CALLS))
    ours.chat_template = TEMPLATES["calls"]
    ours.render(messages)
    assert messages == CALLS


def test_functions_are_tools(theirs: Any, ours: Tokenizer) -> None:
    def weather(city: str) -> str:
        """The weather of a city.

        Args:
            city: Its name.
        """
        return city

    ours.chat_template = "{{ tools|tojson }}"
    text = theirs.apply_chat_template([USER], tools=[weather], chat_template="{{ tools|tojson }}", tokenize=False)
    assert ours.render([USER], tools=[weather]) == text


def test_transformers_renders_without_limits_all_the_same(theirs: Any, ours: Tokenizer) -> None:
    """Ours is a function of our own: transformers' own is not changed."""
    ours.chat_template = "{{ 'a' * 3000000 }}"
    with pytest.raises(UserError, match="too much"):
        ours.render([USER])
    assert len(theirs.apply_chat_template([USER], chat_template=ours.chat_template, tokenize=False)) == 3_000_000


# -- where templates are -----------------------------------------------------------------------------------------------

NAMED = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]


@pytest.mark.parametrize(
    ("options", "files"),
    [
        ({"chat_template": "one"}, {}),
        ({"chat_template": NAMED}, {}),
        ({"chat_template": {"default": "plain", "tool_use": "with tools"}}, {}),
        ({"chat_template": "one"}, {"chat_template.jinja": "file"}),
        ({"chat_template": NAMED}, {"chat_template.jinja": "file"}),
        ({"chat_template": "one"}, {"additional_chat_templates/tool_use.jinja": "of tools"}),
        ({}, {"chat_template.jinja": "file", "additional_chat_templates/tool_use.jinja": "of tools"}),
        ({}, {"additional_chat_templates/default.jinja": "d", "additional_chat_templates/rag.jinja": "r"}),
        ({"chat_template": [{"name": "rag", "template": "r"}]}, {}),
        ({"chat_template": None}, {}),
    ],
)
def test_templates_are_found_and_chosen_as_in_transformers(
    options: dict[str, Any], files: dict[str, str], folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    write(folder, tmp_path, **options)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), load(tmp_path)
    ours.save(tmp_path)
    for path in [tmp_path / name for name in files]:
        path.unlink()
    for tokenizer in (ours, load(tmp_path)):  # and as it saves them
        for tools in (None, TOOLS, []):
            try:
                expected = theirs.apply_chat_template([USER], tools=tools, tokenize=False)
            except ValueError:
                with pytest.raises(UserError, match="chat-template"):
                    tokenizer.render([USER], tools=tools)
            else:
                assert tokenizer.render([USER], tools=tools) == expected


def test_a_template_is_chosen_by_name_by_file_or_given_as_text(folder: Path, tmp_path: Path) -> None:
    write(folder, tmp_path, chat_template=NAMED)
    assert load(tmp_path, "tool_use").render([USER]) == "with tools"
    assert load(tmp_path, "default").render([USER], tools=TOOLS) == "plain"
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }}!")
    assert load(tmp_path, str(tmp_path / "mine.jinja")).render([USER]) == "Hi!"
    assert load(tmp_path, "{{ messages[0].role }}").render([USER]) == "user"
    with pytest.raises(UserError, match=r"'rag' is neither .*default, tool_use.* nor a file"):
        load(tmp_path, "rag")


def test_a_processors_template_is_read_where_there_is_no_other(folder: Path, tmp_path: Path) -> None:
    write(folder, tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "of the processor"}))
    assert load(tmp_path).render([USER]) == "of the processor"


def test_a_gguf_file_has_one_template_or_several() -> None:
    key = "tokenizer.chat_template"
    assert gguf_templates({}) is None
    assert gguf_templates({key: "one"}) == "one"
    both = {key: "one", f"{key}s": ["tool_use"], f"{key}.tool_use": "two"}
    assert gguf_templates(both) == {"default": "one", "tool_use": "two"}
    assert gguf_templates({f"{key}.tool_use": "two"}) == {"tool_use": "two"}
    with pytest.raises(UserError, match=r"tokenizer\.chat_template: .*text, not int"):
        gguf_templates({key: 5})


def test_without_a_template_the_refusal_says_what_to_pass(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no chat template.*--chat-template FILE.*chat_template=.*plain text"):
        load(write(folder, tmp_path)).chat([USER])
    assert load(write(folder, tmp_path), "{{ messages[0].content }}").render([USER]) == "Hi"


@pytest.mark.parametrize(
    "template", [5, True, {"default": 5}, ["text"], [{"name": "x"}], [{"name": 1, "template": "x"}]]
)
def test_a_template_that_is_no_text_is_found_at_load(template: Any, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer_config\.json"):
        load(write(folder, tmp_path, chat_template=template))


@pytest.mark.parametrize(
    "template",
    [
        "{% for %}",
        "{{ messages",
        "{{ 'a'|nofilter }}",
        "{{ 1 is notest }}",
        "{% nonsense %}",
        "{% endfor %}",
        "{{ " + "(" * 3000 + ")" * 3000 + " }}",
        "{% for i in [1] %}" * 60 + "{% endfor %}" * 60,
        "{% if a %}" * 3000 + "{% endif %}" * 3000,
        "{{a}}" * 13000,
        "x" * 2_000_000,
    ],
    ids=range(11),
)
def test_a_template_that_does_not_compile_is_found_at_load(template: str, folder: Path, tmp_path: Path) -> None:
    for options in ({"chat_template": template}, {"chat_template": [{"name": "rag", "template": template}, *NAMED]}):
        write(folder, tmp_path, **options)
        with pytest.raises(UserError, match=r"does not compile: .*--chat-template FILE") as caught:
            load(tmp_path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert load(tmp_path, "tool_use").render([USER]) == "with tools"  # another one can be chosen
    with pytest.raises(UserError, match="does not compile"):
        load(tmp_path, "rag")


# -- messages and variables --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", ["{", "5", "[1]", '"x"', "[" * 200_000, '{"messages": []}', '{"tools": []}', 5, [1], {5: 1}, '{"documents": 1}',
              {"add_generation_prompt": False}, "null"],
    ids=range(13),
)  # fmt: skip
def test_variables_that_are_no_object_are_refused_in_one_line(value: Any) -> None:
    with pytest.raises(UserError, match="chat_template_kwargs") as caught:
        template_kwargs(value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_variables_reach_the_template(ours: Tokenizer) -> None:
    ours.chat_template = "{{ enable_thinking is defined }}{{ enable_thinking }}"
    assert ours.render([USER]) == "False"
    assert ours.render([USER], {"enable_thinking": False}) == "TrueFalse"
    ours.use_template(None, template_kwargs('{"enable_thinking": true}'))
    assert ours.render([USER]) == "TrueTrue"
    assert ours.render([USER], {"enable_thinking": False}) == "TrueFalse"
    ids = encode_prompt([USER], ours, ours.vocab_size, {"enable_thinking": False})
    assert ours.decode(ids) == "TrueFalse"
    ours.use_template(None, {})


# -- bounds ------------------------------------------------------------------------------------------------------------

TEN_THOUSAND = "{% for i in range(9999) %}"
S = "{% set s = 'a' * 100000 %}"
N = "{% set ns = namespace(x=[1, 2], t='ab') %}{% for i in range(99999) %}"
HOSTILE = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "filtered loops": "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "slow tests": "{% set l = range(2000)|list %}{% for a in range(99999) if 'a' in l %}{% endfor %}",
    "loops over text": S + "{% for a in s %}{% for b in s %}{% endfor %}{% endfor %}",
    "loops over messages": "{% for a in messages * 300 %}{% for b in messages * 300 %}{% for c in range(999) %}x{% endfor %}"
    "{% endfor %}{% endfor %}",
    "loops in a set": "{% set x %}{% for a in range(99999) %}{% for b in range(99999) %}text{{ b }}{% endfor %}{% endfor %}"
    "{% endset %}",
    "loops in a filter": "{% filter upper %}" + TEN_THOUSAND * 2 + "{{ i }}{% endfor %}{% endfor %}{% endfilter %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(80) }}",
    "endless macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "endless loop": "{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "endless block": "{% block a %}{{ self.a() }}{% endblock %}",
    "call blocks": "{% macro f() %}{% for i in range(99999) %}{{ caller() }}{% endfor %}{% endmacro %}"
    "{% call f() %}{% call f() %}x{% endcall %}{% endcall %}",
    "cycler": "{% set c = cycler(1, 2) %}" + TEN_THOUSAND * 2 + "{{ c.next() }}{% endfor %}{% endfor %}",
    "output": "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "text": "{{ 'a' * 3000000000 }}",
    "text in a condition": "{% if 'a' * 3000000000 %}x{% endif %}",
    "text in a set": "{% set x = 3000000000 * 'a' %}",
    "list": "{% set x = [0] * 10 ** 10 %}",
    "power": "{% set x = 10 ** (10 ** 10) %}",
    "powers": "{% set x = 9 ** (9 ** (9 ** 9)) %}",
    "products": N + "{% set ns.x = (ns.x if i else 3) * (ns.x if i else 3) %}{% endfor %}",
    "concatenation": N + "{% set ns.t = ns.t ~ ns.t %}{% endfor %}",
    "addition": N + "{% set ns.t = ns.t + ns.t %}{% endfor %}",
    "lists": N + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "nested lists": N + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "nested dictionaries": N + "{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}{{ ns.x|tojson }}",
    "nested dict()": N + "{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x }}",
    "nested views": N + "{% set ns.x = {'a': dict(x=ns.x).items(), 'b': dict(x=ns.x).items()} %}{% endfor %}{{ ns.x }}",
    "deep tuples": N + "{% set ns.x = (1, ns.x) %}{% endfor %}{{ {ns.x: 1} }}",
    "lazy chain": N + "{% set ns.x = ns.x|map('string') %}{% endfor %}{{ ns.x|list }}",
    "reversed chain": N + "{% set ns.x = ns.x|reverse %}{% endfor %}",
    "growth": N + "{% set ns.x = [ns.x, 'a' * 90000 ~ i] %}{% endfor %}",
    "growth of slices": S + N + "{% set ns.x = namespace(a=ns.x, b=s[1:]) %}{% endfor %}",
    "many parts": "{% set s = 'a' * 60000 %}{{ " + " ~ ".join("s" * 500) + " }}",
    "center": "{{ 'a'|center(1000000000) }}",
    "center in a map": "{{ ['a']|map('center', 1000000000)|list }}",
    "width by name": "{{ 'a'|center(width=1000000000) }}",
    "method as a value": "{% set f = 'a'.center %}{% set x = f(1000000000) %}",
    "method by attr": "{{ ('a'|attr('ljust'))(1000000000)|length }}",
    "ljust": "{{ 'a'.ljust(1000000000) }}",
    "zfill": "{{ 'a'.zfill(1000000000) }}",
    "expandtabs": "{{ '\t'.expandtabs(1000000000) }}",
    "indent": "{{ 'a\nb'|indent(1000000000) }}",
    "indent text": S + "{{ ('a\n' * 10000)|indent(s) }}",
    "tojson": "{{ [1]|tojson(indent=1000000000) }}",
    "printf": "{{ '%1000000000d' % 1 }}",
    "printf in a filter": "{{ '%1000000000d'|format(1) }}",
    "printf star": "{{ '%*d' % (1000000000, 1) }}",
    "printf names": S + "{{ ('%(s)s' * 10000) % {'s': s} }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "format nested": "{{ '{:{w}}'.format(1, w=1000000000) }}",
    "format positions": S + "{{ ('{0}' * 30000).format(s) }}",
    "format_map": "{{ '{a:1000000000}'.format_map({'a': 1}) }}",
    "replace": S + "{{ s.replace('', s) }}",
    "join": S + "{{ s.join(s) }}",
    "join filter": S + "{{ range(99999)|join(s) }}",
    "join of a lazy list": S + "{{ s.join(range(99999)|map('string')) }}",
    "ranges": "{% for i in range(999) %}{% set x = range(99999) %}{% endfor %}",
    "translate": S + "{{ s.translate({97: s}) }}",
    "batch": "{{ [1]|batch(1000000000, 0)|list }}",
    "slice": "{{ [1]|slice(1000000000)|list }}",
    "round": "{{ 1|round(1000000000, 'ceil') }}",
    "to_bytes": "{{ (1).to_bytes(1000000000, 'big') }}",
    "search": S + "{{ s.rfind('a' * 40000 ~ 'b' ~ 'a' * 40000) }}",
    "strip": S + "{{ s.strip('b' * 90000 ~ 'a') }}",
    "urlize": "{{ (')' * 90000 ~ 'x')|urlize }}",
    "striptags": "{{ ('<!--' * 20000)|striptags }}",
    "punycode": "{{ ('\u4e00' * 30000).encode('punycode') }}",
    "lipsum": "{{ lipsum(n=1000000000) }}",
    "escape": "{{ ''.__class__.__mro__ }}",
    "escape by format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "mutation": "{{ messages.append(1) }}",
    "sums": N + "{% set ns.x = ns.x + [[1] * 100] %}{% endfor %}{{ ns.x|sum(start=[]) }}",
    "dictionaries": TEN_THOUSAND + "{% set x = dict.fromkeys(range(90000)) %}{% endfor %}",
    "quantified": TEN_THOUSAND + "{% set x = range(99999)|max %}{% endfor %}",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _imported(request: pytest.FixtureRequest) -> None:
    render("x")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_refused_soon_and_without_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name != "nested loops":  # so that the others do not spend the time that they have
        monkeypatch.setattr(template_sandbox, "SECONDS", 0.1)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time()
    with pytest.raises(UserError) as caught:
        render(HOSTILE[name])
    assert time.thread_time() - began < 1
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < 64 << 10  # kilobytes
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_long_chats_render_promptly() -> None:
    long = [{"role": "user", "content": "word and 你好\n" * 100_000}]
    many = [
        {"role": ("user", "assistant")[i % 2], "content": f"<think>a</think> message {i} " * 20} for i in range(2000)
    ]
    for name in ("chatml", "strings", "filters", "tojson"):
        for messages in (long, many):
            began = time.thread_time()
            text = render(TEMPLATES[name], messages)
            assert time.thread_time() - began < 3, name
            assert len(text) > 0
    growing = (
        "{% set ns = namespace(t='') %}{% for m in messages %}{% set ns.t = ns.t ~ m.content %}{% endfor %}{{ ns.t }}"
    )
    assert render(growing, many) == "".join(m["content"] for m in many)
    growing = (
        "{% set ns = namespace(l=[]) %}{% for m in messages %}{% set ns.l = ns.l + [m] %}{% endfor %}{{ ns.l|length }}"
    )
    assert render(growing, many) == "2000"


def test_a_hostile_template_is_refused_in_a_long_chat_too() -> None:
    many = [{"role": "user", "content": f"message {i} " * 50} for i in range(2000)]
    chain = "{% set ns = namespace(c=none) %}{% set s = messages|map(attribute='content')|join %}{% for i in range(99999) %}"
    chain += "{% set c = namespace(p=ns.c) %}{% set c.t = s ~ i %}{% set ns.c = c %}{% endfor %}"
    for template in (chain, HOSTILE["nested loops"]):
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time()
        with pytest.raises(UserError):
            render(template, many)
        assert time.thread_time() - began < 2.5
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < 128 << 10


def test_threads_have_budgets_of_their_own() -> None:
    results: list[str] = []

    def fail() -> None:
        with pytest.raises(UserError):
            render(HOSTILE["nested loops"])

    def work() -> None:
        results.extend(render(TEMPLATES["macros"], TURNS) for _ in range(20))

    threads = [threading.Thread(target=target) for target in (fail, work, work, work, work)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 80 and len(set(results)) == 1


def test_an_environment_without_limits_is_what_transformers_has() -> None:
    """If transformers compiles otherwise one day, this says so."""
    from transformers.utils import chat_template_utils as theirs

    environment = theirs._compile_jinja_template("").environment  # pyright: ignore
    limited: Any = template_sandbox.bounded(environment)
    assert set(limited.filters) == set(environment.filters)
    assert set(environment.globals) - set(limited.globals) == {"lipsum"}
    assert limited.extensions.keys() == environment.extensions.keys()


@pytest.mark.parametrize(
    "template",
    [
        "{% set b = 2 ** 60000 %}{% for i in range(999) %}{% set y = b // 3 %}{% endfor %}",
        "{% set x = 2 ** 900 %}{% for i in range(99999) %}{% set ns = namespace(v=-x) %}{% endfor %}",
        "{% set ns = namespace(x=3) %}{% for i in range(9999) %}{% set ns.x = ns.x - -ns.x * 9 %}{% endfor %}",
        "{{ ('f' * 60000)|int(base=16) }}",
        "{{ 1e999999999 }}",
    ],
)
def test_no_number_is_large(template: str) -> None:
    with pytest.raises(UserError, match=r"too (large|long|much)"):
        render(template)


def test_an_error_names_nothing_internal_and_a_name_is_no_home(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"messages: raise_exception\(\) missing"):
        render("{{ raise_exception() }}")
    with pytest.raises(UserError, match="neither a template of this model"):
        load(write(folder, tmp_path), "~nobodyx/y")


@pytest.mark.parametrize("content", ["m.content", "m.content|upper", "m.content[0].text", "m.content|tojson"])
@pytest.mark.parametrize("most", [1, 2, 3])
@pytest.mark.parametrize("special", [True, False])
def test_the_end_behind_an_answer_is_found(
    content: str, most: int, special: bool, folder: Path, tmp_path: Path
) -> None:
    from tokenizers import AddedToken

    template = "{% if messages|length > MOST %}{{ raise_exception('no') }}{% endif %}<s>{% for m in messages %}[S]{{ m.role }} {{ CONTENT }}"
    template = template.replace("MOST", str(most)).replace("CONTENT", content) + "<|fin|>\n{% endfor %}[S]"
    tokenizer = load(write(folder, tmp_path), template)
    tokenizer.backend.add_tokens([AddedToken(text, special=special) for text in ("[S]", "<|fin|>", "<|fin|")])
    own = tokenizer.backend.token_to_id("<|fin|>")
    assert tokenizer.turn_end_token_ids - {tokenizer.backend.token_to_id("</s>")} == {own}
