"""The configuration: JSON both ways, and every wrong value is refused by name."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from depthmix import DepthmixError, MoDEConfig
from depthmix.errors import ConfigError

FIELDS = {field.name: field for field in dataclasses.fields(MoDEConfig)}
weights = st.floats(0, 1e6, allow_nan=False)
paths = st.none() | st.text(min_size=1)


@st.composite
def configs(draw):
    k = draw(st.integers(1, 9))
    return MoDEConfig(
        k=k,
        distill_weight=draw(weights),
        divergence=draw(st.sampled_from(["kl", "reverse_kl", "js"])),
        distill_into=draw(st.sampled_from(["adaptation", "layers"])),
        distill_fraction=draw(st.floats(0, 1, exclude_min=True)),
        adaptation=draw(st.sampled_from(["norm", "low_rank", "affine", "none"])),
        adaptation_rank=draw(st.integers(1, 64)),
        router_input=draw(st.sampled_from(["last", "first", "all"])),
        router_top_k=draw(st.none() | st.integers(1, k)),
        router_prior=draw(st.none() | st.floats(0, 1, exclude_min=True, exclude_max=True)),
        router_warmup_steps=draw(st.integers(0, 1000)),
        balance_weight=draw(weights),
        layers_path=draw(paths),
        norm_path=draw(paths),
    )


@given(configs())
def test_json_round_trip(config):
    assert MoDEConfig.from_json(config.to_json()) == config
    assert MoDEConfig.from_dict(config.to_dict()) == config
    assert json.loads(config.to_json()).keys() == FIELDS.keys()


def test_fields_left_out_have_their_defaults():
    assert MoDEConfig.from_dict({}) == MoDEConfig.from_json("{}") == MoDEConfig()
    assert MoDEConfig.from_dict({"k": 5}) == MoDEConfig(k=5) != MoDEConfig()


def test_integers_stand_for_numbers():
    config = MoDEConfig(distill_weight=2, distill_fraction=1, balance_weight=0)
    assert MoDEConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("k", value) for value in (0, -1, 2.0, "3", None, True)),
        *(("distill_weight", value) for value in (-0.1, float("nan"), float("inf"), "1", None)),
        *(("divergence", value) for value in ("KL", "", None, 1)),
        *(("distill_into", value) for value in ("layer", None)),
        *(("distill_fraction", value) for value in (0, 0.0, 1.1, float("nan"), None, True)),
        *(("adaptation", value) for value in ("lora", None, ["norm"])),
        *(("adaptation_rank", value) for value in (0, 1.5, True)),
        *(("router_input", value) for value in ("middle", None)),
        *(("router_top_k", value) for value in (0, 4, 1.0, True)),
        *(("router_prior", value) for value in (0, 1, 0.0, 1.0, -0.5, float("nan"), "0.5", True)),
        *(("router_warmup_steps", value) for value in (-1, 0.5, None)),
        *(("balance_weight", value) for value in (-1, float("inf"), None, False)),
        *(("layers_path", value) for value in (3, ["model.layers"])),
        *(("norm_path", value) for value in (3, True)),
    ],
)
def test_wrong_value_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=rf"\b{name}\b") as error:
        MoDEConfig(**{name: value})
    assert repr(value) in str(error.value)


def test_top_k_may_not_exceed_k():
    assert MoDEConfig(k=2, router_top_k=2).router_top_k == 2
    with pytest.raises(ConfigError, match=r"1\.\.k \(2\).*not 3"):
        MoDEConfig(k=2, router_top_k=3)


def test_unknown_field_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"unknown field depth, kk; known fields are .*\bk\b"):
        MoDEConfig.from_dict({"kk": 3, "depth": 1})


@pytest.mark.parametrize(
    ("text", "message"), [("{k: 3}", "not JSON"), ("[3]", "JSON object"), ("3", "JSON object")]
)
def test_text_that_is_no_object_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        MoDEConfig.from_json(text)


def test_one_except_catches_every_error():
    with pytest.raises(DepthmixError):
        MoDEConfig(k=0)


def test_configuration_is_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MoDEConfig().k = 4  # type: ignore[misc]


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_has_help(name):
    assert FIELDS[name].metadata["help"].endswith(".")
