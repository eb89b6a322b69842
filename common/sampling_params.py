"""How one request chooses its tokens, and when it stops."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from common.errors import UserError, one_line, plain, refuse_unknown_options, require, require_number

MAX_LOGPROBS = 20
MAX_STRUCTURE = 1 << 17  # characters of a schema, a regular expression or a grammar
MAX_BIASES = 300  # tokens of a `logit_bias`, as in OpenAI's API
GREEDY_BELOW = 1e-5  # a temperature this small leaves only the likeliest token, and dividing by it would overflow


@refuse_unknown_options
@dataclass(frozen=True)
class SamplingParams:
    """Sampling options of one request; values out of range raise `UserError`. The notes are the help texts of the
    command line, too."""

    n: Annotated[int, "Samples of the same prompt (from m3 on, they share its blocks)."] = 1
    max_tokens: Annotated[int, "Most tokens to generate for a prompt."] = 16  # 0: none, with `prompt_logprobs`
    min_tokens: Annotated[int, "Fewest tokens to generate: no EOS or stop token is sampled before."] = 0
    temperature: Annotated[float, "Divides the logits: higher is more varied; 0 takes the likeliest token."] = 0.0
    top_k: Annotated[int, "Sample among the k likeliest tokens; 0 or -1: all."] = 0
    top_p: Annotated[
        float, "Sample among the fewest likeliest tokens that together reach this probability; 0: the likeliest."
    ] = 1.0
    min_p: Annotated[float, "Leave out tokens less likely than this share of the likeliest one."] = 0.0
    repetition_penalty: Annotated[float, "Over 1: tokens of prompt and output become less likely (CTRL, 4.1)."] = 1.0
    presence_penalty: Annotated[float, "Subtracted from the logit of each token that the output has."] = 0.0
    frequency_penalty: Annotated[float, "The same, once for each time the output has it."] = 0.0
    stop: Annotated[str | Sequence[str], "Text that ends the output, not part of it; may be given several times."] = ()
    stop_token_ids: Sequence[int] = ()  # tokens that end the output, as the model's EOS ids do; not part of the text
    ignore_eos: Annotated[bool, "Go on after the model says that it has ended."] = False
    seed: int | None = None  # of the request's own noise; None or -1: one derived from the engine's seed
    # structured output: the whole answer fits one of these, unless max_tokens or a stop string cuts it
    schema: Annotated[Mapping[str, Any] | str | None, "A JSON schema, as JSON, that the whole answer fits."] = field(
        default=None, hash=False
    )
    regex: Annotated[str | None, "A regular expression that the whole answer fits."] = None
    grammar: Annotated[str | None, "A grammar (Lark's syntax, or GBNF) that the whole answer fits."] = None
    json_object: Annotated[bool, "The answer is a JSON object."] = False
    # added to the model's logits of these tokens, -100 ... 100, before penalties; log-probabilities do not have it
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float], hash=False)
    logprobs: Annotated[int | None, "Of this many likeliest tokens (0: the sampled one alone), in --json."] = None
    prompt_logprobs: int | None = None  # the same for each token of the prompt: as likely as the model finds it there

    def __post_init__(self) -> None:
        require(isinstance(self.stop, Sequence), "stop takes a text or a list of texts")
        require(isinstance(self.stop_token_ids, Sequence), "stop_token_ids takes a list of token ids")
        object.__setattr__(self, "stop", self.stop_strings)
        object.__setattr__(self, "stop_token_ids", tuple(map(plain, self.stop_token_ids)))
        for name, anything, value in (("top_k", -1, 0), ("seed", -1, None)):  # as other engines say it
            if getattr(self, name) == anything:
                object.__setattr__(self, name, value)
        self._check_structure()
        fewest = 1 if self.prompt_logprobs is None else 0
        for name, least in (("n", 1), ("max_tokens", fewest), ("min_tokens", 0), ("top_k", 0)):
            require_number(name, getattr(self, name), int, least)
        least, most = self.min_tokens, self.max_tokens
        require(least <= most, f"min_tokens must be at most max_tokens ({most}), not {least}")
        require_number("temperature", self.temperature, int | float, 0, 100)
        require_number("top_p (1 switches it off)", self.top_p, int | float, 0, 1)
        require_number("min_p", self.min_p, int | float, 0, 1)
        penalty = self.repetition_penalty
        require_number("repetition_penalty (1 switches it off)", penalty, int | float, 0, 100, above=True)
        require_number("presence_penalty", self.presence_penalty, int | float, -2, 2)
        require_number("frequency_penalty", self.frequency_penalty, int | float, -2, 2)
        texts = all(isinstance(s, str) and s and not any("\ud800" <= c <= "\udfff" for c in s) for s in self.stop)
        require(texts, "stop takes texts of valid Unicode that are not empty")
        for token_id in self.stop_token_ids:
            require_number("each of stop_token_ids", token_id, int, 0)
        if self.seed is not None:
            require_number("seed", self.seed, int, 0, 2**63 - 1)
        require(isinstance(self.logit_bias, Mapping), "logit_bias takes a dictionary of token id to number")
        object.__setattr__(self, "logit_bias", {plain(k): plain(v) for k, v in self.logit_bias.items()})
        require(len(self.logit_bias) <= MAX_BIASES, f"logit_bias takes {MAX_BIASES} tokens at most")
        for token_id, bias in self.logit_bias.items():
            require_number("each token of logit_bias", token_id, int, 0)
            require_number("each value of logit_bias", bias, int | float, -100, 100)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                require_number(name, getattr(self, name), int, 0, MAX_LOGPROBS)

    @property
    def structure(self) -> tuple[str, str] | None:
        """What the answer has to fit: (`schema`, `regex` or `grammar`, its text)."""
        schema = '{"type": "object"}' if self.json_object else self.schema
        texts = {"schema": schema, "regex": self.regex, "grammar": self.grammar}
        return next(((kind, str(text)) for kind, text in texts.items() if text is not None), None)

    def _check_structure(self) -> None:
        require(isinstance(self.json_object, bool), f"json_object is True or False, not {self.json_object!r}")
        given = [name for name in ("schema", "regex", "grammar") if getattr(self, name) is not None]
        given += ["json_object"] * self.json_object
        require(len(given) <= 1, f"give one of {' and '.join(given)}")
        if isinstance(self.schema, Mapping):
            try:
                object.__setattr__(self, "schema", json.dumps(dict(self.schema)))
            except (TypeError, ValueError, RecursionError) as error:
                raise UserError(f"schema is no JSON: {one_line(error)}") from None
        if self.structure is not None:
            kind, text = self.structure
            wanted = self.json_object or isinstance(getattr(self, kind), str)
            require(
                wanted,
                f"{kind} takes a text"
                + " or a dictionary, such as a pydantic Model.model_json_schema()" * (kind == "schema"),
            )
            require(len(text) <= MAX_STRUCTURE, f"{kind} has {len(text)} characters: at most {MAX_STRUCTURE} are taken")

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW or self.top_p == 0

    @property
    def filters(self) -> bool:
        """Leaves tokens out, by rank or by probability."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0

    @property
    def penalised(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as the tuple that it was normalised to."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
