"""What a model looks like: the shapes and constants of a Llama, Qwen2 or Qwen3 decoder."""

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
            require_number(f"{self.name}: {field}", getattr(self, field), int, 1)
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
        _refuse_unsupported(name, config, architecture)
        for key in HF_SIZES.values():
            require_number(f"{name}: {key} in config.json", config.get(key), int, 1)
        sizes: dict[str, int] = {field: config[key] for field, key in HF_SIZES.items()}
        rope_theta, rope_scaling = _rope(name, config, sizes["max_position_embeddings"])
        return cls(
            name=name,
            architecture=architecture,
            **sizes,
            num_kv_heads=config.get("num_key_value_heads") or sizes["num_heads"],
            head_dim=config.get("head_dim") or sizes["hidden_size"] // sizes["num_heads"],
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            qkv_bias=architecture == "qwen2",
            qk_norm=architecture == "qwen3",
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            eos_token_ids=_eos_token_ids(config, generation),
            bos_token_id=config.get("bos_token_id"),
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


def _architecture(name: str, config: Mapping[str, Any]) -> str:
    named = list(config.get("architectures") or [])
    if not named and config.get("model_type") in ARCHITECTURES.values():
        return str(config["model_type"])
    for architecture in named:
        if architecture in ARCHITECTURES:
            return ARCHITECTURES[architecture]
    found = ", ".join(map(str, named)) or config.get("model_type") or "none named"
    raise UserError(f"{name}: architecture {found} is not supported. Supported: {', '.join(ARCHITECTURES)}")


def _refuse_unsupported(name: str, config: Mapping[str, Any], architecture: str) -> None:
    def refuse(what: str, hint: str = "") -> UserError:
        return UserError(f"{name}: {what} is not supported{hint}")

    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "?") if isinstance(quantization, Mapping) else "?"
        raise refuse(f"quantization_config (quant_method {method!r})", ". Take the checkpoint that is not quantised")
    if config.get("hidden_act", "silu") != "silu":
        raise refuse(f"hidden_act {config['hidden_act']!r} (only 'silu')")
    if config.get("mlp_bias"):
        raise refuse("mlp_bias=true")
    if config.get("attention_bias") and architecture != "qwen2":
        raise refuse("attention_bias=true (a bias on o_proj)")
    if config.get("partial_rotary_factor") not in (None, 1.0):
        raise refuse(f"partial_rotary_factor {config['partial_rotary_factor']}")
    if "sliding_attention" in (config.get("layer_types") or []):
        raise refuse("sliding-window attention (layer_types)")
    # Qwen2 and Qwen3 name a window and switch it off; older Qwen2 files have no layer_types but max_window_layers.
    windowed = config.get("use_sliding_window", architecture == "llama") and config.get("sliding_window")
    if windowed and not config.get("layer_types"):
        first_windowed_layer = config.get("max_window_layers", 0) if architecture != "llama" else 0
        if not isinstance(first_windowed_layer, int):
            raise refuse(f"max_window_layers {first_windowed_layer!r} with use_sliding_window=true")
        if first_windowed_layer < config.get("num_hidden_layers", 0):
            raise refuse(f"sliding_window {config['sliding_window']}")


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


def _eos_token_ids(config: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    """Both files name end tokens, each one id or a list: an answer ends at any of them."""
    ids: list[int] = []
    for source in (generation, config):
        value = source.get("eos_token_id")
        for token_id in value if isinstance(value, list) else [value]:  # pyright: ignore[reportUnknownVariableType]
            if isinstance(token_id, int) and token_id not in ids:
                ids.append(token_id)
    return tuple(ids)
