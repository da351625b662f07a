"""Compensated checkpoints in vLLM as they are (``make test-vllm`` builds its environment)."""

import json
import shutil
import subprocess

import pytest
import torch

pytest.importorskip("gptqmodel", reason="needs the gptq extra")

from rig.engines.with_vllm import VLLM, VLLMError, run_vllm, serving
from rig.subjects.served import scores_of, served_checkpoint
from rig.subjects.tiny import VOCABULARY

from bc_plugin import Compensation
from bc_plugin.vectors.written import write_entry

if not VLLM.exists():
    pytest.skip("needs vLLM's environment: make setup-vllm", allow_module_level=True)

LENGTHS = (1, 2, 9, 40, 200, 600)
NOISE = 0.1  # of log-probabilities in bfloat16; the vectors move them by more than 0.5
# One process instead of three, where it makes no difference to what is tested.
ALONE = {"environment": {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}}
ALONE_ENGINE = {"distributed_executor_backend": "uni"}


def prompts(lengths=LENGTHS, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def apart(found, expected):
    """The mean distance of log-probabilities, each prompt's; those of a single token have none."""
    pairs = zip(found, expected, strict=True)
    return [float((torch.tensor(a) - b).abs().mean()) for a, b in pairs if len(a)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Checkpoints with and without vectors, each made once."""
    kept = {}

    def make(architecture="llama", positions=1, method="gptq"):
        key = (architecture, positions, method)
        if key not in kept:
            torch.manual_seed(0)
            folder = tmp_path_factory.mktemp("-".join(map(str, key)))
            kept[key] = served_checkpoint(folder, *key)
        return kept[key]

    return make


# Right numbers


@pytest.mark.parametrize(
    ("architecture", "positions"),
    [(name, 1) for name in ("llama", "mistral", "qwen3", "gemma3_text", "opt")]
    + [("llama", 0), ("gemma3_text", 0), ("llama", 3)],
)
def test_log_probabilities_are_those_of_transformers(made, tmp_path, architecture, positions):
    folder, plain = made(architecture, positions)
    found = run_vllm(folder, prompts(), tmp_path, **ALONE, **ALONE_ENGINE)["log_probabilities"]
    assert max(apart(found, scores_of(folder, prompts()))) < NOISE
    assert max(apart(found, scores_of(plain, prompts()))) > 5 * NOISE


@pytest.mark.parametrize("method", ["awq", "compressed-tensors"])
def test_other_formats(made, tmp_path, method):
    folder, plain = made("llama", 1, method)
    found = run_vllm(folder, prompts(), tmp_path, enforce_eager=True, **ALONE, **ALONE_ENGINE)
    assert max(apart(found["log_probabilities"], scores_of(folder, prompts()))) < NOISE
    assert max(apart(found["log_probabilities"], scores_of(plain, prompts()))) > 2 * NOISE


def test_every_process_has_its_share():
    """Tables of a linear for q, k and v; with fewer heads of k and v than processes, repeated."""
    script = """
import json
import torch
from bc_plugin.serving.shares import share, stacked
from vllm.model_executor.layers.linear import QKVParallelLinear

vectors = {"q": torch.arange(8.0)[None], "k": torch.tensor([[20.0, 21]])}
layer = QKVParallelLinear.__new__(QKVParallelLinear)
torch.nn.Module.__init__(layer)
layer.head_size = layer.v_head_size = layer.num_kv_heads = 1
layer.total_num_heads, layer.total_num_kv_heads = 8, 2
layer.num_heads, layer.num_kv_head_replicas = 2, 2
found = []
for layer.tp_rank in range(4):
    found.append(share(layer, stacked("qkv_proj", layer, ["q", "k", "v"], vectors))[0].tolist())
print(json.dumps(found))
"""
    ran = subprocess.run([VLLM, "-c", script], check=True, capture_output=True, text=True)
    expected = [[0, 1, 20, 0], [2, 3, 20, 0], [4, 5, 21, 0], [6, 7, 21, 0]]
    assert json.loads(ran.stdout.splitlines()[-1]) == expected


def test_vllms_own_settings_in_its_own_processes(made, tmp_path):
    folder, _ = made()
    found = run_vllm(folder, prompts(), tmp_path)["log_probabilities"]
    assert max(apart(found, scores_of(folder, prompts()))) < NOISE
    assert "torch_aot_compile" in (tmp_path / "vllm.log").read_text()


@pytest.mark.parametrize(
    "engine",
    [{}, {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}}],
    ids=["plain", "speculative"],
)
def test_prompts_in_parts_cached_and_continued(made, tmp_path, engine):
    folder, _ = made()
    asked = prompts()
    asked[-2] = asked[-2][:20] * 10  # something for n-grams to guess
    found = run_vllm(
        folder, asked, tmp_path, continued=12, max_num_batched_tokens=64, **engine, **ALONE
    )
    assert max(apart(found["log_probabilities"], scores_of(folder, asked))) < NOISE
    for number, run in enumerate(found["continuations"]):
        whole = [ids + one["ids"] for ids, one in zip(asked, run, strict=True)]
        scores = scores_of(folder, whole)
        expected = [s[len(ids) - 1 :] for s, ids in zip(scores, asked, strict=True)]
        assert max(apart([one["log_probabilities"] for one in run], expected)) < NOISE
        # vLLM keeps whole blocks of 128 tokens on a CPU.
        assert (run[-1]["cached"] >= 512) == (number > 0), "the second run is to hit the cache"


def test_a_wrong_position_is_seen(made, tmp_path):
    folder, _ = made()
    broken = {"environment": {**ALONE["environment"], "RIG_WRONG_POSITIONS": "1"}}
    found = run_vllm(folder, prompts(), tmp_path, **broken, **ALONE_ENGINE)["log_probabilities"]
    distances = apart(found, scores_of(folder, prompts()))
    assert min(distances) > NOISE
    assert max(distances) > 5 * NOISE


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_two_workers(made, tmp_path, architecture):
    folder, _ = made(architecture)
    found = run_vllm(folder, prompts(), tmp_path, tensor_parallel_size=2)["log_probabilities"]
    assert max(apart(found, scores_of(folder, prompts()))) < NOISE


def test_compiled_code_is_not_kept_for_other_vectors(made, tmp_path):
    (first, _), (second, _) = made("llama", 1), made("llama", 0)
    served = tmp_path / "served"
    for folder in (first, second, first):
        shutil.rmtree(served, ignore_errors=True)
        shutil.copytree(folder, served)
        found = run_vllm(served, prompts(), tmp_path, **ALONE, **ALONE_ENGINE)
        assert max(apart(found["log_probabilities"], scores_of(folder, prompts()))) < NOISE
    # Whether a kept one was loaded, vLLM does not tell; where it is kept does.
    kept = tmp_path / "vllm-cache" / "torch_compile_cache" / "torch_aot_compile"
    assert len(list(kept.iterdir())) == 2


# The server


def test_the_server_gives_what_the_library_gives(made, tmp_path):
    folder, _ = made()
    asked = prompts((9, 200))
    found = run_vllm(folder, asked, tmp_path, continued=4, **ALONE, **ALONE_ENGINE)
    with serving(folder, tmp_path) as complete:
        answers = [complete(prompt=ids, max_tokens=4, echo=True, logprobs=0) for ids in asked]
    scores = [answer["logprobs"]["token_logprobs"][1:] for answer in answers]
    expected = [
        torch.tensor(of_prompt + after["log_probabilities"])
        for of_prompt, after in zip(
            found["log_probabilities"], found["continuations"][0], strict=True
        )
    ]
    assert max(apart(scores, expected)) < NOISE / 2
    assert (
        max(
            apart(
                [row[: len(ids) - 1] for row, ids in zip(scores, asked, strict=True)],
                scores_of(folder, asked),
            )
        )
        < NOISE
    )


def test_the_server_ends_with_the_error(made, tmp_path):
    folder = _changed(made()[0], tmp_path / "changed", _another_vector)
    error = pytest.raises(VLLMError, match=r"BiasCompensationError: .*are not those")
    with error, serving(folder, tmp_path):
        pass


# Passive


def test_other_checkpoints_are_left_alone(made, tmp_path):
    _, plain = made()
    without = {**ALONE["environment"], "VLLM_PLUGINS": "rig_kernels"}
    asked = {"classes": True, **ALONE_ENGINE}
    found = run_vllm(plain, prompts(), tmp_path, **ALONE, **asked)
    alone = run_vllm(plain, prompts(), tmp_path, environment=without, **asked)
    assert found == alone
    assert not any("bc_plugin" in name for name in found["classes"])


def test_linears_with_vectors_have_classes_of_ours(made, tmp_path):
    found = run_vllm(made()[0], prompts((2,)), tmp_path, classes=True, **ALONE, **ALONE_ENGINE)
    assert "bc_plugin.serving.methods.AutoGPTQLinearMethod" in found["classes"]


def test_without_the_plugin_vllm_refuses(made, tmp_path):
    without = {**ALONE["environment"], "VLLM_PLUGINS": "rig_kernels"}
    with pytest.raises(VLLMError, match="There is no module or parameter named"):
        run_vllm(made()[0], prompts((2,)), tmp_path, environment=without, **ALONE_ENGINE)


def test_joint_weights_of_compressed_tensors_need_the_plugin(made, tmp_path):
    source, folder = made("llama", 1, "compressed-tensors")[0], tmp_path / "joint"
    shutil.copytree(source, folder)
    write_entry(folder, Compensation.load(source).replaced(joint=True).entry())
    alone = {**ALONE, **ALONE_ENGINE, "enforce_eager": True}
    found = run_vllm(folder, prompts(), tmp_path, **alone)["log_probabilities"]
    assert max(apart(found, scores_of(folder, prompts()))) < NOISE
    without = {**ALONE["environment"], "VLLM_PLUGINS": "rig_kernels"}
    with pytest.raises(VLLMError, match="only bc_plugin loads"):
        run_vllm(folder, prompts((2,)), tmp_path, environment=without, **ALONE_ENGINE)


# Mistakes are loud


def _changed(source, folder, change):
    """A copy whose entry, or tensors, are others."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    change(config["quantization_config"], tensors)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _another_vector(settings, tensors):
    tensors["model.layers.0.mlp.up_proj.bias_compensation"] += 1


def _another_weight(settings, tensors):
    tensors["model.layers.0.mlp.up_proj.qweight"][0, 0] += 1


def _no_vector(settings, tensors):
    del tensors["model.layers.1.self_attn.k_proj.bias_compensation"]


def _newer(settings, tensors):
    settings["bias_compensation"]["format_version"] = 9


def _three_bits(settings, tensors):
    settings["bits"] = 3


MISTAKES = {
    _another_vector: "model.safetensors: the compensation tensors .* are not those",
    _another_weight: "the weights in .*model.safetensors are not those",
    _no_vector: "model.layers.1.self_attn.k_proj.bias_compensation; the checkpoint is incomplete",
    _newer: "format version 9",
    _three_bits: "bc-plugin export COMPENSATED OUT --for vllm",
}


@pytest.mark.parametrize("change", MISTAKES, ids=lambda change: change.__name__[1:])
def test_mistakes_are_errors(made, tmp_path, change):
    folder = _changed(made()[0], tmp_path / "changed", change)
    with pytest.raises(VLLMError, match=f"BiasCompensationError: .*{MISTAKES[change]}"):
        run_vllm(folder, prompts((2,)), tmp_path, enforce_eager=True, **ALONE, **ALONE_ENGINE)


def test_an_error_in_a_worker_is_in_the_log_and_ends_vllm(made, tmp_path):
    folder = _changed(made()[0], tmp_path / "changed", _another_vector)
    with pytest.raises(VLLMError, match=r"Worker.*BiasCompensationError: .*are not those"):
        run_vllm(folder, prompts((2,)), tmp_path, enforce_eager=True)


def test_another_version_of_vllm_is_refused(made, tmp_path):
    other = {"environment": {**ALONE["environment"], "RIG_OTHER_VLLM": "1"}}
    with pytest.raises(VLLMError, match=r"vllm 0\.32\.0.* is not supported"):
        run_vllm(made()[0], prompts((2,)), tmp_path, **other, **ALONE_ENGINE)
