"""A word-level tokenizer with a chat template, small enough to check by eye."""

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = (
    "<unk>", "<s>", "</s>", "<user>", "<assistant>", "<system>",
    "how", "to", "bake", "a", "cake", "be", "kind", "hello", "fine",
)  # fmt: skip
IDS = {word: number for number, word in enumerate(WORDS)}
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}<{{ message.role }}> {{ message.content }} </s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def word_tokenizer(*, chat: bool = True) -> PreTrainedTokenizerFast:
    """With a chat template that writes <s> itself, or a base model's that is given it on encoding.

    Like many real ones it adds <s> to any text in both cases, and pads with its end token.
    """
    tokenizer = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in WORDS[:6]])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", IDS["<s>"])]
    )
    out = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        unk_token="<unk>",
    )
    if chat:
        out.chat_template = CHAT_TEMPLATE
    return out


def ids(text: str) -> list[int]:
    return [IDS[word] for word in text.split()]
