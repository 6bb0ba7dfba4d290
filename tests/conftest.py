import pytest
import torch
from components import build_pipeline, make_clip


torch.set_num_threads(1)  # tensors this small are slower on more


@pytest.fixture
def pipe():
    """A tiny pipeline of the test's own."""
    return build_pipeline()


@pytest.fixture(scope="module")
def shared_pipe():
    """A tiny pipeline for tests that only call it."""
    return build_pipeline()


@pytest.fixture
def clip():
    """A clip (5, 32, 32, 3), uint8."""
    return make_clip()
