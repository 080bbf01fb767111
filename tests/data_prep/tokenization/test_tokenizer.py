"""Training, loading, conversion and hashing of tokenizers, and sampling of their training text."""

import hashlib
import io
import json
import unicodedata

import pytest
import sentencepiece
from transformers import AutoTokenizer

from data_prep.tokenization.chat_template import ChatEncoder
from data_prep.tokenization.sampling import sample_texts
from data_prep.tokenization.sentencepiece_models import ROLES, train_tokenizer
from data_prep.tokenization.tokenizer import (
    TEMPLATE_DATE,
    chat_template_hash,
    fingerprint,
    load_packed_tokenizer,
    load_tokenizer,
    save_tokenizer,
)
from pipeline.common.errors import UserError

TEXTS = ["hello world", "two\nlines", " a  b ", "١٢٣ 12 years", "สวัสดี", "🦒 never seen", "", "<s> no token"]


def test_tokenizer_loads_with_transformers_and_restores_text(tokenizer_dir):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    for text in TEXTS[:-1]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text


def test_tokenizer_has_distinct_special_tokens_and_single_digits(tokenizer_dir):
    tokenizer = load_tokenizer(tokenizer_dir)
    special = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token, *ROLES]
    ids = [tokenizer(token, add_special_tokens=False)["input_ids"] for token in special]
    assert all(len(tokens) == 1 for tokens in ids) and len({tokens[0] for tokens in ids}) == len(special)
    digits = [
        token for token in tokenizer.get_vocab() if any(c.isdigit() for c in token) and not token.startswith("<0x")
    ]
    assert digits and all(len(token) == 1 for token in digits)


def test_fingerprint_depends_on_text_and_template(tokenizer_dir, demo_file, tmp_path):
    first = load_tokenizer(tokenizer_dir)
    again = train_tokenizer(sample_texts([demo_file], 0.5, 1_000_000), 512)
    save_tokenizer(again, tmp_path / "again")
    assert fingerprint(first) == fingerprint(again) == fingerprint(load_tokenizer(tmp_path / "again"))
    first(["short", "longer text"], padding=True, truncation=True, max_length=8)  # changes the state of the backend
    assert fingerprint(first) == fingerprint(again)
    first.chat_template += " "
    assert fingerprint(first) != fingerprint(again)


def earlier_fingerprint(tokenizer):
    """Return the fingerprint that earlier versions recorded in manifests."""
    everything = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
    everything["special"] = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    everything["chat_template"] = tokenizer.get_chat_template()
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()


def test_load_packed_tokenizer_ignores_decoder_and_accepts_earlier_fingerprint(tokenizer_dir, tmp_path):
    """Library versions write decoder and post-processor differently, but they do not change the tokens."""
    original = load_tokenizer(tokenizer_dir)
    original.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    rules = json.loads(file.read_text())
    assert rules["decoder"]
    file.write_text(json.dumps({**rules, "decoder": {"type": "Fuse"}, "post_processor": None}))
    assert fingerprint(load_tokenizer(tmp_path)) == fingerprint(original)

    earlier = earlier_fingerprint(original)
    assert earlier != fingerprint(original)
    packed = load_packed_tokenizer(tokenizer_dir, tmp_path, {"tokenizer": {"fingerprint": earlier}})
    packed.save_pretrained(tmp_path / "trained")  # as in a checkpoint
    load_tokenizer(tmp_path / "trained")
    file.write_text(json.dumps({**rules, "normalizer": {"type": "Lowercase"}}))
    with pytest.raises(UserError, match="packed with a tokenizer that differs"):
        manifest = {"tokenizer": {"fingerprint": earlier}, "chat_template_sha256": chat_template_hash(original)}
        load_packed_tokenizer(tmp_path, tmp_path / "shards", manifest)


def test_load_packed_tokenizer_explains_shards_with_date_of_packing(tokenizer_dir, tmp_path):
    tokenizer = load_tokenizer(tokenizer_dir)
    tokenizer.chat_template = "{{ strftime_now('%d %b') }}" + tokenizer.chat_template
    manifest = {"tokenizer": {"fingerprint": fingerprint(tokenizer)}}  # of the template with its clock
    tokenizer.save_pretrained(tmp_path / "dated")
    with pytest.raises(UserError, match=r"wrote the date of that packing \(strftime_now\); pack again"):
        load_packed_tokenizer(tmp_path / "dated", tmp_path / "shards", manifest)
    fixed = load_tokenizer(tmp_path / "dated")
    manifest = {"tokenizer": {"fingerprint": fingerprint(fixed)}, TEMPLATE_DATE: fixed.init_kwargs[TEMPLATE_DATE]}
    load_packed_tokenizer(tmp_path / "dated", tmp_path / "shards", manifest)


@pytest.mark.parametrize("name", ["bos_token", "messages", "not a name"])
def test_load_tokenizer_refuses_variables_that_templates_cannot_take(name, tokenizer_dir):
    with pytest.raises(UserError, match=f"{name}' is not a variable of chat templates that can be set"):
        load_tokenizer(tokenizer_dir, chat_template_kwargs={name: ""})


@pytest.mark.parametrize("declared", ["TokenizersBackend", "Qwen2Tokenizer", None])
def test_load_tokenizer_next_to_a_model_config_keeps_its_rules(declared, tokenizer_dir, tmp_path):
    """For qwen2, AutoTokenizer would use the family's class, whose pre-tokenizer replaces the trained one."""
    trained = load_tokenizer(tokenizer_dir)
    trained.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": declared}))
    for for_training in (True, False):
        assert fingerprint(load_tokenizer(tmp_path, for_training=for_training)) == fingerprint(trained)


def test_load_tokenizer_not_for_training_accepts_what_training_refuses(tokenizer_dir, tmp_path):
    tokenizer = load_tokenizer(tokenizer_dir)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no chat template"):
        load_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path, for_training=False).chat_template is None


@pytest.mark.parametrize("pad", [None, "</s>"])
def test_load_tokenizer_accepts_eos_or_no_token_for_padding(pad, tokenizer_dir, tmp_path):
    tokenizer = load_tokenizer(tokenizer_dir)
    tokenizer.pad_token = pad
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.pad_token_id == loaded.eos_token_id and len(loaded) == len(tokenizer)


@pytest.mark.parametrize("broken", ["missing", "empty", "no template", "broken template", "two templates", "no eos"])
def test_load_tokenizer_rejects_unusable_directory(broken, tokenizer_dir, tmp_path):
    folder = tmp_path / "tok"
    if broken != "missing":
        folder.mkdir()
    if broken not in ("missing", "empty"):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
        if broken == "no template":
            tokenizer.chat_template = None
        elif broken == "broken template":
            tokenizer.chat_template = "{% for %}"
        elif broken == "two templates":
            tokenizer.chat_template = {"one": "a", "two": "b"}
        else:
            tokenizer.eos_token = None
        tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=str(folder)):
        load_tokenizer(folder)


def test_train_rejects_empty_text():
    with pytest.raises(UserError, match="SentencePiece"):
        train_tokenizer([], 512)


def test_save_rejects_existing_directory(tokenizer_dir):
    with pytest.raises(UserError, match="already exists"):
        save_tokenizer(load_tokenizer(tokenizer_dir), tokenizer_dir)


def test_sample_texts_weights_languages_by_alpha(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [("en", "word" * 5)] * 90 + [("sw", "neno" * 5)] * 10
    lines = [
        json.dumps({"pair_id": str(i), "lang": lang, "question": text, "answer": text})
        for i, (lang, text) in enumerate(rows)
    ]
    path.write_text("\n".join(lines))

    def fraction(alpha: float) -> float:
        texts = list(sample_texts([path], alpha, 10_000))
        return sum(text.startswith("neno") for text in texts) / len(texts)

    assert fraction(1.0) == pytest.approx(0.1, abs=0.02)
    assert fraction(0.5) == pytest.approx(0.25, abs=0.02)
    assert fraction(0.0) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("settings", [
    {"model_type": "unigram"},
    {"model_type": "bpe", "pad_id": 3, "byte_fallback": True},
    {"model_type": "unigram", "split_by_whitespace": False},
    {"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    {"model_type": "bpe", "normalization_rule_name": "identity", "byte_fallback": True},
    {"model_type": "unigram", "add_dummy_prefix": False, "remove_extra_whitespaces": False, "byte_fallback": True,
     "user_defined_symbols": ["<tool>", "\n"]},
])  # fmt: skip
def test_load_tokenizer_converts_sentencepiece_models(settings, demo_file, tmp_path):
    texts = list(sample_texts([demo_file], 1.0, 1_000_000))
    model = io.BytesIO()
    settings = {"vocab_size": 500, "hard_vocab_limit": False, "minloglevel": 2, **settings}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=model, **settings)
    (tmp_path / "some.model").write_bytes(model.getvalue())
    tokenizer = load_tokenizer(tmp_path / "some.model")
    reference = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    decomposed = [unicodedata.normalize("NFD", text) for text in ("Việt", "क़लम", "한국어 값", "がぎ")]
    symbols = ["<tool>", "a<tool>b\n", " <tool> <tool>x"] if "user_defined_symbols" in settings else []
    for text in [*texts, "never seen 🦒", "a  b", "ﬁ", "\na\n", *decomposed, *symbols]:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == reference.encode(text)
    (tokens,) = ChatEncoder(tokenizer).encode(
        [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]
    )
    assert tokenizer.convert_ids_to_tokens([~t for t in tokens if t < 0])[-1] == tokenizer.eos_token == "</s>"
    save_tokenizer(tokenizer, tmp_path / "saved")
    assert fingerprint(load_tokenizer(tmp_path / "saved")) == fingerprint(tokenizer)


@pytest.mark.parametrize("settings", [{}, {"add_dummy_prefix": False}])
def test_load_tokenizer_refuses_symbols_next_to_which_spaces_change(settings, demo_file, tmp_path):
    """SentencePiece normalizes the text around a user-defined symbol as one text, tokenizers each part of it."""
    texts, model = sample_texts([demo_file], 1.0, 1_000_000), io.BytesIO()
    settings = {"vocab_size": 500, "hard_vocab_limit": False, "minloglevel": 2, "byte_fallback": True, **settings}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts, model_writer=model, user_defined_symbols=["<tool>"], **settings
    )
    (tmp_path / "some.model").write_bytes(model.getvalue())
    with pytest.raises(UserError, match=r"some\.model: cannot be converted exactly \('.*<tool>.*' is tokenized diff"):
        load_tokenizer(tmp_path / "some.model")


def test_load_tokenizer_rejects_invalid_sentencepiece_model(tmp_path):
    for content in (b"", b"junk", b"\x0a\x03abc"):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(UserError, match=r"bad\.model"):
            load_tokenizer(tmp_path / "bad.model")
    with pytest.raises(UserError, match="No such file"):
        load_tokenizer(tmp_path / "none.model")


def test_load_tokenizer_distinguishes_hub_ids_from_paths(tmp_path, monkeypatch):
    requested = []

    def from_pretrained(name, **settings):
        requested.append((name, settings["trust_remote_code"]))
        raise OSError("no such model\nand much more")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("runs/tok", "./tok", "/none/tok", "a/b/c"):
        with pytest.raises(UserError, match="no such tokenizer directory; give that of a model or tokenizer, or train"):
            load_tokenizer(name)
    assert not requested
    with pytest.raises(UserError, match=r"^Some/Model: cannot be loaded as a tokenizer \(no such model\)$"):
        load_tokenizer("Some/Model")
    assert requested == [("Some/Model", False)]


def test_train_tokenizer_reads_long_texts() -> None:
    """A chain of thought may have more bytes than SentencePiece reads of a sentence."""
    tokenizer = train_tokenizer(["ab", "สวัสดี " * 6000], 280)
    assert len(tokenizer.tokenize("สวัสดี")) < 6
