"""`depthmix chat`: what is kept, dropped and shown of a conversation."""

import io
import json

from transformers import AutoModelForCausalLM, AutoTokenizer

from depthmix.cli import main
from depthmix.commands import chat as chat_command
from depthmix.data.template import TEMPLATES


def chat(monkeypatch, adapter, said, *flags):
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    return main(["chat", adapter, *flags])


def test_chat_keeps_and_forgets_the_conversation(adapter, prompt_seen, monkeypatch, capsys):
    said = "Hi\n\nMore\n/reset\nNew\n/exit\nnever read\n"
    assert chat(monkeypatch, adapter, said, "--system", "Be brief.") == 0
    opening = "<|system|>Be brief.<|end|><|user|>"
    assert prompt_seen == [
        f"{opening}Hi<|end|><|assistant|>",
        f"{opening}Hi<|end|><|assistant|>four<|end|><|user|>More<|end|><|assistant|>",
        f"{opening}New<|end|><|assistant|>",
    ]


def test_chat_answers_and_ends_at_end_of_file(adapter, monkeypatch, capsys):
    assert chat(monkeypatch, adapter, "Hi\n", "--max-new-tokens", "4", "--show-routing") == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("/help shows the commands")
    assert shown.err.count("routing: ") == 1


def test_chat_needs_a_template(tiny, tmp_path, rows, capsys):
    bare = tmp_path / "bare"
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(bare)
    AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(bare)
    assert main(["chat", str(bare)]) == 2
    assert "no chat template" in capsys.readouterr().err


def test_commands_do_not_go_to_the_model(adapter, prompt_seen, monkeypatch, capsys):
    said = "/help\n/nonsense\n/system Be kind.\nHi\n/system\nHo\n"
    assert chat(monkeypatch, adapter, said) == 0
    assert prompt_seen == [
        "<|system|>Be kind.<|end|><|user|>Hi<|end|><|assistant|>",
        "<|user|>Ho<|end|><|assistant|>",
    ]
    shown = capsys.readouterr().out
    assert "/system TEXT   set the system message" in shown
    assert "There is no command /nonsense" in shown


def test_routing_is_switched(adapter, monkeypatch, capsys):
    said = "Hi\n/routing\nHi\n/routing\nHi\n"
    assert chat(monkeypatch, adapter, said, "--max-new-tokens", "2") == 0
    assert capsys.readouterr().err.count("routing: layer") == 1


def test_ctrl_c_ends_the_answer_alone(adapter, prompt_seen, monkeypatch, capsys):
    """What was said until then stays in the conversation."""
    record = chat_command.complete

    def interrupted(model, tokenizer, prompts, sampling, said):
        record(model, tokenizer, prompts, sampling, said)
        raise KeyboardInterrupt

    monkeypatch.setattr(chat_command, "complete", interrupted)
    assert chat(monkeypatch, adapter, "Hi\nMore\n") == 0
    assert "(stopped)" in capsys.readouterr().out
    assert prompt_seen[1] == (
        "<|user|>Hi<|end|><|assistant|>four<|end|><|user|>More<|end|><|assistant|>"
    )


def test_lines_are_edited_where_a_person_types(adapter, prompt_seen, monkeypatch):
    """With a terminal, lines come from prompt_toolkit; here, by a pipe in place of keys."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        up, left, interrupt, end = "\x1b[A", "\x1b[D", "\x03", "\x04"
        typed = iter([f"Hx{left}o\r", f"no{interrupt}", "/reset\r", f"{up}{up}\r", end])
        session = PromptSession.prompt

        def prompt(self, *args):
            """Type the next line once the session waits for it."""
            return session(self, *args, pre_run=lambda: keys.send_text(next(typed)))

        monkeypatch.setattr(PromptSession, "prompt", prompt)
        assert main(["chat", adapter]) == 0
    assert prompt_seen == ["<|user|>Hox<|end|><|assistant|>"] * 2


def test_oldest_turns_make_room_with_a_word(adapter, prompt_seen, monkeypatch, capsys):
    said = "".join(f"Message {n} {'and so on ' * 6}\n" for n in range(4))
    assert chat(monkeypatch, adapter, said, "--max-new-tokens", "32") == 0
    assert "Message 0" not in prompt_seen[-1]
    assert prompt_seen[-1].startswith("<|user|>Message")
    assert "(the first 2 messages no longer fit and are left out)" in capsys.readouterr().out


def test_a_message_beyond_the_window_is_refused_alone(adapter, prompt_seen, monkeypatch, capsys):
    assert chat(monkeypatch, adapter, f"Hi\n{'too long ' * 99}\nMore\n") == 0
    assert "is too long" in capsys.readouterr().out
    assert len(prompt_seen) == 2
    assert "too long" not in prompt_seen[1]


def test_single_questions_are_asked_one_by_one(tiny, tmp_path, prompt_seen, monkeypatch, capsys):
    path, out = tmp_path / "alpaca.json", str(tmp_path / "out")
    path.write_text(json.dumps([{"instruction": "Add.", "input": "", "output": "4"}]))
    command = ["train", "--model_name_or_path", tiny, "--dataset", str(path), "--output_dir", out]
    assert main([*command, "--max_steps", "1", "--method", "none", "--disable_tqdm"]) == 0
    assert chat(monkeypatch, out, "Hi\nMore\n") == 0
    form = TEMPLATES["alpaca"]
    assert prompt_seen == [form.prompt("Hi"), form.prompt("More")]
    assert "stands alone" in capsys.readouterr().out
    assert main(["chat", out, "--system", "Be kind."]) == 2
    assert "have no system message" in capsys.readouterr().err
