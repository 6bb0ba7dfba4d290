from contextlib import contextmanager

import pytest
import torch
from components import build_pipeline, make_clip
from torch.backends import cuda

from rvedit_diffusers.training import checkpoint


torch.set_num_threads(1)  # tensors this small are slower on more
torch.backends.cudnn.allow_tf32 = False  # what a GPU computes is compared with a CPU


@pytest.fixture(scope="module", autouse=True)
def restored_attention_switches():
    """What a training on a CPU sets for its process does not reach the tests of other files."""
    flash, reduction = cuda.flash_sdp_enabled(), cuda.fp16_bf16_reduction_math_sdp_allowed()
    yield
    cuda.enable_flash_sdp(flash)
    cuda.allow_fp16_bf16_reduction_math_sdp(reduction)


@pytest.fixture
def stopped_at_the_first_checkpoint():
    """A context in which a training of `examples/tiny` ends as soon as it has written a checkpoint."""

    class Stop(Exception):
        pass

    @contextmanager
    def stopped():
        plain = checkpoint.save_checkpoint

        def stopping(*arguments):
            plain(*arguments)
            raise Stop

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
            patch.setattr(checkpoint, "save_checkpoint", stopping)
            yield

    return stopped


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
