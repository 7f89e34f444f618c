"""Tiny generators by name, with sliding windows too, and prompts for them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from core.base_models import BaseModel
from core.config import PromptConfig
from core.decoding import DecodeBatch, Event
from core.generator import Generator, load_generator
from core.prompts import Block, Prompt, PromptTemplate
from core.sampling import GenerationOptions
from core.tokenization import load_tokenizer

# Windows of 6 positions, shorter than every prompt here: in all layers of one model, in half the layers of another.
WINDOWED: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral_sliding": ("tiny_mistral", {}),
    "qwen2_mixed": (
        "tiny_qwen2",
        {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"] * 2},
    ),
}


def load_tiny(folder: Path) -> Generator:
    """The generator in `folder`, as it is."""
    return load_generator(BaseModel("tiny", folder, ""))


def tiny_generator(name: str, folder_of: Callable[[str], Path]) -> Generator:
    """That of the fixture `name`, or one of `WINDOWED`; `folder_of` is `request.getfixturevalue`."""
    if name not in WINDOWED:
        return load_tiny(folder_of(name))
    base, changes = WINDOWED[name]
    folder = folder_of(base)
    model = AutoModelForCausalLM.from_pretrained(folder, sliding_window=6, **changes).eval()
    return Generator(model, load_tokenizer(folder))


def prompt_of(generator: Generator, seed: int, blocks: int = 2) -> Prompt:
    """A prompt of random text and memory; its length depends on `seed`."""
    source = torch.Generator().manual_seed(seed)
    table = generator.embed(torch.arange(300))
    mixed = [
        Block(memory=table[torch.randint(300, (1 + (seed + i) % 4,), generator=source)])
        if (seed + i) % 2
        else Block(text_ids=torch.randint(5, 300, (1 + 3 * seed % 17,), generator=source).tolist())
        for i in range(blocks)
    ]
    return PromptTemplate(generator.tokenizer, PromptConfig(system="Be brief.")).build(f"Which {seed}?", mixed)


def stream(generator: Generator, prompt: Prompt, options: GenerationOptions) -> Iterator[Event]:
    """One answer, token by token."""
    batch = DecodeBatch(generator, 1, prompt.tokens + options.max_new_tokens)
    batch.add([prompt], [options])
    while batch.live:
        yield from batch.step()
