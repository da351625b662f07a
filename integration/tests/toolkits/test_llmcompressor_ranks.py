"""llm-compressor on two ranks, as ``torchrun`` starts them, each with its share of the data."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("llmcompressor", reason="needs llm-compressor")

from rig.folders import INTEGRATION
from rig.quantizers import llmcompressor_ranks
from rig.quantizers.llmcompressor_ranks import CASES, compensated
from rig.subjects.tiny import logits, tiny_checkpoint
from transformers import AutoModelForCausalLM

from bc_plugin import Compensation

REFUSED = {"refined": "refine what is saved", "not shared": "are not the same"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "float")


@pytest.fixture(scope="module")
def ranks(source, tmp_path_factory):
    """What two ranks have found, and the folder that they have written into."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", llmcompressor_ranks.__file__, source, str(folder)]
    paths = (str(INTEGRATION), os.environ.get("PYTHONPATH"))
    own = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env={**os.environ, **own}, timeout=600)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)], folder


@pytest.mark.parametrize("case", [case for case in CASES if case not in REFUSED])
def test_the_vectors_are_those_of_one_rank(ranks, source, tmp_path, case):
    alone = compensated(case, source, tmp_path)
    both = [found[case] for found in ranks[0]]
    # Of sums in another order GPTQ may round an integer the other way, and what follows with it.
    near = 0.05 if alone["joint"] else 1e-4
    for found in both:
        assert found["joint"] == alone["joint"] == (case != "not joint")
        assert found["vectors"].keys() == alone["vectors"].keys()
        for name, vectors in alone["vectors"].items():
            assert (found["vectors"][name] - vectors).norm() < near * vectors.norm() + 1e-5
            assert torch.equal(both[0]["vectors"][name], found["vectors"][name])
            errors = found["errors"][name], alone["errors"][name]
            assert errors[0].after == pytest.approx(errors[1].after, rel=near)
            assert (errors[0].held_out_after is None) == (errors[1].held_out_after is None)
        assert (found["logits"] - alone["logits"]).norm() < near * alone["logits"].norm()


@pytest.mark.parametrize("case", [case for case in CASES if case not in REFUSED])
def test_the_first_rank_has_written_it(ranks, enabled, case):
    (first, _), folder = ranks
    loaded = AutoModelForCausalLM.from_pretrained(folder / case)
    attached = Compensation.attached_to(loaded)
    if case == "native":
        assert attached is None and loaded.config.mlp_bias
    else:
        assert attached.digest == first[case]["digest"]
    torch.testing.assert_close(logits(loaded), first[case]["logits"], rtol=1e-3, atol=1e-3)
    assert {path.name for path in folder.iterdir()} == {"0.pt", "1.pt", *CASES} - set(REFUSED)


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_right_is_refused_on_both(ranks, case):
    for found in ranks[0]:
        assert REFUSED[case] in found[case]["error"]
