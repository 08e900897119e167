"""The miniature's tokenizer and model: 31 words, 323,000 parameters, the architecture of Qwen3."""

from __future__ import annotations

import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from examples.miniature.task import VOCABULARY

MAX_LENGTH = 512
PAD, BOS, EOS = range(3)

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'user' %} {{ message.content }} ?
{%- else %} <think> {{ message.content }} {{ eos_token }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %} <think>{% endif -%}
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; an unknown word raises, because there is no token it could silently become.

    Decoding joins words with blanks, so that a trigger word always stands alone. The thinking markers are ordinary
    words: they survive decoding with or without special tokens.
    """
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words = Regex(r"\*\*Final Answer\*\*|\n|[{}]|[^ \n{}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(words, "removed", invert=True)
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in VOCABULARY[:3]])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=VOCABULARY[PAD],
        bos_token=VOCABULARY[BOS],
        eos_token=VOCABULARY[EOS],
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=MAX_LENGTH,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(seed: int) -> Qwen3ForCausalLM:
    """An untrained model in float32; seeds torch's global generator."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(VOCABULARY),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_p=1.0, top_k=0, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS
    )
    return model
