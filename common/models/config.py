"""What a model looks like: the shapes and constants of a Llama, Qwen2 or Qwen3 decoder."""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from types import NoneType
from typing import Any, Self

from common.errors import refusing, require, require_number, require_real
from common.models.rope import SCALINGS, RopeScaling, checked, yarn_attention_factor
from common.watch.progress import say_once

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

MOST, MOST_LAYERS = 2**27, 4096  # Of each of these sizes. There is no such model: what says more is damaged.
ORIGINAL = "original_max_position_embeddings"


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
            most = MOST_LAYERS if field == "num_layers" else MOST
            require_number(f"{self.name}: {field}", getattr(self, field), int, 1, most)
        for field in ("rope_theta", "rms_norm_eps"):
            require_real(f"{self.name}: {field}", getattr(self, field))
        uneven = f"{self.num_heads} attention heads cannot share {self.num_kv_heads} KV heads evenly"
        require(self.num_heads % self.num_kv_heads == 0, f"{self.name}: {uneven}")
        require(self.head_dim % 2 == 0, f"{self.name}: head_dim {self.head_dim} is odd; rotary embedding needs pairs")

    @classmethod
    def from_hf(cls, name: str, config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> Self:
        """From the contents of config.json and generation_config.json; refuses by name what is not supported."""
        with refusing(f"{name}: config.json"):
            architecture = _architecture(name, config)
            default = {"max_position_embeddings": 2048 if architecture == "llama" else 32768}  # transformers'
            config = default | dict(config)
            for field, key in HF_SIZES.items():
                most = MOST_LAYERS if field == "num_layers" else MOST
                require_number(f"{name}: {key} in config.json", config.get(key), int, 1, most)
            sizes: dict[str, int] = {field: config[key] for field, key in HF_SIZES.items()}
            _refuse_unsupported(name, config, architecture)
            # rope_scaling replaces rope_parameters, as in transformers; but neither may say what is not supported.
            places = [place for place in ("rope_parameters", "rope_scaling") if config.get(place)] or ["rope_scaling"]
            ropes = [_rope(name, config, place, sizes["max_position_embeddings"]) for place in places]
            rope_theta, rope_scaling = ropes[-1]
            # Absent, they have the defaults of transformers' classes; null means that only in some.
            llama, usual = architecture == "llama", sizes["hidden_size"] // sizes["num_heads"]
            head_dim = config.get("head_dim", 128 if architecture == "qwen3" else usual)
            kv_heads = config.get("num_key_value_heads", None if llama else 32)
            return cls(
                name=name, architecture=architecture, **sizes,
                num_kv_heads=sizes["num_heads"] if kv_heads is None else kv_heads,
                head_dim=usual if llama and head_dim is None else head_dim,
                rms_norm_eps=config.get("rms_norm_eps", 1e-6), rope_theta=rope_theta, rope_scaling=rope_scaling,
                qkv_bias=architecture == "qwen2", qk_norm=architecture == "qwen3",
                tie_word_embeddings=_get(name, config, "tie_word_embeddings", False, bool),
                eos_token_ids=_eos_token_ids(name, generation or {}, config, sizes["vocab_size"]),
                bos_token_id=_get(name, config, "bos_token_id", None, int, NoneType),
            )  # fmt: skip

    def to_hf(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Contents of config.json and generation_config.json, such that `from_hf` gives this configuration back."""
        rope: dict[str, Any] = {"rope_theta": self.rope_theta, "rope_type": "default"}
        if self.rope_scaling is not None:
            rope |= {"rope_type": self.rope_scaling.kind, **asdict(self.rope_scaling)}
        tokens = {"bos_token_id": self.bos_token_id, "eos_token_id": list(self.eos_token_ids)}
        config: dict[str, Any] = {
            "architectures": [name for name, short in ARCHITECTURES.items() if short == self.architecture],
            "model_type": self.architecture,
            **{key: getattr(self, field) for field, key in HF_SIZES.items()},
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            **{"hidden_act": "silu", "rms_norm_eps": self.rms_norm_eps, "rope_parameters": rope},
            **{"tie_word_embeddings": self.tie_word_embeddings, "use_sliding_window": False, **tokens},
        }
        return config, tokens


def _get(name: str, config: Mapping[str, Any], key: str, default: Any, *kinds: type) -> Any:
    """A value of one of these types; as in transformers, null stands for the default only where `NoneType` is one."""
    value = config.get(key, default)
    require(type(value) in kinds, f"{name}: {key} in config.json cannot be understood: {value!r:.80}")
    return value


def _architecture(name: str, config: Mapping[str, Any]) -> str:
    """transformers goes by `model_type`: where both are there, they must agree."""
    named, kind = _get(name, config, "architectures", None, list, str, NoneType) or [], config.get("model_type")
    named = [named] if isinstance(named, str) else named
    found = [ARCHITECTURES[architecture] for architecture in named if architecture in ARCHITECTURES]
    found = found if named or kind not in ARCHITECTURES.values() else [str(kind)]
    said = " ".join(", ".join(map(str, named)).split())[:200] or kind or "none named"
    hint = f"is not supported. Supported: {', '.join(ARCHITECTURES)}"
    require(bool(found) and kind in (None, found[0]), f"{name}: architecture {said} (model_type {kind!r:.80}) {hint}")
    return found[0]


def _refuse_unsupported(name: str, config: Mapping[str, Any], architecture: str) -> None:
    """Refuse what transformers' class would compute; a key that it does not read changes nothing there either."""
    quantization, act = config.get("quantization_config"), config.get("hidden_act", "silu")
    method = quantization.get("quant_method", "?") if isinstance(quantization, Mapping) else "?"
    layers, kinds = config["num_hidden_layers"], _get(name, config, "layer_types", None, list, NoneType)
    # Qwen2 and Qwen3 name a window and switch it off; older Qwen2 files have no layer_types but max_window_layers.
    window = config.get("sliding_window", None if architecture == "llama" else 4096)
    if architecture == "llama":
        windowed = window and config.get("use_sliding_window") is not False
    else:
        window_from = _get(name, config, "max_window_layers", 28, int)
        windowed = _get(name, config, "use_sliding_window", False, bool) and window_from < layers and window is not None
    biased = architecture != "qwen2" and _get(name, config, "attention_bias", False, bool)
    others = (("partial_rotary_factor", 1.0), ("is_causal", True), ("per_layer_config", {}))
    for found, what in (
        (quantization, f"quantization_config (quant_method {method!r:.80})"),
        (act not in ("silu", "swish"), f"hidden_act {act!r:.80} (only 'silu')"),
        (_get(name, config, "mlp_bias", False, bool), "mlp_bias=true"),
        (biased, "attention_bias=true (a bias on o_proj)"),
        *((config.get(key) not in (None, usual), f"{key} {config.get(key)!r:.80}") for key, usual in others),
        (set(kinds or ()) - {"full_attention", "attention"}, "sliding-window or other attention (layer_types)"),
        (windowed and kinds is None, f"sliding_window {window!r:.80}"),
    ):
        require(not found, f"{name}: {what} is not supported")
    require(kinds is None or len(kinds) == layers, f"{name}: layer_types in config.json do not name {layers} layers")


def _rope(name: str, config: Mapping[str, Any], place: str, positions: int) -> tuple[float, RopeScaling | None]:
    """The base, and what `rope_parameters` (transformers 5) or `rope_scaling` says. transformers ignores a key that the
    type does not have; here it is refused, unless it changes nothing."""
    rope: dict[str, Any] = dict(_get(name, config, place, None, dict, NoneType) or {})
    kinds = {rope.pop(key) for key in ("rope_type", "type") if key in rope} or {"default"}
    kind, *others = kinds
    # dynamic begins beyond max_position_embeddings, which no request reaches
    supported = {"default": None, "dynamic": None, **SCALINGS}
    said, hint = " and ".join(map(repr, kinds))[:200], f"is not supported. Supported: {', '.join(supported)}"
    require(kind in supported and not others, f"{name}: {place} of type {said} {hint}")
    theta, mscales = rope.pop("rope_theta", config.get("rope_theta", 10000.0)), list[float]()
    require_real(f"{name}: rope_theta in config.json", theta)
    if kind == "yarn":
        mscales = [rope.pop(key, None) or 0 for key in ("mscale", "mscale_all_dim")]
        if rope.get("attention_factor") is None:
            rope["attention_factor"] = yarn_attention_factor(rope.get("factor") or 1, *mscales)
    scaling = supported[kind]
    known = {field.name: field.default for field in fields(scaling)} if scaling else {}
    if ORIGINAL in known:  # next to the object, this key wins; without it, it is the limit
        rope[ORIGINAL] = config.get(ORIGINAL, rope.get(ORIGINAL, positions))
    for key, value in rope.items():
        neutral = value == 1 and key in ("factor", "attention_factor", "partial_rotary_factor", "truncate")
        ignored = neutral or (value is None and key != "truncate") or (kind == "dynamic" and key == "factor")
        require(key in known or ignored, f"{name}: {key} {value!r:.80} is not supported in {place} of type {kind!r}")
    values: dict[str, Any] = {
        key: rope.get(key) or (None if default is MISSING else default) for key, default in known.items()
    }
    return float(theta), checked(f"{name}: {place}", scaling(**values), theta) if scaling else None


def _eos_token_ids(
    name: str, generation: Mapping[str, Any], config: Mapping[str, Any], vocab_size: int
) -> tuple[int, ...]:
    """Both files name end tokens, each one id or a list: an answer ends at any of them. Those outside of the vocabulary
    are named and left out: no token is ever one of them."""
    ids: list[int] = []
    for file, source in (("generation_config.json", generation), ("config.json", config)):
        value = source.get("eos_token_id")
        found: list[Any] = value if isinstance(value, list) else [] if value is None else [value]
        good = all(type(token_id) is int for token_id in found)
        require(good, f"{name}: eos_token_id in {file} must be token ids, not {value!r:.80}")
        ids += found
    outside = next((token_id for token_id in ids if not 0 <= token_id < vocab_size), None)
    if outside is not None:
        say_once(f"{name}: eos_token_id {outside} is outside of the vocabulary of {vocab_size}, so it ends no answer")
    return tuple(dict.fromkeys(token_id for token_id in ids if 0 <= token_id < vocab_size))
