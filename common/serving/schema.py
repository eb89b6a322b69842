"""The requests, field by field, as OpenAI's reference has them; fields of this server alone are marked.

Unknown fields are refused, as by OpenAI. Those of OpenAI, vLLM and SGLang that are not supported here are listed in
`fields.toml`: some change nothing and are accepted, the others are refused.
"""

import logging
import tomllib
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from common.sampling_params import MAX_LOGPROBS

MAX_PROMPTS = 2048  # of one completion
MAX_STOPS = 64
MAX_STOP = 256  # characters of one: each token of an answer is compared with the beginnings of all
MAX_STOP_IDS = 256
MAX_TOOLS = 128
INT64 = 2**63
_FIELDS = tomllib.loads((Path(__file__).parent / "fields.toml").read_text(encoding="utf-8"))
NO_EFFECT = frozenset(_FIELDS["no_effect"].split())
"""Accepted, and named once in the log."""

NEUTRAL = {name: tuple(row["unless"]) for row in _FIELDS["refused"] for name in row["names"].split()}
"""Refused, unless null or one of these values, which ask for nothing."""

Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP)]
TokenId = Annotated[int, Field(ge=0, lt=INT64)]
Count = Annotated[int, Field(ge=1, lt=INT64)]
SEVERAL = Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
log = logging.getLogger("folovllm.serving")
_named: set[str] = set()  # of `NO_EFFECT`, in the log


class Body(BaseModel):
    """Types are taken literally: no text where a number is due, no NaN; but a whole number may be written as 12.0.

    Long lists stop at their first mistake (`fail_fast`), and objects at their first unknown field: a megabyte of
    mistakes would delay all other answers.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = NEUTRAL
    known: ClassVar[frozenset[str]]

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        cls.known = frozenset(field.alias or name for name, field in cls.model_fields.items())

    @model_validator(mode="before")
    @classmethod
    def _of_others(cls, data: Any) -> Any:
        """Without the fields that ask for nothing here."""
        if not isinstance(data, dict):
            return data
        given: dict[Any, Any] = {k: _whole(v) for k, v in data.items()}  # pyright: ignore
        for name in [name for name in given if name not in cls.known]:
            neutral = (given.get("n") or 1,) if name == "best_of" else cls.neutral.get(name)
            value = type(given[name]), given[name]  # True is no 1
            if name in NO_EFFECT:
                if name not in _named and given[name] is not None:
                    _named.add(name)
                    log.info("a field without effect here", extra={"fields": {"field": name}})
            elif neutral is None:
                raise PydanticCustomError("unknown", "unknown", {"field": name.encode(errors="replace").decode()})
            elif given[name] is not None and value not in [(type(one), one) for one in neutral]:
                raise PydanticCustomError("unsupported", "not supported by this server", {"field": name})
            del given[name]
        return given


def _whole(value: Any, depth: int = 2) -> Any:
    """12.0 as 12, also in the lists of token ids; numbers without end stay what they are."""
    if isinstance(value, float) and value.is_integer() and abs(value) < INT64:
        return int(value)
    if depth and isinstance(value, list) and any(isinstance(item, float | list) for item in value):  # pyright: ignore
        return [_whole(item, depth - 1) for item in value]  # pyright: ignore
    return value  # pyright: ignore


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False  # only here, as in vLLM: in every piece


StructureKind = Literal[  # vLLM's; the last ones may be null or false
    "json", "regex", "choice", "grammar", "json_object", "structural_tag", "whitespace_pattern",
    "disable_any_whitespace", "disable_additional_properties", "disable_fallback", "backend",
]  # fmt: skip


class JsonSchema(Body):
    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Body):
    """`json_schema`: of that type alone."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Sampling(Body):
    """What both endpoints take."""

    model: str
    n: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    logit_bias: dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None = (
        None
    )
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    max_tokens: Count | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    # only here (vLLM's names): openai's client sends them as extra_body={...}
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=INT64)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_IDS, fail_fast=True)] | None = None
    ignore_eos: bool | None = None
    priority: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None

    response_format: ResponseFormat | None = None
    structured_outputs: dict[StructureKind, Any] | None = None
    guided_json: dict[str, Any] | str | None = None  # vLLM's older names of these
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: (
        Annotated[str, Field(min_length=1)]
        | TokenIds
        | Annotated[list[Annotated[str, Field(min_length=1)]], SEVERAL]
        | Annotated[list[TokenIds], SEVERAL]
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    max_tokens: Annotated[int, Field(ge=0, lt=INT64)] | None = None
    neutral = {**NEUTRAL, "add_special_tokens": (True,)}


class FunctionCall(Body):
    name: str
    arguments: str | dict[str, Any]


class ToolCall(Body):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None  # left over from a stream


class Message(Body):
    """`content`: text, or parts of type `text`."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    reasoning_content: str | None = None  # only here: for templates that know it


class Function(Body):
    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


Messages = Annotated[list[Message], Field(min_length=1, fail_fast=True)]
Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)]


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Messages
    chat_template_kwargs: dict[str, Any] | None = None  # only here, as in vLLM
    tools: Tools | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    neutral = {**NEUTRAL, "add_special_tokens": (False,), "echo": (False,)}


class TokenizeRequest(Body):
    """POST /tokenize: of a text, or of a conversation (vLLM's)."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    messages: Messages | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Tools | None = None


class DetokenizeRequest(Body):
    """POST /detokenize (vLLM's)."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]
