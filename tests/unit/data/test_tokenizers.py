import subprocess
import sys
from typing import get_args

import pytest
from tokenizers import Tokenizer, models
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from distill_system.config.data import EmbeddedSplit
from distill_system.data import build_tokenizer, tokenizer_texts
from distill_system.data.embedded_tasks import generate_tasks
from distill_system.errors import DataError, ModelError

SPLITS: tuple[EmbeddedSplit, ...] = get_args(EmbeddedSplit)


@pytest.fixture(scope="module")
def all_texts():
    tasks = [task for split in SPLITS for task in generate_tasks(split, 1200, seed=11)]
    return [text for task in tasks for text in (task.prompt, *task.references)]


def test_embedded_texts_survive_encoding_without_unknown_words(build_config, all_texts):
    tokenizer = build_tokenizer(build_config(), None)
    encoded = tokenizer(all_texts)["input_ids"]
    assert tokenizer.batch_decode(encoded) == all_texts
    assert tokenizer.unk_token_id not in {token for ids in encoded for token in ids}


def test_embedded_vocabulary_holds_nothing_that_no_task_uses(build_config, all_texts):
    tokenizer = build_tokenizer(build_config(), None)
    used = {token for ids in tokenizer(all_texts)["input_ids"] for token in ids}
    unused = set(range(4, len(tokenizer))) - used
    # letters that no word holds, and a zero that begins a number
    names = {token.strip("▁") for token in tokenizer.convert_ids_to_tokens(sorted(unused))}
    assert names <= set("jqvxz0")
    assert 190 <= len(tokenizer) <= 210


def test_embedded_special_tokens_and_digits(build_config):
    tokenizer = build_tokenizer(build_config(), None)
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<eos>", "<sep>"]) == [0, 1, 2]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    ids = tokenizer("add: 12 plus 5<sep>")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁add", ":", "▁1", "2", "▁plus", "▁5", "<sep>"]
    assert tokenizer.decode([*ids, 1, 0, 0], skip_special_tokens=True) == "add: 12 plus 5"
    assert tokenizer("zebra!")["input_ids"][0] == tokenizer.unk_token_id


def test_whole_examples_stay_within_64_tokens(build_config):
    tokenizer = build_tokenizer(build_config(), None)
    for split in SPLITS:
        tasks = generate_tasks(split, 2000, seed=2)
        texts = [f"{task.prompt}<sep>{max(task.references, key=len)}<eos>" for task in tasks]
        assert max(map(len, tokenizer(texts)["input_ids"])) <= 64


def test_a_saved_embedded_tokenizer_is_the_same_under_autotokenizer(
    build_config, all_texts, tmp_path
):
    tokenizer = build_tokenizer(build_config(), None)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    texts = [text + "<sep>" for text in all_texts[:500]]
    encoded = tokenizer(texts)["input_ids"]
    assert loaded(texts)["input_ids"] == encoded
    for skip in (False, True):
        decoded = loaded.batch_decode(encoded, skip_special_tokens=skip)
        assert decoded == tokenizer.batch_decode(encoded, skip_special_tokens=skip)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert (loaded.pad_token_id, loaded.eos_token_id) == (0, 1)


def test_decoding_token_by_token_gives_the_same_text(build_config):
    tokenizer = build_tokenizer(build_config(), None)  # as vLLM decodes while it generates
    text = "here is the list: 12 cat; a, b."
    stream = DecodeStream(tokenizer("add: 1 plus 2<sep>")["input_ids"], skip_special_tokens=True)
    ids = tokenizer(text)["input_ids"]
    pieces = [stream.step(tokenizer.backend_tokenizer, token) or "" for token in ids]
    assert "".join(pieces).strip() == text


def test_a_trained_tokenizer_restores_any_text_and_sets_its_special_tokens(build_config, tmp_path):
    config = build_config(tokenizer={"type": "train_bpe", "vocab_size": 320})
    tokenizer = build_tokenizer(config, tokenizer_texts(config))
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == 320
    special = (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id)
    assert special == (0, 1, 2)
    for text in ("Zwei Männer — draußen.\n", "  two  spaces", "日本 🙂", "it 's n't . a"):
        ids = tokenizer(text)["input_ids"]
        assert loaded.decode(ids) == tokenizer.decode(ids) == text
    trained = len(tokenizer("reverse the words:")["input_ids"])
    assert trained < len("reverse the words:")  # merges were learned


def test_training_twice_gives_the_same_tokenizer_in_another_process(build_config, tmp_path):
    config = build_config(tokenizer={"type": "train_bpe", "vocab_size": 400})
    here = build_tokenizer(config, tokenizer_texts(config)).backend_tokenizer.to_str()
    program = (
        "import sys; from distill_system.config.run import RunConfig;"
        "from distill_system.data import build_tokenizer, tokenizer_texts;"
        "config = RunConfig.model_validate_json(sys.stdin.read());"
        "print(build_tokenizer(config, tokenizer_texts(config)).backend_tokenizer.to_str())"
    )
    there = subprocess.run(
        [sys.executable, "-c", program],
        input=config.model_dump_json(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert there.stdout.strip() == here


def test_training_without_text_is_refused(build_config):
    with pytest.raises(DataError, match="expected texts to train on"):
        build_tokenizer(build_config(tokenizer={"type": "train_bpe", "vocab_size": 300}), [])


def test_only_trained_tokenizers_ask_for_texts(build_config):
    assert tokenizer_texts(build_config()) is None
    stream = tokenizer_texts(build_config(tokenizer={"type": "train_bpe", "vocab_size": 300}))
    assert stream is not None
    texts = list(stream)
    tasks = generate_tasks("train", 40, 0)
    assert texts == [text for task in tasks for text in (task.prompt + "<sep>", task.answer)]


def test_a_chat_cannot_train_a_tokenizer(build_config, write_jsonl):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    path = write_jsonl("chat.jsonl", [{"messages": chat}])
    source = {"type": "jsonl", "path": str(path), "fields": {"format": "messages"}}
    config = build_config(
        tokenizer={"type": "train_bpe", "vocab_size": 300}, data={"teacher_sft": source}
    )
    texts = tokenizer_texts(config)
    with pytest.raises(DataError, match=r"chat.jsonl:1 is a chat.*no chat template"):
        build_tokenizer(config, texts)


def save_ready_tokenizer(folder, **special):
    core = Tokenizer(models.WordLevel({"<end>": 0, "word": 1}, unk_token="word"))
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder)


def test_a_ready_tokenizer_comes_from_the_teacher_unless_a_path_is_given(build_config, tmp_path):
    save_ready_tokenizer(tmp_path / "teacher", eos_token="<end>")
    save_ready_tokenizer(tmp_path / "other", eos_token="word")
    teacher = {"path": str(tmp_path / "teacher")}
    own = build_config(tokenizer={"type": "pretrained"}, teacher=teacher, student=teacher)
    tokenizer = build_tokenizer(own, None)
    assert tokenizer.eos_token == tokenizer.pad_token == "<end>"
    given = {"type": "pretrained", "path": str(tmp_path / "other")}
    other = build_config(tokenizer=given, teacher=teacher, student=teacher)
    assert build_tokenizer(other, None).eos_token == "word"


@pytest.mark.parametrize("content", [None, "{", '{"model": 3}'])
def test_a_tokenizer_that_cannot_be_loaded_names_the_key_and_the_path(
    build_config, tmp_path, content
):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    wanted = {"type": "pretrained", "path": str(tmp_path)}
    with pytest.raises(ModelError, match=r"tokenizer\.path: no tokenizer could be loaded") as info:
        build_tokenizer(build_config(tokenizer=wanted), None)
    assert str(tmp_path) in str(info.value)


def test_a_tokenizer_without_an_end_of_sequence_token_is_refused(build_config, tmp_path):
    save_ready_tokenizer(tmp_path, pad_token="<end>")
    wanted = {"type": "pretrained", "path": str(tmp_path)}
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        build_tokenizer(build_config(tokenizer=wanted), None)
