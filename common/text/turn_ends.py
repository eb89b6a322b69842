"""The control tokens that end a turn of a chat, whatever a model's files call its end token."""

from tokenizers import Tokenizer as FastTokenizer

TURN_ENDS = {
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|eom|>", "<end_of_turn>", "<|end_of_turn|>", "<turn|>",
    "<|END_OF_TURN_TOKEN|>", "<|end|>", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<|endofturn|>", "</s>",
    "[|endofturn|]", "<|endoftext|>", "<|end_of_text|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<eos>", "<|role_end|>",
    "<end_of_utterance>", "<｜end▁of▁sentence｜>",
}  # fmt: skip
"""As models name them; most of them end an answer in llama.cpp too."""


def turn_end_token_ids(backend: FastTokenizer) -> tuple[int, ...]:
    """Of this tokenizer's added tokens those that end a turn. The same text in the plain vocabulary is only text."""
    added = {token.content: token_id for token_id, token in backend.get_added_tokens_decoder().items()}
    return tuple(sorted(added[text] for text in TURN_ENDS & added.keys()))
