"""MoDE on the types that users name; `make models` checks all types and writes docs/models.json."""

import pytest

from conformance import check
from without_depthmix import without_depthmix

FAMILIES = (
    *("llama", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "mistral", "mixtral"),
    *("phi", "phi3", "gpt2", "gpt_neox", "opt", "bloom", "falcon", "olmo2", "cohere2", "granite"),
    *("smollm3", "deepseek_v2", "deepseek_v3", "glm4", "mamba", "mamba2"),
    *("bart", "openai-gpt", "bert"),  # no final norm; a head of several layers
)


NOT_EXPORTED = ("bert",)


@pytest.fixture(scope="module")
def ask():
    with without_depthmix() as ask:
        yield ask


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", FAMILIES)
def test_all_checks_hold(model_type, ask):
    result = check(model_type, ask)
    assert (result.status, result.reason) == ("ok", "")
    if model_type in NOT_EXPORTED:
        assert result.export.startswith("refused: ")
    else:
        assert result.export == "yes"
