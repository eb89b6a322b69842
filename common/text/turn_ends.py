"""The control tokens that end a turn of a chat, whatever a model's files call its end token."""

TURN_ENDS = {
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|eom|>", "<end_of_turn>", "<|end_of_turn|>", "<turn|>",
    "<|END_OF_TURN_TOKEN|>", "<|end|>", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<|endofturn|>", "</s>",
    "[|endofturn|]", "<|endoftext|>", "<|end_of_text|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<eos>", "<|role_end|>",
    "<end_of_utterance>", "<｜end▁of▁sentence｜>",
}  # fmt: skip
"""As models name them; most of them end an answer in llama.cpp too. Only added tokens: in the plain vocabulary the same
is text."""
