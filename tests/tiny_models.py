"""Tiny random models with real tokenizers, saved as ordinary model folders."""

import copy
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GenerationConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

IM_START, IM_END, PAD = "<|im_start|>", "<|im_end|>", "<pad>"
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, three special tokens, and a ChatML template."""
    vocabulary = {character: index for index, character in enumerate(BYTES)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([IM_START, IM_END, PAD])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=IM_START,
        eos_token=IM_END,
        pad_token=PAD,
        model_max_length=2048,
        chat_template=CHAT_TEMPLATE,
    )


def tiny_llama_config(**changes: object) -> LlamaConfig:
    """Two layers, hidden 64, four query heads on two key-value heads, tied embeddings as in SmolLM2."""
    settings = {
        "vocab_size": len(BYTES) + 3,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "bos_token_id": len(BYTES),
        "eos_token_id": len(BYTES) + 1,
        "pad_token_id": len(BYTES) + 2,
        "initializer_range": 0.1,
    }
    return LlamaConfig(**{**settings, **changes})


def random_causal_lm(config: PreTrainedConfig, seed: int = 0) -> torch.nn.Module:
    """A float32 model in eval mode with a configuration of its own; the global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # The model keeps the object that it is given, and its attention is a setting there.
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32).eval()


def save_tiny_model(folder: Path, seed: int = 0) -> Path:
    """A random Llama with a byte-level tokenizer and its generation configuration."""
    config = tiny_llama_config()
    random_causal_lm(config, seed).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    ).save_pretrained(folder)
    return folder


def save_tiny_encoder(folder: Path, seed: int = 0) -> Path:
    """A random BERT encoder (hidden 32) with a byte-level tokenizer."""
    vocabulary = {character: index for index, character in enumerate(BYTES)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"])
    special_ids = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special_ids)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        mask_token="[MASK]",
        model_max_length=512,
    )
    config = BertConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        initializer_range=0.5,
        pad_token_id=fast.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        BertModel(config).eval().save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder
