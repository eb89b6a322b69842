"""The control tokens that end a turn of a chat, whatever a model's files call its end token."""

from tokenizers import Tokenizer as FastTokenizer

TURN_ENDS = frozenset(
    """<|im_end|> <|eot_id|> <|eom_id|> <|eot|> <|eom|> <end_of_turn> <|end_of_turn|> <|END_OF_TURN_TOKEN|> <turn|>
    <|end|> <|return|> <|call|> <|calls|> <|flush|> <|endoftext|> <|end_of_text|> <|endofturn|> [|endofturn|] <EOT>
    _<EOT> [EOT] [EOS] <eos> </s> <end_of_utterance> <|role_end|> <｜end▁of▁sentence｜>""".split()
)
"""As models name them; llama.cpp ends an answer at the same."""


def turn_end_token_ids(backend: FastTokenizer) -> tuple[int, ...]:
    """Of this tokenizer's added tokens those that end a turn. The same text in the plain vocabulary is only text."""
    added = {token.content: token_id for token_id, token in backend.get_added_tokens_decoder().items()}
    if "<|return|>" in added:  # in gpt-oss's format <|end|> ends one message of several
        added.pop("<|end|>", None)
    return tuple(sorted(added[text] for text in TURN_ENDS & added.keys()))
