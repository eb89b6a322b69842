"""The requests, field by field, as OpenAI's reference has them; fields of this server alone are marked.

Unknown fields are refused, as by OpenAI; those of OpenAI's that are not supported here are listed, and refused as such.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from common.sampling_params import MAX_LOGPROBS

MAX_STOPS = 4
MAX_STOP_IDS = 256
INT64 = 2**63

Stop = Annotated[str, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Ignored = Annotated[Any, Field(description="Accepted, without effect.")]


def _unsupported(*neutral: Any) -> AfterValidator:
    """Refuses a field of OpenAI's that this server does not support. Null and the `neutral` values change nothing."""

    def refuse(value: Any) -> None:
        if value is not None and value not in neutral:
            raise PydanticCustomError("unsupported", "not supported by this server")

    return AfterValidator(refuse)


DESCRIPTION = Field(description="Answered with 400 unless it is null or asks for nothing.")
Unsupported = Annotated[Any, DESCRIPTION, _unsupported()]
UnsupportedList = Annotated[Any, DESCRIPTION, _unsupported([])]
UnsupportedChoice = Annotated[Any, DESCRIPTION, _unsupported("none", "auto")]


class Body(BaseModel):
    """Types are taken literally: no text where a number is due, no NaN.

    Long lists stop at their first mistake (`fail_fast`): a megabyte of mistakes would delay all other answers.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: Ignored = None


class Sampling(Body):
    """What both endpoints take."""

    model: str
    n: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    logit_bias: dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None = (
        None
    )
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    # only here (vLLM's names): openai's client sends them as extra_body={...}
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_IDS, fail_fast=True)] | None = None
    ignore_eos: bool | None = None

    structured_outputs: dict[Literal["json", "regex", "choice", "grammar", "json_object"], Any] | None = None
    guided_json: dict[str, Any] | str | None = None  # vLLM's older names of these
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    user: Ignored = None
    metadata: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None


class JsonSchema(Body):
    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Body):
    """`json_schema`: of that type alone."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: (
        Annotated[str, Field(min_length=1)]
        | TokenIds
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, fail_fast=True)]
        | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)]
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: Annotated[Any, DESCRIPTION, _unsupported(1)] = None
    echo: Annotated[Any, DESCRIPTION, _unsupported(False)] = None
    suffix: Annotated[Any, DESCRIPTION, _unsupported("")] = None


class Message(Body):
    """`content`: text, or parts of type `text`."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[dict[str, Any]], Field(fail_fast=True)]
    name: str | None = None
    tool_call_id: str | None = None
    refusal: Ignored = None
    annotations: Ignored = None
    audio: Unsupported = None
    tool_calls: UnsupportedList = None
    function_call: UnsupportedChoice = None


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None  # only here, as in vLLM
    parallel_tool_calls: Ignored = None
    audio: Unsupported = None
    function_call: UnsupportedChoice = None
    functions: UnsupportedList = None
    modalities: Annotated[Any, DESCRIPTION, _unsupported(["text"])] = None
    prediction: Unsupported = None
    reasoning_effort: Unsupported = None
    response_format: ResponseFormat | None = None
    store: Annotated[Any, DESCRIPTION, _unsupported(False)] = None
    tool_choice: UnsupportedChoice = None
    tools: UnsupportedList = None
    verbosity: Unsupported = None
    web_search_options: Unsupported = None
