"""One forward, one object: threads, replicas, what is left after a forward, kept positions."""

import copy
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import LoraConfig, ShadowConfig, get_peft_model
from torch import nn
from torch.optim.swa_utils import AveragedModel
from transformers import GenerationConfig

import depthmix
from depthmix.errors import DepthmixError
from depthmix.method.mixture import DepthMixture
from depthmix.model.runtime import runtime_of
from models import PLAIN, VOCABULARY, attached, tiny_model, token_ids
from task_models import CLASSIFIERS, MASKED, build

IDS = token_ids()


def masked(name="roberta"):
    return attached(build(MASKED[name])), {"input_ids": IDS, "labels": IDS}


def classifier(name="bert"):
    model = attached(build(CLASSIFIERS[name]))
    return model, {"input_ids": IDS, "labels": torch.tensor([0, 2])}


def causal(name="llama"):
    return attached(tiny_model(name)), {"input_ids": IDS, "labels": IDS}


BUILDERS = [causal, masked, classifier]


def late_layer(model):
    return model.get_submodule(runtime_of(model).anatomy.layer_paths[0])


@pytest.mark.parametrize("build_model", BUILDERS)
def test_eight_threads_are_as_one(build_model):
    model, _ = build_model()
    prompts = [torch.randint(4, VOCABULARY, (1 + i % 2, 3 + i)) for i in range(8)]

    @torch.no_grad()
    def run(ids):
        return [model(input_ids=ids).logits for _ in range(10)]

    alone = [run(ids)[0] for ids in prompts]
    with ThreadPoolExecutor(8) as threads:
        for one, several in zip(alone, threads.map(run, prompts), strict=True):
            assert all(torch.equal(logits, one) for logits in several)


def test_eight_threads_generate_as_one():
    model, _ = causal()
    prompts = [torch.randint(4, VOCABULARY, (1, 3 + i)) for i in range(8)]

    def generate(ids):
        options = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
        return model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    alone = list(map(generate, prompts))
    with ThreadPoolExecutor(8) as threads:
        several = list(threads.map(generate, prompts))
    assert all(map(torch.equal, alone, several))


def replica(module: nn.Module) -> nn.Module:
    """What DataParallel makes for a device: shallow copies with tensors in place of parameters."""
    twin = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        twin._modules[name] = None if child is None else replica(child)
    for name, parameter in module._parameters.items():
        if parameter is None:
            twin._parameters[name] = None
        else:
            setattr(twin, name, parameter.view_as(parameter))
    return twin


@pytest.mark.parametrize("build_model", BUILDERS)
@pytest.mark.parametrize("with_lora", [False, True])
def test_replicas_of_data_parallel_are_one_process(build_model, with_lora):
    model, inputs = build_model()
    if with_lora:
        model = depthmix.attach(
            depthmix.detach(model),
            depthmix.MoDEConfig(**PLAIN),
            LoraConfig(target_modules="all-linear"),
        )
    model.train()
    halves = [{name: tensor[i : i + 1] for name, tensor in inputs.items()} for i in range(2)]
    expected = [model(**half).loss for half in halves]
    sum(expected).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = {name: p.grad.clone() for name, p in trained.items()}
    model.zero_grad()
    replicas = [replica(model) for _ in halves]
    with ThreadPoolExecutor(2) as threads:
        outputs = list(threads.map(lambda r, half: r(**half), replicas, halves))
    found = [output.loss for output in outputs]
    torch.testing.assert_close(found, expected)
    sum(found).backward()
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.grad, gradients[name], msg=name)


def test_part_of_a_replica_is_refused():
    model, _ = causal()
    with pytest.raises(DepthmixError, match="wrap the whole model"):
        replica(model).model(input_ids=IDS)


class Watch:
    """Weak references to what the late layers give."""

    def __init__(self, model):
        self.states = []
        for path in runtime_of(model).anatomy.layer_paths:
            model.get_submodule(path).register_forward_hook(self.keep)

    def keep(self, _layer, _args, output):
        state = output if isinstance(output, torch.Tensor) else output[0]
        self.states.append(weakref.ref(state))

    def alive(self):
        gc.collect()
        return [state for state in self.states if state() is not None]


@pytest.mark.parametrize("build_model", BUILDERS)
@pytest.mark.parametrize("training", [True, False])
def test_no_state_is_alive_after_a_forward(build_model, training):
    model, inputs = build_model()
    watch = Watch(model)
    loss = model.train(training)(**inputs).loss.detach()
    assert loss.isfinite()
    assert len(watch.states) == 3
    assert not watch.alive()


@pytest.mark.parametrize("build_model", BUILDERS)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, torch.OutOfMemoryError])
def test_no_state_is_alive_after_an_error_and_the_next_forward_is_right(build_model, error):
    model, inputs = build_model()
    torch.manual_seed(1)
    expected = model.train()(**inputs).loss.detach()
    trunk = model.base_model(input_ids=IDS)[0].detach()
    watch = Watch(model)

    def fail(_layer, _args, _output):
        raise error("in mid-forward")

    handle = late_layer(model).register_forward_hook(fail)
    with pytest.raises(error):
        model(**inputs)
    handle.remove()
    assert not watch.alive()
    assert runtime_of(model).current() is None
    assert torch.equal(model.base_model(input_ids=IDS)[0], trunk)
    torch.manual_seed(1)
    assert torch.equal(model(**inputs).loss, expected)


@pytest.mark.parametrize("build_model", BUILDERS)
def test_model_is_copied_averaged_and_pickled_after_a_training_forward(build_model):
    model, inputs = build_model()
    model.train()(**inputs).loss.backward()
    model.zero_grad()
    expected = model.eval()(input_ids=IDS).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(input_ids=IDS).logits, expected)
        assert runtime_of(twin) is not runtime_of(model)
    assert torch.equal(AveragedModel(model)(input_ids=IDS).logits, expected)


@pytest.mark.parametrize(
    "keep",
    [
        *(1, 4, torch.tensor([0, 3, 8]), torch.tensor([0, 3, 8], dtype=torch.int32)),
        *(torch.tensor([-1, 2]), torch.arange(9) % 2 == 0),
    ],
)
def test_kept_positions_alone_are_mixed(monkeypatch, keep):
    model, _ = causal("gemma2")
    with torch.no_grad():
        whole = model(input_ids=IDS).logits
    shapes = []
    forward = DepthMixture.forward

    def spy(self, normed, *args):
        shapes.append(tuple(normed.shape[:2]))
        return forward(self, normed, *args)

    monkeypatch.setattr(DepthMixture, "forward", spy)
    with torch.no_grad():
        kept = model(input_ids=IDS, logits_to_keep=keep).logits
    wanted = whole[:, -keep:] if isinstance(keep, int) else whole[:, keep]
    torch.testing.assert_close(kept, wanted)
    assert shapes == [(2, wanted.shape[1])]


def test_prefill_of_generate_mixes_one_position(monkeypatch):
    model, _ = causal()
    with depthmix.routing(model) as record:
        expected = model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert record.gates[0].shape[1] == IDS.shape[1]  # who records sees all
    shapes = []
    monkeypatch.setattr(
        runtime_of(model), "mix", lambda f, n: shapes.append(n.shape[1]) or f.mixture(n)[0]
    )
    found = model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(found, expected)
    assert shapes == [1, 1, 1]


def test_continuous_batching_of_transformers():
    """It asks for the logits of one position of each of several packed prompts."""
    model, _ = causal()
    prompts = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16]]
    expected = [
        model.generate(torch.tensor([p]), max_new_tokens=4, do_sample=False, eos_token_id=None)
        for p in prompts
    ]
    options = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    made = model.generate_batch(prompts, generation_config=options, progress_bar=False)
    found = [list(reply.generated_tokens) for reply in made.values()]
    assert found == [reply[0, -4:].tolist() for reply in expected]


def test_hidden_states_are_whole_where_few_logits_are_kept():
    model, _ = causal()
    with torch.no_grad():
        whole = model(input_ids=IDS, output_hidden_states=True).hidden_states[-1]
        kept = model(input_ids=IDS, output_hidden_states=True, logits_to_keep=1).hidden_states[-1]
    assert torch.equal(whole, kept)


@pytest.mark.parametrize("build_model", [masked, classifier])
def test_hidden_states_of_stacked_models_have_the_batch_s_rows(build_model):
    model, _ = build_model()
    expected = depthmix.detach(copy.deepcopy(model))(input_ids=IDS, output_hidden_states=True)
    found = model(input_ids=IDS, output_hidden_states=True)
    for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("build_model", BUILDERS)
def test_arguments_that_another_library_replaces(build_model):
    """Inference goes on where the trunk makes the mixture; otherwise it is refused."""
    model, inputs = build_model()
    expected = model(input_ids=IDS).logits
    handle = model.register_forward_pre_hook(lambda _m, a, k: (a, dict(k)), with_kwargs=True)
    if build_model is causal:
        torch.testing.assert_close(model(input_ids=IDS).logits, expected)
    else:
        with pytest.raises(DepthmixError, match="prepend=True"):
            model(input_ids=IDS)
    with pytest.raises(DepthmixError, match="prepend=True"):
        model.train()(**inputs)
    handle.remove()
    assert torch.equal(model.eval()(input_ids=IDS).logits, expected)


def test_a_tuning_method_that_changes_the_arguments_generates():
    """ShadowPEFT does so with a cache, from the second token on."""
    shadow = ShadowConfig(task_type="CAUSAL_LM", r=2, shadow_num_hidden_layers=1)
    model = depthmix.attach(tiny_model("llama"), depthmix.MoDEConfig(**PLAIN), shadow).eval()
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with depthmix.routing(model) as record:
        cached = model.generate(input_ids=IDS, **options)
    assert len(record.gates) == 5
    assert torch.equal(cached, model.generate(input_ids=IDS, use_cache=False, **options))


def test_layers_that_were_replicated_since_are_refused():
    model, _ = causal()
    wrapped = get_peft_model(
        model,
        LoraConfig(
            target_modules=["q_proj"],
            layer_replication=[(0, 4), (2, 4)],
            modules_to_save=["depthmix"],
        ),
    )
    with pytest.raises(DepthmixError, match=r"had 4 layers .* and has 6 now"):
        wrapped(input_ids=IDS)


def test_two_models_in_one_another():
    outer, inner = causal()[0], causal("gpt2")[0]
    with torch.no_grad():
        expected = outer(input_ids=IDS).logits, inner(input_ids=IDS).logits
        found = []
        outer.model.layers[2].register_forward_hook(
            lambda *_: found.append(inner(input_ids=IDS).logits) and None
        )
        assert torch.equal(outer(input_ids=IDS).logits, expected[0])
    assert torch.equal(found[0], expected[1])


def test_record_of_nothing_says_so():
    model, _ = causal()
    with depthmix.routing(model) as record:
        pass
    with pytest.raises(DepthmixError, match="run the model within the block"):
        record.mean()
