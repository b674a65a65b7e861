"""Templates: the one place where a question becomes a prompt, for training and evaluation alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Template:
    """How an instruction, with or without an input, becomes a prompt, and where the answer starts.

    Attributes:
        form: (instruction, input) -> prompt.
        gap: what stands between prompt and answer. It goes with the answer, as it does where
            running text is tokenised.
    """

    form: Callable[[str, str], str]
    gap: str

    def prompt(self, instruction: str, context: str = "") -> str:
        """Return the prompt."""
        return self.form(instruction, context)

    def completion(self, answer: str) -> str:
        """Return the completion that training supervises; the trainer adds end-of-sequence."""
        return self.gap + answer


def _alpaca(instruction: str, context: str) -> str:
    paired = ", paired with an input that provides further context" if context else ""
    given = f"### Input:\n{context}\n\n" if context else ""
    return (
        f"Below is an instruction that describes a task{paired}. Write a response that "
        "appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n{given}### Response:\n"
    )


def _question(instruction: str, context: str) -> str:
    return f"Question: {instruction}{' ' if context else ''}{context}\nAnswer:"


TEMPLATES = {
    # Stanford Alpaca's, which LLM-Adapters uses too. The prompt ends with a line break: a blank
    # before the answer would be one token with it.
    "alpaca": Template(_alpaca, gap=""),
    # That of evaluation harnesses for GSM8K.
    "question": Template(_question, gap=" "),
}
