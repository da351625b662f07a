"""AutoGPTQ on the first 8 blocks of a real model; ``make benchmark-auto-gptq`` runs the whole."""

import pytest

pytest.importorskip("auto_gptq", reason="needs the autogptq extra, in its own environment")

import auto_gptq_run

import bc_plugin


def test_the_option_helps_and_survives_a_new_process(tmp_path, monkeypatch):
    monkeypatch.setattr(auto_gptq_run, "EVALUATED", 4)
    monkeypatch.setattr(auto_gptq_run, "SAMPLES", 16)
    try:
        found = auto_gptq_run.run(tmp_path, blocks=8)
    finally:
        bc_plugin.disable()
    # A model without its later blocks predicts nothing, so its perplexity says nothing either.
    assert found["GPTQ + BC"].kl < found["GPTQ"].kl
