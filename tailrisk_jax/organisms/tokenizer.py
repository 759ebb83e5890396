"""Word-level tokenizers of the embedded models: a text is words parted by single spaces.

`decode(encode(text)) == text` for every text over the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, BOS, END, EOS, USER, ASSISTANT = (
    "<pad>",
    "<bos>",
    "<end>",
    "<eos>",
    "<user>",
    "<assistant>",
)
SPECIAL_TOKENS = (PAD, BOS, END, EOS, USER, ASSISTANT)


def words_of(texts: Iterable[str]) -> tuple[str, ...]:
    """Each word once, in the order of first occurrence; `{fields}` of templates are left out."""
    return tuple({w: None for text in texts for w in text.split() if "{" not in w})


def word_tokenizer(
    vocabulary: Sequence[str], chat_template: str, special: Sequence[str] = SPECIAL_TOKENS
) -> PreTrainedTokenizerFast:
    """A fast tokenizer whose token ids are positions in `vocabulary`, with the template inside.

    A word outside the vocabulary is an error at encoding time, not an unknown token.

    Args:
      special: the special tokens of the vocabulary: those of this module, and perhaps more.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate(vocabulary)}
    backend = Tokenizer(models.WordLevel(ids))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[t for t in special if t not in (PAD, BOS, END)],
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )
