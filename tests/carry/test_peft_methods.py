"""Every tuning method of PEFT: it works with MoDE as it does without, or is refused."""

from pathlib import Path

import pytest
from peft import PEFT_TYPE_TO_CONFIG_MAPPING

from peft_methods import check

METHODS = sorted(method.value for method in PEFT_TYPE_TO_CONFIG_MAPPING)
# What PEFT itself does not do on a tiny Llama, and what MoDE refuses.
NOT_BUILT = {"SHADOW", "XLORA"}
REFUSED = {
    "ADAPTION_PROMPT": "no modules_to_save",
    "CPT": "a loss of its own",
    "POLY": "task_ids should not be None",
    "TRAINABLE_TOKENS": "no modules_to_save",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
def test_method(method):
    results = check(method)
    if method in REFUSED:
        assert results["attach"].startswith("refused")
        assert REFUSED[method] in results["attach"]
        return
    if method in NOT_BUILT:
        assert results["attach"].startswith("not built")
        return
    assert set(results.values()) <= {"yes", "PEFT cannot"}, results
    assert results["train"] == results["save, load"] == results["resume"] == "yes"


def test_table_in_the_documents_is_complete():
    table = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    assert [method for method in METHODS if f"| {method} |" not in table] == []
