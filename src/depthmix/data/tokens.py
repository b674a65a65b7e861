"""Rows as a model gets them: token ids, and which of them are supervised."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from depthmix.data.code import code_digest
from depthmix.data.conversation import (
    Rendered,
    Supervise,
    reads_parts,
    renderer,
    renders_tools,
    supervised,
)
from depthmix.data.fields import Row, common_length
from depthmix.data.formats import conversational
from depthmix.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

IGNORED = -100


class RefusedRow(DataError):
    """The chat template does not take a row.

    Attributes:
        row: the row, as `load_source` gave it; `depthmix.data.load.place_of` finds it.
    """

    row: Row

    @classmethod
    def of(cls, row: Row, reason: DataError) -> RefusedRow:
        """Return the error of a row; made here, so that it can be pickled by its message."""
        refused = cls(str(reason))
        refused.row = row
        return refused


def tokenised(
    rows: Dataset,
    format: str,
    tokenizer: PreTrainedTokenizerBase,
    supervise: Supervise = "assistant",
    processes: int | None = None,
) -> Dataset:
    """Return rows of `load_source` as `input_ids` and `labels`, -100 where nothing is supervised.

    Of messages, the answers are supervised; of prompt and completion, the completion with the
    end-of-sequence token; of a text, all of it. `supervise` says otherwise: `all` takes prompts in,
    `last` leaves all answers but the last out. Nothing is cut: the trainer knows `max_length`.

    Args:
        rows: columns messages, or prompt and completion, or a text.
        format: name of their format.
        tokenizer: of the model, with its chat template.
        supervise: what is supervised.
        processes: number of processes to tokenise with.

    Raises:
        RefusedRow: the chat template does not take a row.
        DataError: nor the tools of any.
    """
    from datasets import Features, List, Value

    tokens = List(Value("int32"))
    return rows.map(
        _tokenise,
        batched=True,
        remove_columns=rows.column_names,
        features=Features({"input_ids": tokens, "labels": tokens}),
        fn_kwargs={
            "conversations": conversational(format),
            "tokenizer": tokenizer,
            "supervise": supervise,
            "code": code_digest(),
        },
        num_proc=processes,
        desc="Tokenising rows",
    )


def _tokenise(
    batch: Mapping[str, list[Any]],
    conversations: bool,
    tokenizer: PreTrainedTokenizerBase,
    supervise: Supervise,
    code: str,
) -> dict[str, list[list[int]]]:
    del code  # it is there for the key of the cache alone
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    if conversations:  # the template writes the special tokens
        parts = reads_parts(tokenizer)
        if any(batch.get("tools", [])) and not renders_tools(tokenizer):
            raise DataError(
                "the rows have tools, but the chat template leaves them out: give one that renders "
                "them with chat_template_path, or leave out the column"
            )
        texts = [text for row in rows for text in _rendered(row, tokenizer, supervise, parts)]
        ids = _ids(tokenizer, [text.text for text in texts], special=False)
    else:
        texts = [_plain(row, supervise) for row in rows]
        ids = _ids(tokenizer, [text.text for text in texts], special=True)
        ids = [_ended(row, tokenizer.eos_token_id) for row in ids]
    labels = _labels(tokenizer, texts, ids, special=not conversations)
    return {"input_ids": ids, "labels": labels}


def _rendered(
    written: Row, tokenizer: PreTrainedTokenizerBase, supervise: Supervise, parts: bool
) -> list[Rendered]:
    row = {name: json.loads(value) for name, value in written.items() if value is not None}
    prompt = row.get("prompt", [])
    conversation = [*prompt, *(row.get("messages") or row["completion"])]
    render = renderer(tokenizer, row.get("tools"), row.get("chat_template_kwargs"), parts)
    try:
        return supervised(conversation, len(prompt), supervise, render)
    except DataError as error:
        raise RefusedRow.of(written, error) from None


def _plain(row: Row, supervise: Supervise) -> Rendered:
    if "completion" not in row:
        (text,) = row.values()
        return Rendered(text, ((0, len(text)),))
    text = row["prompt"] + row["completion"]
    start = 0 if supervise == "all" else len(row["prompt"])
    return Rendered(text, ((start, len(text)),))


def _ended(ids: list[int], end: int) -> list[int]:
    """Return token ids that end with the end-of-sequence token once, whoever wrote it."""
    length = len(ids)
    while length and ids[length - 1] == end:
        length -= 1
    return [*ids[:length], end]


def _labels(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Rendered],
    ids: Sequence[list[int]],
    special: bool,
) -> list[list[int]]:
    """Return the labels of the spans.

    A span starts where the tokens of what stands before it, taken alone, are no longer those of
    the whole: a token that reaches into the span is supervised. So it is in TRL.
    """
    inner = [(text, cut) for text in texts for cut in _cuts(text)]
    before = iter(_ids(tokenizer, [text.text[:cut] for text, cut in inner], special))
    labels = []
    for text, row in zip(texts, ids, strict=True):
        known = {cut: common_length(next(before), row) for cut in _cuts(text)}
        of_row = [IGNORED] * len(row)
        for start, end in text.spans:
            span = slice(known.get(start, len(row)), known.get(end, len(row)))
            of_row[span] = row[span]
        labels.append(of_row)
    return labels


def _cuts(text: Rendered) -> list[int]:
    """Return where spans start and end, but for the end of the text."""
    return [cut for span in text.spans for cut in span if cut < len(text.text)]


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], special: bool) -> list[list[int]]:
    """Return the token ids of texts, with the special tokens of the tokenizer or without."""
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=special, return_attention_mask=False)
    return list(encoded["input_ids"])
