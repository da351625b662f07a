"""AutoAWQ's own pipeline."""

import torch


def quantize(source, calibration, flag, settings):
    from awq import AutoAWQForCausalLM
    from transformers import AutoTokenizer

    # Half precision is many times slower on a CPU; it stores its weights in float16 all the same.
    awq = AutoAWQForCausalLM.from_pretrained(source, torch_dtype=torch.float32)
    sequences = [item["input_ids"][0].tolist() for item in calibration]
    config = {"w_bit": settings["bits"], "q_group_size": settings["group_size"], "version": "GEMM"}
    awq.quantize(
        AutoTokenizer.from_pretrained(source),
        quant_config={**config, "bias_compensation": flag},
        calib_data=sequences,
        max_calib_seq_len=len(sequences[0]),
    )
    return awq


def save(awq, folder):
    awq.save_quantized(str(folder))


def load(folder, device="cpu"):
    from awq import AutoAWQForCausalLM

    awq = AutoAWQForCausalLM.from_quantized(str(folder), device_map={"": device}, fuse_layers=False)
    return awq.model
