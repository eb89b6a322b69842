"""What a model looks like: the shapes and constants of a Llama, Qwen2 or Qwen3 decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import UnionType
from typing import Any

from common.errors import UserError, require

ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's stretched rotary frequencies (The Llama 3 Herd of Models, section 3.4.3)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelConfig:
    """Everything that `Decoder` needs to know; a value that it could not honour is refused before it gets here.

    architecture: `llama`, `qwen2` (bias on q, k and v) or `qwen3` (RMSNorm on each head of q and k).
    rope_scaling: None, or Llama 3's. eos_token_ids: every token that ends an answer; may be empty.
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
    rope_scaling: Llama3Scaling | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    def __post_init__(self) -> None:
        for field in ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"):
            self._require_positive(field, int)
        for field in ("num_layers", "num_heads", "num_kv_heads", "head_dim"):
            self._require_positive(field, int)
        for field in ("rope_theta", "rms_norm_eps"):
            self._require_positive(field, int | float)
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"{self.name}: {self.num_heads} attention heads cannot share {self.num_kv_heads} KV heads evenly",
        )
        require(self.head_dim % 2 == 0, f"{self.name}: head_dim {self.head_dim} is odd; rotary embedding needs pairs")

    def _require_positive(self, field: str, kind: type | UnionType) -> None:
        value = getattr(self, field)
        valid = isinstance(value, kind) and not isinstance(value, bool) and value > 0
        number = "whole number" if kind is int else "number"
        require(valid, f"{self.name}: {field} in the model's configuration must be a positive {number}, not {value!r}")

    @classmethod
    def from_hf(cls, name: str, config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
        """From the contents of config.json and generation_config.json; refuses by name what is not supported."""
        try:
            return cls._from_hf(name, config, generation or {})
        except UserError:
            raise
        except (TypeError, ValueError, AttributeError, KeyError, ArithmeticError) as error:  # foreign values
            reason = " ".join(str(error).split())
            raise UserError(f"{name}: config.json cannot be understood: {reason}. Download it again") from error

    @classmethod
    def _from_hf(cls, name: str, config: Mapping[str, Any], generation: Mapping[str, Any]) -> ModelConfig:
        architecture = _architecture(name, config)
        _refuse_unsupported(name, config, architecture)
        hidden, heads = _int(name, config, "hidden_size"), _int(name, config, "num_attention_heads")
        positions = _int(name, config, "max_position_embeddings")
        rope_theta, rope_scaling = _rope(name, config, positions)
        return cls(
            name=name,
            architecture=architecture,
            vocab_size=_int(name, config, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_int(name, config, "intermediate_size"),
            num_layers=_int(name, config, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=rope_theta,
            max_position_embeddings=positions,
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
            rope |= {"rope_type": "llama3", **asdict(self.rope_scaling)}
        tokens = {"bos_token_id": self.bos_token_id, "eos_token_id": list(self.eos_token_ids)}
        config: dict[str, Any] = {
            "architectures": [name for name, short in ARCHITECTURES.items() if short == self.architecture],
            "model_type": self.architecture,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "rope_parameters": rope,
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_word_embeddings,
            "use_sliding_window": False,
            **tokens,
        }
        return config, tokens


def _int(name: str, config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{name}: config.json needs {key}, a positive whole number, not {value!r}")
    return value


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
    if config.get("partial_rotary_factor", 1.0) != 1.0:
        raise refuse(f"partial_rotary_factor {config['partial_rotary_factor']}")
    if "sliding_attention" in (config.get("layer_types") or []):
        raise refuse("sliding-window attention (layer_types)")
    # Qwen2 and Qwen3 name a window and switch it off; older Qwen2 files have no layer_types but max_window_layers.
    windowed = config.get("use_sliding_window", architecture == "llama") and config.get("sliding_window")
    if windowed and not config.get("layer_types"):
        first_windowed_layer = config.get("max_window_layers", 0) if architecture != "llama" else 0
        if not isinstance(first_windowed_layer, int):
            raise refuse(f"max_window_layers {first_windowed_layer!r} beside use_sliding_window=true")
        if first_windowed_layer < config.get("num_hidden_layers", 0):
            raise refuse(f"sliding_window {config['sliding_window']}")


def _rope(name: str, config: Mapping[str, Any], positions: int) -> tuple[float, Llama3Scaling | None]:
    """transformers 5 writes everything into `rope_parameters`; older files have `rope_theta` and `rope_scaling`.

    Where a file has both, `rope_scaling` replaces `rope_parameters`, as in transformers 5.
    """
    new, old = _rope_options(name, config, "rope_parameters"), _rope_options(name, config, "rope_scaling")
    rope = old or new
    theta = _number(name, "rope_theta", rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    if (rope.get("rope_type") or rope.get("type") or "default") == "default":
        return theta, None
    missing = [key for key in ("factor", "low_freq_factor", "high_freq_factor") if not rope.get(key)]
    if missing:
        raise UserError(f"{name}: rope_scaling 'llama3' in config.json lacks {', '.join(missing)}")
    scaling = Llama3Scaling(
        factor=_number(name, "factor", rope["factor"]),
        low_freq_factor=_number(name, "low_freq_factor", rope["low_freq_factor"]),
        high_freq_factor=_number(name, "high_freq_factor", rope["high_freq_factor"]),
        original_max_position_embeddings=int(rope.get("original_max_position_embeddings") or positions),
    )
    return theta, scaling


def _rope_options(name: str, config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """`rope_scaling` or `rope_parameters`, {} where absent; refuses what is not supported even where the other wins."""
    rope: Any = config.get(key) or {}
    if not isinstance(rope, Mapping):
        raise UserError(f"{name}: {key} in config.json must be an object, not {rope!r}")
    options: Mapping[str, Any] = rope  # pyright: ignore[reportUnknownVariableType]
    if any(isinstance(value, Mapping) for value in options.values()):
        raise UserError(f"{name}: {key} for each type of layer ({', '.join(options)}) is not supported")
    kind = options.get("rope_type") or options.get("type") or "default"
    if kind not in ("default", "llama3"):
        raise UserError(f"{name}: {key} of type {kind!r} is not supported. Supported: 'default' and 'llama3'")
    if options.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{name}: partial_rotary_factor {options['partial_rotary_factor']} is not supported")
    return options


def _number(name: str, key: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise UserError(f"{name}: {key} in config.json must be a number, not {value!r}")
    return float(value)


def _eos_token_ids(config: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    """Both files name end tokens, each one id or a list: an answer ends at any of them."""
    ids: list[int] = []
    for source in (generation, config):
        value = source.get("eos_token_id")
        for token_id in value if isinstance(value, list) else [value]:  # pyright: ignore[reportUnknownVariableType]
            if isinstance(token_id, int) and token_id not in ids:
                ids.append(token_id)
    return tuple(ids)
