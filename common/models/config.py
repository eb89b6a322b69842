"""What a model looks like: the shapes and constants of a Llama, Qwen2 or Qwen3 decoder."""

import itertools
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Self

from common.errors import UserError, one_line, require, require_number
from common.models.rope import SCALINGS, Llama3Scaling, RopeScaling, YarnScaling, yarn_attention_factor

ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}

HF_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "max_position_embeddings": "max_position_embeddings",
}
"""Fields of `ModelConfig` that every config.json has, and their names there."""


@dataclass(frozen=True)
class ModelConfig:
    """Everything that `Decoder` needs to know; a value that it could not honour is refused before it gets here.

    architecture: `llama`, `qwen2` (bias on q, k and v) or `qwen3` (RMSNorm on each head of q and k).
    rope_scaling: None where `rope_theta` alone gives the frequencies. eos_token_ids: every token that ends an answer.
    """

    name: str
    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    def __post_init__(self) -> None:
        for field in (*HF_SIZES, "num_kv_heads", "head_dim"):
            require_number(f"{self.name}: {field}", getattr(self, field), int, 1, _most(field))
        for field in ("rope_theta", "rms_norm_eps"):
            require_number(f"{self.name}: {field}", getattr(self, field), int | float, 0, above=True)
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"{self.name}: {self.num_heads} attention heads cannot share {self.num_kv_heads} KV heads evenly",
        )
        require(self.head_dim % 2 == 0, f"{self.name}: head_dim {self.head_dim} is odd; rotary embedding needs pairs")

    @classmethod
    def from_hf(cls, name: str, config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> Self:
        """From the contents of config.json and generation_config.json; refuses by name what is not supported."""
        try:
            return cls._from_hf(name, config, generation or {})
        except UserError:
            raise
        except (TypeError, ValueError, AttributeError, KeyError, ArithmeticError) as error:  # foreign values
            reason = one_line(error)
            raise UserError(f"{name}: config.json cannot be understood: {reason}. Download it again") from error

    @classmethod
    def _from_hf(cls, name: str, config: Mapping[str, Any], generation: Mapping[str, Any]) -> Self:
        architecture = _architecture(name, config)
        for key in HF_SIZES.values():
            require_number(f"{name}: {key} in config.json", config.get(key), int, 1, _most(key))
        sizes: dict[str, int] = {field: config[key] for field, key in HF_SIZES.items()}
        _refuse_unsupported(name, config, architecture)
        rope_theta, rope_scaling = _rope(name, config, sizes["max_position_embeddings"])
        # Absent, they have the defaults of transformers' classes; null means that only in some.
        llama, usual = architecture == "llama", sizes["hidden_size"] // sizes["num_heads"]
        head_dim = config.get("head_dim", 128 if architecture == "qwen3" else usual)
        kv_heads = config.get("num_key_value_heads", None if llama else 32)
        return cls(
            name=name,
            architecture=architecture,
            **sizes,
            num_kv_heads=sizes["num_heads"] if kv_heads is None else kv_heads,
            head_dim=usual if llama and head_dim is None else head_dim,
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            qkv_bias=architecture == "qwen2",
            qk_norm=architecture == "qwen3",
            tie_word_embeddings=_flag(name, config, "tie_word_embeddings"),
            eos_token_ids=_eos_token_ids(name, config, generation, sizes["vocab_size"]),
            bos_token_id=_token_id(f"{name}: bos_token_id", config.get("bos_token_id")),
        )

    def to_hf(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Contents of config.json and generation_config.json, such that `from_hf` gives this configuration back."""
        rope: dict[str, Any] = {"rope_theta": self.rope_theta, "rope_type": "default"}
        if self.rope_scaling is not None:
            kind = next(kind for kind, cls in SCALINGS.items() if isinstance(self.rope_scaling, cls))
            rope |= {"rope_type": kind, **asdict(self.rope_scaling)}
        tokens = {"bos_token_id": self.bos_token_id, "eos_token_id": list(self.eos_token_ids)}
        config: dict[str, Any] = {
            "architectures": [name for name, short in ARCHITECTURES.items() if short == self.architecture],
            "model_type": self.architecture,
            **{key: getattr(self, field) for field, key in HF_SIZES.items()},
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "rope_parameters": rope,
            "tie_word_embeddings": self.tie_word_embeddings,
            "use_sliding_window": False,
            **tokens,
        }
        return config, tokens


def _most(size: str) -> int:
    """Beyond any model there is: what says more is damaged."""
    return 4096 if size in ("num_layers", "num_hidden_layers") else 2**27


def _architecture(name: str, config: Mapping[str, Any]) -> str:
    """transformers goes by `model_type`, and so must `architectures` not say anything else."""
    named, kind = list(config.get("architectures") or []), config.get("model_type")
    found = next((ARCHITECTURES[architecture] for architecture in named if architecture in ARCHITECTURES), None)
    if not named and kind in ARCHITECTURES.values():
        return str(kind)
    said = ", ".join(map(str, named))[:200] or kind or "none named"
    require(
        found is not None and kind in (None, found),
        f"{name}: architecture {said} (model_type {kind!r}) is not supported. Supported: {', '.join(ARCHITECTURES)}",
    )
    return str(found)


def _flag(name: str, config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key, False)
    require(isinstance(value, bool), f"{name}: {key} in config.json must be true or false, not {value!r}")
    return value


def _refuse_unsupported(name: str, config: Mapping[str, Any], architecture: str) -> None:
    """What transformers' class would compute otherwise. Keys that it does not read change nothing there either."""

    def refuse(what: str, hint: str = "") -> UserError:
        return UserError(f"{name}: {what} is not supported{hint}")

    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "?") if isinstance(quantization, Mapping) else "?"
        raise refuse(f"quantization_config (quant_method {method!r})", ". Take the checkpoint that is not quantised")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise refuse(f"hidden_act {config['hidden_act']!r} (only 'silu')")
    if _flag(name, config, "mlp_bias"):
        raise refuse("mlp_bias=true")
    if architecture != "qwen2" and _flag(name, config, "attention_bias"):
        raise refuse("attention_bias=true (a bias on o_proj)")
    for key, usual in (("partial_rotary_factor", 1.0), ("is_causal", True), ("per_layer_config", {})):
        if config.get(key, usual) not in (None, usual):
            raise refuse(f"{key} {config[key]!r}")
    layers, kinds = config["num_hidden_layers"], config.get("layer_types")
    if kinds is not None:
        if set(kinds) - {"full_attention", "attention"}:
            raise refuse("sliding-window attention, or any but 'full_attention' (layer_types)")
        require(
            len(kinds) == layers, f"{name}: layer_types in config.json has not {layers} entries, one for each layer"
        )
    # Qwen2 and Qwen3 name a window and switch it off; older Qwen2 files have no layer_types but max_window_layers.
    window, first_windowed_layer = config.get("sliding_window", None if architecture == "llama" else 4096), 0
    if architecture == "llama":
        windowed = window and config.get("use_sliding_window") is not False
    else:
        windowed = _flag(name, config, "use_sliding_window") and window is not None
        first_windowed_layer = config.get("max_window_layers", 28)
        if type(first_windowed_layer) is not int:
            raise refuse(f"max_window_layers {first_windowed_layer!r}")
    if windowed and kinds is None and first_windowed_layer < layers:
        raise refuse(f"sliding_window {window!r}")


def _rope(name: str, config: Mapping[str, Any], positions: int) -> tuple[float, RopeScaling | None]:
    """transformers 5 writes everything into `rope_parameters`; older files have `rope_theta` and `rope_scaling`.

    Where a file has both, `rope_scaling` replaces `rope_parameters`, as in transformers 5; refused is what is not
    supported in either.
    """
    new, old = (_rope_of(name, config, key, positions) for key in ("rope_parameters", "rope_scaling"))
    return old if config.get("rope_scaling") else new


def _rope_of(name: str, config: Mapping[str, Any], place: str, positions: int) -> tuple[float, RopeScaling | None]:
    """The base, and what `rope_scaling` or `rope_parameters` says. A key that its type does not have is refused, unless
    it is null, or a factor of 1: transformers would ignore it."""
    found: Any = config.get(place) or {}
    require(isinstance(found, Mapping), f"{name}: {place} in config.json must be an object, not {found!r}")
    rope: dict[str, Any] = dict(found)
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise UserError(f"{name}: {place} for each type of layer ({', '.join(rope)}) is not supported")
    kinds = {rope.pop(key) for key in ("rope_type", "type") if key in rope} or {"default"}
    kind, supported = next(iter(kinds)), ["default", *SCALINGS]
    require(
        len(kinds) == 1 and kind in supported,
        f"{name}: {place} of type {' and '.join(map(repr, kinds))} is not supported. Supported: {', '.join(supported)}",
    )
    theta = rope.pop("rope_theta", config.get("rope_theta", 10000.0))
    require_number(f"{name}: rope_theta in config.json", theta, int | float, 0, above=True)
    known = [] if kind == "default" else [field.name for field in fields(SCALINGS[kind])]
    if "original_max_position_embeddings" in known:  # beside the object, this key wins; in neither, it is the limit
        key = "original_max_position_embeddings"
        rope[key] = config.get(key, rope.get(key, positions))
    if kind == "yarn":
        mscales = [rope.pop(key, None) or 0 for key in ("mscale", "mscale_all_dim")]
        rope = {key: value for key, value in rope.items() if value or not key.startswith("beta_")}
        if rope.get("attention_factor") is None and rope.get("factor"):
            rope["attention_factor"] = yarn_attention_factor(rope["factor"], *mscales)
    for key, value in rope.items():
        ignored = value is None or (value == 1 and key in ("factor", "partial_rotary_factor"))
        require(key in known or ignored, f"{name}: {key} {value!r} is not supported in {place} of type {kind!r}")
    if kind == "default":
        return float(theta), None
    missing = [field.name for field in fields(SCALINGS[kind]) if field.default is MISSING and not rope.get(field.name)]
    require(not missing, f"{name}: {place} {kind!r} in config.json lacks {', '.join(missing)}")
    for key in known:
        if key == "truncate":
            require(isinstance(rope.get(key, True), bool), f"{name}: truncate in config.json must be true or false")
        elif key in rope:
            whole = key == "original_max_position_embeddings"
            require_number(f"{name}: {key} in config.json", rope[key], int if whole else int | float, 0, above=True)
    scaling = SCALINGS[kind](**{key: rope[key] for key in known if key in rope})
    if isinstance(scaling, Llama3Scaling):
        steps = scaling.high_freq_factor > scaling.low_freq_factor
        require(steps, f"{name}: high_freq_factor in config.json must be above low_freq_factor")
    if isinstance(scaling, YarnScaling):
        require(theta > 1, f"{name}: rope_theta in config.json must be above 1 with yarn")
    return float(theta), scaling


def _eos_token_ids(
    name: str, config: Mapping[str, Any], generation: Mapping[str, Any], vocab_size: int
) -> tuple[int, ...]:
    """Both files name end tokens, each one id or a list: an answer ends at any of them. Those outside of the vocabulary
    are left out: no token is ever one of them."""
    values = [source.get("eos_token_id") for source in (generation, config)]
    lists: list[list[Any]] = [value if isinstance(value, list) else [value] for value in values]
    ids = [_token_id(f"{name}: eos_token_id", value) for value in itertools.chain(*lists)]
    return tuple(dict.fromkeys(i for i in ids if i is not None and 0 <= i < vocab_size))


def _token_id(name: str, value: Any) -> int | None:
    require(value is None or type(value) is int, f"{name} must be a token id, not {value!r}")
    return value
