"""edge-speq chat: piped, as JSON, and typed on a terminal."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
from support.schemas import schema

from edge_speq import EdgeError, EdgeLlama
from edge_speq.cli.conversation import Conversation

SCHEMA = schema("run")


def chat(said: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edge_speq", "chat", "-t", "1", *arguments],
        input=said,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def objects(said: str, *arguments: str) -> list[dict]:
    done = chat(said, "--json", *arguments)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def llm(bundled: tuple[Path, Path]) -> Iterator[EdgeLlama]:
    model = EdgeLlama(str(bundled[0]), n_ctx=256, n_threads=1, n_threads_batch=1)
    yield model
    model.close()


@pytest.fixture
def conversation(llm: EdgeLlama) -> Conversation:
    return Conversation(llm, "Be brief.", n_predict=12, temperature=0.0, seed=7)


# --- piped -------------------------------------------------------------------------------------------------


def test_each_piped_line_is_a_turn_and_stdout_holds_replies_only() -> None:
    done = chat("Hello there\n\nWhat is a house?\n", "-n", "16")
    assert done.returncode == 0, done.stderr
    replies = done.stdout.splitlines()
    assert len(replies) == 2
    assert all(len(reply) > 8 for reply in replies)
    assert ">>>" not in done.stdout
    assert done.stderr == ""


def test_json_is_one_object_a_turn_with_the_statistics_of_run() -> None:
    first, second = objects("Hello there\nWhat is a house?\n", "-n", "16")
    for reply in (first, second):
        assert set(reply) == {"role", "content", "finish_reason", "stats"}
        assert reply["role"] == "assistant"
        assert reply["content"]
        jsonschema.validate({"text": reply["content"]} | reply["stats"], SCHEMA)
    assert second["stats"]["n_prompt"] > 2 * first["stats"]["n_prompt"]  # the first turn is in the second prompt


def test_the_first_reply_is_what_the_library_says(bundled: tuple[Path, Path]) -> None:
    (reply,) = objects("What is a house?", "-n", "16", "--seed", "3", "--system", "Be brief.")
    target, draft = bundled
    model = EdgeLlama(str(target), draft=draft, resident="1/2", n_ctx=1024, n_threads=1, n_threads_batch=1)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a house?"}]
    said = model.create_chat_completion(messages, max_tokens=16, seed=3, temperature=0.8)
    model.close()
    assert reply["content"] == said["choices"][0]["message"]["content"]
    assert reply["finish_reason"] == said["choices"][0]["finish_reason"]


def test_a_message_between_quotes_has_several_lines_and_is_no_command() -> None:
    one, quoted, open_end = (
        objects(said, "-n", "4", "--seed", "1") for said in ("a\n/clear\nb", '"""a\n/clear\nb"""', '"""a\n/clear\nb')
    )
    assert len(one) == 2
    assert len(quoted) == 1
    assert quoted[0]["stats"]["n_prompt"] == open_end[0]["stats"]["n_prompt"] > one[0]["stats"]["n_prompt"]


def test_commands() -> None:
    done = chat("/help\nHello\n/stats\n/nonsense\n/usr/bin is a folder\n/exit\nNever said\n", "-n", "6")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 2  # a path is a message
    for text in ("/regen", "tok/s", "/nonsense is not a command"):
        assert text in done.stderr


def test_clear_forgets_and_system_is_kept() -> None:
    said = "Hello\n/clear\nHello\n/system\n/clear\nHello\n/system Be very brief indeed, please.\n/clear\nHello\n"
    counts = [reply["stats"]["n_prompt"] for reply in objects(said, "-n", "6", "--system", "Be brief.")]
    first, second, without, longer = (b - a for a, b in zip([0, *counts], counts, strict=False))
    assert without < first == second < longer


def test_regen_says_something_else() -> None:
    first, second, third = objects("Tell me a long story\n/regen\n/regen\n", "-n", "16", "--seed", "7")
    assert len({first["content"], second["content"], third["content"]}) == 3
    assert second["stats"]["n_prompt"] == 2 * first["stats"]["n_prompt"]  # the same prompt


def test_a_full_context_forgets_the_oldest_turns_and_says_so_once() -> None:
    done = chat("Tell me about the old house at the end of the lane\n" * 8, "-n", "48", "-c", "200", "--json")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 8
    assert done.stderr.count("the oldest messages are forgotten") == 1
    assert len(done.stderr.splitlines()) == 1


def test_a_message_longer_than_the_context_is_refused() -> None:
    done = chat("word " * 300, "-c", "200")
    assert done.returncode == 1
    assert done.stderr.startswith("error: the message makes a prompt of ")
    assert "hint:" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_without_chat_template_says_what_is_used(tiny, tmp_path: Path) -> None:
    data = tiny.moe("qwen3moe").read_bytes()
    assert data.count(b"tokenizer.chat_template") == 1
    without = tmp_path / "without.gguf"
    without.write_bytes(data.replace(b"tokenizer.chat_template", b"tokenizer.no_template__"))
    done = chat("Hello\n", str(without), "-n", "4", "-c", "128")
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == ["note: the model has no chat template, llama-2 is used: replies may be poor"]


def test_bytes_that_are_no_text_are_taken() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "edge_speq", "chat", "-n", "4"], input=b"caf\xe9\n", capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


# --- history -----------------------------------------------------------------------------------------------


def test_a_reply_that_is_stopped_stays_as_far_as_it_went(conversation: Conversation) -> None:
    pieces = conversation.ask("What is a house?")
    said = next(pieces) + next(pieces)
    pieces.close()
    assert conversation.turns == [("What is a house?", said)]
    assert conversation.finish_reason == "interrupted"
    assert "".join(conversation.ask("And a lane?"))
    assert len(conversation.turns) == 2


def test_a_reply_that_is_stopped_before_it_began_leaves_nothing(conversation: Conversation) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    list(conversation.ask("What is a house?"))
    before = list(conversation.turns)
    conversation._complete = interrupted  # type: ignore[method-assign]
    for pieces in (conversation.ask("And a lane?"), conversation.ask_again()):
        with pytest.raises(KeyboardInterrupt):
            list(pieces)
        assert conversation.turns == before


def test_the_prompt_is_counted_as_it_is_decoded(conversation: Conversation, llm: EdgeLlama) -> None:
    before = llm.stats().timing.n_prompt
    expected = conversation._count(conversation._messages("What is a house?"))
    list(conversation.ask("What is a house?"))
    assert llm.stats().timing.n_prompt - before == expected


def test_forgetting_leaves_room_for_a_reply(llm: EdgeLlama) -> None:
    conversation = Conversation(llm, "Be brief.", n_predict=0, temperature=0.8, seed=7)
    for _ in range(6):
        list(conversation.ask("Tell me about the old house at the end of the lane."))
        messages = conversation._fit("And then?")
        assert messages[0] == {"role": "system", "content": "Be brief."}
        assert conversation._count(messages) <= 256 - 64 or not conversation.turns
    assert conversation.n_forgotten > 0


def test_a_template_that_refuses_is_one_message(conversation: Conversation, llm: EdgeLlama) -> None:
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    refuses = Jinja2ChatFormatter("{{ raise_exception('no system, please') }}", eos_token="", bos_token="")
    llm.chat_handler = refuses.to_chat_handler()
    try:
        with pytest.raises(EdgeError, match="no system, please"):
            next(conversation.ask("Hello"))
    finally:
        llm.chat_handler = None
    assert conversation.turns == []


def test_there_is_nothing_to_say_again_at_first(conversation: Conversation) -> None:
    with pytest.raises(EdgeError, match="no reply to write again"):
        next(conversation.ask_again())


# --- typed -------------------------------------------------------------------------------------------------


# Python's readline notices a signal only while it waits for a key, not in the moment in which it shows the last one
SETTLE = 0.1
LONG = "Tell me about the old house at the end of the lane"  # greedily, the demo says a thousand tokens to this


def typed(*arguments: str):
    pytest.importorskip("termios")
    from support.terminal import Terminal

    return Terminal("-m", "edge_speq", "chat", "-t", "1", *arguments)


def test_a_typed_conversation_ends_with_ctrl_d() -> None:
    with typed("-n", "8") as terminal:
        terminal.read_until(">>> ")
        terminal.type("Hellp\x7fo\n")  # a slip, taken back
        shown = terminal.read_until(">>> ")
        assert len(shown.split("\n")) > 2  # what was typed, the reply
        terminal.type("\x1b[A\n")  # the line before, from the history
        assert "Hello" in terminal.read_until(">>> ")
        terminal.type("\x04")
        assert terminal.wait() == 0
        assert terminal.is_unchanged()


def test_ctrl_c_at_the_prompt_leaves() -> None:
    with typed() as terminal:
        terminal.read_until(">>> ")
        terminal.type("half a line")
        terminal.read_until("line")
        time.sleep(SETTLE)
        terminal.interrupt()
        assert terminal.wait() == 130
        assert terminal.is_unchanged()
        assert "Traceback" not in terminal.text
        assert "KeyboardInterrupt" not in terminal.text


def test_ctrl_c_within_quotes_leaves() -> None:
    with typed() as terminal:
        terminal.read_until(">>> ")
        terminal.type('"""some\n')
        terminal.read_until("... ")
        time.sleep(SETTLE)
        terminal.interrupt()
        assert terminal.wait() == 130
        assert terminal.is_unchanged()


def test_ctrl_c_stops_a_reply_and_the_conversation_goes_on() -> None:
    with typed("--temp", "0") as terminal:
        terminal.read_until(">>> ")
        for _ in range(3):
            terminal.type(f"/clear\n{LONG}\n")
            terminal.read_until(f"{LONG}\r\n")
            for _ in range(3):  # words of a reply, whichever they are on this machine
                terminal.read_until(" ")
            terminal.interrupt()
            assert len(terminal.read_until(">>> ")) < 2000
        terminal.type("/exit\n")
        assert terminal.wait() == 0
        assert terminal.is_unchanged()


def test_ctrl_c_before_the_first_token_leaves_no_turn() -> None:
    with typed("--temp", "0", "--json") as terminal:
        terminal.read_until(">>> ")
        terminal.type(f'"""{LONG * 40}\n')  # a second to prefill
        terminal.read_until("... ")
        terminal.type('"""\n')
        time.sleep(0.05)
        terminal.interrupt()
        reply = json.loads(terminal.read_until(">>> ").split("\n", 1)[-1])
        assert (reply["content"], reply["finish_reason"]) == ("", "interrupted")
        terminal.type("Hello\n")
        first = json.loads(terminal.read_until(">>> ").split("\n", 1)[-1])
        assert first["finish_reason"] == "stop"
        assert first["stats"]["n_prompt"] - reply["stats"]["n_prompt"] < 40
        terminal.type("\x04")
        assert terminal.wait() == 0


def test_a_stopped_reply_is_marked_in_json() -> None:
    with typed("--json", "--temp", "0") as terminal:
        terminal.read_until(">>> ")
        terminal.type(f"{LONG}\n")
        time.sleep(0.5)
        terminal.interrupt()
        reply = json.loads(terminal.read_until(">>> ").split("\n", 1)[-1])
        assert reply["finish_reason"] == "interrupted"
        terminal.type("\x04")
        assert terminal.wait() == 0


def test_ctrl_c_ends_a_piped_conversation() -> None:
    command = [sys.executable, "-m", "edge_speq", "chat", "--temp", "0"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdin.write(f"{LONG}\n".encode())
        process.stdin.flush()
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        assert process.communicate()[1] == b""
        assert process.returncode == 130
