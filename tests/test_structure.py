"""Structured output: whatever is sampled fits what was asked for, whenever it was planned or computed."""

from __future__ import annotations

import json
import re
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")

from common import (  # noqa: E402
    Engine,
    RequestOutput,
    SamplingParams,
    UserError,
    sampler,
)
from common.plan import StepPlan  # noqa: E402
from common.request import Request  # noqa: E402
from common.sampling.grammar import _resident, trial  # noqa: E402
from common.sampling.structure import KEPT_BYTES, Structure, Structures, _pool  # noqa: E402
from common.text.tokenizer import Tokenizer  # noqa: E402
from tests.engine_checks import TOKEN_BYTES, assert_empty, set_eos  # noqa: E402
from tests.fake_graphs import FakeRecorder, fake_graphs  # noqa: E402, F401

Build = Callable[..., Engine]
SCHEMAS: dict[str, dict[str, Any]] = {
    "person": {
        "type": "object", "additionalProperties": False, "required": ["name", "age"],
        "properties": {
            "name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 130}
        },
    },
    "enums": {"type": "array", "minItems": 1, "maxItems": 3, "items": {"enum": ["ä", "b\n", 3, None, "🙂"]}},
    "recursive": {
        "$defs": {
            "node": {
                "type": "object", "additionalProperties": False, "required": ["next"],
                "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
            }
        },
        "$ref": "#/$defs/node",
    },
    "patterns": {
        "type": "object", "additionalProperties": False, "required": ["code"],
        "properties": {"code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{2}$"}},
        "patternProperties": {"^x_[a-z]$": {"type": "boolean"}},
    },
}  # fmt: skip
EOS = 300


def bytes_tokenizer() -> Tokenizer:
    """A token for each byte, some for several, and an end."""
    texts = [*sorted(pre_tokenizers.ByteLevel.alphabet()), '":', '{"', '",', "00", "}]", "AB"]
    merges = [(text[0], text[1]) for text in texts[256:]]
    backend = Backend(models.BPE({text: number for number, text in enumerate(texts)}, merges))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    backend.add_tokens([f"word{number}" for number in range(EOS - len(texts))])
    backend.add_special_tokens([AddedToken("<end>", special=True)])
    return Tokenizer(backend, [EOS])


def make(build: Build, stage: str, **options: Any) -> Engine:
    """A tiny random model that reads and writes bytes."""
    engine = build(stage, **options)
    set_eos(engine, EOS)
    engine.tokenizer = bytes_tokenizer()
    engine._admission.structures = Structures(engine.tokenizer, 512, [EOS])
    return engine


PROMPTS = ["Once upon a time", "Two", "The answer in JSON, as long as it has to be:", "x", "Lily", "Tom saw"]


def assert_fits(output: RequestOutput, schema: dict[str, Any]) -> int:
    """How many of the samples ended by themselves; those fit."""
    ended = 0
    for sample in output.outputs:
        assert sample.finish_reason in ("stop", "length")
        if sample.finish_reason == "stop":
            jsonschema.validate(json.loads(sample.text), schema)
            ended += 1
    return ended


def mixed(**more: Any) -> list[SamplingParams]:
    """A structured request beside others, in turns."""
    schemas = list(SCHEMAS.values())
    return [
        SamplingParams(max_tokens=60, ignore_eos=True, seed=n)
        if n % 3 == 2
        else SamplingParams(
            max_tokens=150, schema=schemas[n % 4], temperature=float(n % 2), seed=n, n=1 + (n == 3), **more
        )
        for n in range(len(PROMPTS))
    ]


def run(build: Build, stage: str, params: list[SamplingParams], **options: Any) -> list[RequestOutput]:
    engine = make(build, stage, **options)
    outputs = engine.generate(PROMPTS, params)
    assert_empty(engine)
    return outputs


@pytest.mark.parametrize("stage", ["m0", "m1", "m2", "m3", "m5", "m6"])
def test_every_output_fits_and_planning_ahead_changes_none(build: Build, stage: str) -> None:
    params = mixed()
    plain = run(build, stage, params, **({} if stage in ("m0", "m1") else {"overlap": False}))
    ended = [
        assert_fits(o, json.loads(p.schema)) for o, p in zip(plain, params, strict=True) if isinstance(p.schema, str)
    ]
    assert sum(ended) >= 3
    if stage not in ("m0", "m1"):
        ahead = run(build, stage, params, overlap=True)
        assert [[s.token_ids for s in o.outputs] for o in ahead] == [[s.token_ids for s in o.outputs] for o in plain]


@pytest.mark.parametrize("stage", ["m4", "m6"])
def test_graphs_draw_the_same(build: Build, fake_graphs: type[FakeRecorder], stage: str) -> None:  # noqa: F811
    params = mixed(logprobs=2, logit_bias={5: 3.5}, min_tokens=4)
    eager = run(build, stage, params, cuda_graphs=False)
    assert not FakeRecorder.replays
    replayed = run(build, stage, params, max_num_seqs=8, max_num_batched_tokens=64)
    assert FakeRecorder.replays
    assert [[s.token_ids for s in o.outputs] for o in replayed] == [[s.token_ids for s in o.outputs] for o in eager]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("swap_space", [0, 10**7], ids=["recompute", "swap"])
@pytest.mark.parametrize("stage", ["m3", "m6"])
def test_preemption_changes_no_token(build: Build, stage: str, swap_space: int, overlap: bool) -> None:
    params = mixed()
    expected = run(build, stage, params)
    room = {"block_size": 4, "kv_cache_memory": 220 * TOKEN_BYTES}
    engine = make(build, stage, overlap=overlap, swap_space=swap_space, **room)
    found = engine.generate(PROMPTS, params)
    assert engine.metrics()["preemptions"]
    assert [[s.token_ids for s in o.outputs] for o in found] == [[s.token_ids for s in o.outputs] for o in expected]
    assert_empty(engine)


@pytest.mark.parametrize("overlap", [False, True])
def test_an_abort_leaves_nothing_behind(build: Build, overlap: bool) -> None:
    engine = make(build, "m6", overlap=overlap, swap_space=10**6)
    endless = SamplingParams(max_tokens=100, schema=SCHEMAS["enums"] | {"minItems": 60, "maxItems": 90}, n=2)
    for number in range(3):
        engine.add_request("Once", endless, request_id=f"r{number}")
    for _ in range(7):
        engine.step()
    assert [len(o.outputs) for o in (engine.abort("r1"), engine.step())[1] if o.request_id == "r1"] == [2]
    assert len(engine.scheduler.running) == 4
    running = list(engine.scheduler.running)
    engine.abort("r0")
    engine.abort("r2")
    while engine.has_unfinished:
        engine.step()
    assert_empty(engine)
    assert all(request.structure and len(request.structure._next.result(60)) for request in running)
    assert _pool._work_queue.empty()


def test_only_the_structured_row_waits(build: Build) -> None:
    engine, planned, plan = make(build, "m6", overlap=True), list[tuple[int, set[str]]](), None
    for name in ("a", "b", "c"):
        engine.add_request(name, SamplingParams(max_tokens=60, ignore_eos=True), request_id=name)
    engine.add_request("s", SamplingParams(max_tokens=60, schema=SCHEMAS["recursive"]), request_id="s")
    for _ in range(3):
        engine.step()
    [structured] = [request for request in engine.scheduler.running if request.id == "s"]
    plan = engine.scheduler.plan

    def noted() -> StepPlan | None:
        unseen, made = structured.num_unseen_tokens, plan()
        planned.append((unseen, {chunk.request.id for chunk in made.chunks} if made else set()))
        return made

    engine.scheduler.plan = noted
    for _ in range(12):
        engine.step()
        assert len(engine._planned) == 1, "the next step has been started"
    assert [{"a", "b", "c"} <= ids for _, ids in planned] == [True] * 12
    assert [("s" in ids) is (unseen == 0) for unseen, ids in planned] == [True] * 12
    assert sum("s" in ids for _, ids in planned) == 6


def test_only_rows_with_options_take_the_long_way(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, adjusted = list[int](), sampler.adjusted

    def counted(logits: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
        rows.append(len(logits))
        return adjusted(logits, requests)

    monkeypatch.setattr(sampler, "adjusted", counted)
    plain = SamplingParams(max_tokens=20, ignore_eos=True)
    alone = make(build, "m5").generate(["a", "b", "c"], plain)
    assert not rows
    options = [SamplingParams(max_tokens=20, regex="[a-z]{18}"), plain, SamplingParams(max_tokens=20, logprobs=1)]
    together = make(build, "m5").generate(["x", "b", "c"], options)
    assert set(rows) <= {1, 2} and 2 in rows
    assert [o.token_ids for o in together[1:]] == [o.token_ids for o in alone[1:]]
    assert len(together[0].text) == 18


@pytest.mark.parametrize("stage", ["m0", "m4", "m7"])
def test_many_seeds_at_temperature_one(build: Build, stage: str) -> None:
    engine = make(build, stage, **({"max_num_seqs": 16} if stage != "m0" else {}))
    names = list(SCHEMAS) if stage != "m0" else ["person"]
    ended = 0
    for seed, name in enumerate(names):
        params = SamplingParams(max_tokens=120, schema=SCHEMAS[name], temperature=1.0, seed=seed, n=4, top_p=0.95)
        ended += assert_fits(engine.generate(["Once"], params)[0], SCHEMAS[name])
    assert ended >= len(names)
    assert_empty(engine)


def test_cached_beginnings_and_stop_strings(build: Build) -> None:
    engine = make(build, "m6", block_size=4)
    params = SamplingParams(max_tokens=80, schema=SCHEMAS["person"], temperature=1.0, seed=4)
    first, again = (engine.generate(["Once upon a time there was"], params)[0] for _ in range(2))
    assert again.num_cached_tokens and again.token_ids == first.token_ids
    [cut] = engine.generate(["x"], SamplingParams(max_tokens=30, regex="[a-f]{3}X[a-f]{9}", stop="X"))
    assert (len(cut.text), cut.finish_reason) == (3, "stop")
    assert_empty(engine)


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"regex": "[a-c]{3}"}, "[a-c]{3}"),
        ({"regex": "(yes|no)", "min_tokens": 30}, "yes|no"),
        ({"regex": "[0-9]+", "ignore_eos": True, "max_tokens": 9}, "[0-9]+"),
        ({"regex": "[0-9]{2,}", "min_tokens": 5}, "[0-9]{5,}"),
        ({"grammar": 'start: "a" start "b" | "c"'}, "a*cb*"),
        ({"grammar": 'root ::= "x" [0-9] "y"'}, "x[0-9]y"),
        ({"regex": "é🙂+x"}, "é🙂+x"),
    ],
    ids=str,
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_regular_expressions_and_grammars(
    build: Build, options: dict[str, Any], pattern: str, temperature: float
) -> None:
    engine = make(build, "m5")
    params = SamplingParams(**{"max_tokens": 64, "temperature": temperature, "n": 4, "seed": 1} | options)
    for sample in engine.generate(["Once upon"], params)[0].outputs:
        assert sample.finish_reason == "length" or re.fullmatch(pattern, sample.text), sample.text


def test_a_stop_token_ends_only_what_fits(build: Build) -> None:
    engine = make(build, "m5")
    digits = engine.tokenizer.encode("7") if engine.tokenizer else []
    params = SamplingParams(
        max_tokens=40, regex="[0-9]{3,6}", temperature=1.0, n=8, seed=2, stop_token_ids=digits, logprobs=1
    )
    for sample in engine.generate(["Once upon"], params)[0].outputs:
        assert re.fullmatch("[0-9]{3,6}", sample.text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schema": {"type": "banana"}}, "schema: Invalid type: banana"),
        ({"schema": "{"}, "schema: "),
        ({"schema": {"enum": []}}, "schema: Unsatisfiable"),
        ({"schema": {"$ref": "https://example.com/x"}}, "schema: Resource"),
        ({"schema": {"$ref": "#"}}, "schema: "),
        ({"schema": {"enum": [f"v{i}" for i in range(20_000)]}}, "schema has"),
        ({"schema": 7}, "schema takes a text"),
        ({"regex": "((("}, "regex: .*unclosed group"),
        ({"regex": "(?=a)b"}, "regex: .*look-around"),
        ({"regex": "a" * 200_000}, "regex has 200000 characters"),
        ({"regex": "a", "json_object": True}, "give one of regex and json_object"),
        ({"grammar": "start: nope"}, "grammar: .*unknown name"),
        ({"grammar": ""}, "grammar: "),
        ({"schema": Structures}, "model_json_schema"),
        ({"schema": {"a": {1}}}, "schema is no JSON"),
        ({"schema": '{"minimum":' + "1" * 10_000 + "}"}, "schema: number out of range"),
        ({"schema": '{"items":' * 5_000 + "{}" + "}" * 5_000}, "schema: recursion"),
        ({"schema": {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}}, "nothing but itself"),
        ({"schema": {"multipleOf": 999_983, "type": "integer"}}, "too long or too much memory"),
        ({"schema": {"patternProperties": {f"^{i}.*x{i}$": {} for i in range(1500)}}}, "too long or too much memory"),
        ({"regex": "(" * 60_000 + ")" * 60_000}, "regex: "),
        ({"grammar": "start: " + "(" * 60_000}, "grammar: "),
        ({"grammar": "root ::= " + "(" * 60_000}, "grammar: .*recursion"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_followed_is_refused_in_one_line(build: Build, options: dict[str, Any], message: str) -> None:
    engine = make(build, "m2")
    began = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) + time.thread_time()
    with pytest.raises(UserError, match=message) as caught:
        engine.add_request("x", SamplingParams(**options))
    assert sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) + time.thread_time() - began < 2
    assert "\n" not in str(caught.value)
    assert not engine.has_unfinished


def test_an_answer_that_turns_out_too_hard_to_follow_is_ended(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, advance = make(build, "m2"), Structure.advance

    def fails(structure: Structure, token_id: int) -> None:
        advance(structure, token_id)
        structure.failed = "too hard" if structure._tokens_due <= -5 else None

    monkeypatch.setattr(Structure, "advance", fails)
    params = SamplingParams(max_tokens=200, regex="[a-z]{90}", temperature=1.0, seed=3)
    [output] = engine.generate(["Once"], params)
    assert (output.finish_reason, len(output.token_ids), output.outputs[0].failure) == ("abort", 5, "too hard")
    assert_empty(engine)


def test_a_model_without_a_tokenizer_says_so(build: Build) -> None:
    with pytest.raises(UserError, match="needs a tokenizer"):
        build("m2").add_request([1], SamplingParams(regex="a"))


def test_without_the_library(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UserError, match=r"not installed: pip install '.\[structured\]'"):
        make(build, "m2").add_request("x", SamplingParams(json_object=True))


def test_strangers_schemas_hold_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held is bounded by its size; a caller that holds one keeps it for others."""
    monkeypatch.setattr("common.sampling.structure.trial", lambda kind, text: 100 << 20 if "9" in text else 1 << 10)
    structures = Structures(bytes_tokenizer(), 512, [EOS])
    held = structures.compiled(SamplingParams(regex="a{1}"))
    before = _resident()
    for number in range(200):
        structures.compiled(SamplingParams(schema={"enum": [f"{number} {i}" for i in range(2_000)]}))
        assert sum(one.size for one in structures._recent.values()) <= KEPT_BYTES
    assert len(structures._recent) == 2
    assert _resident() - before < 60 << 20
    assert structures.compiled(SamplingParams(regex="a{1}"), known=True) is held
    assert structures.compiled(SamplingParams(regex="a{2}"), known=True) is None


def test_the_trial_measures_what_is_held() -> None:
    choices = {f"a{i}": {"anyOf": [{"const": j} for j in range(9)]} for i in range(400)}
    small, large = (
        trial("schema", json.dumps(s)) for s in ({"type": "object"}, {"required": list(choices), "properties": choices})
    )
    assert small < 4 << 20 < large < 100 << 20


OPEN_NAMES: dict[str, dict[str, Any]] = {
    "properties alone": {"type": "object", "properties": {"a": {"type": "integer"}, "ab": {"type": "null"}}},
    "others of a schema": {
        "type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "null"}
    },
    "patterns": {"type": "object", "patternProperties": {"^a": {"type": "integer"}}},
    "parts": {"allOf": [{"type": "object", "properties": {"a": {"type": "integer"}}}, {"type": "object"}]},
    "an unknown format": {"type": "array", "items": {"type": "string", "format": "binary"}, "minItems": 1},
    "the library's switch": {"type": "object", "properties": {"a": {"type": "null"}}, "x-guidance": {"lenient": True}},
}  # fmt: skip


@pytest.mark.parametrize("name", OPEN_NAMES)
def test_names_that_are_escaped_do_not_pass_for_others(build: Build, name: str) -> None:
    """Bias drives the model into what would not validate: to write "\\u0061" instead of "a"."""
    engine, schema, ended = make(build, "m3", max_num_seqs=16), OPEN_NAMES[name], 0
    assert engine.tokenizer is not None
    [backslash], [quote], [letter] = (engine.tokenizer.encode(text) for text in ("\\", '"', "a"))
    for bias in ({backslash: 100, quote: 60}, {letter: 60, quote: 40}, {}):
        params = SamplingParams(max_tokens=60, schema=schema, temperature=1.0, seed=3, n=8, logit_bias=bias)
        [output] = engine.generate(["Once"], params)
        ended += assert_fits(output, schema)
        assert not any(re.search(r'\\[^"]*":', sample.text) for sample in output.outputs), "in no name"
    assert ended > 0


def test_text_that_spells_an_end_is_written_as_text(build: Build) -> None:
    engine = make(build, "m3")
    for given in (
        {"regex": "<end>"}, {"regex": r"[<]\x65nd>"}, {"schema": {"const": "a<end>"}},
        {"schema": {"type": "string", "pattern": "^<en[d]>$"}}, {"grammar": 'start: "<end>" "x"'},
        {"grammar": 'start: "<en" "d>"'},
    ):  # fmt: skip
        [output] = engine.generate(["x"], SamplingParams(max_tokens=40, temperature=1.0, seed=1, **given))
        assert output.finish_reason == "stop" and "<end>" in output.text and EOS not in output.token_ids[:-1]


def test_a_stop_token_that_is_all_that_fits_cuts_the_answer(build: Build) -> None:
    engine = make(build, "m3")
    assert engine.tokenizer is not None
    [letter] = engine.tokenizer.encode("b")
    [output] = engine.generate(["x"], SamplingParams(max_tokens=9, regex="aabaa", stop_token_ids=[letter]))
    assert (output.text, output.finish_reason) == ("aa", "stop")


def test_a_count_of_names_that_may_repeat_is_refused(build: Build) -> None:
    with pytest.raises(UserError, match="minProperties"):
        make(build, "m3").generate(["x"], SamplingParams(schema={"type": "object", "minProperties": 2}))


@pytest.mark.parametrize(
    ("options", "due"),
    [({}, 1), ({"min_tokens": 3}, 3), ({"ignore_eos": True}, None), ({"ignore_eos": True, "stop_token_ids": [EOS]}, 1)],
)
def test_an_end_is_allowed_when_it_is_due(options: dict[str, Any], due: int | None) -> None:
    tokenizer = bytes_tokenizer()
    params = SamplingParams(regex="[0-9]+", max_tokens=9, **options)
    structure = Structures(tokenizer, 512, [EOS]).begin(params, {EOS, *params.stop_token_ids})
    assert structure is not None
    for count in range(5):
        allows = bool(structure.mask()[EOS // 32] >> (EOS % 32) & 1)
        assert allows == (due is not None and count >= due), count
        structure.advance(tokenizer.encode("7")[0])


def test_space_between_jsons_parts_is_bounded(build: Build) -> None:
    engine = make(build, "m3")
    assert engine.tokenizer is not None
    [space] = engine.tokenizer.encode(" ")
    params = SamplingParams(max_tokens=60, schema=SCHEMAS["enums"], logit_bias={space: 100})
    [output] = engine.generate(["x"], params)
    assert " " * 8 in output.text and " " * 9 not in output.text


def test_other_strings_keep_their_escapes(build: Build) -> None:
    """An object that is open says nothing of what a string may hold."""
    schema = {"type": "object", "properties": {"a": {"const": 'x"\n'}}, "required": ["a"], "additionalProperties": True}
    [output] = make(build, "m3").generate(["x"], SamplingParams(max_tokens=60, schema=schema, temperature=1.0, seed=5))
    assert output.finish_reason == "stop" and json.loads(output.text)["a"] == 'x"\n'
