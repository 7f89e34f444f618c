"""Random tiny models with real tokenizers, as model folders: what the tests use in place of a 7B model.

The architectures, chat templates and tokenizers have the shapes of the real ones; only the sizes and weights differ.
"""

import shutil
import string
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

TEXT = """
The river Rhine rises in the Swiss Alps and flows north through Germany to the Netherlands, where it reaches the sea.
It is one of the longest rivers of Europe, about 1,230 kilometres, and has carried trade since Roman times.
Marie Curie was born in Warsaw in 1867. She won the Nobel Prize in Physics in 1903 and in Chemistry in 1911, and was
the first person to win it in two sciences. She discovered polonium and radium together with her husband, Pierre.
Bread is made of flour, water, salt and yeast. The dough has to rest for some hours before it is baked in a hot oven.
The moon moves around the earth in about 27 days. Its gravity causes the tides: twice a day the water rises and falls.
In 1969 the first people walked on the moon. Neil Armstrong and Buzz Aldrin stayed there for less than one day.
A computer stores numbers in binary form. Each digit is either zero or one, and eight of them together make a byte.
What is the capital of France? Paris is the capital of France, and more than two million people live in the city.
Who wrote the play? When did the war end? Where does the train stop? How many members does the council have?
The whale is the largest animal that has ever lived; it eats small animals, which it filters from the sea water.
Coffee is grown in more than seventy countries, most of all in Brazil, Vietnam and Colombia. The beans are roasted.
The company was founded in 1998 by two students, who first worked in a garage. Its search engine became well known.
Mount Everest is 8,849 metres high. It was first climbed in May 1953 by Edmund Hillary and Tenzing Norgay.
Glass is made by melting sand at a very high temperature. It has been known for more than four thousand years.
You are a helpful assistant. Your task is to extract relevant information from provided documents and to answer
questions as briefly as possible. Background: Question: Answer: user system assistant
"""

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Like Mistral-Instruct v0.2: begins with <s>, and refuses a system message.
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
CAUSAL_SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"]
ENCODER_SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def build_llama(folder: Path) -> Path:
    """Llama: tied embeddings, ChatML; its tokenizer puts <s> in front of text by itself."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_byte_level_bpe(CAUSAL_SPECIALS, prefix="<s>"),
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )
    return _causal(folder, LlamaConfig, tokenizer, CHATML, tied=True, seed=1)


def build_teacher(folder: Path, llama: Path) -> Path:
    """A copy of `build_llama`'s in which every sixth token ends a turn: most of its answers end within a dozen."""
    shutil.copytree(llama, folder)
    GenerationConfig(eos_token_id=list(range(5, 700, 6))).save_pretrained(folder)
    return folder


def build_mistral(folder: Path) -> Path:
    """Mistral: untied embeddings, [INST] template that refuses a system message, no padding token."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_byte_level_bpe(CAUSAL_SPECIALS, prefix="<s>"), bos_token="<s>", eos_token="</s>"
    )
    return _causal(folder, MistralConfig, tokenizer, MISTRAL_TEMPLATE, tied=False, seed=2)


def build_qwen2(folder: Path) -> Path:
    """Qwen2: biases in attention, tied embeddings, ChatML, no BOS."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_byte_level_bpe(CAUSAL_SPECIALS), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    return _causal(folder, Qwen2Config, tokenizer, CHATML, tied=True, seed=3)


def build_qwen3(folder: Path) -> Path:
    """Qwen3: normalised queries and keys, untied embeddings, ChatML, no BOS."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_byte_level_bpe(CAUSAL_SPECIALS), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    return _causal(folder, Qwen3Config, tokenizer, CHATML, tied=False, seed=4)


def build_modernbert(folder: Path) -> Path:
    """ModernBERT: rotary positions, one global and two local layers, byte-level BPE between [CLS] and [SEP]."""
    tokenizer = _encoder_tokenizer(_byte_level_bpe(ENCODER_SPECIALS, prefix="[CLS]", suffix="[SEP]"))
    config = ModernBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=1024,
        local_attention=32,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.cls_token_id,
        cls_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        sep_token_id=tokenizer.sep_token_id,
        initializer_range=0.1,
    )
    return _save(folder, config, AutoModel.from_config, tokenizer, seed=5)


def build_bert(folder: Path) -> Path:
    """BERT: learned positions, at most 512 of them, lower-casing WordPiece between [CLS] and [SEP]."""
    tokenizer = _encoder_tokenizer(_word_piece())
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.1,
    )
    return _save(folder, config, AutoModel.from_config, tokenizer, seed=6)


def _causal(
    folder: Path,
    config_class: Callable[..., PretrainedConfig],
    tokenizer: PreTrainedTokenizerFast,
    chat_template: str,
    *,
    tied: bool,
    seed: int,
) -> Path:
    tokenizer.chat_template = chat_template
    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,  # grouped-query attention
        head_dim=16,
        max_position_embeddings=8192,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.1,  # wide enough that the greedy choice is clear of rounding
    )
    return _save(folder, config, AutoModelForCausalLM.from_config, tokenizer, seed=seed)


def _save(
    folder: Path,
    config: PretrainedConfig,
    build: Callable[[PretrainedConfig], PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _byte_level_bpe(specials: list[str], prefix: str = "", suffix: str = "") -> Tokenizer:
    """Trained on TEXT; any byte sequence can be encoded. `prefix` and `suffix` are added around a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    if prefix or suffix:
        _add_around(tokenizer, prefix, suffix)
    return tokenizer


def _word_piece() -> Tokenizer:
    """Lower-casing, of pieces of TEXT's words; other words fall apart into letters."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    words = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(TEXT))]
    vocabulary = {piece: index for index, piece in enumerate(_pieces(words, 600))}
    tokenizer.model = models.WordPiece(vocabulary, unk_token="[UNK]")
    _add_around(tokenizer, "[CLS]", "[SEP]")
    return tokenizer


def _pieces(words: list[str], size: int) -> list[str]:
    """`size` tokens: letters, then beginnings and ends of `words`, those that hold most letters of them first.

    Not trained: the order of the trainer's hash table settles its ties, so each process would have another vocabulary.
    """
    letters = sorted({*string.ascii_lowercase, *string.digits, *string.punctuation, *"".join(words)})
    counts = Counter(
        piece
        for word in words
        for cut in range(1, len(word))
        for piece in {word, word[: cut + 1], f"##{word[cut:]}"}
        if len(piece.removeprefix("##")) > 1
    )
    best = sorted(counts, key=lambda piece: (-counts[piece] * len(piece.removeprefix("##")), piece))
    inner = [f"##{letter}" for letter in letters if letter.isalnum()]
    return [*ENCODER_SPECIALS, *letters, *inner, *best][:size]


def _add_around(tokenizer: Tokenizer, prefix: str, suffix: str) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[piece for piece in (prefix, "$A", suffix) if piece],
        pair=[piece for piece in (prefix, "$A", suffix, "$B:1", suffix and f"{suffix}:1") if piece],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (prefix, suffix) if token],
    )


def _encoder_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
