import pytest

pytest.importorskip("gguf", reason="needs the gguf extra")
