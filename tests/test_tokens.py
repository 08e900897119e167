"""Tokens and text, with the kinds of tokenizers that models really have."""

import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from stepgrpo.config import ConfigError
from stepgrpo.hub import copy_tokenizer, load_tokenizer
from stepgrpo.tokens import Codec, TextStream

TEXT = "Wait, so x\n\nWait 等等 a😀b é Waiting"


def words(*, unk: bool) -> Codec:
    vocabulary = {w: i for i, w in enumerate(["<eos>", "Wait", "4", "5", "<unk>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>" if unk else None))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    tokenizer.add_special_tokens(["<eos>"])
    return Codec(tokenizer)


def byte_level(*pieces: str) -> Codec:
    spelling = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spelt = ["".join(s for s, _ in spelling.pre_tokenize_str(p)) for p in pieces]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate([*spelt, *alphabet])}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = spelling, decoders.ByteLevel()
    return Codec(tokenizer)


def byte_fallback() -> Codec:
    """As Llama 2's: blanks are part of words, characters outside the vocabulary are bytes."""
    vocabulary = {t: i for i, t in enumerate(["<unk>", *(f"<0x{b:02X}>" for b in range(256)), *"▁,abciWtgnosx"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Codec(tokenizer)


def test_a_directory_without_a_tokenizer_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.json: not there"):
        Codec.from_dir(tmp_path)


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="not a tokenizer"):
        Codec.from_dir(tmp_path)


def test_a_saved_tokenizer_comes_back(tmp_path):
    words(unk=True).tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert Codec.from_dir(tmp_path).encode("4 Wait 5") == [2, 1, 3]


def test_nothing_is_put_around_encoded_text():
    codec = words(unk=False)
    codec.tokenizer.post_processor = processors.TemplateProcessing(
        single="<eos> $A <eos>", special_tokens=[("<eos>", 0)]
    )
    codec.tokenizer.enable_padding(length=9)
    codec.tokenizer.enable_truncation(1)
    assert Codec(codec.tokenizer).encode("4 Wait 5") == [2, 1, 3]


@pytest.mark.parametrize("unk", [True, False])
def test_text_outside_the_vocabulary_is_refused_by_name(unk):
    with pytest.raises(ValueError, match="cannot encode '4 Stop 5'"):
        words(unk=unk).encode("4 Stop 5")


def test_text_that_a_tokenizer_drops_silently_is_refused():
    codec = Codec(Tokenizer(models.BPE({"a": 0, "b": 1}, [])))
    assert codec.tokenizer.encode("acb").ids == [0, 1]
    with pytest.raises(ValueError, match="comes back as"):
        codec.encode("acb")


def test_decoding_keeps_special_tokens():
    codec = words(unk=True)
    assert codec.decode([2, 1, 3, 0]) == "4 Wait 5 <eos>"
    assert TextStream(codec).feed([2, 1, 3, 0]) == "4 Wait 5 <eos>"


def test_a_text_is_a_single_token_or_none():
    codec = words(unk=False)
    assert codec.single_token("Wait") == 1
    assert codec.single_token("Wait 4") is None
    with pytest.raises(ValueError, match="cannot encode"):
        codec.single_token("}")


@pytest.mark.parametrize("chunk_size", [1, 3, 100])
@pytest.mark.parametrize(
    "codec",
    [byte_level(), byte_level(" Wait", "Wait", "x\n\nWait"), byte_fallback()],
    ids=["bytes", "pieces", "fallback"],
)
def test_a_stream_gives_the_text_that_decoding_at_once_gives(codec, chunk_size):
    ids = codec.encode(TEXT)
    stream = TextStream(codec)
    text = "".join(stream.feed(ids[a : a + chunk_size]) for a in range(0, len(ids), chunk_size)) + stream.finish()
    assert text == codec.decode(ids) == TEXT
    assert len(stream.offsets) == len(ids)


@pytest.mark.parametrize("codec", [byte_level(), byte_fallback()], ids=["bytes", "fallback"])
def test_each_character_lies_in_the_token_that_holds_its_first_byte(codec):
    ids = codec.encode(TEXT)
    stream = TextStream(codec)
    stream.feed(ids)
    for text in ("等等", "😀", "b é", "é", "Waiting"):
        token = stream.token_at(TEXT.index(text))
        assert codec.decode(ids[:token]) == TEXT[: TEXT.index(text)]
        assert codec.decode(ids[token:]).startswith(text)


def test_a_token_that_ends_in_half_a_character_holds_that_character():
    # " 等" is the bytes 20 E7 AD 89; the first piece holds the blank and one byte of three.
    codec = byte_level()
    blank, e7, ad, x89, *_ = codec.encode(" 等 Wait")
    spelling = codec.tokenizer.id_to_token(blank) + codec.tokenizer.id_to_token(e7)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate([*alphabet, spelling])}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = codec.tokenizer.pre_tokenizer, decoders.ByteLevel()
    stream = TextStream(Codec(tokenizer))
    assert stream.feed([len(alphabet), ad, x89, codec.encode("W")[0]]) == " 等W"
    assert stream.offsets == [0, 2, 2, 2]
    assert [stream.token_at(i) for i in range(3)] == [0, 0, 3]


def test_bytes_that_turn_out_to_be_no_character_stop_nothing():
    codec = byte_fallback()
    newline, stray = (codec.tokenizer.token_to_id(t) for t in ("<0x0A>", "<0xE7>"))
    a, b = codec.tokenizer.token_to_id("a"), codec.tokenizer.token_to_id("b")
    stream = TextStream(codec)
    text = stream.feed([a, newline, stray, a, b]) + stream.finish()
    assert text.startswith("a") and text.endswith("ab") and "�" in text
    assert len(stream.offsets) == 5 and stream.token_at(len(text) - 1) == 4


def test_accents_that_a_tokenizer_composes_are_spelt():
    vocabulary = {c: i for i, c in enumerate("aé�")}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="�"))
    tokenizer.normalizer, tokenizer.decoder = normalizers.NFC(), decoders.Fuse()
    codec = Codec(tokenizer)
    assert codec.encode("ae\u0301") == [0, 1]
    with pytest.raises(ValueError, match=r"cannot encode 'b{80}'\.\.\.: it comes back as '�{80}'\.\.\.; use"):
        codec.encode("b" * 1000)


def test_blanks_between_words_belong_to_the_word_after_them():
    stream = TextStream(words(unk=False))
    assert stream.feed([2, 1]) + stream.feed([3]) == "4 Wait 5"
    assert stream.offsets == [0, 1, 6]
    assert stream.token_at(2) == 1


def test_a_text_that_ends_within_a_character_is_flushed():
    codec = byte_level()
    ids = codec.encode("a等")[:-1]
    stream = TextStream(codec)
    assert stream.feed(ids) == "a"
    assert stream.finish() == "�"


def test_random_bytes_decode_alike_in_any_chunks():
    codec, rng = byte_level("Wait"), random.Random(0)
    for _ in range(50):
        ids = [rng.randrange(257) for _ in range(60)]
        results = set()
        for size in (1, 2, 7, 60):
            stream = TextStream(codec)
            text = "".join(stream.feed(ids[a : a + size]) for a in range(0, 60, size)) + stream.finish()
            results.add((text, tuple(stream.offsets)))
        assert len(results) == 1
        assert results.pop()[0] == codec.decode(ids)


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "Qwen2Tokenizer", "LlamaTokenizer"])
def test_prompts_are_spelt_by_the_checkpoints_own_file_whatever_its_tokenizer_is_called(
    tmp_path: Path, name: str
) -> None:
    codec = byte_level()
    checkpoint, copy = tmp_path / "checkpoint", tmp_path / "copy"
    checkpoint.mkdir()
    copy.mkdir()
    (checkpoint / "config.json").write_text('{"model_type": "qwen3"}')
    codec.tokenizer.save(str(checkpoint / "tokenizer.json"))
    (checkpoint / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    more = "additional_chat_templates/tools.jinja"
    (checkpoint / more).parent.mkdir()
    (checkpoint / more).write_text("{{ tools }}")
    copy_tokenizer(str(checkpoint), copy)
    assert (copy / more).read_text() == "{{ tools }}"
    (copy / "config.json").write_text('{"model_type": "qwen3"}')
    for directory in (checkpoint, copy):
        tokenizer = load_tokenizer(str(directory))
        said = [{"role": "user", "content": "1 + 2?  Wait\n"}]
        ids = tokenizer.apply_chat_template(said, tokenize=True, return_dict=False)
        assert ids == codec.encode("1 + 2?  Wait\n")
    left, right = ({p.name: p.read_bytes() for p in d.rglob("*") if p.is_file()} for d in (checkpoint, copy))
    assert left == right


def test_a_checkpoint_without_its_fast_tokenizer_is_refused_with_what_writes_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "vocab.json").write_text("{}")
    for read in (lambda: load_tokenizer(str(tmp_path)), lambda: copy_tokenizer(str(tmp_path), tmp_path / "copy")):
        with pytest.raises(ConfigError, match=r"^model\.path: .*tokenizer\.json: not there; .*save_pretrained"):
            read()
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"^model\.path: .* without a usable tokenizer"):
        load_tokenizer(str(tmp_path))
