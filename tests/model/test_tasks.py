"""Masked language models and encoder-decoders: their labels are not shifted."""

import copy

import pytest
import torch
from peft import LoraConfig
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments

import depthmix
import reference
from depthmix.errors import DiscoveryError
from models import PLAIN, attached, choose_last_layer, token_ids
from task_models import MASKED, SEQ2SEQ, build

K = 3
ALL = {**MASKED, **SEQ2SEQ}
IDS = token_ids()
DECODER_IDS = token_ids(2, 6)


def inputs_of(name):
    return {"input_ids": IDS} | ({"decoder_input_ids": DECODER_IDS} if name in SEQ2SEQ else {})


def parts(base, model, name):
    """The gate, and the head's output on every late layer, by the reference."""
    anatomy = model.depthmix_runtime.anatomy
    given = reference.head_inputs(base, ALL[name].layers, ALL[name].head, K, **inputs_of(name))
    # T5 scales between norm and head; the mixture is made before that.
    normed = given / anatomy.head_scale
    states = reference.adapted(model.depthmix, normed) * anatomy.head_scale
    return reference.gate(model.depthmix, normed), reference.raw_logits(base, states)


@pytest.mark.parametrize("name", ALL)
def test_one_hot_router_is_the_base_model_bit_for_bit(name):
    base = build(ALL[name])
    model = attached(base, perturbed=False, k=K)
    choose_last_layer(model.depthmix)
    with torch.no_grad():
        expected = base(**inputs_of(name)).logits
        assert torch.equal(model(**inputs_of(name)).logits, expected)


@pytest.mark.parametrize("name", ALL)
def test_logits_equal_the_reference(name):
    base = build(ALL[name])
    model = attached(base, k=K)
    with torch.no_grad():
        gate, raw = parts(base, model, name)
        torch.testing.assert_close(
            model(**inputs_of(name)).logits,
            (gate.unsqueeze(-1) * raw).sum(-2),
            rtol=1e-4,
            atol=1e-4,
        )


@pytest.mark.parametrize("name", ALL)
def test_loss_and_gradients_equal_the_reference(name):
    base = build(ALL[name])
    model = attached(base, k=K, distill_weight=0.7, distill_into="layers").train()
    labels = (DECODER_IDS if name in SEQ2SEQ else IDS).flip(1).clone()
    labels[0, 1:3] = -100
    loss = model(**inputs_of(name), labels=labels).loss
    loss.backward()
    ours = {n: p.grad.clone() for n, p in model.depthmix.named_parameters()}
    model.zero_grad()
    gate, raw = parts(base, model, name)
    supervised = labels != -100
    total = reference.loss(raw[supervised], gate[supervised], labels[supervised], weight=0.7)
    wanted = total / supervised.sum()
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-4)
    wanted.backward()
    for n, p in model.depthmix.named_parameters():
        torch.testing.assert_close(ours[n], p.grad, rtol=1e-3, atol=1e-4, msg=n)


@pytest.mark.parametrize("name", ALL)
def test_loss_of_one_layer_is_that_of_the_base_model(name):
    base = build(ALL[name])
    model = attached(base, perturbed=False, k=K, distill_weight=0.0)
    choose_last_layer(model.depthmix)
    labels = IDS.flip(1)
    with torch.no_grad():
        expected = base(input_ids=IDS, labels=labels).loss
        found = model.train()(input_ids=IDS, labels=labels).loss
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_cache_changes_nothing(name):
    model = attached(build(SEQ2SEQ[name]), k=K)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    replies = [model.generate(IDS, use_cache=cache, **options) for cache in (True, False)]
    assert torch.equal(*replies)


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_encoder_decoder_with_lora_in_its_own_trainer(name, tmp_path):
    base = build(SEQ2SEQ[name])
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_2_SEQ_LM")
    model = depthmix.attach(copy.deepcopy(base), depthmix.MoDEConfig(k=K), lora)
    row = {"input_ids": IDS[0].tolist(), "attention_mask": [1] * 9, "labels": [5, 6, 7]}
    trainer = Seq2SeqTrainer(
        model,
        Seq2SeqTrainingArguments(
            output_dir=str(tmp_path),
            max_steps=8,
            learning_rate=1e-2,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=[row] * 16,
        data_collator=DataCollatorForSeq2Seq(_Padding(), model=model),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    model.save_pretrained(tmp_path / "adapter")
    loaded = depthmix.load(copy.deepcopy(base), tmp_path / "adapter")
    with torch.no_grad():
        expected = model.eval()(**inputs_of(name)).logits
        assert torch.equal(loaded(**inputs_of(name)).logits, expected)


class _Padding:
    """As much of a tokenizer as the collator needs."""

    padding_side = "right"

    def save_pretrained(self, folder):
        pass

    def pad(self, features, **_options):
        return {name: torch.tensor([row[name] for row in features]) for name in features[0]}


@pytest.mark.parametrize("late_layers_only", [False, True])
def test_masked_model_with_lora(late_layers_only, tmp_path):
    base = build(MASKED["roberta"])
    lora = LoraConfig(r=4, target_modules="all-linear")
    model = depthmix.attach(
        copy.deepcopy(base), depthmix.MoDEConfig(k=K), lora, late_layers_only=late_layers_only
    ).train()
    optimizer = torch.optim.AdamW(depthmix.param_groups(model, lr=1e-2))
    losses = []
    for _ in range(8):
        losses.append(model(input_ids=IDS, labels=IDS).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path)
    loaded = depthmix.load(copy.deepcopy(base), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_shared_layers_are_refused():
    from transformers import AlbertConfig, AlbertForMaskedLM

    albert = AlbertConfig(
        vocab_size=97,
        hidden_size=32,
        embedding_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_hidden_layers=4,
    )
    with pytest.raises(DiscoveryError, match="called more than once"):
        depthmix.attach(AlbertForMaskedLM(albert))


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("rows", [1, 2])
def test_lora_on_the_head_leaves_one_row_a_row(name, rows):
    base = build(MASKED[name])
    model = attached(base)
    expected = model(input_ids=IDS[:rows]).logits
    head = MASKED[name].head.rpartition(".")[2]
    tuned = depthmix.attach(
        base, depthmix.MoDEConfig(**PLAIN), LoraConfig(target_modules=[head], r=2)
    )
    mixture = tuned.get_base_model().depthmix.modules_to_save["default"]
    mixture.load_state_dict(model.depthmix.state_dict())
    found = tuned.eval()(input_ids=IDS[:rows]).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    loss = tuned.train()(input_ids=IDS[:rows], labels=IDS[:rows]).loss
    loss.backward()
    lora = [p for n, p in tuned.named_parameters() if "lora_B" in n]
    assert lora
    assert all(p.grad.abs().max() > 0 for p in lora)
