"""Where the rig finds things: wrong folders would skip tests, or train and fetch anew."""

from rig.engines import with_llama_cpp, with_vllm
from rig.folders import INTEGRATION, REPOSITORY


def test_folders_are_those_of_the_repository():
    assert (REPOSITORY / "pyproject.toml").is_file()
    assert (INTEGRATION / "environments" / "current.txt").is_file()


def test_workers_are_beside_what_starts_them():
    assert with_vllm.WORKER.is_file()
    assert with_llama_cpp.WORKER.is_file()
